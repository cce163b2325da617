"""Plan a finalize before any tensor is read: what each tensor becomes, under which names, in which shards."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact, FlatTensor, TensorInfo
from loadstone.artifact.compressed_tensors.merging import merged_sets
from loadstone.artifact.detect import DENSE, QAT_KEY
from loadstone.artifact.formats.safetensors import DTYPE_BITS, FLOAT_DTYPES
from loadstone.artifact.packed import Packed
from loadstone.artifact.servers import Runs
from loadstone.artifact.torchao.flatten import SAFETENSORS_DTYPES
from loadstone.artifact.torchao.tensors import part_name
from loadstone.errors import ArtifactError
from loadstone.finalization.division import ExpertRows, ExpertsApart, separated
from loadstone.quantization import MixedRecipe, Recipe, Scheme
from loadstone.writing.index import SHARD_BYTES, in_shards, shard_name, weights_name

if TYPE_CHECKING:
    from loadstone.finalization.encoders import Encoder, Encoding
    from loadstone.loading.meta import Destination, ModelMap
    from loadstone.quantization.model_facts import ModelFacts
    from loadstone.quantization.rules import Decision

COPY, CAST, DECODE, QUANTIZE = "copy", "cast", "decode", "quantize"


@dataclass(frozen=True)
class Step:
    """One parameter of the output, made of one source tensor, or of several that are its rows (fused experts).

    ``outputs``: the stored tensors, with sizes and no offsets yet. ``encoding``: how the weight is quantized; None for
    a tensor that is copied or cast. ``ready``: a safetensors file that holds the outputs already, made by calibration.
    ``merged_with``: other source tensors whose largest value counts for the scale of the whole tensor. ``parameter``:
    the model's parameter that it is, or is a part of from ``first_row`` on, where weights are stored under the
    checkpoint's names. ``packed``: the quantized weights that the sources are decoded from. ``infinite``: a buffer
    that the model makes infinite itself.
    """

    sources: tuple[TensorInfo, ...]
    name: str
    outputs: tuple[TensorInfo, ...]
    encoding: Encoding | None = None
    reason: str = ""
    ready: str = ""
    merged_with: tuple[TensorInfo, ...] = ()
    parameter: str = ""
    first_row: int = 0
    packed: tuple[Packed | FlatTensor, ...] = ()
    infinite: bool = False

    @property
    def action(self) -> str:
        if self.encoding:
            return QUANTIZE
        if self.packed:
            return DECODE
        return COPY if self.outputs[0].dtype == self.source.dtype else CAST

    @property
    def scheme(self) -> Scheme | None:
        return self.encoding.scheme if self.encoding else None

    @property
    def source(self) -> TensorInfo:
        """The source tensor, the first of several."""
        return self.sources[0]

    @property
    def source_bytes(self) -> int:
        first = self.sources[0]
        return first.end - first.begin if len(self.sources) == 1 else _total(self.sources)

    @property
    def stored_bytes(self) -> int:
        """`source_bytes` as they are stored: fewer where the sources are decoded."""
        if not self.packed:
            return self.source_bytes
        # A source may be a part of a weight, or be put together from several.
        stored = sum(weight.nbytes for weight in self.packed)
        values = sum(weight.numel for weight in self.packed)
        return stored * sum(info.numel for info in self.sources) // values

    @property
    def nbytes(self) -> int:
        first = self.outputs[0]
        return first.end - first.begin if len(self.outputs) == 1 else _total(self.outputs)


@dataclass(frozen=True)
class FinalizePlan:
    """A finalize as data. ``shards``: the steps of each output file; ``config``: the config.json to write; ``header``:
    metadata for the header of every output file; ``kind``: of the artifact; ``indexed``: a single file has an index
    too; ``runs``: where the artifact will run; ``calibration``: what a calibrated plan was calibrated on, as a digest.
    """

    source: Artifact
    recipe: Recipe | MixedRecipe | None
    dtype: str
    shards: tuple[tuple[Step, ...], ...]
    config: dict[str, Any] = field(repr=False)
    header: dict[str, str] = field(default_factory=lambda: {"format": "pt"}, repr=False)
    kind: str = DENSE
    indexed: bool = False
    runs: tuple[Runs, ...] = ()
    calibration: str = ""

    @cached_property
    def steps(self) -> list[Step]:
        return [step for shard in self.shards for step in shard]

    @cached_property
    def bytes_before(self) -> int:
        """Bytes of the source tensors as they are stored; of a tensor that several steps read, once."""
        plain = {info.name: info for step in self.steps for info in step.sources if not step.packed}
        packed = {weight.name: weight for step in self.steps for weight in step.packed}
        return _total(plain.values()) + sum(weight.nbytes for weight in packed.values())

    @cached_property
    def bytes_after(self) -> int:
        return sum(step.nbytes for step in self.steps)

    @property
    def unquantized(self) -> dict[str, int]:
        """Why matrices stay as they are, with their number, the most frequent first; empty without a recipe."""
        reasons = Counter(
            s.reason for s in self.steps if not s.encoding and s.reason and len(s.source.shape) > 1
        )
        return dict(reasons.most_common())

    def file_name(self, shard: int) -> str:
        """transformers' name of an output file."""
        name = shard_name if self.indexed else weights_name
        return name(shard, len(self.shards))


def make_plan(
    artifact: Artifact,
    recipe: Recipe | MixedRecipe | None,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    skip: list[str] | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    trust_remote_code: bool = False,
    encoder: Encoder | None = None,
) -> FinalizePlan:
    """Plan a finalize from headers and the model on the meta device.

    ``dtype``: floating dtype that plain tensors (and weights before quantization) are cast to, ``auto`` keeps the
    stored one. ``skip``: module name patterns left unquantized. ``encoder``: the format of quantized weights, torchao's
    when None. Raises `ArtifactError` when the source does not match its config, `UsageError` for a recipe that does not
    fit the model.
    """
    from loadstone.finalization.encoders.torchao import TorchaoEncoder
    from loadstone.loading.complete import old_masks
    from loadstone.loading.experts import learned_place
    from loadstone.loading.infinite import infinite_buffers
    from loadstone.loading.merged_experts import merged_experts
    from loadstone.loading.meta import model_map
    from loadstone.quantization.rules import instead

    found = stored_tensors(artifact)
    mapped = model_map(artifact, found, trust_remote_code)
    encoder = encoder or TorchaoEncoder(device)
    learned = (learned_place(key, place.pattern) for key, place in mapped.places.items() if place)
    if (recipe is None or not encoder.keeps_names) and any(at is not None for at in learned):
        artifact = merged_experts(artifact, trust_remote_code)
        found = stored_tensors(artifact)
        mapped = model_map(artifact, found, trust_remote_code)
    model, where = mapped.facts, mapped.places
    masks = old_masks(found, [key for key, place in where.items() if place is None])
    sources = source_tensors(artifact, {key: found[key] for key in found if key not in masks}, model)
    decisions = encoder.decide(model, recipe, skip) if recipe else {}
    if not encoder.keeps_names:
        decisions = _left_plain(mapped, decisions, sources, dtype, artifact.config)
    present = {place.parameter for key in sources if (place := where[key])}
    pairs = _untied(model, decisions, present)
    untied = {target: source for target, source in pairs.items() if target not in present}
    fused = _fused(model, sources, where)
    steps: list[Step] = []
    apart: dict[str, ExpertRows] = {}
    for key, info in sources.items():
        place = where[key]
        stored = SAFETENSORS_DTYPES[dtype] if dtype != "auto" and info.dtype in FLOAT_DTYPES else info.dtype
        decision = decisions.get(place.parameter) if place else None
        if encoder.keeps_names and decision and decision.scheme and place:
            separate = separated(info, artifact, place, mapped)
            for matrix in separate:
                step = _quantize_step((matrix.info,), matrix.info.name, stored, decision, encoder)
                steps.append(replace(step, parameter=place.parameter, first_row=matrix.first_row))
            apart |= {matrix.info.name: matrix.rows for matrix in separate if matrix.rows}
            if separate:
                steps += _untied_steps(info, place.parameter, stored, decisions, untied, encoder)
                continue
        elif recipe and decision and decision.scheme and place and not place.converted:
            steps.append(_quantize_step((info,), place.parameter, stored, decision, encoder))
            steps += _untied_steps(info, place.parameter, stored, decisions, untied, encoder)
            continue
        elif recipe and decision and decision.scheme and place and place.parameter in fused:
            together = fused[place.parameter]
            if info is together[0]:
                shape = model.shapes[place.parameter]
                steps.append(_quantize_step(together, place.parameter, stored, decision, encoder, shape))
            continue
        reason = decision.reason if decision else ("" if recipe is None else "not a matrix weight")
        if decision and decision.scheme:
            reason = (
                "experts in one tensor that is converted on load"
                if encoder.keeps_names
                else "merged with others on load: torchao's tensors cannot be merged"
            )
        output = TensorInfo(info.name, stored, info.shape, info.file, 0, _nbytes(info, stored))
        steps.append(Step((info,), key, (output,), reason=reason))
        if place is not None and untied:
            steps += _untied_steps(info, place.parameter, stored, decisions, untied, encoder)
    if artifact.decoded:
        steps = [_decoding(step, artifact.source) for step in steps]
    if recipe and not any(step.action == QUANTIZE for step in steps):
        raise ArtifactError(
            f"'{artifact.path}': {model.model} has no weight that {recipe} can quantize{_most_common_reason(steps)}",
            instead(_most_common_reason(steps), decisions),
        )
    infinite = infinite_buffers(artifact, trust_remote_code)
    steps = [replace(step, infinite=True) if step.source.name in infinite else step for step in steps]
    config = _config(artifact, dtype)
    if apart:
        source: Any = ExpertsApart(artifact.source, apart)
        artifact = replace(artifact, source=source)
    if recipe:
        steps = _sharing_scales(steps if encoder.keeps_names else _dotted(steps, mapped))
        stored_as = {step.name: step.encoding or step.outputs[0] for step in steps}
        config |= encoder.config(recipe, skip, decisions, stored_as)
    if pairs:
        for part in (config, config.get("text_config")):
            if isinstance(part, dict):
                part["tie_word_embeddings"] = False
    plan = FinalizePlan(artifact, recipe, dtype, in_shards(steps, max_shard_bytes), config)
    if recipe is None:
        return plan
    header = encoder.header({step.name: step.encoding for step in steps})
    return replace(plan, header=header, kind=encoder.kind, runs=encoder.runs(stored_as, config))


def _decoding(step: Step, reader: Any) -> Step:
    """The step with the quantized weights that its sources are decoded from, if they are. ``reader``: a
    `DecodedSource`, or one whose experts are put together."""
    found = [reader.weights_of(info) for info in step.sources]
    if not all(found):
        return step
    packed = tuple(weight for weights in found for weight in weights)
    kinds = " and ".join(dict.fromkeys(reader.kind_of(weight) for weight in packed))
    return replace(
        step, packed=packed, reason=f"{step.reason}, from {kinds}" if step.reason else f"from {kinds}"
    )


def _most_common_reason(steps: list[Step]) -> str:
    """Why most matrices stay as they are, for a message; empty when no step says why."""
    reasons = Counter(step.reason for step in steps if step.reason and len(step.source.shape) > 1)
    return f" ({reasons.most_common(1)[0][0]})" if reasons else ""


def stored_tensors(artifact: Artifact) -> dict[str, TensorInfo]:
    """Every tensor in the source's files by name, in name order."""
    return dict(sorted(artifact.tensors.items()))


def source_tensors(
    artifact: Artifact, stored: dict[str, TensorInfo], model: ModelFacts
) -> dict[str, TensorInfo]:
    """Those of the ``stored`` tensors that are finalized.

    A state dict in ``.bin`` holds both names of a tied tensor; safetensors holds one, as transformers writes it. A
    tensor under a tied name that has other values is a tensor of its own, which a load does not tie.
    """
    if not artifact.source.repeats_ties:
        return stored
    pairs = {target: source for target, source in model.tied.items() if source in stored and target in stored}
    twice = {target for target, source in pairs.items() if _equal(artifact, stored[target], stored[source])}
    return {name: info for name, info in stored.items() if name not in twice}


def _equal(artifact: Artifact, one: TensorInfo, other: TensorInfo) -> bool:
    if any({one.name, other.name} <= set(names) for names in artifact.source.shared):
        return True
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    import torch

    return torch.equal(artifact.source.read(one), artifact.source.read(other))


def _untied(model: ModelFacts, decisions: dict[str, Decision], stored: set[str]) -> dict[str, str]:
    """Tied parameters that are stored apart, since one of them is quantized: source by target; else empty."""
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
    encoder: Encoder,
) -> list[Step]:
    """Steps for the parameters that were tied to this one: each gets a copy, quantized by its own decision."""
    steps = []
    for target in (t for t, source in untied.items() if source == parameter):
        decision = decisions.get(target)
        if decision and decision.scheme:
            steps.append(_quantize_step((info,), target, stored, decision, encoder))
        else:
            output = info._replace(name=target, dtype=stored, begin=0, end=_nbytes(info, stored))
            steps.append(Step((info,), target, (output,), reason=f"no longer tied to {parameter}"))
    return steps


def _fused(
    model: ModelFacts, sources: dict[str, TensorInfo], where: dict[str, Destination | None]
) -> dict[str, tuple[TensorInfo, ...]]:
    """For each parameter whose source tensors are its rows, one after the other: these tensors in that order."""
    parts: dict[str, list[tuple[tuple[int, int], TensorInfo]]] = {}
    for key, info in sources.items():
        place = where[key]
        if place is not None and place.place is not None:
            parts.setdefault(place.parameter, []).append((place.place, info))
    found = {}
    for name, members in parts.items():
        rows = tuple(info for _, info in sorted(members, key=lambda member: member[0]))
        shape = model.shapes.get(name, (0,))
        same = len({(info.shape[-1], info.dtype, len(info.shape)) for info in rows}) == 1
        if same and sum(info.numel for info in rows) == prod(shape) and rows[0].shape[-1] == shape[-1]:
            found[name] = rows
    return found


def _quantize_step(
    sources: tuple[TensorInfo, ...],
    parameter: str,
    stored: str,
    decision: Decision,
    encoder: Encoder,
    shape: tuple[int, ...] | None = None,
) -> Step:
    """``shape``: of the parameter, where it is not that of the one source tensor."""
    assert decision.scheme is not None
    encoding = encoder.encoding(parameter, decision.scheme, shape or sources[0].shape, stored)
    return Step(sources, parameter, encoding.outputs, encoding, decision.reason)


def _left_plain(
    mapped: ModelMap,
    decisions: dict[str, Decision],
    sources: dict[str, TensorInfo],
    dtype: str,
    config: dict[str, Any],
) -> dict[str, Decision]:
    """The decisions with those taken back that torchao's tensors cannot carry through a load: weights whose parts would
    be renamed, and weights of another dtype than most (a router in float32)."""
    chosen = [name for name, decision in decisions.items() if decision.scheme]
    loaded = mapped.loaded_names([part_name(name, "qdata") for name in chosen])
    reasons = {
        name: "renamed on load, where the parts of torchao's tensors would not be found"
        for name in chosen
        if loaded[part_name(name, "qdata")] != part_name(name, "qdata")
    }
    if dtype == "auto":
        kept = set(chosen) - reasons.keys()
        parts = {
            key: place.parameter
            for key, place in mapped.places.items()
            if place and key in sources and place.parameter in kept
        }
        usual = _usual_dtype(parts.keys(), sources, config)
        for key, name in parts.items():
            if (found := sources[key].dtype) != usual:
                why = (
                    "which torchao's tensors do not take"
                    if found == "F64"
                    else "unlike the rest of the model"
                )
                reasons[name] = f"stored in {found}{f' beside {usual}' if usual else f', {why} (--dtype)'}"
    return decisions | {n: replace(decisions[n], scheme=None, reason=reason) for n, reason in reasons.items()}


def _usual_dtype(chosen: Collection[str], sources: dict[str, TensorInfo], config: dict[str, Any]) -> str:
    """The dtype of most of the ``chosen`` bytes that is that of other tensors or of the config too; empty for none."""
    sizes: Counter[str] = Counter()
    for key in chosen:
        sizes[sources[key].dtype] += sources[key].nbytes
    declared = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    for dtype, _ in sizes.most_common():
        # Weights of another dtype stay plain.
        plain = {info.dtype for key, info in sources.items() if key not in chosen or info.dtype != dtype}
        if dtype != "F64" and dtype in plain | {SAFETENSORS_DTYPES.get(declared)}:
            return dtype
    return ""


def _dotted(steps: list[Step], mapped: ModelMap) -> list[Step]:
    """The steps with a dot in each name: torchao's reader in transformers divides every name of a file at its last dot.

    A name without one takes the base model's prefix, which a load removes again. Raises `ArtifactError` where it would
    not.
    """
    dotless = [step.name for step in steps if "." not in step.name and step.encoding is None]
    longer: dict[str, str] = {}
    for name in dotless:
        place = mapped.places.get(name)
        parameter = place.parameter if place else name
        names = [new for new in (parameter, f"{mapped.prefix}.{name}") if "." in new.strip(".")]
        loaded = mapped.loaded_names(names)
        found = next((new for new in names if loaded[new] == parameter), None)
        if found is None:
            raise ArtifactError(
                f"tensor '{name}' has no dot in its name, and torchao's reader in transformers refuses a quantized "
                "artifact with such a name",
                "Use --layout compressed-tensors, or finalize it without --quantize",
            )
        longer[name] = found
    return [
        replace(step, name=longer[step.name], outputs=(step.outputs[0]._replace(name=longer[step.name]),))
        if step.name in longer
        else step
        for step in steps
    ]


def _sharing_scales(steps: list[Step]) -> list[Step]:
    """The steps, where layers that servers merge need one scale of the whole tensor, each with the others' sources."""
    sharing = {
        step.name.removesuffix(".weight"): step
        for step in steps
        if step.encoding and step.encoding.shares_scale
    }
    merged: dict[str, tuple[TensorInfo, ...]] = {}
    for members in merged_sets(sharing):
        for module in members:
            others = tuple(sharing[other].source for other in members if other != module)
            merged[f"{module}.weight"] = others
    return [replace(step, merged_with=merged.get(step.name, ())) for step in steps] if merged else steps


def _config(artifact: Artifact, dtype: str) -> dict[str, Any]:
    """The source's config with the dtype of the output, and without what holds for the source alone."""
    config = json.loads(json.dumps(artifact.config))
    config.pop(QAT_KEY, None)
    # Names the source's weight file; ours have transformers' own names.
    config.pop("transformers_weights", None)
    if dtype != "auto":
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    return config


def weight_dtype(artifact: Artifact, dtype: str, *, trust_remote_code: bool = False) -> str:
    """The floating dtype (``bfloat16``) of weights before they are quantized: ``dtype`` if it is not auto, else that of
    the config, else that of most stored bytes."""
    if dtype != "auto":
        return dtype
    from loadstone.loading.model_class import load_config, stored_dtype

    return str(stored_dtype(artifact, load_config(artifact, trust_remote_code))).removeprefix("torch.")


def _total(tensors: Iterable[TensorInfo]) -> int:
    return sum([t.end - t.begin for t in tensors])


def _nbytes(info: TensorInfo, dtype: str) -> int:
    return info.numel * DTYPE_BITS[dtype] // 8 if dtype != info.dtype else info.nbytes
