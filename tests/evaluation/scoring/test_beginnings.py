"""Sharing what documents begin with is an optimisation: where it cannot be right, documents are read whole."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from loadstone.evaluation.options import Options
from loadstone.evaluation.run import run
from loadstone.evaluation.scoring.beginnings import Beginnings

SIZES: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "bos_token_id": None,
    "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}


@pytest.fixture
def alike(tmp_path: Path) -> str:
    from loadstone.text.corpus import read_corpus

    text = " ".join(read_corpus(limit=4).documents)
    rows = [text[:900] + " " + text[1000 + i * 70 : 1010 + i * 90] for i in range(8)]
    file = tmp_path / "alike.jsonl"
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize(
    ("name", "changes", "shares"),
    [
        # Its forward calls the decoder, not the base model.
        ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 32}, True),
        # Its layers keep states of a kind that no prefix holds.
        ("FalconH1", {**MAMBA, "mamba_d_ssm": 64, "head_dim": 8}, False),
    ],
)
def test_documents_that_begin_alike(
    save_model: Any, tokenizer: Any, tmp_path: Path, alike: str, caplog: pytest.LogCaptureFixture,
    name: str, changes: dict[str, Any], shares: bool,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**(SIZES | changes))
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    path = str(save_model(model, tokenizer, tmp_path / "m"))
    options = Options((path,), data=alike, protocol="rolling", context_length=500)
    with caplog.at_level(logging.INFO, logger="loadstone"):
        fast = run(options).values[path]["nll"]
    assert ("common prefix of" in caplog.text) == shares
    assert ("read whole" in caplog.text) != shares
    plain = run(replace(options, fast=False)).values[path]["nll"]
    assert np.abs(fast - plain).max() < 1e-4


def test_a_continuation_that_is_wrong(model_factory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose cached keys are not those of one pass is found by its logits."""
    model = model_factory()
    ids = torch.arange(40).tolist()
    right = Beginnings(model)
    assert right.read(ids[:30], ids[30:]) is not None and right.works
    real = type(model.model).forward

    def forgetful(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length():
            kwargs["position_ids"] = torch.zeros_like(kwargs["input_ids"])
        return real(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", forgetful)
    wrong = Beginnings(model)
    assert wrong.read(ids[:30], ids[30:]) is None and not wrong.works
