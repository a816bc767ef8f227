"""The report is one well-formed page that loads nothing and shows what was measured."""

import base64
import dataclasses
import io
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from PIL import Image

from hemoco.comparison import Comparison, Failure, Pretraining, ReportData, Row, TransferImage
from hemoco.report import health_checks, render_report

_VOID = {"meta", "img", "br", "link"}


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def data() -> ReportData:
    pretraining = Pretraining(
        run="run <1>",
        run_id="p" * 32,
        status="FINISHED",
        backbone_url="s3://bucket/backbone.safetensors",
        recipe="cells",
        data_digest="d" * 64,
        loss=3.25,
        chance_loss=math.log(1025),
        embedding_std=0.875,
        knn_top1=0.5,
    )
    values = {("pretrained", 0): 0.75, ("pretrained", 1): 0.5, ("random", 0): 0.25, ("random", 1): 0.125}
    rows = [
        Row(transfer="knn", metric="top1", init=init, seed=seed, value=value, run_id="r" * 32)
        for (init, seed), value in values.items()
    ]
    return ReportData(
        comparison=Comparison(
            pretraining=pretraining,
            rows=tuple(rows),
            failed=(Failure(transfer="probe", reason="<script>alert(1)</script>", run_id="f" * 32),),
        ),
        params={"pretrain.epochs": "4", "pretrain.knn_every_epochs": "2", "data.shards": 's3://"quoted"'},
        curves={
            "loss": [(step, 6 - step / 10) for step in range(1, 28)],
            "embedding_std": [(10, 0.7), (20, 0.875)],
            "knn_top1": [(50, 0.4), (100, 0.5)],
        },
        images=(TransferImage(transfer="mask_rcnn", name="pretrained_seed_0_detections", png=png()),),
    )


def empty(data: ReportData) -> ReportData:
    """Of a run that has only begun."""
    unknown = {name: math.nan for name in ("loss", "chance_loss", "embedding_std", "knn_top1")}
    pretraining = dataclasses.replace(data.comparison.pretraining, **unknown)
    nothing = Comparison(pretraining=pretraining, rows=(), failed=())
    return ReportData(comparison=nothing, params={}, curves={name: [] for name in data.curves}, images=())


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


def test_page_is_well_formed_even_as_xml(data: ReportData) -> None:
    for page in (render_report(data), render_report(empty(data))):
        parsed(page)
        ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))


def test_nothing_is_loaded_from_outside(data: ReportData) -> None:
    page = render_report(data)
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    assert all((image["src"] or "").startswith("data:image/") for image in parsed(page).images)


def test_every_image_has_words_for_who_cannot_see_it(data: ReportData) -> None:
    words = [image["alt"] or "" for image in parsed(render_report(data)).images]
    assert len(words) == 5
    assert "knn top1: pretrained 0.625, random 0.188" in words[0]
    assert all(len(text) > 20 for text in words)


def test_strings_from_outside_are_text_not_markup(data: ReportData) -> None:
    page = render_report(data)
    assert "run &lt;1&gt;" in page and "&lt;script&gt;alert(1)" in page and "s3://&quot;quoted&quot;" in page


def test_results_health_settings_and_lineage_are_shown(data: ReportData) -> None:
    page = render_report(data)
    for text in (
        "0.625",
        "0.188",
        "+0.438",
        "FAILED",
        "PASS",
        "3.250",
        "pretrain.knn_every_epochs",
        "p" * 32,
        "r" * 32,
    ):
        assert text in page
    assert "Pretraining beats random initialisation in 1 of 1 transfer, 0 beyond the noise of seeds. 1 failed." in page


def svg_of(page: str, title: str) -> str:
    part = page[page.index(f"<h2>{title}</h2>") :]
    match = re.search(r"data:image/svg\+xml;base64,([^\"]+)", part)
    assert match
    return base64.b64decode(match[1]).decode()


def test_loss_plot_has_the_chance_line_and_its_label(data: ReportData) -> None:
    assert "chance: ln(K+1) = 6.93" in svg_of(render_report(data), "Loss")


def test_equal_data_gives_an_equal_page(data: ReportData) -> None:
    assert render_report(data) == render_report(data)


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
    data: ReportData, loss: float, std: float, expected: list[bool | None]
) -> None:
    facts = dataclasses.replace(data.comparison.pretraining, loss=loss, embedding_std=std)
    assert [check.passed for check in health_checks(facts)] == expected


def test_failed_health_is_said_at_the_top(data: ReportData) -> None:
    ill = dataclasses.replace(data.comparison.pretraining, embedding_std=0.01)
    sick = dataclasses.replace(data, comparison=dataclasses.replace(data.comparison, pretraining=ill))
    page = render_report(sick)
    assert "not healthy" in page and ">FAIL<" in page


def test_long_curve_stays_small(data: ReportData) -> None:
    curves = data.curves | {"loss": [(step, 1.0 + step % 7) for step in range(200_000)]}
    assert len(render_report(dataclasses.replace(data, curves=curves))) < 500_000
