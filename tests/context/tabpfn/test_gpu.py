"""TabPFN contexts on a CUDA device: every device pair, what lies where and when, and what saving and loading take.

What a loaded estimator predicts is held to what the live one predicts once the package has moved it to that device:
the same arithmetic, so the same bits (but for what the package varies from run to run). Devices are compared loosely.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers import run as command

pytest.importorskip("tabpfn")

from tests.context.tabpfn.checkpoints import SIZES, estimator, fit_command, table, write_checkpoint

from loadstone.artifact.torchao.flatten import tensor_bytes
from loadstone.context.tabpfn import estimator as contexts
from loadstone.context.tabpfn.classes import ALLOWED
from loadstone.context.tabpfn.object_tree import Encoder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible"),
]
TASKS = ("classification", "regression")
PAIRS = [("cpu", "cpu"), ("cpu", "cuda"), ("cuda", "cpu"), ("cuda", "cuda")]
MODES = ("fit_with_cache", "fit_preprocessors", "low_memory")
# Wide and deep enough that the caches outweigh the base's weights many times.
LARGE = {"embed_dim": 64, "nlayers": 4, "icl_num_heads": 4, "decoder_head_dim": 16}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("checkpoints")

    def make(name: str = "tabpfn_v3_5", task: str = "classification", **changes: Any) -> Path:
        path = folder / f"{name}-{task}-{len(changes)}.safetensors"
        return path if path.exists() else write_checkpoint(path, name, task, **changes)

    return make


def predict(model: Any, new: Any) -> np.ndarray:
    return np.asarray(model.predict_proba(new) if hasattr(model, "predict_proba") else model.predict(new))


def tensors_of(model: Any) -> dict[str, torch.Tensor]:
    encoder = Encoder(ALLOWED)
    contexts._tree(model, encoder)
    return encoder.tensors


def where(model: Any) -> set[str]:
    """The kinds of device on which any tensor of a fitted estimator lies, its models' too."""
    tensors = [*tensors_of(model).values(), *contexts.base_state(model).values()]
    for held in model.executor_.model_caches:
        for copy in held._models.values():
            tensors += [*copy.parameters(), *copy.buffers()]
    return {tensor.device.type for tensor in tensors}


def check_pair(model: Any, new: Any, load_on: str, folder: Path, loose: float) -> None:
    """Save where it was fitted, load on ``load_on``, twice; predictions as the live estimator's there."""
    first = predict(model, new)
    at = [t.device for t in contexts.cache_tensors(model)]
    contexts.save(model, folder / "one")
    assert [t.device for t in contexts.cache_tensors(model)] == at, "saving moved the caches"
    found = contexts.load(folder / "one", device=load_on)
    assert {t.device.type for t in contexts.cache_tensors(found)} <= {"cpu"}, "a cache went ahead"
    predicted = predict(found, new)
    # A second context, of the loaded estimator: nothing was lost on the way.
    contexts.save(found, folder / "two")
    second = contexts.load(folder / "two", device=load_on)
    one, two = tensors_of(model), tensors_of(second)
    assert one.keys() == two.keys()
    assert all(tensor_bytes(one[name]) == tensor_bytes(two[name]) for name in one)
    again = predict(second, new)
    model.to(load_on)
    live = predict(model, new)
    spread = float(np.abs(predict(model, new) - live).max())
    for values in (predicted, again):
        assert float(np.abs(values - live).max()) <= 2 * spread
    apart = float(np.abs(predicted - first).max() / max(1.0, np.abs(first).max()))
    print(f"{load_on}: {apart:.2e} from where it was fitted; the package varies by {spread:.1e}")
    assert apart <= loose


@pytest.mark.parametrize("fit_on, load_on", PAIRS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task", TASKS)
def test_device_pairs(
    checkpoint: Callable[..., Path], task: str, mode: str, fit_on: str, load_on: str, tmp_path: Path
) -> None:
    x, y, new = table(task)
    model = estimator(
        checkpoint(task=task), task, device=fit_on, fit_mode=mode, inference_precision=torch.float32
    )
    check_pair(model.fit(x, y), new, load_on, tmp_path, loose=0 if fit_on == load_on else 1e-4)


@pytest.mark.parametrize("fit_on, load_on", PAIRS[1:])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", sorted(set(SIZES) - {"tabpfn_v3_5"}))
def test_device_pairs_of_every_architecture(
    checkpoint: Callable[..., Path], name: str, task: str, fit_on: str, load_on: str, tmp_path: Path
) -> None:
    x, y, new = table(task)
    model = estimator(checkpoint(name, task), task, device=fit_on, inference_precision=torch.float32)
    # Those before v3 draw numbers on the device that they compute on, so devices differ in the package itself.
    loose = 1e-4 if name == "tabpfn_v3" else 0.1
    check_pair(model.fit(x, y), new, load_on, tmp_path, loose=0 if fit_on == load_on else loose)


@pytest.mark.parametrize("fit_on, load_on", PAIRS[1:])
@pytest.mark.parametrize("precision", ["int8", "fp8", "auto", "adaptive"])
@pytest.mark.parametrize("task", TASKS)
def test_device_pairs_of_every_cache(
    checkpoint: Callable[..., Path], task: str, precision: str, fit_on: str, load_on: str, tmp_path: Path
) -> None:
    """Under the package's own precision: autocast on the GPU, float32 on the CPU."""
    x, y, new = table(task)
    model = estimator(checkpoint(task=task), task, device=fit_on, kv_cache_precision=precision).fit(x, y)
    check_pair(model, new, load_on, tmp_path, loose=0 if fit_on == load_on else 0.1)
    kinds = {t.dtype for t in contexts.cache_tensors(contexts.load(tmp_path / "one", device=load_on))}
    wanted = {"fp8": torch.float8_e4m3fn, "int8": torch.int8}.get(precision)
    assert wanted is None or wanted in kinds


def big(checkpoint: Callable[..., Path], task: str) -> tuple[Any, Any]:
    """An estimator fitted on the GPU, and rows to predict."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(40_000, 4))
    y = x[:, 0] if task == "regression" else (x[:, 0] > 0).astype(int)
    path = checkpoint(task=task, **LARGE)
    model = estimator(path, task, device="cuda", kv_cache_precision="auto", ignore_pretraining_limits=True)
    return model.fit(x, y), x[:20]


def allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    # Work space of the matrix library stays with the process, not with an estimator.
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("task", TASKS)
def test_caches_wait_on_the_cpu_and_moving_leaves_nothing(
    checkpoint: Callable[..., Path], task: str, tmp_path: Path
) -> None:
    model, new = big(checkpoint, task)
    contexts.save(model, tmp_path / "context")
    cache = sum(t.nbytes for t in contexts.cache_tensors(model))
    weights = sum(t.nbytes for t in contexts.base_state(model).values())
    assert cache > 4 * weights
    del model
    left = []
    for _ in range(2):
        empty = allocated()
        torch.cuda.reset_peak_memory_stats()
        found = contexts.load(tmp_path / "context", device="cuda")
        taken, peak = allocated() - empty, torch.cuda.max_memory_allocated() - empty
        assert weights * 0.9 <= taken <= peak <= weights + cache / 4, "caches went to the GPU at loading"
        assert {t.device.type for t in contexts.cache_tensors(found)} == {"cpu"}
        predict(found, new)
        assert {t.device.type for t in contexts.cache_tensors(found)} == {"cuda"}
        assert allocated() - empty >= weights * 0.9 + cache
        found.to("cpu")
        assert where(found) == {"cpu"}
        left.append(allocated() - empty)
        predict(found, new)
        found.to("cuda")
        assert where(found) >= {"cuda"} and {t.device.type for t in contexts.cache_tensors(found)} == {"cuda"}
        del found
    print(f"base {weights}, cache {cache}, left behind by the first and the second {left}")
    # The first time libraries may keep something of their own; an estimator leaves nothing.
    assert left[1] <= 4096, left


@pytest.mark.parametrize("task", TASKS)
def test_saving_takes_little_memory_of_the_gpu(
    checkpoint: Callable[..., Path], task: str, tmp_path: Path
) -> None:
    model, new = big(checkpoint, task)
    expected = predict(model, new)
    at = {id(t): t.data_ptr() for t in contexts.cache_tensors(model)}
    gc.collect()
    torch.cuda.synchronize()
    # With the work space of the matrix library, 32 MiB on this card, which that prediction took.
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    contexts.save(model, tmp_path / "context")
    # Tensors take none; two rows are predicted for the probe.
    peak, cache = (
        torch.cuda.max_memory_allocated() - before,
        sum(t.nbytes for t in contexts.cache_tensors(model)),
    )
    print(f"saving: peak {peak} of a cache of {cache}")
    assert peak <= cache / 2 and torch.cuda.memory_allocated() <= before
    assert at == {id(t): t.data_ptr() for t in contexts.cache_tensors(model)}
    assert where(model) >= {"cuda"}
    found = contexts.load(tmp_path / "context", device="cuda")
    spread = float(np.abs(predict(model, new) - expected).max())
    assert float(np.abs(predict(found, new) - expected).max()) <= 2 * spread


@pytest.mark.parametrize("task", TASKS)
def test_command_line(
    checkpoint: Callable[..., Path], task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: Any) -> dict[str, Any]:
        code, out, err = command(capsys, *arguments)
        assert not code, err
        return dict(json.loads(out))

    fit = fit_command(tmp_path / "train.csv", checkpoint(task=task), task)
    run(*fit, "-o", tmp_path / "fitted", "--device", "cuda")
    found = {
        device: run(
            "predict",
            "-M",
            tmp_path / "fitted",
            "--data",
            tmp_path / "train.csv",
            "--json",
            "--device",
            device,
        )
        for device in ("cpu", "cuda")
    }
    columns = [list(found[device]["columns"].values())[-1] for device in ("cpu", "cuda")]
    assert np.allclose(*columns, atol=0.1)
