"""An export from options: plan, calibrate where a quantizer needs it, write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from loadstone.artifact import Artifact, detect
from loadstone.errors import UsageError
from loadstone.fakequant.calibrate import calibrate_directory
from loadstone.fakequant.directory import export_directory, plan_directory
from loadstone.fakequant.export import Exported
from loadstone.fakequant.options import Options, make_options
from loadstone.fakequant.plan import ExportPlan
from loadstone.ranks import Ranks


def export_fakequant(model_or_dir: Any, out: str | Path, **options: Any) -> Exported:
    """Export a model directory, or a live transformers model, with its weights folded.

    ``options`` are the command's: ``format`` (text), ``rules`` (a YAML file), ``activations``, ``calibrate``,
    ``kv_cache``, ``untie``, ``remote_code``, ``emit``, ``device``, ``overwrite``, ``trust_remote_code``. For a
    directory also ``resume``: take over the files that a killed run finished. For a live model also ``max_shard_size``
    (bytes) and ``sidecars`` (a directory to take tokenizer and the like from). Raises `UsageError`, `ArtifactError` or
    `MissingError` and leaves no output; a live model is as before.
    """
    if isinstance(model_or_dir, (str, Path, Artifact)):
        chosen = make_options(**options)
        artifact = model_or_dir if isinstance(model_or_dir, Artifact) else detect(model_or_dir)
        return run_directory(artifact, plan_for(artifact, chosen), Path(out), chosen)
    from loadstone.fakequant.live import export_model

    live = {k: options.pop(k) for k in ("max_shard_size", "sidecars") if k in options}
    return export_model(model_or_dir, Path(out), make_options(**options), **live)


def plan_for(artifact: Artifact, options: Options) -> ExportPlan:
    """The plan of an export from a directory."""
    if not options.rules.formats:
        raise UsageError("no format is named", "Pass format= or rules=")
    return plan_directory(
        artifact,
        options.rules,
        untie=options.untie,
        remote_code=options.remote_code,
        trust_remote_code=options.trust_remote_code,
    )


def run_directory(
    artifact: Artifact,
    plan: ExportPlan,
    out: Path,
    options: Options,
    *,
    ranks: Ranks | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Exported:
    """Write the export of a directory; see `export_fakequant`. Of several ``ranks`` the first runs the model."""
    first = ranks is None or ranks.rank == 0
    return export_directory(
        artifact,
        plan,
        out,
        state=calibrate_directory(artifact, plan, options) if first else None,
        remote_code=options.remote_code,
        emit_modelopt=options.emit_modelopt,
        device=options.device,
        overwrite=options.overwrite,
        resume=options.resume,
        ranks=ranks,
        on_progress=on_progress,
    )
