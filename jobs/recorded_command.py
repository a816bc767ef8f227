"""The command that started a run, recorded in MLflow, from which `status` builds the resuming one.

Anybody who may write to MLflow may write its tags. So no tag makes this machine load a recipe file:
such a file is a Python program, and it runs only if its path was typed on this command line. Only
recipes that come with hemoco are loaded by a recorded name, for runs that were started before the
command was recorded.
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

_LONGEST = 5000  # characters; every MLflow store accepts tags of this length


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordedCommand:
    """A command line without its verb, run name and storage."""

    recipe: str
    """Name of a shipped recipe, or path of a recipe file."""
    settings: dict[str, str]
    """Settings that differ from the recipe's, by their dotted names."""
    only: tuple[str, ...] = ()
    """The transfers that `--only` named."""

    def flags(self) -> list[str]:
        """The settings as flags of a command line."""
        return settings_flags(self.settings)


def command_tags(verb: str, recipe_argument: str, options: RunOptions) -> dict[str, str]:
    """Tags of a run that a command line starts or resumes: those of `run_tags`, and the command.

    Args:
        verb: verb of `python -m jobs`.
        recipe_argument: the recipe as it was typed, a name or a path.
        options: the options that were read, with absolute URLs: the run may be resumed from another
            folder.
    """
    tags = run_tags(verb, recipe_argument)
    command = RecordedCommand(
        recipe=tags.get(Tag.RECIPE_FILE, recipe_argument),
        settings=changed_settings(flat_params(options.recipe), load_recipe(recipe_argument)),
        only=options.only if isinstance(options, TransferOptions) else (),
    )
    text = json.dumps(dataclasses.asdict(command))
    # The tag is written even when it is empty: it must replace that of an earlier command. `status`
    # then reports that the command is not known.
    return tags | {Tag.COMMAND: text if len(text) <= _LONGEST else ""}


def recorded_command(tags: Mapping[str, str], params: Mapping[str, str]) -> RecordedCommand | None:
    """Reads the last command of a run.

    Args:
        tags: tags of the run or sweep in MLflow.
        params: params of the same.

    Returns:
        None if the command was not recorded and the recipe is not a shipped one.
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
    """Parses the command in a tag; None if the tag holds anything else."""
    try:
        fields = json.loads(text)
        settings = {str(name): str(value) for name, value in fields["settings"].items()}
        only = tuple(str(name) for name in fields["only"])
        command = RecordedCommand(recipe=str(fields["recipe"]), settings=settings, only=only)
        command.flags()  # raises if the text of a tuple is damaged
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError):
        return None
    return command
