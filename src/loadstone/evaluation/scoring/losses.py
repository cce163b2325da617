"""The negative log-likelihood of every token of text under a model, each scored exactly once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from loadstone.errors import ArtifactError
from loadstone.evaluation.scoring.head import SplitModel, chunk_rows, split_head
from loadstone.evaluation.scoring.lengths import Regime
from loadstone.loading.layers import INDUCTOR
from loadstone.text.stream import TokenStream
from loadstone.text.tokens import Protocol, Windows

_NARROWEST = 64
_WIDEST_PADDING = 1.25
# Losses that are checked at once.
_CHECKED = 1 << 22
Progress = Callable[[int], None]


@dataclass(frozen=True, eq=False)
class Batch:
    """A group of windows on the device.

    ``ids``: int64 (B, L), padded on the right, where causal attention does not look. ``rows``: int64 (n,), positions in
    the flattened (B * L) inputs whose next token is scored. ``targets``: int64 (n,), that token. ``slots``: int64 (n,),
    the index of its loss in the vector over all scored tokens.
    """

    ids: torch.Tensor
    rows: torch.Tensor
    targets: torch.Tensor
    slots: torch.Tensor


def plan_batches(windows: Windows, batch_size: int, regime: Regime | None = None) -> list[np.ndarray]:
    """Window indices of each batch, longest windows first, and none padded by more than a quarter of its length.

    ``regime``: only windows of one key share a batch (`length_regime`). The batches depend on nothing else, so any
    number of processes divides the same batches and gets the same bits.
    """
    batches: list[list[int]] = []
    for index in np.argsort(-windows.length, kind="stable").tolist():
        last = batches[-1] if batches else []
        if (
            last
            and len(last) < batch_size
            and windows.length[last[0]] <= _WIDEST_PADDING * windows.length[index]
            and (regime is None or regime(windows.length[last[0]]) == regime(windows.length[index]))
        ):
            last.append(index)
        else:
            batches.append([index])
    return [np.array(members) for members in batches]


class BatchMaker:
    """Builds batches from a token stream, which stays on the host.

    ``rows``: for compiled models every batch is padded to that many rows, and to a width that is a power of two or the
    context length, so that few graphs are compiled. ``widens``: whether the width may be.
    """

    rows: int | None = None
    widens = True

    def __init__(
        self, stream: TokenStream, protocol: Protocol, windows: Windows, device: torch.device
    ) -> None:
        self.windows = windows
        self._context = protocol.context_length
        self._bos = protocol.separator_id if protocol.bos_each_window else None
        self.device = device
        self.stream = stream
        self.tokens = stream.count

    def slots(self, members: np.ndarray) -> np.ndarray:
        """Indices, in the vector over all scored tokens, of the losses of these windows: int64 (n,)."""
        w = self.windows
        edges = np.stack([w.first[members], w.start[members] + w.length[members] + 1])
        return np.concatenate([np.arange(*edge) for edge in self.stream.slot(edges).T])

    def __call__(self, members: np.ndarray) -> Batch:
        windows, count = self.windows, len(members)
        start, length = windows.start[members], windows.length[members]
        width = int(length.max())
        if self.rows is not None:
            if self.widens:
                width = min(max(_NARROWEST, 1 << (width - 1).bit_length()), self._context)
            start = np.pad(start, (0, self.rows - count), mode="edge")
        # The inputs, and the last one's target.
        ids, is_text = self.stream.read(
            np.minimum(start[:, None] + np.arange(width + 1), self.stream.size - 1)
        )
        column = np.arange(width + 1)
        scored = (column >= (windows.first[members] - start[:count])[:, None]) & (column <= length[:, None])
        row, column = np.nonzero(scored & is_text[:count])
        targets = ids[row, column]
        inputs = np.ascontiguousarray(ids[:, :-1])
        if self._bos is not None:
            inputs[:, 0] = self._bos
        return Batch(
            ids=self._to_device(inputs),
            rows=self._to_device(row * width + column - 1),
            targets=self._to_device(targets),
            slots=self._to_device(self.slots(members)),
        )

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64))
        if self.device.type != "cuda":
            return tensor.to(self.device)
        # Pinned and asynchronous: the GPU never waits for the host between batches.
        return tensor.pin_memory().to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Timing:
    """Wall time of a scoring pass in seconds, and the tokens scored in it by this process (not those it resumed
    from)."""

    seconds: float
    tokens: int


# Per-token values by name, each (tokens,) on the host; NaN marks what has not been computed yet.
Values = dict[str, np.ndarray]


def run_batches(
    compute: Callable[[Sequence[Batch]], Iterator[dict[str, torch.Tensor]]],
    dtypes: dict[str, torch.dtype],
    maker: BatchMaker,
    batches: Sequence[np.ndarray],
    *,
    together: int = 1,
    values: Values | None = None,
    share: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
    save: Callable[[Values], None] | None = None,
    save_every: float = 30.0,
) -> tuple[Values, Timing]:
    """Compute per-token values batch by batch: of the batches that ``values`` lacks, every ``share[1]``-th.

    ``compute`` receives ``together`` batches at a time and yields, for each batch, a tensor (n,) for each name in
    ``dtypes``, in the order of the batch's ``slots``. ``save`` is called with the values so far every ``save_every``
    seconds and when the run is interrupted; passed as ``values`` to another call, the run continues from them.
    """
    have = {} if values is None else values
    tensors = {
        name: torch.from_numpy(have[name]).to(maker.device, dtype, copy=True)
        if name in have
        else torch.full((maker.tokens,), float("nan"), dtype=dtype, device=maker.device)
        for name, dtype in dtypes.items()
    }
    rank, ranks = share
    left = [members for members in batches if _lacks(have, maker, members)]
    todo = left[rank::ranks]
    counted = 0
    begin = saved_at = time.perf_counter()

    def on_host() -> Values:
        # Nothing else waits for the device; on a CPU these are the same arrays, not copies.
        return {name: tensor.cpu().numpy() for name, tensor in tensors.items()}

    try:
        for at in range(0, len(todo), together):
            some = [maker(members) for members in todo[at : at + together]]
            results = compute(some)
            for batch in some:
                # Not inference mode: torchao's fused experts cannot be viewed in it.
                with torch.no_grad():
                    for name, value in next(results).items():
                        tensors[name][batch.slots] = value.to(tensors[name])
                counted += len(batch.slots)
                if progress is not None:
                    progress(len(batch.slots))
                if save is not None and time.perf_counter() - saved_at > save_every:
                    save(on_host())
                    saved_at = time.perf_counter()
    except BaseException:
        if save is not None and counted:
            save(on_host())
        raise
    return on_host(), Timing(time.perf_counter() - begin, counted)


def _lacks(values: Values, maker: BatchMaker, members: np.ndarray) -> bool:
    """Whether any value of these windows has not been computed yet."""
    if not values:
        return True
    slots = maker.slots(members)
    return any(bool(np.isnan(v[slots]).any()) for v in values.values())


def score(
    model: Any, maker: BatchMaker, batches: Sequence[np.ndarray], *, name: str, **options: Any
) -> tuple[Values, Timing]:
    """Score the model: ``nll``, losses in nats, float32 (tokens,). ``options`` are `run_batches`'s.

    Raises ArtifactError, naming the model, when a loss is not finite.
    """
    split, rows = split_head(model), chunk_rows(model, maker.device)
    checked = False

    def compute(some: Sequence[Batch]) -> Iterator[dict[str, torch.Tensor]]:
        nonlocal checked
        for batch, hidden in zip(some, split.hidden([b.ids for b in some]), strict=True):
            losses = losses_of(hidden, split, batch, rows)
            if not checked:
                # A broken model already fails on its first batch: report it now rather than after an hour.
                check_finite(losses, name)
                checked = True
            yield {"nll": losses}

    together = getattr(model, "together", 1)
    return run_batches(compute, {"nll": torch.float32}, maker, batches, together=together, **options)


def batch_losses(split: SplitModel, batch: Batch, rows_at_once: int) -> torch.Tensor:
    """Losses of one batch, (n,): the head is computed ``rows_at_once`` rows at a time."""
    return losses_of(split.backbone(batch.ids), split, batch, rows_at_once)


def losses_of(hidden: torch.Tensor, split: SplitModel, batch: Batch, rows_at_once: int) -> torch.Tensor:
    """Losses of one batch, (n,), from the backbone's hidden states (B, L, H)."""
    hidden = hidden.flatten(0, 1)
    # The last layers of a model spread over several devices are on another one than the first.
    rows, targets = batch.rows.to(hidden.device), batch.targets.to(hidden.device)
    token_losses_of = compiled_losses() if split.compiled and hidden.is_cuda else token_losses
    parts = []
    for at in range(0, len(batch.rows), rows_at_once):
        part = slice(at, at + rows_at_once)
        logits = split.head(hidden[rows[part]][None]).to(hidden.device)
        parts.append(token_losses_of(logits, targets[part]))
    return torch.cat(parts) if parts else hidden.new_zeros(0)


def token_losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihoods, (n,), of ``targets``, int64 (n,), under logits (n, V), in at least float32.

    On a CPU `cross_entropy` adds float32 probabilities one after another, which is biased by 1e-5 for 262,144 of them;
    `logsumexp` adds them in pairs, and compiled it is one kernel. On a GPU `cross_entropy` adds them in 1,024 parts,
    and goes over the logits a third as often as `logsumexp` does when it is not compiled.
    """
    if logits.dtype != torch.float64:
        logits = logits.float()
    if logits.is_cuda and not torch.compiler.is_compiling():
        return F.cross_entropy(logits, targets, reduction="none")
    return logits.logsumexp(-1) - logits.gather(-1, targets[:, None])[:, 0]


@lru_cache(maxsize=1)
def compiled_losses() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """`token_losses` as one kernel, which writes no float32 logits."""
    compiled = torch.compile(token_losses, options=INDUCTOR)

    def call(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # Batches have any number of scored tokens.
        for tensor in (logits, targets):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(logits, targets)

    return call


def check_finite(losses: torch.Tensor | np.ndarray, name: str) -> None:
    """Raise ArtifactError when any loss is NaN or infinite."""
    parts = torch.as_tensor(losses).split(_CHECKED)
    bad = sum(int((~torch.isfinite(part)).sum()) for part in parts)
    if bad:
        raise ArtifactError(
            f"'{name}' gives losses that are not finite ({bad} of the {len(losses)} tokens checked)",
            "Its weights or scales hold NaN or infinity, or the dtype overflows: try --dtype float32",
        )
