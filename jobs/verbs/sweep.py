"""`python -m jobs sweep RECIPE`: pretrainings with settings from the recipe's `sweep`, the bad ones stopped early."""

import dataclasses
import shlex

from rich.text import Text

from hemoco.config import Recipe, config_digest, flat_params
from hemoco.errors import UsageError
from hemoco.report.extra_tables import sweep_section
from hemoco.report.tables import print_section
from hemoco.results.sweep import SweepResult, search_settings, sweep_json, sweep_result
from hemoco.tracking.client import tracking_uri
from hemoco.tracking.runs import log_artifact_bytes
from jobs.display.live import live_sweep
from jobs.options import ReportOptions, parse_options, settings_flags
from jobs.recorded_command import RecordedCommand, command_tags, recorded_command
from jobs.session import announce, ray_session, results_folder, storage_url, table_console


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions(ReportOptions):
    """Options of `sweep`."""

    out: str = ""
    """Folder for sweep.json; default: the sweep's folder in $HEMOCO_HOME/reports."""


def main(argv: list[str]) -> None:
    """Runs or resumes a sweep; a finished one prints its table."""
    options = parse_options("sweep", argv, SweepOptions)
    recipe, name = options.recipe, sweep_name(options)
    check_sweep(recipe)
    announce(name)
    with ray_session(), live_sweep(name, recipe):
        from pipeline.sweep.sweep import run_sweep  # Ray Tune takes seconds to import, errors should not

        run_sweep(
            recipe,
            run=name,
            storage=storage_url(options.storage),
            fresh=options.fresh,
            tags=command_tags("sweep", argv[0], options),
        )
    _show(sweep_result(tracking_uri(), name), options.out)


def sweep_name(options: SweepOptions) -> str:
    """The sweep's identity: what was given, else recipe name and a digest of the recipe and of what is searched.

    Raises:
        UsageError: the recipe has no sweep.
    """
    recipe = options.recipe
    if recipe.sweep is None:
        raise UsageError(
            f"recipe {recipe.name} has no sweep: give it one, for example sweep=SweepConfig(objective='knn', "
            "space={'pretrain.optimizer.lr': LogUniform(0.01, 0.3)}); cifar10_resnet18_sweep is a recipe with one"
        )
    search = search_settings(flat_params(recipe))
    return options.run or f"{recipe.name}-sweep-{config_digest({'recipe': recipe, 'search': search})}"


def check_sweep(recipe: Recipe) -> None:
    """Raises what every trial would fail of later.

    Raises:
        UsageError: the recipe names no shards.
        ConfigError: its pretraining or what the sweep measures does not fit the data.
    """
    from pipeline.checks import check_pretraining, check_transfers  # torch takes seconds to import, errors should not

    sweep = recipe.sweep
    assert sweep is not None, "a recipe without one has no name"
    check_pretraining(recipe)
    measured = {name: recipe.transfers[name] for name in recipe.transfers if name in (sweep.objective, sweep.watch)}
    check_transfers(dataclasses.replace(recipe, transfers=measured, curve=(), sweep=None))


def best_lines(result: SweepResult) -> dict[str, str]:
    """Which trial is the best, and how to go on from it where its command is known; empty where none has ended."""
    if result.best is None:
        return {}
    lines = {"best": f"trial {result.best.trial}, {result.best.run}"}
    command = recorded_command(result.tags, result.params)
    if command is None:
        return lines
    transfer, run = again_words(result, command)
    return lines | {"measure it": transfer, "repeat it": run}


def again_words(result: SweepResult, command: RecordedCommand) -> list[str]:
    """Two command lines from the best trial on: all transfers from its backbone, and the whole run anew."""
    best = result.best
    assert best is not None, "checked by the caller"
    settings = {name: value for name, value in command.settings.items() if not name.startswith("sweep.")}
    words = settings_flags(settings | best.settings)
    return [
        shlex.join(["python", "-m", "jobs", "transfer", command.recipe, "--backbone", best.backbone_url, *words]),
        shlex.join(["python", "-m", "jobs", "run", command.recipe, *words]),
    ]


def _show(result: SweepResult, out: str) -> None:
    """Prints the table and how to go on, and writes sweep.json, also as an artifact of the sweep in MLflow."""
    folder, text = results_folder(result.sweep, out), sweep_json(result)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(text)
    log_artifact_bytes(tracking_uri(), result.run_id, "sweep.json", text.encode())
    console = table_console()
    print_section(console, sweep_section(result))
    console.print()
    lines = {"json": str(folder / "sweep.json"), "again": shlex.join(["python", "-m", "jobs", "status", result.sweep])}
    for name, line in (lines | best_lines(result)).items():
        console.print(Text(f"{name:<12}{line}"), soft_wrap=True)
