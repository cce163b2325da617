"""KL divergence between a model and a reference: one pass over both, no logits on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from loadstone.errors import UsageError
from loadstone.evaluation.measure import return_large_blocks
from loadstone.evaluation.scoring.head import chunk_rows, split_head
from loadstone.evaluation.scoring.losses import (
    Batch,
    BatchMaker,
    Timing,
    Values,
    check_finite,
    run_batches,
    token_losses,
)

# Divergences are computed in float64 and kept in float32.
_VALUES = ("nll_reference", "nll", "kl", "kl_reverse", "top1")


@dataclass(frozen=True)
class PairTiming:
    """The time of each model in a pass over both."""

    reference: Timing
    model: Timing


def score_pair(
    reference: Any,
    model: Any,
    maker: BatchMaker,
    batches: Sequence[np.ndarray],
    *,
    names: tuple[str, str],
    **options: Any,
) -> tuple[Values, PairTiming]:
    """Losses of both models and the divergence between them, each (tokens,): ``nll_reference``, ``nll``,
    ``kl`` (KL(reference ‖ model), nats), ``kl_reverse``, ``top1`` (1 where both would predict the same
    token).

    The head is computed in chunks, so memory is O(chunk x vocabulary) whatever the context. ``options`` are
    `run_batches`'s. Raises UsageError when the vocabularies differ, ArtifactError when a loss is not
    finite.
    """
    splits = split_head(reference), split_head(model)
    # Two sets of logits and their float64 copies are held at once.
    at_once = max(1, chunk_rows(reference, maker.device) // 4)
    spent = [0.0, 0.0]
    checked = False
    diverge = Divergence()

    def timed(which: int, call: Callable[[], torch.Tensor]) -> torch.Tensor:
        begin = time.perf_counter()
        result = call()
        if maker.device.type == "cuda":
            torch.cuda.synchronize(maker.device)
        spent[which] += time.perf_counter() - begin
        return result

    def compute(some: Sequence[Batch]) -> Iterator[dict[str, torch.Tensor]]:
        both = [split.hidden([b.ids for b in some]) for split in splits]
        for batch in some:
            yield compare(batch, [timed(i, both[i].__next__).flatten(0, 1) for i in (0, 1)])

    def compare(batch: Batch, hidden: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        nonlocal checked
        rows = [batch.rows.to(h.device) for h in hidden]
        parts: list[dict[str, torch.Tensor]] = []
        for at in range(0, len(batch.rows), at_once):
            part = slice(at, at + at_once)
            logits = [timed(i, partial(splits[i].head, hidden[i][rows[i][part]][None])) for i in (0, 1)]
            if logits[0].shape != logits[1].shape:
                raise UsageError(
                    f"'{names[0]}' and '{names[1]}' have vocabularies of {logits[0].shape[-1]} and "
                    f"{logits[1].shape[-1]} tokens: there is no KL divergence between them"
                )
            device = logits[0].device
            parts.append(diverge(logits[0], logits[1].to(device), batch.targets[part].to(device)))
        values = {key: torch.cat([p[key] for p in parts]) for key in _VALUES}
        if not checked:
            check_finite(values["nll_reference"], names[0])
            check_finite(values["nll"], names[1])
            checked = True
        return values

    together = min(getattr(m, "together", 1) for m in (reference, model))
    dtypes = dict.fromkeys(_VALUES, torch.float32)
    values, timing = run_batches(compute, dtypes, maker, batches, together=together, **options)
    return values, PairTiming(Timing(spent[0], timing.tokens), Timing(spent[1], timing.tokens))


class Divergence:
    """Divergence measures of chunks of logits, computed in buffers that are made once.

    Blocks of these sizes, allocated and freed for every chunk, would leave holes that the C library's heap cannot fill:
    gigabytes in a run over a large vocabulary. The logits themselves are such blocks, too.
    """

    def __init__(self) -> None:
        return_large_blocks()
        self._wide = torch.empty(0)
        self._mask = torch.empty(0)

    def __call__(
        self, reference: torch.Tensor, model: torch.Tensor, targets: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Divergence measures of logits (n, V) against reference logits (n, V), each (n,)."""
        log_p, log_q, apart, scratch, mask = self._buffers(reference)
        for logits, logs in ((reference, log_p), (model, log_q)):
            scratch.copy_(logits)
            torch.ops.aten._log_softmax.out(scratch, -1, False, out=logs)
        torch.sub(log_p, log_q, out=apart)
        kl = _expectation(log_p, apart, scratch, mask)
        return {
            "nll_reference": token_losses(reference, targets),
            "nll": token_losses(model, targets),
            "kl": kl,
            "kl_reverse": _expectation(log_q, apart.neg_(), scratch, mask),
            "top1": (reference.argmax(-1) == model.argmax(-1)).float(),
        }

    def _buffers(self, logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows, columns = logits.shape
        shape = self._mask.shape
        if len(shape) < 2 or shape[0] < rows or shape[1] != columns or self._mask.device != logits.device:
            self._wide = torch.empty(4, rows, columns, dtype=torch.float64, device=logits.device)
            self._mask = torch.empty(rows, columns, dtype=torch.bool, device=logits.device)
        return *self._wide[:, :rows], self._mask[:rows]


def _expectation(
    log_weight: torch.Tensor, value: torch.Tensor, scratch: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    """The sum of exp(log_weight) * value over each row, (n,); ``log_weight`` is overwritten."""
    weight = log_weight.exp_()
    torch.mul(weight, value, out=scratch)
    # A token masked to probability 0 contributes 0, though its value is inf - inf.
    torch.gt(weight, 0, out=mask)
    return scratch.masked_fill_(mask.logical_not_(), 0.0).sum(-1)
