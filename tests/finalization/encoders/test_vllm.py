"""The serving layout in vLLM itself, on its CPU build (`make test-vllm`): log-probabilities, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import TOKENS

import loadstone
from loadstone.artifact.report import collect

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

MIXED = r"""
default: intx4-weight-only
rules:
  - {modules: "re:model\\.layers\\.0\\..*", scheme: skip}
  - {modules: self_attn, scheme: int8-dynamic-act-int8-weight}
"""


def model(directory: Path, dtype: str) -> Path:
    """A Llama whose heads are as wide as vLLM's CPU attention wants them."""
    import transformers

    torch.manual_seed(9)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=128, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(directory)
    return directory


def served(directory: Path, dtype: str) -> torch.Tensor:
    """Log-probabilities of each prompt token after the first, by vLLM; its workers are processes."""
    import vllm

    engine = vllm.LLM(
        str(directory), dtype=dtype, enforce_eager=True, max_model_len=64, skip_tokenizer_init=True,
        max_num_seqs=1, gpu_memory_utilization=0.1,
    )  # fmt: skip
    tokens = TOKENS[0].tolist()
    wanted = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (done,) = engine.generate([{"prompt_token_ids": tokens}], wanted)
    found = [entry[token].logprob for entry, token in zip(done.prompt_logprobs[1:], tokens[1:], strict=True)]
    del engine
    return torch.tensor(found)


def expected(directory: Path, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        scores = loadstone.load(directory, **options)(TOKENS).logits[0, :-1].float().log_softmax(-1)
    return scores.gather(-1, TOKENS[0, 1:, None])[:, 0]


@pytest.mark.parametrize(
    ("recipe", "dtype"),
    [
        # vLLM's CPU kernel for packed integers computes in 16 bits only.
        ("intx4-weight-only", "bfloat16"),
        ("int8-dynamic-act-int8-weight", "bfloat16"),
        ("int8-dynamic-act-int8-weight", "float32"),
        ("mixed", "bfloat16"),
    ],
)
def test_vllm_agrees(recipe: str, dtype: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = model(tmp_path / "source", dtype)
    if recipe == "mixed":
        (tmp_path / "r.yaml").write_text(MIXED)
    asked = tmp_path / "r.yaml" if recipe == "mixed" else recipe
    loadstone.finalize(source, tmp_path / "out", recipe=asked, layout="compressed-tensors")
    # vLLM rounds inputs to int8 where the recipe says so, and the model here does not.
    change = (served(tmp_path / "out", dtype) - expected(tmp_path / "out")).abs()
    assert change.mean() < 0.1
    printed = "".join(capfd.readouterr())
    assert ("CPUWNA16LinearKernel" in printed) == (recipe != "int8-dynamic-act-int8-weight")


@pytest.mark.parametrize("fault", ["ignore", "split"])
def test_what_vllm_refuses_inspect_refuses_first(fault: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    out = tmp_path / "out"
    source = model(tmp_path / "source", "bfloat16")
    loadstone.finalize(source, out, recipe="intx4-weight-only", layout="compressed-tensors")
    config = json.loads((out / "config.json").read_text())
    if fault == "ignore":
        config["quantization_config"]["ignore"] = []
        state = load_file(out / "model.safetensors")
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
        config["tie_word_embeddings"] = False
    else:
        state = load_file(out / "model.safetensors")
        name = "model.layers.0.self_attn.q_proj"
        weight = loadstone.load(out).get_parameter(f"{name}.weight").detach().clone()
        state = {key: value for key, value in state.items() if not key.startswith(name)} | {
            f"{name}.weight": weight
        }
        config["quantization_config"]["ignore"].append(name)
    save_file(state, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    assert collect(out).serving
    if fault == "split":
        with pytest.raises(RuntimeError, match="Engine core initialization failed"):
            served(out, config["dtype"])
