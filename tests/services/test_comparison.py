"""Runs in a real MLflow store are read back as a comparison and its files."""

import csv
import dataclasses
import io
import json
import math
import uuid
from pathlib import Path

import pytest
from rich.console import Console

from hemoco.errors import UsageError
from hemoco.report.files import contract_json, render, sections, write_comparison
from hemoco.report.tables import print_section
from hemoco.results.comparison import compare_runs, headlines
from hemoco.results.records import Row, run_results
from hemoco.tracking.client import connect
from hemoco.tracking.metric_queue import Tracker
from hemoco.tracking.runs import close_run, log_artifact_bytes, open_run, set_tags

# raised inside mlflow by SQLAlchemy 2.1
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")
BACKBONE = "s3://bucket/runs/backbone.safetensors"
VALUES = {
    ("pretrained", 0): 0.75,
    ("pretrained", 1): 0.5,
    ("random", 0): 0.25,
    ("random", 1): 0.125,
}


@dataclasses.dataclass
class Written:
    """Ids of the MLflow runs of one run."""

    name: str
    pretrain: str
    transfers: dict[str, str] = dataclasses.field(default_factory=dict)


def write_parent(uri: str, name: str, **tags: str) -> str:
    tags = {f"hemoco.{key}": value for key, value in tags.items()}
    tags |= {"hemoco.run": name, "hemoco.phase": "parent", "hemoco.recipe": "cells"}
    return open_run(uri, connect(uri), name=name, parent=None, tags=tags, params={"name": "cells"})


def write_pretraining(uri: str, name: str, parent: str) -> str:
    tags = {
        "hemoco.run": name,
        "hemoco.phase": "pretrain",
        "hemoco.recipe": "cells",
        "hemoco.data_digest": "abc",
    }
    params = {"pretrain.moco.queue_length": "1023", "pretrain.epochs": "4"}
    run_id = open_run(uri, connect(uri), name="pretrain", parent=parent, tags=tags, params=params)
    with Tracker(uri, run_id, f"memory://unsent/{run_id}") as tracker:
        for step in (10, 20):
            tracker.log(step, {"loss": 60 / step, "embedding_std": 0.9})
        tracker.log(20, {"knn_top1": 0.5})
    set_tags(uri, run_id, {"hemoco.backbone_url": BACKBONE})
    close_run(uri, run_id, "FINISHED")
    return run_id


def write_transfer(uri: str, name: str, parent: str, transfer: str, metric: str) -> str:
    tags = {
        "hemoco.run": name,
        "hemoco.phase": "transfer",
        "hemoco.transfer": transfer,
        "hemoco.metric": metric,
    }
    run_id = open_run(uri, connect(uri), name=transfer, parent=parent, tags=tags, params={})
    set_tags(uri, run_id, {f"hemoco.done/{init}/seed_{seed}": "true" for init, seed in VALUES})
    with Tracker(uri, run_id, f"memory://unsent/{run_id}") as tracker:
        tracker.log(9, {f"pretrained/seed_2/{metric}": 0.01})  # a unit that is not done
        for (init, seed), value in VALUES.items():
            tracker.log(7, {f"{init}/seed_{seed}/loss": 9.0})
            tracker.log(
                9, {f"{init}/seed_{seed}/{metric}": value, f"{init}/seed_{seed}/other": 0.9}
            )
    return run_id


@pytest.fixture(scope="module")
def written(tracking: str) -> Written:
    """A finished pretraining, two finished transfers, one with an image, and one that failed."""
    name = f"cells-{uuid.uuid4().hex}"
    parent = write_parent(tracking, name)
    runs = Written(name, write_pretraining(tracking, name, parent))
    for transfer, metric in (("knn", "top1"), ("mask|rcnn", "mask_ap")):
        runs.transfers[transfer] = write_transfer(tracking, name, parent, transfer, metric)
        close_run(tracking, runs.transfers[transfer], "FINISHED")
    log_artifact_bytes(
        tracking, runs.transfers["mask|rcnn"], "pretrained_seed_0_detections.png", b"\x89PNG"
    )
    tags = {
        "hemoco.run": name,
        "hemoco.phase": "transfer",
        "hemoco.transfer": "probe",
        "hemoco.metric": "top1",
    }
    failed = open_run(
        tracking, connect(tracking), name="probe", parent=parent, tags=tags, params={}
    )
    set_tags(tracking, failed, {"hemoco.error": "out of memory"})
    close_run(tracking, failed, "FAILED")
    return runs


def test_comparison_is_what_was_written(tracking: str, written: Written) -> None:
    found = run_results(tracking, written.name)
    expected = [
        Row(
            transfer=transfer,
            metric=metric,
            init=init,
            seed=seed,
            value=value,
            run_id=written.transfers[transfer],
        )
        for transfer, metric in (("knn", "top1"), ("mask|rcnn", "mask_ap"))
        for (init, seed), value in VALUES.items()
    ]
    assert list(found.rows) == expected
    assert [(item.transfer, item.reason) for item in found.failed] == [("probe", "out of memory")]
    facts = found.pretraining
    assert (facts.run_id, facts.backbone_url) == (written.pretrain, BACKBONE)
    assert (facts.recipe, facts.data_digest, facts.status) == ("cells", "abc", "FINISHED")
    assert (facts.loss, facts.embedding_std, facts.knn_top1) == (3.0, 0.9, 0.5)
    assert facts.chance_loss == pytest.approx(10 * math.log(2))


def test_a_transfer_that_runs_or_has_not_begun_is_named(tracking: str) -> None:
    name = f"open-{uuid.uuid4().hex}"
    params = {f"transfers.{transfer}.seeds": "(0,)" for transfer in ("knn", "probe")}
    parent_tags = {"hemoco.run": name, "hemoco.phase": "parent"}
    parent = open_run(
        tracking, connect(tracking), name=name, parent=None, tags=parent_tags, params=params
    )
    write_transfer(tracking, name, parent, "knn", "top1")
    found = run_results(tracking, name)
    assert [(item.transfer, item.reason) for item in found.unfinished] == [
        ("knn", "4 measured"),
        ("probe", "not begun"),
    ]
    notes = [
        f"- † pretrained: {item.transfer} is unfinished: {item.reason}\n"
        for item in found.unfinished
    ]
    assert "".join(notes) in render(compare_runs(tracking, [name]), "markdown")


@pytest.mark.parametrize("recorded", ["tag", "params"])
def test_transfers_come_in_the_order_of_the_recipe_and_not_of_their_start(
    tracking: str, recorded: str
) -> None:
    name = f"order-{uuid.uuid4().hex}"
    recipe_order, start_order = ["probe", "knn", "few"], ["few", "knn", "probe"]
    tags = {"hemoco.run": name, "hemoco.phase": "parent"}
    params: dict[str, str] = {}
    if recorded == "tag":
        tags["hemoco.transfers"] = json.dumps(recipe_order)
    else:  # as versions before the tag; more settings than MLflow takes in one call
        for transfer in recipe_order:
            params |= {f"transfers.{transfer}.setting_{n}": "1" for n in range(40)}
            params[f"transfers.{transfer}.seeds"] = "(0, 1)"
    experiment = connect(tracking)
    parent = open_run(tracking, experiment, name=name, parent=None, tags=tags, params=params)
    for transfer in [*start_order, "not_in_the_recipe"]:
        run_id = write_transfer(tracking, name, parent, transfer, "top1")
        close_run(tracking, run_id, "FINISHED")
    expected = [
        (transfer, init, seed)
        for transfer in [*recipe_order, "not_in_the_recipe"]
        for init, seed in VALUES
    ]
    rows = run_results(tracking, name).rows
    assert [(row.transfer, row.init, row.seed) for row in rows] == expected


def test_json_has_the_keys_other_tools_rely_on(tracking: str, written: Written) -> None:
    read = json.loads(contract_json(run_results(tracking, written.name)))
    assert set(read) == {"pretraining", "rows"}
    assert {"run_id", "backbone_url", "recipe", "data_digest"} <= set(read["pretraining"])
    assert read["rows"][0] == {
        "transfer": "knn",
        "metric": "top1",
        "init": "pretrained",
        "seed": 0,
        "value": 0.75,
        "run_id": written.transfers["knn"],
    }


def test_headlines_are_means_and_differences_by_name(tracking: str, written: Written) -> None:
    found = headlines(compare_runs(tracking, [written.name]))
    assert found["knn/top1/pretrained"] == 0.625 and found["knn/top1/random"] == 0.1875
    assert found["knn/top1/over_random"] == 0.4375
    assert len(found) == 6 and all(math.isfinite(value) for value in found.values())


def test_markdown_has_one_line_per_transfer_and_names_what_failed(
    tracking: str, written: Written
) -> None:
    lines = render(compare_runs(tracking, [written.name]), "markdown").splitlines()
    assert "| knn | top1 | **0.625 ± 0.177 (2)** | 0.188 ± 0.088 (2) |" in lines
    assert r"| mask\|rcnn | mask_ap | **0.625 ± 0.177 (2)** | 0.188 ± 0.088 (2) |" in lines
    assert "- † pretrained: probe failed: out of memory" in lines
    # Student's t with one degree of freedom: 12.706; the paired differences are 0.5 and 0.375
    assert f"| knn | +0.438 ± {12.7062 * 0.0625:.3f} | no |" in lines


@pytest.mark.parametrize("width", [80, 120])
def test_terminal_has_the_cells_of_the_markdown_and_breaks_none(
    tracking: str, written: Written, width: int
) -> None:
    many = compare_runs(tracking, [written.name])
    console = Console(width=width, file=io.StringIO(), record=True)
    for section in sections(many):
        print_section(console, section)
    text = console.export_text()
    cells = [
        cell for section in sections(many) for row in section.rows for cell in row if len(cell) < 30
    ]
    assert [cell for cell in cells if cell not in text] == []
    markdown = render(many, "markdown").replace("\\|", "|")
    assert [cell for cell in cells if cell not in markdown] == []


def test_files_are_written_to_a_new_folder(tracking: str, written: Written, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out"
    write_comparison(compare_runs(tracking, [written.name]), folder)
    assert {path.name for path in folder.iterdir()} == {
        "comparison.json",
        "comparison.csv",
        "comparison.md",
    }
    results = run_results(tracking, written.name)
    assert (folder / "comparison.json").read_text() == contract_json(results)
    lines = list(csv.DictReader(io.StringIO((folder / "comparison.csv").read_text())))
    assert [(line["transfer"], float(line["value"])) for line in lines] == [
        (r.transfer, r.value) for r in results.rows
    ]


def test_transfers_alone_show_the_pretraining_of_another_run(
    tracking: str, written: Written
) -> None:
    name = f"alone-{uuid.uuid4().hex}"
    write_parent(tracking, name, backbone_url="file:///kept", pretrain_run_id=written.pretrain)
    found = run_results(tracking, name).pretraining
    assert (found.run, found.run_id, found.backbone_url, found.loss) == (
        name,
        written.pretrain,
        "file:///kept",
        3.0,
    )


def test_transfers_from_an_unknown_backbone_have_no_loss(tracking: str) -> None:
    name = f"foreign-{uuid.uuid4().hex}"
    write_parent(tracking, name, backbone_url="file:///foreign", pretrain_run_id="elsewhere")
    found = run_results(tracking, name)
    assert math.isnan(found.pretraining.loss) and found.pretraining.run_id == "elsewhere"
    assert json.loads(contract_json(found))["pretraining"]["loss"] is None
    assert run_results(tracking, name) == found


def test_unknown_run_names_the_nearest_ones(tracking: str, written: Written) -> None:
    with pytest.raises(UsageError, match=f"run 'x{written.name}' is not in MLflow.*{written.name}"):
        run_results(tracking, f"x{written.name}")
