"""Hints for a directory that is not a model: what it seems to be, and where the model may be."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from loadstone.errors import ArtifactError

MLX_REMEDY = "Convert it back (mlx_lm.convert --dequantize), or use the model's version for transformers"
MODELOPT_REMEDY = (
    "Serve it with vLLM, SGLang or TensorRT-LLM, or name the checkpoint that it was quantized from"
)
QUANTO_REMEDY = "Load it with optimum.quanto's QuantizedModelForCausalLM, or name the model it was made from"
LFS_REMEDY = "Fetch the file itself: git lfs pull, in the repository"
# What wrappers of a module put before its parameters' names.
_WRAPPERS = {"module.": "DistributedDataParallel", "_orig_mod.": "torch.compile"}

_VERL = "Merge its shards: python -m verl.model_merger merge --backend fsdp --local_dir DIR/actor --target_dir OUT"
# (file pattern, what it is, what to do), for directories without weights that can be loaded.
MODEL_FILES = (
    (
        "pytorch_model_fsdp_rank*.bin",
        "FSDP shards of single ranks",
        "Gather them: accelerate merge-weights DIR OUT",
    ),
    ("global_step_*/actor", "a verl run", _VERL),
    ("actor/*", "a verl checkpoint", _VERL),
    ("global_step*", "DeepSpeed shards", "Gather them: python zero_to_fp32.py . OUT, which lies beside them"),
    (
        "zero_pp_rank*",
        "DeepSpeed shards",
        "Gather them: python zero_to_fp32.py . OUT, which lies beside them",
    ),
    (
        "model_world_size_*_rank_*.pt",
        "verl's FSDP shards",
        _VERL,
    ),
    (
        "iter_*",
        "a Megatron run",
        "Convert it with Megatron-Bridge or tools/checkpoint/convert.py (saver hf), then name that directory",
    ),
    (
        "*.nemo",
        "a NeMo archive",
        "Export it with NeMo (nemo llm export, target hf), then name that directory",
    ),
    (
        "model_config.yaml",
        "a NeMo checkpoint",
        "Export it with NeMo (nemo llm export, target hf), then name that directory",
    ),
    (
        "*.ckpt",
        "a Lightning checkpoint",
        "Load it with its LightningModule, and save the transformers model in it by save_pretrained",
    ),
    (
        "modelopt_state.pth",
        "ModelOpt's quantizer state",
        "Export the model with modelopt's export_hf_checkpoint, then name that directory",
    ),
    ("mp_rank_*", "Megatron or DeepSpeed shards", "Convert them with the trainer's own tool first"),
    (
        "adapter_model.*",
        "an adapter without its adapter_config.json",
        "Copy that file from the source too",
    ),
    (
        "consolidated*.safetensors",
        "the original release's weights",
        "Use the model's version for transformers",
    ),
    ("consolidated*.pth", "the original release's weights", "Use the model's version for transformers"),
    (
        "*.gguf",
        "a GGUF file",
        "Convert it: AutoModelForCausalLM.from_pretrained(DIR, gguf_file=FILE), then save it",
    ),
    ("tf_model.h5", "TensorFlow weights", "Convert them to safetensors with transformers 4"),
    ("flax_model.msgpack", "Flax weights", "Convert them to safetensors with transformers 4"),
    ("*.onnx", "an ONNX model", "Name the directory it was exported from"),
    (
        "weights*.npz",
        "an mlx model",
        "Convert it back: mlx_lm.convert --dequantize, or use the model's version for transformers",
    ),
    ("model_index.json", "a diffusers pipeline", "Name the folder of one of its models"),
    (
        "*.safetensors",
        "safetensors files under other names",
        "Rename the file to model.safetensors, or add its index",
    ),
)


def nearest(path: Path) -> str:
    """A hint for a path that is not there."""
    try:
        siblings = [p.name for p in path.parent.iterdir() if p.is_dir()]
    except OSError:
        siblings = []
    import difflib

    close = difflib.get_close_matches(path.name, siblings, n=1)
    if close:
        return f"Did you mean '{path.parent / close[0]}'?"
    hub = (
        ". A hub name must be downloaded first (hf download NAME --local-dir DIR)"
        if is_hub_name(str(path))
        else ""
    )
    return f"Check the path{hub}"


def is_hub_name(name: str) -> bool:
    """Whether a name could be that of a repository on the Hugging Face hub."""
    return re.fullmatch(r"\w[\w.-]{0,95}/\w[\w.-]{0,95}", name) is not None


def hub_cache() -> str:
    """Where the Hugging Face hub's cache lies."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return HF_HUB_CACHE


def file_hint(path: Path) -> str:
    """A hint for a file where a model directory was expected."""
    for pattern, what, remedy in MODEL_FILES:
        if path.match(pattern) and pattern != "*.safetensors":
            return f"It is {what}. {remedy}"
    return f"Name the directory: {path.parent}"


def no_config_hint(root: Path) -> str:
    """A hint for a directory without config.json."""
    try:
        if (root / "config.json").is_symlink() or (root / "config.json").exists():
            return "config.json is there and is not a regular file: restore it from the source"
        for pattern, what, remedy in MODEL_FILES:
            if next(root.glob(pattern), None) is not None and pattern != "*.safetensors":
                return f"It holds {what}. {remedy}"
        found = sorted(
            p.parent.name for name in ("config", "adapter_config") for p in root.glob(f"*/{name}.json")
        )
    except OSError:
        found = []
    if found:
        return f"Did you mean '{root / found[0]}'?"
    return "Name a directory that save_pretrained or finalize wrote"


def wrapped_names(names: Collection[str]) -> ArtifactError | None:
    """The error for a state dict that was saved from a wrapped model, None when it was not."""
    for prefix, wrapper in _WRAPPERS.items():
        inside = [name for name in names if prefix == "_orig_mod." and f".{prefix}" in f".{name}"]
        if inside or (names and all(name.startswith(prefix) for name in names)):
            return ArtifactError(
                f"tensor '{(inside or sorted(names))[0]}' has the prefix '{prefix}' of {wrapper}",
                f"Save the model inside ({'model._orig_mod' if inside else 'model.module'}.save_pretrained), or "
                f"remove '{prefix}' from the names of the tensors",
            )
    return None


def mlx_block(config: dict[str, Any], names: Collection[str]) -> ArtifactError | None:
    """The error for a model that mlx quantized, None for others."""
    block = config.get("quantization_config")
    if not isinstance(block, dict) or "quant_method" in block or "bits" not in block:
        return None
    if not any(name.endswith(".scales") for name in names):
        return None
    return ArtifactError("config.json: the model is quantized by mlx", MLX_REMEDY)


def is_lfs_pointer(start: bytes) -> bool:
    """Whether a file's first bytes are those of a git-LFS pointer, which stands for a file that was not fetched."""
    return start.startswith(b"version https://git-lfs")
