"""The command line: finds the verb, runs it, turns errors into one line and an exit status."""

import difflib
import importlib
import logging
import sys
import traceback
from types import ModuleType

from hemoco.errors import ConfigError, HemocoError, UsageError

_VERBS = {
    "demo": "the whole pipeline on data that ships with hemoco's dependencies: no account, no network",
    "pack": "images -> shards and their index, at any URL",
    "inspect": "what is in a shard folder, whether it is sound, what it looks like",
    "run": "pretraining -> transfers -> comparison",
    "pretrain": "the first half of run",
    "transfer": "the second half of run, from a backbone",
    "sweep": "pretrainings with other settings, the bad ones stopped early; which transfers best",
    "compare": "runs side by side, or the table and report of one again, from MLflow alone",
    "export": "a backbone as a file for torchvision, timm, detectron2 or moco",
    "import": "a backbone of MoCo, torchvision, timm, detectron2, solo-learn, ... as a backbone of hemoco",
    "backbones": "the registered backbones: list, alias, delete",
    "embed": "features of a data set by a backbone, as Parquet",
    "neighbours": "the images nearest to one, by these features",
    "up": "S3, MLflow and Ray on this machine, in the foreground",
    "preflight": "everything that can fail later, checked now, one line each",
    "submit": "the same words, run on a cluster as a Ray job; follows its log",
    "status": "what runs, finished, failed, and how to go on",
    "stop": "ends a submitted run; the same words resume it",
    "sync": "delivers metrics that were kept while MLflow was away",
    "recipes": "the recipes that come with hemoco, or what the settings of a class are",
}
_MODULES = {
    "import": "import_backbone",  # a word of Python
}


_ROOMS = ("hemoco", "pipeline", "cluster", "jobs")


def main(argv: list[str]) -> int:
    """Runs a verb.

    Args:
        argv: the words after `python -m jobs`.

    Returns:
        The exit status: 0 done, 1 failed, 2 wrong usage.
    """
    debug = "--debug" in argv
    argv = [word for word in argv if word != "--debug"]
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for room in _ROOMS:  # not all: botocore logs session tokens
        logging.getLogger(room).setLevel(logging.DEBUG if debug else logging.WARNING)
    if not debug:
        logging.getLogger("pipeline").setLevel(logging.INFO)  # what a person waits for
    try:
        _verb(argv[0]).main(argv[1:])
    except HemocoError as error:
        return _failed(str(error), 2 if isinstance(error, UsageError | ConfigError) else 1, debug)
    except KeyboardInterrupt:
        return _failed("interrupted; the same words again go on where it stopped", 1, debug)
    except BrokenPipeError:
        return 1
    except Exception as error:
        if (
            isinstance(error, ModuleNotFoundError)
            and (error.name or "").partition(".")[0] not in _ROOMS
        ):
            return _failed(
                f"this Python has no {error.name}: run `uv run python -m jobs ...`", 1, debug
            )
        text = (str(error).strip().splitlines() or [""])[0][:300]
        return _failed(
            f"{type(error).__name__}: {text} (this looks like a bug; --debug shows where)", 1, debug
        )
    return 0


def _verb(name: str) -> ModuleType:
    if name not in _VERBS:
        close = difflib.get_close_matches(name, _VERBS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(_VERBS)}"
        raise UsageError(f"unknown verb {name!r}: {hint}")
    return importlib.import_module(f"jobs.verbs.{_MODULES.get(name, name)}")


def _failed(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return status


def _help() -> str:
    lines = [f"  {verb:<10} {text}" for verb, text in _VERBS.items()]
    return "\n".join(
        [
            "usage: python -m jobs VERB [...]   (--help after a verb shows its options; --debug shows tracebacks)",
            "",
            "Does pretraining on my data transfer?",
            "",
            *lines,
        ]
    )
