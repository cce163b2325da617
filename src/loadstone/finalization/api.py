"""`loadstone.finalize` and `loadstone.plan_finalize`: from options to an artifact, or to the plan of one."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from loadstone.artifact import Artifact
from loadstone.artifact.detect import OTHER_QUANTIZER
from loadstone.artifact.formats.safetensors import FLOAT_DTYPES
from loadstone.artifact.packed import not_decoded
from loadstone.errors import ArtifactError, UsageError
from loadstone.finalization.encoders import COMPRESSED_TENSORS, TORCHAO, encoder_for
from loadstone.finalization.journal import discard_calibration
from loadstone.finalization.plan import FinalizePlan, make_plan, weight_dtype
from loadstone.finalization.run import Finalized, own_bytes, write_plan
from loadstone.loading.devices import cpu_by_default
from loadstone.progress import CALIBRATE, VERIFY, WRITE, OnProgress, reporter
from loadstone.quantization.recipe_file import MixedRecipe, read_recipe, recipes_in, with_algorithm
from loadstone.quantization.schemes import Recipe, parse_recipe
from loadstone.ranks import joined
from loadstone.writing.publish import check_output

log = logging.getLogger(__name__)


@cpu_by_default
def finalize(
    source: str | Path | Artifact,
    out: str | Path,
    *,
    recipe: str | Path | Recipe | MixedRecipe | None = None,
    algorithm: str | None = None,
    calibrate: str | Path | Sequence[str] | None = None,
    calibrate_tokens: int = 32768,
    skip: Sequence[str] = (),
    layout: str = TORCHAO,
    checkpoint: str | None = None,
    dtype: str = "auto",
    max_shard_size: int | str = "2GB",
    device: str = "auto",
    overwrite: bool = False,
    resume: bool = True,
    verify: bool = False,
    trust_remote_code: bool = False,
    base: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> Finalized:
    """Write a checkpoint as a self-describing artifact, quantized or plain; ``out`` appears whole or not at all.

    source: a checkpoint, a training run, or an `Artifact` that `detect` returned. It is never changed.
    out: the directory to write.
    recipe: how weights are quantized: a name with options (``"intx4-weight-only:group_size=64"``), a recipe file (a
        path that ends in .yaml or .yml), or a recipe object. None writes plain safetensors, and converts a QAT
        checkpoint by the recipe that it records.
    algorithm: how weights are rounded: affine, mse or hqq; with ``calibrate`` also gptq (then the default), awq or
        smoothquant.
    calibrate: text to calibrate on: a file or data set as `evaluate` takes it, or a list of documents.
    calibrate_tokens: number of calibration tokens.
    skip: modules to leave unquantized: names or parts of them, globs or ``re:REGEX``.
    layout: how quantized weights are stored: torchao, or compressed-tensors, which vLLM and SGLang run on their own
        kernels. With compressed-tensors and no recipe, a torchao artifact is moved over without loss.
    checkpoint: of a training run: newest (default), best, a step or a folder.
    dtype: floating dtype of unquantized tensors: auto (as stored), float32, bfloat16 or float16.
    max_shard_size: bytes of the largest file to write, or a text such as ``"500MB"``.
    device: where weights are quantized: auto, cpu, cuda or cuda:N.
    overwrite: replace an existing ``out``.
    resume: take over the finished shards of a run that was killed; False starts again.
    verify: before ``out`` appears, load it by transformers' and torchao's own rules and compare every tensor with what
        these make of the source.
    trust_remote_code: run Python code that came with the model.
    base: of an adapter, the model to merge it into, if it is not where the adapter says.
    on_progress: called as ``on_progress(stage, done, total)``; the stage is calibrate (in layers), write or verify (in
        source bytes).

    Under ``torchrun`` ranks divide the calibration, and each writes its share of the shards; ``files`` of the result is
    empty on all but rank 0.

    Raises `UsageError` for options that contradict each other, the model or the disk, `ArtifactError` for a source that
    is damaged or quantized already, `MissingError` where the recipe cannot run here or the disk is full.
    """
    from loadstone.finalization.verify import verify as verify_output
    from loadstone.loading.devices import quantize_device

    out = Path(out)
    plan = plan_finalize(
        source,
        out,
        recipe=recipe,
        algorithm=algorithm,
        calibrate=calibrate,
        skip=skip,
        layout=layout,
        checkpoint=checkpoint,
        dtype=dtype,
        max_shard_size=max_shard_size,
        device=device,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        base=base,
    )
    with joined() as ranks:
        where = ranks.device(quantize_device(device))
        if calibrate is not None:
            from loadstone.finalization.calibrate import calibrate_plan

            layers = partial(on_progress, CALIBRATE) if on_progress else None
            plan = calibrate_plan(
                plan, calibrate, calibrate_tokens, out, where, ranks, trust_remote_code, layers
            )
        share = own_bytes(plan.shards, ranks)
        report = reporter(on_progress, WRITE, share)
        check = None
        if verify:
            total = sum(step.source_bytes for step in plan.steps)
            check = partial(
                verify_output,
                plan,
                device=where,
                trust_remote_code=trust_remote_code,
                on_progress=reporter(on_progress, VERIFY, total),
            )
        done = write_plan(
            plan,
            out,
            device=where,
            overwrite=overwrite,
            resume=resume,
            ranks=ranks,
            check=check,
            on_progress=report,
        )
        if ranks.rank != 0:
            return done
    discard_calibration(out)
    return done


@cpu_by_default
def plan_finalize(
    source: str | Path | Artifact,
    out: str | Path | None = None,
    *,
    recipe: str | Path | Recipe | MixedRecipe | None = None,
    algorithm: str | None = None,
    calibrate: str | Path | Sequence[str] | None = None,
    skip: Sequence[str] = (),
    layout: str = TORCHAO,
    checkpoint: str | None = None,
    dtype: str = "auto",
    max_shard_size: int | str = "2GB",
    device: str = "auto",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    base: str | Path | None = None,
) -> FinalizePlan:
    """What `finalize` would do with the same options, from headers alone: nothing is written.

    ``out`` is only checked, where it is given. Takes the options of `finalize` and raises the same errors.
    """
    # Errors in the options themselves come before anything heavy is imported.
    asked = _recipe(recipe)
    max_shard_bytes = parse_size(max_shard_size)
    from loadstone.finalization.moving import plan_move
    from loadstone.loading import plan as load_plan
    from loadstone.loading.adapters import placed
    from loadstone.loading.decoded import dense_view
    from loadstone.loading.devices import quantize_device
    from loadstone.loading.loader import import_libraries
    from loadstone.quantization.qat import recorded_recipe
    from loadstone.quantization.quantize import check_runs

    artifact = load_plan(
        source, dtype=dtype, checkpoint=checkpoint, trust_remote_code=trust_remote_code, base=base
    ).artifact
    if layout == COMPRESSED_TENSORS and artifact.is_torchao and asked is None:
        if out is not None:
            check_output(artifact.root, Path(out), overwrite)
        import_libraries()
        return plan_move(artifact, max_shard_bytes=max_shard_bytes, trust_remote_code=trust_remote_code)
    _refuse_quantized(artifact)
    if artifact.packed or artifact.is_torchao:
        artifact = dense_view(artifact, dtype)
        log.warning(
            "%s is quantized (%s): its decoded weights are what is finalized",
            artifact.root,
            artifact.decoded[-1],
        )
    chosen = recorded_recipe(artifact, asked)
    chosen = _with_options(chosen, algorithm, calibrate is not None, skip, layout)
    if layout != TORCHAO and chosen is None:
        raise UsageError(
            f"--layout {layout} is about quantized weights",
            "Add --quantize RECIPE or --recipe FILE, or take an artifact that is quantized with torchao",
        )
    if out is not None:
        check_output(artifact.root, Path(out), overwrite)
    import_libraries()
    artifact = placed(artifact, trust_remote_code)
    where = quantize_device(device)
    encoder = encoder_for(layout, where)
    for each in recipes_in(chosen):
        stored = weight_dtype(artifact, dtype, trust_remote_code=trust_remote_code)
        check_runs(encoder.rounding(each), where, stored)
    return make_plan(
        artifact,
        chosen,
        dtype=dtype,
        device=where,
        skip=[skip] if isinstance(skip, str) else list(skip),
        max_shard_bytes=max_shard_bytes,
        trust_remote_code=trust_remote_code,
        encoder=encoder,
    )


def parse_size(size: int | str) -> int:
    """Bytes of a size such as ``5GB``, ``200KB`` (powers of 1000) or ``2GiB`` (of 1024), in any case.

    Raises `UsageError` for a text of another form, and for a size of 0 or less.
    """
    text = str(size).strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text, re.IGNORECASE)
    nbytes = 0
    if match and (match[2] or not match[3]):
        power = " kmgt".index(match[2].lower() or " ")
        nbytes = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if nbytes <= 0:
        raise UsageError(f"the shard size '{text}' is not a size", "Examples: 500MB, 5GB, 2GiB")
    return nbytes


def _refuse_quantized(artifact: Artifact) -> None:
    """Raise `ArtifactError` for a source that is quantized in a format that is not decoded here."""
    if artifact.kind == OTHER_QUANTIZER:
        plain = all(info.dtype in FLOAT_DTYPES for info in artifact.tensors.values())
        other = not_decoded(artifact.quantization_config)
        raise ArtifactError(
            f"'{artifact.root}' is already quantized ({artifact.evidence[-1]})"
            + (f" with {other}, which is not decoded here" if other else "")
            + (", and all its tensors are plain" if plain else ""),
            "If they were merged or decoded, remove quantization_config from config.json"
            if plain
            else "Finalize the unquantized checkpoint it was made from",
        )


def _recipe(recipe: str | Path | Recipe | MixedRecipe | None) -> Recipe | MixedRecipe | None:
    if isinstance(recipe, Path) or (isinstance(recipe, str) and recipe.endswith((".yaml", ".yml"))):
        return read_recipe(recipe)
    if recipe is not None and not isinstance(recipe, str | Recipe | MixedRecipe):
        raise UsageError(
            f"a {type(recipe).__name__} is not a recipe",
            "Give its name, such as int8-weight-only: `loadstone finalize --list-recipes` shows all",
        )
    return parse_recipe(recipe) if isinstance(recipe, str) else recipe


def _with_options(
    recipe: Recipe | MixedRecipe | None,
    algorithm: str | None,
    calibrated: bool,
    skip: Sequence[str],
    layout: str,
) -> Recipe | MixedRecipe | None:
    """The recipe with the options applied that belong to it."""
    given = recipes_in(recipe)
    measured = layout == COMPRESSED_TENSORS and any(
        (served := each.scheme.serving) and served.measures_inputs for each in given
    )
    for flag, value in (("--skip", skip), ("--algorithm", algorithm), ("--calibrate", calibrated)):
        if value and recipe is None:
            raise UsageError(f"{flag} is about quantization", "Add --quantize RECIPE or --recipe FILE")
    if calibrated and (not measured or any(each.scheme.algorithms for each in given)):
        algorithm = algorithm or "gptq"
    if recipe and algorithm:
        recipe = with_algorithm(recipe, algorithm)
    for each in recipes_in(recipe):
        if each.scheme.calibrated and not calibrated:
            raise UsageError(f"{each} needs text to calibrate with", "Add --calibrate FILE")
    if measured and not calibrated:
        raise UsageError(
            f"{recipe}: this layout stores the range of the inputs, which is measured on text",
            "Add --calibrate FILE (or sample), or use nvfp4-weight-only",
        )
    return recipe
