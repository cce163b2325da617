"""Record golden vectors from NVIDIA ModelOpt 0.47 into golden/*.safetensors (needs ``nvidia-modelopt`` and
``requests``).

Usage: python tests/fakequant/record_golden.py. INT8, INT4, FP8 and W4A8 come from ModelOpt's official
configurations on a Linear, folded as its exporter folds (``weight_quantizer(weight.float()).to(dtype)``);
NVFP4 and MX from its storage classes; inputs from its quantizers in the same way.
"""

from __future__ import annotations

import copy
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.qtensor import MXFP4QTensor, MXFP8QTensor, NVFP4QTensor
from safetensors.torch import save_file

HERE = Path(__file__).parent / "golden"
CONFIGS = {
    "int8": mtq.INT8_WEIGHT_ONLY_CFG,
    "int4": mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG,
    "fp8": mtq.FP8_DEFAULT_CFG,
    "fp8:granularity=row": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
    "fp8:granularity=block": mtq.FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG,
    "w4a8": mtq.W4A8_AWQ_BETA_CFG,
}
INPUTS = {
    "int8": mtq.INT8_DEFAULT_CFG,
    "fp8": mtq.FP8_DEFAULT_CFG,
    "fp8-token": mtq.FP8_PER_CHANNEL_PER_TOKEN_CFG,
}


def weight(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """Gaussian rows, and rows that are zero, tiny, huge, exact ties, and one lone value."""
    generator = torch.Generator().manual_seed(rows * 1000 + width)
    w = torch.randn(rows, width, generator=generator) * 0.05
    w[1] = 0
    w[2] *= 1e-4
    w[3] *= 1e-8
    w[4] *= 40
    w[5] = torch.tensor([0.25, -0.75, 1.25, -1.75, 2.5, -3.5, 5.0, 6.0]).repeat(width)[:width]
    w[6] = 0
    w[6, 3] = -0.7
    return w.to(dtype)


def quantized(config: dict, w: torch.Tensor, x: torch.Tensor | None = None) -> torch.nn.Module:
    config = copy.deepcopy(config)
    config["algorithm"] = "max"
    linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False, dtype=w.dtype)
    linear.weight.data.copy_(w)
    calibration = x if x is not None else torch.ones(2, w.shape[1], dtype=w.dtype)
    holder = torch.nn.Sequential(linear)
    mtq.quantize(holder, config, lambda m: m(calibration))
    return holder[0]


def main() -> None:
    HERE.mkdir(exist_ok=True)
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            name = str(dtype).removeprefix("torch.")
            found: dict[str, torch.Tensor] = {}
            for rows, width in ((12, 128), (9, 80)):
                w = weight(rows, width, dtype)
                found[f"weight.{width}"] = w
                for text, config in CONFIGS.items():
                    module = quantized(config, w)
                    found[f"{text}.{width}"] = module.weight_quantizer(w.float()).to(dtype).clone()
                tensor, scale, whole = NVFP4QTensor.quantize(w.clone(), 16)
                options = {"scale": scale, "double_scale": whole, "block_sizes": {-1: 16}}
                found[f"nvfp4.{width}"] = tensor.dequantize(dtype, **options)
                if width % 32 == 0:
                    four, scale = MXFP4QTensor.quantize(w.clone(), 32)
                    found[f"mxfp4.{width}"] = four.dequantize(dtype, scale=scale, block_sizes={-1: 32})
                eight, scale = MXFP8QTensor.quantize(w.clone())
                found[f"mxfp8.{width}"] = eight.dequantize(dtype, scale=scale)
                x, later = weight(8, width, dtype) * 20, weight(10, width, dtype) * 30
                found[f"input.{width}"] = later
                for text, config in INPUTS.items():
                    quantizer = quantized(config, w, x).input_quantizer
                    found[f"input:{text}.{width}"] = quantizer(later.float()).to(dtype).clone()
                    if quantizer.amax is not None:
                        found[f"amax:{text}.{width}"] = quantizer.amax.clone()
            found = {k: v.detach().clone().contiguous() for k, v in found.items()}
            save_file(found, HERE / f"modelopt-0.47-{name}.safetensors")
            print(name, len(found), sum(t.nbytes for t in found.values()))


if __name__ == "__main__":
    main()
