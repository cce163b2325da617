from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loadstone.errors import UsageError
from loadstone.evaluation.options import Options
from loadstone.evaluation.run import run
from loadstone.evaluation.scoring.compiling import compile_layers, compiling_pays, decoder_layers
from loadstone.evaluation.scoring.head import split_head
from loadstone.evaluation.scoring.losses import compiled_losses, token_losses
from loadstone.loading import plan


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "qwen3_moe"])
def test_finds_the_decoder_layers(model_factory: Any, family: str) -> None:
    model = model_factory(family=family)
    layers = decoder_layers(model)
    assert len(layers) == 2 and all(hasattr(x, "mlp") for x in layers)


def test_no_layers() -> None:
    assert compile_layers(torch.nn.Sequential(torch.nn.Linear(2, 2))) == 0


def test_long_texts_and_large_models_are_compiled(
    model_factory: Any, save_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    small = plan(save_model(model_factory(), tokenizer, tmp_path / "llama"))
    assert not compiling_pays([small], 10_000_000)
    assert compiling_pays([small], 10**14) and compiling_pays([small, small], 10**14)
    # transformers says of the class that its layers do not compile as one graph.
    config = MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=8)
    other = plan(save_model(MambaForCausalLM(config), tokenizer, tmp_path / "mamba"))
    assert not compiling_pays([small, other], 10**14)


def test_results_of_the_other_mode_are_no_baseline(model_dir: Path, tmp_path: Path) -> None:
    result = run(Options((str(model_dir),), limit=2))
    assert result.protocol["compiled"] is False
    records = [{**record, "reference": False} for record in result.records]
    file = tmp_path / "compiled.json"
    file.write_text(json.dumps({"protocol": {**result.protocol, "compiled": True}, "models": records}))
    with pytest.raises(UsageError, match="compiled False against True"):
        run(Options((str(model_dir),), limit=2, baseline=str(file), compile=False))


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


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
            ],
        ),
    ],
)
def test_one_graph_of_losses_serves_all_numbers_of_rows(device: str) -> None:
    counters = torch._dynamo.utils.counters
    counters.clear()
    for rows in (50, 37, 64):
        logits = 9 * torch.randn(rows, 1000, device=device).bfloat16()
        targets = torch.randint(0, 1000, (rows,), device=device)
        with torch.inference_mode():
            found = compiled_losses()(logits, targets)
        expected = token_losses(logits.double(), targets).float()
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 1


def test_split_models_know_whether_they_are_compiled(model_factory: Any) -> None:
    model = model_factory(num_hidden_layers=2)
    assert not split_head(model).compiled
    compile_layers(model)
    assert split_head(model).compiled
