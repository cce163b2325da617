"""Damaged directories: each is loaded right, to the bit, or refused by the names of file and tensor.

What cannot be told from the tensors alone: values that changed to other valid values (a scale swapped with
one of the same shape, a flipped bit in a weight, a lone tensor relabelled from BF16 to F16).
``loadstone.json`` holds the hash of every file, and `inspect --verify` finds those; they are in the table as
``VERIFY``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import loadstone
from loadstone.artifact.manifest import verify_files
from loadstone.errors import ArtifactError

sys.path.insert(0, str(Path(__file__).parents[1] / "artifact"))

from builders import edit_header, edit_json

W4 = "int8-dynamic-act-int4-weight"
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
TOKENS = torch.arange(3, 35)[None]

Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"
UP, GATE = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.gate_proj"
NORM = "model.norm.weight"

RIGHT, VERIFY = "loaded right", "found by --verify"


@dataclass(frozen=True)
class Mutation:
    """``base`` is the directory to damage; ``words`` are in the refusal, or say what happens instead."""

    name: str
    base: str
    damage: Callable[[Path], Any]
    words: tuple[str, ...] | str


MUTATIONS: list[Mutation] = []


def mutation(
    base: str, *words: str, outcome: str | None = None, later: str = ""
) -> Callable[[Callable[[Path], Any]], Any]:
    """Enter a function that damages a copy of ``base`` into the table."""

    def enter(damage: Callable[[Path], Any]) -> Callable[[Path], Any]:
        MUTATIONS.append(Mutation(damage.__name__, base, damage, outcome or words))
        return damage

    return enter


# Tools


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite a safetensors file with changed tensors and the same metadata."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def describe(d: Path, name: str, change: Callable[[dict[str, Any]], Any], file: str = WEIGHTS) -> None:
    """Change the metadata of one quantized tensor."""

    def edit(header: dict[str, Any]) -> None:
        description = json.loads(header["__metadata__"][name])
        change(description)
        header["__metadata__"][name] = json.dumps(description)

    edit_header(d / file, edit)


def describe_all(d: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    with safe_open(d / WEIGHTS, "pt") as file:
        names = [k for k, v in file.metadata().items() if '"_data"' in v]
    for name in names:
        describe(d, name, change)


def config(d: Path, **changes: Any) -> None:
    edit_json(d / CONFIG, lambda c: c.update(changes))


def shard_of(d: Path, name: str) -> Path:
    return d / json.loads((d / INDEX).read_text())["weight_map"][name]


def dtype(name: str) -> dict[str, str]:
    return {"_type": "torch.dtype", "_data": name}


# config.json


@mutation("w4", outcome=RIGHT)
def block_dropped(d: Path) -> None:
    edit_json(d / CONFIG, lambda c: c.pop("quantization_config"))


@mutation("w4", outcome=RIGHT)
def block_null(d: Path) -> None:
    config(d, quantization_config=None)


@mutation("w4", CONFIG, "quant_method")
def block_empty(d: Path) -> None:
    config(d, quantization_config={})


@mutation("w4", CONFIG, "says gptq")
def block_of_another_quantizer(d: Path) -> None:
    config(d, quantization_config={"quant_method": "gptq", "bits": 4})


@mutation("bf16", CONFIG, "holds no quantized tensor")
def block_on_plain_weights(d: Path) -> None:
    config(
        d, quantization_config=json.loads((d.parent / "w4-config.json").read_text())["quantization_config"]
    )


def retype(d: Path, **data: Any) -> None:
    def change(c: dict[str, Any]) -> None:
        inner = c["quantization_config"]["quant_type"]["default"]
        inner["_type"] = data.pop("_type", inner["_type"])
        inner["_data"].update(data)

    edit_json(d / CONFIG, change)


@mutation("w4", WEIGHTS, "Int8WeightOnlyConfig in config.json")
def block_of_another_recipe(d: Path) -> None:
    retype(d, _type="Int8WeightOnlyConfig")


@mutation("w4", WEIGHTS, "holds int4, not int2")
def block_of_other_bits(d: Path) -> None:
    retype(d, weight_dtype=dtype("int2"))


@mutation("w4", WEIGHTS, "quantizes activations")
def block_without_activations(d: Path) -> None:
    retype(d, _type="IntxWeightOnlyConfig")


@mutation("bf16", WEIGHTS, "model.", "shape")
def hidden_size_changed(d: Path) -> None:
    config(d, hidden_size=32)


@mutation("w4", WEIGHTS, "model.", "shape")
def hidden_size_changed_quantized(d: Path) -> None:
    config(d, hidden_size=128)


@mutation("w4", WEIGHTS, "mlp", "shape")
def intermediate_size_changed(d: Path) -> None:
    config(d, intermediate_size=64)


@mutation("w4", WEIGHTS, "k_proj", "shape")
def key_value_heads_changed(d: Path) -> None:
    config(d, num_key_value_heads=4)


@mutation("bf16", WEIGHTS, "embed_tokens", "shape")
def vocabulary_changed(d: Path) -> None:
    config(d, vocab_size=300)


@mutation("bf16", WEIGHTS, "model.layers.1.")
def fewer_layers(d: Path) -> None:
    config(d, num_hidden_layers=1)


@mutation("w4", WEIGHTS, "model.layers.1.")
def fewer_layers_quantized(d: Path) -> None:
    config(d, num_hidden_layers=1)


@mutation("w4", WEIGHTS, "model.layers.2.")
def more_layers(d: Path) -> None:
    config(d, num_hidden_layers=3)


@mutation("bf16", WEIGHTS, "lm_head.weight")
def tie_flag_off(d: Path) -> None:
    config(d, tie_word_embeddings=False)


@mutation("untied", outcome=RIGHT)
def tie_flag_on_with_a_stored_head(d: Path) -> None:
    config(d, tie_word_embeddings=True)


@mutation("bf16", CONFIG, "no model_type")
def model_type_dropped(d: Path) -> None:
    edit_json(d / CONFIG, lambda c: (c.pop("model_type"), c.pop("architectures")))


@mutation("bf16", WEIGHTS, "is missing")
def model_type_of_another_architecture(d: Path) -> None:
    config(d, model_type="gpt2", architectures=["GPT2LMHeadModel"])


@mutation("bf16", CONFIG, "not a valid JSON")
def config_truncated(d: Path) -> None:
    os.truncate(d / CONFIG, 100)


@mutation("bf16", "no config.json")
def config_missing(d: Path) -> None:
    (d / CONFIG).unlink()


# Names


def rename(old: str, new: str) -> Callable[[dict[str, Any]], Any]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@mutation("bf16", WEIGHTS, f"{Q}.weight", "missing")
def key_renamed(d: Path) -> None:
    edit_tensors(d / WEIGHTS, rename(f"{Q}.weight", f"{Q}.wieght"))


@mutation("w4", f"{Q}._weight_scale")
def part_renamed(d: Path) -> None:
    edit_tensors(d / WEIGHTS, rename(f"{Q}._weight_scale", f"{Q}._weight_scales"))


@mutation("w4", f"{Q}._weight_qdata")
def part_missing(d: Path) -> None:
    edit_tensors(d / WEIGHTS, lambda t: t.pop(f"{Q}._weight_qdata"))


@mutation("bf16", WEIGHTS, NORM, "missing")
def key_missing(d: Path) -> None:
    edit_tensors(d / WEIGHTS, lambda t: t.pop(NORM))


@mutation("w4", WEIGHTS, "input_layernorm", "missing")
def plain_key_missing_beside_quantized(d: Path) -> None:
    edit_tensors(d / WEIGHTS, lambda t: t.pop("model.layers.0.input_layernorm.weight"))


@mutation("bf16", WEIGHTS, "model.layers.0.surplus.weight", "is not part of")
def key_extra(d: Path) -> None:
    edit_tensors(d / WEIGHTS, lambda t: t.update({"model.layers.0.surplus.weight": torch.zeros(2)}))


@mutation("w4", WEIGHTS, f"{Q}.weight", "both plain and quantized")
def key_plain_and_quantized(d: Path) -> None:
    edit_tensors(d / WEIGHTS, lambda t: t.update({f"{Q}.weight": torch.zeros(64, 64, dtype=torch.bfloat16)}))


@mutation("w4", WEIGHTS, "model.layers.7.extra._weight_qdata")
def part_extra(d: Path) -> None:
    edit_tensors(d / WEIGHTS, lambda t: t.update({"model.layers.7.extra._weight_qdata": torch.zeros(2, 2)}))


@mutation("bf16", WEIGHTS, NORM, "duplicated")
def key_twice_in_the_header(d: Path) -> None:
    raw = (d / WEIGHTS).read_bytes()
    other = b'"model.layers.1.input_layernorm.weight"'
    pad = b" " * (len(other) - len(NORM) - 2)
    (d / WEIGHTS).write_bytes(raw.replace(other, f'"{NORM}"'.encode() + pad))


@mutation("w4", WEIGHTS, "no metadata describes")
def metadata_stripped(d: Path) -> None:
    save_file(load_file(d / WEIGHTS), d / WEIGHTS, metadata={"format": "pt"})


@mutation("w4", f"{Q}.weight", "does not describe it")
def description_missing(d: Path) -> None:
    edit_header(d / WEIGHTS, lambda h: h["__metadata__"].pop(f"{Q}.weight"))


@mutation("w4", outcome=RIGHT)
def list_of_names_missing(d: Path) -> None:
    edit_header(d / WEIGHTS, lambda h: h["__metadata__"].pop("tensor_names"))


# Shapes, dtypes and descriptions


@mutation("bf16", WEIGHTS, f"{Q}.weight", "shape")
def shape_transposed(d: Path) -> None:
    edit_tensors(d / WEIGHTS, lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"].reshape(32, 128)}))


@mutation("bf16", WEIGHTS, f"{K}.weight", "shape")
def shape_of_a_matrix_lost(d: Path) -> None:
    edit_header(d / WEIGHTS, lambda h: h[f"{K}.weight"].update(shape=[64, 32]))


@mutation("w4", WEIGHTS, f"{K}._weight_scale", "shape")
def scale_of_another_shape(d: Path) -> None:
    edit_tensors(d / WEIGHTS, lambda t: t.update({f"{K}._weight_scale": t[f"{Q}._weight_scale"].clone()}))


@mutation("w4", WEIGHTS, f"{K}._weight_scale", "shape")
def scale_transposed(d: Path) -> None:
    edit_header(d / WEIGHTS, lambda h: h[f"{K}._weight_scale"]["shape"].reverse())


@mutation("w4", WEIGHTS, f"{K}.weight", "shape")
def quantized_weight_of_another_shape(d: Path) -> None:
    def change(t: dict[str, torch.Tensor]) -> None:
        for part in ("qdata", "scale", "zero_point"):
            t[f"{K}._weight_{part}"] = t[f"{Q}._weight_{part}"].clone()

    edit_tensors(d / WEIGHTS, change)


@mutation("w4", WEIGHTS, f"{Q}._weight_scale", "dtype")
def scale_of_another_dtype(d: Path) -> None:
    edit_header(d / WEIGHTS, lambda h: h[f"{Q}._weight_scale"].update(dtype="F16"))


@mutation("w4", WEIGHTS, f"{Q}._weight_qdata", "dtype")
def qdata_unsigned(d: Path) -> None:
    edit_header(d / WEIGHTS, lambda h: h[f"{Q}._weight_qdata"].update(dtype="U8"))


@mutation("bf16", WEIGHTS, f"{Q}.weight", "F16")
def plain_weight_reinterpreted(d: Path) -> None:
    edit_header(d / WEIGHTS, lambda h: h[f"{Q}.weight"].update(dtype="F16"))


@mutation("bf16", WEIGHTS, f"{Q}.weight", "I16")
def plain_weight_of_integers(d: Path) -> None:
    edit_header(d / WEIGHTS, lambda h: h[f"{Q}.weight"].update(dtype="I16"))


@mutation("w4", f"{Q}.weight", "Int8Tensor")
def class_changed(d: Path) -> None:
    describe(d, f"{Q}.weight", lambda x: x.update(_type="Int8Tensor"))


@mutation("w4", f"{Q}.weight", "unknown quantized class")
def class_of_nowhere(d: Path) -> None:
    describe(d, f"{Q}.weight", lambda x: x.update(_type="Int4WeightTensor"))


@mutation("w4", WEIGHTS, f"{Q}._weight_scale", "its description asks for")
def block_size_changed(d: Path) -> None:
    describe(d, f"{Q}.weight", lambda x: x["_data"].update(block_size=[1, 64]))


@mutation("w4", WEIGHTS, f"{UP}.weight", "holds int2, not int4")
def target_dtype_changed(d: Path) -> None:
    describe(d, f"{UP}.weight", lambda x: x["_data"].update(target_dtype=dtype("int2")))


@mutation("w4", WEIGHTS, f"{UP}.weight", "float32", "bfloat16")
def dtype_attribute_changed(d: Path) -> None:
    describe(d, f"{UP}.weight", lambda x: x["_data"].update(dtype=dtype("float32")))


@mutation("w4", WEIGHTS, "float16", "bfloat16")
def dtype_attribute_changed_everywhere(d: Path) -> None:
    describe_all(d, lambda x: x["_data"].update(dtype=dtype("float16")))


@mutation("w4", WEIGHTS, f"{UP}.weight", "does not quantize activations")
def activation_quantization_dropped(d: Path) -> None:
    describe(d, f"{UP}.weight", lambda x: x["_data"].update(activation_quantization=None))


@mutation("w4", WEIGHTS, UP, "quantize activations")
def activation_quantization_dropped_without_a_block(d: Path) -> None:
    block_dropped(d)
    describe(d, f"{UP}.weight", lambda x: x["_data"].update(activation_quantization=None))


@mutation("w4", f"{UP}.weight", "zero_point")
def zero_point_not_named(d: Path) -> None:
    describe(d, f"{UP}.weight", lambda x: x["_tensor_data_names"].remove("zero_point"))


@mutation("int8", f"{UP}.weight", "does not quantize activations")
def int8_activations_dropped(d: Path) -> None:
    describe(d, f"{UP}.weight", lambda x: x["_data"].update(act_quant_kwargs=None))


@mutation("int8", f"{UP}._weight_scale", "shape")
def int8_per_tensor(d: Path) -> None:
    describe(d, f"{UP}.weight", lambda x: x["_data"].update(block_size=[128, 64]))


# Values


def poke(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors[name].view(-1)[3].fill_(value)


@mutation("bf16", WEIGHTS, f"{Q}.weight", "NaN")
def nan_in_a_weight(d: Path) -> None:
    edit_tensors(d / WEIGHTS, poke(f"{Q}.weight", float("nan")))


@mutation("bf16", WEIGHTS, NORM, "NaN or infinity")
def infinity_in_a_norm(d: Path) -> None:
    edit_tensors(d / WEIGHTS, poke(NORM, float("inf")))


@mutation("w4", WEIGHTS, f"{Q}._weight_scale", "NaN")
def nan_in_a_scale(d: Path) -> None:
    edit_tensors(d / WEIGHTS, poke(f"{Q}._weight_scale", float("nan")))


@mutation("w4", WEIGHTS, f"{Q}._weight_scale", "NaN or infinity")
def infinity_in_a_scale(d: Path) -> None:
    edit_tensors(d / WEIGHTS, poke(f"{Q}._weight_scale", float("-inf")))


@mutation("w4", WEIGHTS, f"{Q}._weight_scale", "above zero")
def negative_scale(d: Path) -> None:
    edit_tensors(d / WEIGHTS, poke(f"{Q}._weight_scale", -1.0))


@mutation("w4", WEIGHTS, f"{Q}._weight_scale", "above zero")
def zero_scale(d: Path) -> None:
    edit_tensors(d / WEIGHTS, poke(f"{Q}._weight_scale", 0.0))


@mutation("w4", WEIGHTS, f"{Q}._weight_qdata", "values outside")
def value_out_of_range(d: Path) -> None:
    edit_tensors(d / WEIGHTS, poke(f"{Q}._weight_qdata", 100))


@mutation("w4", outcome=VERIFY)
def scales_of_one_shape_swapped(d: Path) -> None:
    def change(t: dict[str, torch.Tensor]) -> None:
        t[f"{UP}._weight_scale"], t[f"{GATE}._weight_scale"] = (
            t[f"{GATE}._weight_scale"],
            t[f"{UP}._weight_scale"],
        )

    edit_tensors(d / WEIGHTS, change)


@mutation("int8", WEIGHTS, f"{Q}._weight_scale")
def negative_scale_of_int8(d: Path) -> None:
    edit_tensors(d / WEIGHTS, poke(f"{Q}._weight_scale", -0.01))


@mutation("int8", WEIGHTS, f"{Q}._weight_scale", "NaN")
def nan_in_a_float32_scale(d: Path) -> None:
    edit_tensors(d / WEIGHTS, poke(f"{Q}._weight_scale", float("nan")))


@mutation("w4", outcome=VERIFY)
def zero_point_changed(d: Path) -> None:
    edit_tensors(d / WEIGHTS, poke(f"{Q}._weight_zero_point", 1))


@mutation("bf16", outcome=VERIFY)
def embedding_reinterpreted(d: Path) -> None:
    edit_header(d / WEIGHTS, lambda h: h["model.embed_tokens.weight"].update(dtype="F16"))


@mutation("w4", outcome=VERIFY)
def a_value_changed(d: Path) -> None:
    edit_tensors(d / WEIGHTS, poke("model.embed_tokens.weight", 0.5))


# Files


@mutation("bf16", WEIGHTS, "truncated")
def file_truncated(d: Path) -> None:
    os.truncate(d / WEIGHTS, (d / WEIGHTS).stat().st_size - 2)


@mutation("w4", WEIGHTS, "truncated")
def file_truncated_in_the_header(d: Path) -> None:
    os.truncate(d / WEIGHTS, 1000)


@mutation("w4", WEIGHTS, "too short")
def file_empty(d: Path) -> None:
    os.truncate(d / WEIGHTS, 0)


@mutation("bf16", WEIGHTS, "belong to none")
def file_with_a_tail(d: Path) -> None:
    with (d / WEIGHTS).open("ab") as file:
        file.write(b"tail")


@mutation("bf16", WEIGHTS, "overlaps")
def offsets_overlap(d: Path) -> None:
    def change(header: dict[str, Any]) -> None:
        header[f"{Q}.weight"]["data_offsets"] = [n - 2 for n in header[f"{Q}.weight"]["data_offsets"]]

    edit_header(d / WEIGHTS, change)


@mutation("bf16", WEIGHTS, "over the limit")
def header_too_long(d: Path) -> None:
    with (d / WEIGHTS).open("r+b") as file:
        file.write((2**40).to_bytes(8, "little"))


@mutation("bf16-sharded", ".safetensors", "truncated")
def shard_truncated(d: Path) -> None:
    shard = shard_of(d, f"{Q}.weight")
    os.truncate(shard, shard.stat().st_size // 2)


@mutation("w4-sharded", ".safetensors", "which is not there")
def shard_missing(d: Path) -> None:
    shard_of(d, f"{UP}._weight_qdata").unlink()


@mutation("bf16-sharded", INDEX)
def shards_swapped(d: Path) -> None:
    one, two = shard_of(d, f"{Q}.weight"), shard_of(d, f"{UP}.weight")
    assert one != two
    one.rename(d / "x")
    two.rename(one)
    (d / "x").rename(two)


@mutation("w4-sharded", "model.layers.")
def shard_of_another_recipe(d: Path) -> None:
    # The shard that holds the last layer comes from a run with int8 weights.
    other = d.parent / "int8-sharded"
    shard = shard_of(d, f"{UP}._weight_qdata")
    shutil.copyfile(other / shard.name, shard)


@mutation("bf16-sharded", ".safetensors", NORM, "not in")
def index_lacks_a_tensor(d: Path) -> None:
    edit_json(d / INDEX, lambda i: i["weight_map"].pop(NORM))


@mutation("bf16-sharded", INDEX, "ghost.weight")
def index_names_a_tensor_too_many(d: Path) -> None:
    edit_json(d / INDEX, lambda i: i["weight_map"].update({"ghost.weight": shard_of(d, NORM).name}))


@mutation("bf16-sharded", INDEX, "absent.safetensors")
def index_names_a_file_too_many(d: Path) -> None:
    edit_json(d / INDEX, lambda i: i["weight_map"].update({"ghost.weight": "absent.safetensors"}))


@mutation("bf16-sharded", INDEX, NORM)
def index_points_to_the_wrong_shard(d: Path) -> None:
    edit_json(d / INDEX, lambda i: i["weight_map"].update({NORM: shard_of(d, f"{Q}.weight").name}))


@mutation("bf16-sharded", "is in both")
def tensor_in_two_shards(d: Path) -> None:
    norm = load_file(shard_of(d, NORM))[NORM]
    edit_tensors(shard_of(d, f"{Q}.weight"), lambda t: t.update({NORM: norm + 1}))


@mutation("bf16", outcome=RIGHT)
def stale_index_beside_a_single_file(d: Path) -> None:
    (d / INDEX).write_text(json.dumps({"weight_map": {NORM: "gone.safetensors"}}))


@mutation("bf16", outcome=RIGHT)
def stray_shards_beside_a_single_file(d: Path) -> None:
    save_file({NORM: torch.zeros(64)}, d / "model-00001-of-00002.safetensors")


@mutation("bf16", outcome=RIGHT)
def stale_bin_beside_safetensors(d: Path) -> None:
    torch.save({NORM: torch.zeros(64)}, d / "pytorch_model.bin")


@mutation("w4", outcome=RIGHT)
def tokenizer_missing(d: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (d / name).unlink()


@mutation("w4", outcome=RIGHT)
def manifest_missing(d: Path) -> None:
    (d / "loadstone.json").unlink()


@mutation("w4", outcome=RIGHT)
def manifest_broken(d: Path) -> None:
    (d / "loadstone.json").write_text("{")


# Running them


def logits(path: Path) -> torch.Tensor:
    with torch.inference_mode():
        return loadstone.load(path)(TOKENS).logits


@pytest.fixture(scope="module")
def bases(
    make_model: Callable, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, torch.Tensor]]:
    """Undamaged directories by name, with their logits."""
    from loadstone.finalization.plan import make_plan
    from loadstone.finalization.run import write_plan
    from loadstone.quantization import parse_recipe

    root = tmp_path_factory.mktemp("bases")
    sources = {"tied": make_model("llama-tied"), "untied": make_model("llama-untied")}
    finalized = {
        "bf16": ("tied", None, "5GB"),
        "bf16-sharded": ("tied", None, 60_000),
        "w4": ("tied", W4, "5GB"),
        "w4-sharded": ("tied", W4, 60_000),
        "int8": ("tied", "int8-dynamic-act-int8-weight", "5GB"),
        "int8-sharded": ("tied", "int8-dynamic-act-int8-weight", 60_000),
        "untied": ("untied", W4, "5GB"),
    }
    made = {}
    for name, (source, recipe, size) in finalized.items():
        plan = make_plan(
            loadstone.detect(sources[source]),
            parse_recipe(recipe) if recipe else None,
            max_shard_bytes=size if isinstance(size, int) else 5 * 10**9,
        )
        write_plan(plan, root / name)
        made[name] = (root / name, logits(root / name))
    return made


@pytest.mark.parametrize("case", MUTATIONS, ids=lambda m: m.name)
def test_mutations(bases: dict[str, tuple[Path, torch.Tensor]], tmp_path: Path, case: Mutation) -> None:
    source, expected = bases[case.base]
    damaged = Path(shutil.copytree(source, tmp_path / "damaged"))
    shutil.copyfile(bases["w4"][0] / CONFIG, tmp_path / "w4-config.json")
    (tmp_path / "int8-sharded").symlink_to(bases["int8-sharded"][0])
    case.damage(damaged)
    if case.words == VERIFY:
        assert verify_files(damaged) == [f"{WEIGHTS}: content differs from the sha256 in loadstone.json"]
        return
    if case.words == RIGHT:
        assert torch.equal(logits(damaged), expected)
        return
    with pytest.raises(ArtifactError) as caught:
        logits(damaged)
    missing = [w for w in case.words if w not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    assert caught.value.exit_code == 3


def test_the_table_is_large_and_its_names_are_unique() -> None:
    assert len(MUTATIONS) >= 40 and len({m.name for m in MUTATIONS}) == len(MUTATIONS)
