"""`python -m jobs backbones`: the registered backbones: listed, named by aliases, deleted."""

import difflib
import sys
from collections.abc import Callable
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hemoco.errors import RefusedError, UsageError
from hemoco.storage.objects import join_url, list_names, remove
from hemoco.tracking.client import connect, tracking_uri
from hemoco.tracking.runs import run_facts, search
from hemoco.tracking.tags import Tag
from hemoco.tracking.versions import (
    BackboneVersion,
    backbone_version,
    backbone_versions,
    delete_version,
    set_alias,
)
from pipeline.run_folder import check_run_folder

_FILE_WIDTH = 200  # columns where no terminal says how wide it is
_Name = Annotated[str, tyro.conf.Positional]
_Number = Annotated[int, tyro.conf.Positional]


def main(argv: list[str]) -> None:
    """Finds what to do with backbones, and does it; alone it lists them."""
    word = argv[0] if argv else "list"
    if word in ("-h", "--help"):
        print(
            "usage: python -m jobs backbones [list | alias NAME VERSION ALIAS | delete NAME VERSION [...]]"
        )
        print("(--help after each of them shows its options)")
        return
    if word not in _ACTIONS:
        close = difflib.get_close_matches(word, _ACTIONS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(_ACTIONS)}"
        raise UsageError(f"backbones {word}: {hint}")
    tyro.cli(
        _ACTIONS[word], args=argv[1:], prog=f"python -m jobs backbones {word}", use_underscores=True
    )


def show() -> None:
    """Registered backbones, with what their transfers measured."""
    uri = tracking_uri()
    connect(uri)
    console = Console(width=None if sys.stdout.isatty() else _FILE_WIDTH)
    known = backbone_versions(uri)
    if not known:
        console.print(
            "no backbones yet: each pretraining registers its own at its end", highlight=False
        )
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "version", "aliases", "architecture", "recipe", "run", "results", "url"):
        table.add_column(column, overflow="fold")
    for one in known:
        results = "\n".join(f"{key} {value:.4f}" for key, value in sorted(one.results.items()))
        cells = [
            one.name,
            str(one.version),
            "\n".join(one.aliases),
            one.architecture,
            one.recipe,
            one.run,
            results,
        ]
        table.add_row(*(Text(cell) for cell in (*cells, one.url)))
    console.print(table)
    newest = known[-1]
    console.print(
        f"\nload one: hemoco.load_backbone('models:/{newest.name}/{newest.version}')",
        highlight=False,
    )


def alias(name: _Name, version: _Number, alias: _Name, /) -> None:
    """Gives a version an alias, by which models:/NAME@ALIAS finds it; another version of this name loses it.

    Args:
        name: of the registered model, as `list` shows it.
        version: its number.
        alias: letters, digits, - and _.
    """
    uri = tracking_uri()
    connect(uri)
    set_alias(uri, backbone_version(uri, name, version), alias)
    print(f"models:/{name}@{alias} is version {version}")


def delete(
    name: _Name,
    version: _Number,
    /,
    *,
    checkpoints: bool = False,
    dry_run: bool = False,
    force: bool = False,
) -> None:
    """Deletes a registered version; its logged model, with file and results, and the backbone in storage stay.

    Args:
        name: of the registered model, as `list` shows it.
        version: its number.
        checkpoints: delete the checkpoints of its pretraining, too.
        dry_run: only say what would be deleted.
        force: also a version with an alias that somebody gave it.
    """
    uri = tracking_uri()
    connect(uri)
    one = backbone_version(uri, name, version)
    given = [found for found in one.aliases if found != one.own_alias]
    if given and not force:
        raise UsageError(
            f"{name} {version} has the alias {', '.join(given)}: give it to another version, or say --force"
        )
    found = _checkpoints(uri, one) if checkpoints else []
    verb = "would delete" if dry_run else "deleting"
    for url in found:
        print(f"{verb:<14}checkpoint {url}")
    aliases = "".join(f", @{found}" for found in one.aliases)
    print(f"{verb:<14}models:/{name}/{version}{aliases} (run {one.run})")
    print(f"{'stays':<14}models:/{one.model_id} with its results, {one.url}", flush=True)
    if not dry_run:
        for url in found:  # first, for without the version nobody would find them again
            remove(url)
        delete_version(uri, one)


def _checkpoints(uri: str, one: BackboneVersion) -> list[str]:
    """The URLs of the checkpoints of a backbone's pretraining."""
    from hemoco.train.checkpoint import is_checkpoint  # torch

    try:
        pretraining = run_facts(uri, one.run_id)
        parent = run_facts(uri, pretraining.tags["mlflow.parentRunId"])
    except RefusedError as error:
        raise UsageError(
            f"{one.name} {one.version}: its run is gone, and with it the place of its checkpoints"
        ) from error
    # a run that --fresh began anew has left its name, and its folder, to the new one
    newest = search(uri, connect(uri), {Tag.STORAGE: parent.tags[Tag.STORAGE], Tag.PHASE: "parent"})
    if newest[0].run_id != parent.run_id:
        raise UsageError(
            f"{one.name} {one.version}: its checkpoints are gone, its folder is now of a run begun anew"
        )
    if "RUNNING" in (pretraining.status, parent.status):
        raise UsageError(f"run {one.run} is at work: stop it first, or leave --checkpoints out")
    # a tag may name any folder, also one of other things that are named as checkpoints are
    check_run_folder(parent.tags[Tag.STORAGE], parent.tags[Tag.RUN].removesuffix(" (superseded)"))
    folder = join_url(parent.tags[Tag.STORAGE], "pretrain", "checkpoints")
    return [join_url(folder, name) for name in list_names(folder) if is_checkpoint(name)]


_ACTIONS: dict[str, Callable[..., None]] = {"list": show, "alias": alias, "delete": delete}
