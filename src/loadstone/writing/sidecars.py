"""The files beside the weights: tokenizer, chat template, generation config, processors, model card."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from loadstone.artifact import Artifact
from loadstone.artifact.files import check_inside, is_file, read_json

# Weights in any form, training state, and what finalize writes anew.
_LEFT_OUT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".index.json", ".distcp", ".h5", ".msgpack", ".onnx",
    ".tmp", ".lock",
)  # fmt: skip
_LEFT_OUT_NAMES = {
    "config.json", "loadstone.json", "trainer_state.json", "training_args.json", "all_results.json",
    "train_results.json", "eval_results.json", "scheduler.json",
}  # fmt: skip
_KEPT_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken", ".py", ".spm", ".yaml")
_KEPT_NAMES = {"LICENSE", "NOTICE", "LICENCE", "COPYING"}

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
TEMPLATES = "additional_chat_templates"


def find_sidecars(artifact: Artifact) -> dict[str, Path]:
    """Sidecar files by their relative name; a checkpoint's own win over those of its training run."""
    return sidecars_in(tuple(reversed(artifact.sidecar_dirs)), bool(artifact.config.get("auto_map")))


def sidecars_in(directories: tuple[Path, ...], remote_code: bool = False) -> dict[str, Path]:
    """Sidecar files of directories, the last of which wins; ``remote_code``: Python files too.

    Raises `ArtifactError` for a link that leaves its directory: a copy would publish what it points to.
    """
    found: dict[str, Path] = {}
    for directory in dict.fromkeys(directories):
        for path in sorted(directory.iterdir()):
            if is_file(path) and _is_sidecar(path.name, remote_code):
                found[path.name] = check_inside(directory, path.name)
    last = directories[-1]
    for path in sorted((last / TEMPLATES).glob("*.jinja")):
        found[f"{TEMPLATES}/{path.name}"] = check_inside(last, f"{TEMPLATES}/{path.name}")
    return found


def copy_sidecars(sidecars: dict[str, Path], out: Path) -> list[str]:
    """Copy them; returns notes. A chat template that stands twice is written once, in its own file.

    Raises `ArtifactError` for a tokenizer_config.json that is no JSON object.
    """
    notes = []
    for name, path in sidecars.items():
        target = out / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    if TEMPLATE_FILE in sidecars and TOKENIZER_CONFIG in sidecars:
        config = read_json(sidecars[TOKENIZER_CONFIG])
        inline = config.pop("chat_template", None)
        if inline is not None:
            if inline != (out / TEMPLATE_FILE).read_text(encoding="utf-8"):
                notes.append(
                    f"two different chat templates: {TEMPLATE_FILE} is kept, the one in {TOKENIZER_CONFIG} is not"
                )
            text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
            (out / TOKENIZER_CONFIG).write_text(text, encoding="utf-8")
    return notes


def _is_sidecar(name: str, remote_code: bool) -> bool:
    if name in _LEFT_OUT_NAMES or name.endswith(_LEFT_OUT_SUFFIXES) or name.startswith("."):
        return False
    if name.endswith(".py"):
        return remote_code
    return name.endswith(_KEPT_SUFFIXES) or name.partition(".")[0].upper() in _KEPT_NAMES
