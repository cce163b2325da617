"""`loadstone.export_fakequant` and `loadstone.plan_export`: from options to an export, or to the plan of one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact, detect
from loadstone.fakequant.formats.spec import Format
from loadstone.fakequant.options import Options, make_options
from loadstone.fakequant.rules import RuleSet
from loadstone.loading.devices import cpu_by_default
from loadstone.progress import WRITE, OnProgress, reporter
from loadstone.writing.index import SHARD_BYTES
from loadstone.writing.publish import check_output

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from loadstone.fakequant.export import Exported
    from loadstone.fakequant.plan import ExportPlan


@cpu_by_default
def export_fakequant(
    model: str | Path | Artifact | PreTrainedModel,
    out: str | Path,
    *,
    format: str | Format | None = None,
    rules: str | Path | RuleSet | None = None,
    activations: bool = False,
    calibrate: str | Path | Sequence[Any] | None = None,
    calibrate_limit: int = 32,
    kv_cache: str | None = None,
    untie: bool = False,
    remote_code: str = "strip",
    emit: str | None = None,
    checkpoint: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = True,
    trust_remote_code: bool = False,
    base: str | Path | None = None,
    max_shard_size: int = SHARD_BYTES,
    sidecars: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> Exported:
    """Write a checkpoint with fake-quantized (quantized, then dequantized) weights.

    model: a checkpoint, a training run, an `Artifact` that `detect` returned, or a live transformers model, also one
        whose layers accelerate has offloaded. It is never changed.
    out: the directory to write; it appears whole or not at all.
    format: fp8, int8, int4, nvfp4, mxfp8, mxfp4 or w4a8, options after a colon (``"int4:block=64"``), or a torchao
        recipe.
    rules: a YAML file with a format for each module; ``format`` is then the default.
    activations: also keep the format's quantizers of layer inputs.
    calibrate: text to measure input ranges on: a file or data set as `evaluate` takes it, or a list of documents
        (texts, or int64 token tensors of shape (1, tokens)); implies ``activations``.
    calibrate_limit: number of documents of a file or data set to calibrate on.
    kv_cache: fp8 quantizes keys and values too.
    untie: store tied weights separately if the rules quantize only one of them.
    remote_code: Python code in the model directory: strip leaves it out, copy copies it.
    emit: modelopt also writes ModelOpt's state file.
    checkpoint: of a training run: newest (default), best, a step or a folder.
    device: where weights are quantized: auto, cpu, cuda or cuda:N.
    overwrite: replace an existing ``out``.
    resume: take over the files that a killed run finished; False starts again (directories only).
    trust_remote_code: run Python code that came with the model.
    base: of an adapter, the model to merge it into, if it is not where the adapter says.
    max_shard_size: bytes of the largest file of a live model; a directory keeps its division into files.
    sidecars: directory to take a live model's tokenizer and the like from; by default the one it was loaded from.
    on_progress: called as ``on_progress("write", done, total)`` in bytes.

    Under ``torchrun`` each rank measures its share of the text and writes its share of the files; ``files`` of the
    result is empty on all but rank 0.

    Raises `UsageError` for options that contradict each other, the model or the disk, `ArtifactError` for a source that
    is damaged, an export itself or quantized in a way that is not decoded here, `MissingError` where the format cannot
    be computed here or the disk is full.
    """
    options = make_options(
        format=format,
        rules=rules,
        activations=activations,
        calibrate=_documents(calibrate, calibrate_limit),
        kv_cache=kv_cache,
        untie=untie,
        remote_code=remote_code,
        emit=emit,
        device=device,
        overwrite=overwrite,
        resume=resume,
        trust_remote_code=trust_remote_code,
    )
    out = Path(out)
    if not isinstance(model, (str, Path, Artifact)):
        from loadstone.fakequant.live import export_model

        return export_model(
            model, out, options, max_shard_size=max_shard_size, sidecars=sidecars, on_progress=on_progress
        )
    from loadstone.fakequant.calibrate import calibrate_directory
    from loadstone.fakequant.directory import export_directory
    from loadstone.finalization.run import own_bytes
    from loadstone.ranks import joined

    artifact = _artifact(model, checkpoint, base)
    check_output(artifact.root, out, overwrite)
    artifact = _placed(artifact, options)
    plan = _plan(artifact, options)
    with joined() as ranks:
        share = own_bytes(plan.shards, ranks)
        return export_directory(
            artifact,
            plan,
            out,
            state=calibrate_directory(artifact, plan, options, ranks),
            remote_code=remote_code,
            emit_modelopt=options.emit_modelopt,
            device=device,
            overwrite=overwrite,
            resume=resume,
            ranks=ranks,
            on_progress=reporter(on_progress, WRITE, share),
        )


@cpu_by_default
def plan_export(
    source: str | Path | Artifact,
    out: str | Path | None = None,
    *,
    format: str | Format | None = None,
    rules: str | Path | RuleSet | None = None,
    activations: bool = False,
    calibrate: str | Path | Sequence[Any] | None = None,
    kv_cache: str | None = None,
    untie: bool = False,
    remote_code: str = "strip",
    emit: str | None = None,
    checkpoint: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    base: str | Path | None = None,
) -> ExportPlan:
    """What `export_fakequant` would write with the same options, from headers alone: nothing is written.

    ``out`` is only checked, where it is given. Takes the options of `export_fakequant` and raises the same errors.
    """
    options = make_options(
        format=format,
        rules=rules,
        activations=activations,
        calibrate=_documents(calibrate, 1),
        kv_cache=kv_cache,
        untie=untie,
        remote_code=remote_code,
        emit=emit,
        trust_remote_code=trust_remote_code,
    )
    artifact = _artifact(source, checkpoint, base)
    if out is not None:
        check_output(artifact.root, Path(out), overwrite)
    return _plan(_placed(artifact, options), options)


def _artifact(source: str | Path | Artifact, checkpoint: str | None, base: str | Path | None) -> Artifact:
    """The source, its weights decoded where they are quantized."""
    artifact = source if isinstance(source, Artifact) else detect(source, checkpoint=checkpoint, base=base)
    if not artifact.packed and not artifact.is_torchao:
        return artifact
    from loadstone.loading.decoded import dense_view

    return dense_view(artifact)


def _placed(artifact: Artifact, options: Options) -> Artifact:
    from loadstone.loading.adapters import placed
    from loadstone.loading.loader import import_libraries
    from loadstone.loading.merged_experts import merged_experts

    import_libraries()
    artifact = placed(artifact, options.trust_remote_code)
    if artifact.needs_remote_code and not options.trust_remote_code:
        return artifact
    return merged_experts(artifact, options.trust_remote_code)


def _documents(calibrate: str | Path | Sequence[Any] | None, limit: int) -> Sequence[Any] | None:
    if isinstance(calibrate, (str, Path)):
        from loadstone.text.corpus import read_corpus

        return tuple(read_corpus(str(calibrate), limit=limit).documents)
    return calibrate


def _plan(artifact: Artifact, options: Options) -> ExportPlan:
    from loadstone.fakequant.directory import plan_directory

    return plan_directory(
        artifact,
        options.rules,
        untie=options.untie,
        remote_code=options.remote_code,
        trust_remote_code=options.trust_remote_code,
    )
