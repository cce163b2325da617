"""Reading the training rows once: encoder state and every layer's keys and values, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from loadstone.context.pfn import encoding
from loadstone.context.pfn.config import PFNConfig, check_task
from loadstone.context.pfn.layer_cache import LayerCache, parse_cache_dtype, store
from loadstone.context.pfn.training_context import TrainingContext, rows_within
from loadstone.context.tables.predictions import CLASSIFICATION, REGRESSION
from loadstone.errors import UsageError


def fit_context(
    model: Any,
    x: Tensor,
    y: Tensor,
    *,
    task: str | None = None,
    classes: Sequence[Any] | None = None,
    feature_names: Sequence[str] | None = None,
    cache_dtype: str | None = None,
    seed: int = 0,
    grad_context: bool = False,
    memory_budget: int | None = None,
) -> TrainingContext:
    """Read training rows with the PFN ``model``: ``x`` (n, d) floating, NaN where a value is missing; ``y`` (n,).

    ``task`` is ``regression`` or ``classification`` (default: by the dtype of ``y``, integers are classes). With
    ``classes`` the labels, ``y`` holds positions in it; without, the labels are the sorted distinct values of ``y``.
    ``cache_dtype`` is float32, bfloat16, int8, or None for the model's own; ``seed`` fixes the random codes that tell
    columns apart. ``grad_context`` keeps the graph from ``x`` and ``y`` into the cache (input warping, data
    valuation); otherwise nothing is recorded, whatever the caller's gradient mode. Rows are read in chunks that stay
    within about ``memory_budget`` bytes beside the cache and one layer's tokens. Raises `UsageError` for input that
    cannot be a training set.
    """
    task = check_task(model.config, task or (REGRESSION if y.is_floating_point() else CLASSIFICATION))
    x, y = x.to(model.device), y.to(model.device)
    check_rows(model.config, x, y)
    with ExitStack() as stack:
        # inference_mode would make the cache unusable under autograd later, so it is left as well.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad_context))
        if grad_context is False:
            x, y = x.detach(), y.detach()
        if x.is_inference():
            x = x.clone()
        if y.is_inference():
            y = y.clone()
        labels, y_scaled, target = _targets(model.config, y, task, classes)
        scaler = encoding.fit_scaler(x)
        codes = encoding.feature_codes(x.shape[1], model.config.code_size, seed).to(model.device)
        dtype = parse_cache_dtype(cache_dtype, model.dtype)
        step = rows_within(memory_budget, model, x.shape[1], grad=grad_context)
        layers = _read(model, scaler(x), codes, y_scaled, task, dtype, step)
    return TrainingContext(
        model=model,
        task=task,
        rows=len(x),
        scaler=scaler,
        target=target,
        codes=codes,
        layers=layers,
        classes=labels,
        feature_names=tuple(feature_names) if feature_names is not None else None,
        seed=seed,
        cache_dtype=dtype,
    )


def check_rows(config: PFNConfig, x: Tensor, y: Tensor) -> None:
    """Raise `UsageError` for training rows that cannot be fitted."""
    if x.ndim != 2 or y.ndim != 1 or len(x) != len(y):
        raise UsageError(
            f"training rows are {tuple(x.shape)} and targets {tuple(y.shape)}",
            "Give (rows, features) and (rows,)",
        )
    if len(x) == 0 or x.shape[1] == 0:
        raise UsageError("the training set is empty", "Give at least one row and one feature")
    if x.shape[1] > config.max_features:
        raise UsageError(
            f"{x.shape[1]} features, and the model was made for at most {config.max_features}", "Choose fewer"
        )
    if not x.is_floating_point() or x.isinf().any():
        raise UsageError("features must be floating-point and not infinite", "NaN stands for a missing value")
    if y.is_floating_point() and not y.isfinite().all():
        raise UsageError("targets must be finite", "Remove the rows without a target")


def _targets(
    config: PFNConfig, y: Tensor, task: str, classes: Sequence[Any] | None
) -> tuple[tuple[Any, ...], Tensor, encoding.Scaler | None]:
    """(labels, targets as the encoder takes them, target scaler)."""
    if task == REGRESSION:
        column = y.unsqueeze(-1)
        target = encoding.fit_scaler(column)
        return (), target(column).squeeze(-1), target
    if classes is None:
        found, y = y.unique(sorted=True, return_inverse=True)
        classes = found.tolist()
    if len(classes) > config.classes:
        raise UsageError(
            f"{len(classes)} classes, and the model distinguishes {config.classes}", "Merge rare classes"
        )
    if not len(classes) or y.min() < 0 or y.max() >= len(classes):
        raise UsageError("a target is not a position in `classes`", "Leave `classes` out, or give positions")
    return tuple(classes), y, None


def _read(
    model: Any, z: Tensor, codes: Tensor, y: Tensor, task: str, dtype: torch.dtype, step: int
) -> tuple[LayerCache, ...]:
    """Every layer's cache. Rows go through in chunks of ``step``; attention still spans all of them."""

    def embed(part: Tensor, targets: Tensor) -> Tensor:
        return model.embed_rows(part, codes, model.embed_targets(targets, task))

    rows = zip(z.split(step), y.split(step), strict=True)
    x = torch.cat([embed(part.unsqueeze(0), targets.unsqueeze(0)) for part, targets in rows], 1)
    caches = []
    for layer in model.blocks:
        last = layer is model.blocks[-1]
        x = _by_chunks(partial(layer.mix_features, target_only=last), x, step)
        pairs = [layer.keys_values(part) for part in x.split(step, 1)]
        keys, values = (torch.cat(parts, -2).contiguous() for parts in zip(*pairs, strict=True))
        del pairs
        caches.append(store(keys, values, dtype))
        if not last:
            x = _by_chunks(partial(layer.attend, keys=keys, values=values), x, step)
    return tuple(caches)


def _by_chunks(work: Callable[[Tensor], Tensor], x: Tensor, step: int) -> Tensor:
    return work(x) if x.shape[1] <= step else torch.cat([work(part) for part in x.split(step, 1)], 1)
