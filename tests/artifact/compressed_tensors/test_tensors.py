"""Quantized weights out of headers: every scheme's tensors, sizes, and what does not fit."""

import pytest
from tests.artifact.compressed_tensors.test_block import SCHEMES

from loadstone.artifact.compressed_tensors import Block, Group, packed_weights
from loadstone.artifact.compressed_tensors.layout import row_tile, stored_tensors, words
from loadstone.artifact.compressed_tensors.tensors import is_side_tensor
from loadstone.artifact.formats.safetensors import TensorInfo
from loadstone.errors import ArtifactError

# Bits stored for each weight of a 4096 x 4096 layer, scales included (the layout's own arithmetic).
BITS = {
    "W4A16 g128": 4.125,
    "W4A16 channel": 4.0039,
    "W4A16 g64 asymmetric": 4.3125,
    "W8A16 channel": 8.0039,
    "W8A8 channel": 8.0039,
    "FP8 dynamic channel": 8.0039,
    "FP8 block": 8.001,
    "FP8 W8A16 channel": 8.0039,
    "NVFP4A16": 4.5,
    "NVFP4": 4.5,
    "MXFP4A16": 4.25,
    "MXFP8": 8.25,
}


def table(scheme, rows=256, columns=384, module="model.layers.0.mlp.up_proj"):
    found = {}
    for suffix, (dtype, shape) in stored_tensors(scheme, rows, columns, "BF16").items():
        nbytes = stored_tensors(scheme, rows, columns, "BF16")[suffix].nbytes
        found[f"{module}.{suffix}"] = TensorInfo(f"{module}.{suffix}", dtype, shape, "f", 0, nbytes)
    return found


def block_of(scheme, **options):
    return Block((Group("group_0", ("Linear",), scheme),), **options)


@pytest.mark.parametrize("name", SCHEMES)
def test_stored_sizes_and_the_weight_they_stand_for(name):
    scheme = SCHEMES[name]
    whole = stored_tensors(scheme, 4096, 4096, "BF16")
    assert sum(each.nbytes for each in whole.values()) * 8 / 4096**2 == pytest.approx(BITS[name], abs=2e-4)
    tensors = table(scheme) | {
        "model.norm.weight": TensorInfo("model.norm.weight", "BF16", (384,), "f", 0, 768)
    }
    (weight,) = packed_weights(block_of(scheme), tensors).values()
    assert weight.name == "model.layers.0.mlp.up_proj.weight"
    assert weight.shape == (256, 384) and weight.numel == 256 * 384
    assert weight.nominal_bits == scheme.weights.bits
    assert weight.quantizes_activations == (scheme.inputs is not None)
    assert weight.nbytes == sum(t.nbytes for n, t in table(scheme).items() if not is_side_tensor(n))
    assert 256 % row_tile(scheme) == 0


def test_words():
    assert [words(70, bits) for bits in (1, 2, 3, 4, 8)] == [3, 5, 7, 9, 18]
    assert [words(70, bits, padded=True) for bits in (1, 2, 3, 4, 8)] == [3, 5, 7, 9, 18]
    assert words(576, 3) == 54 and words(576, 3, padded=True) == 58


def test_two_generations_of_packing_by_version():
    from loadstone.artifact.compressed_tensors import LayerScheme, QuantArgs

    scheme = LayerScheme("pack-quantized", QuantArgs(3, "int", "group", 32))
    module = "a.b"
    for version, count in {"0.17.0": 58, "0.20.0": 54}.items():
        infos = [
            TensorInfo(f"{module}.weight_packed", "I32", (8, count), "f", 0, 32 * count),
            TensorInfo(f"{module}.weight_scale", "BF16", (8, 18), "f", 0, 288),
            TensorInfo(f"{module}.weight_shape", "I64", (2,), "f", 0, 16),
        ]
        (weight,) = packed_weights(block_of(scheme, version=version), {i.name: i for i in infos}).values()
        assert weight.shape == (8, 576) and weight.padded == (version == "0.17.0")


def damaged(name, change):
    tensors = table(SCHEMES[name])
    change(tensors)
    return tensors


def replaced(tensors, suffix, **changes):
    key = next(k for k in tensors if k.endswith("." + suffix))
    tensors[key] = tensors[key]._replace(**changes)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("W4A16 g128", lambda t: t.pop("model.layers.0.mlp.up_proj.weight_scale"), "lacks weight_scale"),
        ("W4A16 g128", lambda t: t.pop("model.layers.0.mlp.up_proj.weight_packed"), "lacks weight_packed"),
        (
            "NVFP4A16",
            lambda t: t.pop("model.layers.0.mlp.up_proj.weight_global_scale"),
            "lacks weight_global",
        ),
        (
            "W4A16 g64 asymmetric",
            lambda t: t.pop("model.layers.0.mlp.up_proj.weight_zero_point"),
            "is asymmetric",
        ),
        ("W4A16 g128", lambda t: replaced(t, "weight_scale", shape=(256, 4)), "has shape [256, 4]"),
        ("W4A16 channel", lambda t: replaced(t, "weight_scale", shape=(255, 1)), "has shape [255, 1]"),
        ("W4A16 g128", lambda t: replaced(t, "weight_packed", dtype="U8"), "has dtype U8"),
        ("W4A16 g128", lambda t: replaced(t, "weight_scale", dtype="I32"), "has dtype I32"),
        ("W8A8 channel", lambda t: replaced(t, "weight", dtype="F8_E4M3"), "has dtype F8_E4M3"),
        ("W8A8 channel", lambda t: replaced(t, "weight", dtype="BF16"), "it is not compressed"),
        ("NVFP4A16", lambda t: replaced(t, "weight_scale", shape=(64, 96)), "has shape [64, 96]"),
        ("NVFP4A16", lambda t: replaced(t, "weight_scale", dtype="BF16"), "has dtype BF16"),
        ("FP8 block", lambda t: replaced(t, "weight_scale", shape=(3, 2)), "has shape [3, 2]"),
        ("MXFP8", lambda t: replaced(t, "weight_scale", dtype="BF16"), "has dtype BF16"),
        (
            "W4A16 g64 asymmetric",
            lambda t: replaced(t, "weight_zero_point", shape=(256, 6)),
            "has shape [256, 6]",
        ),
        ("W4A16 g128", lambda t: replaced(t, "weight_packed", shape=(256, 48, 1)), "a weight has two sides"),
    ],
)
def test_what_does_not_fit_is_named(name, change, said):
    tensors = damaged(name, change)
    with pytest.raises(ArtifactError) as error:
        packed_weights(block_of(SCHEMES[name]), tensors)
    assert said in error.value.message and "up_proj" in error.value.message
    found = []
    assert packed_weights(block_of(SCHEMES[name]), tensors, found.append) == {}
    assert len(found) == 1


def test_a_module_that_no_group_names():
    scheme = SCHEMES["W4A16 g128"]
    block = Block((Group("group_0", ("re:.*q_proj",), scheme),))
    with pytest.raises(ArtifactError, match=r"no group of config\.json names its module"):
        packed_weights(block, table(scheme))


def test_side_tensors():
    assert is_side_tensor("a.self_attn.k_scale") and is_side_tensor("a.q_proj.input_global_scale")
    assert not is_side_tensor("a.q_proj.weight_scale") and not is_side_tensor("a.q_proj.weight")
