"""The command line: finds the verb, runs it, turns errors into one line and an exit status."""

import difflib
import importlib
import logging
import sys
import traceback
from types import ModuleType

from hemoco.errors import ConfigError, HemocoError, UsageError, first_line
from hemoco.version import __version__

_GROUPS = {
    "First steps": {
        "demo": "run the whole pipeline on small built-in data; needs no account and no network",
        "up": "start S3, MLflow and Ray on this machine, in the foreground",
        "recipes": "list the shipped recipes, or explain the settings of a config class",
    },
    "Data": {
        "pack": "write images as shards with an index, to a folder or to S3",
        "inspect": "show what a shard folder contains, verify it, draw a contact sheet",
    },
    "Pretraining and transfer": {
        "run": "pretrain, measure the transfers, print the comparison",
        "pretrain": "only pretrain",
        "transfer": "only measure the transfers of a given backbone",
        "sweep": "search settings with many pretrainings; bad ones are stopped early",
        "preflight": "check data, storage, MLflow and Ray for a run, without training",
    },
    "Results": {
        "status": "list runs, or show one with the command that resumes it",
        "compare": "print tables and write reports of one run or of several, from MLflow",
        "sync": "send metrics that were stored while MLflow did not answer",
    },
    "Backbones": {
        "backbones": "list registered backbones, give them aliases, delete them",
        "export": "write a backbone for torchvision, timm, detectron2 or moco",
        "import": "convert a checkpoint of another library to a backbone of hemoco",
        "embed": "compute the features of a data set, as Parquet",
        "neighbours": "find the images nearest to one, by these features",
    },
    "Clusters": {
        "submit": "run a verb on a cluster as a Ray job and follow its log",
        "stop": "stop a submitted run; it can be resumed",
    },
}
_VERBS = {verb: text for group in _GROUPS.values() for verb, text in group.items()}
_MODULES = {
    "import": "import_backbone",  # `import` is a keyword of Python
}
_PACKAGES = ("hemoco", "pipeline", "cluster", "jobs")


def main(argv: list[str]) -> int:
    """Runs a verb.

    Args:
        argv: the command line after `python -m jobs`.

    Returns:
        The exit status: 0 done, 1 failed, 2 wrong usage.
    """
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"hemoco {__version__}")
        return 0
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    # only our own loggers get --debug: botocore would log session tokens
    for package in _PACKAGES:
        logging.getLogger(package).setLevel(logging.DEBUG if debug else logging.WARNING)
    if not debug:
        logging.getLogger("pipeline").setLevel(logging.INFO)  # the progress of a run
    try:
        _verb(argv[0]).main(argv[1:])
    except HemocoError as error:
        return _failed(str(error), 2 if isinstance(error, UsageError | ConfigError) else 1, debug)
    except KeyboardInterrupt:
        message = "interrupted; run the same command again to resume where it stopped"
        return _failed(message, 1, debug)
    except BrokenPipeError:  # for example `jobs status | head`
        return 1
    except ModuleNotFoundError as error:
        missing = error.name or ""
        message = f"this Python has no {missing}: run `uv run python -m jobs ...`"
        if missing.partition(".")[0] in _PACKAGES:
            message = _bug(error)
        return _failed(message, 1, debug)
    except Exception as error:
        return _failed(_bug(error), 1, debug)
    return 0


def _verb(name: str) -> ModuleType:
    if name not in _VERBS:
        close = difflib.get_close_matches(name, _VERBS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"the verbs are {', '.join(_VERBS)}"
        raise UsageError(f"unknown verb {name!r}: {hint}")
    return importlib.import_module(f"jobs.verbs.{_MODULES.get(name, name)}")


def _bug(error: Exception) -> str:
    text = first_line(error) if str(error).strip() else ""
    return f"{type(error).__name__}: {text} (this looks like a bug; --debug shows where)"


def _failed(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    return status


def _help() -> str:
    lines = [
        "usage: python -m jobs VERB [...]",
        "",
        "Does pretraining on my data transfer? hemoco pretrains ResNets with MoCo on your images",
        "and measures how well the features transfer to classification and detection.",
    ]
    for title, verbs in _GROUPS.items():
        lines += ["", title, *(f"  {verb:<12}{text}" for verb, text in verbs.items())]
    return "\n".join(
        [
            *lines,
            "",
            "`python -m jobs VERB --help` shows the options of a verb; --debug after any verb",
            "shows the traceback of an error; `python -m jobs --version` prints the version.",
        ]
    )
