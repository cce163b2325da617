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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact
from loadstone.errors import ArtifactError
from loadstone.loading.devices import CPU, DISK
from loadstone.loading.kernels import check_kernels
from loadstone.loading.lazy import lazy_state_dict
from loadstone.loading.plan import LoadPlan
from loadstone.loading.values import check_values, limits_of

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
    with ThreadPoolExecutor(1) as pool:
        # The scan reads the same bytes as the load, on the other core, through a small buffer.
        files = artifact.weights.format == "safetensors" and artifact.table
        stored = files.tensors.values() if files else ()
        scan = pool.submit(check_values, artifact.path, stored, limits_of(artifact.quantized.values()))
        with lazy_state_dict(artifact, quantized_dtype) as state, _quiet_transformers():
            model, info = model_class.from_pretrained(
                *_source(artifact, state, options),
                config=config,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **options,
            )
        _check_complete(artifact, model, info)
        scan.result()
    _finish(artifact, model)
    return model


def _source(artifact: Artifact, state: dict[str, Any], options: dict[str, Any]) -> tuple[Path | None]:
    """Where `from_pretrained` takes tensors from: our lazy state dict, or the files, for what stays on disk."""
    if isinstance(options["device_map"], dict) and DISK in options["device_map"].values():
        # Offloaded tensors are mapped from the checkpoint itself; the folder takes those that are converted on load.
        folder = tempfile.mkdtemp(prefix="loadstone-offload-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        options["offload_folder"] = folder
        return (artifact.path,)
    options["state_dict"] = state
    return (None,)


def load_config(artifact: Artifact, trust_remote_code: bool = False) -> Any:
    """The transformers config of an artifact, without its quantization block (the tensors describe themselves)."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            beside(artifact, "config.json"), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except (ValueError, KeyError, TypeError, OSError) as error:
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


def model_class_of(config: Any, artifact: Artifact) -> Any:
    """The class that ``architectures`` names, else transformers' causal language model for this config."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    for name in config.architectures or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        if type(config) in mapping:
            return mapping[type(config)]
    raise ArtifactError(f"{artifact.path}/config.json: no model class for '{config.model_type}'", _UPDATE)


def stored_dtype(artifact: Artifact, config: Any) -> torch.dtype:
    """The floating dtype an artifact computes in: as the config says, else as most of its bytes are stored."""
    import torch

    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
    sizes: dict[str, int] = {}
    tables = [artifact.table.tensors] if artifact.table else [contents.tensors for contents in artifact.bins]
    for table in tables:
        for tensor in table.values():
            if tensor.dtype in names:
                sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return names[max(sizes, key=lambda k: sizes[k])] if sizes else torch.float32


def _check_complete(artifact: Artifact, model: PreTrainedModel, info: dict[str, Any]) -> None:
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
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    if artifact.is_torchao:
        from loadstone.loading.quantizer import attach_quantizer

        attach_quantizer(artifact, model)


class _quiet_transformers:
    """Its load report speaks of warnings; here each of them is an error of ours, said once."""

    def __enter__(self) -> None:
        from transformers.utils import logging as hf

        self.level = hf.get_verbosity()
        self.bar = hf.is_progress_bar_enabled()
        hf.set_verbosity_error()
        hf.disable_progress_bar()

    def __exit__(self, *exc: object) -> None:
        from transformers.utils import logging as hf

        hf.set_verbosity(self.level)
        if self.bar:
            hf.enable_progress_bar()


_UPDATE = "Update transformers, or check the file"
