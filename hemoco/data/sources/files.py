"""Files of a folder, zip or tar archive, listed and read in place; archives are never unpacked.

No name leads out of its folder or archive: links out of a folder are left out, and an archive with
`..` in a name is refused.
"""

import contextlib
import logging
import lzma
import os
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO, Literal, cast

from hemoco.errors import ShardError, UsageError, first_line

logger = logging.getLogger(__name__)

_DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,  # a zip compression that Python lacks
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
)
"""Errors that reading a damaged file or archive raises."""


@dataclass(frozen=True)
class Location:
    """Location of the bytes of one file."""

    kind: Literal["file", "zip", "tar"]
    path: str
    """Path of the file or of its archive."""
    member: str = ""
    """Its name in the archive."""
    offset: int = 0
    """First byte in the decompressed stream of a tar."""
    size: int = 0
    """Bytes; only set for files in a tar."""

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else self.path


def list_files(path: str) -> dict[str, Location]:
    """The regular files of a folder or archive, sorted by their names in it, without hidden files.

    Raises:
        UsageError: nothing is there, or it is neither a folder nor an archive.
        ShardError: the archive is damaged, encrypted, or holds names that lead out of it.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise UsageError(
            f"{path}: not found; SOURCE is a local folder of images or a zip or tar archive"
        )
    with _read_errors(str(root)):
        if root.is_dir():
            files = _list_folder(root.resolve())
        elif zipfile.is_zipfile(root):
            files = _list_zip(root.resolve())
        elif tarfile.is_tarfile(root):
            files = _list_tar(root.resolve())
        else:
            raise UsageError(
                f"{path}: not a folder, and no zip or tar archive that can be read; is it damaged?"
            )
    return {name: files[name] for name in sorted(files) if not _is_hidden(name)}


def read_files(locations: Sequence[Location]) -> list[bytes]:
    """Reads files, in the order of their locations; each archive is opened once and read forwards.

    Raises:
        ShardError: a file is gone or its archive is damaged; the message names it.
    """
    contents: dict[int, bytes] = {}
    # A compressed tar can only seek backwards by decompressing from the start again.
    order = sorted(range(len(locations)), key=lambda i: (locations[i].path, locations[i].offset))
    for path, group in groupby(order, key=lambda i: locations[i].path):
        numbers = list(group)
        with _read_errors(path):
            data = _read_from(path, [locations[number] for number in numbers])
            contents.update(zip(numbers, data, strict=True))
    return [contents[number] for number in range(len(locations))]


def _list_folder(root: Path) -> dict[str, Location]:
    files = {}
    links: Counter[str] = Counter()
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        links.update(name for name in subfolders if Path(folder, name).is_symlink())
        for name in names:
            path = Path(folder, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                links[name] += 1
            elif path.is_file():
                files[path.relative_to(root).as_posix()] = Location("file", str(path))
    if links:
        logger.warning(
            "links not followed: folder=%s links=%d first=%s",
            root,
            links.total(),
            next(iter(links)),
        )
    return files


def _list_zip(path: Path) -> dict[str, Location]:
    files = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.flag_bits & 1:
                raise ShardError(
                    f"{path}: its member {member.filename!r} is encrypted; decrypt the archive "
                    "first"
                )
            if not member.is_dir():
                name = _safe_name(path, member.filename)
                files[name] = Location("zip", str(path), member.filename)
    return files


def _list_tar(path: Path) -> dict[str, Location]:
    files = {}
    with tarfile.open(path) as archive:
        for member in archive:
            # the content of a sparse file is not one range of bytes; images are never sparse
            if member.isfile() and not member.issparse():
                name = _safe_name(path, member.name)
                files[name] = Location(
                    "tar", str(path), member.name, member.offset_data, member.size
                )
    return files


def _read_from(path: str, locations: list[Location]) -> Iterator[bytes]:
    """Yields the bytes of files that share a path, ascending by offset."""
    if locations[0].kind == "file":
        data = Path(path).read_bytes()
        yield from (data for _ in locations)
    elif locations[0].kind == "zip":
        with zipfile.ZipFile(path) as archive:
            yield from (archive.read(location.member) for location in locations)
    else:
        with tarfile.open(path) as tar:
            # the decompressed stream, read directly: finding members by name would parse the tar
            stream = cast(BinaryIO, tar.fileobj)
            for location in locations:
                stream.seek(location.offset)
                data = stream.read(location.size)
                if len(data) != location.size:
                    raise EOFError(f"it ends inside {location.member}")
                yield data


def _safe_name(path: Path, name: str) -> str:
    """A member's name with forward slashes and without a leading `./`."""
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or parts[0].endswith(":"):
        raise ShardError(f"{path}: its member {name!r} leads out of the archive; do not trust it")
    return "/".join(part for part in parts if part not in ("", "."))


def _raise(error: OSError) -> None:
    """Raises the errors that `os.walk` ignores by default."""
    raise error


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


@contextlib.contextmanager
def _read_errors(path: str) -> Iterator[None]:
    """Turns errors of reading into a ShardError that names the path."""
    try:
        yield
    except _DAMAGE as error:
        reason = first_line(error)
        raise ShardError(
            f"{path}: cannot be read ({reason}); it is damaged, or this user may not read it"
        ) from error
