"""The command that began a run, recorded in MLflow as data, from which `status` prints the one that resumes it.

Whoever may write to MLflow may write its tags. So no tag makes this machine load a recipe file: such a file is a Python
program, and runs only when its path was typed on this command line. Only recipes that come with hemoco are loaded by a
recorded name, for runs begun before the command was recorded.
"""

import dataclasses
import json
from collections.abc import Mapping

from hemoco.config import flat_params
from hemoco.tracking.tags import Tag
from jobs.options import (
    RunOptions,
    TransferOptions,
    changed_settings,
    load_recipe,
    recipe_names,
    settings_flags,
)
from jobs.session import run_tags

_LONGEST = 5000  # characters that every MLflow takes in a tag


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordedCommand:
    """What a command line gave, apart from the names of the verb, the run and its storage."""

    recipe: str
    """Name of a shipped recipe, or path of a recipe file."""
    settings: dict[str, str]
    """Those that differ from the recipe's, by dotted names."""
    only: tuple[str, ...] = ()
    """The transfers that `--only` named."""

    def flags(self) -> list[str]:
        """The settings as they are given on a command line."""
        return settings_flags(self.settings)


def command_tags(verb: str, recipe_word: str, options: RunOptions) -> dict[str, str]:
    """Tags of a run that a command line begins or resumes: those of `run_tags`, and the command.

    Args:
        verb: of `python -m jobs`.
        recipe_word: the recipe as it was typed.
        options: what the command line was read to, with absolute URLs: it may be resumed in another folder.
    """
    tags = run_tags(verb, recipe_word)
    command = RecordedCommand(
        recipe=tags.get(Tag.RECIPE_FILE, recipe_word),
        settings=changed_settings(flat_params(options.recipe), load_recipe(recipe_word)),
        only=options.only if isinstance(options, TransferOptions) else (),
    )
    text = json.dumps(dataclasses.asdict(command))
    # an empty one replaces that of an earlier command; `status` then says that the command is not known
    return tags | {Tag.COMMAND: text if len(text) <= _LONGEST else ""}


def recorded_command(tags: Mapping[str, str], params: Mapping[str, str]) -> RecordedCommand | None:
    """The command that worked at a run last; None where it is not recorded and the run is not of a shipped recipe.

    Args:
        tags: of the run or sweep in MLflow.
        params: of the same.
    """
    if Tag.COMMAND in tags:
        return _read(tags[Tag.COMMAND])
    recipe_name = tags.get(Tag.RECIPE, "")
    if Tag.RECIPE_FILE in tags or recipe_name not in recipe_names():
        return None
    recipe = load_recipe(recipe_name)
    measured = {name.split(".")[1] for name in params if name.startswith("transfers.")}
    only = tuple(sorted(measured)) if measured != recipe.transfers.keys() else ()
    return RecordedCommand(recipe=recipe_name, settings=changed_settings(params, recipe), only=only)


def _read(text: str) -> RecordedCommand | None:
    """The command in a tag; None where the tag holds anything else."""
    try:
        fields = json.loads(text)
        command = RecordedCommand(
            recipe=str(fields["recipe"]),
            settings={str(name): str(value) for name, value in fields["settings"].items()},
            only=tuple(map(str, fields["only"])),
        )
        command.flags()  # a tuple's text may be damaged
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError):
        return None
    return command
