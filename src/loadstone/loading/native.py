"""The native loader: a model on the meta device, tensors streamed into it, quantized ones rebuilt on the way.

The model's construction, weight renaming and conversion (fused experts), device maps, tying and unsaved buffers are
transformers' own: it is handed a lazy state dict instead of file names. What it would pass over in silence (missing,
unexpected or mismatched tensors, anything left on the meta device) is an error here.
"""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact
from loadstone.artifact.source import values_checked
from loadstone.errors import ArtifactError, LoadstoneError, MissingError
from loadstone.loading.devices import CPU, DISK
from loadstone.loading.kernels import check_kernels
from loadstone.loading.lazy import lazy_state_dict
from loadstone.loading.plan import LoadPlan, remote_code_refused

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def load_native(plan: LoadPlan, device_map: Any) -> PreTrainedModel:
    """Load a dense or torchao artifact; ``device_map`` is what `from_pretrained` takes (None: CPU)."""
    import torch

    artifact = plan.artifact
    config = load_config(artifact, plan.trust_remote_code)
    dtype = stored_dtype(artifact, config) if plan.dtype == "auto" else getattr(torch, plan.dtype)
    model_class = model_class_of(config, artifact)
    quantized_dtype = None if plan.dtype == "auto" else dtype
    check_kernels(artifact, device_map)
    options: dict[str, Any] = {"dtype": dtype, "device_map": device_map}
    with values_checked(artifact.source, artifact.packed.values()):
        with (
            lazy_state_dict(artifact, quantized_dtype) as state,
            quiet_transformers(),
            construction(artifact, model_class),
        ):
            model, info = model_class.from_pretrained(
                *_source(artifact, config, state, options),
                config=config,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
        check_complete(artifact, model, info)
    _finish(artifact, model)
    return model


def _source(
    artifact: Artifact, config: Any, state: dict[str, Any], options: dict[str, Any]
) -> tuple[Path | None]:
    """Where `from_pretrained` takes tensors from: our lazy state dict, or the files, for what stays on disk."""
    if isinstance(options["device_map"], dict) and DISK in options["device_map"].values():
        from transformers import GenerationConfig

        # Offloaded tensors are mapped from the checkpoint itself; the folder takes those that are converted on load.
        folder = tempfile.mkdtemp(prefix="loadstone-offload-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        options["offload_folder"] = folder
        # Or it would look for one beside the weights, where a checkpoint may have neither; `_finish` reads ours.
        options["generation_config"] = GenerationConfig.from_model_config(config)
        return (artifact.path,)
    options["state_dict"] = state
    return (None,)


def load_config(artifact: Artifact, trust_remote_code: bool = False) -> Any:
    """The transformers config of an artifact, without its quantization block (the tensors describe themselves)."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            artifact.config_dir, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:  # of many kinds: each config class checks its own fields
        if artifact.needs_remote_code and not trust_remote_code:
            raise remote_code_refused(artifact) from None
        reason = " ".join(str(error).split())[:300]
        raise ArtifactError(
            f"{artifact.path}/config.json: transformers refuses it ({reason})", _UPDATE
        ) from None
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def beside(artifact: Artifact, name: str) -> Path | None:
    """The directory that holds a sidecar file: the weights' own, else the training run's."""
    return next((folder for folder in artifact.sidecar_dirs if (folder / name).is_file()), None)


@contextmanager
def construction(artifact: Artifact, model_class: Any) -> Iterator[None]:
    """Build a model, one thread at a time; what fails is an `ArtifactError`, and a full GPU a `MissingError`."""
    import torch

    try:
        with BUILDING:
            yield
    except LoadstoneError:
        raise
    except torch.OutOfMemoryError as error:
        raise MissingError(
            f"'{artifact.root}' does not fit the GPU ({' '.join(str(error).split())[:200]})",
            "Use --device auto, which spreads it, or free the GPU",
        ) from error
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ArtifactError(
            f"{artifact.config_dir}/config.json: {model_class.__name__} cannot be built from it ({reason})",
            "Restore config.json from the source",
        ) from error


def model_class_of(config: Any, artifact: Artifact, trust_remote_code: bool = False) -> Any:
    """The class that ``architectures`` names, else transformers' causal language model for this config.

    With ``trust_remote_code`` the causal language model of the directory's own code comes first, as it does in
    `from_pretrained`.
    """
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    reference = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if trust_remote_code and reference:
        try:
            return get_class_from_dynamic_module(reference, artifact.config_dir, local_files_only=True)
        except Exception as error:
            raise remote_code_failed(artifact, error) from None
    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise ArtifactError(f"{artifact.path}/config.json: no model class for '{config.model_type}'", _UPDATE)


def remote_code_failed(artifact: Artifact, error: Exception) -> LoadstoneError:
    """The error for code of a model's directory that failed: a package that it imports is missing, or it is broken."""
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, ImportError):
        return MissingError(f"'{artifact.root}': its own code imports what is not here ({reason})")
    return ArtifactError(
        f"'{artifact.root}': its own code fails ({type(error).__name__}: {reason})",
        "Ask whoever wrote it, or try another version of transformers",
    )


def stored_dtype(artifact: Artifact, config: Any) -> torch.dtype:
    """The floating dtype an artifact computes in: as the config says, else as most of its bytes are stored."""
    import torch

    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    sizes: dict[str, int] = {}
    for tensor in artifact.tensors.values():
        if tensor.dtype in names:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return names[max(sizes, key=lambda k: sizes[k])] if sizes else torch.float32


def check_complete(artifact: Artifact, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raise `ArtifactError` for what `from_pretrained` only reports in its loading info, or not at all."""
    where = artifact.weights.index or artifact.weights.files[0]
    for key, problem, remedy in (
        ("missing_keys", "is missing: it would be initialised at random", "Finalize or copy the model again"),
        ("unexpected_keys", "belongs to no part of this model", "Check that config.json is of these weights"),
    ):
        names = sorted(info[key])
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ArtifactError(f"{where}: tensor '{names[0]}'{more} {problem}", remedy)
    if info["mismatched_keys"]:
        name, stored, expected = sorted(info["mismatched_keys"])[0]
        raise ArtifactError(
            f"{where}: tensor '{name}' has shape {list(stored)}, config.json asks for {list(expected)}",
            "Check that config.json is of these weights",
        )
    if info.get("error_msgs"):
        raise ArtifactError(f"{where}: {info['error_msgs'][0]}", "Finalize or copy the model again")
    # accelerate keeps what it offloads outside the model, and leaves meta tensors in its place.
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(places) < 2 or not places & {CPU, DISK}:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.device.type == "meta":
                raise ArtifactError(
                    f"{where}: '{name}' was left without data", "Finalize or copy the model again"
                )


def _finish(artifact: Artifact, model: PreTrainedModel) -> None:
    """What `from_pretrained` reads from the directory besides weights: generation config, quantizer."""
    from transformers import GenerationConfig

    model.config.name_or_path = model.name_or_path = str(artifact.path)
    if model.can_generate() and (folder := beside(artifact, "generation_config.json")):
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ArtifactError(
                f"{folder}/generation_config.json: transformers refuses it ({reason})",
                "Restore it from the source, or remove it",
            ) from None
    if artifact.is_torchao:
        from loadstone.loading.quantizer import attach_quantizer

        attach_quantizer(artifact, model)


class quiet_transformers:
    """Its load report speaks of warnings; here each of them is an error of ours, said once.

    The settings are the process's: the first thread to come in changes them, the last to go out puts them back.
    """

    _lock = threading.Lock()
    _inside = 0
    _before: tuple[int, bool] = (0, False)

    def __enter__(self) -> None:
        from transformers.utils import logging as hf

        kind = type(self)
        with kind._lock:
            if kind._inside == 0:
                kind._before = hf.get_verbosity(), hf.is_progress_bar_enabled()
                hf.set_verbosity_error()
                hf.disable_progress_bar()
            kind._inside += 1

    def __exit__(self, *exc: object) -> None:
        from transformers.utils import logging as hf

        kind = type(self)
        with kind._lock:
            kind._inside -= 1
            if kind._inside == 0:
                level, bar = kind._before
                hf.set_verbosity(level)
                if bar:
                    hf.enable_progress_bar()


# transformers builds models under settings of the whole process (default dtype, how weights are initialised and tied).
BUILDING = threading.RLock()


_UPDATE = "Update transformers, or check the file"
