"""`python -m jobs backbones`: lists the registered backbones, gives them aliases, deletes them."""

import difflib
from collections.abc import Callable
from typing import Annotated

import tyro
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
from jobs.arguments import read_arguments
from jobs.session import table_console
from pipeline.run_folder import check_run_folder

_FILE_WIDTH = 200  # columns if the output is not a terminal
_Name = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
_Version = Annotated[int, tyro.conf.Positional, tyro.conf.arg(metavar="VERSION")]
_Alias = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ALIAS")]


def main(argv: list[str]) -> None:
    """Runs one of the actions; without one, lists the backbones."""
    action = argv[0] if argv else "list"
    if action in ("-h", "--help"):
        print(
            "usage: python -m jobs backbones [ACTION]\n\n"
            "  list                      list the registered backbones and their results\n"
            "  alias NAME VERSION ALIAS  give a version an alias\n"
            "  delete NAME VERSION       delete a version\n\n"
            "Without ACTION, lists the backbones.\n"
            "`python -m jobs backbones ACTION --help` shows the options of an action."
        )
        return
    if action not in _ACTIONS:
        close = difflib.get_close_matches(action, _ACTIONS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(_ACTIONS)}"
        raise UsageError(f"backbones {action}: {hint}")
    read_arguments(_ACTIONS[action], argv[1:], command=f"backbones {action}")


def show() -> None:
    """Lists the registered backbones with the results of their transfers."""
    uri = tracking_uri()
    connect(uri)
    console = table_console(_FILE_WIDTH)
    versions = backbone_versions(uri)
    if not versions:
        console.print(
            "no backbones yet: each pretraining registers its own at its end", highlight=False
        )
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "version", "aliases", "architecture", "recipe", "run", "results", "url"):
        table.add_column(column, overflow="fold")
    for version in versions:
        results = (f"{key} {value:.4f}" for key, value in sorted(version.results.items()))
        cells = [
            version.name,
            str(version.version),
            "\n".join(version.aliases),
            version.architecture,
            version.recipe,
            version.run,
            "\n".join(results),
            version.url,
        ]
        table.add_row(*(Text(cell) for cell in cells))  # Text: brackets in a name are not markup
    console.print(table)
    newest = versions[-1]
    console.print(
        f"\nload one: hemoco.load_backbone('models:/{newest.name}/{newest.version}')",
        highlight=False,
    )


def alias(name: _Name, version: _Version, alias: _Alias, /) -> None:
    """Gives a version an alias, so that models:/NAME@ALIAS names it.

    An alias belongs to one version of a name; giving it to another moves it.

    Args:
        name: name of the registered model, as `list` shows it.
        version: number of the version.
        alias: letters, digits, - and _.
    """
    uri = tracking_uri()
    connect(uri)
    set_alias(uri, backbone_version(uri, name, version), alias)
    print(f"models:/{name}@{alias} is version {version}")


def delete(
    name: _Name,
    version: _Version,
    /,
    *,
    checkpoints: bool = False,
    dry_run: bool = False,
    force: bool = False,
) -> None:
    """Deletes a registered version.

    The logged model, with its file and results, and the backbone in storage are not deleted.

    Args:
        name: name of the registered model, as `list` shows it.
        version: number of the version.
        checkpoints: also delete the checkpoints of its pretraining.
        dry_run: only print what would be deleted.
        force: delete the version even if a person gave it an alias.
    """
    uri = tracking_uri()
    connect(uri)
    backbone = backbone_version(uri, name, version)
    given_aliases = [each for each in backbone.aliases if each != backbone.own_alias]
    if given_aliases and not force:
        raise UsageError(
            f"{name} {version} has the alias {', '.join(given_aliases)}: give it to another "
            "version, or add --force"
        )
    checkpoint_urls = _checkpoints(uri, backbone) if checkpoints else []
    verb = "would delete" if dry_run else "deleting"
    for url in checkpoint_urls:
        print(f"{verb:<14}checkpoint {url}")
    aliases = "".join(f", @{each}" for each in backbone.aliases)
    print(f"{verb:<14}models:/{name}/{version}{aliases} (run {backbone.run})")
    print(f"{'stays':<14}models:/{backbone.model_id} with its results, {backbone.url}", flush=True)
    if dry_run:
        return
    # checkpoints first: once the version is gone, nothing leads to them any more
    for url in checkpoint_urls:
        remove(url)
    delete_version(uri, backbone)


def _checkpoints(uri: str, backbone: BackboneVersion) -> list[str]:
    """Lists the URLs of the checkpoints of a backbone's pretraining."""
    # imported late: torch takes seconds
    from hemoco.train.checkpoint import is_checkpoint

    name = f"{backbone.name} {backbone.version}"
    try:
        pretraining = run_facts(uri, backbone.run_id)
        parent = run_facts(uri, pretraining.tags["mlflow.parentRunId"])
    except RefusedError as error:
        raise UsageError(
            f"{name}: its run was deleted, so it is not known where its checkpoints are"
        ) from error
    # --fresh hands the run's name and folder to a new run: then the folder holds the checkpoints
    # of that one
    newest = search(uri, connect(uri), {Tag.STORAGE: parent.tags[Tag.STORAGE], Tag.PHASE: "parent"})
    if newest[0].run_id != parent.run_id:
        raise UsageError(
            f"{name}: its checkpoints are gone: the run was begun anew, and its folder holds those "
            "of the new one"
        )
    if "RUNNING" in (pretraining.status, parent.status):
        raise UsageError(
            f"run {backbone.run} is running: stop it first, or leave --checkpoints out"
        )
    # tags can be written by others: only a folder that belongs to the run may be emptied
    check_run_folder(parent.tags[Tag.STORAGE], parent.tags[Tag.RUN].removesuffix(" (superseded)"))
    folder = join_url(parent.tags[Tag.STORAGE], "pretrain", "checkpoints")
    return [join_url(folder, name) for name in list_names(folder) if is_checkpoint(name)]


_ACTIONS: dict[str, Callable[..., None]] = {"list": show, "alias": alias, "delete": delete}
