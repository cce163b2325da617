"""PEFT's LoRA adapters: what each does to the tensors of the model that it was trained on."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadstone.artifact.files import MAX_CONFIG_BYTES, Sink, check_inside, is_file, read_json
from loadstone.artifact.formats.safetensors import FLOAT_DTYPES, TensorInfo
from loadstone.artifact.formats.weights import WeightFiles
from loadstone.artifact.kinds import ADAPTER_CONFIG
from loadstone.artifact.patterns import unsound
from loadstone.artifact.source import Source, open_source
from loadstone.errors import ArtifactError

_FILES = (("safetensors", "adapter_model.safetensors"), ("bin", "adapter_model.bin"))
_PREFIX = "base_model.model."
PEFT_MERGES = "Merge it with peft (merge_and_unload, save_pretrained), then name that directory"
OTHER_BASE = "Name the base that it was trained on by --base"
_RESTORE = "Restore it from the source"
# Kinds that put tokens, states or whole layers beside a model whose weights stay as they are.
_BESIDE = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "ADAPTION_PROMPT", "CARTRIDGE",
    "XLORA",
)  # fmt: skip
# Options that `Change` carries out, and those that say how the adapter was trained.
_KNOWN = frozenset({
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias",
    "fan_in_fan_out", "modules_to_save", "trainable_token_indices", "ensure_weight_tying", "init_lora_weights",
    "auto_mapping", "peft_version", "task_type", "inference_mode", "base_model_name_or_path", "revision", "bias",
    "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
})  # fmt: skip
# Starts that leave the base's weights as they are.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
# What a tensor of the adapter is to its module, by the end of its name.
_PARTS = {
    ".lora_A.weight": "a", ".lora_B.weight": "b", ".lora_embedding_A": "a", ".lora_embedding_B": "b",
    ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude", ".lora_B.bias": "bias",
    ".token_adapter.trainable_tokens_delta": "rows",
}  # fmt: skip


@dataclass(frozen=True)
class LowRank:
    """``scale * (b @ a)``: a is (rank, in), b (out, rank). ``magnitude``: DoRA's norm of each output, (out,)."""

    a: TensorInfo
    b: TensorInfo
    scale: float
    embedding: bool = False
    magnitude: TensorInfo | None = None


@dataclass(frozen=True)
class Change:
    """What an adapter does to a tensor: it is replaced (``trained``), a product or a vector times a number is added,
    ``rows`` are replaced. ``transposed``: the tensor is stored (in, out)."""

    trained: TensorInfo | None = None
    low_rank: LowRank | None = None
    added: tuple[TensorInfo, float] | None = None
    rows: tuple[TensorInfo, tuple[int, ...]] | None = None
    transposed: bool = False

    def shape(self, base: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the tensor has to have; ``base``'s where the change says nothing of it."""
        if self.low_rank is not None:
            shape = (self.low_rank.b.shape[0], self.low_rank.a.shape[1])
            return shape[::-1] if self.transposed else shape
        if self.added is not None:
            return tuple(self.added[0].shape)
        return tuple(self.trained.shape) if self.trained is not None else base

    @property
    def first(self) -> TensorInfo:
        """One of the adapter's tensors, for messages."""
        found = self.trained or (self.low_rank and self.low_rank.a) or (self.added or self.rows or (None,))[0]
        assert found is not None
        return found


@dataclass(frozen=True)
class Adapter:
    """An adapter's files. ``changes``: by the names that the tensors have in the model that was trained;
    ``config_changes``: what the merged model's config.json says otherwise than the base's."""

    directory: Path
    files: tuple[str, ...]
    source: Source = field(repr=False)
    changes: dict[str, Change] = field(repr=False)
    config: dict[str, Any] = field(repr=False)
    config_changes: dict[str, Any] = field(repr=False, default_factory=dict)

    def __str__(self) -> str:
        low_rank = sum(change.low_rank is not None for change in self.changes.values())
        trained = len(self.changes) - low_rank
        return f"LoRA of {_count(low_rank, 'weight')}" + (
            f" and {_count(trained, 'trained tensor')}" if trained else ""
        )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json; raises `ArtifactError` for what is not merged exactly, by the name of the option."""
    config = read_json(check_inside(directory, ADAPTER_CONFIG), MAX_CONFIG_BYTES)
    kind = config.get("peft_type")
    if kind in _BESIDE:
        raise ArtifactError(
            f"{ADAPTER_CONFIG}: {kind} computes beside the model and changes no weight, so it cannot be merged",
            "Use it with peft; what loadstone measures or writes is the base alone",
        )
    if kind != "LORA":
        raise ArtifactError(
            f"{ADAPTER_CONFIG}: peft_type {ascii(kind)[:40]} is not merged here, only LORA", PEFT_MERGES
        )
    unknown = sorted(key for key, value in config.items() if value and key not in _KNOWN)
    if unknown:
        raise ArtifactError(
            f"{ADAPTER_CONFIG}: adapters with {ascii(unknown[0])[1:-1][:80]} are not merged here", PEFT_MERGES
        )
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise ArtifactError(
            f"{ADAPTER_CONFIG}: init_lora_weights {ascii(start)[:40]} changed the base's weights before training",
            "Merge it with peft, which repeats that, or save it with path_initial_model_for_weight_conversion",
        )
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise ArtifactError(f"{ADAPTER_CONFIG}: {key} is not an object", _RESTORE)
    return config


def read_adapter(directory: Path, sink: Sink) -> Adapter:
    """The adapter; raises `ArtifactError` for tensors that do not belong together or to its config."""
    config = read_adapter_config(directory)
    found = next(((fmt, name) for fmt, name in _FILES if is_file(directory / name)), None)
    if found is None:
        raise ArtifactError(f"'{directory}' has no adapter_model.safetensors", "Copy the file")
    check_inside(directory, found[1])
    source = open_source(directory, WeightFiles(found[0], (found[1],)), sink)
    parts: dict[str, dict[str, TensorInfo]] = {}
    embeddings: set[str] = set()
    trained: dict[str, TensorInfo] = {}
    for key, info in source.tensors.items():
        name = key.removeprefix(_PREFIX)
        if name == key or info.dtype not in FLOAT_DTYPES:
            raise ArtifactError(f"{info.file}: '{key}' is not a tensor of an adapter", PEFT_MERGES)
        suffix = next((s for s in _PARTS if name.endswith(s)), None)
        if suffix is not None:
            module = name.removesuffix(suffix)
            parts.setdefault(module, {})[_PARTS[suffix]] = info
            if "embedding" in suffix:
                embeddings.add(module)
        elif ".original_module." not in f".{name}":
            # Saved by a module of peft's around the trained one: the same values, or newer ones.
            plain = name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")
            if plain != name or plain not in trained:
                trained[plain] = info
    changes: dict[str, dict[str, Any]] = {name: {"trained": info} for name, info in trained.items()}
    for module, found_parts in parts.items():
        for name, change in _changes_of(config, module, found_parts, module in embeddings):
            changes.setdefault(name, {}).update(change)
    if not changes:
        raise ArtifactError(f"{found[1]}: holds no tensor", "Copy the file again")
    made = {name: Change(**change) for name, change in changes.items()}
    return Adapter(directory, (ADAPTER_CONFIG, found[1]), source, made, config)


def _changes_of(
    config: dict[str, Any], module: str, parts: dict[str, TensorInfo], embedding: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What the adapter's tensors of one module do to its weight and its bias."""
    weight = f"{module}.weight"
    if (rows := parts.get("rows")) is not None:
        yield weight, {"rows": (rows, _rows(config, module, rows))}
        if len(parts) == 1:
            return
    a, b = parts.get("a"), parts.get("b")
    if a is None or b is None:
        raise ArtifactError(
            f"{next(iter(parts.values())).file}: one of the two factors of '{weight}' is missing",
            "Copy the file again",
        )
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise ArtifactError(
            f"{a.file}: the factors of '{weight}' have shapes {a.shape} and {b.shape}", PEFT_MERGES
        )
    scale, magnitude = _scale(config, module, a.shape[0]), parts.get("magnitude")
    # Of an embedding's weight, which is stored transposed, peft takes the norm of each column.
    if (magnitude is not None) != bool(config.get("use_dora")) or (
        magnitude is not None and magnitude.shape != (b.shape[0],)
    ):
        raise ArtifactError(
            f"{a.file}: the lora_magnitude_vector of '{weight}' does not fit use_dora", PEFT_MERGES
        )
    transposed = embedding or config.get("fan_in_fan_out") is True
    yield weight, {"low_rank": LowRank(a, b, scale, embedding, magnitude), "transposed": transposed}
    if (bias := parts.get("bias")) is not None:
        yield f"{module}.bias", {"added": (bias, scale)}


def _rows(config: dict[str, Any], module: str, stored: TensorInfo) -> tuple[int, ...]:
    """The indices of the tokens whose rows were trained."""
    given = config.get("trainable_token_indices")
    if isinstance(given, dict):
        given = next((v for k, v in given.items() if f".{module}".endswith(f".{k}")), None)
    indices = given if isinstance(given, list) and all(type(i) is int and i >= 0 for i in given) else []
    if len(stored.shape) != 2 or len(indices) != stored.shape[0]:
        raise ArtifactError(
            f"{ADAPTER_CONFIG}: trainable_token_indices do not fit the {list(stored.shape)} trained rows of '{module}'",
            _RESTORE,
        )
    return tuple(indices)


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """peft's scaling of a layer; its rank is checked against the config."""
    expected = _by_pattern(config, "rank_pattern", module, config.get("r"))
    alpha = _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha"))
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and math.isfinite(alpha)
    if not number or expected != rank:
        raise ArtifactError(
            f"{ADAPTER_CONFIG}: rank {ascii(expected)[:40]} and alpha {ascii(alpha)[:40]} do not fit '{module}', "
            f"whose rank is {rank}",
            _RESTORE,
        )
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _by_pattern(config: dict[str, Any], key: str, module: str, default: Any) -> Any:
    for pattern, value in (config.get(key) or {}).items():
        if why := unsound(pattern):
            raise ArtifactError(f"{ADAPTER_CONFIG}: {key}: {ascii(pattern)[:80]} {why}", PEFT_MERGES)
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def check_change(name: str, change: Change, base: TensorInfo) -> None:
    """Raise `ArtifactError` for a change that does not fit the base's tensor of that name."""
    shape = change.shape(base.shape)
    if shape != base.shape:
        raise ArtifactError(
            f"{change.first.file}: '{change.first.name}' is for a tensor of shape {list(shape)}, '{name}' of the base "
            f"has {list(base.shape)}",
            OTHER_BASE,
        )
    if change.rows and (
        change.rows[0].shape[1:] != base.shape[1:] or max(change.rows[1], default=0) >= base.shape[0]
    ):
        raise ArtifactError(
            f"{change.first.file}: the trained rows do not fit '{name}', which has {list(base.shape)}",
            OTHER_BASE,
        )
    if base.dtype not in FLOAT_DTYPES:
        raise ArtifactError(f"'{name}' is {base.dtype}: only floating tensors are merged", OTHER_BASE)
