"""Files of a folder, zip or tar archive: listed and read where they are, never unpacked.

A name never leaves its folder or archive: links out of a folder are left out, an archive that holds `..` is refused.
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

# NotImplementedError: a zip compression that Python lacks
_DAMAGE = (OSError, EOFError, ValueError, NotImplementedError, zipfile.BadZipFile, tarfile.TarError, zlib.error,
           lzma.LZMAError)  # fmt: skip


@dataclass(frozen=True)
class Location:
    """Where the bytes of one file are."""

    kind: Literal["file", "zip", "tar"]
    path: str
    """Of the file or of its archive."""
    member: str = ""
    """Name inside the archive."""
    offset: int = 0
    """First byte in the unpacked stream of a tar."""
    size: int = 0
    """Bytes in a tar."""

    def __str__(self) -> str:
        return f"{self.path}:{self.member}" if self.member else self.path


def list_files(path: str) -> dict[str, Location]:
    """The regular files of a folder or archive by their names in it, sorted; hidden ones are left out.

    Raises:
        UsageError: nothing is there, or it is neither a folder nor an archive.
        ShardError: the archive is damaged, encrypted, or holds names that lead out of it.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise UsageError(
            f"{path}: not found; SOURCE is a local folder of images or a zip or tar archive"
        )
    with _damage_named(str(root)):
        if root.is_dir():
            found = _list_folder(root.resolve())
        elif zipfile.is_zipfile(root):
            found = _list_zip(root.resolve())
        elif tarfile.is_tarfile(root):
            found = _list_tar(root.resolve())
        else:
            raise UsageError(
                f"{path}: not a folder, and no zip or tar archive that can be read; is it damaged?"
            )
    return {name: found[name] for name in sorted(found) if not _hidden(name)}


def read_files(locations: Sequence[Location]) -> list[bytes]:
    """The files' bytes, in the order asked for; each archive is opened once and read forwards.

    Raises:
        ShardError: a file is gone or its archive is damaged; names it.
    """
    contents: dict[int, bytes] = {}
    order = sorted(range(len(locations)), key=lambda i: (locations[i].path, locations[i].offset))
    for path, group in groupby(order, key=lambda i: locations[i].path):
        chosen = list(group)
        with _damage_named(path):
            contents.update(
                zip(chosen, _read_from(path, [locations[i] for i in chosen]), strict=True)
            )
    return [contents[i] for i in range(len(locations))]


def _list_folder(root: Path) -> dict[str, Location]:
    found = {}
    links: Counter[str] = Counter()
    for folder, subfolders, names in os.walk(root, onerror=_refuse):
        links.update(name for name in subfolders if Path(folder, name).is_symlink())
        for name in names:
            path = Path(folder, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                links[name] += 1
            elif path.is_file():
                found[path.relative_to(root).as_posix()] = Location("file", str(path))
    if links:
        logger.warning(
            "links not followed: folder=%s links=%d first=%s",
            root,
            links.total(),
            next(iter(links)),
        )
    return found


def _list_zip(path: Path) -> dict[str, Location]:
    found = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.flag_bits & 1:
                raise ShardError(
                    f"{path}: its member {member.filename!r} is encrypted; decrypt the archive first"
                )
            if not member.is_dir():
                found[_safe_name(path, member.filename)] = Location(
                    "zip", str(path), member.filename
                )
    return found


def _list_tar(path: Path) -> dict[str, Location]:
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            # sparse files have no one range of bytes; images never are
            if member.isfile() and not member.issparse():
                name = _safe_name(path, member.name)
                found[name] = Location(
                    "tar", str(path), member.name, member.offset_data, member.size
                )
    return found


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
            stream = cast(BinaryIO, tar.fileobj)  # unpacked, whatever the compression
            for location in locations:
                stream.seek(location.offset)
                data = stream.read(location.size)
                if len(data) != location.size:
                    raise EOFError(f"it ends inside {location.member}")
                yield data


def _safe_name(path: Path, name: str) -> str:
    """The name with forward slashes and without a leading `./`."""
    parts = name.replace("\\", "/").split("/")
    if ".." in parts or parts[0] == "" or parts[0].endswith(":"):
        raise ShardError(f"{path}: its member {name!r} leads out of the archive; do not trust it")
    return "/".join(part for part in parts if part not in ("", "."))


def _refuse(error: OSError) -> None:
    """Raises what `os.walk` would pass over in silence."""
    raise error


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


@contextlib.contextmanager
def _damage_named(path: str) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        reason = first_line(error)
        raise ShardError(
            f"{path}: cannot be read ({reason}); it is damaged or closed to this user"
        ) from error
