"""A fitted context: the keys and values of training rows, immutable, that predictions for queries are computed from.

Queries of any leading shape are folded into the one row axis of a single sequence: test rows do not see each other,
so this is exact, and the cached keys and values are never repeated for restarts or candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from loadstone.artifact.context_errors import SchemaMismatch
from loadstone.artifact.context_file import PFN
from loadstone.context.fingerprint import fingerprint
from loadstone.context.pfn.bars import BarPosterior
from loadstone.context.pfn.encoding import SOFT_CLIP, Scaler
from loadstone.context.pfn.layer_cache import LayerCache
from loadstone.context.pfn.layout import CACHE_DTYPE_NAMES, PROBE_ROWS
from loadstone.errors import UsageError
from loadstone.writing.contexts import write_context

# Largest difference of a logit, relative to the largest one of the probe, between the machine that fitted and this.
PROBE_TOLERANCE = {"float64": 1e-9, "float32": 2e-3, "bfloat16": 0.1}
# Activations of rows in flight, in bytes; longer batches go through in chunks.
MEMORY_BUDGET = {"cpu": 4 << 30, "cuda": 8 << 30}


@dataclass(frozen=True, eq=False)
class TrainingContext:
    """Encoder state, keys and values of ``rows`` training rows, bound to ``model``, the `PFN` that read them.

    ``classes`` are the labels of a classification context, in the order of its logits. ``target`` maps the targets of
    a regression context to the model's units. ``schema`` describes the table's columns when it came from one.
    """

    model: Any = field(repr=False)
    task: str
    rows: int
    scaler: Scaler = field(repr=False)
    target: Scaler | None = field(repr=False)
    codes: Tensor = field(repr=False)
    layers: tuple[LayerCache, ...] = field(repr=False)
    classes: tuple[Any, ...] = ()
    feature_names: tuple[str, ...] | None = field(repr=False, default=None)
    seed: int = 0
    cache_dtype: torch.dtype = torch.float32
    schema: dict[str, Any] | None = field(repr=False, default=None)

    @property
    def features(self) -> int:
        """Features that a query must have."""
        return self.codes.shape[0]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of the cache and the encoder state (the model's own weights are not part of it)."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def borders(self) -> Tensor:
        """Bar borders in the target's units, float64 (bars + 1)."""
        assert self.target is not None
        return self.model.get_buffer("borders").double() * self.target.std.view(()) + self.target.mean.view(
            ()
        )

    def logits(self, queries: Tensor, *, memory_budget: int | None = None) -> Tensor:
        """Logits (..., bars or classes) of queries (..., d) in the units and order of the training features.

        Differentiable with respect to the queries. More queries than ``memory_budget`` bytes of activations allow
        (default 4 GiB, 8 on a GPU) go through in chunks, with the same result; under autograd a chunk is computed
        again in the backward pass, so memory stays bounded there too. Raises `SchemaMismatch` for another number of
        features, `UsageError` for infinite queries; those that are on a GPU already get NaN, since asking would wait.
        """
        if queries.shape[-1:] != (self.features,):
            raise SchemaMismatch(
                f"a query has {queries.shape[-1] if queries.ndim else 0} features and the context {self.features}",
                "Give the features it was fitted on, in their order",
            )
        if not queries.is_floating_point() or (not queries.is_cuda and queries.isinf().any()):
            raise UsageError(
                "queries must be floating-point and not infinite", "NaN stands for a missing value"
            )
        rows = queries.reshape(-1, self.features).to(self.device)
        grad = torch.is_grad_enabled() and (rows.requires_grad or self.layers[0].keys.requires_grad)
        step = rows_within(memory_budget, self.model, self.features, grad=grad)
        if len(rows) <= step:
            result = self._answer(rows)
        elif grad:
            parts = rows.split(step)
            result = torch.cat([checkpoint(self._answer, part, use_reentrant=False) for part in parts])
        else:
            result = torch.cat([self._answer(part) for part in rows.split(step)])
        return result.view(*queries.shape[:-1], result.shape[-1])

    def _answer(self, rows: Tensor) -> Tensor:
        """Logits of (m, d) queries in one pass."""
        model = self.model
        unknown = model.unknown_target.expand(1, len(rows), -1)
        x = model.embed_rows(self.scaler(rows).unsqueeze(0), self.codes, unknown)
        for layer, cache in zip(model.blocks, self.layers, strict=True):
            x = layer.mix_features(x, target_only=layer is model.blocks[-1])
            x = layer.attend(x, *cache.read(model.dtype))
        logits = model.read_out(x.flatten(0, 2), self.task)
        return logits[:, : len(self.classes)] if self.classes else logits

    def posterior(self, queries: Tensor, *, memory_budget: int | None = None) -> BarPosterior:
        """Predictive distributions (regression only) of queries (..., d), one for each row on its own."""
        if self.target is None:
            raise UsageError("a classification context has no posterior over a number", "Use probabilities()")
        return BarPosterior(self.logits(queries, memory_budget=memory_budget), self.borders)

    def probabilities(self, queries: Tensor, *, memory_budget: int | None = None) -> Tensor:
        """Class probabilities (..., classes), float64, in the order of `classes`."""
        if self.target is not None:
            raise UsageError("a regression context has no classes", "Use posterior()")
        return self.logits(queries, memory_budget=memory_budget).double().softmax(-1)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is stored, by its name on disk."""
        named = {"scaler.mean": self.scaler.mean, "scaler.std": self.scaler.std, "codes": self.codes}
        if self.target is not None:
            named |= {"target.mean": self.target.mean, "target.std": self.target.std}
        for number, layer in enumerate(self.layers):
            named |= {f"layers.{number}.{name}": tensor for name, tensor in layer.tensors().items()}
        return named

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write the context as the directory ``path``, whole or not at all; `loadstone.load_context` reads it.

        Tensors are written one after another, so saving needs the memory of one layer's keys at most. Raises
        `UsageError` for an existing output, and for a context that is still part of an autograd graph.
        """
        if self.layers[0].keys.requires_grad:
            raise UsageError("a context with gradients cannot be saved", "Fit it without grad_context")
        return write_context(
            Path(path), self.tensors() | self._probe(), self._describe(), overwrite=overwrite
        )

    def _probe(self) -> dict[str, Tensor]:
        """Random queries and their logits, to be compared after loading. No training row is among them."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(PROBE_ROWS, self.features, generator=generator, dtype=torch.float64)
        queries = self.scaler.mean + self.scaler.std * noise.to(self.device)
        with torch.inference_mode(False), torch.no_grad():
            return {"probe.queries": queries, "probe.logits": self.logits(queries)}

    def _describe(self) -> dict[str, Any]:
        """What context.json holds; ``docs/contexts.md`` documents every key."""
        base = fingerprint(self.model)
        dtype = str(self.model.dtype).removeprefix("torch.")
        return {
            "kind": PFN,
            "task": self.task,
            "rows": self.rows,
            "features": self.features,
            "schema": self.schema or {"names": list(self.feature_names or ())},
            "classes": list(self.classes),
            "base": {
                "source": self.model.source,
                "fingerprint": base.digest,
                "architecture": self.model.config.to_dict(),
                "tensors": base.to_json(),
            },
            "cache": {
                "dtype": CACHE_DTYPE_NAMES[self.cache_dtype],
                "layers": len(self.layers),
                "layout": "tokens, heads, rows, head size",
                "extendable": False,
            },
            "encoder": {"seed": self.seed, "soft_clip": SOFT_CLIP},
            "numerics": {
                "dtype": dtype,
                "device": self.device.type,
                "torch": torch.__version__,
                "probe_tolerance": PROBE_TOLERANCE[dtype],
            },
            # Keys and values are computed from the training targets, so the file discloses something about them.
            "contains_training_labels": True,
        }

    def to(self, device: torch.device | str, model: Any) -> TrainingContext:
        """The same context on another device, bound to ``model``: the same base, already there."""
        target = self.target and Scaler(self.target.mean.to(device), self.target.std.to(device))
        return replace(
            self,
            model=model,
            scaler=Scaler(self.scaler.mean.to(device), self.scaler.std.to(device)),
            target=target,
            codes=self.codes.to(device),
            layers=tuple(layer.to(device) for layer in self.layers),
        )


def rows_within(budget: int | None, model: Any, features: int, *, grad: bool) -> int:
    """Rows that may be in flight at once; ``budget`` None is the device's default."""
    if budget is None:
        budget = MEMORY_BUDGET["cuda" if model.device.type == "cuda" else "cpu"]
    return max(1, budget // row_bytes(model, features, grad=grad))


def row_bytes(model: Any, features: int, *, grad: bool) -> int:
    """Activations of one row in flight, in bytes: a measured upper estimate that decides the size of chunks."""
    config = model.config
    token = (12 * config.width + 2 * config.hidden) * model.dtype.itemsize
    if grad:
        token = config.layers * (14 * config.width + 3 * config.hidden) * model.dtype.itemsize
    return prod((config.tokens(features), token))
