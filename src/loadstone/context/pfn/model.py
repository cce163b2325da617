"""The reference PFN: a set transformer over the cells of a table, whose test rows attend to training rows only.

Each cell is a token; a row has one more, its target. A layer mixes the tokens of a row (attention over features), then
each column over the rows (attention over training rows), as TabPFN v2 does (Hollmann et al., Nature 637, 2025).
With ``per_feature=False`` a row is one token and there is no attention over features, as in the first PFNs (Müller
et al., ICLR 2022). Because no row ever attends to a test row, the keys and values of the training rows are all that a
prediction needs of them: `cache_training_context` keeps these and drops the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loadstone.context.pfn import encoding
from loadstone.context.pfn.config import PFNConfig
from loadstone.context.pfn.prefill import fit_context
from loadstone.context.pfn.training_context import TrainingContext
from loadstone.context.tables.predictions import REGRESSION

# CUDA attention kernels put the batch in a grid dimension that ends at 65,535.
_MAX_ATTENTION_BATCH = 32_768
# They also work in tiles of 128 x 128 scores. Plain matrix products are many times faster for a sequence of few scores,
# and faster up to one tile where all sequences together have at most 2^23 (32 MB).
_TILE, _FEW_SCORES, _MOST_SCORES = 16_384, 4096, 2**23


class Layer(nn.Module):
    """Attention over a row's tokens, attention over training rows, and an MLP; each with its norm before it.

    Rows are (batch, rows, tokens, width). Keys and values are (batch × tokens, heads, rows, head size).
    """

    def __init__(self, config: PFNConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        if config.per_feature:
            self.norm_features = nn.LayerNorm(width)
            self.features_qkv = nn.Linear(width, 3 * width, bias=False)
            self.features_out = nn.Linear(width, width, bias=False)
        self.norm_rows = nn.LayerNorm(width)
        self.rows_q = nn.Linear(width, width, bias=False)
        self.rows_kv = nn.Linear(width, 2 * width, bias=False)
        self.rows_out = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, config.hidden)
        self.down = nn.Linear(config.hidden, width)

    def mix_features(self, x: Tensor, *, target_only: bool) -> Tensor:
        """Attention among the tokens of each row; with ``target_only`` the target's token (the last) alone is kept."""
        batch, rows, tokens, width = x.shape
        if tokens == 1:
            return x
        h = self.norm_features(x).view(batch * rows, tokens, width)
        if target_only:
            q_weight, kv_weight = self.features_qkv.weight.split((width, 2 * width))
            q = F.linear(h[:, -1], q_weight).unflatten(-1, (self.heads, 1, -1))
            k, v = _heads(F.linear(h, kv_weight), 2, self.heads)
            x = x[:, :, -1:]
        else:
            q, k, v = _heads(self.features_qkv(h), 3, self.heads)
        mixed = attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return x + self.features_out(mixed)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of training rows, all that later rows see of them."""
        k, v = self.rows_kv(self.norm_rows(x)).chunk(2, -1)
        return _columns(k, self.heads), _columns(v, self.heads)

    def attend(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Let each row read the training rows, column by column, then the MLP."""
        batch, rows, tokens, _ = x.shape
        q = _columns(self.rows_q(self.norm_rows(x)), self.heads)
        read = attention(q, keys, values).view(batch, tokens, self.heads, rows, -1)
        x = x + self.rows_out(read.permute(0, 3, 1, 2, 4).reshape(x.shape))
        return x + self.down(F.gelu(self.up(self.norm_mlp(x))))


class PFN(nn.Module):
    """A prior-data fitted network. Weights come from `loadstone.load`; training from ``recipes/train_pfn.py``."""

    def __init__(self, config: PFNConfig) -> None:
        super().__init__()
        self.config = config
        # Where the weights were loaded from, for a context to record; None for a model made in memory.
        self.source: str | None = None
        width = config.width
        if config.per_feature:
            self.embed_cell = nn.Linear(2, width)
            self.embed_code = nn.Linear(config.code_size, width, bias=False)
        else:
            self.embed_row = nn.Linear(2 * config.max_features, width)
        self.unknown_target = nn.Parameter(torch.zeros(width))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        if config.bars:
            self.embed_value = nn.Linear(1, width)
            self.regression_head = _head(config, config.bars)
            # Bar borders in units of the training targets' spread; training sets them from the prior's quantiles.
            self.register_buffer("borders", torch.linspace(-4.0, 4.0, config.bars + 1))
        if config.classes:
            self.embed_class = nn.Embedding(config.classes, width)
            self.classification_head = _head(config, config.classes)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PFN:
        """An uninitialised-by-file model from a ``config.json`` (the loader fills it)."""
        return cls(PFNConfig.from_dict(config))

    @property
    def dtype(self) -> torch.dtype:
        return self.unknown_target.dtype

    @property
    def device(self) -> torch.device:
        return self.unknown_target.device

    @property
    def blocks(self) -> tuple[Layer, ...]:
        """The layers, typed."""
        return tuple(cast(Layer, layer) for layer in self.layers)

    def embed_rows(self, z: Tensor, codes: Tensor, target: Tensor) -> Tensor:
        """Tokens (batch, rows, tokens, width) of scaled values ``z`` (batch, rows, d), ``codes`` (d, code size; or with
        the batch before) and target tokens (batch, rows, width)."""
        values = encoding.cells(z, self.dtype)
        if self.config.per_feature:
            x = self.embed_cell(values) + self.embed_code(codes.to(self.dtype)).unsqueeze(-3)
            return torch.cat((x, target.unsqueeze(-2).to(x.dtype)), -2)
        padding = self.config.max_features - z.shape[-1]
        return (self.embed_row(F.pad(values, (0, 0, 0, padding)).flatten(-2)) + target).unsqueeze(-2)

    def embed_targets(self, y: Tensor, task: str) -> Tensor:
        """Scaled targets (regression) or class numbers (batch, rows) -> target tokens (batch, rows, width)."""
        if task == REGRESSION:
            return self.embed_value(y.to(self.dtype).unsqueeze(-1))
        # A product and not a look-up: its gradient sums a few rows over many targets, which look-ups do slowly.
        return F.one_hot(y.long(), self.config.classes).to(self.dtype) @ self.embed_class.weight

    def read_out(self, x: Tensor, task: str) -> Tensor:
        """The target token after the last layer (..., width) -> logits over bars or classes."""
        head = self.regression_head if task == REGRESSION else self.classification_head
        return head(self.norm(x))

    def forward(self, x_train: Tensor, y_train: Tensor, x_test: Tensor, task: str, codes: Tensor) -> Tensor:
        """The plain path, in one pass and without a cache: what training runs, and what every cache must equal.

        ``x_train`` (batch, n, d), ``y_train`` (batch, n), ``x_test`` (batch, m, d); ``codes`` as `embed_rows`.
        Returns logits (batch, m, bars or classes): regression in units of each table's own target spread.
        """
        n = x_train.shape[1]
        scaler = encoding.fit_scaler(x_train)
        y = y_train
        if task == REGRESSION:
            y = encoding.fit_scaler(y_train.unsqueeze(-1))(y_train.unsqueeze(-1)).squeeze(-1)
        unknown = self.unknown_target.expand(*x_test.shape[:2], -1)
        targets = torch.cat((self.embed_targets(y, task).to(unknown.dtype), unknown), 1)
        x = self.embed_rows(scaler(torch.cat((x_train, x_test), 1)), codes, targets)
        for layer in self.blocks:
            last = layer is self.blocks[-1]
            x = layer.mix_features(x, target_only=last)
            keys, values = layer.keys_values(x[:, :n])
            x = layer.attend(x[:, n:] if last else x, keys, values)
        return self.read_out(x.squeeze(2), task)

    def fit(self, x: Tensor, y: Tensor, **options: Any) -> TrainingContext:
        """The context of training rows ``x`` (n, d) and targets ``y`` (n,), tensors or numpy arrays: see `fit_context`
        for the options."""
        rows, targets = torch.as_tensor(x), torch.as_tensor(y)
        if rows is not x:
            rows = rows.to(self.dtype)
        if targets is not y and targets.is_floating_point():
            targets = targets.to(self.dtype)
        return fit_context(self, rows, targets, **options)

    @contextmanager
    def cache_training_context(self, x: Tensor, y: Tensor, **options: Any) -> Iterator[TrainingContext]:
        """`fit` as a ``with`` block. The context is an object of its own and nothing is left in the modules, so
        blocks may nest, run in threads, or end in an exception; its memory goes when its last reference does."""
        yield self.fit(x, y, **options)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's fused attention over (batch, heads, length, head size), but for short sequences on a GPU."""
    if q.is_cuda and _few(q.shape[-2], k.shape[-2], q.shape[:-2].numel()):
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1).to(v.dtype) @ v
    if len(q) <= _MAX_ATTENTION_BATCH:
        return F.scaled_dot_product_attention(q, k, v)
    parts = zip(*(t.split(_MAX_ATTENTION_BATCH) for t in (q, k, v)), strict=True)
    return torch.cat([F.scaled_dot_product_attention(*part) for part in parts])


def _few(queries: int, keys: int, sequences: int) -> bool:
    """Whether plain matrix products attend faster than CUDA's fused kernels."""
    scores = queries * keys
    return scores <= _FEW_SCORES or (scores <= _TILE and scores * sequences <= _MOST_SCORES)


def _heads(x: Tensor, parts: int, heads: int) -> tuple[Tensor, ...]:
    """(batch, length, parts × width) -> each part as (batch, heads, length, head size)."""
    x = x.unflatten(-1, (parts, heads, -1))
    if x.is_cuda and _few(x.shape[1], x.shape[1], len(x) * heads):
        # One copy: matrix products would copy each part.
        x = x.permute(2, 0, 3, 1, 4).contiguous().permute(1, 3, 0, 2, 4)
    return tuple(part.transpose(1, 2) for part in x.unbind(2))


def _columns(x: Tensor, heads: int) -> Tensor:
    """(batch, rows, tokens, width) -> (batch × tokens, heads, rows, head size)."""
    return x.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)


def _head(config: PFNConfig, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(config.width, config.hidden), nn.GELU(), nn.Linear(config.hidden, outputs))
