"""Whether a model may be evaluated on text: it predicts each next token from the tokens before it alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from loadstone.loading.language_model import on_token_ids, refused
from loadstone.text.tokenizing import require_known

# Two rows of eight tokens that differ in their second half.
_TOKENS, _SHARED = 8, 4
# The most that predictions before the difference may differ, relative to the largest logit: rounding, where a kernel
# adds in another order.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 0.03, torch.float16: 0.01}
# A recipe that rounds all activations of a batch with one scale lets each token move the others' rounding.
_ROUNDED = 0.1


@dataclass(frozen=True)
class Vocabulary:
    """How many token ids a model takes (rows of its embedding) and predicts (columns of its logits)."""

    inputs: int
    outputs: int

    def require(self, highest: int, tokenizer: Any, name: str) -> None:
        """Raise ArtifactError, naming the token, when the highest id of a text is beyond the embedding or the
        logits."""
        require_known(highest, self.inputs, tokenizer, name)
        require_known(highest, self.outputs, tokenizer, name, "head predicts")


@dataclass(frozen=True)
class Probe:
    """Token ids, int64 (2, 8), whose rows differ in their second half: a causal model gives equal values to the first
    halves. ``inputs``: rows of the model's embedding. ``quantized``: some of its weights are."""

    ids: torch.Tensor
    inputs: int
    quantized: bool
    name: str
    kind: str

    def logits(self, logits_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """The model's logits (2, 8, V). Raises UsageError when the model gives none for token ids."""
        with on_token_ids(partial(refused, self.name, self.kind)), torch.no_grad():
            logits = logits_of(self.ids)
        if not isinstance(logits, torch.Tensor) or logits.dim() != 3 or logits.shape[:2] != self.ids.shape:
            shape = list(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
            raise refused(self.name, self.kind, f"gives no logits for each token (but {shape})")
        return logits

    def require_causal(self, values: torch.Tensor) -> None:
        """Raise UsageError when ``values`` (2, 8, ...) of the first half depend on the tokens after it."""
        if values.shape[:2] != self.ids.shape:
            return
        tolerance = _ROUNDED if self.quantized else _TOLERANCE.get(values.dtype, _ROUNDED)
        wide = values.detach().double()
        # Values that are not finite are reported where losses are computed.
        if bool(wide.isfinite().all()):
            apart = (wide[0, :_SHARED] - wide[1, :_SHARED]).abs().max()
            if bool(apart > tolerance * wide.abs().max()):
                raise refused(self.name, self.kind, "looks at the tokens that it is to predict")


def make_probe(model: Any, name: str) -> Probe:
    """The probe of a loaded model."""
    from torchao.utils import TorchAOBaseTensor

    kind = type(model).__name__
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        raise refused(name, kind, "has no embedding of tokens") from None
    inputs = weight.shape[0]
    # From the middle: placeholders of images and padding are at the ends.
    row = (inputs // 3 + torch.arange(_TOKENS + _TOKENS - _SHARED)) % inputs
    ids = torch.stack([row[:_TOKENS], torch.cat([row[:_SHARED], row[_TOKENS:]])])
    quantized = any(isinstance(p, TorchAOBaseTensor) for p in model.parameters())
    return Probe(ids.to(weight.device), inputs, quantized, name, kind)


def require_causal(model: Any, name: str, logits_of: Callable[[torch.Tensor], torch.Tensor]) -> Vocabulary:
    """Raise UsageError for a loaded model whose logits are not those of a causal language model.

    ``logits_of``: the model's logits of token ids (B, L). Costs one forward pass of sixteen tokens.
    """
    probe = make_probe(model, name)
    logits = probe.logits(logits_of)
    probe.require_causal(logits)
    return Vocabulary(probe.inputs, logits.shape[-1])
