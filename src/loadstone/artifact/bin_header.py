"""What a PyTorch ``.bin`` shard holds, read without torch and without running anything it names.

A ``.bin`` is a zip whose ``data.pkl`` rebuilds tensors over raw storages. The unpickler below resolves every global
to an inert record, so that the pickle can be followed for names, dtypes and shapes and can call nothing.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadstone.artifact.headers import MAX_HEADER_BYTES, TensorInfo
from loadstone.errors import ArtifactError

_STORAGE_DTYPES = {
    "DoubleStorage": ("F64", 8), "FloatStorage": ("F32", 4), "HalfStorage": ("F16", 2), "BFloat16Storage": ("BF16", 2),
    "LongStorage": ("I64", 8), "IntStorage": ("I32", 4), "ShortStorage": ("I16", 2), "CharStorage": ("I8", 1),
    "ByteStorage": ("U8", 1), "BoolStorage": ("BOOL", 1),
}  # fmt: skip


@dataclass(frozen=True)
class BinContents:
    """``tensors``: plain tensors by name. ``subclasses``: name -> tensor subclass. ``globals``: all names it calls."""

    file: str
    tensors: dict[str, TensorInfo]
    subclasses: dict[str, str]
    globals: frozenset[str]


def read_bin(path: Path) -> BinContents:
    """Names, dtypes and shapes in one ``.bin``; raises `ArtifactError` when it is no state dict in zip form."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {e.filename: e for e in archive.infolist()}
            pickles = [n for n in entries if n.endswith("/data.pkl") or n == "data.pkl"]
            if len(pickles) != 1 or entries[pickles[0]].file_size > MAX_HEADER_BYTES:
                raise ArtifactError(f"{path.name}: not a PyTorch state dict", "Save it with torch.save(state_dict)")
            unpickler = _InertUnpickler(io.BytesIO(archive.read(pickles[0])))
    except zipfile.BadZipFile:
        raise ArtifactError(
            f"{path.name}: truncated, or in PyTorch's format from before 1.6", "Copy it again, or save it anew"
        ) from None
    except OSError as error:
        raise ArtifactError(f"{path.name}: cannot be read ({error.strerror})", "Check the file") from None
    try:
        state = unpickler.load()
    except Exception:
        raise ArtifactError(f"{path.name}: its pickle is malformed", "Copy it again, or save it anew") from None
    while isinstance(state, dict) and not _has_tensors(state) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise ArtifactError(f"{path.name}: holds no state dict", "Save it with torch.save(model.state_dict())")
    tensors: dict[str, TensorInfo] = {}
    subclasses: dict[str, str] = {}
    for name, value in state.items():
        if isinstance(value, _Tensor):
            nbytes = value.itemsize
            for size in value.shape:
                nbytes *= size
            tensors[str(name)] = TensorInfo(str(name), value.dtype, value.shape, path.name, 0, nbytes)
        elif isinstance(value, _Inert):
            subclasses[str(name)] = value.subclass()
    return BinContents(path.name, tensors, subclasses, frozenset(unpickler.seen))


def _has_tensors(state: dict[Any, Any]) -> bool:
    return any(isinstance(v, (_Tensor, _Inert)) for v in state.values())


@dataclass(frozen=True)
class _Tensor:
    dtype: str
    itemsize: int
    shape: tuple[int, ...]


class _Inert:
    """Stands for any global of the pickle: remembers how it was called, and does nothing."""

    path = ""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        pass

    def subclass(self) -> str:
        """The tensor subclass this rebuilds: the first class named ``…Tensor`` among the arguments."""
        queue: list[Any] = [self.__class__, *self.args]
        while queue:
            item = queue.pop(0)
            if isinstance(item, type) and issubclass(item, _Inert) and item.path.endswith("Tensor"):
                return item.path.rpartition(".")[2]
            if isinstance(item, (tuple, list)):
                queue.extend(item)
        return self.path


def _rebuild_tensor(storage: Any, offset: int, size: Any, *rest: Any) -> Any:
    if isinstance(storage, tuple) and len(storage) == 2:
        return _Tensor(storage[0], storage[1], tuple(int(n) for n in size))
    return _Inert(storage)


def _rebuild_parameter(data: Any, *rest: Any) -> Any:
    return data


class _InertUnpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.seen: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        self.seen.add(path)
        if path == "collections.OrderedDict":
            return OrderedDict
        if path in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"):
            return _rebuild_tensor
        if path in ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"):
            return _rebuild_parameter
        return type(name, (_Inert,), {"path": path})

    def persistent_load(self, pid: Any) -> Any:
        kind = getattr(pid[1], "path", "").rpartition(".")[2] if isinstance(pid, tuple) and len(pid) > 1 else ""
        return _STORAGE_DTYPES.get(kind, ("U8", 1))
