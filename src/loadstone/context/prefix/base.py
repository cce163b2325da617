"""The language model that a prefix belongs to: what is recorded of it, and finding it again."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from loadstone.artifact.detect import CONTEXT, FAKEQUANT, PFN, detect
from loadstone.errors import LoadstoneError, UsageError

if TYPE_CHECKING:
    from loadstone.artifact import Artifact

log = logging.getLogger(__name__)

# What says nothing about what a model computes.
_FREE_KEYS = frozenset({
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache",
    "quantization_config", "bos_token_id", "eos_token_id", "pad_token_id", "attn_implementation",
    "_attn_implementation", "loadstone_qat", "id2label", "label2id", "return_dict", "output_attentions",
    "output_hidden_states", "chunk_size_feed_forward", "problem_type", "is_encoder_decoder", "initializer_range",
})  # fmt: skip
_LOADED: WeakValueDictionary[tuple[Any, ...], Any] = WeakValueDictionary()
_LOCK = threading.Lock()


def language_artifact(path: str | Path) -> Artifact:
    """The artifact of a causal language model; raises `UsageError` for a context or an in-context model."""
    artifact = detect(path)
    if artifact.kind in (CONTEXT, PFN):
        raise UsageError(
            f"'{path}' is {'a context' if artifact.kind == CONTEXT else 'an in-context model (PFN)'}, and a prefix "
            "is made with a language model",
            "Name a language model's directory with -M",
        )
    return artifact


def load_language_model(
    artifact: Artifact, *, device: str, dtype: str, trust_remote_code: bool = False
) -> tuple[Any, Any]:
    """Model and tokenizer; asked for again, the same model while somebody holds it."""
    from loadstone.loading import load, load_tokenizer, plan

    files = artifact.weight_files
    paths = [artifact.config_dir / "config.json", *(artifact.path / file for file in files)]
    changed = tuple(path.stat().st_mtime_ns for path in paths)
    key = (artifact.path.resolve(), changed, device, dtype)
    with _LOCK:
        model = _LOADED.get(key)
        if model is None:
            chosen = plan(artifact, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
            model = load(chosen)
            apply_quantizers(model, artifact)
            _LOADED[key] = model
    return model, load_tokenizer(artifact, trust_remote_code=trust_remote_code)


def apply_quantizers(model: Any, artifact: Artifact) -> None:
    """Turn on a fake-quant export's quantizers of inputs, keys and values: a prefix is what they make of it."""
    if artifact.kind == FAKEQUANT:
        from loadstone.fakequant.inputs import apply_export

        apply_export(model, artifact)


def recipe_of(artifact: Artifact) -> str:
    """How a model's weights are quantized, in loadstone's spelling where it has one; ``none`` for plain weights."""
    flat = artifact.quantized
    if not flat:
        return artifact.quant_method or (FAKEQUANT if artifact.kind == FAKEQUANT else "none")
    samples = {(t.type, t.metadata or str(t.attributes)): t for t in flat.values()}.values()
    try:
        from loadstone.quantization.schemes import recipe_for, spell
        from loadstone.quantization.torchao_config import scheme_of

        return " + ".join(sorted({spell(recipe_for(scheme_of(tensor))) for tensor in samples}))
    except (LoadstoneError, LookupError, TypeError, ValueError):
        return " + ".join(sorted({tensor.type for tensor in samples}))


def architecture_of(config: Any) -> dict[str, Any]:
    """What of a transformers config decides about a model's arithmetic, in plain JSON."""
    found = {key: value for key, value in config.to_dict().items() if key not in _FREE_KEYS}
    plain: dict[str, Any] = json.loads(json.dumps(found, default=str))
    return plain


def tokenizer_facts(tokenizer: Any) -> dict[str, Any]:
    """Digests of a tokenizer and its chat template, and enough to recognise it by."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content: Any = sorted(tokenizer.get_vocab().items())
    else:
        content = json.loads(backend.to_str())
        # What a caller sets for a batch, and no part of what the tokenizer is.
        content.pop("padding", None)
        content.pop("truncation", None)
    template = getattr(tokenizer, "chat_template", None)
    return {
        "class": type(tokenizer).__name__.removesuffix("Fast"),
        "tokens": len(tokenizer),
        "sha256": _sha256(content),
        "chat_template_sha256": None if template is None else _sha256(template),
    }


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
