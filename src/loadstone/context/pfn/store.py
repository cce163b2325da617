"""Load a PFN's fitted context from its directory; `TrainingContext.save` writes it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from loadstone.artifact.context_errors import (
    ArchitectureMismatch,
    CorruptContext,
    FormatUnsupported,
    ProbeFailed,
)
from loadstone.artifact.context_file import (
    CONTEXT_JSON,
    CONTEXT_TENSORS,
    ContextFile,
    is_context,
    read_context,
    require_kind,
)
from loadstone.artifact.context_file import PFN as PFN_KIND
from loadstone.artifact.formats.safetensors import open_tensors
from loadstone.artifact.values import check_values
from loadstone.context.fingerprint import Fingerprint, check_same, fingerprint
from loadstone.context.pfn.bases import find_base, load_base
from loadstone.context.pfn.config import PFNConfig
from loadstone.context.pfn.encoding import Scaler
from loadstone.context.pfn.layer_cache import CACHE_DTYPES, LayerCache
from loadstone.context.pfn.layout import context_tensors
from loadstone.context.pfn.model import PFN
from loadstone.context.pfn.training_context import PROBE_TOLERANCE, TrainingContext
from loadstone.context.tables.predictions import REGRESSION, TASKS
from loadstone.errors import ArtifactError, LoadstoneError, UsageError


def load_table_context(
    path: str | Path, base: PFN | str | Path | None = None, *, device: str | None = None
) -> TrainingContext:
    """A fitted context from its directory, bound to its base model and checked against everything it recorded.

    ``base`` is a loaded model, a directory or a ``builtin:`` name; without it the recorded one, a built-in one or one
    already loaded with the right fingerprint is taken. Contexts of one base share its parameters. ``device`` (auto,
    cpu, cuda, cuda:N) is the base's own when a loaded model is given. Raises `CorruptContext`, `FormatUnsupported`,
    `UnsafeContent`, `BaseMismatch`, `ArchitectureMismatch` or `ProbeFailed` (all `ArtifactError`), or `MissingError`
    for a base that is not here.
    """
    directory = Path(path)
    if not directory.is_dir() or not is_context(directory):
        raise UsageError(f"'{directory}' is not a fitted context", f"Name a directory with a {CONTEXT_JSON}")
    require_kind(directory, PFN_KIND, by="this loader")
    file = read_context(directory, verify=True)
    config = _check_facts(file)
    dtype = file.facts["numerics"]["dtype"]
    wanted = Fingerprint.from_json(file.facts["base"]["tensors"])
    with torch.inference_mode(False):
        model = _base(base, file, wanted, device or "auto", dtype)
        # A model made in memory has no name of its own.
        name = str(model.source if base is None or isinstance(base, PFN) else base)
        _check_architecture(config, model, name)
        check_same(wanted, fingerprint(model), name)
        context = _build(file, model)
        _check_probe(context, file)
    return context


def _base(
    base: PFN | str | Path | None, file: ContextFile, wanted: Fingerprint, device: str, dtype: str
) -> PFN:
    if isinstance(base, PFN):
        return base
    if base is not None:
        return load_base(base, device=device, dtype=dtype)
    return find_base(file.facts["base"].get("source"), wanted, context=file.path, device=device, dtype=dtype)


def _check_facts(file: ContextFile) -> PFNConfig:
    """Hold the description against itself and the tensors it comes with; returns the base's architecture."""
    facts = file.facts
    dtype, cache = facts["numerics"].get("dtype"), facts["cache"]["dtype"]
    if dtype not in PROBE_TOLERANCE or cache not in CACHE_DTYPES:
        raise FormatUnsupported(
            f"{CONTEXT_JSON}: computed in {str(dtype)[:40]!a} and stored in {cache[:40]!a}, unsupported here",
            f"Fit again with a cache in {', '.join(CACHE_DTYPES)}",
        )
    try:
        config = PFNConfig.from_dict(facts["base"]["architecture"])
        if facts["task"] not in TASKS:
            raise ArtifactError(f"{CONTEXT_JSON}: unknown task {facts['task'][:40]!a}")
        expected = context_tensors(
            config,
            task=facts["task"],
            rows=facts["rows"],
            features=facts["features"],
            classes=len(facts["classes"]),
            cache=CACHE_DTYPES[cache],
            model=getattr(torch, dtype),
        )
    except LoadstoneError as error:
        raise CorruptContext(error.message, "Fit the context again") from None
    for name in [*expected, *file.tensors]:
        found, want = file.tensors.get(name), expected.get(name)
        if found is None or want is None or (found.dtype, found.shape) != (want.dtype, want.shape):
            what = (
                "is missing"
                if found is None
                else "does not belong"
                if want is None
                else "has another shape or dtype"
            )
            raise CorruptContext(f"{CONTEXT_TENSORS}: tensor '{name}' {what}", "Fit the context again")
    try:
        check_values(file.path, list(file.tensors.values()))
    except ArtifactError as error:
        raise CorruptContext(error.message, error.remedy) from None
    return config


def _check_architecture(config: PFNConfig, model: PFN, base: str) -> None:
    ours, theirs = config.to_dict(), model.config.to_dict()
    differ = [key for key in ours if ours[key] != theirs[key]]
    if differ:
        what = ", ".join(f"{key} {theirs[key]} (fitted with {ours[key]})" for key in differ)
        raise ArchitectureMismatch(
            f"the base model '{base}' is another architecture: {what}",
            "Name the model the context was fitted with",
        )


def _build(file: ContextFile, model: PFN) -> TrainingContext:
    facts, device = file.facts, model.device
    tensors: dict[str, Tensor] = {}
    with open_tensors(file.path / CONTEXT_TENSORS) as handle:
        for name in file.tensors:
            if not name.startswith("probe."):
                # A clone on the CPU too: a mapped tensor would change with the file under it.
                tensor = handle.get_tensor(name)
                tensors[name] = tensor.clone() if device.type == "cpu" else tensor.to(device)
    layers = []
    for number in range(facts["cache"]["layers"]):
        prefix = f"layers.{number}."
        layers.append(
            LayerCache(**{n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        )
    names = facts["schema"].get("names")
    return TrainingContext(
        model=model,
        task=facts["task"],
        rows=facts["rows"],
        scaler=Scaler(tensors["scaler.mean"], tensors["scaler.std"]),
        target=Scaler(tensors["target.mean"], tensors["target.std"]) if facts["task"] == REGRESSION else None,
        codes=tensors["codes"],
        layers=tuple(layers),
        classes=tuple(facts["classes"]),
        feature_names=tuple(names) if names else None,
        seed=facts["encoder"].get("seed", 0),
        cache_dtype=CACHE_DTYPES[facts["cache"]["dtype"]],
        schema=facts["schema"] if "columns" in facts["schema"] else None,
    )


def _check_probe(context: TrainingContext, file: ContextFile) -> None:
    with open_tensors(file.path / CONTEXT_TENSORS) as handle:
        queries, expected = handle.get_tensor("probe.queries"), handle.get_tensor("probe.logits")
    with torch.no_grad():
        found = context.logits(queries.to(context.device)).cpu()
    difference = (
        (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1)
    ).item()
    tolerance = PROBE_TOLERANCE[file.facts["numerics"]["dtype"]]
    # `not <=` and not `>`: a NaN fails too.
    if not difference <= tolerance:
        raise ProbeFailed(
            f"'{file.path}': the probe's logits differ by {difference:.2g} here, {tolerance:g} is allowed",
            "The machine or library computes differently from where it was fitted: fit it again here",
        )
