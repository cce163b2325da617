"""What a directory is, and the evidence for it. Headers only: no torch, no weights read."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadstone.artifact.bin_header import BinContents, read_bin
from loadstone.artifact.torchao_tensors import FlatTensor, flat_tensors, unknown_class_hint
from loadstone.artifact.weights import TensorTable, WeightFiles, check_inside, find_weights, read_tensors
from loadstone.errors import ArtifactError, UsageError

DENSE = "dense"
TORCHAO = "torchao"
TORCHAO_UNMARKED = "torchao-unmarked"
QAT = "qat"
OTHER_QUANTIZER = "other-quantizer"
FAKEQUANT = "fakequant"
CONTEXT = "context"

# Key in config.json (or loadstone.json) under which a QAT run records its fake-quantization recipe.
QAT_KEY = "loadstone_qat"
CONFIG = "config.json"


@dataclass(frozen=True)
class Artifact:
    """Facts about a model directory. ``root`` is what the user named; ``path`` holds the weights (a checkpoint in it)."""

    path: Path
    root: Path
    kind: str
    evidence: tuple[str, ...]
    config: dict[str, Any] = field(repr=False)
    weights: WeightFiles
    table: TensorTable | None = field(repr=False, default=None)
    bins: tuple[BinContents, ...] = field(repr=False, default=())
    quantized: dict[str, FlatTensor] = field(repr=False, default_factory=dict)
    quant_method: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def quantization_config(self) -> dict[str, Any] | None:
        """The block of ``config.json``, None when there is none."""
        return self.config.get("quantization_config")

    @property
    def is_torchao(self) -> bool:
        return self.kind in (TORCHAO, TORCHAO_UNMARKED)

    def fingerprint(self) -> str:
        """Content hash of config and weights (sha256 over every byte that a load reads)."""
        from loadstone.artifact.manifest import fingerprint

        return fingerprint(self)


def detect(path: str | Path, *, checkpoint: str | None = None) -> Artifact:
    """Recognise a model directory.

    ``checkpoint`` chooses within a training run: ``newest`` (default), ``best``, a step number, a folder name or a
    path. Raises `UsageError` when ``path`` is no directory, `ArtifactError` when it is no model or is damaged.
    """
    from loadstone.artifact.training_run import choose_checkpoint

    root = Path(path)
    if not root.exists():
        raise UsageError(f"there is no directory '{root}'", _nearest(root))
    if not root.is_dir():
        raise UsageError(f"'{root}' is a file, not a model directory", f"Name the directory: {root.parent}")
    directory, chosen = choose_checkpoint(root, checkpoint)
    if (directory / "context.json").is_file():
        raise ArtifactError(f"'{root}' is a fitted context", "This version of loadstone does not load contexts yet")
    config = read_config(directory, root)
    weights = find_weights(directory)
    if weights is None:
        raise ArtifactError(
            f"'{directory}' holds config.json and no weights (model.safetensors, pytorch_model.bin or their index)",
            "Copy the weight files, or name the directory that has them",
        )
    table = read_tensors(directory, weights) if weights.format == "safetensors" else None
    # One shard tells; the others are read when the weights are.
    bins = (read_bin(directory / weights.files[0]),) if weights.format == "bin" else ()
    quantized = flat_tensors(table.metadata, table.tensors) if table else {}
    kind, evidence, method = _classify(directory, config, weights, quantized, bins)
    return Artifact(
        path=directory,
        root=root,
        kind=kind,
        evidence=(*chosen, *evidence),
        config=config,
        weights=weights,
        table=table,
        bins=bins,
        quantized=quantized,
        quant_method=method,
        notes=weights.notes,
    )


def _classify(
    directory: Path,
    config: dict[str, Any],
    weights: WeightFiles,
    quantized: dict[str, FlatTensor],
    bins: tuple[BinContents, ...],
) -> tuple[str, tuple[str, ...], str | None]:
    block = config.get("quantization_config")
    subclasses = {name: cls for contents in bins for name, cls in contents.subclasses.items()}
    if block is not None:
        method = str(block.get("quant_method", "")) if isinstance(block, dict) else ""
        if not method:
            raise ArtifactError(f"{CONFIG}: quantization_config has no quant_method", "Restore it, or finalize again")
        if method != "torchao":
            return OTHER_QUANTIZER, (f"{CONFIG}: quantization_config.quant_method is {method}",), method
        if not quantized and not subclasses:
            raise ArtifactError(
                f"{CONFIG} says torchao, and {weights.files[0]} holds no quantized tensor",
                "The weights are not those of this config: finalize again, or remove the quantization_config block",
            )
        return TORCHAO, (f"{CONFIG}: quantization_config.quant_method is torchao",), method
    if quantized:
        kinds = ", ".join(sorted({t.type for t in quantized.values()}))
        return TORCHAO_UNMARKED, (f"safetensors metadata describes {len(quantized)} tensors of {kinds}",), "torchao"
    if subclasses:
        name, cls = next(iter(subclasses.items()))
        if any(p.startswith("torchao.") for contents in bins for p in contents.globals):
            return TORCHAO_UNMARKED, (f"{bins[0].file}: '{name}' is a {cls}",), "torchao"
        raise ArtifactError(f"{bins[0].file}: '{name}' is an unknown tensor class {cls}", unknown_class_hint(cls))
    if (directory / "fakequant_manifest.json").is_file():
        return FAKEQUANT, ("fakequant_manifest.json",), None
    if isinstance(config.get(QAT_KEY), dict):
        return QAT, (f"{CONFIG}: {QAT_KEY} records a fake-quantization recipe",), None
    return DENSE, (f"{weights.files[0]} holds plain tensors",), None


def read_config(directory: Path, root: Path) -> dict[str, Any]:
    """``config.json`` of a model directory; raises `ArtifactError` when it is missing or no model's config."""
    file = directory / CONFIG
    if not file.is_file():
        raise ArtifactError(f"'{root}' is no model directory: it has no {CONFIG}", _subdirectories(root))
    check_inside(directory, CONFIG)
    if file.stat().st_size > 16_000_000:
        raise ArtifactError(f"{CONFIG}: {file.stat().st_size} bytes is no model's config", "Check the directory")
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        raise ArtifactError(f"{CONFIG} is not valid JSON", "Restore it from the source") from None
    if not isinstance(config, dict) or not (config.get("model_type") or config.get("architectures")):
        raise ArtifactError(f"{CONFIG} names no model_type", "Restore it from the source")
    return config


def _nearest(path: Path) -> str:
    siblings = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=1)
    if close:
        return f"Did you mean '{path.parent / close[0]}'?"
    looks_like_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) is not None
    hub = ". A hub name must be downloaded first (hf download NAME --local-dir DIR)" if looks_like_hub else ""
    return f"Check the path{hub}"


def _subdirectories(root: Path) -> str:
    found = sorted(p.parent.name for p in root.glob(f"*/{CONFIG}"))
    return f"Did you mean '{root / found[0]}'?" if found else "Name a directory that save_pretrained or finalize wrote"
