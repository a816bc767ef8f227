"""The report of runs in a real MLflow: a well-formed page that loads nothing else."""

import base64
import dataclasses
import math
import re
import uuid
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from hemoco.config import (
    KnnConfig,
    OptimizerConfig,
)
from hemoco.report.data import ReportData
from hemoco.report.page import render_report
from hemoco.report.training import health_checks
from hemoco.results.records import Pretraining
from tests.helpers.made_report import RECIPE, collected, fill, png
from tests.helpers.made_runs import MadeRun, begin_run, end_pretraining, log_curve

# raised inside mlflow by SQLAlchemy 2.1
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")
_VOID = {"meta", "img", "br", "link"}


@pytest.fixture(scope="module")
def runs(tracking: str) -> tuple[MadeRun, MadeRun, MadeRun]:
    """A run, one with another learning rate, and one that has only begun."""
    unique = uuid.uuid4().hex[:8]
    other = dataclasses.replace(RECIPE.pretrain, optimizer=OptimizerConfig(lr=0.06))
    recipes = (RECIPE, dataclasses.replace(RECIPE, pretrain=other), RECIPE)
    first, second, begun = (
        begin_run(tracking, f"run <{n}> {unique}", recipe) for n, recipe in enumerate(recipes)
    )
    fill(first)
    fill(second)
    return first, second, begun


@pytest.fixture(scope="module")
def data(runs: tuple[MadeRun, MadeRun, MadeRun]) -> ReportData:
    return collected(runs[0])


@pytest.fixture(scope="module")
def page(data: ReportData) -> str:
    return render_report(data)


@pytest.fixture(scope="module")
def both(runs: tuple[MadeRun, MadeRun, MadeRun]) -> str:
    return render_report(collected(*runs[:2]))


@pytest.fixture(scope="module")
def begun(runs: tuple[MadeRun, MadeRun, MadeRun]) -> str:
    return render_report(collected(runs[2]))


class Balance(HTMLParser):
    """Fails on a tag that is closed in the wrong place."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in _VOID
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(html: str) -> Balance:
    parser = Balance()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


def test_data_has_the_settings_of_the_pretraining_its_curves_and_images(data: ReportData) -> None:
    (detail,) = data.details
    assert (
        detail.params["pretrain.moco.queue_length"] == "1024"
        and detail.params["transfers.knn.seeds"] == "(0, 1)"
    )
    assert [(point.step, point.value) for point in detail.curves["pretext_top1"]] == [
        (10, 0.25),
        (20, 0.5),
    ]
    assert [image.name for image in detail.images] == [
        "pretrained_seed_0_confusion",
        "pretrained_seed_0_detections",
    ]
    assert {(image.transfer, image.png) for image in detail.images} == {("probe", png())}


@pytest.mark.parametrize("name", ["page", "both", "begun"])
def test_page_is_well_formed_even_as_xml(name: str, request: pytest.FixtureRequest) -> None:
    text: str = request.getfixturevalue(name)
    parsed(text)
    ElementTree.fromstring(text.removeprefix("<!DOCTYPE html>"))


def test_nothing_is_loaded_from_outside(both: str) -> None:
    assert not re.search(r"https?://|<script|<link|@import|url\(", both)
    assert all((image["src"] or "").startswith("data:image/") for image in parsed(both).images)


def test_every_image_has_words_for_who_cannot_see_it(page: str) -> None:
    words = [image["alt"] or "" for image in parsed(page).images]
    assert "knn top1: pretrained 0.625, random 0.188" in words[0]
    assert all(len(text) > 10 for text in words)


def test_strings_from_outside_are_text_not_markup(page: str) -> None:
    assert (
        "run &lt;0&gt;" in page and "&lt;script&gt;alert(1)" in page and "right &lt;2&gt;" in page
    )


def test_results_health_settings_and_lineage_are_shown(
    page: str, runs: tuple[MadeRun, MadeRun, MadeRun]
) -> None:
    for text in (
        "0.625 ± 0.177 (2)",
        "+0.438",
        "PASS",
        "3.000",
        "pretrain.knn_every_epochs",
        runs[0].pretraining,
    ):
        assert text in page
    assert (
        "Pretraining beats random initialisation in 2 of 2 transfers, in 0 of them significantly "
        "(95%). 1 transfer failed." in page
    )


def test_a_run_that_has_begun_says_what_is_missing(begun: str) -> None:
    assert (
        "No transfer has been measured yet." in begun and begun.count('class="mark unknown"') == 2
    )


def svg_of(text: str, title: str) -> str:
    part = text[text.index(f"<h2>{title}</h2>") :]
    match = re.search(r"data:image/svg\+xml;base64,([^\"]+)", part)
    assert match
    return base64.b64decode(match[1]).decode()


@pytest.mark.parametrize(
    ("title", "words"),
    [
        ("Loss", ("chance: ln(K+1) = 6.93", "queue full")),
        ("Collapse", ("healthy above 0.5", "similarity,", "rank")),
        ("kNN during pretraining", ("epoch",)),
        ("Throughput and waiting for data", ("min since the first record", "data, %")),
        ("Transfers against baselines", ("0.625", "random")),
    ],
)
def test_a_plot_names_what_it_shows(page: str, title: str, words: tuple[str, ...]) -> None:
    svg = svg_of(page, title)
    assert [word for word in words if word not in svg] == []


def test_a_pause_breaks_the_line_of_the_throughput(page: str) -> None:
    curves = re.findall(
        r'<g id="line2d_\d+">\s*<path d="([^"]+)" clip-path',
        svg_of(page, "Throughput and waiting for data"),
    )
    assert any(curve.count("M") == 2 and curve.count("L") == 0 for curve in curves)


def test_the_map_shows_each_image_and_the_nearest_have_its_label(page: str) -> None:
    assert (
        "24 images of split test" in page
        and "For 100% of the images, the nearest neighbour has the same label." in page
    )
    tiles = page[page.index("<h2>Nearest images</h2>") :]
    tiles = tiles[: tiles.index("</section>")]
    assert tiles.count('class="query"') == 8 and tiles.count("✓</figcaption>") == 48


def test_drawn_detections_are_open_and_confusions_are_folded(page: str) -> None:
    assert "probe: pretrained seed 0 detections" in page[page.index("<h2>Detections</h2>") :]
    assert "<h2>Confusion matrices</h2><details>" in page


def test_two_runs_are_told_apart_in_tables_plots_and_settings(
    both: str, runs: tuple[MadeRun, MadeRun, MadeRun]
) -> None:
    assert "A beats B in 0 of 2 transfers" in both
    assert "pretrain.optimizer.lr: 0.03 -&gt; 0.06" in both
    assert "<h2>A: Feature map</h2>" in both and "<h2>B: Feature map</h2>" in both
    assert all(run.pretraining in both for run in runs[:2])
    assert ElementTree.fromstring(svg_of(both, "Loss")) is not None and "<!-- B -->" in svg_of(
        both, "Loss"
    )


def test_of_a_repeated_pretraining_one_is_shown_as_an_example(tracking: str) -> None:
    again = dataclasses.replace(RECIPE, pretrain=dataclasses.replace(RECIPE.pretrain, seed=1))
    unique = uuid.uuid4().hex[:8]
    repeated = [
        begin_run(tracking, f"{n} {unique}", recipe) for n, recipe in enumerate((RECIPE, again))
    ]
    for run in repeated:
        fill(run)
    text = render_report(collected(*repeated))
    assert text.count(": Feature map</h2>") == text.count("<h2>Settings of A1</h2>") == 1
    assert "Differences of settings" not in text
    assert "<!-- A2 -->" in svg_of(text, "Loss")


def test_a_repetition_that_measures_something_else_is_shown_too(tracking: str) -> None:
    transfers = RECIPE.transfers | {"knn": KnnConfig(seeds=(0, 1), neighbours=5)}
    other = dataclasses.replace(
        RECIPE, pretrain=dataclasses.replace(RECIPE.pretrain, seed=1), transfers=transfers
    )
    unique = uuid.uuid4().hex[:8]
    some = [
        begin_run(tracking, f"{n} {unique}", recipe) for n, recipe in enumerate((RECIPE, other))
    ]
    assert "transfers.knn.neighbours: 200 -&gt; 5" in render_report(collected(*some))


def test_equal_data_gives_an_equal_page(data: ReportData, page: str) -> None:
    assert render_report(data) == page


def pretraining(**changed: float) -> Pretraining:
    texts = ("run", "run_id", "status", "backbone_url", "recipe", "data_digest")
    numbers = {"loss": 3.0, "chance_loss": math.log(1025), "embedding_std": 0.9, "knn_top1": 0.5}
    return Pretraining(**dict.fromkeys(texts, ""), **numbers | changed)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loss", "std", "expected"),
    [
        (3.0, 0.9, [True, True]),
        (6.9, 0.9, [False, True]),
        (3.0, 0.05, [True, False]),
        (math.nan, math.nan, [None, None]),
    ],
)
def test_health_tells_learning_from_chance_and_collapse(
    loss: float, std: float, expected: list[bool | None]
) -> None:
    facts = pretraining(loss=loss, embedding_std=std)
    assert [check.passed for check in health_checks(facts)] == expected


def test_failed_health_is_said_at_the_top(tracking: str) -> None:
    run = begin_run(tracking, f"ill {uuid.uuid4().hex}", RECIPE)
    log_curve(run, "embedding_std", {10: 0.5, 20: 0.01})
    assert "not healthy" not in render_report(collected(run))  # it goes on
    end_pretraining(run, at_s=30)
    text = render_report(collected(run))
    assert "not healthy" in text and ">FAIL<" in text


def test_long_curve_stays_small(tracking: str) -> None:
    run = begin_run(tracking, f"long {uuid.uuid4().hex}", RECIPE)
    log_curve(run, "loss", {step: 1.0 + step % 7 for step in range(20_000)})
    assert len(render_report(collected(run))) < 150_000
