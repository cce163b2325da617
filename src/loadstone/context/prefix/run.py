"""A prefix from a prompt file: the plan, then reading the prompt and saving the result."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from loadstone.artifact import Artifact
from loadstone.artifact.detect import detect
from loadstone.context.prefix.base import language_artifact, load_language_model, recipe_of
from loadstone.context.prefix.cache import PrefixCache
from loadstone.context.prefix.fit import encode_prompt, make_prefix, read_prompt, require_room
from loadstone.context.prefix.store import save_prefix
from loadstone.context.prefix.stored_states import QUANTIZED, check_kind
from loadstone.errors import UsageError
from loadstone.loading.language_model import require_language_model
from loadstone.loading.model_class import load_config
from loadstone.writing.publish import check_output

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class PrefixPlan:
    """A prompt in tokens, int64 (1, P), and the model that will read it. ``cache_bytes``: of keys and values, None
    where the config does not say."""

    artifact: Artifact
    tokens: Tensor
    text: str
    template: bool
    recipe: str
    dtype: str
    device: str
    cache_kind: str
    cache_bytes: int | None
    trust_remote_code: bool

    @property
    def length(self) -> int:
        return self.tokens.shape[1]


def plan_prefix(
    model: str,
    prompt: Path,
    *,
    cache_kind: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    checkpoint: str | None = None,
    trust_remote_code: bool = False,
) -> PrefixPlan:
    """Settle everything before weights are read.

    ``dtype`` auto is what eval computes in: float32 on a CPU, the stored type on a GPU. Raises UsageError for a prompt
    that is not text, is empty, or is longer than the model's positions.
    """
    import torch

    from loadstone.loading import load_tokenizer
    from loadstone.loading.plan import DTYPES

    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is not known", f"One of {', '.join(DTYPES)}")
    read = read_prompt(prompt)
    artifact = language_artifact(model) if checkpoint is None else detect(model, checkpoint=checkpoint)
    require_language_model(artifact, model, trust_remote_code=trust_remote_code, by="a prefix")
    tokens, text, template = encode_prompt(
        read, load_tokenizer(artifact, trust_remote_code=trust_remote_code)
    )
    if require_room(load_config(artifact, trust_remote_code), tokens.shape[1]):
        log.warning("%s: %d tokens are more than the model was made for", prompt, tokens.shape[1])
    config = artifact.config | (artifact.config.get("text_config") or {})
    if dtype == "auto":
        on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
        dtype = "float32" if not on_gpu else stored if stored in ("float32", "float16") else "bfloat16"
    kind = check_kind(cache_kind, getattr(torch, dtype))
    return PrefixPlan(
        artifact, tokens, text, template, recipe_of(artifact), dtype, device, kind,
        cache_bytes(config, tokens.shape[1], kind), trust_remote_code,
    )  # fmt: skip


def cache_bytes(config: dict[str, Any], rows: int, kind: str) -> int | None:
    """Bytes of keys and values of ``rows`` tokens, from config.json; scales of quantized ones not counted."""
    layers = config.get("num_hidden_layers") or config.get("n_layer")
    heads = config.get("num_attention_heads") or config.get("n_head")
    width = config.get("hidden_size") or config.get("n_embd")
    if not isinstance(layers, int) or not isinstance(heads, int) or not isinstance(width, int) or heads < 1:
        return None
    size = config.get("head_dim") or width // heads
    per_row = 2 * (config.get("num_key_value_heads") or heads) * size
    bits = QUANTIZED[kind][0] if kind in QUANTIZED else {"float32": 32}.get(kind, 16)
    types = config.get("layer_types") or ["full_attention"] * layers
    window = config.get("sliding_window")
    kept = 0
    for layer_type in types:
        if layer_type == "sliding_attention" and isinstance(window, int):
            kept += min(rows, window - 1)
        elif layer_type == "full_attention":
            kept += rows
    return kept * per_row * bits // 8


def run_prefix(plan: PrefixPlan, out: Path, *, overwrite: bool = False) -> PrefixCache:
    """Load the model, read the prompt and write the prefix; the output appears whole or not at all."""
    check_output(plan.artifact.root, out, overwrite)
    model, tokenizer = load_language_model(
        plan.artifact, device=plan.device, dtype=plan.dtype, trust_remote_code=plan.trust_remote_code
    )
    cache = make_prefix(
        model,
        plan.tokens,
        cache_kind=plan.cache_kind,
        text=plan.text,
        template=plan.template,
        tokenizer=tokenizer,
        share=False,
    )
    save_prefix(cache, out, source=plan.artifact, overwrite=overwrite)
    return cache
