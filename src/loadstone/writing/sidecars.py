"""The files beside the weights: tokenizer, chat template, generation config, processors, model card."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

from loadstone.artifact import Artifact
from loadstone.artifact.files import check_inside, following_links, is_file, read_json, read_text
from loadstone.artifact.kinds import ADAPTER_CONFIG
from loadstone.errors import ArtifactError

# Not carried over from a model directory, by what they are; everything else is.
WEIGHTS, TRAINING, QUANTIZER, CACHES, CODE = (
    "other weights",
    "training state",
    "settings of the source's quantizer",
    "caches",
    "Python code that no config names",
)
_WRITTEN_ANEW = {"config.json", "loadstone.json"}
_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".index.json", ".distcp", ".h5", ".msgpack", ".onnx",
    ".onnx_data", ".ot", ".tflite", ".npz", ".pkl", ".pickle", ".joblib", ".mlmodel", ".mlpackage",
)  # fmt: skip
_TRAINING = re.compile(
    r"optimizer.*|scheduler.*|scaler.*|rng_state.*|random_states.*|trainer_state\.json|training_args\.(json|bin)"
    r"|(all|train|eval)_results\.json|events\.out\..*|latest|zero_to_fp32\.py"
)
# Of ModelOpt, GPTQ, AWQ and auto-round: they do not describe the weights that are written.
_QUANTIZER = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")
_TRAINING_FOLDERS = re.compile(
    r"checkpoint-\d+|runs|logs|wandb|global_step\d+|optimizer(_\d+)?|pytorch_model_fsdp_\d+"
)
_WEIGHT_FOLDERS = ("onnx", "openvino", "original", "coreml", "tf", "flax", "gguf", "mlx")
_CACHE_SUFFIXES = (".tmp", ".lock", ".pyc", ".incomplete")
# Hidden files that say something of the model; others belong to tools.
_HIDDEN_KEPT = (".gitattributes",)

log = logging.getLogger(__name__)
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"


def find_sidecars(artifact: Artifact, *, remote_code: bool = True) -> dict[str, Path]:
    """Files to carry over, by relative name; a checkpoint's own win over those of its training run.

    ``remote_code``: see `sidecars_in`. What stays behind is said in one line of the log.
    """
    with following_links(artifact.follow_links):
        if artifact.adapter is None:
            return sidecars_in(tuple(reversed(artifact.sidecar_dirs)), remote_code=remote_code)
        # The output holds the base with the adapter merged in: it is not an adapter itself.
        own = sidecars_in((artifact.adapter.directory,), remote_code=remote_code)
        return sidecars_in((artifact.path,), remote_code=remote_code) | {
            n: p for n, p in own.items() if n != ADAPTER_CONFIG
        }


def sidecars_in(directories: tuple[Path, ...], remote_code: bool = False) -> dict[str, Path]:
    """Every file of the directories, the last of which wins, but weights, training state, caches and what is written
    anew; of the last one its folders too. The weights of a sentence-transformers module (modules.json) belong to it.

    ``remote_code``: Python files too, where a config names code (``auto_map``). What stays behind is logged. Raises
    `ArtifactError` for a link that leaves its directory: a copy would publish what it points to.
    """
    found: dict[str, Path] = {}
    left: dict[str, list[str]] = {}
    unique = list(dict.fromkeys(directories))
    code = remote_code and any(_names_code(directory) for directory in unique)
    for directory in unique:
        modules = _module_folders(directory)
        for name in _files(directory, folders=directory is unique[-1]):
            why = "" if name.partition("/")[0] in modules else _left_out(name, code)
            if name in _WRITTEN_ANEW:
                continue
            if why:
                left.setdefault(why, []).append(name)
            else:
                found[name] = check_inside(directory, name)
    _tell(left)
    return found


def _tell(left: dict[str, list[str]]) -> None:
    """Say in one line what stays behind and why; weights in safetensors and .bin are the source itself."""
    told = []
    for why, names in sorted(left.items()):
        shown = [
            n
            for n in names
            if why != WEIGHTS or "/" in n or not n.endswith((".safetensors", ".bin", ".json", ".distcp"))
        ]
        if shown:
            more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
            told.append(f"{why} ({', '.join(shown[:3])}{more})")
    if told:
        log.info("left behind: %s", "; ".join(told))


def _files(directory: Path, *, folders: bool) -> list[str]:
    """Relative names of the regular files of a directory, in order; links to folders are not followed."""
    names: list[str] = []
    pending = [directory]
    while pending:
        folder = pending.pop()
        for path in sorted(folder.iterdir()):
            if is_file(path):
                names.append(path.relative_to(directory).as_posix())
            elif folders and path.is_dir() and not path.is_symlink() and not _skipped(path, directory):
                pending.append(path)
    return sorted(names)


def _skipped(folder: Path, root: Path) -> bool:
    """Whether a folder holds nothing of the model: caches, version control, another training state."""
    hidden = folder.name.startswith(".") or folder.name == "__pycache__"
    return hidden or (folder.parent == root and _TRAINING_FOLDERS.fullmatch(folder.name) is not None)


def _left_out(name: str, code: bool) -> str:
    """Why a file stays behind; empty for one that is carried over."""
    folder, _, leaf = name.rpartition("/")
    if leaf.endswith(_CACHE_SUFFIXES) or (leaf.startswith(".") and leaf not in _HIDDEN_KEPT):
        return CACHES
    if _TRAINING.fullmatch(leaf):
        return TRAINING
    if name in _QUANTIZER:
        return QUANTIZER
    if leaf.endswith(_WEIGHT_SUFFIXES) or folder.partition("/")[0] in _WEIGHT_FOLDERS:
        return WEIGHTS
    return CODE if leaf.endswith(".py") and not code else ""


def _names_code(directory: Path) -> bool:
    """Whether the config of the model, its tokenizer or its processors names Python code beside it."""
    for name in ("config.json", TOKENIZER_CONFIG, "processor_config.json", "preprocessor_config.json"):
        if is_file(directory / name) and read_json(check_inside(directory, name)).get("auto_map"):
            return True
    return False


def _module_folders(directory: Path) -> set[str]:
    """The folders of a sentence-transformers model's modules, which hold weights of their own."""
    if not is_file(directory / "modules.json"):
        return set()
    try:
        modules = json.loads(read_text(check_inside(directory, "modules.json")))
        paths = {str(module["path"]) for module in modules} if isinstance(modules, list) else set()
    except (ArtifactError, ValueError, RecursionError, KeyError, TypeError):
        return set()
    # Saved without an entry for some module, its folder is still named by number.
    numbered = {path.name for path in directory.iterdir() if re.fullmatch(r"\d+_[A-Z]\w*", path.name)}
    return {path for path in paths if path} | numbered


def copy_sidecars(sidecars: dict[str, Path], out: Path) -> list[str]:
    """Copy them; returns notes. A chat template that stands twice is written once, in its own file.

    Raises `ArtifactError` for a tokenizer_config.json that is no JSON object.
    """
    notes = []
    for name, path in sidecars.items():
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
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
