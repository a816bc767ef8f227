"""Registered versions of backbones in MLflow: finding, listing, aliasing and deleting them."""

import dataclasses
import json
import re
from typing import Any, NamedTuple

from hemoco.errors import RefusedError, UsageError
from hemoco.tracking.client import ask, tracking_uri
from hemoco.tracking.models import SCHEME, VERSIONS, alias_name, read_model_file
from hemoco.tracking.tags import Tag

_URL = re.compile(
    r"models:/(?:(?P<id>m-[0-9a-f]{32})"
    r"|(?P<name>[^/:@]+)(?:@(?P<alias>[\w-]+)|/(?P<version>\d+|latest)))"
)
_PAGE = 200
"""Versions in one page of a search."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneVersion:
    """A registered version of a backbone; what is not recorded is an empty string."""

    name: str
    """Name of the registered model."""
    version: int
    """Number of the version."""
    aliases: tuple[str, ...]
    """Aliases of the version, sorted."""
    model_id: str
    """Id of its logged model."""
    run_id: str
    """MLflow's id of its pretraining run."""
    run: str
    """Name of its run, as after `--run`."""
    recipe: str
    """Name of its recipe."""
    architecture: str
    """Name of its architecture in timm."""
    url: str
    """URL of its file."""
    results: dict[str, float]
    """Newest mean of each transfer from it, by TRANSFER/METRIC."""

    @property
    def own_alias(self) -> str:
        """The alias made of the run's name, which every version gets."""
        return alias_name(self.run)


class _Registry(NamedTuple):
    """All registered versions in MLflow, those of other projects included."""

    versions: list[Any]
    aliases: dict[str, dict[int, list[str]]]
    """Aliases by name of the model and number of the version."""


def pinned(url: str) -> str:
    """The URL `models:/m-...` of the model that an alias or a version refers to now.

    Args:
        url: models:/NAME@ALIAS, models:/NAME/VERSION, models:/NAME/latest or models:/m-...

    Raises:
        UsageError: the URL has none of these forms, or the version is not a backbone of hemoco.
        TrackingError: MLflow has no such model, or cannot be used.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise UsageError(
            f"{url}: use models:/NAME@ALIAS, models:/NAME/VERSION, models:/NAME/latest or "
            "models:/m-..."
        )
    if match["id"]:
        return url
    version = ask(
        tracking_uri(),
        lambda client: _version(client, match["name"], match["alias"], match["version"]),
    )
    if version is None or Tag.MODEL_ID not in version.tags:
        raise UsageError(
            f"{url}: no backbone of hemoco; `python -m jobs backbones` lists those that there are"
        )
    return f"{SCHEME}{version.tags[Tag.MODEL_ID]}"


def read_model(url: str) -> bytes:
    """Contents of the file backbone.safetensors of a registered or logged model.

    Args:
        url: in one of the forms of `pinned`.

    Raises:
        UsageError: see `pinned`.
        CheckpointError: the file in MLflow is not the one that was recorded.
        TrackingError: MLflow has no such model, or cannot be used.
    """
    return read_model_file(tracking_uri(), pinned(url).removeprefix(SCHEME))


def backbone_versions(uri: str) -> list[BackboneVersion]:
    """All registered backbones of hemoco, sorted by name and version.

    Raises:
        TrackingError: MLflow cannot be used.
    """
    registry = ask(uri, _read_registry)
    backbones = []
    for version in registry.versions:
        if Tag.MODEL_ID in version.tags:  # others are not of hemoco
            backbones.append(_describe(uri, version, registry.aliases.get(version.name, {})))
    return sorted(backbones, key=lambda backbone: (backbone.name, backbone.version))


def backbone_version(uri: str, name: str, version: int) -> BackboneVersion:
    """A registered backbone by name and version.

    Raises:
        UsageError: no such backbone is registered.
        TrackingError: MLflow cannot be used.
    """
    known = backbone_versions(uri)
    for backbone in known:
        if (backbone.name, backbone.version) == (name, version):
            return backbone
    names = [f"{backbone.name} {backbone.version}" for backbone in known[-10:]]
    raise UsageError(
        f"no backbone {name} {version} is registered; there is {', '.join(names) or 'none'}"
    )


def set_alias(uri: str, backbone: BackboneVersion, alias: str) -> None:
    """Gives a version an alias; another version of the same name loses it.

    Raises:
        UsageError: MLflow does not allow this alias.
        TrackingError: MLflow cannot be used.
    """
    if not re.fullmatch(r"[\w-]{1,255}", alias, re.ASCII) or alias != alias_name(alias):
        raise UsageError(
            f"alias {alias!r}: use letters, digits, - and _, not `latest` or v and a number"
        )
    name, number = backbone.name, str(backbone.version)
    ask(uri, lambda client: client.set_registered_model_alias(name, alias, number))


def delete_version(uri: str, backbone: BackboneVersion) -> None:
    """Deletes a version and its aliases; the logged model stays, with its file and results."""
    name, number = backbone.name, str(backbone.version)
    ask(uri, lambda client: client.delete_model_version(name, number))
    no_versions = {VERSIONS: json.dumps([])}
    ask(uri, lambda client: client.set_logged_model_tags(backbone.model_id, no_versions))


def _version(client: Any, name: str, alias: str | None, number: str) -> Any:
    """MLflow's version with an alias or a number; None for `latest` if there is no version."""
    if alias:
        return client.get_model_version_by_alias(name, alias)
    if number != "latest":
        return client.get_model_version(name, number)
    # not get_latest_versions, which belongs to the stages that MLflow has deprecated
    versions = client.search_model_versions(f"name = '{name}'")
    return max(versions, key=lambda version: int(version.version), default=None)


def _read_registry(client: Any) -> _Registry:
    versions: list[Any] = []
    token = None
    while True:
        page = client.search_model_versions(max_results=_PAGE, page_token=token)
        versions += page
        token = page.token
        if not token:
            break
    aliases: dict[str, dict[int, list[str]]] = {}
    for name in {version.name for version in versions}:
        by_version: dict[int, list[str]] = {}
        for alias, number in client.get_registered_model(name).aliases.items():
            by_version.setdefault(int(number), []).append(alias)
        aliases[name] = by_version
    return _Registry(versions, aliases)


def _describe(uri: str, version: Any, aliases: dict[int, list[str]]) -> BackboneVersion:
    tags = version.tags
    model_id = tags[Tag.MODEL_ID]
    try:
        metrics = ask(uri, lambda client: client.get_logged_model(model_id)).metrics or []
    except RefusedError:  # the logged model was deleted, and its results with it
        metrics = []
    results = {}
    for metric in sorted(metrics, key=lambda metric: int(metric.timestamp)):
        results[metric.key] = metric.value  # the newest counts
    return BackboneVersion(
        name=version.name,
        version=int(version.version),
        aliases=tuple(sorted(aliases.get(int(version.version), []))),
        model_id=model_id,
        run_id=version.run_id or "",
        run=tags.get(Tag.RUN, ""),
        recipe=tags.get(Tag.RECIPE, ""),
        architecture=tags.get(Tag.ARCHITECTURE, ""),
        url=tags.get(Tag.BACKBONE_URL, ""),
        results=results,
    )
