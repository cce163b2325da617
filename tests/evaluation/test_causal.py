"""eval asks first whether a model predicts next tokens from the tokens before them, and knows the text's tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from loadstone.errors import ArtifactError, UsageError
from loadstone.evaluation.options import Options
from loadstone.evaluation.run import run

SIZES: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}


def make(name: str, config: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    settings = getattr(transformers, config)(**(SIZES | changes))
    return getattr(transformers, name)(settings).float().eval()


@pytest.fixture
def saved(save_model: Any, tokenizer: Any, tmp_path: Path) -> Callable[[Any], str]:
    return lambda model: str(save_model(model, tokenizer, tmp_path / "m"))


@pytest.mark.parametrize(
    ("name", "config", "changes", "why"),
    [
        ("BertForMaskedLM", "BertConfig", {}, "does not predict next tokens"),
        ("LlamaForSequenceClassification", "LlamaConfig", {}, "does not predict next tokens"),
        ("LlamaForTokenClassification", "LlamaConfig", {}, "does not predict next tokens"),
        ("LlamaModel", "LlamaConfig", {}, "stores no output head"),
        ("T5ForConditionalGeneration", "T5Config", T5, "writes an output for an input"),
    ],
)
def test_classes_without_next_token_logits(
    saved: Callable[[Any], str], name: str, config: str, changes: dict[str, Any], why: str
) -> None:
    """Refused before anything is loaded."""
    path = saved(make(name, config, **changes))
    (Path(path) / "model.safetensors").write_bytes(
        (Path(path) / "model.safetensors").read_bytes()[:-8] + b"\xff" * 8
    )
    for options in (Options((path,), limit=1), Options((path,), limit=1, batch_size=1, fast=False)):
        with pytest.raises(UsageError, match=f"{name}, which {why}.*causal language model"):
            run(options)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("name", "config", "changes"),
    [
        ("BertLMHeadModel", "BertConfig", {}),
        ("XLMWithLMHeadModel", "XLMConfig", {"emb_dim": 32, "n_layers": 2, "n_heads": 4}),
    ],
)
def test_bidirectional_attention_shows_in_the_logits(
    saved: Callable[[Any], str], stream: bool, name: str, config: str, changes: dict[str, Any]
) -> None:
    path = saved(make(name, config, **changes))
    why = "no list of decoder layers" if stream and name == "XLMWithLMHeadModel" else "looks at the tokens"
    with pytest.raises((UsageError, ArtifactError), match=why):
        run(Options((path,), limit=1, stream=stream))


def test_the_same_class_as_a_decoder(saved: Callable[[Any], str]) -> None:
    path = saved(make("BertLMHeadModel", "BertConfig", is_decoder=True))
    resident, streamed = (run(Options((path,), limit=2, stream=on)) for on in (False, True))
    assert np.array_equal(resident.values[path]["nll"], streamed.values[path]["nll"])


def test_extras_ask_too(saved: Callable[[Any], str]) -> None:
    path = saved(make("BertLMHeadModel", "BertConfig"))
    with pytest.raises(UsageError, match="looks at the tokens"):
        run(Options((path,), limit=1, speed=True))


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_beyond_the_embedding(
    model_factory: Any, save_model: Any, tokenizer_factory: Any, tmp_path: Path, stream: bool
) -> None:
    tokenizer = tokenizer_factory()
    tokenizer.add_tokens([f"<new{i}>" for i in range(20)])
    path = str(save_model(model_factory(), tokenizer, tmp_path / "m"))
    (tmp_path / "plain.txt").write_text("Once upon a time there was a dog. " * 20)
    (tmp_path / "new.txt").write_text("Once <new3> upon a time there was a dog <new7>. " * 20)
    options = Options((path,), data=str(tmp_path / "plain.txt"), stream=stream)
    # The tokenizer may have more tokens than the model as long as the text does not.
    run(options)
    with pytest.raises(ArtifactError, match=r"token 407 \('<new7>'\).*embedding has 400 tokens"):
        run(replace(options, data=str(tmp_path / "new.txt")))


def test_a_language_model_with_other_parts(save_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Multimodal models read text alone, as their language model does."""
    text = {
        **SIZES,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config={**text, "sliding_window": 8}, vision_config=vision, mm_tokens_per_image=4,
        image_token_index=399, boi_token_index=398, eoi_token_index=397,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).float().eval()
    path = str(save_model(model, tokenizer, tmp_path / "m"))
    losses = [run(Options((path,), limit=3, stream=on)).values[path]["nll"] for on in (False, True)]
    assert np.isfinite(losses[0]).all() and np.array_equal(*losses)
