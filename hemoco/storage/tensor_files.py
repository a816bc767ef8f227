"""Tensors and plain values from the bytes of files, ours and others'. Code is never run: files with it are refused."""

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

_TORCH = (
    b"PK\x03\x04",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
)  # a zip since torch 1.6; before, a number
_HEADER_LIMIT = 100_000_000  # bytes; that of the safetensors package
_FIRST_BYTES = 64 * 1024  # in one request the whole header of most networks
_NUMBERS = ("f2", "f4", "f8", "i8")


class SafetensorsFile(NamedTuple):
    """What a safetensors file holds."""

    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def parse_safetensors(url: str, data: bytes) -> SafetensorsFile:
    """The content of a safetensors file.

    Raises:
        CheckpointError: it is none, or damaged.
    """
    try:
        tensors = safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{url}: is not a whole safetensors file ({error})") from error
    # from bytes, the package reads tensors only: the header is JSON after its length in 8 bytes
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return SafetensorsFile(header.get("__metadata__", {}), tensors)


def read_safetensors_metadata(url: str) -> dict[str, str]:
    """The metadata of a safetensors file, from its header alone: some 40 KB of a ResNet-50's 94 MB.

    The size of the file is compared with the header, so that one that was cut is found before its tensors are needed.

    Raises:
        CheckpointError: it is none, or was cut.
        StorageError: it is missing, or the storage refuses or does not answer.
    """
    with storage_errors(url):
        files, path = filesystem(url)
        size = files.size(path)
        if size is None:  # web servers need not name it
            return parse_safetensors(url, read_bytes(url)).metadata
        if size <= 8:  # nothing but a length; of an empty object no range can be asked for
            raise CheckpointError(f"{url}: is not a whole safetensors file (it has no header)")
        head = _read_range(files, path, 0, min(size, _FIRST_BYTES))
        length = int.from_bytes(head[:8], "little")
        # another kind of file has any number here, and need not be read to the end that this would mean
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
    return (
        data if len(data) <= stop - start else data[start:stop]
    )  # a web server without ranges sends all


def parse_file(url: str, data: bytes) -> dict[str, Any]:
    """What a safetensors file, a file of torch.save or detectron2's pickle of arrays holds.

    Args:
        url: of the file, for messages.
        data: its bytes.

    Returns:
        Tensors on the CPU and plain values, nested as in the file; of safetensors `state_dict` and the metadata.

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
    except Exception as error:  # damaged or hostile bytes can raise anything
        raise CheckpointError(f"{url}: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{url}: holds a {type(content).__name__}, not a dictionary with a state dict"
        )
    return content


def _reason(error: Exception) -> str:
    if found := re.search(r"GLOBAL (\w+(?:\.\w+)*)", str(error)):
        return (
            f"holds Python objects ({found[1]}), which can run code and were not loaded; if you trust the file, keep "
            "its tensors alone: torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)"
        )
    return (
        "is no whole file of safetensors, of torch.save or of detectron2's arrays; fetch it again"
    )


class _Dtype:
    """Stands for numpy.dtype."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code
        self.order: Literal["<", ">", "="] = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


class _Array:
    """Stands for numpy.ndarray, so that NumPy never takes over a state from a file."""

    tensor: Tensor

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.tensor = _tensor(data, dtype, shape, "F" if fortran else "C")


class _ArrayUnpickler(pickle.Unpickler):
    """Knows what NumPy's arrays are made of; the name of anything else ends the reading."""

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for what a pickle names."""
        full = f"{module}.{name}".replace("numpy.core.", "numpy._core.")  # NumPy before 2
        if full not in _STAND_INS:
            raise pickle.UnpicklingError(f"GLOBAL {full}")
        return _STAND_INS[full]


def _tensor(data: bytes, dtype: _Dtype, shape: tuple[int, ...], order: Any) -> Tensor:
    if dtype.code not in _NUMBERS:
        raise pickle.UnpicklingError(f"an array of {dtype.code}")
    array = np.frombuffer(data, np.dtype(dtype.code).newbyteorder(dtype.order)).reshape(
        shape, order=order
    )
    return torch.from_numpy(array.astype(dtype.code, order="C"))


def _new_array(*_: object) -> _Array:
    return _Array()


def _latin1(text: str, _: str) -> bytes:
    return text.encode("latin1")


def _plain(value: Any) -> Any:
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
