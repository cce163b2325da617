"""Artifacts that only transformers' own quantizers can load, and models whose class is code in the directory."""

from __future__ import annotations

from contextlib import nullcontext
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
    from transformers import PreTrainedModel


def load_pretrained(plan: LoadPlan, device_map: Any) -> PreTrainedModel:
    """transformers' `from_pretrained`, with its silent failures made errors.

    Raises `MissingError` naming the package that the quantizer needs, `ArtifactError` for tensors that do not fit or
    are not finite.
    """
    import torch

    artifact = plan.artifact
    if artifact.adapter is not None:
        raise ArtifactError(
            f"'{artifact.root}': an adapter is not merged while a model of its directory's own code is loaded",
            "Merge it first: loadstone finalize -M ADAPTER --trust-remote-code -o OUT",
        )
    if artifact.kind == OTHER_QUANTIZER:
        check_package(str(artifact.quant_method))
    with (
        values_checked(artifact.source, artifact.packed.values()),
        BUILDING,
        bounded(artifact),
        computed_tensors() if artifact.needs_remote_code else nullcontext(),
        quiet_transformers(),
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
            if artifact.kind != OTHER_QUANTIZER and not artifact.packed:
                raise remote_code_failed(artifact, error) from None
            reason = " ".join(str(error).split())
            raise MissingError(
                f"loading {artifact.quant_method} needs a package that is not here: {reason}"
            ) from None
        except (torch.OutOfMemoryError, LoadstoneError):
            raise
        except (ValueError, RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ArtifactError(f"'{artifact.path}': transformers cannot load it here ({reason})") from None
        except Exception as error:
            if not artifact.needs_remote_code:
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise ArtifactError(
                    f"'{artifact.path}': transformers cannot load it here ({reason})"
                ) from None
            raise remote_code_failed(artifact, error) from None
        check_complete(artifact, model, info)
    if artifact.packed and not getattr(model, "is_quantized", False) and not artifact.needs_remote_code:
        raise MissingError(
            f"transformers has no kernel for {artifact.quant_method} here, and decoded it",
            "Leave --native-kernels out",
        )
    return model


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
