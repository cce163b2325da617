"""What a PyTorch ``.bin`` shard holds, read without torch and without running anything it names.

A ``.bin`` is a zip whose ``data.pkl`` rebuilds tensors over raw storages, each an entry ``data/<key>`` of the
zip.
"""

from __future__ import annotations

import re
import struct
import zipfile
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from loadstone.artifact.files import Sink, file_size, open_regular, refuse
from loadstone.artifact.formats.inert_pickle import Global, MalformedPickle, Node, read_pickle
from loadstone.artifact.formats.safetensors import DTYPE_BITS, TensorInfo
from loadstone.artifact.hints import LFS_REMEDY, is_lfs_pointer
from loadstone.artifact.torchao.checks import (
    SUBCLASSES,
    FlatTensor,
    check_complete,
    check_shapes,
    part_name,
    unknown_class_hint,
)
from loadstone.errors import ArtifactError

if TYPE_CHECKING:
    import torch

MAX_PICKLE_BYTES = 32_000_000
MAX_DIRECTORY_BYTES = 16_000_000
# A tensor subclass has a handful of attributes; more is a pickle made to be slow.
_MAX_ATTRIBUTES = 64

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "UntypedStorage": "U8", "ComplexFloatStorage": "C64",
}  # fmt: skip
# torch's names of dtypes, in the spelling of safetensors.
TORCH_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "int16": "I16", "uint16": "U16", "int32": "I32",
    "uint32": "U32", "int64": "I64", "uint64": "U64", "float16": "F16", "bfloat16": "BF16", "float32": "F32",
    "float64": "F64", "complex64": "C64", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0",
    "float4_e2m1fn_x2": "F4", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # fmt: skip
# What a state dict has reason to name. torch's own weights_only reader is narrower still.
_ALLOWED = re.compile(
    r"collections\.OrderedDict|_codecs\.encode|builtins\.(set|frozenset|bytearray|complex|dict|list|tuple)"
    r"|torch\.(Size|device|Tensor|strided|storage\.(Typed|Untyped)Storage|[A-Za-z0-9]+Storage|[a-z]+\d+\w*|bool)"
    r"|torch\.(_utils\._rebuild_\w+|_tensor\._rebuild_from_type_v2|serialization\._get_layout)"
    r"|torch\.nn\.parameter\.(Parameter|Buffer)|torch\.distributed\.\w[\w.]*|torchao\.\w[\w.]*|_?io\.BytesIO"
    r"|pathlib\.(Posix|Windows|PurePosix|PureWindows)?Path|torch\.(contiguous_format|preserve_format)"
)


@dataclass(frozen=True)
class BinContents:
    """``tensors``: plain tensors by name. ``subclasses``: name -> tensor subclass. ``globals``: all names it
    calls.

    ``quantized`` describes the torchao subclasses as their safetensors form would. ``shared`` lists groups of
    names that are one tensor (tied weights).
    """

    file: str
    tensors: dict[str, TensorInfo] = field(repr=False)
    subclasses: dict[str, str] = field(repr=False)
    globals: frozenset[str] = field(repr=False)
    quantized: dict[str, FlatTensor] = field(repr=False, default_factory=dict)
    shared: tuple[tuple[str, ...], ...] = ()


def read_bin(path: Path, sink: Sink = refuse) -> BinContents:
    """Names, dtypes and shapes in one ``.bin``.

    Raises `ArtifactError` when it is not a state dict in zip form.
    """
    data, storages = _read_archive(path)
    try:
        state, names = read_pickle(data)
    except MalformedPickle as error:
        raise ArtifactError(
            f"{path.name}: its pickle is malformed ({error})", "Copy it again, or save it anew"
        ) from None
    check_names(path.name, names)
    for _ in range(8):
        inner = state.pairs().get("state_dict") if isinstance(state, Node) else None
        if not isinstance(inner, Node):
            break
        state = inner
    if not isinstance(state, Node) or state.path not in ("dict", "collections.OrderedDict"):
        raise ArtifactError(
            f"{path.name}: holds no state dict", "Save it with torch.save(model.state_dict())"
        )
    return _Reader(path.name, storages, sink).read(state.pairs(), names)


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """The state dict of one ``.bin``, memory-mapped; raises `ArtifactError` when it holds more than tensors."""
    import torch

    # Importing torchao registers its tensor classes as safe globals; nothing else is allowed in.
    import torchao.prototype.mx_formats
    import torchao.quantization  # noqa: F401

    state = load_values(path)
    while isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise ArtifactError(
                f"{path.name}: '{name}' is a {type(tensor).__name__}, not a tensor", "Save weights only"
            )
    return state


def load_values(path: Path) -> Any:
    """The contents of a file written by `torch.save`, tensors memory-mapped.

    Raises `ArtifactError` when it holds anything but tensors and plain values.
    """
    import torch

    # torch maps the file itself.
    file_size(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"{path.name}: cannot be read with weights_only=True ({reason})",
            f"loadstone runs no pickled code: save it as safetensors where it was made. {unknown_class_hint(reason)}",
        ) from None


def check_names(file: str, names: frozenset[str]) -> None:
    """Raises `ArtifactError` for a pickle that names anything but tensors and their parts."""
    foreign = sorted(n for n in names if not _ALLOWED.fullmatch(n))
    if foreign:
        raise ArtifactError(
            f"{file}: its pickle would call {ascii(foreign[0])[1:-1][:200]}, which no state dict needs",
            "A pickle can run any code: do not trust this file. Ask for safetensors",
        )


def _read_archive(path: Path) -> tuple[bytes, dict[str, int]]:
    """``data.pkl`` and the size in bytes of each storage."""
    try:
        with open_regular(path) as file:
            if is_lfs_pointer(file.read(32)):
                raise ArtifactError(f"{path.name}: a git-LFS pointer, not the file", LFS_REMEDY)
            _check_directory(path.name, file)
            with zipfile.ZipFile(file) as archive:
                entries = {e.filename: e for e in archive.infolist()}
                # Of two entries of a name readers take different ones; torch maps storages as they lie in the file.
                if len(entries) < len(archive.infolist()) or any(
                    e.compress_type != zipfile.ZIP_STORED for n, e in entries.items() if "/data/" in n
                ):
                    raise ArtifactError(
                        f"{path.name}: holds compressed or repeated entries, which torch.save writes never",
                        "Save it anew",
                    )
                pickles = [n for n in entries if n.endswith("/data.pkl") or n == "data.pkl"]
                if len(pickles) != 1:
                    raise ArtifactError(
                        f"{path.name}: not a PyTorch state dict", "Save it with torch.save(state_dict)"
                    )
                if entries[pickles[0]].file_size > MAX_PICKLE_BYTES:
                    raise ArtifactError(
                        f"{path.name}: its pickle claims {entries[pickles[0]].file_size} bytes, over "
                        f"the limit of {MAX_PICKLE_BYTES}",
                        "Save the weights as safetensors",
                    )
                prefix = pickles[0].removesuffix("data.pkl") + "data/"
                storages = {n[len(prefix) :]: e.file_size for n, e in entries.items() if n.startswith(prefix)}
                return archive.read(pickles[0]), storages
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error):
        raise ArtifactError(
            f"{path.name}: truncated, or in PyTorch's format from before 1.6",
            "Copy it again, or save it anew",
        ) from None
    except OSError as error:
        raise ArtifactError(f"{path.name}: cannot be read ({error.strerror})", "Check the file") from None
    except Exception as error:  # zlib.error and the like, when a deflated entry is damaged
        if isinstance(error, ArtifactError):
            raise
        raise ArtifactError(f"{path.name}: damaged ({error})", "Copy it again") from None


def _check_directory(name: str, file: BinaryIO) -> None:
    """Bound the zip's directory, which zipfile reads whole, by what its end record claims."""
    # zipfile's own reader: a zip64 record hidden from another one would let any size through.
    record = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if record is None:
        raise zipfile.BadZipFile
    length = record[zipfile._ECD_SIZE]  # type: ignore[attr-defined]
    if length > MAX_DIRECTORY_BYTES:
        raise ArtifactError(
            f"{name}: its zip directory claims {length} bytes",
            "This is not a model, or it was made to do harm",
        )
    file.seek(0)


@dataclass(frozen=True, slots=True)
class _Tensor:
    dtype: str
    shape: tuple[int, ...]
    storage: str
    offset: int


class _Reader:
    """Turns the nodes of one state dict into facts about tensors."""

    def __init__(self, file: str, storages: dict[str, int], sink: Sink) -> None:
        self.file, self.storages, self.sink = file, storages, sink

    def read(self, state: dict[str, Any], names: frozenset[str]) -> BinContents:
        tensors: dict[str, TensorInfo] = {}
        subclasses: dict[str, str] = {}
        quantized: dict[str, FlatTensor] = {}
        places: dict[tuple[Any, ...], list[str]] = {}
        for name, value in state.items():
            try:
                if not name.isprintable():
                    raise ArtifactError(
                        f"{self.file}: the tensor name {ascii(name)[:200]} holds unprintable characters",
                        "Do not trust this file",
                    )
                value = self.unwrap(value)
                if isinstance(value, _Tensor):
                    tensors[name] = self.info(name, value)
                    places.setdefault((value.storage, value.offset, value.shape), []).append(name)
                elif isinstance(value, Node) and value.path == "torch._tensor._rebuild_from_type_v2":
                    subclasses[name], flat = self.subclass(name, value)
                    if flat is not None:
                        quantized[name] = flat
                elif isinstance(value, Node) and "_rebuild" in value.path:
                    subclasses[name] = value.path
            except ArtifactError as error:
                self.sink(error)
        shared = tuple(tuple(group) for group in places.values() if len(group) > 1)
        return BinContents(self.file, tensors, subclasses, names, quantized, shared)

    def unwrap(self, value: Any) -> Any:
        """A tensor out of ``Parameter(tensor)`` and ``rebuild(storage, …)``; anything else as it is."""
        for _ in range(8):
            if not isinstance(value, Node):
                break
            if value.path.startswith("torch._utils._rebuild_parameter") and _is_tuple(value.args, 1):
                value = value.args[0]
            elif value.path in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
                return self.tensor(value)
            else:
                break
        return value

    def tensor(self, node: Node) -> _Tensor:
        problem = ArtifactError(
            f"{self.file}: a tensor in its pickle is malformed", "Copy it again, or save it anew"
        )
        if (
            not _is_tuple(node.args, 4)
            or not isinstance(node.args[0], Node)
            or not _is_tuple(node.args[0].args, 5)
        ):
            raise problem
        storage, offset, size, stride = node.args[:4]
        kind, key = storage.args[1], storage.args[2]
        dtype = _STORAGES.get(kind.path.rpartition(".")[2]) if isinstance(kind, Global) else None
        if node.path.endswith("_v3") and len(node.args) > 6:
            dtype = _dtype_name(node.args[6])
        shape = _ints(size.args[0] if isinstance(size, Node) and _is_tuple(size.args, 1) else size)
        steps = _ints(stride)
        if dtype is None or shape is None or steps is None or len(steps) != len(shape):
            raise problem
        if not isinstance(key, str) or type(offset) is not int or offset < 0:
            raise problem
        extent = 1 + sum((n - 1) * s for n, s in zip(shape, steps, strict=True)) if prod(shape) else 0
        needed = ((offset + extent) * DTYPE_BITS[dtype] + 7) // 8
        if self.storages.get(key, -1) < needed:
            raise ArtifactError(
                f"{self.file}: truncated, storage {ascii(key)[:40]} has {self.storages.get(key, 0)} bytes "
                f"and a tensor of shape {list(shape)} in it needs {needed}",
                "Copy the file again",
            )
        return _Tensor(dtype, shape, key, offset)

    def info(self, name: str, value: _Tensor) -> TensorInfo:
        nbytes = (prod(value.shape) * DTYPE_BITS[value.dtype] + 7) // 8
        return TensorInfo(name, value.dtype, value.shape, self.file, 0, nbytes)

    def subclass(self, name: str, node: Node) -> tuple[str, FlatTensor | None]:
        """Class name of a tensor subclass, and its parts when it is a torchao wrapper."""
        if not _is_tuple(node.args, 4) or not isinstance(node.args[1], Global):
            return node.path, None
        path, arguments, state = node.args[1].path, node.args[2], node.args[3]
        kind = path.rpartition(".")[2]
        if not path.startswith("torchao.") or not isinstance(state, Node):
            return kind, None
        if len(state.items) > _MAX_ATTRIBUTES:
            raise ArtifactError(
                f"{self.file}: '{name}' claims {len(state.items)} attributes", "Do not trust this file"
            )
        parts: dict[str, TensorInfo] = {}
        attributes: dict[str, Any] = {}
        for key, value in state.pairs().items():
            value = self.unwrap(value)
            if isinstance(value, _Tensor):
                parts[key] = self.info(part_name(name, key), value)
            else:
                attributes[key] = _json_form(value, _Budget())
        if _is_tuple(arguments, 3) and _dtype_name(arguments[1]):
            attributes.setdefault("dtype", _json_form(arguments[1], _Budget()))
            attributes.setdefault("shape", _json_form(arguments[2], _Budget()))
        flat = FlatTensor(name, kind, attributes, parts)
        if kind in SUBCLASSES:
            # A pickled tensor also has what safetensors leaves out, so only what is needed is looked for.
            check_complete(flat)
            check_shapes(flat)
        return kind, flat


class _Budget:
    """Bounds the expansion of values that a pickle shares many times over, or nests deeper than Python recurses."""

    left = 250


def _json_form(value: Any, budget: _Budget) -> Any:
    """A tensor attribute in the form torchao writes to safetensors metadata."""
    budget.left -= 1
    if budget.left < 0:
        return None
    if isinstance(value, Global):
        dtype = value.path.removeprefix("torch.")
        return {"_type": "torch.dtype", "_data": dtype} if value.path.startswith("torch.") else value.path
    if isinstance(value, (tuple, list)):
        return [_json_form(item, budget) for item in value[:100]]
    if isinstance(value, Node):
        kind = value.path.rpartition(".")[2]
        if isinstance(value.state, Node) and len(value.state.items) <= _MAX_ATTRIBUTES:
            return {
                "_type": kind,
                "_data": {k: _json_form(v, budget) for k, v in value.state.pairs().items()},
            }
        if _is_tuple(value.args, 1):
            return {"_type": kind, "_data": _json_form(value.args[0], budget)}
        return {"_type": kind, "_data": {}}
    return value if isinstance(value, (str, int, float, bool)) or value is None else str(value)


def _dtype_name(value: Any) -> str | None:
    return TORCH_DTYPES.get(value.path.removeprefix("torch.")) if isinstance(value, Global) else None


def _is_tuple(value: Any, at_least: int) -> bool:
    return isinstance(value, tuple) and len(value) >= at_least


def _ints(value: Any) -> tuple[int, ...] | None:
    good = (
        isinstance(value, tuple)
        and len(value) <= 64
        and all(type(n) is int and 0 <= n < 2**63 for n in value)
    )
    return value if good else None
