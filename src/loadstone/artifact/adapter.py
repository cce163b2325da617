"""PEFT's LoRA adapters: which tensors of the base each changes, and the base with the adapter merged in."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from loadstone.artifact.files import MAX_CONFIG_BYTES, Sink, check_inside, is_file, read_json
from loadstone.artifact.formats.safetensors import FLOAT_DTYPES, TensorInfo
from loadstone.artifact.formats.weights import WeightFiles
from loadstone.artifact.source import Opened, Source, open_source
from loadstone.artifact.torchao.checks import FlatTensor
from loadstone.errors import ArtifactError

if TYPE_CHECKING:
    import torch

    from loadstone.artifact.values import Limits

ADAPTER_CONFIG = "adapter_config.json"
_FILES = (("safetensors", "adapter_model.safetensors"), ("bin", "adapter_model.bin"))
_PREFIX = "base_model.model."
_REMEDY = "Merge it with peft (merge_and_unload, save_pretrained), then name that directory"
# peft's names of the two factors: of a layer, and of an embedding, whose product is stored transposed.
_FACTORS = {
    ".lora_A.weight": (0, False), ".lora_B.weight": (1, False), ".lora_embedding_A": (0, True),
    ".lora_embedding_B": (1, True),
}  # fmt: skip


@dataclass(frozen=True)
class Delta:
    """``weight += scale * (b @ a)``; a is (rank, in), b (out, rank); ``transposed``: the weight is stored (in, out)."""

    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool
    embedding: bool = False


@dataclass(frozen=True)
class Adapter:
    """What an adapter does to its base: ``deltas`` by the base's tensor, and tensors it has ``replaced``."""

    directory: Path
    files: tuple[str, ...]
    source: Source = field(repr=False)
    deltas: dict[str, Delta] = field(repr=False)
    replaced: dict[str, TensorInfo] = field(repr=False)
    config: dict[str, Any] = field(repr=False)

    def __str__(self) -> str:
        also = f" and {len(self.replaced)} trained tensors" if self.replaced else ""
        return f"LoRA of {len(self.deltas)} weights{also}"


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter of PEFT's."""
    return is_file(directory / ADAPTER_CONFIG)


def holds_adapter(path: str | Path) -> bool:
    """Whether a directory is an adapter, or a training run with checkpoints of adapters."""
    return is_adapter(Path(path)) or next(Path(path).glob(f"*/{ADAPTER_CONFIG}"), None) is not None


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json; raises `ArtifactError` for what is not merged exactly, by the name of the option."""
    config = read_json(check_inside(directory, ADAPTER_CONFIG), MAX_CONFIG_BYTES)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ArtifactError(
            f"{ADAPTER_CONFIG}: peft_type {ascii(kind)[:40]} is not merged here, only LORA", _REMEDY
        )
    for key in (
        "use_dora", "use_qalora", "lora_bias", "target_parameters", "alora_invocation_tokens", "arrow_config",
        "layer_replication", "trainable_token_indices", "megatron_config", "use_bdlora", "velora_config",
    ):  # fmt: skip
        if config.get(key):
            raise ArtifactError(f"{ADAPTER_CONFIG}: adapters with {key} are not merged here", _REMEDY)
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict):
            raise ArtifactError(f"{ADAPTER_CONFIG}: {key} is not an object", "Restore it from the source")
    return config


def read_adapter(directory: Path, base: dict[str, TensorInfo], sink: Sink) -> Adapter:
    """The adapter, held against its base's tensors; raises `ArtifactError` for one that does not fit it."""
    config = read_adapter_config(directory)
    found = next(((fmt, name) for fmt, name in _FILES if is_file(directory / name)), None)
    if found is None:
        raise ArtifactError(f"'{directory}' has no adapter_model.safetensors", "Copy the file")
    check_inside(directory, found[1])
    source = open_source(directory, WeightFiles(found[0], (found[1],)), sink)
    factors: dict[tuple[str, bool], dict[int, TensorInfo]] = {}
    replaced: dict[str, TensorInfo] = {}
    for key, info in source.tensors.items():
        # peft saves the base's embedding too, where it is trained.
        name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
        suffix = next((s for s in _FACTORS if name.endswith(s)), None)
        if suffix is not None:
            number, embedding = _FACTORS[suffix]
            factors.setdefault((name.removesuffix(suffix), embedding), {})[number] = info
        elif name in base and key != name:
            _check_shape(info, base[name], tuple(info.shape))
            replaced[name] = info
        else:
            raise ArtifactError(f"{info.file}: '{key}' changes no tensor of the base", _FIT)
    deltas = {}
    for (module, embedding), pair in factors.items():
        weight = f"{module}.weight"
        if weight not in base or len(pair) < 2:
            raise ArtifactError(
                f"{found[1]}: the base stores no '{weight}', or one of its two factors is missing", _FIT
            )
        a, b = pair[0], pair[1]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise ArtifactError(
                f"{a.file}: the factors of '{weight}' have shapes {a.shape} and {b.shape}", _REMEDY
            )
        transposed = embedding or config.get("fan_in_fan_out") is True
        shape = (b.shape[0], a.shape[1])
        _check_shape(b, base[weight], shape[::-1] if transposed else shape)
        deltas[weight] = Delta(a, b, _scale(config, module, a.shape[0]), transposed, embedding)
    if not deltas and not replaced:
        raise ArtifactError(f"{found[1]}: holds no tensor", "Copy the file again")
    return Adapter(directory, (ADAPTER_CONFIG, found[1]), source, deltas, replaced, config)


_FIT = "Name the base that it was trained on by --base"


def _check_shape(info: TensorInfo, base: TensorInfo, shape: tuple[int, ...]) -> None:
    if tuple(base.shape) != shape:
        what = f"{info.file}: '{info.name}' is for a tensor of shape {list(shape)}, the base's is {list(base.shape)}"
        raise ArtifactError(what, _FIT)
    if base.dtype not in FLOAT_DTYPES or info.dtype not in FLOAT_DTYPES:
        raise ArtifactError(f"'{base.name}' is {base.dtype}: only floating tensors are merged", _FIT)


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """peft's scaling of a layer; its rank is checked against the config."""
    expected = _by_pattern(config, "rank_pattern", module, config.get("r"))
    alpha = _by_pattern(config, "alpha_pattern", module, config.get("lora_alpha"))
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool) and math.isfinite(alpha)
    if not number or expected != rank:
        raise ArtifactError(
            f"{ADAPTER_CONFIG}: rank {ascii(expected)[:40]} and alpha {ascii(alpha)[:40]} do not fit '{module}', "
            f"whose rank is {rank}",
            "Restore it from the source",
        )
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _by_pattern(config: dict[str, Any], key: str, module: str, default: Any) -> Any:
    for pattern, value in (config.get(key) or {}).items():
        try:
            if len(pattern) < 500 and re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            raise ArtifactError(
                f"{ADAPTER_CONFIG}: {key} has the bad pattern {ascii(pattern)[:80]}", _REMEDY
            ) from None
    return default


@dataclass(frozen=True)
class MergedSource:
    """The base's tensors with the adapter merged in, one at a time (see `artifact.source` for the attributes)."""

    base: Source = field(repr=False)
    adapter: Adapter = field(repr=False)
    quantized: dict[str, FlatTensor] = field(default_factory=dict)
    foreign: tuple[ArtifactError, ...] = ()
    content: ClassVar[str] = "holds plain tensors"
    divisible: ClassVar[bool] = False
    mappable: ClassVar[bool] = False

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        return self.base.tensors

    @property
    def metadata(self) -> dict[str, str]:
        return self.base.metadata

    @property
    def shared(self) -> tuple[tuple[str, ...], ...]:
        return self.base.shared

    @property
    def streamable(self) -> bool:
        return self.base.streamable

    @property
    def repeats_ties(self) -> bool:
        return self.base.repeats_ties

    @property
    def files(self) -> tuple[str, ...]:
        # Absolute, since they lie in another directory than the base's.
        return (*self.base.files, *(str((self.adapter.directory / n).absolute()) for n in self.adapter.files))

    def read(
        self, info: TensorInfo, start: int = 0, stop: int | None = None, *, pinned: bool = False
    ) -> torch.Tensor:
        if info.name not in self.adapter.deltas and info.name not in self.adapter.replaced:
            return self.base.read(info, start, stop, pinned=pinned)
        whole = self._merged(info)
        return whole if stop is None else whole.reshape(-1)[start:stop]

    def _merged(self, info: TensorInfo) -> torch.Tensor:
        """As peft computes it: the product in float32, added to the weight."""
        from loadstone.artifact.torchao.flatten import torch_dtype

        source = self.adapter.source
        if (trained := self.adapter.replaced.get(info.name)) is not None:
            weight = source.read(trained).to(torch_dtype(info.dtype))
        else:
            weight = self.base.read(info)
        if (delta := self.adapter.deltas.get(info.name)) is None:
            return weight
        a, b = source.read(delta.a).float(), source.read(delta.b).float()
        product = b @ a
        change = (product.t() if delta.transposed else product) * delta.scale
        # peft rounds an embedding's change before it adds it, and a layer's sum once.
        return weight + change.to(weight.dtype) if delta.embedding else weight.clone().add_(change)

    @contextmanager
    def opened(self) -> Iterator[Opened]:
        with self.base.opened() as (stored, quantized):
            changed = (*self.adapter.deltas, *self.adapter.replaced)
            yield stored | {name: _Merged(self, self.tensors[name]) for name in changed}, quantized

    def describe(self, name: str) -> FlatTensor:
        return self.base.describe(name)

    def check_values(self, limits: Limits) -> None:
        self.base.check_values(limits)
        self.adapter.source.check_values({})


@dataclass(frozen=True)
class _Merged:
    """A merged tensor before it is read; it answers what a safetensors slice does."""

    source: MergedSource
    info: TensorInfo

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.source.read(self.info)[index]

    def get_dtype(self) -> str:
        return self.info.dtype

    def get_shape(self) -> list[int]:
        return list(self.info.shape)
