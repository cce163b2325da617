"""``vllm_fq_modelopt_state.pth``: quantizers of layer inputs and KV caches, in the layout that NVIDIA ModelOpt's
vLLM reload reads.

Layout of ModelOpt 0.47 (``export/plugins/vllm_fakequant_hf.py``), written with torch alone. Weight
quantizers are not in it: the weights are folded, and the reload turns off every weight quantizer that the
file does not name.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

from loadstone.artifact.files import check_inside
from loadstone.artifact.formats.bin import load_values
from loadstone.errors import ArtifactError, UsageError
from loadstone.fakequant.plan import ExportPlan
from loadstone.fakequant.rules import module_of
from loadstone.fakequant.state import QuantizerState, quantizer_of

MODELOPT_FILE = "vllm_fq_modelopt_state.pth"
MODELOPT_VERSION = "0.47.0"
_KEYS = {"modelopt_version", "modelopt_state_dict", "modelopt_state_weights"}

# What each input format is in ModelOpt's words.
_ATTRIBUTES: dict[str, dict[str, Any]] = {
    "int8": {"num_bits": 8, "axis": None},
    "fp8": {"num_bits": (4, 3), "axis": None},
    "fp8-token": {"num_bits": (4, 3), "axis": None, "type": "dynamic", "block_sizes": {-1: None}},
    "nvfp4": {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}},
    "mxfp8": {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
    "mxfp4": {"num_bits": (2, 1), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
}
_DEFAULTS: dict[str, Any] = {
    "_num_bits": 8, "_axis": None, "_block_sizes": None, "_dynamic": False, "_disabled": True, "_fake_quant": True,
    "_if_quant": True, "_if_calib": False, "_unsigned": False, "_narrow_range": False, "_rotate": False, "_bias": None,
    "_trt_high_precision_dtype": "Float", "_pass_through_bwd": True, "_use_constant_amax": False,
    "_constant_amax": None, "_enable_pre_quant_scale": True, "_dequantize": False, "_learn_amax": False,
    "_effective_bits": None, "_input_dtype": None, "backend": None, "backend_extra_args": {},
}  # fmt: skip


def write_modelopt_state(plan: ExportPlan, state: QuantizerState, out: Path) -> None:
    """Write the file: every Linear's input and output quantizer, on where ``state`` has one and off
    where not."""
    import torch

    for name, spec in state.specs.items():
        if spec not in _ATTRIBUTES:
            raise UsageError(f"'{name}': ModelOpt has no quantizer for {spec}", "Leave out --emit modelopt")
    quantizers: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    every = [name for step in plan.steps if (name := quantizer_of(plan, step))]
    outputs = [
        f"{module_of(step.name)}.output_quantizer" for step in plan.steps if plan.roles[step.name].inputs
    ]
    for name in dict.fromkeys([*every, *outputs, *state.specs]):
        buffers = {}
        for key in ("amax", "pre_quant_scale"):
            tensor = state.tensors.get(f"{name}.{key}")
            if tensor is not None:
                buffers[f"_{key}"] = tensor.detach().float().cpu().clone()
        metadata = {key: {"shape": t.shape, "dtype": t.dtype} for key, t in buffers.items()}
        quantizers[name] = (
            _DEFAULTS
            | _on(state.specs.get(name))
            | {"_pytorch_state_metadata": {"params": {}, "buffers": metadata}}
        )
        weights[name] = OrderedDict(buffers)
    config = {"quant_cfg": _config(state), "algorithm": None}
    mode = ("quantize", {"config": config, "metadata": {"quantizer_state": quantizers}})
    content = {
        "modelopt_version": MODELOPT_VERSION,
        "modelopt_state_dict": [mode],
        "modelopt_state_weights": weights,
    }
    torch.save(content, out / MODELOPT_FILE)
    read_modelopt_state(out)


def _on(spec: str | None) -> dict[str, Any]:
    if spec is None:
        return {}
    attributes = _ATTRIBUTES[spec]
    found = {f"_{key}": value for key, value in attributes.items() if key != "type"}
    return found | {"_disabled": False, "_dynamic": attributes.get("type") == "dynamic"}


def _config(state: QuantizerState) -> list[dict[str, Any]]:
    """Which kinds of quantizers a reload must make; what each of them does is in its own state."""
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    kinds = {name.rpartition(".")[2]: spec for name, spec in sorted(state.specs.items())}
    return entries + [
        {"quantizer_name": f"*{kind}", "cfg": _ATTRIBUTES[spec]} for kind, spec in kinds.items()
    ]


def read_modelopt_state(directory: Path) -> dict[str, Any]:
    """The file's content; `ArtifactError` when it holds more than tensors and plain values: no code is
    run."""
    content = load_values(check_inside(directory, MODELOPT_FILE))
    if not isinstance(content, dict) or set(content) != _KEYS:
        raise ArtifactError(
            f"{MODELOPT_FILE}: not a ModelOpt state file", "Export again with --emit modelopt"
        )
    return content
