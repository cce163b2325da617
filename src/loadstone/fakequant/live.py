"""Export from a live transformers model, offloaded or not, one decoder layer at a time; the model is
only read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact import TensorInfo
from loadstone.artifact.torchao.flatten import dtype_name
from loadstone.errors import ArtifactError, UsageError
from loadstone.fakequant.calibrate import calibrate, token_batches
from loadstone.fakequant.export import Exported, SideFiles, resolve_device, write_export
from loadstone.fakequant.offload import data_of, return_memory
from loadstone.fakequant.options import Options
from loadstone.fakequant.package import COPY, code_files, without_auto_map
from loadstone.fakequant.plan import ExportPlan, files_of, make_plan
from loadstone.fakequant.quantizers import OwnQuantizers, find_quantizers, kind_of
from loadstone.fakequant.roles import roles_in
from loadstone.fakequant.state import QuantizerState, input_specs
from loadstone.progress import WRITE, OnProgress, reporter
from loadstone.writing.index import SHARD_BYTES
from loadstone.writing.publish import check_output
from loadstone.writing.sidecars import sidecars_in

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_LAYER = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True)
class LiveTensors:
    """A model's tensors under the names that `save_pretrained` gives them. ``groups``: names in the model's
    state dict that are converted together; ``infos``: what they become; ``ties``: saved name -> saved name
    of one tensor; ``saved``: a weight with a quantizer of its own -> its saved names.
    """

    model: PreTrainedModel
    groups: tuple[tuple[str, ...], ...]
    infos: dict[str, TensorInfo]
    ties: dict[str, str]
    quantizers: OwnQuantizers
    saved: dict[str, tuple[str, ...]]

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor by its saved name, weights with a quantizer of their own folded by it."""
        state = self.model.state_dict(keep_vars=True)
        for names in self.groups:
            data = {name: data_of(self.model, name, state[name]) for name in names}
            data = {name: self.quantizers.folded(name, tensor) for name, tensor in data.items()}
            data = _saved(self.model, data)
            # Let go one by one: the next layer is read when this one is gone.
            for name in list(data):
                yield name, data.pop(name)
            return_memory()
        self.quantizers.check_done()


def live_tensors(model: PreTrainedModel) -> LiveTensors:
    """Names, shapes and groups of a model's tensors; nothing is read."""
    import torch

    quantizers = find_quantizers(model)
    state = model.state_dict(keep_vars=True)
    dropped = getattr(model, "_keys_to_ignore_on_save", None) or ()
    names = [n for n in state if not quantizers.owns(n) and not any(re.search(p, n) for p in dropped)]
    for name in names:
        if not isinstance(state[name], torch.Tensor):
            raise ArtifactError(f"'{name}' in the state dict is no tensor", "Export the model's directory")
    tied = _ties(model, state)
    # A tied tensor without data of its own is stored as the tensor it is tied to.
    names = [n for n in names if n not in tied or _has_data(model, n, state[n])]
    shells = {n: torch.empty(state[n].shape, dtype=state[n].dtype, device="meta") for n in names}
    groups = _groups(model, names, shells)
    infos: dict[str, TensorInfo] = {}
    for group in groups:
        for name, shell in _saved(model, {n: shells[n] for n in group}).items():
            if name in infos:
                raise ArtifactError(f"two tensors would be saved as '{name}'", "Export the model's directory")
            infos[name] = TensorInfo(name, dtype_name(shell.dtype), tuple(shell.shape), "", 0, shell.nbytes)
    single = {n: next(iter(_saved(model, {n: shells[n]})), n) for n in names if n in {*tied, *tied.values()}}
    ties = {single.get(t, t): single.get(s, s) for t, s in tied.items()}
    saved = {n: tuple(_saved(model, {n: shells[n]})) for n in quantizers.weights if n in shells}
    return LiveTensors(model, groups, infos, ties, quantizers, saved)


def _ties(model: PreTrainedModel, state: dict[str, Any]) -> dict[str, str]:
    """Tied names from the model's own table; addresses say nothing, since all meta tensors have address 0."""
    table = getattr(model, "all_tied_weights_keys", None) or {}
    return {t: s for t, s in table.items() if t in state and s in state}


def _has_data(model: PreTrainedModel, name: str, tensor: torch.Tensor) -> bool:
    if tensor.device.type != "meta":
        return True
    try:
        data_of(model, name, tensor)
    except ArtifactError:
        return False
    return True


def _groups(
    model: PreTrainedModel, names: list[str], shells: dict[str, torch.Tensor]
) -> tuple[tuple[str, ...], ...]:
    """Tensors of one layer together; others alone, unless a conversion needs them together."""
    layers: dict[str, list[str]] = {}
    for name in names:
        match = _LAYER.match(name)
        layers.setdefault(match[1] if match else "", []).append(name)
    rest = layers.pop("", [])
    alone = [set(_saved(model, {n: shells[n]})) for n in rest]
    together = set(_saved(model, {n: shells[n] for n in rest}))
    separable = sum(map(len, alone)) == len(together) and set().union(*alone) == together
    singles = [(n,) for n in rest] if separable else [tuple(rest)]
    return (*singles, *(tuple(group) for group in layers.values()))


def _saved(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under the names and in the layout of files: transformers' conversions undone."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, tensors) if tensors else {}


def plan_model(live: LiveTensors, options: Options, max_shard_size: int) -> ExportPlan:
    """The plan of an export from a live model."""
    rules, own = options.rules, live.quantizers.weights
    if own and rules.default is not None:
        raise UsageError(
            "the model has weight quantizers of its own, and a format is named", "Leave out the format"
        )
    if not own and not rules.formats:
        raise UsageError("no format is named, and the model has no quantizers of its own", "Pass format=")
    for name, quantizer in own.items():
        if not live.saved.get(name) or not all(key in live.infos for key in live.saved[name]):
            raise ArtifactError(
                f"tensor '{name}' has an enabled {kind_of(quantizer)} and is saved under another name",
                "Disable it, or export with a format",
            )
    config = json.loads(live.model.config.to_json_string(use_diff=True))
    config["architectures"] = [type(live.model).__name__]
    if options.remote_code != COPY:
        config = without_auto_map(config)
    return make_plan(
        live.quantizers.rules(rules, live.saved),
        live.infos,
        files_of(live.infos, max_shard_size),
        live.quantizers.roles(roles_in(live.model, live.infos, live.ties)),
        live.ties,
        config,
        untie=options.untie,
    )


def export_model(
    model: PreTrainedModel,
    out: Path,
    options: Options,
    *,
    max_shard_size: int = SHARD_BYTES,
    sidecars: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> Exported:
    """Export a live model; it is as before when this returns or raises.

    ``sidecars``: a directory to take tokenizer, chat template and the like from; by default the one that
    the model was loaded from. Raises `UsageError`, `ArtifactError` or `MissingError` and leaves no output.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"a {type(model).__name__} is no transformers model", "Give a PreTrainedModel or a directory"
        )
    _refuse_quantized(model)
    folder = _folder(model, sidecars)
    check_output(folder, out, options.overwrite)
    live = live_tensors(model)
    plan = plan_model(live, options, max_shard_size)
    where = resolve_device(options.device, plan)
    if options.calibrates:
        batches = token_batches(
            options.calibrate or (), folder, model.config, trust_remote_code=options.trust_remote_code
        )
        state = calibrate(model, plan, options, batches)
    else:
        state = QuantizerState(input_specs(plan) if options.activations else {})
    state = live.quantizers.added_to(state)
    copies = sidecars_in((folder,)) if folder else {}
    if options.remote_code == COPY and folder:
        copies |= code_files(folder, plan.config)
    texts = {}
    if (
        "generation_config.json" not in copies
        and model.can_generate()
        and model.generation_config is not None
    ):
        texts["generation_config.json"] = model.generation_config.to_json_string()
    source = {"model": type(model).__name__, "name": model.name_or_path}
    return write_export(
        plan,
        live.read(),
        SideFiles(source, copies, texts),
        out,
        state=state,
        device=where,
        overwrite=options.overwrite,
        emit_modelopt=options.emit_modelopt,
        on_progress=reporter(on_progress, WRITE, plan.nbytes),
    )


def _refuse_quantized(model: PreTrainedModel) -> None:
    method = getattr(model, "quantization_method", None)
    if getattr(model, "hf_quantizer", None) is not None or method:
        raise ArtifactError(
            f"this {type(model).__name__} is already quantized ({getattr(method, 'value', method)})",
            "Export the unquantized model",
        )


def _folder(model: PreTrainedModel, sidecars: str | Path | None) -> Path | None:
    if sidecars is not None:
        if not Path(sidecars).is_dir():
            raise UsageError(f"sidecars: there is no directory '{sidecars}'")
        return Path(sidecars)
    name = model.name_or_path
    return Path(name) if name and Path(name).is_dir() else None
