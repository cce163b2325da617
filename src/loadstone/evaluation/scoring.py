"""The negative log-likelihood of every token of text under a model, each scored exactly once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from loadstone.errors import ArtifactError
from loadstone.evaluation.head import Halves, chunk_rows, halve
from loadstone.evaluation.tokens import Protocol, TokenStream, Windows

# Tokens per batch that saturate the device; more only costs memory.
_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
Progress = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Batch:
    """A group of windows on the device. ``ids``: (B, L), rows padded on the right, which causal models
    cannot see. ``rows``: (n,) positions in the flattened (B * L) inputs whose next token is scored;
    ``targets``: (n,) that token; ``slots``: (n,) where its loss goes in the vector over all scored tokens."""

    ids: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    slots: torch.Tensor


def plan_batches(windows: Windows, batch_size: int) -> list[np.ndarray]:
    """Window indices of each batch, longest windows first so that padding is least and memory peaks at once.

    The plan depends on nothing else: any number of processes divides the same batches, to the same bits.
    """
    order = np.argsort(-windows.length, kind="stable")
    return [order[at : at + batch_size] for at in range(0, len(order), batch_size)]


def default_batch_size(context_length: int, device: torch.device) -> int:
    """Windows per batch that keep the device busy."""
    return max(1, _BATCH_TOKENS.get(device.type, _BATCH_TOKENS["cuda"]) // context_length)


class BatchMaker:
    """Builds batches from a stream that was moved to the device once."""

    def __init__(
        self, stream: TokenStream, protocol: Protocol, windows: Windows, device: torch.device
    ) -> None:
        self._windows = windows
        self._bos = protocol.separator_id if protocol.bos_each_window else None
        self._device = device
        self._ids = torch.from_numpy(stream.ids).to(device)
        self._is_text = stream.document >= 0
        self._slot = np.cumsum(self._is_text) - 1
        self.tokens = int(self._is_text.sum())

    def __call__(self, members: np.ndarray) -> Batch:
        start, length, first = (
            a[members] for a in (self._windows.start, self._windows.length, self._windows.first)
        )
        width = int(length.max())
        rows, targets = [], []
        for i in range(len(members)):
            wanted = np.arange(first[i], start[i] + length[i] + 1)
            wanted = wanted[self._is_text[wanted]]
            rows.append(i * width + wanted - 1 - start[i])
            targets.append(wanted)
        position = np.minimum(start[:, None] + np.arange(width), len(self._is_text) - 1)
        target = np.concatenate(targets)
        where = self._to_device(position)
        ids = self._ids[where]
        if self._bos is not None:
            ids[:, 0] = self._bos
        return Batch(
            ids=ids,
            rows=self._to_device(np.concatenate(rows)),
            targets=self._ids[self._to_device(target)],
            slots=self._to_device(self._slot[target]),
        )

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
        if self._device.type != "cuda":
            return tensor.to(self._device)
        # Pinned and asynchronous: the GPU never waits for the host between batches.
        return tensor.pin_memory().to(self._device, non_blocking=True)


@dataclass(eq=False)
class Scores:
    """Losses of a run in progress or done. ``nll``: float32 (tokens,), nats, NaN where not yet scored;
    ``done``: bool (batches,); ``seconds``: computing time over all sessions; ``timed_tokens``: tokens it
    covers."""

    nll: np.ndarray
    done: np.ndarray
    seconds: float = 0.0
    timed_tokens: int = 0

    @classmethod
    def empty(cls, tokens: int, batches: int) -> Scores:
        return cls(np.full(tokens, np.nan, dtype=np.float32), np.zeros(batches, dtype=bool))


def score(
    model: Any,
    maker: BatchMaker,
    batches: Sequence[np.ndarray],
    *,
    name: str,
    halves: Halves | None = None,
    scores: Scores | None = None,
    share: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
    save: Callable[[Scores], None] | None = None,
    save_every: float = 30.0,
) -> Scores:
    """Score the batches that ``scores`` lacks, and of those only every ``share[1]``-th from ``share[0]`` on.

    ``save`` is called with what is done so far every ``save_every`` seconds, and when the run is interrupted.
    Raises ArtifactError, naming the model, when a loss is not finite.
    """
    device = maker._ids.device
    halves = halves or halve(model)
    rows_at_once = chunk_rows(model, device)
    scores = scores or Scores.empty(maker.tokens, len(batches))
    nll = torch.from_numpy(scores.nll).to(device, copy=True)
    rank, ranks = share
    todo = [i for i in range(len(batches)) if i % ranks == rank and not scores.done[i]]
    finished: list[int] = []
    counted = 0
    clock = time.perf_counter()

    def settle() -> None:
        # The one place that waits for the device.
        nonlocal clock, counted
        scores.nll = nll.cpu().numpy().copy()
        scores.done[finished] = True
        now = time.perf_counter()
        scores.seconds, scores.timed_tokens = scores.seconds + now - clock, scores.timed_tokens + counted
        clock, counted = now, 0

    try:
        for number, index in enumerate(todo):
            batch = maker(batches[index])
            with torch.inference_mode():
                score_batch(halves, batch, nll, rows_at_once)
            finished.append(index)
            counted += len(batch.slots)
            if number == 0:
                # A broken model is broken on its first batch: say so now rather than after an hour.
                _check_finite(nll[batch.slots], name)
            if progress is not None:
                progress(len(batch.slots))
            if save is not None and time.perf_counter() - clock > save_every:
                settle()
                save(scores)
    except BaseException:
        if save is not None:
            settle()
            save(scores)
        raise
    settle()
    if len(finished) == len(batches) or scores.done.all():
        _check_finite(torch.from_numpy(scores.nll), name)
    return scores


def score_batch(halves: Halves, batch: Batch, nll: torch.Tensor, rows_at_once: int) -> None:
    """Write the losses of one batch into ``nll`` (tokens,) at the batch's slots."""
    hidden = halves.backbone(batch.ids)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    for at in range(0, len(batch.rows), rows_at_once):
        part = slice(at, at + rows_at_once)
        logits = halves.head(hidden[batch.rows[part]][None])
        logits = logits if logits.dtype == torch.float64 else logits.float()
        losses = F.cross_entropy(logits, batch.targets[part], reduction="none")
        nll[batch.slots[part]] = losses.to(nll.dtype)


def _check_finite(losses: torch.Tensor, name: str) -> None:
    bad = int((~torch.isfinite(losses)).sum())
    if bad:
        raise ArtifactError(
            f"'{name}' gives losses that are not finite ({bad} of the {len(losses)} tokens looked at)",
            "Its weights or scales hold NaN or infinity, or the dtype overflows: try --dtype float32",
        )
