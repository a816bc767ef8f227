"""Search for a secret in files and output, in plain text and in the encodings of URLs and JSON.

leaks = places_with(secret, ray_session_folder, stdout, database)
assert leaks == []
"""

import base64
import gzip
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, quote_plus


def places_with(canary: str, *places: Path | str | bytes) -> list[str]:
    """Returns where a secret occurs: the file, the encoding, and the text before it.

    Args:
        canary: the secret, at least 12 characters, so that it does not occur by chance.
        places: folders (all files below them, also inside zip archives), files and texts.

    Raises:
        ValueError: the secret is too short or a folder has no file, so a search proves nothing.
    """
    if len(canary) < 12:
        raise ValueError(
            f"a secret of {len(canary)} characters stands anywhere by chance: use 12 or more"
        )
    forms = _forms(canary)
    found = []
    for place in places:
        for name, data in _contents(place):
            for form, pattern in forms.items():
                if (at := data.find(pattern)) >= 0:
                    around = data[max(0, at - 120) : at].decode(errors="replace")
                    found.append(f"{name} ({form}), after {around!r}")
    return found


def _forms(canary: str) -> dict[str, bytes]:
    """Returns the patterns to search for, by the name of the encoding."""
    data = canary.encode()
    forms = {
        "plain": data,
        "quoted": quote(canary, safe="").encode(),
        "quoted as a path": quote(canary).encode(),
        "quoted as a form": quote_plus(canary).encode(),
        "JSON": json.dumps(canary)[1:-1].encode(),
        "hex": data.hex().encode(),
        "UTF-16": canary.encode("utf-16-le"),
    }
    for shift in range(3):  # in a longer text it begins at any of base64's three offsets
        for kind, encode in (
            ("base64", base64.b64encode),
            ("base64 for URLs", base64.urlsafe_b64encode),
        ):
            whole = encode(b"\0" * shift + data)
            # the first and last letters also depend on the bytes beside it
            forms[f"{kind}, shifted by {shift}"] = whole[
                -(-shift * 8 // 6) : len(whole) - 4 or None
            ]
    return {name: pattern for name, pattern in forms.items() if name == "plain" or pattern != data}


def _contents(place: Path | str | bytes) -> Iterator[tuple[str, bytes]]:
    if isinstance(place, Path):
        files = (
            [file for file in sorted(place.rglob("*")) if file.is_file()]
            if place.is_dir()
            else [place]
        )
        if not files:
            raise ValueError(f"{place}: there is no file in it")
        for file in files:
            data = file.read_bytes()
            yield str(file), data
            yield from _unpacked(file, data)
    else:
        yield "text", place.encode() if isinstance(place, str) else place


def _unpacked(file: Path, data: bytes) -> Iterator[tuple[str, bytes]]:
    if data.startswith(b"PK\x03\x04") and zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                yield f"{file}:{name}", archive.read(name)
    elif data.startswith(b"\x1f\x8b"):
        yield f"{file}, unpacked", gzip.decompress(data)
