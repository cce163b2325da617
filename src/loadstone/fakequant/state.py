"""Quantizers of layer inputs and KV caches on disk: ``fakequant_state.safetensors`` and ``fakequant_manifest.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact.files import check_inside, is_file, read_json
from loadstone.artifact.formats.safetensors import open_tensors, read_header
from loadstone.artifact.hashing import sha256_file
from loadstone.artifact.manifest import FORMAT_VERSION, MANIFEST, versions
from loadstone.errors import ArtifactError, UsageError
from loadstone.fakequant.formats.spec import CALIBRATED, INPUTS
from loadstone.fakequant.plan import ExportPlan
from loadstone.fakequant.rules import Decision, module_of
from loadstone.finalization.journal import hash_files
from loadstone.finalization.plan import Step

if TYPE_CHECKING:
    import torch

STATE_FILE = "fakequant_state.safetensors"
FAKEQUANT_MANIFEST = "fakequant_manifest.json"
SCHEMA = 1
INPUT = "input_quantizer"


@dataclass(frozen=True)
class QuantizerState:
    """Quantizers of layer inputs and KV caches.

    ``specs``: quantizer name (``<module>.input_quantizer``, ``<experts>.down_proj_input_quantizer``,
    ``<attention>.k_bmm_quantizer``) to its input format. ``tensors``: ``<quantizer>.amax`` (float32 scalars) and
    ``<quantizer>.pre_quant_scale`` (float32, one a channel).
    """

    specs: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def amax(self, quantizer: str) -> torch.Tensor | None:
        return self.tensors.get(f"{quantizer}.amax")


def check_state(state: QuantizerState) -> None:
    """Raise `ArtifactError`, naming the quantizer, for a value that is NaN, infinite or negative."""
    for name, tensor in state.tensors.items():
        if not bool((tensor.isfinite() & (tensor >= 0)).all()):
            raise ArtifactError(f"'{name}' is NaN, infinite or negative", "Calibrate again on other text")


def write_state(state: QuantizerState, out: Path) -> None:
    """Write the tensors; nothing when there are no quantizers."""
    if not state.specs:
        return
    from safetensors.torch import save_file

    check_state(state)
    tensors = {
        name: tensor.detach().float().cpu().contiguous() for name, tensor in sorted(state.tensors.items())
    }
    save_file(tensors, out / STATE_FILE, metadata={"format": "pt"})


def read_state(directory: Path) -> QuantizerState:
    """The quantizers of an export; raises `ArtifactError` when manifest and state file do not agree."""
    manifest = read_json(check_inside(directory, FAKEQUANT_MANIFEST))
    if manifest.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{FAKEQUANT_MANIFEST}: schema {manifest.get('schema')!r} is not known", "Update loadstone"
        )
    specs = manifest.get("quantizers")
    if not isinstance(specs, dict):
        raise ArtifactError(f"{FAKEQUANT_MANIFEST}: 'quantizers' is malformed", "Export again")
    for name, spec in specs.items():
        if not isinstance(spec, str) or spec not in INPUTS:
            raise ArtifactError(
                f"{FAKEQUANT_MANIFEST}: the quantizer '{name}' is of the unknown format {spec!r:.80}",
                "Export again, or update loadstone",
            )
    if not specs:
        return QuantizerState()
    if not is_file(directory / STATE_FILE):
        raise ArtifactError(
            f"'{directory}' has quantizers and no {STATE_FILE}", "Copy the file, or export again"
        )
    path = check_inside(directory, STATE_FILE)
    # The reader of headers says what is damaged; safetensors' own only that something is.
    read_header(path)
    with open_tensors(path) as handle:
        state = QuantizerState(specs, {key: handle.get_tensor(key) for key in handle.keys()})  # noqa: SIM118
    check_state(state)
    for name, spec in specs.items():
        amax = state.amax(name)
        if spec in CALIBRATED and amax is None:
            raise ArtifactError(f"{STATE_FILE}: '{name}.amax' is missing", "Export again")
        if amax is not None and amax.numel() != 1:
            raise ArtifactError(
                f"{STATE_FILE}: '{name}.amax' has shape {list(amax.shape)}, and is one value", "Export again"
            )
    return state


def write_manifests(
    plan: ExportPlan, state: QuantizerState, work: Path, source: dict[str, Any], digests: dict[str, str]
) -> dict[str, str]:
    """Write both manifests: ``fakequant_manifest.json`` (what was done to each tensor) and ``loadstone.json`` (hashes,
    as every artifact of loadstone has them).

    Returns the sha256 of every file but the last; ``digests``: those that are known already.
    """
    files = hash_files(work, digests)
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "versions": versions(),
        "source": source,
        "format": str(plan.rules.default) if plan.rules.default else None,
        "rules": [str(rule) for rule in plan.rules.rules],
        "total_size": plan.nbytes,
        "tensors": {s.name: _entry(plan.decisions[s.name], s) for s in plan.folded},
        "not_folded": {s.name: s.reason for s in plan.steps if plan.format(s) is None},
        "aliases": plan.aliases,
        "untied": list(plan.untied),
        "quantizers": dict(sorted(state.specs.items())),
        "files": files,
    }
    path = work / FAKEQUANT_MANIFEST
    path.write_text(json.dumps(manifest, indent=2) + "\n")
    files[FAKEQUANT_MANIFEST] = sha256_file(path)
    provenance = {
        "format_version": FORMAT_VERSION,
        "kind": "fakequant",
        "recipe": str(plan.rules),
        "source": source,
        "versions": versions(),
        "files": files,
    }
    (work / MANIFEST).write_text(json.dumps(provenance, indent=2) + "\n")
    return files


def _entry(decision: Decision, step: Step) -> dict[str, str]:
    """``amax`` says where the scale comes from: here always the weight itself."""
    rule = str(decision.rule) if decision.rule else "default"
    entry = {"format": str(decision.format), "rule": rule, "amax": "weight"}
    return entry if step.source.name == step.name else entry | {"copied_from": step.source.name}


def input_specs(plan: ExportPlan) -> dict[str, str]:
    """Quantizer name to input format, for each folded weight whose format has one and whose layer can be
    seen. Raises `UsageError` when experts that share a quantizer would need different ones."""
    found: dict[str, str | None] = {}
    for step in plan.steps:
        name = quantizer_of(plan, step)
        chosen = plan.format(step)
        spec = chosen.inputs if chosen else None
        if name and found.setdefault(name, spec) != spec:
            raise UsageError(
                f"'{name}' is one for all experts, and '{step.name}' has another format than they have",
                "Give all experts of a layer one format, or leave out --activations",
            )
    return {name: spec for name, spec in found.items() if spec}


def quantizer_of(plan: ExportPlan, step: Step) -> str:
    """The quantizer of the input that a weight is multiplied by; empty when none can be."""
    role = plan.roles[step.name]
    return f"{module_of(step.name)}.{INPUT}" if role.inputs else role.shared
