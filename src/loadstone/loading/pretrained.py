"""Loading by transformers itself: quantizers that are not decoded here, and formats on their own kernels."""

from __future__ import annotations

import sys
from contextlib import nullcontext, redirect_stdout
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from loadstone.artifact.detect import OTHER_QUANTIZER
from loadstone.artifact.source import values_checked
from loadstone.errors import ArtifactError, LoadstoneError, MissingError
from loadstone.loading.bounds import bounded
from loadstone.loading.computed import computed_tensors
from loadstone.loading.model_class import BUILDING, auto_class, quiet_transformers, remote_code_failed
from loadstone.loading.native import check_complete
from loadstone.loading.plan import QUANTIZER_PACKAGES, LoadPlan

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_pretrained(plan: LoadPlan, device_map: Any) -> PreTrainedModel:
    """transformers' `from_pretrained`, with its silent failures made errors.

    Raises `MissingError` naming the package that the quantizer needs, `ArtifactError` for tensors that do not fit or
    are not finite.
    """
    import torch

    artifact = plan.artifact
    method, remedy = str(artifact.quant_method), ""
    if artifact.packed:
        remedy = "Leave --native-kernels out: its weights are then decoded"
    elif artifact.kind == OTHER_QUANTIZER:
        remedy = (
            f"Load it where {method}'s own package and kernels run, or name the model that it was made from"
        )
        check_package(method)
    with (
        values_checked(artifact.source, artifact.packed.values()),
        BUILDING,
        bounded(artifact),
        computed_tensors() if artifact.needs_remote_code else nullcontext(),
        quiet_transformers(),
        # Packages of quantizers write their logs there, where a command's result belongs.
        redirect_stdout(sys.stderr),
    ):
        try:
            model, info = auto_class(artifact).from_pretrained(
                artifact.path,
                dtype=plan.dtype,
                device_map=device_map,
                trust_remote_code=plan.trust_remote_code,
                local_files_only=True,
                output_loading_info=True,
            )
        except ImportError as error:
            reason = " ".join(str(error).split())
            raise MissingError(
                f"loading {method} needs a package that is not here: {reason}", remedy
            ) from None
        except (torch.OutOfMemoryError, LoadstoneError):
            raise
        except Exception as error:
            if artifact.needs_remote_code and not isinstance(error, ValueError | RuntimeError | OSError):
                raise remote_code_failed(artifact, error) from None
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ArtifactError(
                f"'{artifact.path}' ({artifact.kind}): transformers cannot load it here ({reason})", remedy
            ) from None
        check_complete(artifact, model, info)
    if artifact.packed and not getattr(model, "is_quantized", False) and not artifact.needs_remote_code:
        raise MissingError(
            f"transformers has no kernel for {method} here, and decoded it", "Leave --native-kernels out"
        )
    if artifact.packed and method in ("fp8", "mxfp8"):
        _check_fp8_kernel()
    if plan.dtype != "auto" and artifact.packed:
        _cast_plain_weights(model, getattr(torch, plan.dtype))
    return model


def _check_fp8_kernel() -> None:
    """Raise `MissingError` where the kernel of FP8 layers, which transformers takes from the hub as a layer is first
    used, is not in the cache."""
    from transformers.integrations.finegrained_fp8 import load_finegrained_fp8_kernel

    try:
        load_finegrained_fp8_kernel()
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise MissingError(
            f"transformers takes the kernel of FP8 from the hub, and it cannot be loaded here ({reason})",
            "Fetch it once (hf download kernels-community/finegrained-fp8), or leave --native-kernels out",
        ) from None


def _cast_plain_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Weights beside quantized layers in the dtype that was asked for: of some quantizers (bitsandbytes' 4 bits)
    transformers leaves them in the dtype that they are stored in."""
    left = model.dtype
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for name, module in model.named_modules():
        plain = type(module).__module__.startswith(("torch.nn.", "transformers.models."))
        if left == dtype or not plain or any(f".{each}." in f".{name}." for each in kept):
            continue
        for parameter in module.parameters(recurse=False):
            if parameter.dtype == left:
                parameter.data = parameter.data.to(dtype)


def check_package(method: str) -> None:
    """Raise `MissingError` with the install command when the quantizer's package is not installed."""
    needed = QUANTIZER_PACKAGES.get(method)
    if needed is None:
        return
    module, package = needed
    try:
        found = find_spec(module) is not None
    except ModuleNotFoundError:
        found = False
    if not found:
        raise MissingError(
            f"the model is quantized by {method}, which needs the package {package}", f"pip install {package}"
        )
