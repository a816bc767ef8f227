"""The report as a browser shows it, and whether its colours can be told apart."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from PIL import Image

from hemoco.features.map import CLASS_COLOURS
from hemoco.report.page import render_report
from hemoco.report.plots import BASELINE_COLOURS, COLOURS
from tests.helpers.chromium import Shown, chromium, show
from tests.helpers.made_runs import begin_run
from tests.services.test_report import RECIPE, collected, fill

# raised inside mlflow by SQLAlchemy 2.1
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")
WIDE, NARROW = 1200, 360
# linear RGB as seen without one kind of cone (Machado, Oliveira and Fernandes 2009, severity 1)
SEEN = {
    "all cones": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with chromium(tmp_path_factory.mktemp("chromium")) as address:
        yield address


@pytest.fixture(scope="module")
def report(tracking: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of two runs with everything that a report can show."""
    runs = [
        begin_run(tracking, f"a page that has a rather long name, number {number}", RECIPE)
        for number in (1, 2)
    ]
    for run in runs:
        fill(run)
    page = tmp_path_factory.mktemp("report") / "report.html"
    page.write_text(render_report(collected(*runs)))
    return page


@pytest.fixture(scope="module", params=[WIDE, NARROW])
def shown(request: pytest.FixtureRequest, browser: str, report: Path) -> tuple[int, Shown, Path]:
    picture = report.with_name(f"{request.param}.png")
    return request.param, show(browser, report, width=request.param, picture=picture), picture


def test_the_page_has_no_console_error_and_asks_for_nothing(shown: tuple[int, Shown, Path]) -> None:
    assert (shown[1].complaints, shown[1].requests, shown[1].broken) == ([], [], [])


def test_the_page_fits_its_width_with_text_that_can_be_read(shown: tuple[int, Shown, Path]) -> None:
    width, found, picture = shown
    assert found.width <= width and found.smallest >= 10
    with Image.open(picture) as drawn:
        assert drawn.width == found.width and drawn.height > 3000


def test_a_page_that_does_wrong_is_seen_to(browser: str, tmp_path: Path) -> None:
    bad = (
        '<img src="http://127.0.0.1:9/x.png" alt="lost"/><p style="width:900px">x</p>'
        "<script>throw 1</script>"
    )
    (tmp_path / "bad.html").write_text(bad)
    found = show(browser, tmp_path / "bad.html", width=NARROW, picture=tmp_path / "bad.png")
    assert len(found.complaints) == 2 and found.requests == ["http://127.0.0.1:9/x.png"]
    assert found.broken == ["lost"] and found.width > NARROW


def lab(colour: str, seen: NDArray[np.float64]) -> NDArray[np.float64]:
    """Converts a colour to CIE L*a*b*, after a matrix of SEEN."""
    encoded = np.array(to_rgb(colour))
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x, y, z = to_xyz @ np.clip(seen @ linear, 0, 1) / (0.9505, 1.0, 1.089)
    fx, fy, fz = (
        value ** (1 / 3) if value > 0.008856 else 7.787 * value + 16 / 116 for value in (x, y, z)
    )
    return np.array([116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)])


@pytest.mark.parametrize("sight", SEEN)
@pytest.mark.parametrize(
    "colours", [COLOURS, CLASS_COLOURS, BASELINE_COLOURS[:2]], ids=["runs", "classes", "baselines"]
)
def test_no_two_colours_look_alike_to_anybody(sight: str, colours: tuple[str, ...]) -> None:
    pairs = itertools.combinations(colours, 2)
    distances = {
        pair: np.linalg.norm(np.subtract(*(lab(colour, SEEN[sight]) for colour in pair)))
        for pair in pairs
    }
    assert {
        pair: distance for pair, distance in distances.items() if distance < 8
    } == {}  # 2.3 is just noticeable
