"""Tars that others made: which there are below a URL, and of which split each is."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from hemoco.data.sources.found import check_split_name
from hemoco.errors import UsageError
from hemoco.storage.objects import absolute_url, join_url, list_names

_WORDS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
_MOST_EXPANDED = 200_000


class FoundTar(NamedTuple):
    """A tar file, not yet read."""

    url: str
    split: str


def find_tars(sources: Sequence[str], default_split: str) -> list[FoundTar]:
    """The tars of some sources, by ascending URL.

    Args:
        sources: folders that hold `*.tar`, themselves or in folders whose names hold a split; tars; both also as
            patterns such as `train-{000000..000012}.tar`.
        default_split: of tars whose name and folder tell none.

    Raises:
        UsageError: a source holds no tars, a pattern is wrong, or a tar is named twice.
        StorageError: the storage refuses or does not answer, or a scheme is not supported.
    """
    check_split_name(default_split)
    urls = [url for source in sources for expanded in _expand(source) for url in _tars_of(expanded)]
    twice = [url for url, count in Counter(urls).items() if count > 1]
    if twice:
        raise UsageError(f"{len(twice)} tars are named twice, first {twice[0]}; name each once")
    return [FoundTar(url, split_of(url, default_split)) for url in sorted(urls)]


def split_of(url: str, default_split: str) -> str:
    """The split that the name of a tar tells, else its folder's, else the default.

    A name tells it where exactly one of the words train, val, validation and test is in it, set off by anything but
    letters: `imagenet-train-000012.tar`, `val/00001.tar`.
    """
    for part in reversed(url.split("/")[-2:]):
        found = _splits_in(part)
        if len(found) == 1:
            return found.pop()
    return default_split


def _splits_in(name: str) -> set[str]:
    return {_WORDS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _WORDS}


def _expand(source: str) -> list[str]:
    import braceexpand  # comes with webdataset

    try:
        expanded = list(itertools.islice(braceexpand.braceexpand(source), _MOST_EXPANDED + 1))
    except ValueError as error:
        raise UsageError(
            f"{source}: not a pattern ({error}); write it like train-{{000000..000012}}.tar"
        ) from error
    if len(expanded) > _MOST_EXPANDED:
        raise UsageError(
            f"{source}: more than {_MOST_EXPANDED} names; is the pattern right? a folder is a source too"
        )
    return expanded


def _tars_of(source: str) -> Iterator[str]:
    url = absolute_url(source)
    if url.endswith(".tar"):
        yield url
        return
    names = list_names(url)
    folders = [name for name in names if not name.endswith(".tar") and _splits_in(name)]
    inside = {name: list_names(join_url(url, name)) for name in folders}
    found = [name for name in names if name.endswith(".tar")]
    found += [
        f"{folder}/{name}"
        for folder, below in inside.items()
        for name in below
        if name.endswith(".tar")
    ]
    if not found:
        there = (
            f"only {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"
            if names
            else "nothing"
        )
        raise UsageError(
            f"{source}: {there} there; --index_only needs a folder of *.tar, or folders train, val and test of them"
        )
    yield from (join_url(url, name) for name in found)
