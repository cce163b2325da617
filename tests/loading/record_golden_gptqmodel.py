"""Write into golden_gptqmodel.json what the installed gptqmodel stores of a tiny model, and its layers multiply by.

Run in an environment that has it: python tests/loading/record_golden_gptqmodel.py
Of each format: the config block, the stored tensors of two layers, and the sha256 of their decoded weights in float16
(of AWQ in the dtype of the scales). Recorded with 7.7.0.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.quantization.config import FORMAT, METHOD
from safetensors.torch import load_file
from tests.packed import digest, float16_llama, recorded

LAYERS = ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj")
FORMATS: dict[str, dict[str, Any]] = {
    "4 bits": {"bits": 4, "group_size": 32},
    "2 bits": {"bits": 2, "group_size": 32},
    "3 bits": {"bits": 3, "group_size": 32, "sym": False},
    "8 bits": {"bits": 8, "group_size": -1, "sym": False, "act_group_aware": False},
    "v2": {"bits": 4, "group_size": 32, "sym": False, "format": FORMAT.GPTQ_V2},
    "act order": {"bits": 4, "group_size": 32, "desc_act": True},
    "other bits by pattern": {
        "bits": 4, "group_size": 32,
        "dynamic": {r"-:.*q_proj.*": {}, r"+:.*\.v_proj": {"bits": 8, "group_size": 16}},
    },
    "awq": {"bits": 4, "group_size": 32, "method": METHOD.AWQ, "format": FORMAT.GEMM},
}  # fmt: skip


def record(source: Path, out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    model = GPTQModel.load(str(source), QuantizeConfig(**{"desc_act": False} | settings), device="cpu")
    model.quantize(["once upon a time there was a stone " * 8] * 16, batch_size=1)
    model.save(str(out))
    stored = load_file(out / "model.safetensors")
    block = json.loads((out / "config.json").read_text())["quantization_config"]
    dense = {}
    if block["quant_method"] == "awq":
        for name in LAYERS:
            parts = [stored[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")]
            dense[name] = dequantize_gemm(*parts, 4, 32).t()
    else:
        layers = GPTQModel.load(str(out), backend=BACKEND.TORCH, device="cpu", dtype=torch.float16).model
        dense = {name: layers.get_submodule(name).dequantize_weight().t() for name in LAYERS}
    block.pop("meta")
    return {
        "block": block,
        "tensors": recorded({name: each for name, each in stored.items() if name.startswith(LAYERS)}),
        "dtype": str(dense[LAYERS[0]].dtype).removeprefix("torch."),
        "dense": {name: digest(weight) for name, weight in dense.items()},
    }


def main() -> None:
    # gptqmodel makes one thread on a machine of two cores, and then asks for two.
    os.cpu_count = lambda: 4  # type: ignore[assignment]
    found = {}
    with tempfile.TemporaryDirectory() as name:
        source = float16_llama(Path(name) / "source", 128, 192)
        for number, (label, settings) in enumerate(FORMATS.items()):
            found[label] = record(source, Path(name) / str(number), settings)
    file = Path(__file__).with_name("golden_gptqmodel.json")
    file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
