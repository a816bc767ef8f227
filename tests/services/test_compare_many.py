"""Runs in a real MLflow store are compared: columns, differences, curves, cost, file formats."""

import csv
import dataclasses
import io
import json
import math
import re
import uuid
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from rich.console import Console
from scipy import stats

from hemoco.config import (
    KnnConfig,
    LinearProbeConfig,
    LowShotConfig,
    MoCoConfig,
    OptimizerConfig,
    PretrainConfig,
    Recipe,
    ResourcesConfig,
)
from hemoco.errors import UsageError
from hemoco.intervals import repeated_spread
from hemoco.report.extra_tables import extra_sections
from hemoco.report.files import render, sections, wide_records, write_comparison, write_tables
from hemoco.report.tables import Section, print_section
from hemoco.results.comparison import Cell, Comparison, compare_runs
from hemoco.results.cost import run_cost
from hemoco.results.label_efficiency import label_curves
from jobs.cli import main
from tests.helpers.made_runs import MadeRun, begin_run, end_pretraining, log_rate, write_transfer

# raised inside mlflow by SQLAlchemy 2.1
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")
RECIPE = Recipe(
    name="cells",
    pretrain=PretrainConfig(
        epochs=4,
        global_batch_size=32,
        log_every_steps=10,
        moco=MoCoConfig(queue_length=1024, bn_group_size=16),
        resources=ResourcesConfig(workers=2, cpus_per_worker=3),
    ),
    transfers={
        "knn": KnnConfig(seeds=(0, 1, 2)),
        "one_percent": LowShotConfig(fraction=0.01, seeds=(0, 1, 2)),
        "ten_percent": LowShotConfig(fraction=0.1, seeds=(0, 1, 2)),
        "probe": LinearProbeConfig(seeds=(0, 1, 2)),
    },
)
NOISE = (0.01, -0.02, 0.015)


def variant(seed: int = 0, lr: float = 0.03, **transfers: object) -> Recipe:
    pretrain = dataclasses.replace(RECIPE.pretrain, seed=seed, optimizer=OptimizerConfig(lr=lr))
    return dataclasses.replace(RECIPE, pretrain=pretrain, transfers=RECIPE.transfers | transfers)


def values(ours: float, random: float) -> dict[tuple[str, int], float]:
    """Returns values of three seeds; both inits have the seed's noise, pretrained some more."""
    of_init = {("pretrained", s): ours + noise + 0.002 * s for s, noise in enumerate(NOISE)}
    return of_init | {("random", s): random + noise for s, noise in enumerate(NOISE)}


def fill(run: MadeRun, quality: float) -> None:
    """Writes all transfers of a run, and its pretraining: 20 steps of 32 images, a second each."""
    log_rate(run, step=10, at_s=15, images_per_s=32)
    log_rate(run, step=20, at_s=27, images_per_s=32)
    end_pretraining(run, at_s=30)
    for name, share, labelled in (
        ("knn", 0.9, 0),
        ("one_percent", 0.5, 50),
        ("ten_percent", 0.8, 500),
        ("probe", 1, 0),
    ):
        write_transfer(run, name, values(quality * share, 0.2 * share), labelled=labelled)


@dataclasses.dataclass
class Names:
    """Names of two repetitions of a pretraining, and of an unfinished one with another rate."""

    first: str
    second: str
    other: str


@pytest.fixture(scope="module")
def names(tracking: str) -> Names:
    unique = uuid.uuid4().hex[:8]
    made = [
        begin_run(tracking, f"cells-{unique}-{place}", variant(seed, lr))
        for place, (seed, lr) in enumerate(((0, 0.03), (1, 0.03), (0, 0.06)))
    ]
    fill(made[0], 0.7)
    fill(made[1], 0.72)
    for epoch, quality in ((2, 0.4), (4, 0.6)):
        pretrained = {("pretrained", seed): quality + noise for seed, noise in enumerate(NOISE)}
        write_transfer(made[0], "knn", pretrained, epoch=epoch)
    log_rate(made[2], step=10, at_s=15, images_per_s=32)
    write_transfer(made[2], "knn", values(0.5, 0.2))
    write_transfer(made[2], "probe", {}, error="out of memory")
    write_transfer(made[2], "ten_percent", {("pretrained", 0): 0.6}, open_=1)
    return Names(*(run.name for run in made))


@pytest.fixture(scope="module")
def comparison(tracking: str, names: Names) -> Comparison:
    return compare_runs(tracking, [names.first, names.second, names.other])


def section(comparison: Comparison, name: str) -> Section:
    (found,) = (found for found in sections(comparison) if found.name == name)
    return found


def cells(comparison: Comparison, name: str, row: str) -> dict[str, str]:
    found = section(comparison, name)
    (line,) = (line for line in found.rows if row in line[: found.heads])
    return dict(zip(found.columns, line, strict=True))


def significance(comparison: Comparison, row: str) -> dict[str, tuple[str, str]]:
    """Returns (difference, significant) cells of a row, by the name of the difference."""
    found = section(comparison, "differences")
    (line,) = (line for line in found.rows if line[0] == row)
    return dict(zip(found.columns[1::2], zip(line[1::2], line[2::2], strict=True), strict=True))


def test_pretrainings_that_differ_by_their_seed_share_a_column(comparison: Comparison) -> None:
    assert [
        (column.label, [run.label for run in column.runs]) for column in comparison.columns
    ] == [
        ("A", ["A1", "A2"]),
        ("B", ["B"]),
        ("random", ["A1", "A2", "B"]),
    ]
    assert comparison.columns[1].differs == ("pretrain.optimizer.lr: 0.03 -> 0.06",)


def test_runs_of_the_same_seed_are_not_taken_for_repetitions(tracking: str, names: Names) -> None:
    twin = begin_run(tracking, f"twin-{uuid.uuid4().hex}", variant())
    found = compare_runs(tracking, [names.first, twin.name])
    assert [column.label for column in found.columns if not column.baseline] == ["A", "B"]


def test_runs_on_other_data_are_not_taken_for_repetitions(tracking: str, names: Names) -> None:
    foreign = begin_run(tracking, f"foreign-{uuid.uuid4().hex}", variant(seed=7), digest="d2")
    found = compare_runs(tracking, [names.first, foreign.name])
    assert found.columns[1].differs == ("data digest: d1 -> d2", "pretrain.seed: 0 -> 7")


def test_a_cell_has_the_deviation_between_pretrainings_where_there_are_several(
    comparison: Comparison,
) -> None:
    row = cells(comparison, "transfers", "probe")
    mean = 0.71 + sum(NOISE) / 3 + 0.002
    assert row["A"] == f"{mean:.3f} ± {0.02 / math.sqrt(2):.3f} (2x3)"
    assert row["random"] == f"{0.2 + sum(NOISE) / 3:.3f} ± {stats.tstd(NOISE):.3f} (3)"


def test_a_baseline_measured_by_several_runs_counts_once_a_seed(comparison: Comparison) -> None:
    (by_seed,) = comparison.values[Cell("knn", "random")]
    assert by_seed == {
        seed: pytest.approx(0.18 + noise, abs=0.02) for seed, noise in enumerate(NOISE)
    }
    assert repeated_spread([by_seed]).values == 3


def test_differences_are_those_of_all_pretrainings_and_baselines(comparison: Comparison) -> None:
    columns = section(comparison, "differences").columns
    assert columns[1::2] == ("A - B", "A - random", "B - random")
    assert set(columns[2::2]) == {"significant (95%)"}
    assert significance(comparison, "knn")["B - random"][0].startswith("+0.3")


@pytest.mark.parametrize(
    ("pretrained", "random", "shown"),
    [
        ((0.75, 0.8, 0.77), (0.5, 0.54, 0.53), "yes"),
        ((0.5, 0.3, 0.4), (0.4, 0.35, 0.45), "no"),
        ((0.75,), (0.5,), "n/a (one seed)"),
        ((0.75, 0.5), (0.5, 0.25), "n/a (no variation)"),
    ],
)
def test_the_table_says_whether_a_difference_is_significant(
    tracking: str, pretrained: tuple[float, ...], random: tuple[float, ...], shown: str
) -> None:
    run = begin_run(tracking, f"alone-{uuid.uuid4().hex[:8]}", variant())
    of_init = {("pretrained", seed): value for seed, value in enumerate(pretrained)}
    of_init |= {("random", seed): value for seed, value in enumerate(random)}
    write_transfer(run, "knn", of_init)
    found = section(compare_runs(tracking, [run.name]), "differences")
    assert found.columns == ("transfer", "pretrained - random", "significant (95%)")
    ((_, difference, significant),) = found.rows
    assert significant == shown
    if len(pretrained) == 3:  # the same by scipy
        test = stats.ttest_rel(pretrained, random)
        low, high = test.confidence_interval(0.95)
        assert difference == f"{(low + high) / 2:+.3f} ± {(high - low) / 2:.3f}"
        assert (shown == "yes") is bool(test.pvalue < 0.05)


def test_noise_of_the_pretraining_is_said_where_it_is_known(comparison: Comparison) -> None:
    noise = {
        (pair.ours, pair.theirs): pair.difference.noise
        for pair in comparison.pairs
        if pair.line == "knn"
    }
    assert noise == {
        ("A", "B"): ("seeds", "pretrainings"),
        ("A", "random"): ("seeds", "pretrainings"),
        ("B", "random"): ("seeds",),
    }


def test_a_transfer_without_values_says_why(comparison: Comparison) -> None:
    assert cells(comparison, "transfers", "probe")["B"] == "failed"
    assert cells(comparison, "transfers", "one_percent")["B"] == "not begun"
    notes = section(comparison, "transfers").notes
    assert "† B: probe failed: out of memory" in notes
    assert "† B: ten_percent is unfinished: 1 of 6 measured" in notes
    assert cells(comparison, "transfers", "ten_percent")["B"] == "0.600 (1) †"


def test_a_value_of_a_unit_that_is_not_done_does_not_count(comparison: Comparison) -> None:
    assert comparison.values[Cell("ten_percent", "B")] == [{0: 0.6}]


def test_transfers_of_one_name_and_other_settings_have_a_line_each(
    tracking: str, names: Names
) -> None:
    other = begin_run(
        tracking, f"other-{uuid.uuid4().hex}", variant(seed=5, knn=KnnConfig(neighbours=20))
    )
    write_transfer(other, "knn", values(0.5, 0.2))
    found = compare_runs(tracking, [names.first, other.name])
    assert [line.label for line in found.lines if line.transfer == "knn"] == [
        "knn of A1",
        "knn of A2",
    ]
    assert not [pair for pair in found.pairs if pair.line.startswith("knn") and pair.theirs == "B"]
    assert (
        "knn of A2 has other settings: transfers.knn.neighbours: 200 -> 20"
        in section(found, "transfers").notes
    )


def test_baselines_of_one_name_and_other_origin_have_a_column_each(tracking: str) -> None:
    made = []
    for url, seed in (("file:///x", 0), ("file:///y", 1)):
        recipe = variant(seed, knn=KnnConfig(inits=("pretrained", f"theirs={url}")))
        made.append(begin_run(tracking, f"theirs-{uuid.uuid4().hex}", recipe))
        write_transfer(made[-1], "knn", {("pretrained", 0): 0.5, ("theirs", 0): 0.4})
    found = compare_runs(tracking, [run.name for run in made])
    assert [column.label for column in found.columns] == ["A", "theirs of A1", "theirs of A2"]


def test_quality_over_epochs_is_that_of_the_exported_backbones(comparison: Comparison) -> None:
    found = section(comparison, "curve")
    assert [row[0] for row in found.rows] == ["2", "4"]
    assert found.rows[0][1] == f"{0.4 + sum(NOISE) / 3:.3f} ± {stats.tstd(NOISE):.3f} (3)"


def test_a_curve_is_shown_before_any_transfer_has_begun(tracking: str) -> None:
    run = begin_run(tracking, f"early-{uuid.uuid4().hex}", variant())
    write_transfer(run, "knn", {("pretrained", 0): 0.3}, epoch=1)
    assert section(compare_runs(tracking, [run.name]), "curve").rows == (("1", "0.300 (1)"),)


def test_label_efficiency_goes_from_few_labels_to_all(comparison: Comparison) -> None:
    (points,) = label_curves(comparison)
    assert [(point.labels, point.line.label) for point in points] == [
        ("1%", "one_percent"),
        ("10%", "ten_percent"),
        ("100%", "probe"),
    ]
    assert [point.images for point in points[:2]] == [50, 500]
    assert (
        section(comparison, "label_efficiency").rows[0][3:]
        == section(comparison, "transfers").rows[1][2:]
    )


def test_cost_is_active_time_of_the_devices_asked_for(comparison: Comparison) -> None:
    cost = comparison.runs[0].cost
    assert (cost.active_s, cost.device, cost.devices) == (30, "CPU", 6)
    assert cost.device_hours == pytest.approx(30 * 6 / 3600)
    assert (cost.images, cost.images_per_s) == (640, 32)
    assert [time.transfer for time in cost.transfers] == list(RECIPE.transfers)
    assert all(0 <= time.wall_s < 60 for time in cost.transfers)


def test_json_keeps_the_contract_and_names_the_run_of_each_row(
    comparison: Comparison, names: Names
) -> None:
    read = json.loads(render(comparison, "json"))
    assert read["pretraining"]["run"] == names.first
    assert {"run_id", "backbone_url", "recipe", "data_digest"} <= set(read["pretraining"])
    assert {"transfer", "metric", "init", "seed", "value", "run_id", "run"} <= set(read["rows"][0])
    assert {row["run"] for row in read["rows"]} == {names.first, names.second, names.other}
    assert {
        "transfers",
        "differences",
        "curve",
        "label_efficiency",
        "cost",
        "transfer_times",
    } <= set(read)


def test_csv_has_a_line_for_each_transfer(comparison: Comparison) -> None:
    lines = list(csv.DictReader(io.StringIO(render(comparison, "csv"))))
    assert [line["transfer"] for line in lines] == list(RECIPE.transfers)
    knn = wide_records(comparison)[0]
    assert float(lines[0]["A - random"]) == knn["A - random"] == pytest.approx(0.459, abs=0.01)
    assert lines[3]["B mean"] == ""


def test_markdown_tables_have_equally_many_cells_in_all_lines(comparison: Comparison) -> None:
    text = render(comparison, "markdown")
    tables = [part.splitlines() for part in re.findall(r"(?:^\|.*\|$\n)+", text, re.MULTILINE)]
    assert len(tables) == len(sections(comparison))
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    assert "**" in text


def test_latex_tables_are_balanced_and_escaped(comparison: Comparison) -> None:
    text = render(comparison, "latex")
    for environment in ("table", "tabular"):
        assert (
            text.count(rf"\begin{{{environment}}}")
            == text.count(rf"\end{{{environment}}}")
            == len(sections(comparison))
        )
    for table, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end", text, re.DOTALL):
        rows = [line for line in body.splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", row)) for row in rows} == {len(table) - 1}
    assert r"one\_percent" in text and r"10\%" in text and "±" not in text


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal(comparison: Comparison, width: int) -> None:
    console = Console(width=width, file=io.StringIO(), record=True)
    for found in sections(comparison):
        print_section(console, found)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    for cell in cells(comparison, "differences", "probe").values():
        assert cell in text  # not broken over two lines
    lines = text.splitlines()
    headers = [line for line in lines if line.startswith("transfer ") and " - " in line]
    assert headers
    for line in headers:  # a split never parts a difference from its significance
        assert line.count(" - ") == line.count("significant (95%)")


def test_files_are_those_of_all_tables(comparison: Comparison, tmp_path: Path) -> None:
    write_comparison(comparison, tmp_path / "new")
    write_tables(comparison, tmp_path / "new")
    found = {path.name for path in (tmp_path / "new").iterdir()}
    assert {f"comparison.{suffix}" for suffix in ("json", "csv", "md", "tex")} <= found
    assert {
        "rows.csv",
        "curve.csv",
        "label_efficiency.csv",
        "cost.csv",
        "repetitions_A.csv",
    } <= found


def test_one_run_is_compared_with_its_baselines(tracking: str, names: Names) -> None:
    found = compare_runs(tracking, [names.first])
    assert [column.label for column in found.columns] == ["pretrained", "random"]
    assert [part.name for part in extra_sections(found)] == [
        "curve",
        "label_efficiency",
        "cost",
        "transfer_times",
    ]


def test_a_run_named_twice_is_wrong_usage(tracking: str, names: Names) -> None:
    with pytest.raises(UsageError, match="is named twice"):
        compare_runs(tracking, [names.first, names.first])


def test_a_pretraining_that_mlflow_does_not_know_has_no_cost(
    tracking: str, comparison: Comparison
) -> None:
    found = run_cost(tracking, comparison.runs[0].records._replace(pretraining=None))
    assert (found.images, math.isnan(found.device_hours)) == (0, True)


def test_command_prints_the_wanted_format_and_writes_files(
    names: Names, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["compare", names.first, names.other, "--out", str(tmp_path), "--format", "json"]) == 0
    )
    assert capsys.readouterr().out == (tmp_path / "comparison.json").read_text()
    assert main(["compare", names.first, "--out", str(tmp_path / "one")]) == 0
    assert "Label efficiency" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "one" / "comparison.json").read_text())) == {
        "pretraining",
        "rows",
    }
    assert (tmp_path / "one" / "report.html").exists() and (
        tmp_path / "one" / "details.json"
    ).exists()


@pytest.mark.parametrize("count", [1, 3])
def test_command_searches_mlflow_once_for_each_run(
    names: Names, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    searches, search_runs = [], MlflowClient.search_runs

    def counted(client: MlflowClient, *args: Any, **options: Any) -> Any:
        searches.append(args)
        return search_runs(client, *args, **options)

    monkeypatch.setattr(MlflowClient, "search_runs", counted)
    some = [names.first, names.second, names.other][:count]
    assert main(["compare", *some, "--out", str(tmp_path)]) == 0
    assert len(searches) == count


def test_command_without_a_run_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare"]) == 2
    assert "name of a run" in capsys.readouterr().err
