"""The main job on a real trained model: one set of logits, however the artifact is loaded."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import loadstone
from loadstone.quantization import RECIPES, to_torchao

ON_CPU = [name for name, recipe in RECIPES.items() if "cpu" in recipe.devices]
TEXT = (
    "The trained model was quantized, saved, and loaded again. Its answers must not change by a single bit."
)

# Runs in a process of its own, which imports transformers and never loadstone.
STOCK = """
import json, sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
jobs, out = json.loads(sys.argv[1]), sys.argv[2]
logits = {}
for name, path in jobs.items():
    model = AutoModelForCausalLM.from_pretrained(path)
    tokens = AutoTokenizer.from_pretrained(path)(sys.argv[3], return_tensors="pt").input_ids
    with torch.inference_mode():
        logits[name] = model(tokens).logits
assert "loadstone" not in sys.modules
save_file(logits, out)
"""


@pytest.fixture(scope="module")
def stock_logits(
    smollm2: Path, quantize_to: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    jobs = {name: str(quantize_to(smollm2, name)) for name in ON_CPU}
    out = tmp_path_factory.mktemp("stock") / "logits.safetensors"
    subprocess.run(
        [sys.executable, "-c", STOCK, json.dumps(jobs), str(out), TEXT], check=True, capture_output=True
    )
    return load_file(out)


@pytest.mark.parametrize("recipe", ON_CPU)
def test_memory_loadstone_and_stock_agree_in_every_bit(
    smollm2: Path, quantize_to: Callable[..., Path], stock_logits: dict[str, torch.Tensor], recipe: str
) -> None:
    from torchao.quantization import quantize_

    path = quantize_to(smollm2, recipe)
    tokens = loadstone.loading.load_tokenizer(path)(TEXT, return_tensors="pt").input_ids
    in_memory = loadstone.load(smollm2)
    quantize_(in_memory.model, to_torchao(RECIPES[recipe].scheme))
    with torch.inference_mode():
        expected = in_memory(tokens).logits
        assert torch.equal(loadstone.load(path)(tokens).logits, expected)
    assert torch.equal(stock_logits[recipe], expected)
    assert expected.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("recipe", ["int8-dynamic-act-int4-weight", "int8-dynamic-act-int8-weight"])
def test_fast_evaluation_rounds_activations_to_the_same_levels(
    smollm2: Path, quantize_to: Callable[..., Path], recipe: str, threads: int
) -> None:
    """Where activations are rounded, a last digit would grow to a whole level: hidden states must be equal in
    every bit to those of torchao's own arithmetic, in batches of any shape."""
    from loadstone.evaluation.fast.replace import speed_up

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        path = quantize_to(smollm2, recipe)
        plain, fast = (loadstone.load(path, dtype="float32") for _ in range(2))
        speed_up(fast)
        generator = torch.Generator().manual_seed(1)
        for shape in ((1, 40), (3, 77), (2, 512)):
            tokens = torch.randint(0, 40000, shape, generator=generator)
            with torch.no_grad():
                expected, got = (m.model(tokens, use_cache=False).last_hidden_state for m in (plain, fast))
            assert torch.equal(got, expected), shape
    finally:
        torch.set_num_threads(before)
