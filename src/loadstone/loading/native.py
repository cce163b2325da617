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
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact
from loadstone.artifact.source import values_checked
from loadstone.errors import ArtifactError
from loadstone.loading.complete import CHECK_CONFIG, COPY_AGAIN, MISSING, UNEXPECTED, old_masks
from loadstone.loading.computed import computed_tensors
from loadstone.loading.devices import CPU, DISK
from loadstone.loading.experts import experts_alone, forget_experts, registered_experts
from loadstone.loading.infinite import infinite_buffers
from loadstone.loading.kernels import check_kernels
from loadstone.loading.lazy import lazy_state_dict
from loadstone.loading.meta import meta_model
from loadstone.loading.model_class import (
    construction,
    generation_config,
    is_own_code,
    load_config,
    model_class_of,
    quiet_transformers,
    stored_dtype,
)
from loadstone.loading.plan import LoadPlan
from loadstone.loading.tensor_parallel import divided

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def load_native(plan: LoadPlan, device_map: Any, mesh: Any = None) -> PreTrainedModel:
    """Load a dense or torchao artifact; ``device_map`` is what `from_pretrained` takes (None: CPU). ``mesh``: of the
    ranks that load it in parts."""
    import torch

    artifact = plan.artifact
    config = load_config(artifact, plan.trust_remote_code)
    dtype = stored_dtype(artifact, config) if plan.dtype == "auto" else getattr(torch, plan.dtype)
    model_class = model_class_of(config, artifact, plan.trust_remote_code)
    quantized_dtype = None if plan.dtype == "auto" else dtype
    alone = experts_alone((*artifact.packed, *artifact.tensors))
    learned = registered_experts(meta_model(artifact, plan.trust_remote_code)) if alone else nullcontext()
    check_kernels(artifact, device_map)
    options: dict[str, Any] = {"dtype": dtype, "device_map": device_map}
    infinite = infinite_buffers(artifact, plan.trust_remote_code)
    share = (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())
    with values_checked(artifact.source, artifact.packed.values(), infinite, share):
        with (
            lazy_state_dict(artifact, quantized_dtype) as state,
            quiet_transformers(),
            construction(artifact, model_class),
            learned,
            divided(model_class, mesh) if mesh is not None else nullcontext(),
            computed_tensors() if is_own_code(model_class) else nullcontext(),
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


def check_complete(artifact: Artifact, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Raise `ArtifactError` for what `from_pretrained` only reports in its loading info, or not at all."""
    where = artifact.weights.index or artifact.weights.files[0]
    for key, problem, remedy in (
        ("missing_keys", MISSING, COPY_AGAIN),
        ("unexpected_keys", UNEXPECTED, CHECK_CONFIG),
    ):
        names = sorted(set(info[key]) - old_masks(artifact.tensors, info[key]))
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise ArtifactError(f"{where}: tensor '{names[0]}'{more} {problem}", remedy)
    if info["mismatched_keys"]:
        name, stored, expected = sorted(info["mismatched_keys"])[0]
        raise ArtifactError(
            f"{where}: tensor '{name}' has shape {list(stored)}, config.json asks for {list(expected)}",
            CHECK_CONFIG,
        )
    if info.get("error_msgs"):
        raise ArtifactError(f"{where}: {info['error_msgs'][0]}", COPY_AGAIN)
    # accelerate keeps what it offloads outside the model, and leaves meta tensors in its place.
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    if len(places) < 2 or not places & {CPU, DISK}:
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.device.type == "meta":
                raise ArtifactError(f"{where}: '{name}' was left without data", COPY_AGAIN)


def _finish(artifact: Artifact, model: PreTrainedModel) -> None:
    """What `from_pretrained` reads from the directory besides weights: generation config, quantizer."""
    forget_experts(model)
    model.config.name_or_path = model.name_or_path = str(artifact.path)
    if (generation := generation_config(artifact, model)) is not None:
        model.generation_config = generation
    if artifact.is_torchao:
        from loadstone.loading.quantizer import attach_quantizer

        attach_quantizer(artifact, model)
