"""Hints for a directory that is not a model: what it seems to be, and where the model may be."""

from __future__ import annotations

import re
from pathlib import Path

# (file pattern, what it is, what to do), for directories without weights that can be loaded.
MODEL_FILES = (
    (
        "pytorch_model_fsdp_rank*.bin",
        "FSDP shards of single ranks",
        "Gather them: accelerate merge-weights DIR OUT",
    ),
    ("global_step*", "DeepSpeed shards", "Gather them: python zero_to_fp32.py . OUT, which lies beside them"),
    (
        "zero_pp_rank*",
        "DeepSpeed shards",
        "Gather them: python zero_to_fp32.py . OUT, which lies beside them",
    ),
    ("mp_rank_*", "Megatron or DeepSpeed shards", "Convert them with the trainer's own tool first"),
    (
        "adapter_model.*",
        "an adapter",
        "Merge it into its base model (peft's merge_and_unload), then name that directory",
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
    looks_like_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) is not None
    hub = ". A hub name must be downloaded first (hf download NAME --local-dir DIR)" if looks_like_hub else ""
    return f"Check the path{hub}"


def no_config_hint(root: Path) -> str:
    """A hint for a directory without config.json."""
    try:
        if (root / "config.json").is_symlink() or (root / "config.json").exists():
            return "config.json is there and is not a regular file: restore it from the source"
        for pattern, what, remedy in MODEL_FILES:
            if next(root.glob(pattern), None) is not None and pattern != "*.safetensors":
                return f"It holds {what}. {remedy}"
        found = sorted(p.parent.name for p in root.glob("*/config.json"))
    except OSError:
        found = []
    if found:
        return f"Did you mean '{root / found[0]}'?"
    return "Name a directory that save_pretrained or finalize wrote"
