"""How an artifact must be loaded, decided from facts alone. Pure data: nothing here imports torch."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from loadstone.artifact.detect import (
    ADAPTER,
    CONTEXT,
    DENSE,
    FAKEQUANT,
    OTHER_QUANTIZER,
    PFN,
    QAT,
    TORCHAO,
    TORCHAO_UNMARKED,
    Artifact,
    detect,
)
from loadstone.artifact.packed import not_decoded
from loadstone.artifact.training_run import checkpoints
from loadstone.errors import ArtifactError, MissingError, UsageError
from loadstone.loading.bounds import check_config
from loadstone.loading.devices import check_device
from loadstone.loading.model_class import has_own_class, remote_code_refused

log = logging.getLogger(__name__)

NATIVE = "native"
NATIVE_QUANTIZED = "native-quantized"
NATIVE_UNPACKED = "native-unpacked"
FROM_PRETRAINED = "from_pretrained"
IN_CONTEXT = "in-context"

DTYPES = ("auto", "float32", "bfloat16", "float16")

# What each quantizer's from_pretrained needs, as (module, pip name).
QUANTIZER_PACKAGES = {
    "gptq": ("gptqmodel", "gptqmodel"),
    "awq": ("gptqmodel", "gptqmodel"),
    "compressed-tensors": ("compressed_tensors", "compressed-tensors"),
    "bitsandbytes": ("bitsandbytes", "bitsandbytes"),
    "hqq": ("hqq", "hqq"),
    "quanto": ("optimum.quanto", "optimum-quanto"),
    "aqlm": ("aqlm", "aqlm"),
    "eetq": ("kernels", "kernels"),
    "auto-round": ("auto_round", "auto-round"),
    "quark": ("quark", "amd-quark"),
    "spqr": ("spqr_quant", "spqr-quant"),
    "vptq": ("vptq", "vptq"),
}

# Packed formats that transformers has kernels for: packages that these need, and whether they need a GPU.
_KERNELS = {
    "fp8": (("kernels",), True),
    "mxfp8": (("kernels",), True),
    "fbgemm_fp8": (("fbgemm_gpu",), True),
    "mxfp4": (("kernels", "triton"), True),
    "gptq": (("gptqmodel", "optimum"), False),
    "awq": (("gptqmodel",), False),
    "auto-round": (("auto_round",), False),
    "bitsandbytes": (("bitsandbytes",), False),
}


@dataclass(frozen=True)
class LoadPlan:
    """One way to load one artifact here. ``device`` and ``dtype`` are as asked (``auto`` is resolved by the load)."""

    artifact: Artifact
    load_path: str
    reason: str
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False
    messages: tuple[str, ...] = ()


def plan(
    target: str | Path | Artifact,
    *,
    device: str = "auto",
    dtype: str = "auto",
    checkpoint: str | None = None,
    no_checkpoint: bool = False,
    trust_remote_code: bool = False,
    base: str | Path | None = None,
    native_kernels: bool = False,
) -> LoadPlan:
    """Decide how ``target`` must be loaded and say so once on the log.

    ``checkpoint`` and ``no_checkpoint`` choose within a training run; an artifact that loads one way only overrides
    them, with one warning that names the flag.

    ``base``: of an adapter, its base model's directory. ``native_kernels``: run weights of other quantizers on their
    format's own kernels, through `from_pretrained`, instead of decoding them.

    Raises `UsageError`, `ArtifactError` or `MissingError`.
    """
    check_device(device)
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype} is not known", f"One of {', '.join(DTYPES)}")
    if checkpoint is not None and no_checkpoint:
        raise UsageError(f"--checkpoint {checkpoint} and --no-checkpoint exclude each other", "Give one")
    messages: list[str] = []
    artifact = _choose(target, checkpoint, no_checkpoint, messages, base)
    if dtype == "float16" and any(flat.type == "MXTensor" for flat in artifact.quantized.values()):
        raise UsageError(
            f"--dtype float16: '{artifact.root}' holds MX tensors, which torchao multiplies in bfloat16 and float32",
            "Use --dtype bfloat16",
        )
    check_config(artifact, trust_remote_code)
    load_path, reason = _load_path(artifact)
    if artifact.needs_remote_code and (trust_remote_code or not has_own_class(artifact)):
        if not trust_remote_code:
            raise remote_code_refused(artifact)
        reason = f"{reason}; its model class is code in the directory"
    elif load_path in (NATIVE, NATIVE_QUANTIZED, NATIVE_UNPACKED) and artifact.kind != ADAPTER:
        _check_unnamed_class(artifact)
    if native_kernels and str(artifact.quant_method) in _KERNELS:
        _check_native_kernels(artifact, device)
        load_path, reason = FROM_PRETRAINED, f"{artifact.quant_method} on its own kernels, as asked"
    elif native_kernels:
        messages.append(
            f"--native-kernels has no effect: {artifact.root} is {artifact.kind}, without such kernels"
        )
    messages += artifact.notes
    log.info("%s: %s; load path: %s (%s)", artifact.root, artifact.kind, load_path, reason)
    for message in messages:
        log.warning("%s", message)
    return LoadPlan(artifact, load_path, reason, device, dtype, trust_remote_code, tuple(messages))


def _check_unnamed_class(artifact: Artifact) -> None:
    """Raise `ArtifactError` where config.json names no class, and the one that is then taken does not fit the
    weights."""
    if artifact.config.get("architectures"):
        return
    # Only the model can tell. It imports torch, for configs that save_pretrained did not write.
    from loadstone.loading.decoded import dense_view
    from loadstone.loading.meta import model_map

    view = dense_view(artifact)
    try:
        model_map(view, view.tensors)
    except ArtifactError as error:
        raise ArtifactError(
            f"{artifact.config_dir}/config.json names no architectures, and the class that transformers has for "
            f"'{artifact.config.get('model_type')}' does not fit the weights ({error.message})",
            'Add the class that the weights were saved from: "architectures": ["NAME"]',
        ) from None


def _check_native_kernels(artifact: Artifact, device: str) -> None:
    """Raise `MissingError` for packages or a GPU that the kernels of a packed format need and that are not here."""
    method = str(artifact.quant_method)
    packages, on_gpu = _KERNELS[method]
    lacking = [name for name in packages if find_spec(name) is None]
    if lacking:
        names = " ".join(name.replace("_", "-") for name in lacking)
        raise MissingError(
            f"the kernels of {method} need {', '.join(lacking)}",
            f"pip install {names}, or leave --native-kernels out",
        )
    if on_gpu:
        import torch

        if device == "cpu" or not torch.cuda.is_available():
            raise MissingError(f"the kernels of {method} need a CUDA GPU", "Leave --native-kernels out")


def _choose(
    target: str | Path | Artifact,
    checkpoint: str | None,
    no_checkpoint: bool,
    messages: list[str],
    base: str | Path | None,
) -> Artifact:
    if isinstance(target, Artifact):
        if checkpoint is not None or no_checkpoint:
            raise UsageError(
                "a checkpoint is chosen by detect()", "Give the directory, or detect(checkpoint=...)"
            )
        return target
    if checkpoint is None and not no_checkpoint:
        return detect(target, base=base)
    root = Path(target)
    forced = _forces_its_own_path(root)
    if forced is not None:
        flag = f"--checkpoint {checkpoint}" if checkpoint is not None else "--no-checkpoint"
        messages.append(
            f"{flag} is overridden: {root} is a {forced.kind} artifact and loads whole, by its own tensors, only"
        )
        return forced
    if no_checkpoint:
        if (
            checkpoints(root)
            and not any(root.glob("*.safetensors*"))
            and not any(root.glob("pytorch_model*"))
        ):
            raise UsageError(
                f"--no-checkpoint: '{root}' holds checkpoints and no weights of its own",
                "Leave out --no-checkpoint",
            )
        return detect(root)
    return detect(root, checkpoint=checkpoint, base=base)


def _forces_its_own_path(root: Path) -> Artifact | None:
    """The artifact at ``root`` itself when it is quantized, so that no checkpoint could replace it."""
    if not (root / "config.json").is_file():
        return None
    try:
        artifact = detect(root, checkpoint=None)
    except ArtifactError:
        return None
    quantized = artifact.kind in (TORCHAO, TORCHAO_UNMARKED, OTHER_QUANTIZER) or artifact.packed
    return artifact if quantized and artifact.path == root else None


def _schemes(artifact: Artifact) -> str:
    """The schemes of packed weights, the most frequent first."""
    counts = Counter(str(weight.scheme) for weight in artifact.packed.values())
    return ", ".join(f"{scheme} x {count}" for scheme, count in counts.most_common())


def _load_path(artifact: Artifact) -> tuple[str, str]:
    match artifact.kind:
        case k if k == ADAPTER:
            return NATIVE, f"{artifact.adapter} merged into its base, {artifact.path}, as it is read"
        case k if k == DENSE:
            return NATIVE, f"plain tensors in {artifact.weights.format}"
        case k if k == TORCHAO:
            return NATIVE_QUANTIZED, "torchao tensors rebuilt from their own metadata"
        case k if k == TORCHAO_UNMARKED:
            return NATIVE_QUANTIZED, "no quantization_config: recipe recovered from the tensors themselves"
        case _ if artifact.packed:
            return NATIVE_UNPACKED, f"packed weights are decoded to the model's dtype ({_schemes(artifact)})"
        case k if k == FAKEQUANT:
            return NATIVE, "folded weights are plain tensors"
        case k if k == QAT:
            return (
                NATIVE,
                "trained with fake quantization: finalize converts it, this loads the unquantized weights",
            )
        case k if k == OTHER_QUANTIZER:
            other = not_decoded(artifact.quantization_config)
            why = f" ({other} is not decoded here)" if other else ""
            return (
                FROM_PRETRAINED,
                f"quantized by {artifact.quant_method}: transformers' own quantizer loads it{why}",
            )
        case k if k == PFN:
            return IN_CONTEXT, "an in-context model of loadstone's own, in plain safetensors"
        case k if k == CONTEXT:
            remedy = "Use loadstone.load_context(path), or loadstone eval and predict"
            raise ArtifactError(
                f"'{artifact.root}' is a fitted context, which is not a model by itself", remedy
            )
    raise ArtifactError(
        f"'{artifact.root}' is a {artifact.kind}, which is not a model", "Name a model directory"
    )
