"""Save and load fitted TabPFN estimators as contexts: no weights, no code, bound to their checkpoint.

``save(estimator, path)`` and ``load(path)`` for `tabpfn.TabPFNClassifier` and `TabPFNRegressor` of the tested versions
(``pip install 'loadstone[tabpfn]'``), in any fit mode. Format: ``docs/contexts.md``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loadstone.artifact.context_errors import (
    BaseMismatch,
    CorruptContext,
    FormatUnsupported,
)
from loadstone.artifact.context_file import (
    CONTEXT_JSON,
    TABPFN,
    ContextFile,
    is_context,
    read_context,
    require_kind,
)
from loadstone.context.fingerprint import Fingerprint, check_same, fingerprint_of, tensor_sha256
from loadstone.context.tabpfn import probe as tabpfn_probe
from loadstone.context.tabpfn.classes import ALLOWED, TESTED
from loadstone.context.tabpfn.object_tree import Decoder, Encoder
from loadstone.context.tabpfn.stored import StoredEstimator, stored_tensors
from loadstone.errors import LoadstoneError, MissingError, UsageError
from loadstone.writing.contexts import write_context

log = logging.getLogger(__name__)

_PACKAGES = ("tabpfn", "scikit-learn", "numpy", "torch")
# Rebuilt on load: weights, what depends on the device, and timings.
_NOT_STORED = frozenset({"models_", "executor_", "configs_", "devices_"})
_ENGINE_NOT_STORED = frozenset(
    {"model_caches", "models", "kv_caches", "_speed_metrics", "iter_outputs", tabpfn_probe.ATTRIBUTE}
)
_TASKS = {"TabPFNClassifier": "classification", "TabPFNRegressor": "regression"}
_CACHE = "layers"
# Base files whose digests are known in this process: (path, size, time of change) of each -> digests.
_KNOWN: dict[tuple[Any, ...], Fingerprint] = {}


def save(
    estimator: Any, path: str | Path, *, schema: dict[str, Any] | None = None, overwrite: bool = False
) -> Path:
    """Write a fitted estimator as the directory ``path``, whole or not at all; returns it.

    The estimator stays as and where it is: tensors go to disk one after another, so this takes the memory of the
    largest of them, and that of predicting two rows for the probe. ``schema`` describes a table's columns
    (`loadstone.context.tables.table`). Raises UsageError for an estimator that is not fitted, holds what a context
    cannot, or for an existing output.
    """
    _check_package()
    kind = type(estimator).__name__
    if kind not in _TASKS or type(estimator).__module__.partition(".")[0] != "tabpfn":
        raise UsageError(
            f"a {type(estimator).__qualname__} is not a TabPFN estimator", "Save it with its own package"
        )
    if getattr(estimator, "is_constant_target_", False):
        raise UsageError(
            f"every target is {estimator.constant_value_}: TabPFN answers with it, and its model read nothing",
            "Fit it on targets that differ",
        )
    if not hasattr(estimator, "executor_"):
        raise UsageError("the estimator is not fitted", "Call fit first")
    state = base_state(estimator)
    base = fingerprint_of(state)
    tree, tensors, probe = _described(estimator, base)
    facts = _facts(estimator, base, schema, probe)
    return write_context(Path(path), stored_tensors(tree, tensors), facts, overwrite=overwrite)


def base_state(estimator: Any) -> dict[str, Tensor]:
    """All tensors of the base: parameters and buffers of its models, and a regressor's bar distribution."""
    models = estimator.models_
    state = {
        (name if len(models) == 1 else f"models.{i}.{name}"): tensor
        for i, model in enumerate(models)
        for name, tensor in model.state_dict().items()
    }
    criterion = getattr(estimator, "znorm_space_bardist_", None)
    if criterion is not None:
        state |= {f"criterion.{name}": tensor for name, tensor in criterion.state_dict().items()}
    return state


def load(path: str | Path, *, base: Any = None, device: Any = "auto", probe: bool = True) -> Any:
    """A fitted estimator from its directory, ready to predict.

    ``base``: a checkpoint's path, several, or tabpfn's ``ModelSpecs``; by default the recorded place. Nothing is ever
    downloaded. ``device`` is tabpfn's. The caches stay on the CPU until a prediction needs them; ``.to(device)`` moves
    everything. On another kind of processor or with other libraries than at the fit, the first prediction raises
    `ProbeFailed` where the recorded one does not come out again, unless ``probe`` is off (`check_probe` asks at once,
    anywhere). Raises `BaseMismatch` and `ArchitectureMismatch`, naming tensors, for
    another base, `CorruptContext`, `FormatUnsupported`, `UnsafeContent`, and `MissingError` for a base or package that
    is not here.
    """
    directory = Path(path)
    if not directory.is_dir() or not is_context(directory):
        raise UsageError(f"'{directory}' is not a fitted context", f"Name a directory with a {CONTEXT_JSON}")
    require_kind(directory, TABPFN, by="this loader")
    _check_package()
    file = read_context(directory, verify=True)
    _check_versions(file.facts)
    with StoredEstimator(file) as stored:
        return _loaded(file, stored, base, device, probe)


def check_probe(estimator: Any) -> float | None:
    """Predict the recorded probe of a loaded estimator now; returns the largest difference, relative to the largest
    answer, None for a context without one. Raises `ProbeFailed`."""
    return tabpfn_probe.check(estimator) if hasattr(estimator.executor_, tabpfn_probe.ATTRIBUTE) else None


def _loaded(file: ContextFile, stored: StoredEstimator, base: Any, device: Any, probe: bool) -> Any:
    tree, recorded = stored.tree, file.facts["base"]
    if (
        not tree.keys() >= {"class", "params", "caches", "fitted", "engine"}
        or str(tree["class"]) not in _TASKS
    ):
        raise _malformed(file)
    fresh: dict[str, Tensor] = {}
    decoder = Decoder(ALLOWED, stored.take, lambda name: fresh[name].detach().to("cpu", copy=True))
    params = decoder.decode(tree["params"])
    if not isinstance(params, dict):
        raise _malformed(file)
    params |= {"model_path": _model_path(recorded, base, file.path), "device": device}
    estimator = _new_estimator(tree["class"], params, file.path)
    fresh |= base_state(estimator)
    wanted = Fingerprint.from_json(recorded["tensors"])
    check_same(wanted, _fingerprint(estimator, fresh, wanted), str(params["model_path"]))
    fitted = decoder.decode(tree["fitted"])
    engine = decoder.decode(tree["engine"])
    caches = decoder.decode(tree["caches"])
    stored_probe = _probe(file, stored)
    stored.check_all_taken()
    if (
        not isinstance(fitted, dict)
        or not hasattr(engine, "_set_models")
        or not isinstance(caches, list | None)
    ):
        raise _malformed(file)
    for name, value in fitted.items():
        setattr(estimator, name, value)
    engine._speed_metrics = {}
    engine._set_models(estimator.models_)
    if caches is not None:
        # `to` would put whatever it finds here on the device at once.
        engine.kv_caches = []
    estimator.executor_ = engine
    estimator.to(device)
    if caches is not None:
        engine.kv_caches = caches
    if stored_probe is not None:
        tabpfn_probe.install(estimator, stored_probe, check_first=probe)
    return estimator


def _probe(file: ContextFile, stored: StoredEstimator) -> tabpfn_probe.Probe | None:
    facts = file.facts["numerics"].get("probe")
    if facts is None:
        return None
    if not isinstance(facts, dict) or facts.keys() != {"device", "full", "computer"}:
        raise _malformed(file)
    queries, answers = stored.take("probe.queries"), stored.take("probe.answers")
    if (queries.dtype, queries.dim(), answers.dtype, answers.dim()) != (torch.float64, 2, torch.float32, 3):
        raise _malformed(file)
    return tabpfn_probe.Probe(
        queries, answers, str(facts["device"]), facts["full"] is True, str(facts["computer"])
    )


def _malformed(file: ContextFile) -> CorruptContext:
    return CorruptContext(f"'{file.path}' does not describe a fitted TabPFN estimator", "Save it again")


def _described(
    estimator: Any, base: Fingerprint
) -> tuple[dict[str, Any], dict[str, Tensor], tabpfn_probe.Probe | None]:
    """What is stored of a fitted estimator: its JSON tree, its tensors by name, and its probe."""
    probe = tabpfn_probe.probe_of(estimator)
    encoder = Encoder(ALLOWED, _lookup(base))
    tree = _tree(estimator, encoder)
    return tree, encoder.tensors | (probe.tensors() if probe else {}), probe


def _tree(estimator: Any, encoder: Encoder) -> dict[str, Any]:
    """The estimator as JSON; its tensors go to the encoder."""
    engine = estimator.executor_
    params = estimator.get_params(deep=False)
    del params["model_path"], params["device"]
    fitted = {
        name: value
        for name, value in vars(estimator).items()
        if name.endswith("_") and name not in _NOT_STORED
    }
    caches = getattr(engine, "kv_caches", None)
    # The engine without its models: a shallow copy, whose attributes are the estimator's own.
    shell = object.__new__(type(engine))
    shell.__dict__.update(
        {name: value for name, value in vars(engine).items() if name not in _ENGINE_NOT_STORED}
    )
    return {
        "class": type(estimator).__name__,
        "params": encoder.encode(params, "params"),
        "caches": encoder.encode(caches, _CACHE),
        "fitted": encoder.encode(fitted, "fitted"),
        "engine": encoder.encode(shell, "engine"),
    }


def _facts(
    estimator: Any, base: Fingerprint, schema: dict[str, Any] | None, probe: tabpfn_probe.Probe | None
) -> dict[str, Any]:
    names = getattr(estimator, "feature_names_in_", None)
    labels = [] if not hasattr(estimator, "classes_") else [_label(c) for c in estimator.classes_]
    caches = getattr(estimator.executor_, "kv_caches", None) or []
    entries = [entry for cache in caches for entry in cache.kv.values()]
    configs = [_plain(asdict(config)) for config in estimator.configs_]
    return {
        "kind": TABPFN,
        "task": _TASKS[type(estimator).__name__],
        "rows": int(estimator.n_train_samples_),
        "features": int(estimator.n_features_in_),
        "schema": schema or {"names": [] if names is None else [str(name) for name in names]},
        "classes": (schema or {}).get("classes") or labels,
        "base": {
            "source": _sources(estimator)[0] if _sources(estimator) else None,
            "sources": _sources(estimator),
            "fingerprint": base.digest,
            "architecture": configs[0] if len(configs) == 1 else {"models": configs},
            "tensors": base.to_json(),
        },
        "cache": {
            "dtype": str(entries[0].key.dtype).removeprefix("torch.") if entries else "none",
            "layers": len(caches[0].kv) if caches else 0,
            "members": int(estimator.n_estimators_),
            "groups": len(caches),
            "layout": "members, rows, heads, head size",
            "extendable": False,
        },
        "encoder": {"fit_mode": estimator.fit_mode},
        "numerics": {
            "dtype": str(estimator.forced_inference_dtype_ or "float32").removeprefix("torch."),
            "device": str(estimator.devices_[0].type),
            "torch": torch.__version__,
            "probe": None if probe is None else probe.to_json(),
        },
        "packages": {name: version(name) for name in _PACKAGES},
        "contains_training_labels": True,
    }


def _new_estimator(name: str, params: dict[str, Any], directory: Path) -> Any:
    """An unfitted estimator with the models of its base loaded."""
    import tabpfn

    try:
        estimator = getattr(tabpfn, name)(**params)
        estimator._initialize_model_variables()
    except LoadstoneError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise BaseMismatch(
            f"the base model of '{directory}' cannot be loaded from {params['model_path']} ({reason})",
            "Name the checkpoint it was fitted with (base=, or --base)",
        ) from None
    return estimator


def _fingerprint(estimator: Any, fresh: dict[str, Tensor], wanted: Fingerprint) -> Fingerprint:
    """Digests of the base's tensors in the dtypes that were recorded: fitting may have cast them.

    Cached until the files change.
    """
    files = _files(estimator)
    casts = sorted({dtype for dtype, _, _ in wanted.tensors.values()})
    key = tuple((str(f), s.st_size, s.st_mtime_ns) for f in files if (s := f.stat())) + tuple(casts)
    if files and key in _KNOWN and _KNOWN[key].tensors.keys() == fresh.keys():
        return _KNOWN[key]
    as_fitted = {}
    for name, tensor in fresh.items():
        dtype = getattr(torch, wanted.tensors[name][0], None) if name in wanted.tensors else None
        cast = tensor.is_floating_point() and isinstance(dtype, torch.dtype) and dtype != tensor.dtype
        as_fitted[name] = tensor.to(dtype) if cast else tensor
    found = fingerprint_of(as_fitted)
    if files:
        _KNOWN[key] = found
    return found


def _model_path(recorded: dict[str, Any], base: Any, directory: Path) -> Any:
    """The ``model_path`` to give tabpfn; raises `MissingError` when a file of the base is not there."""
    if base is not None and not isinstance(base, str | Path):
        if not isinstance(base, list | tuple) or not all(isinstance(b, str | Path) for b in base):
            return base
        places = [Path(b) for b in base]
    elif base is not None:
        places = [Path(base)]
    else:
        places = [Path(str(source)) for source in recorded.get("sources") or ()]
    missing = [str(place) for place in places if not place.is_file()]
    if missing or not places:
        what = f"it was {missing[0]}" if missing else "it was a model made in memory"
        raise MissingError(
            f"the base model of '{directory}' is not here: {what}, fingerprint "
            f"{str(recorded.get('fingerprint'))[:16]}",
            "Name its checkpoint (base=, or --base)",
        )
    return str(places[0]) if len(places) == 1 else [str(place) for place in places]


def _files(estimator: Any) -> list[Path]:
    given = estimator.model_path
    places = list(given) if isinstance(given, list | tuple) else [given]
    return [Path(p) for p in places] if all(isinstance(p, str | Path) for p in places) else []


def _sources(estimator: Any) -> list[str]:
    """Paths of the checkpoints the estimator was made from; none for models made in memory."""
    if estimator.model_path is None or isinstance(estimator.model_path, str | Path | list):
        places = estimator.model_path if isinstance(estimator.model_path, list) else [estimator.model_path]
        if all(p is None or isinstance(p, str | Path) for p in places):
            from tabpfn.model_loading import resolve_model_path, resolve_model_version

            which: Any = "classifier" if type(estimator).__name__ == "TabPFNClassifier" else "regressor"
            path = None if estimator.model_path == "auto" else estimator.model_path
            found = resolve_model_path(path, which, resolve_model_version(path).value)[0]
            return [str(Path(p).resolve()) for p in found]
    return []


def _lookup(base: Fingerprint) -> Any:
    """A function that finds a tensor of the base with the same content: contexts store only its name."""
    shapes: dict[tuple[str, tuple[int, ...]], dict[str, str]] = {}
    for name, (dtype, shape, sha) in base.tensors.items():
        shapes.setdefault((dtype, shape), {})[sha] = name

    def in_base(tensor: Tensor) -> str | None:
        alike = shapes.get((str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)))
        return alike.get(tensor_sha256(tensor)) if alike else None

    return in_base


def _check_package() -> None:
    try:
        found = version("tabpfn")
    except PackageNotFoundError:
        raise MissingError("TabPFN contexts need tabpfn", "pip install 'loadstone[tabpfn]'") from None
    if _minor(found) != TESTED:
        raise MissingError(
            f"tabpfn {found} is installed, and contexts are tested with {TESTED}",
            f"pip install 'tabpfn=={TESTED}.*'",
        )


def _check_versions(facts: dict[str, Any]) -> None:
    """Raise `FormatUnsupported` for another version of tabpfn; warn about another version of scikit-learn."""
    packages = facts.get("packages")
    if not isinstance(packages, dict):
        raise CorruptContext(f"{CONTEXT_JSON}: 'packages' is missing", "Save it again")
    fitted = str(packages.get("tabpfn"))
    if _minor(fitted) != _minor(version("tabpfn")):
        raise FormatUnsupported(
            f"the estimator was fitted with tabpfn {fitted[:20]}, here is {version('tabpfn')}",
            "Fit it again, or install that version",
        )
    fitted = str(packages.get("scikit-learn"))
    if _minor(fitted) != _minor(version("scikit-learn")):
        log.warning(
            "fitted with scikit-learn %s, here is %s: compare predictions", fitted, version("scikit-learn")
        )


def _minor(text: str) -> str:
    return ".".join(text.split(".")[:2])


def _label(label: Any) -> Any:
    return label.item() if hasattr(label, "item") else label


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def cache_tensors(estimator: Any) -> Iterator[Tensor]:
    """The tensors of a fitted estimator's keys and values, wherever they lie."""
    for cache in getattr(estimator.executor_, "kv_caches", None) or ():
        for entry in cache.kv.values():
            yield from (t for t in vars(entry).values() if isinstance(t, Tensor))
