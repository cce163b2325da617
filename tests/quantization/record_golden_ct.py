"""Write into golden_ct.json what the installed compressed-tensors packs and decodes, as sha256 by version.

Run in an environment that has it (`make test-serving` makes one): python tests/quantization/record_golden_ct.py
What is packed and decoded follows from `values`. Packing changed in 0.18: 0.17 and 0.20 are recorded.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

WIDTHS = range(1, 71)

# Settings of weights as a config block spells them, by name; the last is the dtype of scales.
CASES = {
    "w4-g32": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, "bfloat16"),
    "w4-channel": ("pack-quantized", {"num_bits": 4, "strategy": "channel"}, "float16"),
    "w4-asymmetric": (
        "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False}, "bfloat16",
    ),
    "w8-channel": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}, "bfloat16"),
    "w8-asymmetric": ("pack-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, "bfloat16"),
    "w2-g16": ("pack-quantized", {"num_bits": 2, "strategy": "group", "group_size": 16}, "bfloat16"),
    "w3-g32": ("pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32}, "bfloat16"),
    "w3-asymmetric": (
        "pack-quantized", {"num_bits": 3, "strategy": "group", "group_size": 32, "symmetric": False}, "bfloat16",
    ),
    "w5-channel": ("pack-quantized", {"num_bits": 5, "strategy": "channel"}, "float32"),
    "w6-tensor": ("pack-quantized", {"num_bits": 6, "strategy": "tensor"}, "bfloat16"),
    "w7-g8": ("pack-quantized", {"num_bits": 7, "strategy": "group", "group_size": 8}, "bfloat16"),
    "int8-channel": ("int-quantized", {"num_bits": 8, "strategy": "channel"}, "bfloat16"),
    "int8-asymmetric": ("int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False}, "bfloat16"),
    "int4-in-int8": ("int-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}, "bfloat16"),
    "fp8-channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, "bfloat16"),
    "fp8-tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}, "float32"),
    "fp8-naive": ("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}, "float16"),
    "fp8-block": (
        "float-quantized",
        {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [4, 24]}, "bfloat16",
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}, "float8_e4m3fn",
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}, "uint8",
    ),
    "mxfp8": (
        "mxfp8-quantized",
        {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}, "uint8",
    ),
}  # fmt: skip
SHAPE = (37, 96)


def values(rows: int, columns: int, low: int, high: int) -> torch.Tensor:
    """int64 values (rows, columns) from ``low`` to ``high``, every one of them, the same on every machine."""
    numbers = torch.arange(rows * columns).reshape(rows, columns)
    return (numbers * 7919 + numbers // columns * 31 + (numbers * numbers) % 101) % (high - low + 1) + low


def digest_of(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's dtype and bytes."""
    return hashlib.sha256(
        f"{tensor.dtype}".encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes()
    ).hexdigest()


def packed_digest(pack, bits: int, dim: int = 1) -> str:
    """sha256 over what ``pack(values, bits, dim)`` gives for every width of `WIDTHS`."""
    digest = hashlib.sha256()
    half = 1 << (bits - 1)
    for width in WIDTHS:
        shape = (3, width) if dim == 1 else (width, 3)
        packed = pack(values(*shape, -half, half - 1).to(torch.int8), bits, dim)
        digest.update(packed.contiguous().numpy().tobytes())
    return digest.hexdigest()


def parts_of(name: str) -> dict[str, torch.Tensor]:
    """Stored tensors of a case before packing: ``weight`` holds the integers, codes or float8 values."""
    form, args, dtype = CASES[name]
    rows, columns = SHAPE
    bits, strategy = args["num_bits"], args["strategy"]
    group = args.get("group_size", columns)
    grid = (rows, columns // group)
    if strategy == "tensor":
        grid = (1, 1)
    if strategy == "block":
        high, wide = args["block_structure"]
        grid = (-(-rows // high), -(-columns // wide))
    if dtype == "uint8":
        scale = values(*grid, 110, 134).to(torch.uint8)
    elif dtype == "float8_e4m3fn":
        scale = values(*grid, 1, 126).to(torch.uint8).view(torch.float8_e4m3fn)
    else:
        scale = (values(*grid, 1, 997).double() / 65536).to(getattr(torch, dtype))
    parts = {"weight_scale": scale.reshape(1) if strategy == "tensor" else scale}
    if form in ("nvfp4-pack-quantized", "mxfp4-pack-quantized"):
        parts["weight_packed"] = values(rows, columns // 2, 0, 255).to(torch.uint8)
        if form.startswith("nvfp4"):
            parts["weight_global_scale"] = torch.tensor([1234.5], dtype=torch.float32)
    elif args.get("type") == "float":
        codes = values(rows, columns, 0, 253)
        parts["weight"] = (codes + (codes >= 127)).to(torch.uint8).view(torch.float8_e4m3fn)
    else:
        half = 1 << (bits - 1)
        parts["weight"] = values(rows, columns, -half, half - 1).to(torch.int8)
        if not args.get("symmetric", True):
            parts["weight_zero_point"] = values(*grid, -half, half - 1).to(torch.int8)
    return parts


def main() -> None:
    import compressed_tensors
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    def pack(ints, bits, dim=1):
        return pack_to_int32(ints, bits, packed_dim=dim)

    decoded: dict[str, str] = {}
    for name, (form, args, _) in CASES.items():
        scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**args))
        parts, bits = parts_of(name), args["num_bits"]
        if form == "pack-quantized":
            parts["weight_packed"] = pack(parts.pop("weight"), bits)
            parts["weight_shape"] = torch.tensor(SHAPE)
            if "weight_zero_point" in parts:
                parts["weight_zero_point"] = pack(parts["weight_zero_point"], bits, 0)
        try:
            weight = BaseCompressor.get_value_from_registry(form).decompress(parts, scheme)["weight"]
        except RuntimeError as error:
            # 0.17 has no blocks that the weight does not fill.
            print(f"{name}: {error}")
            continue
        decoded[name] = digest_of(weight)
    packed = {f"{bits}.{dim}": packed_digest(pack, bits, dim) for bits in range(1, 9) for dim in (0, 1)}
    out = Path(__file__).with_name("golden_ct.json")
    known = json.loads(out.read_text()) if out.exists() else {}
    version = ".".join(compressed_tensors.__version__.split(".")[:2])
    known[version] = {"packed": packed, "decoded": decoded}
    out.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
