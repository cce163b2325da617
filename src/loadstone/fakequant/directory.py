"""Export from a model directory: shard to shard, one tensor at a time; the model is never in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from loadstone.artifact import Artifact, TensorInfo
from loadstone.artifact.detect import DENSE, FAKEQUANT, QAT
from loadstone.errors import ArtifactError
from loadstone.fakequant.export import Beside, Exported, resolve_device, write_export
from loadstone.fakequant.package import COPY, STRIP, code_files, without_auto_map
from loadstone.fakequant.plan import ExportPlan, make_plan, with_files
from loadstone.fakequant.roles import roles_by_name, roles_in
from loadstone.fakequant.rules import RuleSet
from loadstone.fakequant.state import QuantizerState
from loadstone.loading.source import SourceReader
from loadstone.writing.index import SHARD_BYTES, shard_name
from loadstone.writing.publish import check_output
from loadstone.writing.sidecars import sidecars_in

if TYPE_CHECKING:
    import torch


def plan_directory(
    artifact: Artifact,
    rules: RuleSet,
    *,
    untie: bool = False,
    remote_code: str = STRIP,
    trust_remote_code: bool = False,
) -> ExportPlan:
    """Plan an export from headers and, where transformers has its class, the model on the meta device.

    Raises `ArtifactError` for a source that is quantized already, `UsageError` for rules that do not fit it.
    """
    _refuse_quantized(artifact)
    infos = _stored(artifact)
    config = artifact.config if remote_code == COPY else without_auto_map(artifact.config)
    if artifact.needs_remote_code and not trust_remote_code and not _is_known(artifact):
        # The class is code in the directory, which nobody asked to run: names and shapes have to do.
        roles, ties = roles_by_name(infos), _ties_by_name(artifact, infos)
    else:
        from loadstone.loading.meta import destinations, meta_model

        model = meta_model(artifact, trust_remote_code)
        roles = roles_in(model, infos)
        stored_as = {d.parameter: k for k, d in destinations(model, list(infos)).items() if d}
        tied = model.all_tied_weights_keys
        ties = {stored_as.get(t, t): stored_as.get(s, s) for t, s in tied.items()}
    return make_plan(rules, _placed(artifact, infos), roles, ties, config, untie=untie)


def _refuse_quantized(artifact: Artifact) -> None:
    if artifact.kind not in (DENSE, QAT):
        what = "a fake-quantized export" if artifact.kind == FAKEQUANT else "already quantized"
        raise ArtifactError(
            f"'{artifact.root}' is {what} ({artifact.evidence[-1]})",
            "Export the unquantized checkpoint that it was made from",
        )


def _stored(artifact: Artifact) -> dict[str, TensorInfo]:
    """Every stored tensor by name."""
    if artifact.table is not None:
        return dict(sorted(artifact.table.tensors.items()))
    return dict(sorted((n, t) for contents in artifact.bins for n, t in contents.tensors.items()))


def _placed(artifact: Artifact, infos: dict[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The same tensors with the output file of each: the source's own division into files, and for slices of a
    distributed checkpoint, which has none, shards of 5 GB."""
    if artifact.dcp is not None:
        return with_files(infos, SHARD_BYTES)
    files = {f: shard_name(n, len(artifact.weights.files)) for n, f in enumerate(artifact.weights.files)}
    return {name: info._replace(file=files[info.file]) for name, info in infos.items()}


def _is_known(artifact: Artifact) -> bool:
    from transformers import CONFIG_MAPPING

    return artifact.config.get("model_type") in CONFIG_MAPPING


def _ties_by_name(artifact: Artifact, infos: dict[str, TensorInfo]) -> dict[str, str]:
    source = next((name for name in infos if name.endswith("embed_tokens.weight")), None)
    tied = artifact.config.get("tie_word_embeddings") is True and source is not None
    return {"lm_head.weight": str(source)} if tied else {}


def read_tensors(artifact: Artifact) -> Iterator[tuple[str, torch.Tensor]]:
    """Every stored tensor, in the order it lies on disk."""
    reader = SourceReader(artifact)
    for info in sorted(_stored(artifact).values(), key=lambda t: (t.file, t.begin, t.name)):
        yield info.name, reader.read(info)


def export_directory(
    artifact: Artifact,
    plan: ExportPlan,
    out: Path,
    *,
    state: QuantizerState | None = None,
    remote_code: str = STRIP,
    device: str = "auto",
    overwrite: bool = False,
    emit_modelopt: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Exported:
    """Carry out `plan_directory`'s plan. Raises `UsageError`, `ArtifactError` or `MissingError`, and
    leaves no output."""
    check_output(artifact.root, out, overwrite)
    where = resolve_device(device, plan)
    copies = sidecars_in(tuple(reversed(artifact.sidecar_dirs)))
    if remote_code == COPY:
        copies |= code_files(artifact.path, artifact.config)
    # Hashed on the other core while tensors are folded on this one.
    with ThreadPoolExecutor(1) as hasher:
        fingerprint = hasher.submit(artifact.fingerprint)
        return write_export(
            plan,
            read_tensors(artifact),
            Beside(lambda: {"path": str(artifact.path), "fingerprint": fingerprint.result()}, copies, {}),
            out,
            state=state,
            device=where,
            overwrite=overwrite,
            emit_modelopt=emit_modelopt,
            on_progress=on_progress,
        )
