"""The registered versions of backbones in MLflow: found by their names, listed, named by aliases, deleted."""

import dataclasses
import json
import re
from typing import Any, NamedTuple

from hemoco.errors import RefusedError, UsageError
from hemoco.tracking.client import ask, tracking_uri
from hemoco.tracking.models import SCHEME, VERSIONS, alias_name, read_model_file
from hemoco.tracking.tags import Tag

_FORMS = re.compile(
    r"models:/(?:(?P<id>m-[0-9a-f]{32})|(?P<name>[^/:@]+)(?:@(?P<alias>[\w-]+)|/(?P<version>\d+|latest)))"
)
_PAGE = 200


@dataclasses.dataclass(frozen=True, kw_only=True)
class BackboneVersion:
    """A registered version of a backbone; strings are empty where they are not recorded."""

    name: str
    version: int
    aliases: tuple[str, ...]
    model_id: str
    run_id: str
    """Of its pretraining."""
    run: str
    recipe: str
    architecture: str
    url: str
    results: dict[str, float]
    """The newest mean of each transfer from it, by TRANSFER/METRIC."""

    @property
    def own_alias(self) -> str:
        """The alias that stands for its run, which every version gets."""
        return alias_name(self.run)


class _Registered(NamedTuple):
    versions: list[Any]
    aliases: dict[str, dict[int, list[str]]]


def pinned(url: str) -> str:
    """The `models:/m-...` of what a name with an alias or a version stands for now.

    Args:
        url: models:/NAME@ALIAS, models:/NAME/VERSION, models:/NAME/latest or models:/m-...

    Raises:
        UsageError: it is none of these, or the version is not of a hemoco backbone.
        TrackingError: MLflow has no such model, or cannot be used.
    """
    form = _FORMS.fullmatch(url)
    if form is None:
        raise UsageError(
            f"{url}: use models:/NAME@ALIAS, models:/NAME/VERSION, models:/NAME/latest or models:/m-..."
        )
    if form["id"]:
        return url
    version = ask(
        tracking_uri(),
        lambda client: _version(client, form["name"], form["alias"], form["version"]),
    )
    if version is None or Tag.MODEL_ID not in version.tags:
        raise UsageError(
            f"{url}: no backbone of hemoco; `python -m jobs backbones` lists those that there are"
        )
    return f"{SCHEME}{version.tags[Tag.MODEL_ID]}"


def read_model(url: str) -> bytes:
    """The file backbone.safetensors of a registered or logged model in MLflow.

    Args:
        url: as `pinned` takes it.

    Raises:
        UsageError: as `pinned`.
        CheckpointError: MLflow's file is not the one that was recorded.
        TrackingError: MLflow has no such model, or cannot be used.
    """
    return read_model_file(tracking_uri(), pinned(url).removeprefix(SCHEME))


def backbone_versions(uri: str) -> list[BackboneVersion]:
    """All registered backbones, by name and version; versions that others registered are not among them.

    Raises:
        TrackingError: MLflow cannot be used.
    """
    found = ask(uri, _registered)
    ours = [version for version in found.versions if Tag.MODEL_ID in version.tags]
    described = [_described(uri, version, found.aliases.get(version.name, {})) for version in ours]
    return sorted(described, key=lambda one: (one.name, one.version))


def backbone_version(uri: str, name: str, version: int) -> BackboneVersion:
    """One of them.

    Raises:
        UsageError: there is none such.
        TrackingError: MLflow cannot be used.
    """
    known = backbone_versions(uri)
    for one in known:
        if (one.name, one.version) == (name, version):
            return one
    there = ", ".join(f"{one.name} {one.version}" for one in known[-10:]) or "none"
    raise UsageError(f"no backbone {name} {version} is registered; there is {there}")


def set_alias(uri: str, one: BackboneVersion, alias: str) -> None:
    """Gives a version an alias; another version of the same name loses it.

    Raises:
        UsageError: MLflow does not allow this alias.
    """
    if not re.fullmatch(r"[\w-]{1,255}", alias, re.ASCII) or alias != alias_name(alias):
        raise UsageError(
            f"alias {alias!r}: use letters, digits, - and _, not `latest` or v and a number"
        )
    ask(uri, lambda client: client.set_registered_model_alias(one.name, alias, str(one.version)))


def delete_version(uri: str, one: BackboneVersion) -> None:
    """Deletes a version and its aliases; the logged model with its file and results stays."""
    ask(uri, lambda client: client.delete_model_version(one.name, str(one.version)))
    ask(uri, lambda client: client.set_logged_model_tags(one.model_id, {VERSIONS: json.dumps([])}))


def _version(client: Any, name: str, alias: str | None, number: str) -> Any:
    """The version in MLflow; None where `latest` is asked for and there is none."""
    if alias:
        return client.get_model_version_by_alias(name, alias)
    if number != "latest":
        return client.get_model_version(name, number)
    # MLflow's own question for the latest is of its stages, which are to vanish
    return max(
        client.search_model_versions(f"name = '{name}'"),
        key=lambda found: int(found.version),
        default=None,
    )


def _registered(client: Any) -> _Registered:
    versions, aliases, token = [], {}, None
    while True:
        page = client.search_model_versions(max_results=_PAGE, page_token=token)
        versions += page
        token = page.token
        if not token:
            break
    for name in {version.name for version in versions}:
        by_version: dict[int, list[str]] = {}
        for alias, number in client.get_registered_model(name).aliases.items():
            by_version.setdefault(int(number), []).append(alias)
        aliases[name] = by_version
    return _Registered(versions, aliases)


def _described(uri: str, version: Any, aliases: dict[int, list[str]]) -> BackboneVersion:
    tags, model_id = version.tags, version.tags[Tag.MODEL_ID]
    try:
        metrics = ask(uri, lambda client: client.get_logged_model(model_id)).metrics or []
    except RefusedError:  # somebody deleted it, and its results with it
        metrics = []
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
        results={
            metric.key: metric.value
            for metric in sorted(metrics, key=lambda one: int(one.timestamp))
        },
    )
