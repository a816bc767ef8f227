"""Tars that others made: a list of those below a URL, and the split of each."""

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from hemoco.data.sources.scan import check_split_name
from hemoco.errors import UsageError
from hemoco.storage.objects import absolute_url, join_url, list_names

_SPLITS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
"""Splits by the word in a name that gives them."""
_MAX_EXPANDED = 200_000


class SourceTar(NamedTuple):
    """A tar file, not yet read."""

    url: str
    split: str


def find_tars(sources: Sequence[str], default_split: str) -> list[SourceTar]:
    """The tars of some sources, by ascending URL.

    Args:
        sources: each a tar, or a folder that holds `*.tar` itself or in folders whose names give
            a split; also as patterns such as `train-{000000..000012}.tar`.
        default_split: split of tars for which neither file name nor folder gives one.

    Raises:
        UsageError: a source holds no tars, a pattern is wrong, or a tar is named twice.
        StorageError: the storage refuses or does not answer, or a scheme is not supported.
    """
    check_split_name(default_split)
    urls: list[str] = []
    for source in sources:
        for expanded in _expand(source):
            urls += _tars_of(expanded)
    twice = [url for url, count in Counter(urls).items() if count > 1]
    if twice:
        raise UsageError(f"{len(twice)} tars are named twice, first {twice[0]}; name each once")
    return [SourceTar(url, split_of(url, default_split)) for url in sorted(urls)]


def split_of(url: str, default_split: str) -> str:
    """The split that a tar's file name gives, or else its folder's name, or else the default.

    A name gives a split if it contains exactly one of the words train, val, validation and test,
    separated from the rest by anything but letters: `imagenet-train-000012.tar`, `val/00001.tar`.
    """
    for name in reversed(url.split("/")[-2:]):
        splits = _splits_in(name)
        if len(splits) == 1:
            return splits.pop()
    return default_split


def _splits_in(name: str) -> set[str]:
    return {_SPLITS[word] for word in re.split(r"[^a-z]+", name.lower()) if word in _SPLITS}


def _expand(source: str) -> list[str]:
    import braceexpand  # a dependency of webdataset

    try:
        expanded = list(itertools.islice(braceexpand.braceexpand(source), _MAX_EXPANDED + 1))
    except ValueError as error:
        raise UsageError(
            f"{source}: not a pattern ({error}); write it like train-{{000000..000012}}.tar"
        ) from error
    if len(expanded) > _MAX_EXPANDED:
        raise UsageError(
            f"{source}: more than {_MAX_EXPANDED} names; is the pattern right? "
            "a folder is a source too"
        )
    return expanded


def _tars_of(source: str) -> list[str]:
    url = absolute_url(source)
    if url.endswith(".tar"):
        return [url]
    names = list_names(url)
    tars = [name for name in names if name.endswith(".tar")]
    for folder in names:
        if not folder.endswith(".tar") and _splits_in(folder):
            below = list_names(join_url(url, folder))
            tars += [f"{folder}/{name}" for name in below if name.endswith(".tar")]
    if not tars:
        content = "nothing"
        if names:
            content = f"only {', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"
        raise UsageError(
            f"{source}: {content} there; --index_only needs a folder of *.tar, or folders train, "
            "val and test of them"
        )
    return [join_url(url, tar) for tar in tars]
