"""What a finalize will do, decided before any tensor is read: each tensor's step, names, sizes and shards."""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact, FlatTensor, TensorInfo
from loadstone.artifact.detect import OTHER_QUANTIZER, QAT_KEY
from loadstone.artifact.formats.safetensors import DTYPE_BITS, FLOAT_DTYPES
from loadstone.artifact.torchao.tensors import part_name
from loadstone.errors import ArtifactError
from loadstone.quantization import MixedRecipe, Recipe, Scheme
from loadstone.quantization.flatten import SAFETENSORS_DTYPES

if TYPE_CHECKING:
    from loadstone.loading.meta import Destination
    from loadstone.quantization.model_facts import ModelFacts
    from loadstone.quantization.rules import Decision

COPY, CAST, QUANTIZE = "copy", "cast", "quantize"


@dataclass(frozen=True)
class Step:
    """What is made of one source tensor, or of several whose rows follow each other in one weight (fused experts).

    ``outputs`` are the stored tensors, with sizes and no offsets yet.
    """

    sources: tuple[TensorInfo, ...]
    action: str
    name: str
    outputs: tuple[TensorInfo, ...]
    scheme: Scheme | None = None
    reason: str = ""
    metadata: str = '{"_type": "Tensor"}'
    # A safetensors file that holds the outputs already, where calibration made them.
    ready: str = ""

    @property
    def source(self) -> TensorInfo:
        """The source tensor, the first of several."""
        return self.sources[0]

    @property
    def source_bytes(self) -> int:
        first = self.sources[0]
        return first.end - first.begin if len(self.sources) == 1 else _total(self.sources)

    @property
    def nbytes(self) -> int:
        first = self.outputs[0]
        return first.end - first.begin if len(self.outputs) == 1 else _total(self.outputs)


@dataclass(frozen=True)
class FinalizePlan:
    """A finalize as data. ``shards`` holds the steps of each output file, ``config`` the config.json to write."""

    source: Artifact
    recipe: Recipe | MixedRecipe | None
    dtype: str
    shards: tuple[tuple[Step, ...], ...]
    config: dict[str, Any] = field(repr=False)
    dropped: tuple[str, ...] = ()

    @cached_property
    def steps(self) -> list[Step]:
        return [step for shard in self.shards for step in shard]

    @cached_property
    def bytes_before(self) -> int:
        """Bytes of the source tensors; of a tensor that several steps read, once."""
        return _total({info.name: info for step in self.steps for info in step.sources}.values())

    @cached_property
    def bytes_after(self) -> int:
        return sum(step.nbytes for step in self.steps)

    def file_name(self, shard: int) -> str:
        """transformers' name of an output file."""
        count = len(self.shards)
        return "model.safetensors" if count == 1 else f"model-{shard + 1:05d}-of-{count:05d}.safetensors"


def make_plan(
    artifact: Artifact,
    recipe: Recipe | MixedRecipe | None,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    skip: list[str] | None = None,
    max_shard_bytes: int = 5 * 10**9,
    trust_remote_code: bool = False,
) -> FinalizePlan:
    """Plan a finalize from headers and the model on the meta device.

    ``dtype``: floating type that plain tensors (and weights before quantization) are cast to, ``auto`` keeps the
    stored one. ``skip``: module name patterns left unquantized. A checkpoint that records its QAT recipe takes that
    one. Raises `ArtifactError` when the source is quantized already or does not match its config, `UsageError` for a
    recipe that the model or its record contradicts.
    """
    from loadstone.loading.meta import model_map
    from loadstone.quantization.qat import recorded_recipe
    from loadstone.quantization.rules import decide

    refuse_quantized(artifact)
    recipe = recorded_recipe(artifact, recipe)
    found = stored_tensors(artifact)
    mapped = model_map(artifact, list(found), trust_remote_code)
    model, where = mapped.facts, mapped.places
    sources = source_tensors(artifact, found, model)
    decisions = decide(model, recipe, skip) if recipe else {}
    present = {place.parameter for key in sources if (place := where[key])}
    untied = _untied(model, decisions, present)
    fused = _fused(model, sources, where)
    templates = _Templates(device)
    steps: list[Step] = []
    for key, info in sources.items():
        place = where[key]
        if place is not None and place.parameter in untied:
            continue
        if place is None and not _matches(key, model.ignored):
            raise ArtifactError(
                f"{info.file}: tensor '{key}' belongs to no part of {model.model}",
                "Check that config.json is of these weights",
            )
        stored = SAFETENSORS_DTYPES[dtype] if dtype != "auto" and info.dtype in FLOAT_DTYPES else info.dtype
        decision = decisions.get(place.parameter) if place else None
        if recipe and decision and decision.scheme and place and not place.converted:
            steps.append(_quantize_step((info,), place.parameter, stored, decision, templates))
            steps += _untied_steps(info, place.parameter, stored, decisions, untied, templates)
            continue
        if recipe and decision and decision.scheme and place and place.parameter in fused:
            together = fused[place.parameter]
            if info is together[0]:
                shape = next(w.shape for w in model.weights if w.name == place.parameter)
                steps.append(_quantize_step(together, place.parameter, stored, decision, templates, shape))
            continue
        reason = decision.reason if decision else ("" if recipe is None else "not a matrix weight")
        if decision and decision.scheme:
            reason = "merged with others on load: torchao's tensors cannot be merged"
        action = COPY if stored == info.dtype else CAST
        output = TensorInfo(info.name, stored, info.shape, info.file, 0, _nbytes(info, stored))
        steps.append(Step((info,), action, key, (output,), reason=reason))
        if place is not None and untied:
            steps += _untied_steps(info, place.parameter, stored, decisions, untied, templates)
    if recipe and not any(step.action == QUANTIZE for step in steps):
        raise ArtifactError(
            f"'{artifact.path}': {model.model} has no weight that {recipe} can quantize",
            "Finalize it without --quantize",
        )
    config = _config(artifact, recipe, dtype, skip, decisions)
    if untied:
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False
    return FinalizePlan(artifact, recipe, dtype, _shards(steps, max_shard_bytes), config)


def refuse_quantized(artifact: Artifact) -> None:
    """Raise `ArtifactError` when the source is quantized already."""
    if artifact.is_torchao or artifact.kind == OTHER_QUANTIZER:
        raise ArtifactError(
            f"'{artifact.root}' is already quantized ({artifact.evidence[-1]})",
            "Finalize the unquantized checkpoint it was made from",
        )


def stored_tensors(artifact: Artifact) -> dict[str, TensorInfo]:
    """Every tensor in the source's files by name, in name order."""
    if artifact.table is not None:
        return dict(sorted(artifact.table.tensors.items()))
    from loadstone.artifact.formats.bin import read_bin

    found: dict[str, TensorInfo] = {}
    for file in artifact.weights.files:
        found.update(read_bin(artifact.path / file).tensors)
    return dict(sorted(found.items()))


def source_tensors(
    artifact: Artifact, stored: dict[str, TensorInfo], model: ModelFacts
) -> dict[str, TensorInfo]:
    """Those of the ``stored`` tensors that are finalized.

    A state dict in ``.bin`` holds both names of a tied tensor; safetensors holds one, as transformers writes it.
    """
    if artifact.table is not None:
        return stored
    twice = {target for target, source in model.tied.items() if source in stored}
    return {name: info for name, info in stored.items() if name not in twice}


def _untied(model: ModelFacts, decisions: dict[str, Decision], stored: set[str]) -> dict[str, str]:
    """Tied parameters that must be stored apart, since one of them is quantized: source by target; else empty."""
    pairs = model.tied
    if not any(name in decisions and decisions[name].scheme for pair in pairs.items() for name in pair):
        return {}
    for target, source in pairs.items():
        if source not in stored:
            raise ArtifactError(
                f"'{target}' is tied to '{source}', which the checkpoint does not hold: it cannot be quantized apart",
                "Leave embeddings and lm_head unquantized, or save the model again with transformers",
            )
    return pairs


def _untied_steps(
    info: TensorInfo,
    parameter: str,
    stored: str,
    decisions: dict[str, Decision],
    untied: dict[str, str],
    templates: _Templates,
) -> list[Step]:
    """What else is made of a tensor that was tied to others: their own copies, each by its own decision."""
    steps = []
    for target in (t for t, source in untied.items() if source == parameter):
        decision = decisions.get(target)
        if decision and decision.scheme:
            steps.append(_quantize_step((info,), target, stored, decision, templates))
        else:
            output = info._replace(name=target, dtype=stored, begin=0, end=_nbytes(info, stored))
            action = COPY if stored == info.dtype else CAST
            steps.append(Step((info,), action, target, (output,), reason=f"no longer tied to {parameter}"))
    return steps


def _fused(
    model: ModelFacts, sources: dict[str, TensorInfo], where: dict[str, Destination | None]
) -> dict[str, tuple[TensorInfo, ...]]:
    """For each parameter that is its source tensors' rows in a row: these, in that order."""
    parts: dict[str, list[tuple[tuple[int, int], TensorInfo]]] = {}
    for key, info in sources.items():
        place = where[key]
        if place is not None and place.place is not None:
            parts.setdefault(place.parameter, []).append((place.place, info))
    shapes = {weight.name: weight.shape for weight in model.weights}
    found = {}
    for name, members in parts.items():
        rows = tuple(info for _, info in sorted(members, key=lambda member: member[0]))
        shape = shapes.get(name, (0,))
        same = len({(info.shape[-1], info.dtype, len(info.shape)) for info in rows}) == 1
        if same and sum(info.numel for info in rows) == prod(shape) and rows[0].shape[-1] == shape[-1]:
            found[name] = rows
    return found


class _Templates:
    """What quantizing stores, asked of torchao once for each scheme, shape and dtype."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._known: dict[tuple[Scheme, tuple[int, ...], str], FlatTensor] = {}

    def of(self, scheme: Scheme, shape: tuple[int, ...], dtype: str) -> FlatTensor:
        from loadstone.quantization.quantize import template

        key = (scheme, shape, dtype)
        if key not in self._known:
            self._known[key] = template(*key, self._device)
        return self._known[key]


def _quantize_step(
    sources: tuple[TensorInfo, ...],
    parameter: str,
    stored: str,
    decision: Decision,
    templates: _Templates,
    shape: tuple[int, ...] | None = None,
) -> Step:
    """``shape``: of the parameter, where it is not that of the one source tensor."""
    assert decision.scheme is not None
    flat = templates.of(decision.scheme, shape or sources[0].shape, stored)
    outputs = tuple(part._replace(name=part_name(parameter, n)) for n, part in flat.parts.items())
    return Step(sources, QUANTIZE, parameter, outputs, decision.scheme, decision.reason, flat.metadata)


def _config(
    artifact: Artifact,
    recipe: Recipe | MixedRecipe | None,
    dtype: str,
    skip: list[str] | None,
    decisions: dict[str, Decision],
) -> dict[str, Any]:
    """config.json to write: the source's, its dtype, and the block that every transformers load looks for."""
    config = json.loads(json.dumps(artifact.config))
    config.pop(QAT_KEY, None)
    # Names the source's weight file; ours have transformers' own names.
    config.pop("transformers_weights", None)
    if dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    if recipe is not None:
        config["quantization_config"] = quantization_block(recipe, skip, decisions)
    return config


def quantization_block(
    recipe: Recipe | MixedRecipe, skip: list[str] | None, decisions: dict[str, Decision]
) -> dict[str, Any]:
    """The ``quantization_config`` that transformers itself would write for this recipe.

    One scheme for all is torchao's own config of that scheme; several, and fused experts, are its `FqnToConfig`, which
    names every module (experts: parameter).
    """
    from loadstone.quantization.rules import KEPT

    modules = {
        name.removesuffix(".weight"): d
        for name, d in decisions.items()
        if d.linear or d.table or (d.fused and d.scheme)
    }
    left = sorted(name for name, d in modules.items() if d.linear and d.scheme is None)
    schemes = list(dict.fromkeys(d.scheme for d in modules.values() if d.scheme))
    tables = any(d.table and d.scheme for d in modules.values())
    fused = any(d.fused for d in modules.values())
    if len(schemes) == 1 and not tables and not fused:
        # By default transformers leaves out just the output head. Where more is left out, all of it must be named.
        named = left if skip or any(modules[name].reason != KEPT for name in left) else None
        return _block(schemes[0], named)
    mixed = recipe if isinstance(recipe, MixedRecipe) else MixedRecipe(recipe)
    chosen = {name: d.scheme for name, d in modules.items() if d.linear or d.scheme}
    chosen["_default"] = mixed.default.scheme if mixed.default else None
    return _block_by_module(chosen, left, tables)


def _block(scheme: Scheme, named: list[str] | None) -> dict[str, Any]:
    from transformers import TorchAoConfig

    from loadstone.quantization import to_torchao

    block = TorchAoConfig(to_torchao(scheme), modules_to_not_convert=named).to_dict()
    return dict(json.loads(json.dumps(block)))


def _block_by_module(chosen: dict[str, Scheme | None], left: list[str], tables: bool) -> dict[str, Any]:
    from torchao.quantization import FqnToConfig
    from transformers import TorchAoConfig

    from loadstone.quantization import to_torchao

    table: OrderedDict[str, Any] = OrderedDict(
        (name, to_torchao(scheme) if scheme else None) for name, scheme in chosen.items()
    )
    with warnings.catch_warnings():
        # Readers fall back on `_default` for modules that they name otherwise: deprecated, and still what they know.
        warnings.simplefilter("ignore")
        config = TorchAoConfig(
            FqnToConfig(table), modules_to_not_convert=left, include_input_output_embeddings=tables
        )
        return dict(json.loads(json.dumps(config.to_dict())))


def _shards(steps: list[Step], max_bytes: int) -> tuple[tuple[Step, ...], ...]:
    """Greedy in name order: a shard closes when the next tensor would overfill it."""
    shards: list[list[Step]] = [[]]
    size = 0
    for step in steps:
        nbytes = step.nbytes
        if shards[-1] and size + nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(step)
        size += nbytes
    return tuple(tuple(shard) for shard in shards)


def weight_dtype(artifact: Artifact, dtype: str, *, trust_remote_code: bool = False) -> str:
    """The floating dtype (``bfloat16``) that weights have when they are quantized: as asked, else as the config says,
    else as most bytes are stored."""
    if dtype != "auto":
        return dtype
    from loadstone.loading.native import load_config, stored_dtype

    return str(stored_dtype(artifact, load_config(artifact, trust_remote_code))).removeprefix("torch.")


def _total(tensors: Iterable[TensorInfo]) -> int:
    return sum([t.end - t.begin for t in tensors])


def _nbytes(info: TensorInfo, dtype: str) -> int:
    return info.numel * DTYPE_BITS[dtype] // 8 if dtype != info.dtype else info.nbytes


def _matches(key: str, patterns: Any) -> bool:
    import re

    return any(re.search(pattern, key) for pattern in patterns)
