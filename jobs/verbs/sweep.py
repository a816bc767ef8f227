"""`python -m jobs sweep RECIPE`: pretrainings with settings drawn from the recipe's `sweep`."""

import dataclasses
import shlex

from rich.text import Text

from hemoco.config import Recipe
from hemoco.data.shards.index import ShardIndexes
from hemoco.report.extra_tables import sweep_section
from hemoco.report.tables import print_section
from hemoco.results.sweep import SweepResult, sweep_json, sweep_result
from hemoco.storage.objects import check_writable
from hemoco.tracking.client import tracking_uri
from hemoco.tracking.runs import log_artifact_bytes
from jobs.display.live import live_sweep
from jobs.options import SweepOptions, parse_options, settings_flags
from jobs.recorded_command import RecordedCommand, command_tags, recorded_command
from jobs.session import announce, ray_session, results_folder, table_console


def main(argv: list[str]) -> None:
    """Runs or resumes a sweep; prints the table of a finished one."""
    options = parse_options("sweep", argv, SweepOptions)
    recipe, name, indexes = options.recipe, options.run, ShardIndexes()
    check_sweep(recipe, indexes)
    announce(name)
    with ray_session(), live_sweep(name, recipe):
        # imported late: Ray Tune takes seconds
        from pipeline.sweep.sweep import run_sweep

        check_writable(options.storage)
        run_sweep(
            recipe,
            indexes=indexes,
            run=name,
            storage=options.storage,
            fresh=options.fresh,
            tags=command_tags("sweep", argv[0], options),
        )
    _show(sweep_result(tracking_uri(), name), options.out)


def check_sweep(recipe: Recipe, indexes: ShardIndexes) -> None:
    """Checks once what would fail in every trial.

    Raises:
        UsageError: the recipe names no shards.
        ConfigError: its pretraining or what the sweep measures does not fit the data.
    """
    # imported late: torch takes seconds, and wrong usage is reported at once
    from pipeline.checks import check_pretraining, check_transfers

    sweep = recipe.sweep
    assert sweep is not None, "run_name refuses a recipe without a sweep"
    check_pretraining(recipe, indexes)
    measured = {
        name: config
        for name, config in recipe.transfers.items()
        if name in (sweep.objective, sweep.watch)
    }
    check_transfers(dataclasses.replace(recipe, transfers=measured, curve=(), sweep=None), indexes)


def best_lines(result: SweepResult) -> dict[str, str]:
    """Names the best trial, and the commands that continue from it if they are known.

    Empty if no trial has ended.
    """
    if result.best is None:
        return {}
    lines = {"best": f"trial {result.best.trial}, {result.best.run}"}
    command = recorded_command(result.tags, result.params)
    if command is None:
        return lines
    transfer, run = best_trial_commands(result, command)
    return lines | {"measure it": transfer, "repeat it": run}


def best_trial_commands(result: SweepResult, command: RecordedCommand) -> tuple[str, str]:
    """Two command lines for the best trial.

    Returns:
        The one that measures all transfers from its backbone, and the one that repeats the trial
        as a run.
    """
    best = result.best
    assert best is not None, "the caller has checked it"
    settings = {
        name: value for name, value in command.settings.items() if not name.startswith("sweep.")
    }
    flags = settings_flags(settings | best.settings)
    transfer = ["transfer", command.recipe, "--backbone", best.backbone_url, *flags]
    run = ["run", command.recipe, *flags]
    return (
        shlex.join(["python", "-m", "jobs", *transfer]),
        shlex.join(["python", "-m", "jobs", *run]),
    )


def _show(result: SweepResult, out: str) -> None:
    """Prints the table and the next commands; writes sweep.json to a folder and to MLflow."""
    folder, text = results_folder(result.sweep, out), sweep_json(result)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(text)
    log_artifact_bytes(tracking_uri(), result.run_id, "sweep.json", text.encode())
    console = table_console()
    print_section(console, sweep_section(result))
    console.print()
    lines = {
        "json": str(folder / "sweep.json"),
        "again": shlex.join(["python", "-m", "jobs", "status", result.sweep]),
    }
    for name, line in (lines | best_lines(result)).items():
        console.print(Text(f"{name:<12}{line}"), soft_wrap=True)
