"""Finding a recipe and reading a command line over it."""

import ast
import dataclasses
import difflib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from hemoco.config import DataConfig, Recipe, config_digest, flat_params, init_label, init_url
from hemoco.errors import HemocoError, UsageError
from hemoco.names import check_new_name
from hemoco.results.sweep import search_settings
from hemoco.storage.objects import absolute_url, home
from hemoco.tracking.models import SCHEME

_FOLDER = Path(__file__).parent / "recipes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The settings of the recipe, and of the run: its name and its storage."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    run: str = ""
    """The run's identity; default: recipe name and config digest. The same again resumes it."""
    storage: str = ""
    """Where checkpoints and backbones go (s3://, file:// or a path); default: $HEMOCO_HOME/runs."""
    fresh: bool = False
    """Start anew, also if a run of this name exists."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions(RunOptions):
    """The settings of the recipe, and of the run: its name, its storage, the folder of its table."""

    out: str = ""
    """Folder for comparison.json, .csv, .md and report.html; default: the run's folder in $HEMOCO_HOME/reports."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferOptions(ReportOptions):
    """Options of `transfer`."""

    backbone: str = ""
    """URL or path of a backbone.safetensors."""
    only: tuple[str, ...] = ()
    """Transfers to run; default: all of the recipe."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions(ReportOptions):
    """Options of `sweep`."""

    out: str = ""
    """Folder for sweep.json; default: the sweep's folder in $HEMOCO_HOME/reports."""


OptionsT = TypeVar("OptionsT", bound=RunOptions)


def parse_options(verb: str, argv: list[str], kind: type[OptionsT]) -> OptionsT:
    """Reads `RECIPE [--name value ...]`; the run then has its name, and every path is an absolute URL.

    Paths become URLs here and nowhere later. The default name of a run is made before, of the settings as they were
    typed: the same command in another folder finds the run again, as does a newer hemoco.

    Raises:
        UsageError: as `typed_options`; for `transfer`, no backbone or an unknown transfer is named; for `sweep`, the
            recipe has none.
        StorageError: a URL is none that hemoco reads.
        SystemExit: 2 for a misspelt flag, 0 after --help.
    """
    options = typed_options(verb, argv, kind)
    options = dataclasses.replace(
        options,
        run=run_name(options),
        recipe=absolute_recipe(options.recipe),
        storage=absolute_url(options.storage or str(home() / "runs")),
    )
    if isinstance(options, TransferOptions) and not options.backbone.startswith(SCHEME):
        options = dataclasses.replace(options, backbone=absolute_url(options.backbone))
    return options


def typed_options(verb: str, argv: list[str], kind: type[OptionsT]) -> OptionsT:
    """Reads a command line like `parse_options`, and leaves its values as they were typed.

    Raises:
        UsageError: no recipe is named, or it is unknown; `--run` is no name of a run; `transfer` names no backbone, or
            a transfer that the recipe does not have.
        SystemExit: 2 for a misspelt flag, 0 after --help.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(
            f"usage: python -m jobs {verb} RECIPE [--setting value ...]   (RECIPE --help shows the settings)"
        )
        print(_known())
        raise SystemExit(0)
    if not argv:
        raise UsageError(f"{verb} needs a recipe: python -m jobs {verb} RECIPE [...]; {_known()}")
    default = kind(recipe=load_recipe(argv[0]))
    options = tyro.cli(
        kind,
        args=argv[1:],
        default=default,
        prog=f"python -m jobs {verb} {argv[0]}",
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
        use_underscores=True,
    )
    if options.run:  # else it is made of the recipe's name and a digest
        check_new_name("--run", options.run)
    if isinstance(options, TransferOptions):
        options = dataclasses.replace(options, recipe=_recipe_with_chosen_transfers(options))
    return options


def run_name(options: RunOptions) -> str:
    """The run's identity: what was given, else recipe name and a digest of all settings as they were typed.

    Raises:
        UsageError: it is that of a sweep, and the recipe has none.
    """
    recipe = options.recipe
    if not isinstance(options, SweepOptions):
        more = (options.backbone,) if isinstance(options, TransferOptions) else ()
        return options.run or f"{recipe.name}-{config_digest({'recipe': recipe, 'more': more})}"
    if recipe.sweep is None:
        raise UsageError(
            f"recipe {recipe.name} has no sweep: give it one, for example sweep=SweepConfig(objective='knn', "
            "space={'pretrain.optimizer.lr': LogUniform(0.01, 0.3)}); cifar10_resnet18_sweep is a recipe with one"
        )
    search = search_settings(flat_params(recipe))
    return (
        options.run or f"{recipe.name}-sweep-{config_digest({'recipe': recipe, 'search': search})}"
    )


def absolute_recipe(recipe: Recipe) -> Recipe:
    """The recipe with absolute URLs instead of paths; where it names no data, none.

    Raises:
        StorageError: a URL is none that hemoco reads.
    """
    transfers = {
        name: dataclasses.replace(
            config, data=_absolute_data(config.data), inits=tuple(map(_absolute_init, config.inits))
        )
        for name, config in recipe.transfers.items()
    }
    return dataclasses.replace(recipe, data=_absolute_data(recipe.data), transfers=transfers)


def _absolute_data(data: DataConfig) -> DataConfig:
    return dataclasses.replace(data, shards=absolute_url(data.shards)) if data.shards else data


def _absolute_init(init: str) -> str:
    url = init_url(init)
    return f"{init_label(init)}={absolute_url(url)}" if url else init


def _recipe_with_chosen_transfers(options: TransferOptions) -> Recipe:
    """The recipe with those of its transfers that `--only` names, or all."""
    recipe = options.recipe
    if not options.backbone:
        raise UsageError(
            "transfer needs --backbone URL, the backbone.safetensors that `pretrain` named at its end"
        )
    unknown = sorted(set(options.only) - recipe.transfers.keys())
    if unknown:
        known = ", ".join(recipe.transfers)
        raise UsageError(
            f"--only {unknown[0]}: recipe {recipe.name} has no such transfer; it has {known}"
        )
    kept = {
        name: config
        for name, config in recipe.transfers.items()
        if not options.only or name in options.only
    }
    return dataclasses.replace(recipe, transfers=kept)


def changed_settings(params: Mapping[str, str], recipe: Recipe) -> dict[str, str]:
    """Those of the flat settings `params` that a recipe has too, with another value."""
    flat = flat_params(recipe)
    return {name: params[name] for name in flat if params.get(name, flat[name]) != flat[name]}


def settings_flags(settings: Mapping[str, str]) -> list[str]:
    """Flags that give a recipe these settings.

    Raises:
        ValueError: a value begins as a tuple does and is none.
        SyntaxError: as `ValueError`.
    """
    words = []
    for name, wanted in settings.items():
        if wanted in ("True", "False"):
            head, _, last = name.rpartition(".")
            words.append(f"--{name}" if wanted == "True" else f"--{head}.no_{last}")
        elif wanted.startswith("("):
            words += [f"--{name}", *map(str, ast.literal_eval(wanted))]
        else:
            words += [f"--{name}", wanted]
    return words


def recipe_names() -> list[str]:
    """The recipes that come with hemoco."""
    return sorted(path.stem for path in _FOLDER.glob("*.py") if path.stem != "__init__")


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or the value `recipe` of a Python file by its path.

    Raises:
        UsageError: there is no such recipe, the file has no `recipe`, or it raises.
        HemocoError: as the file raised it, for example of settings that do not fit together.
    """
    path = Path(name) if name.endswith(".py") else _FOLDER / f"{name}.py"
    if not path.is_file() and name.endswith(".py"):
        raise UsageError(
            f"{name}: no such file; give the path of a Python file that defines `recipe`, or a name: {_known()}"
        )
    if not path.is_file():
        close = difflib.get_close_matches(name, recipe_names(), n=1)
        hint = f"did you mean {close[0]}?" if close else _known()
        raise UsageError(f"unknown recipe {name!r}: {hint}")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except HemocoError:
        raise
    except Exception as error:  # whatever a user's file raises, it is the file that is wrong
        raise UsageError(f"{path}: {type(error).__name__}: {error}") from error
    recipe = getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise UsageError(f"{path}: a recipe file must define `recipe = hemoco.config.Recipe(...)`")
    return recipe


def _known() -> str:
    return f"known are {', '.join(recipe_names())}, or give the path of a Python file that defines `recipe`"
