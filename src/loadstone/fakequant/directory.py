"""Export from a model directory, streamed as finalize streams: the model is never in memory."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from loadstone.artifact import Artifact, TensorInfo
from loadstone.artifact.detect import ADAPTER, DENSE, FAKEQUANT, QAT
from loadstone.artifact.files import following_links
from loadstone.errors import ArtifactError
from loadstone.fakequant.export import (
    Exported,
    SideFiles,
    digest,
    refuse_unequal,
    resolve_device,
    write_side_files,
)
from loadstone.fakequant.package import COPY, STRIP, code_files, without_auto_map
from loadstone.fakequant.plan import ExportPlan, files_of, make_plan
from loadstone.fakequant.roles import roles_by_name, roles_in
from loadstone.fakequant.rules import RuleSet
from loadstone.fakequant.state import QuantizerState
from loadstone.finalization.plan import FinalizePlan, stored_tensors
from loadstone.finalization.run import source_facts, write_artifact
from loadstone.loading.model_class import generation_config, has_own_class
from loadstone.ranks import Ranks
from loadstone.writing.index import SHARD_BYTES
from loadstone.writing.publish import check_output
from loadstone.writing.sidecars import find_sidecars

log = logging.getLogger(__name__)


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
    if remote_code != COPY and artifact.needs_remote_code and not has_own_class(artifact):
        log.warning(
            "%s: transformers has no class for it, and without its code only an engine that knows the model loads the "
            "export (--remote-code copy keeps the code)",
            artifact.root,
        )
    infos = stored_tensors(artifact)
    config = artifact.config if remote_code == COPY else without_auto_map(artifact.config)
    if artifact.needs_remote_code and not trust_remote_code and not has_own_class(artifact):
        # The class is Python code in the directory, which is not run unless asked for: names and shapes must do.
        roles, ties = roles_by_name(infos), _ties_by_name(artifact, infos)
        infinite: frozenset[str] = frozenset()
    else:
        from loadstone.loading.complete import check_stored
        from loadstone.loading.infinite import infinite_buffers
        from loadstone.loading.meta import destinations, meta_model

        infinite = infinite_buffers(artifact, trust_remote_code)
        model = meta_model(artifact, trust_remote_code)
        places = destinations(model, list(infos))
        check_stored(model, infos, places, artifact.weights.index or artifact.weights.files[0])
        generation_config(artifact, model)
        stored_as = {d.parameter: k for k, d in places.items() if d}
        tied = model.all_tied_weights_keys
        ties = {stored_as.get(t, t): stored_as.get(s, s) for t, s in tied.items()}
        roles = roles_in(model, infos, ties)
    return make_plan(
        rules, infos, _files(artifact, infos), roles, ties, config, untie=untie, infinite=infinite
    )


def _refuse_quantized(artifact: Artifact) -> None:
    if artifact.kind not in (DENSE, QAT, ADAPTER):
        what = "a fake-quantized export" if artifact.kind == FAKEQUANT else "already quantized"
        raise ArtifactError(
            f"'{artifact.root}' is {what} ({artifact.evidence[-1]})",
            "Export the unquantized checkpoint that it was made from",
        )


def _files(artifact: Artifact, infos: dict[str, TensorInfo]) -> dict[str, str]:
    """The output file of each tensor: the source's own division into files, and for slices of a distributed
    checkpoint, which has none, shards of 2 GB."""
    order = {file: f"{number:05d}" for number, file in enumerate(artifact.weights.files)}
    if any(info.file not in order for info in infos.values()):
        return files_of(infos, SHARD_BYTES)
    return {name: order[info.file] for name, info in infos.items()}


def _ties_by_name(artifact: Artifact, infos: dict[str, TensorInfo]) -> dict[str, str]:
    source = next((name for name in infos if name.endswith("embed_tokens.weight")), None)
    tied = artifact.config.get("tie_word_embeddings") is True and source is not None
    return {"lm_head.weight": str(source)} if tied else {}


def export_directory(
    artifact: Artifact,
    plan: ExportPlan,
    out: Path,
    *,
    state: QuantizerState | None = None,
    remote_code: str = STRIP,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = True,
    ranks: Ranks | None = None,
    emit_modelopt: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Exported:
    """Carry out `plan_directory`'s plan as finalize does its own: in blocks of rows, resumed after a kill unless
    ``resume`` is false, divided among ``ranks`` by output file.

    ``on_progress`` is told the source bytes done since its last call. Raises `UsageError`, `ArtifactError` or
    `MissingError`; ``out`` is then as it was.
    """
    started = time.monotonic()
    check_output(artifact.root, out, overwrite)
    where = resolve_device(device, plan)
    where = ranks.device(where) if ranks else where
    copies = find_sidecars(artifact, remote_code=False)
    if remote_code == COPY:
        with following_links(artifact.follow_links):
            copies |= code_files(artifact.path, artifact.config)
    state = state or QuantizerState()
    _check_aliases(artifact, plan)

    def write_rest(work: Path, digests: dict[str, str], fingerprint: str) -> dict[str, str]:
        beside = SideFiles(source_facts(artifact, fingerprint), copies, {})
        return write_side_files(plan, beside, work, state, digests, emit_modelopt=emit_modelopt)

    files = write_artifact(
        FinalizePlan(artifact, None, "auto", plan.shards, plan.config, kind=FAKEQUANT, indexed=True),
        out,
        write_rest,
        device=where,
        overwrite=overwrite,
        resume=resume,
        ranks=ranks,
        on_progress=on_progress,
    )
    return Exported(out, plan, state.specs, time.monotonic() - started, files)


def _check_aliases(artifact: Artifact, plan: ExportPlan) -> None:
    """Raise `ArtifactError` when tensors that become one are stored with different values."""
    infos, reader = artifact.tensors, artifact.source
    digests = {name: digest(reader.read(infos[name])) for name in {*plan.aliases, *plan.aliases.values()}}
    refuse_unequal(plan.aliases, digests)
