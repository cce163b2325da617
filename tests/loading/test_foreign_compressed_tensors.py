"""Artifacts that compressed-tensors' own compressor wrote, as other quantizers publish them (`make test-serving`): what
loads has its bits, what is wrong is named by `inspect`, and nothing ends in a traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import logits, run

import loadstone
from loadstone.artifact.report import collect
from loadstone.errors import LoadstoneError

pytestmark = pytest.mark.serving

W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
W8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
FP8 = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
FP8_TENSOR = FP8 | {"strategy": "tensor"}
FP8_BLOCK = FP8 | {"strategy": "block", "block_structure": [32, 48]}
NVFP4 = {
    "num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True,
    "scale_dtype": "torch.float8_e4m3fn",
}  # fmt: skip
MXFP4 = {
    "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True,
    "scale_dtype": "torch.uint8",
}  # fmt: skip
TOKEN8 = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
TOKEN_FP8 = TOKEN8 | {"type": "float"}
HEAD = ["lm_head"]
Tensors = dict[str, torch.Tensor]


def group(
    weights: dict[str, Any],
    form: str,
    inputs: dict[str, Any] | None = None,
    targets: tuple[str, ...] = ("Linear",),
) -> dict[str, Any]:
    return {"targets": list(targets), "weights": weights, "input_activations": inputs, "format": form}


@dataclass
class Case:
    """``groups`` by name; ``change``: of stored tensors; ``block``: entries of the config block that are set afterwards
    (None: removed); ``problems``: what `inspect` says; ``refused``: what a load says."""

    groups: dict[str, dict[str, Any]]
    ignore: list[str] = field(default_factory=lambda: HEAD)
    change: Callable[[Tensors], None] | None = None
    block: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    refused: str = ""


def one(weights: dict[str, Any], form: str, inputs: dict[str, Any] | None = None, **more: Any) -> Case:
    return Case({"group_0": group(weights, form, inputs)}, **more)


def drop(suffix: str) -> Callable[[Tensors], None]:
    def change(state: Tensors) -> None:
        for name in [n for n in state if n.endswith(suffix)]:
            del state[name]

    return change


def float32_scales(state: Tensors) -> None:
    for name in [n for n in state if n.endswith("weight_scale")]:
        state[name] = state[name].float()


def other_global_scale(state: Tensors) -> None:
    state["model.layers.0.self_attn.k_proj.weight_global_scale"] *= 2


def swizzled(state: Tensors) -> None:
    """In whole tiles of 128 x 4, as torchao and kernels hold them."""
    name = "model.layers.0.mlp.up_proj.weight_scale"
    rows, columns = state[name].shape
    padded = torch.zeros(-(-rows // 128) * 128, -(-columns // 4) * 4 + 4, dtype=torch.uint8)
    padded[:rows, :columns] = state[name].view(torch.uint8)
    state[name] = padded.view(torch.float8_e4m3fn)


def order_of_columns(state: Tensors) -> None:
    for name in [n for n in state if n.endswith("weight_packed")]:
        columns = int(state[name.replace("weight_packed", "weight_shape")][1])
        state[name.replace("weight_packed", "weight_g_idx")] = torch.arange(columns, dtype=torch.int32) // 32


def fewer_scales(state: Tensors) -> None:
    """As releases that rounded the number of groups up wrote groups of 48."""
    for name in [n for n in state if n.endswith("weight_scale")]:
        columns = int(state[name.replace("weight_scale", "weight_shape")][1])
        state[name] = state[name][:, : -(-columns // 48)]


def cache_scales(state: Tensors) -> None:
    for layer in (0, 1):
        for kind in ("k_scale", "v_scale"):
            state[f"model.layers.{layer}.self_attn.{kind}"] = torch.tensor([0.02])


def input_scales(state: Tensors) -> None:
    for name in [n for n in state if n.endswith(".weight_scale")]:
        state[name.replace("weight_scale", "input_scale")] = torch.tensor([0.01])


def plain_weight(module: str) -> Callable[[Tensors], None]:
    def change(state: Tensors) -> None:
        shape = state[f"{module}.weight_shape"].tolist()
        for name in [n for n in state if n.startswith(module + ".")]:
            del state[name]
        state[f"{module}.weight"] = torch.zeros(shape, dtype=torch.bfloat16)

    return change


PACK, NAIVE, FLOAT, INT = "pack-quantized", "naive-quantized", "float-quantized", "int-quantized"
ATTENTION, MLP = r"re:.*self_attn\..*_proj$", r"re:.*mlp\.(gate|up|down)_proj$"
LAYER = "model.layers.0"
CASES: dict[str, Case] = {
    "W4A16": one(W4, PACK),
    "W4A16 channel": one(W4 | {"strategy": "channel", "group_size": -1}, PACK),
    "W4A16 asymmetric": one(W4 | {"symmetric": False}, PACK),
    "W8A16 in pack-quantized": one(W8, PACK),
    "W8A16 in groups": one(W8 | {"strategy": "group", "group_size": 32}, PACK),
    "int8 per tensor": one(W8 | {"strategy": "tensor"}, INT, TOKEN8),
    "W8A8": one(W8, INT, TOKEN8),
    "W8A8 asymmetric inputs": one(W8, INT, TOKEN8 | {"symmetric": False}),
    "FP8 dynamic": one(FP8, FLOAT, TOKEN_FP8),
    "FP8 static per tensor": one(
        FP8_TENSOR, FLOAT, FP8_TENSOR | {"dynamic": False}, change=input_scales
    ),
    "FP8 static without its scales": one(
        FP8_TENSOR, FLOAT, FP8_TENSOR | {"dynamic": False}, problems=("lacks input_scale",)
    ),
    "FP8 blocks that do not fill": one(FP8_BLOCK, FLOAT, TOKEN_FP8),
    "FP8 weights alone": one(FP8, NAIVE),
    "NVFP4A16": one(NVFP4, "nvfp4-pack-quantized", problems=("different global scales",)),
    "MXFP4A16": one(MXFP4, "mxfp4-pack-quantized"),
    "FP8 KV cache": one(
        W4, PACK, change=cache_scales, block={"kv_cache_scheme": FP8_TENSOR | {"dynamic": False}}
    ),
    "dense sparsity": one(
        W4, PACK, block={"sparsity_config": {"format": "dense", "registry_requires_subclass": False}}
    ),
    "empty sparsity": one(W4, PACK, block={"sparsity_config": {}, "version": "0.9.4", "transform_config": {}}),
    "no format in the group": one(W4, PACK, block={"config_groups.group_0.format": None}),
    "ignored by patterns": one(W4, PACK, ignore=["re:.*lm_head", r"re:.*layers\.1\..*"]),
    "classes, patterns and names": Case(
        {
            "group_0": group(W4, PACK, targets=(ATTENTION,)),
            "group_1": group(W8, PACK, targets=tuple(f"{LAYER}.mlp.{p}_proj" for p in ("gate", "up", "down"))),
            "group_2": group(FP8, NAIVE),
        },
    ),
    "status initialized": one(W4, PACK, block={"quantization_status": "initialized"}, problems=("status",)),
    "status misspelt": one(W4, PACK, block={"quantization_status": "compresed"}, problems=("'compresed'",)),
    "no status": one(W4, PACK, block={"quantization_status": None}, problems=("is missing",)),
    "head not ignored": one(W4, PACK, block={"ignore": []}, problems=("'lm_head'",)),
    "no weight_shape": one(W4, PACK, change=drop("weight_shape"), problems=("lacks weight_shape",)),
    "float32 scales": one(W4, PACK, change=float32_scales, problems=("has dtype F32",)),
    "groups that do not divide": one(
        W4, PACK, change=fewer_scales, block={"config_groups.group_0.weights.group_size": 48},
        problems=("no multiple of the group size 48",),
    ),
    "split merged layers": one(
        W4, PACK, ignore=[*HEAD, f"{LAYER}.self_attn.q_proj"], problems=("servers merge",)
    ),
    "differing global scales": one(
        NVFP4, "nvfp4-pack-quantized", change=other_global_scale, problems=("different global scales",)
    ),
    "columns in another order": one(
        W4, PACK, change=order_of_columns, block={"config_groups.group_0.weights.actorder": "group"},
        problems=("actorder group",),
    ),
    "static order": one(W4 | {"actorder": "weight"}, PACK),
    "swizzled scales": one(NVFP4, "nvfp4-pack-quantized", change=swizzled, refused="has shape"),
    "not compressed": one(
        W4, PACK, change=plain_weight(f"{LAYER}.mlp.up_proj"), problems=("stored plain", "servers merge")
    ),
    "marlin-24": one(
        W4, PACK, block={"format": "marlin-24", "config_groups.group_0.format": None}, refused="marlin-24"
    ),
    "2:4 sparse": one(
        W4, PACK, block={"sparsity_config": {"format": "sparse-24-bitmask", "targets": ["Linear"]}},
        refused="sparse-24-bitmask",
    ),
    "unknown format": one(
        W4, PACK, block={"format": "zfp-quantized", "config_groups.group_0.format": None}, refused="zfp-quantized"
    ),
    "a preset without settings": one(W4, PACK, block={"config_groups": {"W4A16": ["Linear"]}}, refused="preset"),
    "a tied head, quantized": Case(
        {"group_0": group(W4, PACK, targets=("Linear", "lm_head"))}, ignore=[], config={"tie_word_embeddings": True}
    ),
}  # fmt: skip


def write(source: Path, case: Case, out: Path) -> Tensors:
    """The model of ``source`` by compressed-tensors; returns the weights that its own decompressor gives."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
    from compressed_tensors.utils import match_named_modules
    from safetensors.torch import save_file

    model = loadstone.load(source)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if "lm_head" in case.ignore or any("lm_head" in each for each in case.ignore):
        del state["lm_head.weight"]
    expected: Tensors = {}
    done: set[str] = set()
    # Exact names come before patterns, and these before classes, as the package chooses.
    order = sorted(
        case.groups.values(),
        key=lambda g: (any(t == "Linear" for t in g["targets"]), "re:" in g["targets"][0]),
    )
    for entry in order:
        scheme = QuantizationScheme(
            targets=entry["targets"], weights=entry["weights"], input_activations=entry["input_activations"],
            format=entry["format"],
        )  # fmt: skip
        compressor = BaseCompressor.get_value_from_registry(entry["format"])
        for name, module in match_named_modules(model, entry["targets"], case.ignore):
            if name in done or not isinstance(module, torch.nn.Linear):
                continue
            done.add(name)
            weight, args = module.weight.detach().clone(), scheme.weights
            parts = {"weight": weight}
            low, high = _extremes(weight, entry["weights"])
            whole = None
            if args.strategy == "tensor_group":
                whole = parts["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
            scale, zero = calculate_qparams(low, high, args, global_scale=whole)
            parts["weight_scale"] = scale if args.scale_dtype else scale.to(weight.dtype)
            if not args.symmetric:
                parts["weight_zero_point"] = zero
            packed = compressor.compress(parts, scheme)
            expected[f"{name}.weight"] = compressor.decompress(dict(packed), scheme)["weight"].to(
                weight.dtype
            )
            del state[f"{name}.weight"]
            state |= {f"{name}.{suffix}": part.contiguous() for suffix, part in packed.items()}
    config = json.loads((source / "config.json").read_text()) | case.config
    forms = {entry["format"] for entry in case.groups.values()}
    block = QuantizationConfig(
        config_groups=case.groups, ignore=case.ignore, quantization_status="compressed",
        format=forms.pop() if len(forms) == 1 else "mixed-precision",
    ).model_dump(mode="json") | {"quant_method": "compressed-tensors"}  # fmt: skip
    for key, value in case.block.items():
        inner, *path = block, *key.split(".")
        for part in path[:-1]:
            inner = inner[part]
        if value is None:
            inner.pop(path[-1])
        else:
            inner[path[-1]] = value
    if case.change:
        case.change(state)
    out.mkdir()
    save_file({n: t.contiguous() for n, t in state.items()}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    for file in source.glob("tokenizer*"):
        (out / file.name).write_bytes(file.read_bytes())
    return expected


def _extremes(weight: torch.Tensor, args: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    rows, columns = weight.shape
    if args["strategy"] == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if args["strategy"] == "block":
        high, wide = args["block_structure"]
        padded = torch.zeros(-(-rows // high) * high, -(-columns // wide) * wide, dtype=weight.dtype)
        padded[:rows, :columns] = weight
        blocks = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high))
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    size = args.get("group_size") or -1
    size = columns if size == -1 else size
    grouped = torch.nn.functional.pad(weight, (0, -columns % size)).unflatten(1, (-1, size))
    return grouped.amin(-1), grouped.amax(-1)


@pytest.mark.parametrize("name", CASES)
def test_others_artifacts(name: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case, out = CASES[name], tmp_path / "out"
    expected = write(tiny, case, out)
    code, text, err = run(capsys, "inspect", out)
    assert "unexpected" not in err and code in (0, 3)
    if case.refused:
        assert code == 3 and case.refused in " ".join((text + err).split())
        with pytest.raises(LoadstoneError, match=case.refused):
            loadstone.load(out)
        return
    found = [problem.message for problem in collect(out).serving]
    for said in case.problems:
        assert any(said in each for each in found), found
    assert len(found) == len(case.problems) and code == (3 if found else 0), found
    model = loadstone.load(out)
    assert logits(model).isfinite().all()
    changed = {
        "differing global scales",
        "not compressed",
        "groups that do not divide",
        "split merged layers",
    }
    if name not in changed:
        for weight, tensor in expected.items():
            assert torch.equal(model.get_parameter(weight), tensor), weight


def test_rotated_weights_are_left_to_the_package(tiny: Path, tmp_path: Path) -> None:
    rotated = {"transform_config": {"config_groups": {"R1": {"type": "hadamard", "apply": []}}}}
    write(tiny, one(W4, PACK, block=rotated), tmp_path / "out")
    found = loadstone.plan(tmp_path / "out")
    assert found.load_path == "from_pretrained" and "rotated weights) is not decoded here" in found.reason
    assert logits(loadstone.load(tmp_path / "out")).isfinite().all()


def test_every_defect_of_the_issue_has_a_case() -> None:
    assert {
        "no status", "status misspelt", "head not ignored", "no weight_shape", "float32 scales",
        "groups that do not divide", "split merged layers", "differing global scales", "columns in another order",
        "swizzled scales",
    } <= CASES.keys()  # fmt: skip
