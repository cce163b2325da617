"""Where the tensors of a model are stored: one class for each storage format, all with the same attributes.

``files``: the files with the tensors' bytes. ``tensors``: every stored tensor by name, the parts of quantized ones
among them (``m._weight_qdata``). ``quantized``: torchao's tensors by name. ``metadata``: a safetensors header's.
``shared``: groups of names for one tensor. ``foreign``: an error for each tensor of a class that cannot be loaded.
``content``: what the files hold, for messages.
``streamable``: whether `opened` costs nothing until a tensor is used. ``mappable``: whether accelerate can map the
files. ``repeats_ties``: whether tied parameters are stored under each of their names.

``read(info, start, stop)``: elements ``start`` to ``stop`` of the flattened tensor, or (``stop`` None) the whole tensor
in its shape, on the CPU in its stored dtype, from any thread; ``pinned``: in page-locked memory where that is possible.
``tile(info)``: elements that it makes at once even where fewer are asked for, counted from the tensor's first.
``opened()``: a context manager that keeps the files open and gives an `Opened`. ``describe(name)``: a quantized tensor
with its complete description, for which a ``.bin`` has to be read. ``check_values(limits)``: raise `ArtifactError` for
the first value in the files that no model holds (NaN, infinity), unless ``opened`` finds those itself.

To add a format, add a class here and its file names to `formats.weights.find_weights`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from loadstone.artifact.files import Sink, following_links, links_followed, open_regular
from loadstone.artifact.formats.safetensors import TensorInfo, open_tensors
from loadstone.artifact.formats.weights import FSDP_BIN, TensorTable, WeightFiles, check_index, read_tensors
from loadstone.artifact.torchao.checks import SUBCLASSES, FlatTensor, unknown_class_hint
from loadstone.artifact.torchao.tensors import flat_tensors
from loadstone.errors import ArtifactError

if TYPE_CHECKING:
    import torch

    from loadstone.artifact.formats.bin import BinContents
    from loadstone.artifact.formats.dcp import DcpContents
    from loadstone.artifact.packed import Packed
    from loadstone.artifact.values import Limits

# Bytes that one thread reads of a large tensor, and the most threads.
_RANGE = 1 << 24
_READERS = 4

# What `opened` gives: every stored tensor by name, read at ``value[...]``, and the quantized tensors.
Opened = tuple[dict[str, Any], dict[str, FlatTensor]]


def open_source(directory: Path, weights: WeightFiles, sink: Sink) -> Source:
    """The source for weight files, from their headers. Problems go to ``sink``."""
    # The readers of zip files and pickles are imported when needed: they cost `inspect` a tenth of its time.
    if weights.format == "bin":
        return _bin_source(directory, weights, sink)
    if weights.format == "dcp":
        return _dcp_source(directory, weights, sink)
    table = read_tensors(directory, weights, sink)
    try:
        quantized = flat_tensors(table.metadata, table.tensors, sink)
    except ArtifactError as error:
        sink(error)
        quantized = {}
    return SafetensorsSource(directory, weights.files, table, quantized)


@contextmanager
def values_checked(
    source: Source,
    packed: Iterable[Packed] = (),
    infinite: Iterable[str] = (),
    share: tuple[int, int] = (0, 1),
) -> Iterator[None]:
    """Check a source's values on another core during the block, which reads the same bytes.

    ``infinite``: tensors that may hold any value. ``share``: (rank, ranks) that divide the tensors of safetensors files
    among them. Raises `ArtifactError` at the end of the block, as `check_values` does.
    """
    from loadstone.artifact.values import Limit, limits_of, packed_limits

    limits = limits_of(source.quantized.values()) | packed_limits(packed)
    limits |= dict.fromkeys(infinite, Limit("uint8", 0, 255))
    if isinstance(source, SafetensorsSource) and share[1] > 1:
        tensors = sorted(source.tensors.values(), key=lambda tensor: tensor.nbytes)[share[0] :: share[1]]
        source = replace(source, table=replace(source.table, tensors={t.name: t for t in tensors}))
    with ThreadPoolExecutor(1) as pool:
        scan = pool.submit(source.check_values, limits)
        yield
        scan.result()


@dataclass(frozen=True)
class SafetensorsSource:
    """Safetensors shards: byte ranges of the files."""

    directory: Path
    files: tuple[str, ...] = ()
    table: TensorTable = field(repr=False, default_factory=lambda: TensorTable({}, {}))
    quantized: dict[str, FlatTensor] = field(repr=False, default_factory=dict)
    shared: tuple[tuple[str, ...], ...] = ()
    foreign: tuple[ArtifactError, ...] = ()
    content: ClassVar[str] = "holds plain tensors"
    streamable: ClassVar[bool] = True
    mappable: ClassVar[bool] = True
    repeats_ties: ClassVar[bool] = False

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return self.table.tensors

    @property
    def metadata(self) -> dict[str, str]:
        return self.table.metadata

    def tile(self, info: TensorInfo) -> int:
        return 1

    def read(
        self, info: TensorInfo, start: int = 0, stop: int | None = None, *, pinned: bool = False
    ) -> torch.Tensor:
        import torch

        from loadstone.artifact.torchao.flatten import torch_dtype

        dtype = torch_dtype(info.dtype)
        count = (info.numel if stop is None else stop) - start
        values = torch.empty(count, dtype=dtype, pin_memory=pinned)
        if count:
            self._fill(info, start * dtype.itemsize, memoryview(values.view(torch.uint8).numpy()))  # type: ignore[arg-type]
        return values.reshape(info.shape) if stop is None else values

    def _fill(self, info: TensorInfo, offset: int, view: memoryview) -> None:
        """Read the tensor's bytes from ``offset`` on into ``view``."""
        first = info.begin + offset
        starts = range(0, len(view), _RANGE)
        if len(starts) > 1 and (threads := min((os.cpu_count() or 1) // 4, _READERS)) > 1:
            # One thread copies from the page cache at a fraction of what memory and disk can give.
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(lambda at: self._read_range(info, first + at, view[at : at + _RANGE]), starts))
        else:
            self._read_range(info, first, view)

    def _read_range(self, info: TensorInfo, begin: int, view: memoryview) -> None:
        with open_regular(self.directory / info.file, buffering=0) as file:
            file.seek(begin)
            count = 0
            while count < len(view):
                got = file.readinto(view[count:])  # type: ignore[attr-defined]
                if not got:
                    raise ArtifactError(
                        f"{info.file}: truncated inside tensor '{info.name}'", "Copy the file again"
                    )
                count += got

    @contextmanager
    def opened(self) -> Iterator[Opened]:
        slices: dict[str, Any] = {}
        with ExitStack() as stack:
            for file in self.files:
                handle = stack.enter_context(open_tensors(self.directory / file))
                for name in handle.keys():  # noqa: SIM118 (a safe_open handle is not a mapping)
                    slices[name] = handle.get_slice(name)
            for name, info in self.tensors.items():
                now = slices.get(name)
                if now is None or now.get_dtype() != info.dtype or tuple(now.get_shape()) != info.shape:
                    raise ArtifactError(
                        f"{info.file}: changed while it was loaded ('{name}')", "Load it again"
                    )
            yield slices, self.quantized

    def describe(self, name: str) -> FlatTensor:
        return self.quantized[name]

    def check_values(self, limits: Limits) -> None:
        from loadstone.artifact.values import check_values

        check_values(self.directory, self.tensors.values(), limits)


@dataclass(frozen=True)
class BinSource:
    """State dicts in PyTorch's own format, read with ``weights_only=True``; files stay mapped once a tensor is read."""

    directory: Path
    files: tuple[str, ...]
    tensors: dict[str, TensorInfo] = field(repr=False)
    quantized: dict[str, FlatTensor] = field(repr=False)
    shared: tuple[tuple[str, ...], ...]
    foreign: tuple[ArtifactError, ...]
    mappable: bool
    content: ClassVar[str] = "holds plain tensors"
    metadata: dict[str, str] = field(default_factory=dict)
    streamable: ClassVar[bool] = False
    repeats_ties: ClassVar[bool] = True
    _loaded: dict[str, Opened] = field(repr=False, compare=False, default_factory=dict)
    _lock: threading.Lock = field(repr=False, compare=False, default_factory=threading.Lock)

    def tile(self, info: TensorInfo) -> int:
        return 1

    def read(
        self, info: TensorInfo, start: int = 0, stop: int | None = None, *, pinned: bool = False
    ) -> torch.Tensor:
        values: torch.Tensor = self._keep(info.file)[0][info.name].detach().contiguous()
        return values if stop is None else values.reshape(-1)[start:stop]

    @contextmanager
    def opened(self) -> Iterator[Opened]:
        from loadstone.artifact.values import check_tensor, limits_of

        stored: dict[str, Any] = {}
        quantized: dict[str, FlatTensor] = {}
        for file in self.files:
            tensors, flats = self._load(file)
            infos = self.tensors | {
                part.name: part for flat in flats.values() for part in flat.parts.values()
            }
            limits = limits_of(flats.values())
            for name, tensor in tensors.items():
                check_tensor(tensor, infos[name], limits)
            stored |= tensors
            quantized |= flats
        yield stored, quantized

    def describe(self, name: str) -> FlatTensor:
        return self._keep(self.quantized[name].parts["qdata"].file)[1][name]

    def _keep(self, file: str) -> Opened:
        with self._lock:
            if file not in self._loaded:
                # Tensors are read in name order, not file order: mapped files cost no memory, so all stay open.
                self._loaded[file] = self._load(file)
        return self._loaded[file]

    def _load(self, file: str) -> Opened:
        """One file's tensors, memory-mapped; quantized ones as their parts, named as in safetensors."""
        import torch

        from loadstone.artifact.formats.bin import load_state_dict
        from loadstone.artifact.torchao.flatten import flatten

        stored: dict[str, Any] = {}
        quantized: dict[str, FlatTensor] = {}
        for name, tensor in load_state_dict(self.directory / file).items():
            if type(tensor) in (torch.Tensor, torch.nn.Parameter):
                stored[name] = tensor
                continue
            flat, parts = flatten(name, tensor)
            quantized[name] = flat = flat.renamed(file)
            stored |= {flat.parts[key].name: part for key, part in parts.items()}
        return stored, quantized

    def check_values(self, limits: Limits) -> None:
        """Nothing: `opened` checks each tensor."""


@dataclass(frozen=True)
class DcpSource:
    """A torch distributed checkpoint (FSDP, accelerate): tensors put together from the slices of all ranks."""

    directory: Path
    contents: DcpContents
    quantized: dict[str, FlatTensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    shared: tuple[tuple[str, ...], ...] = ()
    foreign: tuple[ArtifactError, ...] = ()
    follow_links: bool = field(default_factory=links_followed)
    content: ClassVar[str] = "describes a torch distributed checkpoint"
    streamable: ClassVar[bool] = False
    mappable: ClassVar[bool] = False
    repeats_ties: ClassVar[bool] = False

    @property
    def files(self) -> tuple[str, ...]:
        return self.contents.files

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return self.contents.tensors

    def tile(self, info: TensorInfo) -> int:
        return info.numel

    def read(
        self, info: TensorInfo, start: int = 0, stop: int | None = None, *, pinned: bool = False
    ) -> torch.Tensor:
        from loadstone.artifact.formats.dcp import load_tensor
        from loadstone.artifact.values import check_tensor

        with following_links(self.follow_links):
            whole = load_tensor(self.directory, info, self.contents.chunks[info.name])
        check_tensor(whole, info)
        return whole if stop is None else whole.reshape(-1)[start:stop]

    @contextmanager
    def opened(self) -> Iterator[Opened]:
        yield {name: _Unread(self, info) for name, info in self.tensors.items()}, {}

    def describe(self, name: str) -> FlatTensor:
        return self.quantized[name]

    def check_values(self, limits: Limits) -> None:
        """Nothing: `read` checks each tensor."""


Source = SafetensorsSource | BinSource | DcpSource


@dataclass(frozen=True)
class _Unread:
    """A tensor before it is read; ``value[...]`` reads it, as a safetensors slice does."""

    source: DcpSource
    info: TensorInfo

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.source.read(self.info)[index]

    def get_shape(self) -> list[int]:
        return list(self.info.shape)


def _bin_source(directory: Path, weights: WeightFiles, sink: Sink) -> BinSource:
    from loadstone.artifact.formats.bin import read_bin

    found: list[BinContents] = []
    stored: dict[str, str] = {}
    for file in weights.files:
        try:
            found.append(read_bin(directory / file, sink))
        except ArtifactError as error:
            sink(error)
            continue
        for name in (*found[-1].tensors, *found[-1].subclasses):
            if name in stored:
                what = f"tensor {ascii(name)[:200]} is in both {stored[name]} and {file}"
                sink(ArtifactError(what, "Remove the stale shard"))
            stored.setdefault(name, file)
    if len(found) == len(weights.files):
        check_index(weights, stored, sink)
    quantized = {name: flat for contents in found for name, flat in contents.quantized.items()}
    tensors = {name: info for contents in found for name, info in contents.tensors.items()}
    tensors |= {part.name: part for flat in quantized.values() for part in flat.parts.values()}
    known = {name for name, flat in quantized.items() if flat.type in SUBCLASSES}
    foreign = tuple(
        ArtifactError(
            f"{contents.file}: '{name}' is of the unknown tensor class {cls}", unknown_class_hint(cls)
        )
        for contents in found
        for name, cls in contents.subclasses.items()
        if name not in known
    )
    return BinSource(
        directory,
        weights.files,
        tensors,
        quantized,
        tuple(group for contents in found for group in contents.shared),
        foreign,
        # accelerate looks for transformers' own file names only.
        mappable=weights.files != (FSDP_BIN,),
    )


def _dcp_source(directory: Path, weights: WeightFiles, sink: Sink) -> Source:
    from loadstone.artifact.formats.dcp import read_dcp

    try:
        return DcpSource(directory, read_dcp(directory, weights.folder, sink))
    except ArtifactError as error:
        sink(error)
        return SafetensorsSource(directory)
