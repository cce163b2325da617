"""The bytes of the compressed-tensors layout: written out by hand, against compressed-tensors' own (recorded, 0.17 and
0.20), and torchao's tensors decoded to the same bits."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.quantization.record_golden_ct import CASES, SHAPE, digest_of, packed_digest, parts_of, values

from loadstone.artifact.compressed_tensors import read_block
from loadstone.artifact.compressed_tensors.layout import row_tile, rows_needed
from loadstone.quantization.packing import (
    decode_e2m1,
    decode_float8,
    decode_rows,
    pack_ints,
    pack_zero_points,
    plain_block_scales,
    scale_as_divisor,
    scales_in,
    unpack_ints,
    unpack_zero_points,
)

GOLDEN = json.loads(Path(__file__).with_name("golden_ct.json").read_text())


def ints(rows: int, columns: int, bits: int) -> torch.Tensor:
    half = 1 << (bits - 1)
    return values(rows, columns, -half, half - 1).to(torch.int8)


def reference_pack(numbers: torch.Tensor, bits: int, dim: int = 1, padded: bool = False) -> torch.Tensor:
    """Packing in Python's own integers: value i of a row at bit ``i * bits``, or in whole words where ``padded``."""
    if dim == 0:
        return reference_pack(numbers.t(), bits, 1, padded).t()
    per, words = 32 // bits, []
    for row in numbers.tolist():
        places = [i // per * 32 + i % per * bits if padded else i * bits for i in range(len(row))]
        whole = sum((v + (1 << (bits - 1))) << place for v, place in zip(row, places, strict=True))
        count = -(-len(row) // per) if padded else -(-len(row) * bits // 32)
        words.append(torch.frombuffer(bytearray(whole.to_bytes(count * 4, "little")), dtype=torch.int32))
    return torch.stack(words)


def test_bytes_by_hand():
    row = torch.tensor([[-8, -7, 0, 7, 1, 2, -1, 3]], dtype=torch.int8)
    assert pack_ints(row, 4).view(torch.uint8).numpy().tobytes().hex() == "10f8a9b7"
    # Twelve values: half of the second word is left over, and zero.
    long = torch.tensor([[-8, -7, 0, 7, 1, 2, -1, 3, 7, -8, 0, 0]], dtype=torch.int8)
    assert pack_ints(long, 4).view(torch.uint8).numpy().tobytes().hex() == "10f8a9b70f880000"
    assert pack_ints(row[:, :5], 8).view(torch.uint8).numpy().tobytes().hex() == "7879808781000000"
    column = torch.tensor([[-8], [7], [0]], dtype=torch.int8)
    assert pack_zero_points(column, 4).tolist() == [[0x8F0]]
    assert pack_zero_points(column, 4).shape == (1, 1)
    codes = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
    positive = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for dtype in (torch.bfloat16, torch.float32):
        assert decode_e2m1(codes, dtype).tolist() == [positive + [-value for value in positive]]


@pytest.mark.parametrize("version", GOLDEN)
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_packs_and_unpacks_as_compressed_tensors_does(version, bits):
    padded = version == "0.17"
    recorded = GOLDEN[version]["packed"]
    for dim in (0, 1):
        assert (
            packed_digest(lambda q, b, d: reference_pack(q, b, d, padded), bits, dim)
            == recorded[f"{bits}.{dim}"]
        )
    if bits in (4, 8):
        assert packed_digest(lambda q, b, d: pack_ints(q, b), bits) == recorded[f"{bits}.1"]
        assert packed_digest(lambda q, b, d: pack_zero_points(q, b), bits, 0) == recorded[f"{bits}.0"]
    for width in range(1, 71):
        numbers = ints(3, width, bits)
        assert torch.equal(
            unpack_ints(reference_pack(numbers, bits, 1, padded), bits, width, padded), numbers
        )
        down = reference_pack(numbers.t(), bits, 0, padded)
        assert torch.equal(unpack_zero_points(down, bits, width, padded), numbers.t())


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 70), st.sampled_from([4, 8]), st.integers(0, 2**32 - 1))
def test_what_is_packed_comes_back(rows, columns, bits, seed):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-(1 << (bits - 1)), 1 << (bits - 1), (rows, columns), generator=generator).to(
        torch.int8
    )
    packed = pack_ints(numbers, bits)
    assert packed.shape == (rows, -(-columns * bits // 32))
    assert torch.equal(unpack_ints(packed, bits, columns), numbers)
    assert torch.equal(unpack_zero_points(pack_zero_points(numbers, bits), bits, rows), numbers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float8_by_table_is_what_torch_converts_to(dtype):
    codes = torch.arange(256, dtype=torch.uint8).repeat(3)[:764].view(2, 2, -1)
    for shape in (codes, codes[:1, :1, :7]):
        for stored in (torch.float8_e4m3fn, torch.float8_e5m2):
            values = shape.contiguous().view(stored)
            torch.testing.assert_close(
                decode_float8(values, dtype), values.to(dtype), rtol=0, atol=0, equal_nan=True
            )


def case(name: str, version: str):
    """(scheme, stored tensors, padded) of a recorded case."""
    form, args, _ = CASES[name]
    block = read_block(
        {
            "format": form,
            "version": f"{version}.0",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": args}},
        }
    )
    parts, bits, padded = parts_of(name), args["num_bits"], block.padded_packing
    if form == "pack-quantized":
        parts["weight_packed"] = reference_pack(parts.pop("weight"), bits, 1, padded)
        if "weight_zero_point" in parts:
            parts["weight_zero_point"] = reference_pack(parts["weight_zero_point"], bits, 0, padded)
    return block.groups[0].scheme, parts, padded


RECORDED = [(version, name) for version, found in GOLDEN.items() for name in found["decoded"]]


@pytest.mark.parametrize(("version", "name"), RECORDED)
def test_decoding_gives_the_bits_of_compressed_tensors_whole_and_in_blocks(version, name):
    scheme, parts, padded = case(name, version)
    own = getattr(torch, CASES[name][2])
    # Formats with scales of their own decode to bfloat16 there, the others to the dtype of their scales.
    dtype = own if own.is_floating_point and own.itemsize > 1 else torch.bfloat16
    whole = decode_rows(scheme, parts, SHAPE[1], dtype, padded)
    assert digest_of(whole) == GOLDEN[version]["decoded"][name]
    tile = row_tile(scheme)
    step = tile * max(1, 5 // tile)
    blocks = []
    for start in range(0, SHAPE[0], step):
        stop = min(start + step, SHAPE[0])
        cut = {}
        for suffix, part in parts.items():
            first, last = rows_needed(scheme, suffix, tuple(part.shape), start, stop, padded)
            cut[suffix] = part[first:last]
        blocks.append(decode_rows(scheme, cut, SHAPE[1], dtype, padded))
    assert torch.equal(torch.cat(blocks).view(torch.int16 if dtype.itemsize == 2 else torch.int32),
                       whole.view(torch.int16 if dtype.itemsize == 2 else torch.int32))  # fmt: skip


def test_columns_that_no_group_fills_and_an_order_of_columns():
    scheme = case("w4-g32", "0.20")[0]
    numbers, scale = ints(4, 40, 4), values(4, 2, 1, 90).to(torch.bfloat16)
    plain = decode_rows(
        scheme, {"weight_packed": pack_ints(numbers, 4), "weight_scale": scale}, 40, torch.bfloat16
    )
    expected = numbers.to(torch.bfloat16) * scale.repeat_interleave(32, 1)[:, :40]
    assert torch.equal(plain, expected)
    order = torch.arange(40, dtype=torch.int32) % 2
    parts = {"weight_packed": pack_ints(numbers, 4), "weight_scale": scale, "weight_g_idx": order}
    assert torch.equal(
        decode_rows(scheme, parts, 40, torch.bfloat16), numbers.to(torch.bfloat16) * scale[:, order.long()]
    )
    parts["weight_g_idx"] = torch.full((40,), -1, dtype=torch.int32)
    assert torch.equal(decode_rows(scheme, parts, 40, torch.bfloat16), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_float8_by_table_is_torchs_own_conversion(dtype):
    for small in (torch.float8_e4m3fn, torch.float8_e5m2):
        every = torch.arange(256, dtype=torch.uint8).view(small).reshape(16, 16)
        assert torch.equal(decode_float8(every, dtype).nan_to_num(7), every.to(dtype).nan_to_num(7))


@pytest.mark.parametrize(("rows", "columns"), [(128, 4), (130, 6), (5, 1), (256, 64), (300, 33)])
def test_scales_out_of_torchaos_tiles(rows, columns):
    from torchao.prototype.mx_formats.utils import to_blocked

    plain = torch.arange(rows * columns).reshape(rows, columns) % 251
    tiles = to_blocked(plain).view(-(-rows // 128) * 32, -(-columns // 4) * 16)
    assert torch.equal(plain_block_scales(tiles, rows, columns), plain)


def test_divisor_of_nvfp4_decodes_to_what_the_factor_does():
    """Where the plain reciprocal of a factor would change the last bit of a weight, a neighbour is found."""
    blocks = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().unsqueeze(1)
    numbers = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    # One octave of block scales and two numbers have every significand.
    few, two = blocks[48:56], numbers[1:3]

    def weights(factors: torch.Tensor, divisors: torch.Tensor | None = None) -> torch.Tensor:
        scale = few * factors if divisors is None else few / divisors
        return (scale.unsqueeze(-1) * two).to(torch.bfloat16)

    factors = (torch.rand(100_000, generator=torch.Generator().manual_seed(0)) + 1e-3) * 1e-3
    hard = factors[(weights(factors) != weights(factors, 1.0 / factors)).any(-1).any(0)]
    assert len(hard) > 3

    def same(factor: torch.Tensor) -> bool:
        divisor = scale_as_divisor(factor, torch.bfloat16)
        assert abs(divisor.item() * factor.item() - 1) < 1e-5
        wanted = ((blocks * factor) * numbers).to(torch.bfloat16)
        return torch.equal(((blocks / divisor) * numbers).to(torch.bfloat16), wanted)

    assert all(same(factor) for factor in factors[:100])
    # One in some ten thousand lies so that no divisor does for every product.
    assert sum(same(factor) for factor in hard) > len(hard) / 2
    # In float32 the last bit differs for some weights whatever is chosen: the divisor is the factor's own reciprocal.
    for factor in factors[:40]:
        divisor = scale_as_divisor(factor, torch.float32)
        assert abs(divisor.item() * factor.item() - 1) < 1e-6
    assert scale_as_divisor(torch.zeros(()), torch.bfloat16).item() == 1.0


def test_scales_must_fit_the_models_dtype():
    from loadstone.errors import ArtifactError

    exact = torch.tensor([0.5, 0.25])
    assert scales_in(exact, torch.bfloat16, "m.weight").dtype == torch.bfloat16
    with pytest.raises(ArtifactError, match=r"'m\.weight': its scales have more bits than bfloat16"):
        scales_in(torch.tensor([0.1]), torch.bfloat16, "m.weight")
