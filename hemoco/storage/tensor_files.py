"""Tensors and plain values from files: safetensors, torch.save and detectron2's pickles.

Pickles can contain code. It is never run: files with anything but tensors and plain values are
refused.
"""

import io
import json
import pickle
import re
from typing import Any, Literal, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from fsspec import AbstractFileSystem
from torch import Tensor

from hemoco.errors import CheckpointError
from hemoco.storage.objects import filesystem, read_bytes, storage_errors

# what files of torch.save begin with: a zip archive since torch 1.6, a magic number before
_TORCH = (b"PK\x03\x04", b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.")
_HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors package
_FIRST_BYTES = 64 * 1024  # enough for the whole header of most networks in one request
_NUMBERS = ("f2", "f4", "f8", "i8")


class SafetensorsFile(NamedTuple):
    """Content of a safetensors file."""

    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def parse_safetensors(url: str, data: bytes) -> SafetensorsFile:
    """Reads a safetensors file.

    Args:
        url: URL of the file, for messages.
        data: its bytes.

    Raises:
        CheckpointError: the bytes are not a safetensors file, or damaged.
    """
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{url}: is not a whole safetensors file ({error})") from error
    # From bytes, the package loads tensors only. The header is JSON, after its length in 8 bytes.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return SafetensorsFile(header.get("__metadata__", {}), tensors)


def read_safetensors_metadata(url: str) -> dict[str, str]:
    """Reads the metadata of a safetensors file from its header: some 40 KB of a ResNet-50's 94 MB.

    The size of the file is compared with the header, which finds a cut file before its tensors are
    needed.

    Raises:
        CheckpointError: the file is not a safetensors file, or was cut.
        StorageError: it is missing, or the storage refuses or does not answer.
    """
    with storage_errors(url):
        files, path = filesystem(url)
        size = files.size(path)
        if size is None:  # some web servers do not report it
            return parse_safetensors(url, read_bytes(url)).metadata
        if size <= 8:  # nothing but a length, or empty: a range of an empty object is an error
            raise CheckpointError(f"{url}: is not a whole safetensors file (it has no header)")
        head = _read_range(files, path, 0, min(size, _FIRST_BYTES))
        length = int.from_bytes(head[:8], "little")
        # Other kinds of files have an arbitrary number here: up to that many bytes would be read.
        if head[8:9] != b"{" or 8 + length > min(size, _HEADER_LIMIT):
            raise CheckpointError(f"{url}: is not a whole safetensors file (it has no header)")
        if 8 + length > len(head):
            head += _read_range(files, path, len(head), 8 + length)
    try:
        header = json.loads(head[8 : 8 + length])
        metadata = header.pop("__metadata__", {})
        end = max((tensor["data_offsets"][1] for tensor in header.values()), default=0)
        wanted = 8 + length + int(end)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{url}: is not a whole safetensors file (its header cannot be read)"
        ) from error
    if size != wanted:
        raise CheckpointError(
            f"{url}: is not a whole safetensors file ({size} bytes, its header wants {wanted})"
        )
    return dict(metadata)


def _read_range(files: AbstractFileSystem, path: str, start: int, stop: int) -> bytes:
    data = bytes(files.cat_file(path, start=start, end=stop))
    # a web server without ranges sends the whole file
    return data if len(data) <= stop - start else data[start:stop]


def parse_file(url: str, data: bytes) -> dict[str, Any]:
    """Reads a safetensors file, a file of torch.save, or detectron2's pickle of arrays.

    Args:
        url: URL of the file, for messages.
        data: its bytes.

    Returns:
        Tensors on the CPU and plain values, nested as in the file. For safetensors: the metadata,
        and the tensors as `state_dict`.

    Raises:
        CheckpointError: the file is damaged, of another kind, or holds Python objects.
    """
    if data[8:9] == b"{":
        metadata, tensors = parse_safetensors(url, data)
        return {**metadata, "state_dict": tensors}
    try:
        if data.startswith(_TORCH):
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        else:
            content = _plain(_ArrayUnpickler(io.BytesIO(data)).load())
    except Exception as error:  # damaged or malicious bytes can raise anything
        raise CheckpointError(f"{url}: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{url}: holds a {type(content).__name__}, not a dictionary with a state dict"
        )
    return content


def _reason(error: Exception) -> str:
    # torch and _ArrayUnpickler name the first object that they refuse
    refused = re.search(r"GLOBAL (\w+(?:\.\w+)*)", str(error))
    if refused is None:
        return (
            "is not a whole file of safetensors, of torch.save or of detectron2's arrays; "
            "fetch it again"
        )
    return (
        f"holds Python objects ({refused[1]}), which can run code and were not loaded; if you "
        "trust the file, keep its tensors alone: "
        "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)"
    )


class _Dtype:
    """Stand-in for numpy.dtype."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code
        self.order: Literal["<", ">", "="] = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class _Array:
    """Stand-in for numpy.ndarray, which must not restore a state from an untrusted file."""

    tensor: Tensor

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.tensor = _tensor(data, dtype, shape, "F" if fortran else "C")


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles NumPy arrays by stand-ins; any other name in the pickle is an error."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name in the pickle."""
        full_name = f"{module}.{name}".replace("numpy.core.", "numpy._core.")  # NumPy before 2
        if full_name not in _STAND_INS:
            raise pickle.UnpicklingError(f"GLOBAL {full_name}")
        return _STAND_INS[full_name]


def _tensor(data: bytes, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> Tensor:
    if dtype.code not in _NUMBERS:
        raise pickle.UnpicklingError(f"an array of {dtype.code}")
    array = np.frombuffer(data, np.dtype(dtype.code).newbyteorder(dtype.order))
    array = array.reshape(shape, order=order)
    return torch.from_numpy(array.astype(dtype.code, order="C"))


def _new_array(*_: object) -> _Array:
    return _Array()


def _latin1(text: str, _: str) -> bytes:
    """Stand-in for `_codecs.encode`, with which protocol 2 stores bytes as Latin-1 text."""
    return text.encode("latin1")


def _plain(value: Any) -> Any:
    """A nested value with tensors in place of stand-ins."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return value.tensor if isinstance(value, _Array) else value


_STAND_INS: dict[str, Any] = {
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "numpy._core.multiarray._reconstruct": _new_array,
    "numpy._core.numeric._frombuffer": _tensor,
    "_codecs.encode": _latin1,
    "collections.OrderedDict": dict,
}
