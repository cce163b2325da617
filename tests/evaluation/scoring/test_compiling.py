from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from loadstone.evaluation.scoring.compiling import compile_layers, decoder_layers


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_finds_the_decoder_layers(model_factory: Any, family: str) -> None:
    model = model_factory(family=family)
    layers = decoder_layers(model)
    assert len(layers) == 2 and all(hasattr(x, "mlp") for x in layers)


def test_no_layers() -> None:
    assert compile_layers(torch.nn.Sequential(torch.nn.Linear(2, 2))) == 0


@pytest.mark.slow
def test_one_graph_serves_all_layers_and_agrees(model_factory: Any) -> None:
    model = model_factory(num_hidden_layers=4)
    compiled = copy.deepcopy(model)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    assert compile_layers(compiled) == 4
    ids = torch.randint(0, 400, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, got = (m(input_ids=ids, use_cache=False).logits for m in (model, compiled))
    assert torch.allclose(got, expected, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1
