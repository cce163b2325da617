"""The vLLM worker: on stand-ins here, on vLLM itself where it is (`make test-vllm`, its own virtual environment)."""

from __future__ import annotations

import importlib
import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.fakequant.conftest import TOKENS, load

import loadstone
from loadstone import export_fakequant
from loadstone.errors import ArtifactError, UsageError
from loadstone.fakequant.formats.fold import fold_input
from loadstone.fakequant.inputs import apply_export
from loadstone.fakequant.state import QuantizerState
from loadstone.fakequant.vllm_inputs import apply_to_vllm


class Recorder(torch.nn.Module):
    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return args


def merged_model() -> Any:
    model = torch.nn.Module()
    attention = torch.nn.Module()
    attention.qkv_proj, attention.o_proj, attention.attn = Recorder(), Recorder(), Recorder()
    model.self_attn = attention
    model.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    return model


def state(**specs: str) -> QuantizerState:
    named = {f"self_attn.{name}": spec for name, spec in specs.items()}
    names = {
        n.removesuffix("_in") + ".input_quantizer" if n.endswith("_in") else n: s for n, s in named.items()
    }
    return QuantizerState(names, {f"{n}.amax": torch.tensor(float(i + 1)) for i, n in enumerate(names)})


def test_merged_layers_take_the_largest_range() -> None:
    model, x = merged_model(), torch.randn(4, 32)
    specs = state(q_proj_in="fp8", k_proj_in="fp8", v_proj_in="fp8", o_proj_in="mxfp8", k_bmm_quantizer="fp8")
    assert apply_to_vllm(model, specs) == 3
    assert torch.equal(model.self_attn.qkv_proj(x)[0], fold_input(x, "fp8", torch.tensor(3.0)))
    assert torch.equal(model.self_attn.o_proj(x, x)[0], fold_input(x, "mxfp8", None))
    query, key, value = model.self_attn.attn(x, x, x)
    assert torch.equal(query, x) and torch.equal(value, x)
    assert torch.equal(key, fold_input(x, "fp8", torch.tensor(5.0)))


def test_what_vllm_cannot_do_is_said() -> None:
    with pytest.raises(ArtifactError, match=r"'self_attn\.qkv_proj' is one layer in vLLM"):
        apply_to_vllm(merged_model(), state(q_proj_in="fp8", k_proj_in="int8"))
    with pytest.raises(
        ArtifactError, match=r"down_proj_input_quantizer': vLLM computes experts in one kernel"
    ):
        apply_to_vllm(merged_model(), state(down_proj_input_quantizer="fp8"))
    with pytest.raises(ArtifactError, match=r"finds no layer 'self_attn\.up_proj'"):
        apply_to_vllm(merged_model(), state(up_proj_in="fp8"))
    with pytest.raises(UsageError, match="cannot be divided among 2 ranks"):
        apply_to_vllm(merged_model(), state(o_proj_in="fp8-token"), tensor_parallel=2)


def test_parts_of_a_merged_layer_smooth_alike() -> None:
    found, x = state(q_proj_in="fp8", k_proj_in="fp8"), torch.randn(4, 32)
    scale = torch.rand(32) + 0.5
    for part in "qk":
        found.tensors[f"self_attn.{part}_proj.input_quantizer.pre_quant_scale"] = scale.clone()
    model = merged_model()
    apply_to_vllm(model, found)
    assert torch.equal(model.self_attn.qkv_proj(x)[0], fold_input(x * scale, "fp8", torch.tensor(2.0)))
    found.tensors["self_attn.k_proj.input_quantizer.pre_quant_scale"][3] += 1
    with pytest.raises(ArtifactError, match=r"qkv_proj' is one layer in vLLM and its parts smooth"):
        apply_to_vllm(merged_model(), found)
    del found.tensors["self_attn.k_proj.input_quantizer.pre_quant_scale"]
    with pytest.raises(ArtifactError, match=r"qkv_proj' is one layer in vLLM and its parts smooth"):
        apply_to_vllm(merged_model(), found)


def test_warm_up_returns_what_the_parent_returns(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = object()

    class Base:
        def compile_or_warm_up_model(self) -> object:
            return times

    stand_in: dict[str, Any] = {
        name: types.ModuleType(name) for name in ("vllm", "vllm.platforms", "vllm.v1")
    }
    stand_in["vllm.v1.worker"] = types.ModuleType("vllm.v1.worker")
    stand_in["vllm.v1.worker.cpu_worker"] = types.ModuleType("vllm.v1.worker.cpu_worker")
    stand_in["vllm.platforms"].current_platform = types.SimpleNamespace(is_cpu=lambda: True)
    stand_in["vllm.v1.worker.cpu_worker"].CPUWorker = Base
    for name, module in stand_in.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "loadstone.fakequant.vllm_worker", raising=False)
    worker = importlib.import_module("loadstone.fakequant.vllm_worker").FakeQuantWorker()
    monkeypatch.delitem(sys.modules, "loadstone.fakequant.vllm_worker")
    export_fakequant(tiny, tmp_path / "out", format="mxfp8")
    model_config = types.SimpleNamespace(enforce_eager=True, model=str(tmp_path / "out"))
    parallel = types.SimpleNamespace(tensor_parallel_size=1)
    worker.vllm_config = types.SimpleNamespace(model_config=model_config, parallel_config=parallel)
    worker.model_runner = types.SimpleNamespace(model=merged_model())
    assert worker.compile_or_warm_up_model() is times
    model_config.enforce_eager = False
    with pytest.raises(UsageError, match="--enforce-eager"):
        worker.compile_or_warm_up_model()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 Llama whose heads are as wide as vLLM's CPU attention wants them."""
    import transformers

    torch.manual_seed(9)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("served") / "model"
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return directory


def served(directory: Path, **options: Any) -> torch.Tensor:
    """Log-probabilities of each prompt token after the first, by vLLM in float32; its workers are processes."""
    import vllm

    engine = vllm.LLM(
        str(directory), dtype="float32", enforce_eager=True, max_model_len=64, skip_tokenizer_init=True,
        max_num_seqs=1, gpu_memory_utilization=0.1, **options,
    )  # fmt: skip
    prompt = {"prompt_token_ids": TOKENS[0].tolist()}
    wanted = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (done,) = engine.generate([prompt], wanted)
    tokens = TOKENS[0].tolist()
    found = [entry[token].logprob for entry, token in zip(done.prompt_logprobs[1:], tokens[1:], strict=True)]
    del engine
    return torch.tensor(found)


def expected(directory: Path, *, inputs: bool) -> torch.Tensor:
    model = load(directory, dtype=torch.float32)
    if inputs:
        apply_export(model, loadstone.detect(directory))
    with torch.no_grad():
        scores = model(TOKENS).logits[0, :-1].log_softmax(-1)
    return scores.gather(-1, TOKENS[0, 1:, None])[:, 0]


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_served_by_vllm(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export_fakequant(source, out, format="fp8", calibrate=[TOKENS])
    weights = served(out)
    assert (weights - expected(out, inputs=False)).abs().max() < 1e-3
    both = served(out, worker_cls="loadstone.fakequant.vllm_worker.FakeQuantWorker")
    assert (both - weights).abs().max() > 5e-3
    assert (both - expected(out, inputs=True)).abs().max() < 1e-3


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_an_untied_export_is_served(source: Path, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(10)
    config = transformers.AutoConfig.from_pretrained(source, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    rules = tmp_path / "rules.yaml"
    rules.write_text("format: fp8\nrules: [{match: lm_head, format: int8}]")
    out = tmp_path / "out"
    export_fakequant(tmp_path / "tied", out, rules=rules, untie=True)
    assert (served(out) - expected(out, inputs=False)).abs().max() < 1e-3


@pytest.mark.vllm
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", ["leaked", "stale"])
def test_vllm_refuses_what_an_export_never_holds(
    fault: str, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    export_fakequant(source, out, format="fp8")
    leak = {"model.layers.0.mlp.up_proj.input_quantizer._amax": torch.ones(1)}
    save_file(leak, out / "model-00002-of-00002.safetensors", metadata={"format": "pt"})
    path = out / "model.safetensors.index.json"
    if fault == "leaked":
        index = json.loads(path.read_text())
        index["weight_map"] |= dict.fromkeys(leak, "model-00002-of-00002.safetensors")
        path.write_text(json.dumps(index))
    else:
        path.unlink()
    with pytest.raises(RuntimeError, match="Engine core initialization failed"):
        served(out)
    # The reason is in what the worker's process printed; the class differs between vLLM's kinds of layers.
    printed = "".join(capfd.readouterr())
    assert re.search(r"(ValueError|AttributeError|KeyError): .*input_quantizer", printed)
