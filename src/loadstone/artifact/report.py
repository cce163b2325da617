"""Everything that headers tell about a model directory, all problems included. `inspect` shows it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loadstone.artifact.compressed_tensors import read_block
from loadstone.artifact.compressed_tensors.problems import serving_problems
from loadstone.artifact.detect import CONFIG, PFN, Artifact, examine
from loadstone.artifact.files import is_file, read_json
from loadstone.artifact.formats.safetensors import FLOAT_DTYPES, TensorInfo
from loadstone.artifact.manifest import MANIFEST, read_manifest
from loadstone.artifact.packed import Packed
from loadstone.artifact.servers import compressed_weights
from loadstone.artifact.torchao.checks import FlatTensor, looks_flattened
from loadstone.artifact.torchao.uniform import pattern_of
from loadstone.artifact.unchanged import read_at_once
from loadstone.errors import ArtifactError

# A header may hold a million bad entries, which is more than anyone reads.
MAX_PROBLEMS = 200


@dataclass(frozen=True)
class Group:
    """Tensors that differ only in layer (and expert) numbers: ``pattern`` has ``*`` in their place.

    ``parameters`` counts weights, ``nbytes`` what is stored for them. ``type`` is the class of quantized
    tensors, the dtype of plain ones; ``note`` may say why a plain one is not quantized.
    """

    pattern: str
    count: int
    type: str
    parameters: int
    nbytes: int
    nominal_bits: float
    note: str = ""

    @property
    def stored_bits(self) -> float:
        """Bits stored per weight, scales and zero points included."""
        return self.nbytes * 8 / self.parameters if self.parameters else 0.0


@dataclass(frozen=True)
class DtypeTotal:
    """What one stored dtype takes up in the files (parts of quantized tensors count under their own)."""

    dtype: str
    tensors: int
    nbytes: int


@dataclass(frozen=True)
class Report:
    """``artifact`` as far as it could be read, and what follows from it.

    ``problems``: why it cannot be loaded here; ``serving``: why stock transformers or a server would fail or compute
    something else.
    """

    artifact: Artifact
    problems: tuple[ArtifactError, ...]
    notes: tuple[str, ...]
    parameters: int
    nbytes: int
    file_bytes: int
    dtypes: tuple[DtypeTotal, ...]
    quantized: tuple[Group, ...]
    plain: tuple[Group, ...]
    tied: tuple[tuple[str, ...], ...]
    sidecars: dict[str, str | None]
    manifest: dict[str, Any] | None = field(repr=False, default=None)
    serving: tuple[ArtifactError, ...] = ()

    @property
    def recipe_samples(self) -> tuple[FlatTensor, ...]:
        """One quantized tensor of each class and description: layers of one recipe share both."""
        flat = self.artifact.quantized.values()
        return tuple({(t.type, t.metadata or str(t.attributes)): t for t in flat}.values())

    @property
    def stored_bits(self) -> float | None:
        """Bits stored per quantized weight, None when nothing is quantized."""
        return _per_weight(self.quantized, lambda g: g.nbytes * 8)

    @property
    def nominal_bits(self) -> float | None:
        """Bits per quantized weight of the number format alone, None when nothing is quantized."""
        return _per_weight(self.quantized, lambda g: g.nominal_bits * g.parameters)


def collect(path: str | Path, *, checkpoint: str | None = None, base: str | Path | None = None) -> Report:
    """Look at a directory and keep going past every problem; raises `UsageError` only."""
    return read_at_once(Path(path), lambda: _collect(path, checkpoint, base))


def _collect(path: str | Path, checkpoint: str | None, base: str | Path | None) -> Report:
    problems: list[ArtifactError] = []
    unlisted = 0

    def note(problem: ArtifactError) -> None:
        nonlocal unlisted
        if len(problems) < MAX_PROBLEMS:
            problems.append(problem)
        else:
            unlisted += 1

    artifact = examine(path, checkpoint=checkpoint, base=base, sink=note)
    if unlisted:
        problems.append(ArtifactError(f"and {unlisted} more problems", "Mend the first ones and look again"))
    flat = artifact.quantized or artifact.packed
    parts = {part.name for tensor in flat.values() for part in tensor.parts.values()}
    plain = {n: t for n, t in artifact.tensors.items() if n not in parts and not looks_flattened(n)}
    quantized_groups = _quantized_groups(flat)
    tied, untied = _ties(artifact, plain)
    problems += untied
    try:
        manifest = read_manifest(artifact.path)
    except ArtifactError as error:
        manifest, notes = None, [error.message]
    else:
        notes = []
    parameters = sum(t.numel for t in flat.values())
    parameters += sum(t.numel for t in _once(artifact, plain) if _is_parameter(artifact, t))
    stored = _once(artifact, artifact.tensors)
    notes += [*artifact.notes, *_notes(artifact, stored)]
    return Report(
        artifact=artifact,
        problems=tuple(problems),
        notes=tuple(notes),
        parameters=parameters,
        nbytes=sum(t.nbytes for t in stored),
        file_bytes=_file_bytes(artifact),
        dtypes=_dtype_totals(stored),
        quantized=quantized_groups,
        plain=_plain_groups(plain, bool(flat)),
        tied=tied,
        sidecars=_sidecars(artifact),
        manifest=manifest,
        serving=tuple(_serving(artifact)),
    )


def _is_parameter(artifact: Artifact, info: TensorInfo) -> bool:
    """Whether a plain tensor holds weights: floats, or integers that another quantizer packed. All other integers are
    buffers: positions, counters, masks."""
    if artifact.quant_method is None or info.dtype in FLOAT_DTYPES:
        return info.dtype in FLOAT_DTYPES
    return info.dtype not in ("I64", "BOOL") and not info.name.endswith("bias")


def _serving(artifact: Artifact) -> list[ArtifactError]:
    block = artifact.quantization_config
    packed = compressed_weights(artifact)
    if not packed or block is None:
        return []
    return serving_problems(artifact.path, artifact.config, read_block(block), packed, artifact.tensors)


def _per_weight(groups: tuple[Group, ...], total: Any) -> float | None:
    parameters = sum(g.parameters for g in groups)
    return sum(total(g) for g in groups) / parameters if parameters else None


def _once(artifact: Artifact, tensors: dict[str, TensorInfo]) -> list[TensorInfo]:
    """Tensors, those that share one storage once."""
    repeats = {name for names in artifact.source.shared for name in names[1:]}
    return [t for n, t in tensors.items() if n not in repeats]


def _file_bytes(artifact: Artifact) -> int:
    total = 0
    for file in artifact.weight_files:
        path = artifact.path / file
        total += path.stat().st_size if is_file(path) else 0
    return total


def _dtype_totals(stored: Iterable[TensorInfo]) -> tuple[DtypeTotal, ...]:
    totals: dict[str, list[int]] = {}
    for tensor in stored:
        entry = totals.setdefault(tensor.dtype, [0, 0])
        entry[0] += 1
        entry[1] += tensor.nbytes
    found = (DtypeTotal(dtype, count, nbytes) for dtype, (count, nbytes) in totals.items())
    return tuple(sorted(found, key=lambda d: (-d.nbytes, d.dtype)))


def _quantized_groups(flat: Mapping[str, FlatTensor | Packed]) -> tuple[Group, ...]:
    members: dict[tuple[str, str, int], list[FlatTensor | Packed]] = {}
    for tensor in flat.values():
        members.setdefault((pattern_of(tensor.name), tensor.type, tensor.nominal_bits), []).append(tensor)
    groups = (
        Group(pattern, len(found), kind, sum(t.numel for t in found), sum(t.nbytes for t in found), bits)
        for (pattern, kind, bits), found in members.items()
    )
    return tuple(sorted(groups, key=lambda g: (-g.parameters, g.pattern)))


def _plain_groups(plain: dict[str, TensorInfo], quantized: bool) -> tuple[Group, ...]:
    members: dict[tuple[str, str], list[TensorInfo]] = {}
    for tensor in plain.values():
        members.setdefault((pattern_of(tensor.name), tensor.dtype), []).append(tensor)
    groups = []
    for (pattern, dtype), found in members.items():
        parameters, nbytes = sum(t.numel for t in found), sum(t.nbytes for t in found)
        bits = nbytes * 8 / parameters if parameters else 0.0
        note = _why_plain(pattern, found[0]) if quantized else ""
        groups.append(Group(pattern, len(found), dtype, parameters, nbytes, bits, note))
    return tuple(sorted(groups, key=lambda g: (-g.parameters, g.pattern)))


def _why_plain(pattern: str, tensor: TensorInfo) -> str:
    if len(tensor.shape) < 2:
        return ""
    if re.search(r"embed|wte|wpe|tok_", pattern):
        return "embedding"
    if re.search(r"(^|\.)(lm_head|embed_out|output|score|classifier)\.", pattern):
        return "output head"
    if len(tensor.shape) == 3 and "expert" in pattern:
        return "fused experts, left unquantized"
    if "router" in pattern or re.search(r"\.gate\.weight$", pattern):
        return "router"
    return "matrix, left unquantized"


def _ties(
    artifact: Artifact, plain: dict[str, TensorInfo]
) -> tuple[tuple[tuple[str, ...], ...], list[ArtifactError]]:
    """Groups of names that are one tensor, and the problem of a head that is neither stored nor tied."""
    found = artifact.source.shared
    names = {*plain, *artifact.quantized}
    embedding = next((n for n in names if n.endswith(_EMBEDDINGS)), None)
    has_head = any(n.endswith(_HEADS) for n in names)
    architectures = artifact.config.get("architectures") or []
    if embedding is None or has_head or not any(name.endswith("ForCausalLM") for name in architectures):
        return found, []
    text = artifact.config.get("text_config")
    flags = [c.get("tie_word_embeddings") for c in (artifact.config, text) if isinstance(c, dict)]
    if False in flags and True not in flags:
        what = f"{CONFIG}: tie_word_embeddings is false, and no output head is stored (lm_head.weight)"
        remedy = "It would be initialised at random: set it to true if they were tied, or finalize again"
        return found, [ArtifactError(what, remedy)]
    return (*found, (embedding, "lm_head.weight")), []


def _sidecars(artifact: Artifact) -> dict[str, str | None]:
    """What a user needs beside the weights -> the file that has it, None when it is missing."""
    found: dict[str, str | None] = {}
    for what, names in _SIDECARS.items():
        found[what] = next((n for d in artifact.sidecar_dirs for n in names if is_file(d / n)), None)
    if found["chat_template"] is None and found["tokenizer_config"] is not None:
        for folder in artifact.sidecar_dirs:
            if is_file(folder / "tokenizer_config.json"):
                try:
                    inline = read_json(folder / "tokenizer_config.json").get("chat_template")
                except ArtifactError:
                    inline = None
                found["chat_template"] = "tokenizer_config.json" if inline else None
                break
    return found


def _notes(artifact: Artifact, stored: list[TensorInfo]) -> list[str]:
    notes = []
    tokenizers = _SIDECARS["tokenizer"]
    if artifact.kind != PFN and not any(is_file(d / n) for d in artifact.sidecar_dirs for n in tokenizers):
        notes.append("no tokenizer: text cannot be given to this model")
    total = artifact.weights.total_size
    actual = sum(t.nbytes for t in stored)
    if total is not None and total != actual:
        notes.append(f"{artifact.weights.index}: total_size says {total} bytes, the tensors have {actual}")
    if {"BF16", "F16"} <= {t.dtype for t in stored}:
        notes.append("BF16 and F16 side by side: unusual, one may be the other mislabelled")
    if artifact.needs_remote_code:
        notes.append(f"{CONFIG}: auto_map names Python code in the directory")
    if (artifact.path / MANIFEST).exists() and not is_file(artifact.path / MANIFEST):
        notes.append(f"{MANIFEST} is not a regular file")
    return notes


_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight")
_HEADS = ("lm_head.weight", "embed_out.weight", "output.weight", "output_projection.weight", "head.weight")
_SIDECARS = {
    "tokenizer": (
        "tokenizer.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
        "tekken.json",
    ),
    "tokenizer_config": ("tokenizer_config.json",),
    "chat_template": ("chat_template.jinja", "chat_template.json"),
    "generation_config": ("generation_config.json",),
    "processor": ("processor_config.json", "preprocessor_config.json"),
}
