"""The recipe that makes stories: its prompts, its filter, and its sampler against transformers' own generate."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import loadstone
from loadstone.loading import load_tokenizer

STORY = (
    "Once upon a time, there was a little fox named Max. He lived in the forest with his mother. One day he found a "
    "red kite in a tall tree. He wanted to fly it, but it was stuck. His friend Lily came and said, 'I can help you.' "
    "They pulled and pulled until the kite came down. Max was very happy, and he let Lily fly it first. When the sun "
    "went down they walked home together, and his mother gave them warm soup."
)


@pytest.fixture(scope="module")
def stories() -> Any:
    spec = importlib.util.spec_from_file_location(
        "stories", Path(__file__).parents[2] / "recipes" / "stories.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["stories"] = module
    spec.loader.exec_module(module)
    return module


def test_prompts_follow_the_seed_and_fall_on_one_side(stories: Any) -> None:
    first, again, other = (list(itertools.islice(stories.requests(seed), 3000)) for seed in (1, 1, 2))
    assert first == again and first != other
    assert not any("{" in r.prompt + r.opening for r in first)
    share = sum(stories.held_out(r.prompt) for r in first) / len(first)
    assert 0.06 < share < 0.11


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (STORY, None),
        ("A fox ran.", "length"),
        ("Zorp blik frun dax. " * 20, "not English"),
        (STORY + " As an AI language model, I cannot say more.", "not a story"),
        (STORY + " And then he", "not a story"),
        (STORY + " He was happy and he was glad." * 9, "repeats itself"),
    ],
)
def test_filter(stories: Any, text: str, reason: str | None) -> None:
    kept, why, grams = stories.judge((text, True))
    assert why == reason and bool(grams) == (reason is None)
    assert kept == text.strip()


def test_a_story_cut_short_ends_with_a_sentence(stories: Any) -> None:
    assert stories.clean("\u201cHi,\u201d said Max.  He ran. Then he w", False) == '"Hi," said Max. He ran.'


def test_sampler_writes_what_generate_writes(stories: Any) -> None:
    model = loadstone.load("builtin:tiny-llama", dtype="float32")
    tokenizer = load_tokenizer("builtin:tiny-llama")
    requests = list(itertools.islice(stories.requests(3), 5))
    options = argparse.Namespace(
        slots=2, length=190, every=3, temperature=1.0, min_p=1.0, repetition_penalty=1.0, seed=0
    )
    sampler = stories.Sampler(model, tokenizer, options, torch.device("cpu"))
    found = list(sampler.run(iter(requests * 40), stories=5))
    model.set_attn_implementation("sdpa")
    assert len(found) >= 5
    for request, text, _ in found:
        start = f"{stories.PREFIX}{request.prompt}<|im_end|>\n<|im_start|>assistant\n{request.opening}"
        ids = torch.tensor([tokenizer(start, add_special_tokens=False)["input_ids"]])
        plain = model.generate(ids, max_length=190, do_sample=False, pad_token_id=0)
        expected = tokenizer.decode(plain[0]).partition("<|im_start|>assistant\n")[2]
        assert text == expected.removesuffix(tokenizer.eos_token)
