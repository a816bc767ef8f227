"""Recipes, and the command lines that change their settings."""

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
from jobs.arguments import Folder, Name, Url, read_arguments

_FOLDER = Path(__file__).parent / "recipes"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of the run, then the settings of the recipe."""

    recipe: Annotated[Recipe, tyro.conf.arg(name="")]
    run: Name = ""
    """Name of the run; the same command resumes it. Default: recipe name and config digest."""
    storage: Url = ""
    """Folder for checkpoints and backbones: s3://, file:// or a path. Default:
    $HEMOCO_HOME/runs."""
    fresh: bool = False
    """Start anew even if a run of this name exists; deletes only that run's folder."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportOptions(RunOptions):
    """Options of the run, then the settings of the recipe."""

    out: Folder = ""
    """Folder for comparison.json, .csv, .md and report.html; default: the run's folder in
    $HEMOCO_HOME/reports."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransferOptions(ReportOptions):
    """Options of the run, then the settings of the recipe."""

    backbone: Url = ""
    """URL or path of a backbone.safetensors, or models:/NAME@ALIAS of a registered one."""
    only: tuple[str, ...] = ()
    """Transfers to run; default: all of the recipe."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions(ReportOptions):
    """Options of the sweep, then the settings of the recipe."""

    out: Folder = ""
    """Folder for sweep.json; default: the sweep's folder in $HEMOCO_HOME/reports."""


OptionsT = TypeVar("OptionsT", bound=RunOptions)


def parse_options(verb: str, argv: list[str], kind: type[OptionsT]) -> OptionsT:
    """Reads `RECIPE [--name value ...]`, names the run, and turns every path into an absolute URL.

    Paths become URLs here and nowhere later. The default name of a run is made before that, from
    the settings as they were typed, so that the same command finds the run again from another
    folder or with a newer hemoco.

    Raises:
        UsageError: see `typed_options`; or the recipe of a `sweep` has no sweep.
        StorageError: hemoco does not read URLs of this kind.
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
    """Reads a command line like `parse_options` and leaves its values as they were typed.

    Raises:
        UsageError: the recipe is missing or unknown; `--run` is not a valid name; `transfer` has no
            backbone, or `--only` names a transfer that the recipe does not have.
        SystemExit: 2 for a misspelt flag, 0 after --help.
    """
    if argv and argv[0] in ("-h", "--help"):
        print(_recipe_help(verb))
        raise SystemExit(0)
    if not argv:
        raise UsageError(f"{verb} needs a recipe: python -m jobs {verb} RECIPE [...]; {_known()}")
    options = read_arguments(
        kind,
        argv[1:],
        command=f"{verb} {argv[0]}",
        default=kind(recipe=load_recipe(argv[0])),
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff),
    )
    if options.run:  # a default name is always valid
        check_new_name("--run", options.run)
    if isinstance(options, TransferOptions):
        options = dataclasses.replace(options, recipe=_recipe_with_chosen_transfers(options))
    return options


def _recipe_help(verb: str) -> str:
    return "\n".join(
        [
            f"usage: python -m jobs {verb} RECIPE [--setting value ...]",
            "",
            "RECIPE is one of those below, or the path of a Python file that defines `recipe`.",
            f"`python -m jobs {verb} RECIPE --help` shows the settings of a recipe,",
            "`python -m jobs recipes` describes each recipe in a line.",
            "",
            *(f"  {name}" for name in recipe_names()),
        ]
    )


def run_name(options: RunOptions) -> str:
    """Name of the run: `--run`, or recipe name and a digest of all settings as they were typed.

    Raises:
        UsageError: the options are those of a sweep, and the recipe has none.
    """
    recipe = options.recipe
    if not isinstance(options, SweepOptions):
        more = (options.backbone,) if isinstance(options, TransferOptions) else ()
        return options.run or f"{recipe.name}-{config_digest({'recipe': recipe, 'more': more})}"
    if recipe.sweep is None:
        raise UsageError(
            f"recipe {recipe.name} has no sweep: give it one, for example "
            "sweep=SweepConfig(objective='knn', space={'pretrain.optimizer.lr': "
            "LogUniform(0.01, 0.3)}); cifar10_resnet18_sweep is a recipe with one"
        )
    search = search_settings(flat_params(recipe))
    digest = config_digest({"recipe": recipe, "search": search})
    return options.run or f"{recipe.name}-sweep-{digest}"


def absolute_recipe(recipe: Recipe) -> Recipe:
    """Returns the recipe with absolute URLs instead of paths; an empty path stays empty.

    Raises:
        StorageError: hemoco does not read URLs of this kind.
    """
    transfers = {}
    for name, config in recipe.transfers.items():
        inits = tuple(_absolute_init(init) for init in config.inits)
        transfers[name] = dataclasses.replace(config, data=_absolute_data(config.data), inits=inits)
    return dataclasses.replace(recipe, data=_absolute_data(recipe.data), transfers=transfers)


def _absolute_data(data: DataConfig) -> DataConfig:
    return dataclasses.replace(data, shards=absolute_url(data.shards)) if data.shards else data


def _absolute_init(init: str) -> str:
    url = init_url(init)
    return f"{init_label(init)}={absolute_url(url)}" if url else init


def _recipe_with_chosen_transfers(options: TransferOptions) -> Recipe:
    """Returns the recipe with the transfers that `--only` names, or with all."""
    recipe = options.recipe
    if not options.backbone:
        raise UsageError(
            "transfer needs --backbone URL, the backbone.safetensors whose URL `pretrain` prints "
            "at its end"
        )
    unknown = sorted(set(options.only) - recipe.transfers.keys())
    if unknown:
        known = ", ".join(recipe.transfers)
        raise UsageError(
            f"--only {unknown[0]}: recipe {recipe.name} has no such transfer; it has {known}"
        )
    if not options.only:
        return recipe
    chosen = {name: config for name, config in recipe.transfers.items() if name in options.only}
    return dataclasses.replace(recipe, transfers=chosen)


def changed_settings(params: Mapping[str, str], recipe: Recipe) -> dict[str, str]:
    """Returns those of the flat settings `params` that have another value in the recipe.

    Settings that the recipe does not have are left out.
    """
    flat = flat_params(recipe)
    return {name: params[name] for name in flat if params.get(name, flat[name]) != flat[name]}


def settings_flags(settings: Mapping[str, str]) -> list[str]:
    """Flags that give a recipe these settings.

    Raises:
        ValueError: a value begins with a parenthesis and is not a tuple.
        SyntaxError: see `ValueError`.
    """
    argv = []
    for name, value in settings.items():
        if value == "True":
            argv.append(f"--{name}")
        elif value == "False":
            group, _, last = name.rpartition(".")
            argv.append(f"--{group}.no_{last}")
        elif value.startswith("("):
            argv += [f"--{name}", *map(str, ast.literal_eval(value))]
        else:
            argv += [f"--{name}", value]
    return argv


def recipe_names() -> list[str]:
    """Names of the recipes that come with hemoco."""
    return sorted(path.stem for path in _FOLDER.glob("*.py") if path.stem != "__init__")


def recipe_path(name: str) -> Path:
    """Path of the file of a shipped recipe."""
    return _FOLDER / f"{name}.py"


def load_recipe(name: str) -> Recipe:
    """Loads a shipped recipe by its name, or the value `recipe` of a Python file by its path.

    Raises:
        UsageError: there is no such recipe or file, the file defines no `recipe`, or it raises.
        HemocoError: raised by the file, for example because settings contradict each other.
    """
    is_path = name.endswith(".py")
    path = Path(name) if is_path else recipe_path(name)
    if is_path and not path.is_file():
        raise UsageError(
            f"{name}: no such file; give the path of a Python file that defines `recipe`, or a "
            f"name: {_known()}"
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
    except Exception as error:  # the file may raise anything; whatever it is, the file is wrong
        raise UsageError(f"{path}: {type(error).__name__}: {error}") from error
    recipe = getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise UsageError(f"{path}: a recipe file must define `recipe = hemoco.config.Recipe(...)`")
    return recipe


def _known() -> str:
    return (
        f"known are {', '.join(recipe_names())}, or give the path of a Python file that defines "
        "`recipe`"
    )
