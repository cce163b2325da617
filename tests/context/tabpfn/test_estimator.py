"""TabPFN estimators as contexts: nothing lost, nothing of the base stored, nothing run, nothing else accepted.

The weights are random (no package ships any); every architecture version of the package is covered.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers import run as command

pytest.importorskip("tabpfn")

from tests.context.tabpfn.checkpoints import SIZES, estimator, fit_command, table, write_checkpoint
from tests.context.tabpfn.forged import rewrite, rewrite_tensors, rewrite_tree

import loadstone
from loadstone.artifact.context_errors import (
    BaseMismatch,
    CorruptContext,
    FormatUnsupported,
    KindMismatch,
    ProbeFailed,
    UnsafeContent,
)
from loadstone.artifact.context_file import read_context
from loadstone.artifact.torchao.flatten import tensor_bytes
from loadstone.context.tabpfn import estimator as contexts
from loadstone.context.tabpfn.classes import ALLOWED
from loadstone.context.tabpfn.object_tree import Decoder, Encoder, resolve
from loadstone.context.tabpfn.probe import probe_of
from loadstone.context.tabpfn.stored import TREE
from loadstone.errors import MissingError, UsageError

TASKS = ("classification", "regression")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("checkpoints")

    def make(name: str = "tabpfn_v3_5", task: str = "classification") -> Path:
        path = folder / f"{name}-{task}.safetensors"
        return path if path.exists() else write_checkpoint(path, name, task)

    return make


@pytest.fixture(scope="module")
def fitted(checkpoint: Callable[..., Path]) -> Callable[..., Any]:
    """``fitted(name, task, **options)``: a fitted estimator, made once; never moved or changed."""
    made: dict[str, Any] = {}

    def make(name: str = "tabpfn_v3_5", task: str = "classification", **options: Any) -> Any:
        key = f"{name} {task} {sorted(options.items(), key=str)}"
        if key not in made:
            x, y, _ = table(task)
            made[key] = estimator(checkpoint(name, task), task, **options).fit(x, y)
        return made[key]

    return make


@pytest.fixture(scope="module")
def wide(checkpoint: Callable[..., Path]) -> Any:
    """A fitted estimator with large caches."""
    x = np.random.default_rng(0).normal(size=(4000, 3))
    return estimator(checkpoint(task="regression"), "regression").fit(x, x[:, 0])


def predict(model: Any) -> np.ndarray:
    task = "classification" if hasattr(model, "predict_proba") else "regression"
    _, _, new = table(task)
    found = model.predict_proba(new) if task == "classification" else model.predict(new)
    return np.asarray(found)


@pytest.mark.parametrize("mode", ["fit_with_cache", "fit_preprocessors", "low_memory"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", sorted(SIZES))
def test_predictions_are_the_same_after_one_round_trip_and_two(
    fitted: Callable[..., Any], name: str, task: str, mode: str, tmp_path: Path
) -> None:
    model = fitted(name, task, fit_mode=mode)
    expected = predict(model)
    contexts.save(model, tmp_path / "one")
    one = contexts.load(tmp_path / "one", device="cpu")
    assert np.array_equal(predict(one), expected)
    contexts.save(one, tmp_path / "two")
    two = loadstone.load_context(tmp_path / "two", device="cpu")
    assert np.array_equal(predict(two), expected)
    # Nothing was lost on the way: the same tensors in every bit.
    before, after = tensors_of(model), tensors_of(two)
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and tensor_bytes(tensor) == tensor_bytes(after[key]), key
    if task == "classification":
        assert list(one.classes_) == list(model.classes_)
        _, _, new = table(task)
        assert list(one.predict(new)) == list(model.predict(new))


@pytest.mark.parametrize("precision", ["int8", "fp8", "auto", "adaptive"])
@pytest.mark.parametrize("task", TASKS)
def test_quantized_caches(fitted: Callable[..., Any], task: str, precision: str, tmp_path: Path) -> None:
    model = fitted("tabpfn_v3_5", task, kv_cache_precision=precision)
    contexts.save(model, tmp_path / "context")
    found = contexts.load(tmp_path / "context", device="cpu")
    assert np.array_equal(predict(found), predict(model))
    wanted = {"fp8": torch.float8_e4m3fn, "int8": torch.int8, "adaptive": torch.int8}.get(precision)
    kinds = {t.dtype for t in contexts.cache_tensors(found)}
    assert wanted in kinds if wanted else torch.int8 not in kinds


@pytest.mark.parametrize("options", [
    {"inference_config": {"POLYNOMIAL_FEATURES": 5}},
    {"inference_config": {"TRANSFORM_TEXT": True, "TRANSFORM_DATES": True}},
    {"inference_config": {"SUBSAMPLE_SAMPLES": 20}},
    {"eval_metric": "f1", "tuning_config": {"calibrate_temperature": True, "tune_decision_thresholds": True}},
    {"inference_precision": torch.float64},
    {"random_state": np.random.RandomState(3)},
    {"n_estimators": 5, "balance_probabilities": True, "average_before_softmax": True},
])  # fmt: skip
def test_options(checkpoint: Callable[..., Path], options: dict[str, Any], tmp_path: Path) -> None:
    import pandas as pd

    x, y, new = table("classification", 80)
    if "TRANSFORM_TEXT" in options.get("inference_config", {}):
        for frame in (x, new):
            frame["when"] = pd.date_range("2020-01-01", periods=len(frame))
            frame["words"] = pd.Series(
                [f"word {i} and {i * 7 % 13}" for i in range(len(frame))], dtype="string"
            )
    model = estimator(checkpoint(), "classification", **options).fit(x, y)
    expected = model.predict_proba(new)
    contexts.save(model, tmp_path / "context")
    assert np.array_equal(contexts.load(tmp_path / "context", device="cpu").predict_proba(new), expected)


NAMES = ["power", "safepower", "quantile_uni_coarse", "quantile_norm_fine", "squashing_scaler_max10", "robust", "kdi",
         "kdi_alpha_0.5_uni", "norm_and_kdi", "quantile_uni_extrapolate"]  # fmt: skip


@pytest.mark.parametrize("preprocessing", NAMES)
def test_preprocessors(preprocessing: str, tmp_path: Path) -> None:
    from tabpfn.preprocessing import PreprocessorConfig

    for category in ("onehot", "ordinal"):
        steps = [PreprocessorConfig(preprocessing, categorical_name=category, global_transformer_name="svd")]
        path = write_checkpoint(
            tmp_path / "base.safetensors", "tabpfn_v2", "classification", transforms=steps
        )
        x, y, new = table("classification")
        model = estimator(path, "classification", n_estimators=1).fit(x, y)
        expected = model.predict_proba(new)
        contexts.save(model, tmp_path / category)
        assert np.array_equal(contexts.load(tmp_path / category, device="cpu").predict_proba(new), expected)


def test_every_allowed_name_exists() -> None:
    for name in ALLOWED:
        assert resolve(name) is not None


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", sorted(SIZES))
def test_no_weight_is_stored(
    fitted: Callable[..., Any], checkpoint: Callable[..., Path], name: str, task: str, tmp_path: Path
) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    model = fitted(name, task)
    contexts.save(model, tmp_path / "context")
    weights = load_file(checkpoint(name, task))
    raw = (tmp_path / "context" / "context.safetensors").read_bytes()
    for weight_name, weight in weights.items():
        content = weight.contiguous().view(torch.uint8).numpy().tobytes() if weight.dim() else b""
        if len(content) >= 64 and len(weight.unique()) > 8:
            assert content not in raw, weight_name
    with safe_open(tmp_path / "context" / "context.safetensors", framework="pt") as handle:
        assert not set(weights) & set(handle.keys())


@pytest.mark.parametrize("task", TASKS)
def test_size_is_that_of_the_tensors(checkpoint: Callable[..., Path], task: str, tmp_path: Path) -> None:
    from tabpfn.architectures.tabpfn_v3_5 import get_cache_size

    draw = np.random.default_rng(0)
    x = draw.normal(size=(3000, 5))
    y = x[:, 0] if task == "regression" else (x[:, 0] > 0).astype(int)
    model = estimator(checkpoint("tabpfn_v3_5", task), task).fit(x, y)
    contexts.save(model, tmp_path / "context")
    # What the package says of keys, values and their like before any fit, given the columns that the model sees.
    tensors = tensors_of(model)
    layers = sum(t.nbytes for name, t in tensors.items() if name.startswith("layers."))
    columns = model.executor_.kv_caches[0].scaler_cache["mean"].shape[-1]
    one = get_cache_size(
        n_train=3000, n_features=columns, model_config=model.configs_[0], base_dtype="autocast",
        task_type="multiclass" if task == "classification" else "regression",
    )  # fmt: skip
    assert abs(layers - 2 * one) <= 0.01 * layers
    file = read_context(tmp_path / "context")
    probe = probe_of(model)
    assert file.cache_bytes == layers and probe is not None
    stored = [t for t in file.tensors.values() if t.name != TREE]
    assert (
        layers
        < sum(t.nbytes for t in stored)
        <= sum(t.nbytes for t in [*tensors.values(), *probe.tensors().values()])
    )


def test_the_file_is_plain_safetensors(fitted: Callable[..., Any], tmp_path: Path) -> None:
    """Readable without loadstone: tensors by their paths, and the rest as JSON."""
    from safetensors.torch import load_file

    model = fitted()
    contexts.save(model, tmp_path / "context")
    found = load_file(tmp_path / "context" / "context.safetensors")
    tree = json.loads(found["estimator.json"].numpy().tobytes())
    assert tree["class"] == "TabPFNClassifier"
    live = {id(t): t for t in contexts.cache_tensors(model)}.values()
    stored = [t for name, t in found.items() if name.startswith("layers.")]
    assert all(any(t.shape == s.shape and torch.equal(t, s) for s in stored) for t in live)


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    encoder = Encoder(ALLOWED)
    contexts._tree(model, encoder)
    return encoder.tensors


def test_saving_copies_and_moves_nothing(fitted: Callable[..., Any], tmp_path: Path) -> None:
    model = fitted()
    before = {id(t): t.data_ptr() for t in contexts.cache_tensors(model)}
    taken = tensors_of(model)
    # What is written are the live tensors themselves.
    assert set(before.values()) <= {t.data_ptr() for t in taken.values()}
    contexts.save(model, tmp_path / "context")
    assert before == {id(t): t.data_ptr() for t in contexts.cache_tensors(model)}


def test_caches_wait_on_the_cpu(
    fitted: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`load` hands the caches to no device; a prediction asks for them."""
    from tabpfn.architectures.tabpfn_v3_5 import TabPFNV3p5Cache

    contexts.save(fitted(), tmp_path / "context")
    moved: list[Any] = []
    real = TabPFNV3p5Cache.to
    monkeypatch.setattr(
        TabPFNV3p5Cache, "to", lambda self, device: moved.append(device) or real(self, device)
    )
    model = contexts.load(tmp_path / "context", device="cpu")
    assert moved == []
    predict(model)
    assert moved


# Another base.


@pytest.mark.parametrize("name", ["tabpfn_v2", "tabpfn_v3", "tabpfn_v3_5"])
def test_another_base_is_refused_by_name(fitted: Callable[..., Any], name: str, tmp_path: Path) -> None:
    contexts.save(fitted(name), tmp_path / "context")
    others = {
        "retrained": (write_checkpoint(tmp_path / "a.safetensors", name, "classification", seed=1), "other values in"),
        "shallower": (
            write_checkpoint(tmp_path / "b.safetensors", name, "classification", nlayers=1), r"lacks '.*1\.",
        ),
        "deeper": (
            write_checkpoint(tmp_path / "c.safetensors", name, "classification", nlayers=3), r"has besides '.*2\.",
        ),
    }  # fmt: skip
    for path, said in others.values():
        with pytest.raises(BaseMismatch, match=said):
            contexts.load(tmp_path / "context", base=path, device="cpu")
    with pytest.raises(MissingError, match="is not here"):
        contexts.load(tmp_path / "context", base=tmp_path / "nowhere.safetensors", device="cpu")


def test_one_changed_value_of_the_base_is_found(
    fitted: Callable[..., Any], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    contexts.save(fitted(), tmp_path / "context")
    tensors = load_file(checkpoint())
    with safe_open(checkpoint(), framework="pt") as handle:
        metadata = handle.metadata()
    name = max(tensors, key=lambda n: tensors[n].numel())
    tensors[name].reshape(-1)[0] += 1e-3
    save_file(tensors, tmp_path / "base.safetensors", metadata=metadata)
    with pytest.raises(BaseMismatch, match=f"other values in '{name}'$|other values in '{name}'"):
        contexts.load(tmp_path / "context", base=tmp_path / "base.safetensors", device="cpu")
    # The right one still loads, from another place too.
    copy = shutil.copy(checkpoint(), tmp_path / "copy.safetensors")
    contexts.load(tmp_path / "context", base=copy, device="cpu")


def test_models_made_in_memory(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    from tabpfn.base import ModelSpecs, initialize_tabpfn_model

    models, configs, _, settings = initialize_tabpfn_model(str(checkpoint()), "classifier")
    specs = ModelSpecs(model=models[0], architecture_config=configs[0], inference_config=settings)
    x, y, _ = table("classification")
    from tabpfn import TabPFNClassifier

    model = TabPFNClassifier(model_path=specs, fit_mode="fit_with_cache", n_estimators=2, device="cpu").fit(
        x, y
    )
    contexts.save(model, tmp_path / "context")
    with pytest.raises(MissingError, match="made in memory"):
        contexts.load(tmp_path / "context", device="cpu")
    for base in (specs, checkpoint()):
        assert np.array_equal(
            predict(contexts.load(tmp_path / "context", base=base, device="cpu")), predict(model)
        )


# Another environment.


def elsewhere(context: Path) -> None:
    """As if the context had been fitted on another computer."""
    rewrite(context, lambda f: f["numerics"]["probe"].update(computer="another"))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", sorted(SIZES))
def test_the_first_prediction_checks_the_probe(
    fitted: Callable[..., Any], name: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts.save(fitted(name, task), tmp_path / "context")
    model = contexts.load(tmp_path / "context", device="cpu")
    assert contexts.check_probe(model) == 0.0
    elsewhere(tmp_path / "context")
    expected = predict(contexts.load(tmp_path / "context", device="cpu"))
    # Something that computes otherwise: every prediction of a waiting estimator says so.
    model = contexts.load(tmp_path / "context", device="cpu")
    from tabpfn import inference

    real = inference._move_and_squeeze_output
    monkeypatch.setattr(inference, "_move_and_squeeze_output", lambda *args: real(*args) * 1.05)
    for _ in range(2):
        with pytest.raises(ProbeFailed, match="differ by"):
            predict(model)
    with pytest.raises(ProbeFailed):
        contexts.check_probe(model)
    assert not np.array_equal(
        predict(contexts.load(tmp_path / "context", device="cpu", probe=False)), expected
    )
    # The recorded probe goes along when it is saved again, whatever is computed here.
    contexts.save(model, tmp_path / "again")
    monkeypatch.undo()
    assert np.array_equal(predict(model), expected)
    assert contexts.check_probe(contexts.load(tmp_path / "again", device="cpu")) == 0.0


@pytest.mark.parametrize("other", [False, True])
def test_the_probe_is_asked_once_on_another_computer_and_copies_along(
    fitted: Callable[..., Any], other: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import copy
    import pickle

    from loadstone.context.tabpfn import probe as tabpfn_probe

    contexts.save(fitted(), tmp_path / "context")
    if other:
        elsewhere(tmp_path / "context")
    asked: list[Any] = []
    real = tabpfn_probe.check
    monkeypatch.setattr(tabpfn_probe, "check", lambda estimator: asked.append(estimator) or real(estimator))
    model = contexts.load(tmp_path / "context", device="cpu")
    expected = predict(fitted())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        asked.clear()
        assert np.array_equal(predict(copied), expected) and np.array_equal(predict(copied), expected)
        assert asked == ([copied] if other else [])


def test_contexts_without_a_cache_have_no_probe(fitted: Callable[..., Any], tmp_path: Path) -> None:
    contexts.save(fitted(fit_mode="low_memory"), tmp_path / "context")
    assert contexts.check_probe(contexts.load(tmp_path / "context", device="cpu")) is None


@pytest.mark.parametrize("name", ["tabpfn_v2", "tabpfn_v3"])
def test_architectures_that_draw_on_the_device_are_told_apart(
    fitted: Callable[..., Any], name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    contexts.save(fitted(name), tmp_path / "context")
    rewrite(tmp_path / "context", lambda f: f["numerics"]["probe"].update(device="cuda", computer="another"))
    model = contexts.load(tmp_path / "context", device="cpu")
    predict(model)
    assert ("draws random numbers" in caplog.text) == (name == "tabpfn_v2")


# What must not be loaded.


def _plant(tree: dict[str, Any], value: Any) -> None:
    tree["fitted"]["v"].append(["planted_", value])


MARKER = "import pathlib; pathlib.Path('planted').touch()"


@pytest.mark.parametrize("value, error", [
    ({"#": "object", "c": "subprocess.Popen", "v": [], "id": 9001}, UnsafeContent),
    ({"#": "named", "v": "os.system"}, UnsafeContent),
    ({"#": "named", "v": "builtins.exec"}, UnsafeContent),
    ({"#": "enum", "c": "os.system", "v": "x"}, UnsafeContent),
    ({"#": "object", "c": ["os"], "v": [], "id": 9001}, CorruptContext),
    ({"#": "object", "c": "builtins.int", "v": [["real", 1]], "id": 9001}, CorruptContext),
    ({"#": "enum", "c": "builtins.float", "v": "x"}, CorruptContext),
    ({"#": "call", "v": MARKER}, CorruptContext),
    ({"#": "again", "v": 123456}, CorruptContext),
    ({"#": "dtype", "v": "load"}, CorruptContext),
    ({"#": "npdtype", "v": {"x": 1}}, CorruptContext),
    ({"#": "array", "d": "|O", "s": [1], "v": [{"#": "named", "v": "os.system"}], "id": 9001}, UnsafeContent),
    ({"#": "array", "d": "<f8", "s": [1], "t": "none", "id": 9001}, CorruptContext),
    ({"#": "scalar", "d": "|V8", "v": 1}, CorruptContext),
    ({"no tag": 1}, CorruptContext),
])  # fmt: skip
def test_crafted_objects_are_refused(
    fitted: Callable[..., Any],
    value: Any,
    error: type[Exception],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    contexts.save(fitted(), tmp_path / "context")
    rewrite_tree(tmp_path / "context", lambda tree: _plant(tree, value))
    with pytest.raises(error):
        contexts.load(tmp_path / "context", device="cpu")
    assert not (tmp_path / "planted").exists()


class _Payload:
    def __reduce__(self) -> Any:
        return exec, (MARKER,)


def test_a_file_that_runs_code_in_the_package_is_refused_here(
    fitted: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zipfile

    import joblib
    from tabpfn.model_loading import load_fitted_tabpfn_model, save_fitted_tabpfn_model

    monkeypatch.chdir(tmp_path)
    save_fitted_tabpfn_model(fitted(), tmp_path / "theirs.tabpfn_fit")
    with zipfile.ZipFile("theirs.tabpfn_fit") as archive:
        archive.extractall("unpacked")
    joblib.dump(_Payload(), "unpacked/fitted_attrs.joblib")
    shutil.make_archive("crafted", "zip", "unpacked")
    Path("crafted.zip").rename("crafted.tabpfn_fit")
    with pytest.raises(Exception):  # noqa: B017 - after the code has run
        load_fitted_tabpfn_model("crafted.tabpfn_fit", device="cpu")
    assert Path("planted").exists(), "the package no longer runs it: this test has lost its point"
    Path("planted").unlink()
    # The same pickle in a context, as a file or in the place of one.
    contexts.save(fitted(), tmp_path / "context")
    shutil.copy("unpacked/fitted_attrs.joblib", "context/fitted_attrs.joblib")
    with pytest.raises(UnsafeContent):
        contexts.load("context", device="cpu")
    Path("context/fitted_attrs.joblib").unlink()
    shutil.copy("unpacked/fitted_attrs.joblib", "context/context.safetensors")
    with pytest.raises(CorruptContext):
        contexts.load("context", device="cpu")
    with pytest.raises(UsageError):
        contexts.load("crafted.tabpfn_fit", device="cpu")
    assert not Path("planted").exists()


@pytest.mark.parametrize("change, error", [
    (lambda f: f["packages"].update(tabpfn="8.1.0"), FormatUnsupported),
    (lambda f: f.pop("packages"), CorruptContext),
    (lambda f: f["base"].pop("tensors"), CorruptContext),
    (lambda f: f["base"].update(tensors={}), BaseMismatch),
    (lambda f: f["base"].update(tensors={"x": 1}), CorruptContext),
    (lambda f: f["numerics"].update(probe={}), CorruptContext),
    (lambda f: f["numerics"].update(probe=None), CorruptContext),
    (lambda f: f.update(format_version=99), FormatUnsupported),
    (lambda f: f.update(format_version=1), FormatUnsupported),
    (lambda f: f.update(format_version=2, packed={}), FormatUnsupported),
])  # fmt: skip
def test_changed_facts(
    fitted: Callable[..., Any],
    change: Callable[[dict[str, Any]], Any],
    error: type[Exception],
    tmp_path: Path,
) -> None:
    contexts.save(fitted(task="regression"), tmp_path / "context")
    rewrite(tmp_path / "context", change)
    with pytest.raises(error):
        contexts.load(tmp_path / "context", device="cpu")


@pytest.mark.parametrize("change", [
    lambda d: d.clear(),
    lambda d: d.update({"class": "Other"}),
    lambda d: d.update({"class": ["TabPFNClassifier"]}),
    lambda d: d.pop("params"),
    lambda d: d.update(engine=None),
    lambda d: d.update(engine=[1]),
    lambda d: d.update(caches=7),
    lambda d: d["fitted"]["v"].pop(),
])  # fmt: skip
def test_changed_trees(wide: Any, change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    contexts.save(wide, tmp_path / "context")
    rewrite_tree(tmp_path / "context", change)
    with pytest.raises(CorruptContext):
        contexts.load(tmp_path / "context", device="cpu")


@pytest.mark.parametrize("change", [
    lambda t: t.pop(TREE),
    lambda t: t.update({TREE: torch.zeros(3)}),
    lambda t: t.update({TREE: t[TREE][:-1].clone()}),
    lambda t: t.update({TREE: torch.frombuffer(bytearray(b"[" * 10**6), dtype=torch.uint8)}),
    lambda t: t.update({TREE: torch.frombuffer(bytearray(b"[1]"), dtype=torch.uint8)}),
    lambda t: t.update({TREE: torch.frombuffer(bytearray(b"[" + b"0," * 4_000_001), dtype=torch.uint8)}),
    lambda t: t.update(more=torch.zeros(3)),
    lambda t: t.pop(next(name for name in t if name.startswith("layers."))),
    lambda t: t.pop("probe.queries"),
    lambda t: t.update({"probe.queries": t["probe.queries"].reshape(1, -1, 1)}),
    lambda t: t.update({"probe.answers": t["probe.answers"].double()}),
])  # fmt: skip
def test_changed_tensors(wide: Any, change: Callable[[dict[str, Any]], Any], tmp_path: Path) -> None:
    contexts.save(wide, tmp_path / "context")
    rewrite_tensors(tmp_path / "context", change)
    with pytest.raises(CorruptContext):
        contexts.load(tmp_path / "context", device="cpu")


def test_damage_is_found(wide: Any, tmp_path: Path) -> None:
    contexts.save(wide, tmp_path / "context")
    file = tmp_path / "context" / "context.safetensors"
    raw = file.read_bytes()
    for at in (*range(len(raw) // 5, len(raw), len(raw) // 5), len(raw) - 9):
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 4]) + raw[at + 1 :])
        with pytest.raises(CorruptContext, match="sha256"):
            contexts.load(tmp_path / "context", device="cpu")
    file.write_bytes(raw[:-5])
    with pytest.raises(CorruptContext):
        contexts.load(tmp_path / "context", device="cpu")


def test_what_cannot_be_held_is_named(
    fitted: Callable[..., Any], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="not a TabPFN estimator"):
        contexts.save(object(), tmp_path / "x")
    constant = estimator(checkpoint(task="regression"), "regression")
    constant.fit(np.random.default_rng(0).normal(size=(20, 3)), np.full(20, 3.5))
    with pytest.raises(UsageError, match=r"every target is 3\.5"):
        contexts.save(constant, tmp_path / "constant")
    with pytest.raises(UsageError, match="not fitted"):
        from tabpfn import TabPFNClassifier

        contexts.save(TabPFNClassifier(), tmp_path / "x")
    encoder = Encoder(ALLOWED)
    with pytest.raises(UsageError, match=r"here\.1 is a pathlib"):
        encoder.encode([1, Path("x")], "here")
    contexts.save(fitted(), tmp_path / "x")
    with pytest.raises(UsageError, match="exists"):
        contexts.save(fitted(), tmp_path / "x")
    from loadstone.context.prefix.store import load_prefix

    with pytest.raises(KindMismatch, match="TabPFN"):
        load_prefix(tmp_path / "x")


def test_objects_keep_values_layout_and_identity() -> None:
    shared = np.arange(6.0).reshape(2, 3)
    values = [
        None, True, -3, 2**70, 1.5, float("inf"), "text", (1, (2,)), {3, 1}, frozenset({"a"}), {"k": 1, 2: (3,)},
        slice(1, None, 2), range(3), np.float64("nan"), np.int8(3), np.str_("s"), np.datetime64("2020-01-02"),
        np.asfortranarray(shared), np.array(["a", None, 1.5], dtype=object), np.array(["xy", "z"]), np.zeros((0, 3)),
        np.array([1, 2], dtype="datetime64[D]"), np.dtype("float32"), torch.float16, torch.Size([2]), shared, shared,
        torch.arange(4, dtype=torch.bfloat16), np.random.RandomState(1), np.random.default_rng(2), np.array(7),
    ]  # fmt: skip
    encoder = Encoder(ALLOWED)
    tree = json.loads(json.dumps(encoder.encode(values, "v")))
    found = Decoder(ALLOWED, encoder.tensors.__getitem__, lambda name: torch.zeros(0)).decode(tree)
    for a, b in zip(values, found, strict=True):
        assert type(a) is type(b)
        if isinstance(a, np.ndarray):
            assert a.dtype == b.dtype and a.shape == b.shape and a.tolist() == b.tolist()
            assert a.flags.f_contiguous == b.flags.f_contiguous
        elif isinstance(a, torch.Tensor):
            assert torch.equal(a, b)
        elif isinstance(a, np.random.RandomState):
            assert a.random_sample() == b.random_sample()
        elif isinstance(a, np.random.Generator):
            assert a.random() == b.random()
        else:
            assert a == b or (a != a and b != b)
    assert found[25] is found[26]


def test_command_line(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = partial(command, capsys)
    for task in TASKS:
        out = tmp_path / task
        fit = fit_command(tmp_path / "train.csv", checkpoint(task=task), task)
        code, printed, err = run(*fit, "--dry-run")
        assert code == 0 and json.loads(printed)["task"] == task, err
        code, printed, err = run(*fit, "--dry-run", "--cache-dtype", "fp8")
        plan = json.loads(printed)
        code, printed, err = run(*fit, "-o", out, "--cache-dtype", "fp8")
        done = json.loads(printed)
        # With the columns that preprocessing adds: components and a fingerprint.
        assert abs(plan["predicted_bytes"] - done["cache_bytes"]) <= 0.01 * done["cache_bytes"]
        assert done["cache_bytes"] < done["bytes"] < done["file_bytes"]
        assert code == 0 and done["cache_dtype"] == "float8_e4m3fn", err
        code, printed, _ = run("inspect", out, "--verify", "--json")
        found = json.loads(printed)
        assert found["context_kind"] == "tabpfn" and found["base"]["found"] and found["packages"]["tabpfn"]
        code, printed, err = run("eval", "-M", out, "--data", tmp_path / "train.csv", "--json", "-")
        assert code == 0 and json.loads(printed)["models"][0]["rows"] == 60, err
        code, printed, err = run("predict", "-M", out, "--data", tmp_path / "train.csv", "--json", "-")
        assert code == 0 and len(next(iter(json.loads(printed)["columns"].values()))) == 60, err
    code, _, err = run("fit", "--table", tmp_path / "train.csv", "--target", "y", "-M", checkpoint(), "-o",
                       tmp_path / "x", "--cache-dtype", "int3")  # fmt: skip
    assert code == 2 and "int3" in err


@pytest.mark.parametrize("name", ["tabpfn_v2", "tabpfn_v3_5"])
def test_pickled_checkpoints(
    checkpoint: Callable[..., Path],
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A ``.ckpt`` gives what the same weights in safetensors do, and one that would run code is refused."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    def run(*arguments: Any) -> tuple[int, str]:
        code, out, err = command(capsys, *arguments)
        return code, out or err

    monkeypatch.chdir(tmp_path)
    with safe_open(checkpoint(name), framework="pt") as handle:
        facts = {key: json.loads(value) for key, value in handle.metadata().items()}
    held = facts | {"state_dict": load_file(checkpoint(name))}
    torch.save(held, "base.ckpt")
    x, y, _ = table("classification")
    x.assign(y=y).to_csv("train.csv", index=False)
    found = []
    for base, out in ((checkpoint(name), "a"), (Path("base.ckpt"), "b")):
        code, said = run(
            "fit", "--table", "train.csv", "--target", "y", "-M", base, "-o", out, "--device", "cpu"
        )
        assert code == 0, said
        code, said = run("predict", "-M", out, "--data", "train.csv", "--json", "-", "--device", "cpu")
        assert code == 0, said
        found.append(json.loads(said)["columns"])
    assert found[0] == found[1]
    torch.save(held | {"planted": _Payload()}, "base.ckpt")
    code, said = run("fit", "--table", "train.csv", "--target", "y", "-M", "base.ckpt", "-o", "c")
    assert code == 3 and "runs no pickled code" in said
    # In the place of a context's base, too.
    code, said = run("predict", "-M", "b", "--data", "train.csv")
    assert code == 3, said
    assert not Path("planted").exists() and not Path("c").exists()
