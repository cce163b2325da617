"""A format's own kernels, where its package and GPU are: logits of decoded weights, within the kernel's rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests import packed

import loadstone
from loadstone.errors import MissingError

# Largest difference of logits, as a share of the largest logit. AWQ's kernel multiplies in float16, bitsandbytes' for
# CPUs in bfloat16, factors included; LLM.int8() and FP8 round their inputs to 8 bits.
CASES: dict[str, tuple[Callable[[Path, Path], Path], float]] = {
    "gptq": (packed.gptq, 1e-4),
    "gptq 8 bits": (lambda source, out: packed.gptq(source, out, bits=8, sym=False), 1e-4),
    "gptq reordered": (lambda source, out: packed.gptq(source, out, desc_act=True), 1e-4),
    "awq": (packed.awq, 0.01),
    "nf4": (packed.nf4, 0.06),
    "llm.int8": (packed.llm_int8, 0.1),
    "fp8": (packed.fp8, 0.1),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed.save_model("llama", tmp_path_factory.mktemp("plain") / "model", torch.float16)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("name", CASES)
def test_kernels_give_what_decoded_weights_give(
    name: str, device: str, plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, most = CASES[name]
    source = write(plain, tmp_path / "packed")
    dtype = "float16" if device == "cuda" and name == "awq" else "float32"
    if name == "fp8":
        dtype = "bfloat16"
    try:
        model = loadstone.load(source, device=device, dtype=dtype, native_kernels=True)
    except MissingError as error:
        pytest.skip(str(error))
    assert capsys.readouterr().out == ""
    assert model.get_input_embeddings().weight.dtype == getattr(torch, dtype)
    tokens = torch.arange(3, 67, device=device)[None]
    with torch.no_grad():
        expected = loadstone.load(source, device=device, dtype=dtype)(tokens).logits.float()
        found = model(tokens).logits.float()
    assert (found - expected).abs().max() <= most * expected.abs().max()
