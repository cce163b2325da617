"""Where the changes of an adapter belong in its base: names, ties, vocabulary and task head by transformers' rules."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact, TensorInfo
from loadstone.artifact.adapter import OTHER_BASE, Adapter, Change, check_change
from loadstone.artifact.formats.safetensors import DTYPE_BITS
from loadstone.errors import ArtifactError
from loadstone.loading.complete import Destination, check_stored
from loadstone.loading.meta import destinations, meta_model
from loadstone.loading.model_class import has_own_class, remote_code_refused, stored_dtype, untied

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Fit:
    """An adapter beside the model of its base: the base's key of each parameter, the parameter of each change."""

    model: PreTrainedModel
    where: dict[str, Destination | None]
    stored: dict[str, str]
    asked: dict[str, Destination | None]
    unknown: tuple[str, ...]

    def parameter(self, name: str) -> str:
        """The parameter that a change is of; its own name where the base stores a parameter in several parts."""
        place = self.asked[name]
        return place.parameter if place is not None and not place.converted else name


def placed(artifact: Artifact, trust_remote_code: bool = False) -> Artifact:
    """An adapter's artifact with each change at the tensor it belongs to; any other artifact as it is.

    The names of an adapter are those of the model in memory; the base's files may have older ones. Weights that were
    tied and trained apart are stored apart; a larger vocabulary and a task's head go into the config. Raises
    `ArtifactError` where the adapter does not fit the base.
    """
    source: Any = artifact.source
    if artifact.adapter is None or source.placed:
        return artifact
    if artifact.needs_remote_code and not trust_remote_code and not has_own_class(artifact):
        raise remote_code_refused(artifact)
    fit = _fit(artifact, trust_remote_code)
    dropped: set[str] = set()
    if fit.unknown:
        artifact, new = _with_task_head(artifact, fit, trust_remote_code)
        dropped = {key for key, place in fit.where.items() if place and not new.where[key]}
        fit = new
    if (changes := _vocabulary(artifact.adapter, fit)) is not None:
        artifact = _configured(artifact, changes)
        fit = _fit(artifact, trust_remote_code)
    adapter = artifact.adapter
    assert adapter is not None
    by_parameter = {fit.parameter(name): (name, change) for name, change in adapter.changes.items()}
    apart = _separate_ties(adapter, fit, by_parameter)
    if apart:
        artifact = _configured(artifact, untied(artifact.config))
        still = [
            name for name in apart if name in _fit(artifact, trust_remote_code).model.all_tied_weights_keys
        ]
        if still:
            raise ArtifactError(
                f"the adapter changes '{still[0]}' and what it is tied to in different ways, which "
                f"{type(fit.model).__name__} cannot store",
                "Use it with peft, unmerged",
            )
        log.warning("%s was tied and is trained apart: it is stored as a tensor of its own", apart[0])
    merged = _merged(artifact, fit, by_parameter, apart, dropped)
    _check_whole(merged, trust_remote_code)
    return merged


def _fit(artifact: Artifact, trust_remote_code: bool) -> _Fit:
    source: Any = artifact.source
    base, names = source.base.tensors, source.adapter.changes
    model = meta_model(artifact, trust_remote_code)
    where, asked = destinations(model, list(base)), destinations(model, list(names))
    stored = {place.parameter: key for key, place in where.items() if place and not place.converted}
    unknown = [n for n, place in asked.items() if n not in base and (place is None or place.converted)]
    return _Fit(model, where, stored, asked, tuple(unknown))


def _configured(artifact: Artifact, changes: dict[str, Any]) -> Artifact:
    """The artifact with changes of its config, which a load applies to the base's config.json."""
    assert artifact.adapter is not None
    adapter = replace(artifact.adapter, config_changes=artifact.adapter.config_changes | changes)
    return replace(artifact, adapter=adapter, config=artifact.config | changes)


def _with_task_head(artifact: Artifact, fit: _Fit, trust_remote_code: bool) -> tuple[Artifact, _Fit]:
    """The artifact as the model class that the adapter was trained on, which has a head that the base lacks."""
    adapter = artifact.adapter
    assert adapter is not None
    name = fit.unknown[0]
    kind = _task_class(adapter, fit.model.config)
    heads = [adapter.changes[n].trained for n in fit.unknown]
    if kind is not None and kind is not type(fit.model) and all(heads):
        for labels in sorted({head.shape[0] for head in heads if head and head.shape}):
            names = {str(number): f"LABEL_{number}" for number in range(labels)}
            changes = {
                "architectures": [kind.__name__],
                "id2label": names,
                "label2id": {label: int(number) for number, label in names.items()},
            }
            tried = _configured(artifact, changes)
            found = _fit(tried, trust_remote_code)
            state = found.model.state_dict()
            if not found.unknown and all(
                head is not None and tuple(state[found.parameter(n)].shape) == head.shape
                for n, head in zip(fit.unknown, heads, strict=True)
            ):
                return tried, found
    raise ArtifactError(
        f"{adapter.changes[name].first.file}: '{adapter.changes[name].first.name}' changes no tensor of the base, "
        f"a {type(fit.model).__name__}",
        OTHER_BASE,
    )


def _task_class(adapter: Adapter, config: Any) -> Any:
    """The model class that an adapter says it was trained on: by its task, or by its name."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    mappings = {
        "SEQ_CLS": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        "TOKEN_CLS": auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
        "QUESTION_ANS": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
        "CAUSAL_LM": auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        "SEQ_2_SEQ_LM": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    }
    task, named = adapter.config.get("task_type"), adapter.config.get("auto_mapping")
    if isinstance(task, str) and task in mappings:
        return mappings[task].get(type(config), None)
    name = named.get("base_model_class") if isinstance(named, dict) else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    ours = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if ours and found.config_class is type(config) else None  # type: ignore[union-attr]


def _vocabulary(adapter: Adapter | None, fit: _Fit) -> dict[str, Any] | None:
    """The change of config for embeddings that were resized before training; None where they were not."""
    from loadstone.quantization.weight_use import input_embeddings, output_head

    assert adapter is not None
    state = fit.model.state_dict()
    tables = [m for m in (input_embeddings(fit.model), output_head(fit.model)) if m is not None]
    names = [
        n for n, module in fit.model.named_modules(remove_duplicate=False) if any(module is t for t in tables)
    ]
    rows = {
        change.trained.shape[0]
        for name, change in adapter.changes.items()
        if (parameter := fit.parameter(name)).rpartition(".")[0] in names
        and change.trained is not None
        and change.trained.shape[:1] != tuple(state[parameter].shape[:1])
    }
    if len(rows) != 1:
        return None
    size, config = rows.pop(), fit.model.config
    log.warning(
        "the adapter was trained with a vocabulary of %d tokens, the base has %d", size, _tokens(config)
    )
    text = config.get_text_config()
    inner = next((key for key in config.sub_configs if getattr(config, key, None) is text), None)
    if inner is None:
        return {"vocab_size": size}
    return {inner: text.to_dict() | {"vocab_size": size}}


def _tokens(config: Any) -> int:
    return int(config.get_text_config().vocab_size)


def _separate_ties(adapter: Adapter, fit: _Fit, by_parameter: dict[str, tuple[str, Change]]) -> list[str]:
    """The tied parameters that the adapter changes otherwise than what they are tied to, so that they part.

    What peft ties too is left to the one that is stored.
    """
    apart = []
    for target, source in fit.model.all_tied_weights_keys.items():
        one, other = by_parameter.get(target), by_parameter.get(source)
        if one is None and other is None:
            continue
        if adapter.config.get("ensure_weight_tying") or _tied_by_peft(adapter, one, other):
            if one is not None and other is None:
                by_parameter[source] = one
            by_parameter.pop(target, None)
        else:
            apart.append(target)
    return apart


def _tied_by_peft(
    adapter: Adapter, target: tuple[str, Change] | None, source: tuple[str, Change] | None
) -> bool:
    """Whether both ends of a tie are changed alike: trained rows are tied by peft, and saved tensors may be equal."""
    import torch

    changes = [pair[1] for pair in (target, source) if pair]
    if len(changes) == 1:
        return changes[0] == Change(rows=changes[0].rows)
    tensors = [change.trained for change in changes if change == Change(trained=change.trained)]
    if len(tensors) < 2 or tensors[0] is None or tensors[1] is None:
        return False
    return torch.equal(adapter.source.read(tensors[0]), adapter.source.read(tensors[1]))


def _merged(
    artifact: Artifact,
    fit: _Fit,
    by_parameter: dict[str, tuple[str, Change]],
    apart: list[str],
    dropped: set[str],
) -> Artifact:
    """The artifact whose source merges each change into its tensor. ``apart``: tied parameters that get their own."""
    source: Any = artifact.source
    base: dict[str, TensorInfo] = source.base.tensors
    tied = fit.model.all_tied_weights_keys
    alone = Change()
    wanted = dict(by_parameter)
    for target in apart:
        for end in (target, tied[target]):
            wanted.setdefault(end, (end, alone))
    tensors = {name: info for name, info in base.items() if name not in dropped}
    changes: dict[str, Change] = {}
    starts: dict[str, str] = {}
    for parameter, (name, change) in wanted.items():
        key = fit.stored.get(parameter) or name
        info = base.get(key)
        if info is None:
            other = next((s if t == parameter else t for t, s in tied.items() if parameter in (t, s)), "")
            start = fit.stored.get(other)
            info = _own_info(artifact, key, change, base.get(start or ""))
            if start is not None:
                starts[key] = start
        if change.trained is not None and info.shape != change.trained.shape and _is_table(fit, parameter):
            info = _sized(info, tuple(change.trained.shape))
        if change.low_rank is not None and not change.low_rank.embedding:
            change = replace(change, transposed=_is_transposed(fit, parameter, change.transposed))
        check_change(key, change, info)
        tensors[key] = info
        if change != alone:
            changes[key] = change
    merged = replace(
        source, adapter=artifact.adapter, tensors=tensors, changes=changes, starts=starts, placed=True
    )
    return replace(artifact, source=merged)


def _own_info(artifact: Artifact, key: str, change: Change, start: TensorInfo | None) -> TensorInfo:
    """What a tensor that the base does not store will be: as the one it starts from, or of the model's dtype."""
    from loadstone.artifact.torchao.flatten import dtype_name

    if start is not None:
        return start._replace(name=key)
    if change.trained is None:
        raise ArtifactError(
            f"{change.first.file}: the base stores no '{key}' for the adapter to change", OTHER_BASE
        )
    from loadstone.loading.model_class import load_config

    dtype = dtype_name(stored_dtype(artifact, load_config(artifact)))
    return _sized(TensorInfo(key, dtype, (), artifact.weights.files[0], 0, 0), tuple(change.trained.shape))


def _sized(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    grown = info._replace(shape=shape)
    return grown._replace(begin=0, end=grown.numel * DTYPE_BITS[info.dtype] // 8)


def _is_table(fit: _Fit, parameter: str) -> bool:
    """Whether a parameter's rows are tokens, so that their number may have grown."""
    from loadstone.quantization.weight_use import input_embeddings, output_head

    owner = fit.model.get_submodule(parameter.rpartition(".")[0])
    return owner in (input_embeddings(fit.model), output_head(fit.model))


def _is_transposed(fit: _Fit, parameter: str, said: bool) -> bool:
    """Whether a weight is stored (in, out); the adapter's one flag is that of the layer it saw last."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    try:
        owner = fit.model.get_submodule(parameter.rpartition(".")[0])
    except AttributeError:  # a part of a parameter
        return said
    return isinstance(owner, Conv1D) if isinstance(owner, nn.Linear | Conv1D) else said


def _check_whole(artifact: Artifact, trust_remote_code: bool) -> None:
    """Raise `ArtifactError` for what the merged model lacks: what was trained and not saved, or not resized."""
    model = meta_model(artifact, trust_remote_code)
    stored = artifact.tensors
    try:
        check_stored(model, stored, destinations(model, list(stored)), str(artifact.path))
    except ArtifactError as error:
        raise ArtifactError(
            f"the base and the adapter do not make a whole {type(model).__name__}: {error.message}",
            "Name the model that it was trained on by --base, or save what was trained beside it (modules_to_save)",
        ) from None
