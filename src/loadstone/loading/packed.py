"""Packed weights (compressed-tensors, FP8, MXFP4, GPTQ, AWQ), decoded while they are read: one block of rows after the
other.

What comes out is a plain tensor of the model's dtype, so experts merge and layers are placed as in a dense checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact
from loadstone.artifact.compressed_tensors.scheme import AWQ, GPTQ
from loadstone.artifact.packed import Packed
from loadstone.artifact.torchao.flatten import torch_dtype
from loadstone.errors import ArtifactError
from loadstone.loading.meta import destinations, meta_model
from loadstone.loading.part import LazyPart
from loadstone.quantization.decoding import decode_block

if TYPE_CHECKING:
    import torch

# Weights that are decoded at once: bounds what is in memory beside the result.
_BLOCK = 1 << 22

# Quantizers whose layers always store a bias, of zeros where the model has none.
_STORE_BIASES = (AWQ, GPTQ, f"{GPTQ}_v2")

Read = Callable[[str, int, int], "torch.Tensor"]


def empty_biases(artifact: Artifact) -> frozenset[str]:
    """Stored biases of zeros that the model has no parameter for: AutoGPTQ gives its layers such ones."""
    names = [f"{w.module}.bias" for w in artifact.packed.values() if w.scheme.format in _STORE_BIASES]
    found = [artifact.tensors[name] for name in names if name in artifact.tensors]
    zeros = [info.name for info in found if not artifact.source.read(info).any()]
    if not zeros:
        return frozenset()
    places = destinations(meta_model(artifact), zeros)
    return frozenset(name for name in zeros if places[name] is None)


class LazyPacked:
    """A packed weight before it is read. ``parts`` maps suffixes to safetensors slices; ``dtype``: of parts of it."""

    def __init__(self, weight: Packed, parts: dict[str, Any], dtype: torch.dtype | None = None) -> None:
        import torch

        self.weight = weight
        self.parts = parts
        self.dtype = dtype
        self._caller = threading.get_ident(), torch.get_num_threads()

    def __getitem__(self, index: Any) -> LazyPacked | LazyPart:
        # A part is asked for where a weight is divided among ranks.
        return self if index is Ellipsis else LazyPart(partial(self._part, index), self.dtype)

    def _part(self, index: tuple[slice, ...], device: Any, dtype: torch.dtype | None) -> torch.Tensor:
        """The part of the weight at ``index``, a slice for each dimension; its rows (or experts) alone are decoded."""
        each, tile = prod(self.weight.shape[1:-1]), self.weight.row_tile
        start, stop, _ = index[0].indices(self.weight.shape[0])
        first, last = start * each // tile * tile, -(-stop * each // tile) * tile
        found = self._rows(first, min(last, prod(self.weight.shape[:-1])), device, dtype)
        part = found[start * each - first : stop * each - first].view(stop - start, *self.weight.shape[1:])
        return part[(slice(None), *index[1:])]

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight in ``dtype`` (None: of its scales), decoded on ``device``."""
        shape = self.weight.shape
        return self._rows(0, prod(shape[:-1]), device, dtype).view(shape)

    def _rows(self, first: int, last: int, device: Any, dtype: torch.dtype | None) -> torch.Tensor:
        thread, threads = self._caller
        if threading.get_ident() != thread:
            _share_threads(threads)

        def read(suffix: str, start: int, stop: int) -> torch.Tensor:
            part = self.parts[suffix]
            found = part[start:stop] if self.weight.parts[suffix].shape else part[...]
            return found if device is None else found.to(device)

        return decode(self.weight, read, first, last, dtype or torch_dtype(self.weight.dtype))

    def get_dtype(self) -> str:
        """What a safetensors slice answers: the model sees the weight in its own floating dtype."""
        return self.weight.dtype

    def get_shape(self) -> list[int]:
        return list(self.weight.shape)


def _share_threads(threads: int) -> None:
    """Divide torch's ``threads`` among transformers' loading threads, of which this is one: as many for each of them
    would wait for each other."""
    import torch
    from transformers.core_model_loading import GLOBAL_WORKERS

    share = max(threads // GLOBAL_WORKERS, 1)
    if torch.get_num_threads() != share:
        torch.set_num_threads(share)
        # Threads that start later take the number that was set last, in whatever thread.
        last = threading.Thread(target=torch.set_num_threads, args=(threads,))
        last.start()
        last.join()


def decode(weight: Packed, read: Read, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows ``start`` to ``stop`` (multiples of `Packed.row_tile`, or the last) of a weight, (rows, in) in ``dtype``.

    ``read(suffix, first, last)`` gives a part of a stored tensor along its first dimension. Raises `ArtifactError`
    naming a weight whose ``weight_shape`` contradicts it.
    """
    import torch

    columns, tile = weight.shape[-1], weight.row_tile
    step = max(_BLOCK // (columns * tile), 1) * tile
    result = None
    fixed: dict[str, torch.Tensor] = {}
    for first in range(start, stop, step):
        last = min(first + step, stop)
        parts = {}
        for suffix, info in weight.parts.items():
            low, high = weight.rows_needed(suffix, first, last)
            if (low, high) == (0, info.shape[0] if info.shape else 1):
                # The same for every block: a scale of the whole tensor, an order of columns.
                if suffix not in fixed:
                    fixed[suffix] = read(suffix, low, high)
                parts[suffix] = fixed[suffix]
            else:
                parts[suffix] = read(suffix, low, high)
        if first == start and "weight_shape" in parts:
            _check_shape(weight, parts["weight_shape"])
        rows = decode_block(weight, parts, dtype)
        if result is None:
            if last == stop:
                return rows
            result = torch.empty(stop - start, columns, dtype=dtype, device=rows.device)
        result[first - start : last - start] = rows
    return result if result is not None else torch.empty(0, columns, dtype=dtype)


def _check_shape(weight: Packed, stored: torch.Tensor) -> None:
    if tuple(stored.tolist()) != weight.shape:
        info = weight.parts["weight_shape"]
        raise ArtifactError(
            f"{info.file}: '{info.name}' says {stored.tolist()}, the tensors beside it hold {list(weight.shape)}",
            "Copy the file again, or make the artifact again",
        )
