"""The quantization_config block: anybody's is read, ours holds only keys that every release knows."""

import json

import pytest

from loadstone.artifact.compressed_tensors import (
    Block,
    Group,
    LayerScheme,
    QuantArgs,
    read_block,
    write_block,
)
from loadstone.errors import ArtifactError

# As llm-compressor 0.14 with compressed-tensors 0.20 writes W4A16.
LLM_COMPRESSOR = {
    "config_groups": {
        "group_0": {
            "format": "pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": "static", "block_structure": None, "dynamic": False, "group_size": 128, "num_bits": 4,
                "observer": "minmax", "observer_kwargs": {}, "scale_dtype": None, "strategy": "group",
                "symmetric": True, "type": "int", "zp_dtype": None,
            },
        }
    },
    "format": "pack-quantized",
    "global_compression_ratio": None,
    "ignore": ["lm_head", "re:.*mlp.gate$"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.20.0",
}  # fmt: skip

SCHEMES = {
    "W4A16 g128": LayerScheme("pack-quantized", QuantArgs(4, "int", "group", 128)),
    "W4A16 channel": LayerScheme("pack-quantized", QuantArgs(4, "int", "channel")),
    "W4A16 g64 asymmetric": LayerScheme("pack-quantized", QuantArgs(4, "int", "group", 64, symmetric=False)),
    "W8A16 channel": LayerScheme("pack-quantized", QuantArgs(8, "int", "channel")),
    "W8A8 channel": LayerScheme(
        "int-quantized", QuantArgs(8, "int", "channel"), QuantArgs(8, "int", "token", dynamic=True)
    ),
    "FP8 dynamic channel": LayerScheme(
        "float-quantized", QuantArgs(8, "float", "channel"), QuantArgs(8, "float", "token", dynamic=True)
    ),
    "FP8 block": LayerScheme(
        "float-quantized",
        QuantArgs(8, "float", "block", block=(128, 128)),
        QuantArgs(8, "float", "group", 128, dynamic=True),
    ),
    "FP8 W8A16 channel": LayerScheme("naive-quantized", QuantArgs(8, "float", "channel")),
    "NVFP4A16": LayerScheme("nvfp4-pack-quantized", QuantArgs(4, "float", "tensor_group", 16)),
    "NVFP4": LayerScheme(
        "nvfp4-pack-quantized",
        QuantArgs(4, "float", "tensor_group", 16),
        QuantArgs(4, "float", "tensor_group", 16, dynamic="local"),
    ),
    "MXFP4A16": LayerScheme("mxfp4-pack-quantized", QuantArgs(4, "float", "group", 32)),
    "MXFP8": LayerScheme(
        "mxfp8-quantized",
        QuantArgs(8, "float", "group", 32, scale_dtype="uint8"),
        QuantArgs(8, "float", "group", 32, dynamic=True, scale_dtype="uint8"),
    ),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_a_written_block_reads_back_and_holds_no_other_key(name):
    scheme = SCHEMES[name]
    written = json.loads(json.dumps(write_block([Group("group_0", ("Linear",), scheme)], ["lm_head"])))
    assert set(written) == {
        "quant_method", "version", "format", "quantization_status", "global_compression_ratio", "kv_cache_scheme",
        "ignore", "config_groups",
    }  # fmt: skip
    group = written["config_groups"]["group_0"]
    assert set(group) == {"targets", "format", "weights", "input_activations", "output_activations"}
    known = {
        "num_bits",
        "type",
        "strategy",
        "symmetric",
        "dynamic",
        "group_size",
        "block_structure",
        "scale_dtype",
    }
    for args in (group["weights"], group["input_activations"]):
        assert args is None or set(args) <= known
        assert args is None or ("scale_dtype" in args) == (name == "MXFP8")
    assert written["quantization_status"] == "compressed"
    assert written["format"] == group["format"] == scheme.format
    block = read_block(written)
    assert block.groups == (Group("group_0", ("Linear",), scheme),)
    assert str(scheme) == name


def test_what_llm_compressor_writes():
    block = read_block(LLM_COMPRESSOR)
    scheme = LayerScheme("pack-quantized", QuantArgs(4, "int", "group", 128, actorder="weight"))
    assert block.groups == (Group("group_0", ("Linear",), scheme),)
    assert block.status == "compressed" and block.version == "0.20.0"
    assert block.ignores("model.layers.3.mlp.gate") and not block.ignores("model.layers.3.mlp.gate_proj")
    # Patterns are anchored at the start only, as compressed-tensors reads them.
    assert Block((), ("re:.*mlp",)).ignores("model.mlp.down_proj")


def test_older_blocks():
    """0.9 says no format in groups, writes block sizes as text and the settings one level deeper."""
    inner = {
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": "128x64"},
                "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
            }
        },
        "format": "float-quantized",
        "quantization_status": "frozen",
    }
    block = read_block(
        {"quant_method": "compressed-tensors", "quantization_config": inner, "sparsity_config": None}
    )
    assert block.groups[0].scheme.weights.block == (128, 64)
    assert block.groups[0].scheme.format == "float-quantized" and block.status == "frozen"
    for version, padded in {
        "0.9.4": True,
        "0.17.0": True,
        "0.18.0": False,
        "0.20.1.dev3": False,
        "1.0": False,
    }.items():
        assert Block((), version=version).padded_packing == padded
    no_format = {
        "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 32}}}
    }
    assert read_block(no_format).groups[0].scheme == LayerScheme(
        "pack-quantized", QuantArgs(4, "int", "group", 32)
    )
    no_strategy = {"num_bits": 8, "group_size": -1, "actorder": True}
    group = read_block({"config_groups": {"g": {"targets": [], "weights": no_strategy}}}).groups[0]
    assert group.scheme.weights == QuantArgs(8, "int", "channel", actorder="group")


def test_mixed_schemes_are_chosen_by_name_then_pattern_then_class():
    def group(name, targets, bits):
        return Group(name, targets, LayerScheme("pack-quantized", QuantArgs(bits, "int", "channel")))

    block = Block(
        (
            group("a", ("Linear",), 4),
            group("b", ("re:.*down_proj$", "re:.*layers.1.*"), 8),
            group("c", ("model.layers.1.mlp.down_proj", "lm_head"), 2),
            group("d", ("Embedding",), 6),
        )
    )
    chosen = {
        "model.layers.0.mlp.up_proj": 4,
        "model.layers.0.mlp.down_proj": 8,
        "model.layers.1.self_attn.q_proj": 8,
        "model.layers.1.mlp.down_proj": 2,
        "lm_head": 2,
        "model.embed_tokens": 6,
    }
    for module, bits in chosen.items():
        assert block.scheme_of(module).weights.bits == bits, module
    assert Block((group("b", ("re:a",), 8),)).scheme_of("b.c") is None


W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config_groups": None}, "has no config_groups"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "config_groups.W4A16 is the name of a preset"),
        ({"config_groups": {"g": {"targets": "Linear", "weights": W4}}}, "targets is not a list of names"),
        ({"config_groups": {"g": {"targets": ["re:("], "weights": W4}}}, "is not a regular expression"),
        ({"ignore": ["re:("]}, "ignore: 're:(' is not a regular expression"),
        ({"ignore": ["re:(a|aa)*b"]}, "could take for ever"),
        (
            {"config_groups": {"g": {"targets": [], "weights": W4 | {"num_bits": 0}}}},
            "num_bits 0 of type 'int'",
        ),
        ({"config_groups": {"g": {"targets": [], "weights": W4 | {"num_bits": "4"}}}}, "num_bits '4'"),
        (
            {"config_groups": {"g": {"targets": [], "weights": W4 | {"group_size": None}}}},
            "needs a group_size",
        ),
        ({"config_groups": {"g": {"targets": [], "weights": W4 | {"group_size": 0}}}}, "group_size 0"),
        ({"config_groups": {"g": {"targets": [], "weights": W4 | {"strategy": "row"}}}}, "strategy 'row'"),
        ({"config_groups": {"g": {"targets": [], "weights": {"strategy": "block"}}}}, "block_structure None"),
        (
            {"config_groups": {"g": {"targets": [], "weights": W4, "format": "marlin-24"}}},
            "the format 'marlin-24'",
        ),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config 'sparse-24-bitmask'"),
        ({"transform_config": {"config_groups": {"u": {}}}}, "rotated weights"),
        ({"ignore": "lm_head"}, "ignore is not a list"),
        (
            {"config_groups": {"g": {"targets": [], "weights": W4 | {"dynamic": "never"}}}},
            "symmetric and dynamic",
        ),
    ],
)
def test_what_cannot_be_read_is_named(change, said):
    block = {
        "config_groups": {"g": {"targets": ["Linear"], "weights": W4}},
        "format": "pack-quantized",
    } | change
    with pytest.raises(ArtifactError) as error:
        read_block(block)
    assert said in error.value.message
    assert error.value.message.startswith("config.json: quantization_config")
    assert error.value.remedy
