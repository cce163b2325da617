"""Write into golden_bitsandbytes.json what the installed bitsandbytes stores of some weights, and decodes them to.

Run in an environment that has it: python tests/loading/record_golden_bitsandbytes.py
Of each case: the stored tensors and the sha256 of the decoded weight's bytes. Recorded with 0.50.2.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from bitsandbytes.functional import dequantize_blockwise, get_4bit_type
from tests.packed import digest, recorded

NAME = "model.layers.0.mlp.up_proj.weight"
# Case -> shape, dtype, table, values in a block, double quantization, dtype that the values are stored as.
CASES: dict[str, tuple[Any, ...]] = {
    "nf4": ((24, 64), torch.bfloat16, "nf4", 64, False, torch.uint8),
    "nf4 double": ((130, 192), torch.bfloat16, "nf4", 64, True, torch.uint8),
    "nf4 double, blocks across rows": ((90, 200), torch.float16, "nf4", 64, True, torch.uint8),
    "nf4 stored as bfloat16": ((24, 64), torch.bfloat16, "nf4", 64, False, torch.bfloat16),
    "nf4 float32, a short block": ((33, 100), torch.float32, "nf4", 128, False, torch.uint8),
    "fp4": ((24, 64), torch.float16, "fp4", 64, False, torch.uint8),
    "fp4 double": ((24, 64), torch.bfloat16, "fp4", 64, True, torch.uint8),
    "int8": ((24, 64), torch.float16, "int8", 0, False, torch.int8),
}


def record(
    shape: tuple[int, int], dtype: torch.dtype, table: str, size: int, double: bool, storage: torch.dtype
) -> dict[str, Any]:
    weight = (torch.randn(shape) * 0.05).to(dtype)
    # bitsandbytes' factor of a block or row of zeros is zero.
    weight[3] = 0
    if table == "int8":
        layer = bnb.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        state = layer.to("cpu").state_dict()
        stored = {NAME.replace("weight", key): value for key, value in state.items()}
        dense = bnb.functional.int8_vectorwise_dequant(state["weight"], state["SCB"]).to(dtype)
    else:
        values, quantized = bnb.functional.quantize_4bit(
            weight, blocksize=size, compress_statistics=double, quant_type=table, quant_storage=storage
        )
        stored = {NAME: values} | {f"{NAME}.{k}": v for k, v in quantized.as_dict(packed=True).items()}
        factors = quantized.absmax
        if double:
            factors = dequantize_blockwise(factors, quantized.state2) + quantized.offset
        # Not `dequantize_4bit`: on CPUs with AVX-512 it is wrong where blocks go on from one row to the next.
        codes = get_4bit_type(table, device="cpu")
        flat = values.view(torch.uint8).reshape(-1)
        dense = _dequantize_4bit_compute(flat, factors, codes, size, shape, dtype)
        if shape[1] % size == 0:
            assert torch.equal(dense, bnb.functional.dequantize_4bit(values, quantized))
    return {
        "tensors": recorded(stored),
        "dtype": str(dtype).removeprefix("torch."),
        "dense": digest(dense),
    }


def main() -> None:
    torch.manual_seed(0)
    found = {label: record(*case) for label, case in CASES.items()}
    file = Path(__file__).with_name("golden_bitsandbytes.json")
    file.write_text(json.dumps(found, indent=1) + "\n")
    for label, each in found.items():
        print(label, {name: tensor[:2] for name, tensor in each["tensors"].items()})


if __name__ == "__main__":
    main()
