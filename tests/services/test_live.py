"""The live display of runs as the pipeline records them, and the terminal after it."""

import dataclasses
import io
import logging
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from hemoco.data.shards.index import ShardIndexes
from hemoco.data.stream.loader import StreamPosition
from hemoco.tracking.client import connect
from hemoco.tracking.metric_queue import send_points
from hemoco.tracking.runs import close_run, set_tags
from hemoco.tracking.unsent import MetricPoint
from hemoco.train.pretrain import StepMetrics
from jobs.display.facts import Facts, read_facts
from jobs.display.live import footer, live_display, terminal
from jobs.display.rows import clock
from jobs.display.run_view import Plan, RunView
from jobs.options import load_recipe
from pipeline.pretrain import _progress
from tests.helpers.made_runs import MadeRun, begin_run, end_pretraining, log_rate, write_transfer
from tests.helpers.waiting import wait_until

ROOT = Path(__file__).parents[2]
DEMO = load_recipe("demo")
RECIPE = dataclasses.replace(DEMO, pretrain=dataclasses.replace(DEMO.pretrain, epochs=12))
BEGAN_S = time.time()
DONE = {("pretrained", 0): 0.98, ("random", 0): 0.91}
# two displays of a run, one after the other: of a block that fails, and of one that Ctrl-C ends
PROGRAM = """
import logging, signal, sys, threading, time
from hemoco.data.shards.index import ShardIndexes
from hemoco.tracking.client import connect, tracking_uri
from jobs.display.live import live_display
from jobs.options import load_recipe

def chat(number):
    for line in range(50):
        print("thread", number, end=" ")
        all_begun.wait()  # each thread has half a line
        print("line", line, "x" * 90)

def work():
    logging.warning("event=first")
    print("(RayTrainWorker pid=7)", sys.argv[2], file=sys.stderr)
    print("\\x1b[2J(raylet) would clear the screen")
    threads = [threading.Thread(target=chat, args=(number,)) for number in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    logging.warning("event=last")

all_begun = threading.Barrier(3)
logging.basicConfig(level=logging.INFO, format="%(message)s")
connect(tracking_uri())
recipe = load_recipe("demo")
for ending in ("fail", "interrupt"):
    try:
        with live_display(
            sys.argv[1], pretrain=recipe, transfers=recipe.transfers, indexes=ShardIndexes()
        ):
            work()
            if ending == "fail":
                raise ValueError("no luck")
            # the signal may arrive within print, where an interrupt was lost once
            pressed = threading.Event()
            signal.signal(signal.SIGINT, lambda *_: pressed.set())
            print("waiting for Ctrl-C")
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if pressed.is_set():
                raise KeyboardInterrupt
            time.sleep(600)
            raise AssertionError("no signal")
    except (ValueError, KeyboardInterrupt) as error:
        logging.error("error: %r", error)
    print("after")
"""


@pytest.fixture
def made(tracking, request) -> MadeRun:
    """A run whose pretraining has just begun."""
    return begin_run(tracking, f"live-{request.node.name}", RECIPE)


def facts(made: MadeRun) -> Facts:
    return read_facts(made.uri, connect(made.uri), made.name)


class Watched:
    """The view of a run, and its clock."""

    def __init__(self, **changes) -> None:
        plan = {"run": "r", "began_s": BEGAN_S, "pretrain": RECIPE.pretrain, "steps_per_epoch": 10}
        self.now_s = BEGAN_S
        self.view = RunView(
            Plan(**plan | {"transfers": RECIPE.transfers} | changes), lambda: self.now_s
        )

    def show(self, found: Facts, at_s: float = 0.0) -> None:
        self.now_s = BEGAN_S + at_s
        self.view.show(found)

    def drawn(self, width: int = 100) -> list[str]:
        return lines_of(self.view, width)

    def line(self, name: str, width: int = 100) -> str:
        """Returns the row of a phase without its bar, with single spaces."""
        row = next(each for each in self.drawn(width) if each.startswith(name))
        return " ".join(re.sub("[━╸╺]", " ", row).split())


def lines_of(shown: object, width: int) -> list[str]:
    file = io.StringIO()
    Console(file=file, force_terminal=True, width=width, no_color=True, _environ={}).print(shown)
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()).splitlines()


def line(found: Facts, name: str, width: int = 100, **changes) -> str:
    watched = Watched(**changes)
    watched.show(found)
    return watched.line(name, width)


def at_step(made: MadeRun, step: int) -> Facts:
    log_rate(made, step=step, at_s=step, images_per_s=1234.5)
    return facts(made)


def test_before_mlflow_knows_anything_all_waits():
    assert line(Facts(), "pretrain") == "pretrain 0/120 waiting"
    for name, config in RECIPE.transfers.items():
        assert line(Facts(), name) == f"{name} 0/{len(config.inits)} waiting"


def test_a_pretraining_without_records_is_starting(made):
    assert line(facts(made), "pretrain").startswith("pretrain 0/120 starting")


def test_a_pretraining_shows_time_left_epoch_and_values(made):
    watched = Watched()
    watched.show(facts(made))
    watched.show(at_step(made, 10), at_s=250)  # the start is no measure
    watched.show(at_step(made, 30), at_s=270)
    shown = watched.line("pretrain")
    assert shown == "pretrain 30/120 1:30 left epoch 4/12 loss 3.000 kNN 0.500 1,234 images/s"


def test_records_from_before_are_no_pace(made):
    watched = Watched()
    watched.show(at_step(made, 30))
    watched.show(facts(made), at_s=2)
    assert watched.line("pretrain").startswith("pretrain 30/120 resuming epoch 4/12")
    watched.show(at_step(made, 40), at_s=60)
    assert "left" not in watched.line("pretrain")
    watched.show(at_step(made, 60), at_s=70)
    assert watched.line("pretrain").startswith("pretrain 60/120 0:30 left epoch 7/12")


def test_a_pretraining_that_falls_silent_is_shown(made):
    watched = Watched()
    watched.show(facts(made))
    watched.show(at_step(made, 30), at_s=2)
    watched.show(facts(made), at_s=602)
    assert watched.line("pretrain").startswith("pretrain 30/120 last record 10:00 ago epoch 4/12")


def test_an_unknown_length_shows_the_step_alone(made):
    shown = line(at_step(made, 30), "pretrain", steps_per_epoch=None)
    assert shown == "pretrain 30/? resuming loss 3.000 kNN 0.500 1,234 images/s"


def test_a_transfer_shows_how_much_is_measured_and_the_time_left(made):
    end_pretraining(made, at_s=9)
    config = dataclasses.replace(RECIPE.transfers["knn"], seeds=(0, 1, 2))
    watched = Watched(transfers={"knn": config})
    write_transfer(made, "knn", {}, open_=1)
    watched.show(facts(made))
    assert watched.line("knn") == "knn 0/6 running"
    write_transfer(made, "knn", {("pretrained", 0): 0.98, ("random", 0): 0.9}, open_=1)
    watched.show(facts(made), at_s=30)
    assert watched.line("knn") == "knn 2/6 1:00 left"


def test_a_detector_in_training_shows_its_step_and_the_time_left(made):
    end_pretraining(made, at_s=9)
    config = dataclasses.replace(
        RECIPE.transfers["mask_rcnn"], steps=100, inits=("pretrained", "random")
    )
    watched = Watched(transfers={"mask_rcnn": config})
    run_id = write_transfer(made, "mask_rcnn", {("pretrained", 0): 0.4}, open_=1)
    for at_s, step in ((0, 10), (20, 60)):
        points = [MetricPoint(key="random/seed_0/loss", value=1.0, timestamp=1, step=step)]
        send_points(made.uri, run_id, points)
        watched.show(facts(made), at_s=at_s)
    assert watched.line("mask_rcnn") == "mask_rcnn 1/2 0:16 left step 60"


def test_a_transfer_that_is_done_shows_its_headline(made):
    write_transfer(made, "knn", DONE)
    assert line(facts(made), "knn") == "knn 2/2 done top1 0.980 random 0.910"


def test_a_transfer_that_failed_shows_why(made):
    write_transfer(made, "knn", {}, error="storage does not answer, for a long time already")
    assert (
        line(facts(made), "knn")
        == "knn 0/2 failed storage does not answer, for a long time already"
    )


def test_what_does_not_fit_beside_a_bar_goes_on_below(made):
    watched = Watched()
    watched.show(at_step(made, 30))
    assert {"4/12", "3.000", "0.500", "1,234", "images/s"} <= set(
        " ".join(watched.drawn(60)).split()
    )


def test_what_failed_before_waits_to_be_tried_again(made):
    write_transfer(made, "knn", {("pretrained", 0): 0.98}, error="interrupted")
    assert line(facts(made), "knn", began_s=time.time() + 60) == "knn 1/2 waiting"


def test_a_transfer_left_running_waits_for_the_pretraining(made):
    write_transfer(made, "knn", {}, open_=1)
    assert line(facts(made), "knn") == "knn 0/2 waiting"


def test_a_pretraining_that_failed_shows_why(made):
    set_tags(made.uri, made.pretraining, {"hemoco.error": "the loss is nan at step 7"})
    close_run(made.uri, made.pretraining, "FAILED")
    assert line(facts(made), "pretrain") == "pretrain 0/120 failed the loss is nan at step 7"


def test_points_of_the_curve_stand_with_their_transfer_until_it_begins(made):
    write_transfer(made, "knn", DONE, epoch=3)
    points = [MetricPoint(key="curve/knn/top1", value=0.9, timestamp=1, step=3)]
    send_points(made.uri, made.pretraining, points)
    assert facts(made).transfers == {}
    assert line(facts(made), "knn") == "knn 0/2 waiting 0.900 after epoch 3"


def test_an_mlflow_that_is_away_is_named():
    (found,) = lines_of(
        footer("r", elapsed_s=271.0, silence_s=40.0, problem="connection refused"), 100
    )
    assert " ".join(found.split()) == "elapsed 4:31 MLflow does not answer, 0:40 connection refused"
    assert lines_of(footer("r", elapsed_s=271.0, silence_s=1.0, problem=""), 100) == [
        "elapsed 4:31  r"
    ]


@pytest.mark.parametrize("width", [20, 50, 80, 200])
def test_every_line_fits(made, width):
    log_rate(made, step=30, at_s=1, images_per_s=1234.5)
    write_transfer(made, "linear_probe", {}, error="a [reason] " * 30)
    watched = Watched()
    before = watched.drawn(width)
    watched.show(facts(made))
    shown = watched.drawn(width)
    assert max(map(len, before + shown)) <= width


@pytest.mark.parametrize(
    ("seconds", "said"), [(5, "0:05"), (271, "4:31"), (7500, "2 h 05 min"), (273_600, "3 d 4 h")]
)
def test_a_time_in_few_letters(seconds, said):
    assert clock(seconds) == said


def test_where_output_is_no_terminal_nothing_changes(capsys):
    before = sys.stdout
    with live_display("any", pretrain=None, transfers={}, indexes=ShardIndexes()):
        assert sys.stdout is before
        print("a line")
    assert capsys.readouterr() == ("a line\n", "")


@contextmanager
def in_terminal(kind: str = "xterm") -> Iterator[None]:
    """Connects this process's output to a pseudo-terminal."""
    ours, theirs = pty.openpty()
    with (
        os.fdopen(ours, "rb", 0),
        os.fdopen(theirs, "w") as out,
        os.fdopen(os.dup(theirs), "w") as err,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        patch.setenv("TERM", kind)
        yield


def test_a_terminal_has_a_display():
    with in_terminal():
        assert terminal() is not None


def test_a_dumb_terminal_gets_plain_lines():
    with in_terminal("dumb"):
        assert terminal() is None


def test_one_stream_that_goes_elsewhere_means_plain_lines(monkeypatch):
    with in_terminal():
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        assert terminal() is None


def test_a_silent_mlflow_does_not_hold_the_end_back(monkeypatch):
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        in_terminal(),
    ):  # takes connections and never answers
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        with live_display("any", pretrain=None, transfers={}, indexes=ShardIndexes()):
            server.accept()[0].close()
        left = asking()
    assert left, "the end has waited for an answer"
    wait_until(lambda: not asking(), 60)


def test_an_mlflow_that_is_away_is_not_logged_again_and_again(monkeypatch, caplog):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with in_terminal(), live_display("any", pretrain=None, transfers={}, indexes=ShardIndexes()):
        pass
    wait_until(lambda: not asking(), 60)
    assert caplog.messages == []


def asking() -> bool:
    return any(thread.name == "hemoco-live" for thread in threading.enumerate())


def test_handlers_that_hold_a_stream_get_it_back(tracking):
    with in_terminal():
        handler = logging.StreamHandler(sys.stderr)
        logging.getLogger("test_live").addHandler(handler)
        with live_display("any", pretrain=None, transfers={}, indexes=ShardIndexes()):
            during = handler.stream is sys.stderr
        logging.getLogger("test_live").removeHandler(handler)
        assert during and handler.stream is sys.stderr


@pytest.fixture(scope="module")
def sessions(tracking) -> tuple[str, str]:
    """Output of two displays in their own terminal: one ended by an error, one by Ctrl-C."""
    made = begin_run(tracking, "live-session", RECIPE)
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    values = StepMetrics(step=10, epoch=0, position=StreamPosition(0, 10), values={"loss": 3.0})
    words = [sys.executable, "-c", PROGRAM, made.name, _progress(values, values.values, 120)]
    with subprocess.Popen(
        words, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs
    ) as process:
        os.close(theirs)
        written = b""
        while chunk := _read(ours):
            told = b"waiting for" in written
            written += chunk
            if not told and b"waiting for" in written:
                process.send_signal(signal.SIGINT)
    os.close(ours)
    return written.decode().replace("\r\n", "\n").partition("after\n")[::2]


@pytest.fixture(params=["fail", "interrupt"])
def session(request, sessions) -> str:
    """Output of one of them."""
    return sessions[request.param == "interrupt"]


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other end was closed
        return b""


def printed(session: str) -> list[str]:
    """Returns the lines of an output without control codes, including those of each redraw."""
    return re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", session.replace("\r\x1b[2K", "\n")).splitlines()


def test_lines_above_are_whole_and_in_order(session):
    said = [each for each in printed(session) if "line" in each and "thread" in each]
    for number in range(3):
        mine = [each for each in said if f"thread {number} " in each]
        assert mine == [f"thread {number} line {index} {'x' * 90}" for index in range(50)]


def test_logged_lines_are_above_too_and_records_of_the_training_are_not(session):
    lines = printed(session)
    assert (
        lines.index("event=first")
        < lines.index("(raylet) would clear the screen")
        < lines.index("event=last")
    )
    assert "\x1b[2J" not in session
    assert not any("pretrain step" in each for each in lines)


def test_the_terminal_is_as_it_was(session):
    assert session.rindex("\x1b[?25h") > session.rindex("\x1b[?25l") >= 0


def test_the_last_picture_stays_with_the_error_below(session):
    lines = printed(session.removesuffix("after\n"))
    assert lines[-1] in ("error: ValueError('no luck')", "error: KeyboardInterrupt()")
    last = lines[-2 - len(RECIPE.transfers) : -1]
    assert [each.split()[0] for each in last] == [*RECIPE.transfers, "elapsed"]


def test_after_the_display_lines_are_plain_again(session):
    assert "\x1b" not in session[session.rindex("error: ") :]
