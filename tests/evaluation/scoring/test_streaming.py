from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import loadstone
from loadstone.errors import ArtifactError, UsageError
from loadstone.evaluation.loaded import choose_streaming
from loadstone.evaluation.models import plan_models
from loadstone.evaluation.options import Options
from loadstone.evaluation.result import Evaluation
from loadstone.evaluation.run import run
from loadstone.finalization.plan import make_plan
from loadstone.finalization.run import write_plan
from loadstone.loading.streamed import StreamedModel
from loadstone.quantization import parse_recipe


def losses(outcome: Evaluation) -> list[np.ndarray]:
    return [v for values in outcome.values.values() for v in values.values()]


@pytest.fixture(scope="module")
def quantize(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], Path]:
    def make(source: Path, recipe: str) -> Path:
        out: Path = tmp_path_factory.mktemp("q") / "out"
        write_plan(make_plan(loadstone.detect(source), parse_recipe(recipe)), out)
        tokenizer.save_pretrained(out)
        return out

    return make


@pytest.mark.parametrize(
    "recipe", ["int8-dynamic-act-int4-weight", "int8-dynamic-act-int8-weight", "int8-weight-only"]
)
@pytest.mark.parametrize("fast", [True, False])
def test_divergence_is_that_of_resident_models(
    model_dir: Path, quantize: Callable[[Path, str], Path], recipe: str, fast: bool
) -> None:
    options = Options(
        (str(model_dir), str(quantize(model_dir, recipe))), limit=4, batch_size=3, divergence=True, fast=fast
    )
    resident, streamed = (run(replace(options, stream=on)) for on in (False, True))
    for a, b in zip(losses(resident), losses(streamed), strict=True):
        assert np.array_equal(a, b)
    for a, b in zip(resident.records, streamed.records, strict=True):
        for name in ("loss", "dequantized_linears", "repacked_linears", "parameters", "batch_size"):
            assert a[name] == b[name], name
    assert streamed.records[1]["kl"] > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "granite", "qwen3_moe"])
def test_families(model_factory: Any, save_model: Any, tokenizer: Any, tmp_path: Path, family: str) -> None:
    model = model_factory(family=family, **({"num_hidden_layers": 3} if family != "gpt2" else {}))
    options = Options((str(save_model(model, tokenizer, tmp_path / "m")),), limit=3, batch_size=2)
    resident, streamed = (run(replace(options, stream=on)) for on in (False, True))
    assert np.array_equal(losses(resident)[0], losses(streamed)[0])


def test_two_layers_at_most_and_each_read_once_a_round(
    model_factory: Any, save_model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_model(model_factory(num_hidden_layers=6), tokenizer, tmp_path / "m")
    read: list[int] = []
    alive: list[int] = []
    most: list[int] = []
    real = StreamedModel.layer

    def layer(self: StreamedModel, index: int) -> torch.nn.Module:
        import weakref

        read.append(index)
        result = real(self, index)
        alive.append(index)
        weakref.finalize(result, alive.remove, index)
        most.append(len(alive))
        assert all(p.device.type == "meta" for p in self.stack.parameters())
        return result

    monkeypatch.setattr(StreamedModel, "layer", layer)
    options = Options((str(path),), limit=6, batch_size=2, stream=True)
    whole = run(options)
    # The first is read once before, to see what kind of output the layers have.
    assert read == [0, *range(6)] and max(most) <= 2
    # With room for the states of two batches only, there are more rounds, to the same bits.
    read.clear()
    hidden_bytes = 2 * 128 * 32 * 4
    monkeypatch.setattr(
        "loadstone.evaluation.scoring.streaming.free_bytes", lambda device: 4 * 2 * hidden_bytes
    )
    rounds = run(options)
    assert len(read) > 7 and read[:13] == [0, *range(6), *range(6)]
    assert np.array_equal(losses(whole)[0], losses(rounds)[0])


def test_chosen_when_memory_is_short(
    model_dir: Path, worse_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "loadstone")
    size = (model_dir / "model.safetensors").stat().st_size
    for free, kl, streams in (
        (4 * size, True, False),
        (2 * size, True, True),
        (2 * size, False, False),
        (size, False, True),
    ):
        monkeypatch.setattr(
            "loadstone.evaluation.scoring.streaming.free_bytes", lambda device, free=free: free
        )
        options = Options((str(model_dir), str(worse_dir)), divergence=kl, device="cpu")
        assert choose_streaming(plan_models(options, "cpu"), options) is streams
        assert choose_streaming(plan_models(options, "cpu"), replace(options, stream=False)) is False
    # Four processes of one machine hold four copies.
    monkeypatch.setattr("loadstone.evaluation.scoring.streaming.free_bytes", lambda device: 4 * size)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert choose_streaming(plan_models(options, "cpu"), options)
    assert "model and reference do not fit in memory: streaming layer by layer" in caplog.text


def test_damaged_weights(model_dir: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(model_dir, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    whole = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    options = Options((str(tmp_path / "m"),), limit=1, stream=True)
    for change, message in (
        (lambda t: t.pop(name), "is missing"),
        (lambda t: t.update({name: t[name][:3].clone()}), "has shape"),
        (lambda t: t.update({"model.layers.1.extra.weight": t[name].clone()}), "is not part of"),
        (lambda t: t[name].fill_(float("nan")), "not finite|NaN"),
        (lambda t: t.pop("model.norm.weight"), "is missing"),
    ):
        tensors = {k: v.clone() for k, v in whole.items()}
        change(tensors)
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(ArtifactError, match=message):
            run(options)


def test_what_cannot_be_streamed_is_refused(model_dir: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(model_dir, tmp_path / "m")
    torch.save(load_file(tmp_path / "m" / "model.safetensors"), tmp_path / "m" / "pytorch_model.bin")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="--stream"):
        run(Options((str(tmp_path / "m"),), limit=1, stream=True))


OTHERS: dict[str, dict[str, Any]] = {
    "Bloom": {"n_layer": 3, "n_head": 4},
    "OPT": {"ffn_dim": 64, "word_embed_proj_dim": 16, "num_hidden_layers": 3},
    "GPTJ": {"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4, "n_positions": 128},
    # Its layers hand a state to the next one.
    "Rwkv": {"attention_hidden_size": 32, "num_hidden_layers": 3},
    "FalconH1": {
        "num_hidden_layers": 3, "num_key_value_heads": 2, "mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8,
        "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16, "head_dim": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_outputs_and_roots_of_other_kinds(save_model: Any, tokenizer: Any, tmp_path: Path, name: str) -> None:
    """Tuples as outputs, states handed from layer to layer, decoders inside the base model, several masks."""
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    sizes |= {"max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0}
    sizes["initializer_range"] = 0.2
    config = getattr(transformers, f"{name}Config")(**(sizes | OTHERS[name]))
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    options = Options((str(save_model(model, tokenizer, tmp_path / "m")),), limit=3, batch_size=2)
    for fast in (True, False):
        resident, streamed = (run(replace(options, stream=on, fast=fast)) for on in (False, True))
        assert np.array_equal(losses(resident)[0], losses(streamed)[0])


def test_forwards_that_do_more_than_call_the_layers(
    model_factory: Any, save_model: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_factory(num_hidden_layers=3)
    path = save_model(model, tokenizer, tmp_path / "m")
    real = type(model.model).forward

    def doubled(self: Any, *args: Any, **kwargs: Any) -> Any:
        hook = self.layers[1].register_forward_pre_hook(lambda module, given: (given[0] * 2, *given[1:]))
        try:
            return real(self, *args, **kwargs)
        finally:
            hook.remove()

    monkeypatch.setattr(type(model.model), "forward", doubled)
    with pytest.raises(UsageError, match=r"--stream.*computes something between them"):
        run(Options((str(path),), limit=1, stream=True))
