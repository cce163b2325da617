"""Models of the ``pfns`` package (extra ``[pfns]``, version 0.4) with a cached, folded and differentiable context.

    context = fit_pfns(model, train_x, train_y)
    context.posterior(queries).mean.sum().backward()

The package's own cache wants as many context copies as there are query batches, refuses gradients, and keeps its state
in the model that all callers share. Here the state lies in a private copy of the modules, whose parameters are the
model's own, and the attention over training rows is replaced in that copy by one that reads the cache in one sequence.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loadstone.context.pfn.bars import BarPosterior
from loadstone.errors import UsageError


@dataclass(frozen=True, eq=False)
class PfnsContext:
    """A ``pfns`` model that has read ``rows`` training rows of ``features`` features."""

    rows: int
    features: int
    _copy: nn.Module = field(repr=False)

    def logits(self, queries: Tensor) -> Tensor:
        """Logits (..., outputs) of queries (..., d), differentiable with respect to them."""
        if queries.shape[-1:] != (self.features,):
            raise UsageError(
                f"queries {tuple(queries.shape)} do not have {self.features} features", "See the fit"
            )
        # The model adds embeddings in place: never to the caller's own tensor.
        folded = queries.reshape(1, -1, self.features) * 1.0
        found = self._copy(x=folded, y=None)
        return found.view(*queries.shape[:-1], -1)

    def posterior(self, queries: Tensor) -> BarPosterior:
        """Predictive distributions in the units of the training targets, which the model expects to be standardised."""
        borders = getattr(getattr(self._copy, "criterion", None), "borders", None)
        if borders is None:
            raise UsageError("the model's criterion has no bars", "Use logits()")
        return BarPosterior(self.logits(queries), borders.double())


def fit_pfns(model: nn.Module, x: Tensor, y: Tensor) -> PfnsContext:
    """Read training rows ``x`` (n, d) and ``y`` (n,) with a ``pfns.model.transformer.TableTransformer``.

    Raises `UsageError` for a model that is batch-second, takes a style, or has no attention between features: those
    have no cache in the package either.
    """
    if not getattr(model, "batch_first", False) or not getattr(model, "attention_between_features", False):
        raise UsageError(
            "the model is not batch-first with attention between features", "Only such models are cached"
        )
    if (
        getattr(model, "style_encoder", None) is not None
        or getattr(model, "y_style_encoder", None) is not None
    ):
        raise UsageError("the model takes a style", "Only models without one are cached")
    if x.ndim != 2 or y.shape != (len(x),):
        raise UsageError(
            f"training rows are {tuple(x.shape)} and targets {tuple(y.shape)}", "Give (n, d) and (n,)"
        )
    # A copy of every module, so that encoder state and caches are the context's own, and of no parameter.
    shared: dict[int, Any] = {id(p): p for p in model.parameters()}
    # State of the caller's last pass may hang on its graph, and such tensors cannot be copied: it is not needed.
    state = [value for module in model.modules() for value in vars(module).values()]
    shared |= {id(t): t.detach() for t in state if isinstance(t, Tensor) and t.grad_fn is not None}
    private = copy.deepcopy(model, shared).eval()
    private.cache_trainset_representation = True  # type: ignore[assignment]
    with torch.inference_mode(False), torch.no_grad():
        private(x=x.detach().clone().unsqueeze(0), y=y.detach().clone().unsqueeze(0))
    layers: Any = private.transformer_layers
    for layer in layers.layers:
        attention = layer.self_attn_between_items
        attention.forward = partial(_read_cache, attention)
    return PfnsContext(len(x), x.shape[1], private)


def _read_cache(attention: Any, x: Tensor, x_kv: Tensor | None = None, **flags: Any) -> Tensor:
    """The module's forward on queries (1, groups, queries, width), with keys and values from its cache."""
    if attention._kv_cache is not None:
        keys, values = attention._kv_cache.unbind(-3)
    else:
        keys, values = attention._k_cache, attention._v_cache
    w_q = attention._w_q if attention._w_qkv is None else attention._w_qkv[0]
    q = torch.einsum("gms,hds->ghmd", x[0], w_q)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    if keys.shape[1] != q.shape[1]:
        repeats = q.shape[1] // keys.shape[1]
        keys, values = (t.repeat_interleave(repeats, 1) for t in (keys, values))
    read = F.scaled_dot_product_attention(q, keys, values, scale=attention.softmax_scale)
    out = torch.einsum("ghmd,hds->gms", read, attention._w_out).unsqueeze(0)
    return out + x if flags.get("add_input") else out
