"""Decoding against compressed-tensors itself, on what it packs of random weights (`make test-serving`)."""

import pytest
import torch

from loadstone.artifact.compressed_tensors import read_block
from loadstone.quantization.packing import decode_rows

pytestmark = pytest.mark.serving

FORMATS = {
    "pack-quantized": [
        {"num_bits": bits, "symmetric": symmetric} | strategy
        for bits in (2, 3, 4, 5, 8)
        for symmetric in (True, False)
        for strategy in ({"strategy": "channel"}, {"strategy": "group", "group_size": 16})
    ],
    "int-quantized": [
        {"num_bits": 8, "strategy": "channel", "symmetric": symmetric} for symmetric in (True, False)
    ],
    "float-quantized": [
        {"num_bits": 8, "type": "float", "strategy": "channel"},
        {"num_bits": 8, "type": "float", "strategy": "tensor"},
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [32, 16]},
    ],
}


@pytest.mark.parametrize(
    ("form", "args"), [(form, args) for form, found in FORMATS.items() for args in found]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(48, 80), (70, 64)])
def test_what_it_compresses_decodes_to_the_same_bits(form, args, dtype, shape):
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    low, high = _extremes(weight, args)
    scale, zero = calculate_qparams(low, high, scheme.weights)
    state = {"weight": weight, "weight_scale": scale.to(dtype)}
    if not args.get("symmetric", True):
        state["weight_zero_point"] = zero
    compressor = BaseCompressor.get_value_from_registry(form)
    packed = compressor.compress(state, scheme)
    expected = compressor.decompress(packed, scheme)["weight"]
    block = read_block({"format": form, "config_groups": {"g": {"targets": ["Linear"], "weights": args}}})
    assert torch.equal(decode_rows(block.groups[0].scheme, packed, shape[1], dtype), expected)


def _extremes(weight: torch.Tensor, args: dict) -> tuple[torch.Tensor, torch.Tensor]:
    if args["strategy"] == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if args["strategy"] == "block":
        high, wide = args["block_structure"]
        rows, columns = weight.shape
        padded = torch.zeros(-(-rows // high) * high, -(-columns // wide) * wide, dtype=weight.dtype)
        padded[:rows, :columns] = weight
        blocks = padded.unflatten(1, (-1, wide)).unflatten(0, (-1, high))
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    grouped = weight.unflatten(1, (-1, args.get("group_size", weight.shape[1])))
    return grouped.amin(-1), grouped.amax(-1)
