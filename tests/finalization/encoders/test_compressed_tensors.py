"""The serving layout: same numbers as torchao's layout, names and merged layers as servers want them."""

import json
import multiprocessing
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import loadstone
from loadstone.artifact.compressed_tensors import read_block
from loadstone.errors import ArtifactError, UsageError
from loadstone.finalization import units
from loadstone.finalization.encoders.compressed_tensors import PackedEncoder
from loadstone.finalization.plan import make_plan
from loadstone.finalization.run import write_plan
from loadstone.finalization.verify import verify
from loadstone.quantization import parse_recipe, read_recipe

from ..test_finalize import snapshot

# Every scheme with every rounding that needs no text.
RECIPES = [
    "intx4-weight-only",
    "intx4-weight-only:rounding=mse",
    "intx4-weight-only:rounding=hqq",
    "intx4-weight-only:group_size=64",
    "intx4-weight-only:group_size=0",
    "intx4-weight-only:bits=8",
    "intx4-weight-only:mapping=asymmetric",
    "intx4-weight-only:mapping=asymmetric,rounding=mse,group_size=64",
    "int8-weight-only",
    "int8-weight-only:granularity=tensor",
    "int8-dynamic-act-int8-weight",
    "int8-dynamic-act-int8-weight:granularity=tensor,act_mapping=asymmetric",
    "float8-weight-only",
    "float8-weight-only:granularity=tensor",
    "float8-dynamic-act-float8-weight",
    "nvfp4-weight-only",
    "mxfp4-dynamic-act-mxfp4-weight",
    "mxfp8-dynamic-act-mxfp8-weight",
]


def written(source: Path, recipe: str, out: Path, **options: object) -> Path:
    plan = make_plan(loadstone.detect(source), parse_recipe(recipe), encoder=PackedEncoder(), **options)
    write_plan(plan, out)
    assert sum(step.nbytes for step in plan.steps) == plan.bytes_after
    assert plan.bytes_after == sum(t.nbytes for t in loadstone.detect(out).tensors.values())
    return out


def dequantized(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: tensor.dequantize() if hasattr(tensor, "tensor_data_names") else tensor
        for name, tensor in model.state_dict().items()
    }


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("recipe", [*RECIPES, "float8-dynamic-act-float8-weight:granularity=block"])
def test_every_scheme_verifies_at_its_planned_size(recipe: str, tiny: Path, tmp_path: Path) -> None:
    source = "builtin:tiny-llama" if recipe.endswith("=block") else tiny
    options = {"recipe": recipe, "layout": "compressed-tensors"}
    planned = loadstone.plan_finalize(source, **options)
    done = loadstone.finalize(source, tmp_path / "out", verify=True, **options)
    stored = loadstone.detect(tmp_path / "out").tensors
    assert done.verified == len(stored) and planned.bytes_after == sum(t.nbytes for t in stored.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_loads_as_what_torchao_dequantizes_to(recipe: str, tiny: Path, tmp_path: Path) -> None:
    out = written(tiny, recipe, tmp_path / "out")
    asked = parse_recipe(recipe)
    plain = replace(asked, scheme=asked.scheme.weight_only)
    write_plan(make_plan(loadstone.detect(tiny), plain), tmp_path / "torchao")
    model, expected = loadstone.load(out), dequantized(loadstone.load(tmp_path / "torchao"))
    assert loadstone.plan(out).load_path == "native-unpacked"
    found = model.state_dict()
    assert found.keys() == expected.keys()
    # Layers that servers merge have one NVFP4 scale, torchao's each their own.
    shared = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") if recipe.startswith("nvfp4") else ()
    quantized = 0
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        if not any(part in name for part in shared):
            assert torch.equal(bits(tensor), bits(expected[name])), name
        quantized += name.removesuffix("weight").endswith("proj.")
    assert quantized > 0
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    "recipe", ["intx4-weight-only:mapping=asymmetric", "nvfp4-weight-only", "int8-weight-only"]
)
def test_blocks_of_rows_give_the_same_bytes(
    recipe: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = written(tiny, recipe, tmp_path / "whole")
    monkeypatch.setattr(units, "BLOCK", 1 << 10)
    blocks = written(tiny, recipe, tmp_path / "blocks", max_shard_bytes=50_000)
    first, second = loadstone.detect(whole), loadstone.detect(blocks)
    assert len(second.weights.files) > 1
    assert first.tensors.keys() == second.tensors.keys()
    for name, info in first.tensors.items():
        other = second.tensors[name]
        ours = (whole / info.file).read_bytes()[info.begin : info.end]
        assert ours == (blocks / other.file).read_bytes()[other.begin : other.end], name
    assert verify(make_plan(loadstone.detect(tiny), parse_recipe(recipe), encoder=PackedEncoder()), whole) > 0


def test_nvfp4_has_one_scale_for_layers_that_servers_merge(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    out = written(tiny, "nvfp4-weight-only", tmp_path / "out")
    stored, source = load_file(out / "model.safetensors"), load_file(tiny / "model.safetensors")
    layer = "model.layers.0"
    for parts in (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ):
        scales = {float(stored[f"{layer}.{part}.weight_global_scale"]) for part in parts}
        largest = max(float(source[f"{layer}.{part}.weight"].abs().max()) for part in parts)
        assert len(scales) == 1 and scales.pop() == pytest.approx(448 * 6 / largest, rel=1e-6)
    alone = float(stored[f"{layer}.self_attn.o_proj.weight_global_scale"])
    assert alone == pytest.approx(
        448 * 6 / float(source[f"{layer}.self_attn.o_proj.weight"].abs().max()), rel=1e-6
    )


def test_float8_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import load_file

    recipe, source = (
        "float8-dynamic-act-float8-weight:granularity=block",
        loadstone.detect("builtin:tiny-llama").path,
    )
    whole = written(source, recipe, tmp_path / "whole")
    monkeypatch.setattr(units, "BLOCK", 1 << 10)
    blocks = written(source, recipe, tmp_path / "blocks")
    assert (whole / "model.safetensors").read_bytes() == (blocks / "model.safetensors").read_bytes()
    dense, name = load_file(source / "model.safetensors"), "model.layers.1.mlp.gate_proj.weight"
    weight, stored = dense[name].float(), load_file(whole / "model.safetensors")
    scale = stored[f"{name}_scale"]
    assert scale.shape == (weight.shape[0] // 128, weight.shape[1] // 128) and scale.dtype == torch.bfloat16
    square = weight[128:256, :128]
    assert float(scale[1, 0]) == pytest.approx(float(square.abs().max()) / 448, rel=2**-8)
    expected = (square / scale[1, 0].float()).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(bits(stored[name][128:256, :128]), bits(expected))
    found = loadstone.load(whole).get_parameter(name)[128:256, :128]
    assert torch.equal(found, expected.to(torch.bfloat16) * scale[1, 0])
    with pytest.raises(UsageError, match="no float8 weights in blocks"):
        loadstone.plan_finalize(source, recipe=recipe)


def test_a_row_of_zeros_has_a_scale_above_zero(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny, tmp_path / "m")
    state = load_file(tmp_path / "m" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"
    state[name][3] = 0
    save_file(state, tmp_path / "m" / "model.safetensors", {"format": "pt"})
    for recipe in ("float8-weight-only", "int8-weight-only", "intx4-weight-only", "nvfp4-weight-only"):
        out = written(tmp_path / "m", recipe, tmp_path / recipe)
        assert not loadstone.load(out).get_parameter(name)[3].any()
    write_plan(
        make_plan(loadstone.detect(tmp_path / "m"), parse_recipe("float8-weight-only")), tmp_path / "torchao"
    )
    assert not loadstone.load(tmp_path / "torchao").get_parameter(name).dequantize()[3].any()


def test_the_block_names_what_stays_plain(tiny: Path, tmp_path: Path) -> None:
    out = written(tiny, "intx4-weight-only", tmp_path / "out", skip=["layers.1", "down_proj"])
    config = json.loads((out / "config.json").read_text())
    block = config["quantization_config"]
    linears = [f"self_attn.{p}_proj" for p in "qkvo"] + [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    layers = config["num_hidden_layers"]
    plain = ["lm_head"] + [
        f"model.layers.{n}.{name}"
        for n in range(layers)
        for name in linears
        if n == 1 or name == "mlp.down_proj"
    ]
    assert sorted(block["ignore"]) == sorted(plain)
    assert block["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert json.loads((out / "loadstone.json").read_text())["kind"] == "compressed-tensors"
    assert loadstone.detect(out).kind == "compressed-tensors"


MIXED = r"""
default: intx4-weight-only
rules:
  - {modules: "re:model\\.layers\\.0\\..*", scheme: skip}
  - {modules: self_attn, scheme: int8-dynamic-act-int8-weight}
"""


def test_a_mixed_recipe_gives_disjoint_groups(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(MIXED)
    plan = make_plan(loadstone.detect(tiny), read_recipe(tmp_path / "r.yaml"), encoder=PackedEncoder())
    write_plan(plan, tmp_path / "out")
    block = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert block["format"] == "mixed-precision"
    assert {g["format"] for g in block["config_groups"].values()} == {"pack-quantized", "int-quantized"}
    artifact = loadstone.detect(tmp_path / "out")
    read = read_block(block)
    for weight in artifact.packed.values():
        hits = [
            t for g in read.groups for t in g.targets if re.fullmatch(t.removeprefix("re:"), weight.module)
        ]
        assert len(hits) == 1, (weight.module, hits)
        assert ("self_attn" in weight.name) == (weight.scheme.format == "int-quantized")
    assert {name for name in block["ignore"] if "layers.0" in name} and "lm_head" in block["ignore"]
    loaded = loadstone.load(tmp_path / "out").state_dict()
    source = loadstone.load(tiny).state_dict()
    same = {name for name in source if "proj" in name and torch.equal(loaded[name], source[name])}
    assert same == {name for name in source if "layers.0" in name and "proj" in name}


@pytest.mark.parametrize(
    ("recipe", "skip", "said"),
    [
        ("int8-dynamic-act-int4-weight", None, "no GPU kernel reads int8 inputs"),
        ("intx3-weight-only", None, "servers have kernels for 4 and 8 bits"),
        ("int4-weight-only", None, "zero points are not integers"),
        ("intx4-weight-only", ["q_proj"], "servers merge q_proj, k_proj, v_proj into one layer"),
        ("intx4-weight-only", ["re:.*\\.up_proj"], "servers merge gate_proj, up_proj into one layer"),
    ],
)
def test_what_no_server_runs_is_refused(recipe: str, skip: list[str] | None, said: str, tiny: Path) -> None:
    with pytest.raises(UsageError) as error:
        make_plan(loadstone.detect(tiny), parse_recipe(recipe), skip=skip, encoder=PackedEncoder())
    assert said in error.value.message and error.value.remedy
    if skip == ["q_proj"]:
        plan = make_plan(
            loadstone.detect(tiny),
            parse_recipe(recipe),
            skip=[r"re:.*\.(q_proj|k_proj|v_proj)"],
            encoder=PackedEncoder(),
        )
        assert not any("k_proj" in s.name for s in plan.steps if s.scheme)


def test_partners_of_a_layer_whose_width_does_not_fit_stay_plain(tmp_path: Path) -> None:
    """vLLM merges gate and up; a group that does not divide one leaves both as they are, the others are quantized."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128, hidden_size=96, intermediate_size=64, num_hidden_layers=1, num_attention_heads=3,
        num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "m")
    plan = make_plan(
        loadstone.detect(tmp_path / "m"),
        parse_recipe("intx4-weight-only:group_size=64"),
        encoder=PackedEncoder(),
    )
    assert [s.name for s in plan.steps if s.scheme] == ["model.layers.0.mlp.down_proj.weight"]


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts under other names (w1, w2, w3), and 12 of them."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=12, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("mixtral") / "model"
    MixtralForCausalLM(config).bfloat16().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "recipe",
    [
        "intx4-weight-only",
        "int8-dynamic-act-int8-weight",
        "nvfp4-weight-only",
        "mxfp8-dynamic-act-mxfp8-weight",
    ],
)
@pytest.mark.parametrize("family", ["qwen3-moe", "mixtral"])
def test_experts_are_stored_one_by_one_under_the_sources_names(
    recipe: str, family: str, make_model: Callable[..., Path], mixtral: Path, tmp_path: Path
) -> None:
    source = mixtral if family == "mixtral" else make_model(family)
    out = written(source, recipe, tmp_path / "out")
    packed, names = loadstone.detect(out).packed, loadstone.detect(source).tensors
    experts = [name for name in names if ".experts." in name]
    assert experts and set(experts) <= packed.keys()
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    routers = [name.removesuffix(".weight") for name in names if name.endswith(".gate.weight")]
    assert routers and set(routers) <= set(block["ignore"])
    model, dense = loadstone.load(out), loadstone.load(source)
    for name, parameter in model.named_parameters():
        assert parameter.shape == dense.get_parameter(name).shape
        if "experts" in name:
            change = (parameter - dense.get_parameter(name)).float().norm() / dense.get_parameter(
                name
            ).float().norm()
            assert 0 < change < 0.2, name


def test_a_router_that_is_a_linear_stays_plain(tmp_path: Path) -> None:
    from transformers import JambaConfig, JambaForCausalLM

    config = JambaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, expert_layer_period=2, expert_layer_offset=1,
        attn_layer_period=2, attn_layer_offset=0, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
    )  # fmt: skip
    JambaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "m")
    plan = make_plan(
        loadstone.detect(tmp_path / "m"), parse_recipe("intx4-weight-only"), encoder=PackedEncoder()
    )
    chosen = {step.name: step.scheme for step in plan.steps}
    router = "model.layers.1.feed_forward.router.weight"
    assert (
        chosen[router] is None
        and router.removesuffix(".weight") in plan.config["quantization_config"]["ignore"]
    )
    assert chosen["model.layers.1.feed_forward.experts.0.gate_proj.weight"] is not None


def test_experts_in_one_tensor_give_the_same_bytes(make_model: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = make_model("qwen3-moe")
    fused = tmp_path / "fused"
    fused.mkdir()
    shutil.copy(source / "config.json", fused)
    state = {k: v.contiguous() for k, v in loadstone.load(source).state_dict().items()}
    assert state["model.layers.0.mlp.experts.gate_up_proj"].dim() == 3
    save_file(state, fused / "model.safetensors", metadata={"format": "pt"})
    one, two = (
        written(path, "nvfp4-weight-only", tmp_path / name) for path, name in ((source, "a"), (fused, "b"))
    )
    first, second = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
    assert first.keys() == second.keys()
    for name in second:
        assert torch.equal(bits(first[name]), bits(second[name])), name


def test_what_is_loaded_is_checked(tiny: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    out = written(tiny, "int8-weight-only", tmp_path / "out")
    stored = load_file(out / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    wrong = {
        "weight_shape": (torch.tensor([1, 2]), "words a row"),
        "weight_scale": (torch.zeros_like(stored[f"{name}.weight_scale"]), "a scale that is zero"),
    }
    for suffix, (tensor, said) in wrong.items():
        save_file(stored | {f"{name}.{suffix}": tensor}, out / "model.safetensors", {"format": "pt"})
        with pytest.raises(ArtifactError, match=said):
            loadstone.load(out)


TEXT = ["the quick brown fox jumps over the lazy dog and runs away " * 200]


@pytest.mark.parametrize(
    ("recipe", "algorithm"),
    [
        ("intx4-weight-only", "gptq"),
        ("intx4-weight-only:mapping=asymmetric", "gptq"),
        ("intx4-weight-only:group_size=64", "awq"),
    ],
)
def test_calibrated_rounding_is_that_of_torchaos_layout(
    recipe: str, algorithm: str, tiny: Path, tmp_path: Path
) -> None:
    options = {"recipe": recipe, "algorithm": algorithm, "calibrate": TEXT, "calibrate_tokens": 512}

    loadstone.finalize(tiny, tmp_path / "packed", layout="compressed-tensors", **options)
    loadstone.finalize(tiny, tmp_path / "torchao", **options)
    found, expected = loadstone.load(tmp_path / "packed"), dequantized(loadstone.load(tmp_path / "torchao"))
    for name, tensor in found.state_dict().items():
        assert torch.equal(bits(tensor), bits(expected[name])), name


@pytest.mark.parametrize(
    ("recipe", "algorithm"), [("int8-dynamic-act-int8-weight", "smoothquant"), ("int8-weight-only", "awq")]
)
def test_scales_of_inputs_are_folded_into_what_comes_before(
    recipe: str, algorithm: str, tiny: Path, tmp_path: Path
) -> None:
    """torchao's tensors would hold them; this layout has no place for them, so norms and Linears take them over."""
    options = {"recipe": recipe, "algorithm": algorithm, "calibrate": TEXT, "calibrate_tokens": 512}

    loadstone.finalize(tiny, tmp_path / "packed", layout="compressed-tensors", **options)
    packed, dense = (
        loadstone.load(tmp_path / "packed", dtype="float32"),
        loadstone.load(tiny, dtype="float32"),
    )
    norm = "model.layers.0.input_layernorm.weight"
    assert torch.equal(packed.get_parameter(norm), dense.get_parameter(norm)) == (algorithm == "awq")
    tokens = torch.arange(60).reshape(1, -1)
    with torch.inference_mode():
        found, expected = packed(tokens).logits, dense(tokens).logits
    assert (found - expected).norm() / expected.norm() < 0.05


def _killed_child(source: Path, out: Path) -> None:
    loadstone.finalize(
        source, out, recipe="nvfp4-weight-only", layout="compressed-tensors", max_shard_size=12_000
    )


def test_killed_and_resumed_or_spread_over_ranks_it_has_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    _killed_child(tiny, tmp_path / "undisturbed")
    expected = snapshot(tmp_path / "undisturbed")
    fork, moments = multiprocessing.get_context("fork"), random.Random(7)
    for _ in range(8):
        process = fork.Process(target=_killed_child, args=(tiny, tmp_path / "out"))
        process.start()
        process.join(moments.uniform(0, 0.4))
        if process.exitcode is None:
            process.kill()
            process.join()
        if (tmp_path / "out").exists():
            assert snapshot(tmp_path / "out") == expected
            shutil.rmtree(tmp_path / "out")
    _killed_child(tiny, tmp_path / "out")
    assert snapshot(tmp_path / "out") == expected
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "loadstone",
        "finalize", "-M", tiny, "-o", tmp_path / "ranks", "--quantize", "nvfp4-weight-only", "--layout",
        "compressed-tensors", "--max-shard-size", "12000B",
    ]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = snapshot(tmp_path / "ranks")
    # The manifest records the command.
    assert {**found, "loadstone.json": ""} == {**expected, "loadstone.json": ""}
