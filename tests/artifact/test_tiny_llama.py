"""The language model inside the package: it loads, it writes, and it was not trained on what it is measured with."""

from __future__ import annotations

import pytest
import torch

import loadstone
from loadstone.artifact.builtin import builtin_names, builtin_path
from loadstone.errors import UsageError
from loadstone.loading import load_tokenizer
from loadstone.text.corpus import read_corpus

NAME = "builtin:tiny-llama"


def test_it_is_found_by_name() -> None:
    assert {"tiny-llama", "tiny-pfn"} <= set(builtin_names())
    with pytest.raises(UsageError, match="tiny-llama"):
        builtin_path("builtin:big-llama")


def test_it_is_what_stock_transformers_loads() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours, stock = loadstone.load(NAME), AutoModelForCausalLM.from_pretrained(builtin_path(NAME))
    assert sum(p.numel() for p in ours.parameters()) == 4_434_176 and ours.dtype == torch.bfloat16
    text = read_corpus().documents[0]
    ids = load_tokenizer(NAME)(text, return_tensors="pt")["input_ids"]
    assert torch.equal(
        ids, AutoTokenizer.from_pretrained(builtin_path(NAME))(text, return_tensors="pt")["input_ids"]
    )
    assert load_tokenizer(NAME).decode(ids[0]) == text
    with torch.inference_mode():
        assert torch.equal(ours(ids).logits, stock(ids).logits)


def test_it_knows_stories_and_ends_them() -> None:
    model, tokenizer = loadstone.load(NAME, dtype="float32"), load_tokenizer(NAME)
    losses = []
    for document in read_corpus(limit=24).documents:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(document)["input_ids"]]])
        with torch.inference_mode():
            losses.append(float(model(ids, labels=ids).loss))
    # 2.17 on all held-out stories (docs/three-way.md); an untrained model has log(4000) = 8.3.
    assert 1.9 < sum(losses) / len(losses) < 2.4
    torch.manual_seed(0)
    start = torch.tensor([[tokenizer.bos_token_id, *tokenizer("Once upon a time,")["input_ids"]]]).expand(
        8, -1
    )
    out = model.generate(start, max_new_tokens=400, do_sample=True, temperature=0.8, pad_token_id=0)
    assert (out[:, 1:] == tokenizer.eos_token_id).any(1).sum() >= 4
