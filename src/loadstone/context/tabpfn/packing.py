"""Tensors made smaller without loss, for contexts: what deflate can use is brought together first, the rest is left.

A large tensor is taken apart by channel (the axes after its longest one, the rows) and by byte: the exponents of a
channel lie side by side then, and so do the codes of a quantized one, which have few values. Stretches of about
`SEGMENT` bytes are Huffman-coded, each for itself, so that several threads can work; a stretch that hardly shrinks is
kept as it is. Small tensors go together into one stream of deflate. Format: ``docs/contexts.md``.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loadstone.artifact.context_errors import CorruptContext
from loadstone.quantization.flatten import dtype_name, tensor_bytes, torch_dtype

# Below this many bytes a tensor goes into the common stream.
LARGE = 1 << 16
SEGMENT = 1 << 17
# A stretch is kept packed where it shrinks by an eighth: less is not worth unpacking it.
_WORTH = 7 / 8
# The beginning of a stretch tells whether to try it: the low bytes of floats are noise.
_SAMPLE = 1 << 14
# Codes of at least one bit: nothing that was written here grows by more than this. Crafted files may try.
_MOST = 8
# Blocks of 8,192 codes, each with a code book of its own.
_MEMORY = 7
WORKERS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Packing:
    """How one tensor lies packed. ``channels``: product of the axes after the rows. ``step``: channels of a stretch.
    ``sizes``: bytes of each stretch, byte by byte of an element, the lowest first, within one channel by channel."""

    dtype: str
    shape: tuple[int, ...]
    channels: int
    step: int
    sizes: tuple[int, ...]

    def to_json(self) -> list[Any]:
        return [self.dtype, list(self.shape), self.channels, self.step, list(self.sizes)]

    @classmethod
    def from_json(cls, name: str, entry: Any) -> Packing:
        """Raises `CorruptContext` for an entry whose parts do not follow from each other."""
        try:
            dtype, shape, channels, step, sizes = entry
            found = cls(dtype, tuple(shape), channels, step, tuple(sizes))
            numbers = (*found.shape, channels, step, *found.sizes)
            sound = (
                all(type(n) is int and n > 0 for n in numbers)
                and found.rows * channels == prod(found.shape)
                and ceil(channels / step) * found.itemsize == len(found.sizes)
            )
        except (KeyError, TypeError, ValueError, ZeroDivisionError):
            sound = False
        if not sound:
            raise CorruptContext(f"the packing of tensor '{name}' is malformed", "Save it again")
        for size, (_, first, last) in zip(found.sizes, found.stretches(), strict=True):
            if found.rows * (last - first) > _MOST * size:
                raise CorruptContext(
                    f"tensor '{name}' claims more than its {size} bytes can hold", "Do not trust it"
                )
        return found

    @property
    def rows(self) -> int:
        return prod(self.shape) // self.channels

    @property
    def itemsize(self) -> int:
        return torch_dtype(self.dtype).itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor itself."""
        return prod(self.shape) * self.itemsize

    def stretches(self) -> list[tuple[int, int, int]]:
        """(byte of an element, first channel, channel after the last) of each stretch, in the order of the file."""
        return [
            (byte, first, min(first + self.step, self.channels))
            for byte in range(self.itemsize)
            for first in range(0, self.channels, self.step)
        ]


def pack(pool: ThreadPoolExecutor, tensor: Tensor) -> tuple[Packing, list[Any]]:
    """How a tensor (of any device) packs, and its bytes, stretch by stretch. Takes its memory again at most."""
    shape = tuple(tensor.shape)
    channels = prod(shape[shape.index(max(shape)) + 1 :]) if shape else 1
    rows = tensor.numel() // channels
    how = Packing(dtype_name(tensor.dtype), shape, channels, max(1, min(channels, SEGMENT // rows)), ())
    raw = np.frombuffer(tensor_bytes(tensor), np.uint8).reshape(rows, channels, how.itemsize)

    def one(stretch: tuple[int, int, int]) -> Any:
        byte, first, last = stretch
        plain = np.ascontiguousarray(raw[:, first:last, byte].T).data.cast("B")
        if len(_coded(plain[:_SAMPLE])) > _WORTH * min(_SAMPLE, len(plain)):
            return plain
        packed = _coded(plain)
        return packed if len(packed) <= _WORTH * len(plain) else plain

    chunks = list(pool.map(one, how.stretches()))
    return replace(how, sizes=tuple(len(chunk) for chunk in chunks)), chunks


def _coded(plain: Any) -> bytes:
    coder = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, _MEMORY, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(plain) + coder.flush()


def unpack(
    pool: ThreadPoolExecutor, name: str, how: Packing, read: Callable[[int, int], bytes]
) -> tuple[Tensor, list[Future[None]]]:
    """The tensor, which is whole once the futures are done; they raise `CorruptContext` for what does not fit.
    ``read(begin, size)`` gives its packed bytes."""
    made = torch.empty(how.shape, dtype=torch_dtype(how.dtype))
    out = made.reshape(-1).view(torch.uint8).numpy().reshape(how.rows, how.channels, how.itemsize)

    def one(stretch: tuple[int, int, int], begin: int, size: int) -> None:
        byte, first, last = stretch
        wanted = how.rows * (last - first)
        plain = read(begin, size)
        if size != wanted:
            plain = inflate(name, plain, wanted)
        out[:, first:last, byte] = np.frombuffer(plain, np.uint8).reshape(last - first, how.rows).T

    waiting, begin = [], 0
    for stretch, size in zip(how.stretches(), how.sizes, strict=True):
        waiting.append(pool.submit(one, stretch, begin, size))
        begin += size
    return made, waiting


def deflate(data: bytes) -> bytes:
    """``data`` as one raw stream of deflate."""
    coder = zlib.compressobj(6, zlib.DEFLATED, -zlib.MAX_WBITS, 9)
    return coder.compress(data) + coder.flush()


def inflate(name: str, data: Any, size: int) -> bytes:
    """The ``size`` bytes that a raw stream of deflate holds; raises `CorruptContext` for more, fewer or damage, and
    never makes more than ``size`` bytes of it."""
    coder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        found = coder.decompress(data, size)
        # What ends exactly there may still owe its end mark.
        rest = coder.decompress(coder.unconsumed_tail, 1) if not coder.eof else b""
    except zlib.error as error:
        raise CorruptContext(f"'{name}' cannot be unpacked ({error})", "Save it again") from None
    if len(found) != size or rest or not coder.eof or coder.unused_data:
        raise CorruptContext(f"'{name}' does not hold the {size} bytes it should", "Do not trust it")
    return found


def gather(tensors: Mapping[str, Tensor]) -> bytes:
    """Small tensors in one piece: those of one element size together, the first bytes of all their elements first."""
    found = b""
    for size in (8, 4, 2, 1):
        alike = b"".join(bytes(tensor_bytes(t)) for t in tensors.values() if t.dtype.itemsize == size)
        found += np.frombuffer(alike, np.uint8).reshape(-1, size).T.tobytes()
    return found


def scatter(
    entries: Mapping[str, tuple[str, Sequence[int]]], data: memoryview
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `gather` put together. ``entries``: name -> (dtype, shape), in the same order."""
    kinds = {name: (torch_dtype(dtype), tuple(shape)) for name, (dtype, shape) in entries.items()}
    begin = 0
    for size in (8, 4, 2, 1):
        alike = {name: kind for name, kind in kinds.items() if kind[0].itemsize == size}
        count = sum(prod(shape) for _, shape in alike.values())
        planes = np.frombuffer(data[begin : begin + count * size], np.uint8).reshape(size, count)
        begin += count * size
        whole, at = np.ascontiguousarray(planes.T), 0
        for name, (dtype, shape) in alike.items():
            made = torch.empty(shape, dtype=dtype)
            # One by one: a view would keep all of them for as long as any is used.
            made.reshape(-1).view(torch.uint8).numpy()[:] = whole[at : at + prod(shape)].reshape(-1)
            at += prod(shape)
            yield name, made
    if begin != len(data):
        raise ValueError(f"{len(data)} bytes, {begin} are accounted for")
