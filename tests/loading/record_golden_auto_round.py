"""Write into golden_auto_round.json what the installed auto-round stores of a tiny model, and what it computes with.

Run in an environment that has it: python tests/loading/record_golden_auto_round.py
Of each format: the config block, the stored tensors of two layers, and the sha256 of the weights that its own layers
make of them, in float32. Recorded with 0.16.1.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from tests.packed import digest, float16_llama, integer_values, recorded
from transformers import AutoModelForCausalLM, AutoTokenizer

LAYERS = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
MIXED = {LAYERS[1]: {"bits": 8}}
# Format -> options of AutoRound, what it is asked to write.
FORMATS: dict[str, tuple[dict[str, Any], str]] = {
    "gptq, sym": ({"scheme": "W4A16", "group_size": 32, "layer_config": MIXED}, "auto_round"),
    "gptq, 3 bits": ({"scheme": "W3A16", "group_size": -1}, "auto_round"),
    "own zero points": (
        {"scheme": "W4A16", "group_size": 32, "sym": False, "layer_config": {**MIXED, "q_proj": {"bits": 2}}},
        "auto_round",
    ),
    "awq": ({"scheme": "W4A16", "group_size": 32, "sym": False}, "auto_round"),
    "awq, sym": ({"scheme": "W4A16", "group_size": 32}, "auto_round:auto_awq"),
    "mxfp4 and mxfp8": (
        {"scheme": "MXFP4", "layer_config": {LAYERS[1]: {"bits": 8, "data_type": "mx_fp", "act_bits": 8}}},
        "auto_round",
    ),
    "nvfp4": ({"scheme": "NVFP4"}, "auto_round"),
    "fp8 block": ({"scheme": "FP8_BLOCK"}, "auto_round"),
    "fp8 alone": ({"scheme": "FPW8A16"}, "auto_round"),
    "fp8 static": ({"scheme": "FP8_STATIC"}, "auto_round"),
}


def dense(model: Any, name: str, stored: dict[str, torch.Tensor], block: dict[str, Any]) -> torch.Tensor:
    """The weight (out, in) in float32 that auto-round's layer multiplies by; of a format that it has no layer for on
    this machine (AWQ, FP8) what the published layout says."""
    if "awq" in block.get("packing_format", ""):
        return integer_values(stored, f"{name}.weight", block | {"quant_method": "awq"}).float()
    if block["data_type"] == "fp":
        scale = stored.get(f"{name}.weight_scale_inv", stored.get(f"{name}.weight_scale")).float()
        # One block, one row each or one tensor: all spread over the weight.
        return stored[f"{name}.weight"].float() * (scale if scale.numel() == 1 else scale.view(-1, 1))
    layer = model.get_submodule(name)
    if hasattr(layer, "dequant_weight_online"):
        weight = layer.dequant_weight_online().float()
        # The order of two multiplications is another than compressed-tensors'.
        return weight.bfloat16().float() if block["data_type"] == "nv_fp" else weight
    columns = stored[f"{name}.qweight"].shape[0] * 32 // layer.bits
    with torch.no_grad():
        return layer(torch.eye(columns, dtype=torch.float16)).t().float()


def record(folder: Path, source: Path, options: dict[str, Any], written: str) -> dict[str, Any]:
    texts = folder / "texts.json"
    texts.write_text(json.dumps([{"text": "once upon a time there was a stone " * 40}] * 8))
    rounder = AutoRound(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float16),
        AutoTokenizer.from_pretrained(source),
        iters=0, disable_opt_rtn=True, device_map="cpu", nsamples=4, seqlen=32, dataset=str(texts), **options,
    )  # fmt: skip
    rounder.quantize_and_save(str(folder / "out"), format=written)
    directory = next((folder / "out").rglob("config.json")).parent
    stored = load_file(directory / "model.safetensors")
    block = json.loads((directory / "config.json").read_text())["quantization_config"]
    own = block["data_type"] != "fp" and "awq" not in block["packing_format"]
    model = AutoModelForCausalLM.from_pretrained(directory, device_map="cpu") if own else None
    return {
        "block": block,
        "tensors": recorded({name: each for name, each in stored.items() if name.startswith(LAYERS)}),
        "dense": {name: digest(dense(model, name, stored, block) + 0.0) for name in LAYERS},
    }


def main() -> None:
    found = {}
    with tempfile.TemporaryDirectory() as name:
        source = float16_llama(Path(name) / "source", 64, 96)
        for number, (label, (options, written)) in enumerate(FORMATS.items()):
            folder = Path(name) / str(number)
            folder.mkdir()
            try:
                found[label] = record(folder, source, options, written)
            except Exception as error:
                print(label, repr(error)[:300])
    file = Path(__file__).with_name("golden_auto_round.json")
    file.write_text(json.dumps(found, indent=1) + "\n")
    for label, each in found.items():
        print(label, each["block"], {n: t[:2] for n, t in each["tensors"].items()})


if __name__ == "__main__":
    main()
