"""Formats of other quantizers: decoded bit for bit as transformers or the published layout says, and refused where
damaged."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import packed
from tests.helpers import run, stock

import loadstone
import loadstone.loading.packed
from loadstone.errors import ArtifactError, MissingError
from loadstone.loading.decoded import dense_view

FORMATS: dict[str, Callable[[Path, Path], Path]] = {
    "fp8 block": packed.fp8,
    "fp8 tensor": lambda source, out: packed.fp8(source, out, None),
    "mxfp8": packed.mxfp8,
    "fp8 rows": packed.fp8_rows,
    "modelopt fp8": lambda source, out: packed.fp8_rows(source, out, "modelopt"),
    "modelopt nvfp4": packed.nvfp4,
    "gptq": packed.gptq,
    "gptq 8 bits": lambda source, out: packed.gptq(source, out, bits=8, sym=False),
    "gptq reordered": lambda source, out: packed.gptq(source, out, sym=False, desc_act=True),
    "gptq rows, 3 bits": lambda source, out: packed.gptq(source, out, bits=3, group=-1),
    "gptq v2": lambda source, out: packed.gptq(source, out, sym=False, version="gptq_v2"),
    "awq": packed.awq,
    "nf4": packed.nf4,
    "nf4, plain factors": lambda source, out: packed.nf4(source, out, double=False),
    "llm.int8": packed.llm_int8,
}
STOCK = ("fp8 block", "fp8 tensor", "mxfp8")
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a plain model of a family, made once."""
    found: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in found:
            dtype = torch.float16 if family == "llama float16" else torch.bfloat16
            found[family] = packed.save_model(family, tmp_path_factory.mktemp("plain") / "model", dtype)
        return found[family]

    return make


@pytest.fixture(scope="module")
def stored(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``stored(format, family)``: a model in a format, made once; read only."""
    found: dict[tuple[str, str], Path] = {}

    def make(name: str, family: str = "") -> Path:
        family = family or ("llama float16" if name.startswith(("gptq", "awq")) else "llama")
        if (name, family) not in found:
            out = tmp_path_factory.mktemp("packed") / "model"
            found[name, family] = packed.mxfp4(out) if name == "mxfp4" else FORMATS[name](models(family), out)
        return found[name, family]

    return make


def states(directory: Path, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters as loadstone and as stock transformers loads them."""
    asked = {"dtype": options["dtype"]} if options else {}
    ours = loadstone.load(directory, device="cpu", **asked)
    dtype = {"dtype": getattr(torch, options["dtype"])} if options else {}
    return ours.state_dict(), stock(directory, **dtype).state_dict()


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "mixtral"])
@pytest.mark.parametrize("name", STOCK)
def test_fp8_is_what_transformers_dequantizes(
    stored: Callable[..., Path], name: str, family: str, dtype: str
) -> None:
    ours, theirs = states(stored(name, family), dtype=dtype)
    assert_equal(ours, theirs)
    assert {tensor.dtype for tensor in ours.values()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_mxfp4_is_what_transformers_dequantizes(stored: Callable[..., Path], dtype: str) -> None:
    assert_equal(*states(stored("mxfp4"), dtype=dtype))


def test_blocks_that_end_with_the_matrix(stored: Callable[..., Path]) -> None:
    """DeepSeek-V3's latent projections are no multiple of the block: transformers refuses them, its kernels do not."""
    directory = stored("fp8 block", "deepseek-v3")
    tensors, state = (
        load_file(directory / "model.safetensors"),
        loadstone.load(directory, device="cpu").state_dict(),
    )
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert tensors[name].shape == (192, 256)
    assert tensors[name.replace("weight", "weight_scale_inv")].shape == (2, 2)
    for each in (name, "model.layers.1.self_attn.q_b_proj.weight"):
        assert torch.equal(state[each], packed.ragged_values(tensors, each, (128, 128)).bfloat16())


@pytest.mark.parametrize("shape", [(2, 1, 16), (2, 16, 1)])
def test_experts_of_fbgemm_have_a_scale_for_each_output(shape: tuple[int, ...], tmp_path: Path) -> None:
    """Llama 4's, (experts, in, out): scales of gate_up_proj are (experts, 1, out), of down_proj (experts, out, 1)."""
    name, generator = "model.layers.0.feed_forward.experts.down_proj", torch.Generator().manual_seed(0)
    values = torch.randn(2, 16, 16, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(shape, generator=generator) + 0.5
    save_file({name: values, f"{name}_scale": scale}, tmp_path / "model.safetensors", {"format": "pt"})
    config = {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "dtype": "bfloat16"}
    block = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    view = dense_view(loadstone.detect(tmp_path))
    expected = (values.float() * scale.view(2, 1, 16)).bfloat16()
    assert torch.equal(view.source.read(view.tensors[name]), expected)
    assert torch.equal(view.source.read(view.tensors[name], 300, 310), expected.flatten()[300:310])


@pytest.mark.parametrize("experts", ["fp4", "mxfp8", "fp8"])
def test_deepseek_v4_is_what_transformers_dequantizes(experts: str, tmp_path: Path) -> None:
    assert_equal(*states(packed.deepseek_v4(tmp_path, experts)))


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in STOCK])
def test_weights_are_those_of_the_published_layout(stored: Callable[..., Path], name: str) -> None:
    directory = stored(name)
    tensors = load_file(directory / "model.safetensors")
    block = json.loads((directory / "config.json").read_text())["quantization_config"]
    state = loadstone.load(directory, device="cpu").state_dict()
    for module in (UP, "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        weight = f"{module}.weight"
        if block["quant_method"] in ("gptq", "awq"):
            expected = packed.integer_values(tensors, weight, block)
        elif name == "modelopt nvfp4":
            expected = packed.nvfp4_values(tensors, weight)
        elif name.startswith("nf4"):
            expected = packed.nf4_values(tensors, weight)
        elif name == "llm.int8":
            expected = tensors[weight] * tensors[f"{module}.SCB"][:, None] * 7.874015718698502e-3
        else:
            expected = tensors[weight].float() * tensors[f"{module}.weight_scale"]
        assert torch.equal(state[weight], expected.to(state[weight].dtype)), weight


def test_golden_words() -> None:
    """One word of each layout, as published: GPTQ's first input is lowest, AWQ's order is 0 2 4 6 1 3 5 7."""
    values = torch.arange(8)[None]
    assert hex(int(packed._words(values, 4, along=1)[0, 0])) == "0x76543210"
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    assert hex(int(packed._words(values[:, order], 4, along=1)[0, 0])) == "0x75316420"


@pytest.mark.parametrize("name", [*FORMATS, "mxfp4"])
def test_parts_of_a_weight_are_the_whole(stored: Callable[..., Path], name: str) -> None:
    view = dense_view(loadstone.detect(stored(name)))
    state = loadstone.load(stored(name), device="cpu").state_dict()
    assert view.decoded and not view.packed and view.kind == "dense"
    for weight, info in view.tensors.items():
        whole = view.source.read(info)
        assert whole.shape == info.shape and torch.equal(whole, state[weight])
        for start, stop in ((0, 1), (info.numel // 3, info.numel // 2), (info.numel * 3 // 4, info.numel)):
            assert torch.equal(view.source.read(info, start, stop), whole.flatten()[start:stop])


def _dropped(name: str) -> Callable[[packed.Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def _set(name: str, value: float) -> Callable[[packed.Tensors], Any]:
    return lambda tensors: tensors[name].view(-1)[-1:].copy_(torch.tensor([value]))


def _cut(name: str) -> Callable[[packed.Tensors], Any]:
    return lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()})


SCALE_OF = {
    "fp8 block": f"{UP}.weight_scale_inv",
    "fp8 rows": f"{UP}.weight_scale",
    "modelopt nvfp4": f"{UP}.weight_scale_2",
    "gptq": f"{UP}.scales",
    "awq": f"{UP}.scales",
    "mxfp4": "model.layers.0.mlp.experts.gate_up_proj_scales",
    "nf4": f"{UP}.weight.nested_absmax",
    "nf4, plain factors": f"{UP}.weight.absmax",
    "llm.int8": f"{UP}.SCB",
}
DAMAGES: dict[str, Callable[[str], Callable[[packed.Tensors], Any]]] = {
    "missing": _dropped,
    "shape": _cut,
    "zero": lambda name: _set(name, 0),
    "nan": lambda name: _set(name, float("nan")),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", SCALE_OF)
def test_damaged_scales_are_refused_by_name(
    models: Callable[[str], Path], tmp_path: Path, name: str, damage: str
) -> None:
    if (name, damage) in {("mxfp4", "zero"), ("modelopt nvfp4", "shape"), ("modelopt nvfp4", "missing")}:
        pytest.skip("2 ** -127 is a scale; a number has no other shape; without it, the format is another")
    if damage == "zero" and name.startswith(("nf4", "llm")):
        pytest.skip("bitsandbytes' factor of zeros is zero")
    out = tmp_path / "model"
    directory = packed.mxfp4(out) if name == "mxfp4" else FORMATS[name](models("llama"), out)
    scale = SCALE_OF[name]
    edit = DAMAGES[damage](scale)
    if name == "mxfp4" and damage == "nan":
        edit = _set(scale, 255)
    packed.change(directory, edit)
    module = scale.rpartition(".")[0].removesuffix(".weight")
    for work in (
        lambda: loadstone.load(directory, device="cpu"),
        lambda: loadstone.finalize(directory, tmp_path / "out"),
        lambda: loadstone.finalize(directory, tmp_path / "out", recipe="int8-weight-only"),
    ):
        with pytest.raises(ArtifactError, match=module.replace(".", r"\.")):
            work()
    assert not (tmp_path / "out").exists()


def test_the_commands_name_what_is_decoded(
    stored: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = run(capsys, "inspect", stored("fp8 block"))
    assert code == 0 and "FP8 block 128" in out and "native-unpacked" in out
    source, first, second = stored("fp8 block"), tmp_path / "first", tmp_path / "second"
    code, out, _ = run(
        capsys, "finalize", "-M", source, "-o", first, "--quantize", "int8-weight-only", "--dry-run"
    )
    assert code == 0 and "from FP8 block 128" in out
    run(capsys, "finalize", "-M", source, "-o", first, "--quantize", "int8-weight-only")
    assert json.loads((first / "loadstone.json").read_text())["source"]["decoded"] == ["FP8 block 128"]
    run(capsys, "finalize", "-M", first, "-o", second, "--quantize", "intx4-weight-only")
    code, out, _ = run(capsys, "inspect", second)
    assert code == 0 and "FP8 block 128 → int8-weight-only → intx4-weight-only" in out


@pytest.mark.parametrize(
    "name, needs", [("fp8 block", "kernels"), ("gptq", "gptqmodel"), ("mxfp4", "kernels")]
)
def test_native_kernels_that_are_not_here(
    stored: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    needs: str,
) -> None:
    with pytest.raises(MissingError, match=f"need {needs}"):
        loadstone.load(stored(name), native_kernels=True)
    code, _, err = run(capsys, "eval", "-M", stored(name), "--native-kernels", "--device", "cpu")
    assert code == 5 and f"pip install {needs}" in err
    monkeypatch.setattr(sys.modules["loadstone.loading.plan"], "find_spec", lambda name: object())
    if needs == "kernels" and not torch.cuda.is_available():
        with pytest.raises(MissingError, match="need a CUDA GPU"):
            loadstone.plan(stored(name), native_kernels=True)
    else:
        assert loadstone.plan(stored(name), native_kernels=True).load_path == "from_pretrained"


def test_native_kernels_of_a_plain_model(models: Callable[[str], Path]) -> None:
    plan = loadstone.plan(models("llama"), native_kernels=True)
    assert plan.load_path == "native" and "--native-kernels has no effect" in plan.messages[0]


@pytest.mark.parametrize("name", ["fp8 tensor", "gptq", "nf4"])
def test_a_block_of_the_language_model_alone(name: str, tmp_path: Path) -> None:
    """As in a text_config: of neither part is a quantizer's package needed, and the values are the same."""
    import transformers

    text = {**packed.SIZES, "head_dim": 64}
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=28, patch_size=14),
        text_config=transformers.LlamaConfig(**text),
        image_token_index=10,
    )
    transformers.LlavaForConditionalGeneration(config).half().save_pretrained(tmp_path / "plain")
    source = FORMATS[name](tmp_path / "plain", tmp_path / "source")
    expected = loadstone.load(source, device="cpu").state_dict()
    found = json.loads((source / "config.json").read_text())
    found["text_config"]["quantization_config"] = found.pop("quantization_config")
    (source / "config.json").write_text(json.dumps(found))
    assert_equal(loadstone.load(source, device="cpu").state_dict(), expected)
    loadstone.finalize(source, tmp_path / "out", verify=True)
    assert "quantization_config" not in (tmp_path / "out" / "config.json").read_text()
    assert_equal(loadstone.load(tmp_path / "out", device="cpu").state_dict(), expected)


def test_modelopts_own_file(stored: Callable[..., Path], tmp_path: Path) -> None:
    """Beside a config.json with or without a block; with other formats for single layers; not of what is written."""
    source = Path(shutil.copytree(stored("modelopt fp8"), tmp_path / "model"))
    other = stored("modelopt nvfp4")
    moved = {n: t for n, t in load_file(other / "model.safetensors").items() if n.startswith(UP)}
    packed.change(source, lambda tensors: tensors.update(moved))
    config = json.loads((source / "config.json").read_text())
    layers = {
        UP: {"quant_algo": "NVFP4", "group_size": 16},
        "model.layers.1.mlp.up_proj": {"quant_algo": "FP8"},
    }
    block = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers, "exclude_modules": ["lm_head"]}
    written = {"producer": {"name": "modelopt"}, "quantization": block}
    (source / "hf_quant_config.json").write_text(json.dumps(written))
    states = []
    for found in (block | {"quant_method": "modelopt"}, None):
        (source / "config.json").write_text(json.dumps(config | {"quantization_config": found}))
        states.append(loadstone.load(source, device="cpu").state_dict())
    assert_equal(*states)
    for name, directory in ((f"{UP}.weight", other), ("lm_head.weight", source)):
        assert torch.equal(states[0][name], loadstone.load(directory, device="cpu").state_dict()[name])
    loadstone.finalize(source, tmp_path / "out", verify=True)
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert_equal(loadstone.load(tmp_path / "out", device="cpu").state_dict(), states[0])
    layers[UP]["quant_algo"] = "W4A8_AWQ"
    (source / "hf_quant_config.json").write_text(json.dumps(written))
    with pytest.raises(ArtifactError, match="'W4A8_AWQ' is not decoded here"):
        loadstone.detect(source)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_biases_that_autogptq_adds(stored: Callable[..., Path], tmp_path: Path, value: float) -> None:
    """Of zeros where the model has none; others are an error."""
    directory = Path(shutil.copytree(stored("gptq"), tmp_path / "model"))
    packed.change(directory, lambda tensors: tensors.update({f"{UP}.bias": torch.full((384,), value).half()}))
    if value:
        with pytest.raises(ArtifactError, match=r"up_proj\.bias' is not part of this model"):
            loadstone.load(directory, device="cpu")
        return
    ours, theirs = loadstone.load(directory, device="cpu"), loadstone.load(stored("gptq"), device="cpu")
    assert_equal(ours.state_dict(), theirs.state_dict())
    loadstone.finalize(directory, tmp_path / "out")
    assert f"{UP}.bias" not in loadstone.detect(tmp_path / "out").tensors


def test_loading_threads_share_the_threads_of_torch_and_take_none_from_others(stored, monkeypatch):
    from transformers.core_model_loading import GLOBAL_WORKERS

    seen = set()
    decode_block = loadstone.loading.packed.decode_block

    def watched(*args):
        seen.add((threading.get_ident() == here, torch.get_num_threads()))
        return decode_block(*args)

    here, before = threading.get_ident(), torch.get_num_threads()
    monkeypatch.setattr(loadstone.loading.packed, "decode_block", watched)
    torch.set_num_threads(2 * GLOBAL_WORKERS)
    try:
        loadstone.load(stored("fp8 block"), device="cpu")
        assert seen == {(False, 2)}
        with ThreadPoolExecutor(1) as later:
            assert (
                later.submit(torch.get_num_threads).result() == torch.get_num_threads() == 2 * GLOBAL_WORKERS
            )
    finally:
        torch.set_num_threads(before)
