"""Placement without a GPU: CPU and disk offload through accelerate, and int4 weights packed for CUDA."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import logits

import loadstone
from loadstone.errors import MissingError, UsageError
from loadstone.loading.native import load_native
from loadstone.loading.placement import split_map
from loadstone.loading.repack import unpack_int4_tiles

from .test_native import W4


@pytest.mark.parametrize("arch", ["llama-tied", "qwen3-moe"])
def test_layers_on_disk(make_model: Callable[..., Path], arch: str) -> None:
    path = make_model(arch, max_shard_size="100KB")
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = load_native(loadstone.plan(path), device_map)
    assert model.model.layers[1].self_attn.q_proj.weight.device.type == "meta"
    assert torch.equal(logits(model), logits(loadstone.load(path)))


def test_split_goes_to_disk_when_memory_ends(tiny: Path) -> None:
    device_map = split_map(loadstone.detect(tiny), {"cpu": 150_000})
    assert set(device_map.values()) == {"cpu", "disk"}
    assert torch.equal(logits(load_native(loadstone.plan(tiny), device_map)), logits(loadstone.load(tiny)))


def test_quantized_is_refused_on_disk(tiny: Path, quantize_to: Callable[..., Path]) -> None:
    artifact = loadstone.detect(quantize_to(tiny, W4))
    with pytest.raises(MissingError, match="cannot be offloaded to disk"):
        split_map(artifact, {"cpu": 60_000})


def test_packed_weights_are_placed_and_refused_on_disk(tiny: Path, tmp_path: Path) -> None:
    loadstone.finalize(tiny, tmp_path / "out", recipe="intx4-weight-only", layout="compressed-tensors")
    artifact = loadstone.detect(tmp_path / "out")
    with pytest.raises(MissingError, match="packed weights cannot be mapped from disk"):
        split_map(artifact, {"cpu": 60_000})
    assert set(split_map(artifact, {"cpu": 10**8}).values()) == {"cpu"}


def test_a_checkpoint_on_disk_whose_config_lies_in_its_run(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "run", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "run" / "checkpoint-1").mkdir()
    shutil.copy(tiny / "model.safetensors", tmp_path / "run" / "checkpoint-1")
    artifact = loadstone.detect(tmp_path / "run")
    model = load_native(loadstone.plan(artifact), split_map(artifact, {"cpu": 150_000}))
    assert torch.equal(logits(model), logits(loadstone.load(tiny)))


def test_a_runs_own_format_is_refused_on_disk(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    shutil.copytree(tiny, path, ignore=shutil.ignore_patterns("*.safetensors"))
    state = {k: v for k, v in loadstone.load(tiny).state_dict().items() if k != "lm_head.weight"}
    torch.save(state, path / "pytorch_model_fsdp.bin")
    with pytest.raises(MissingError, match=r"cannot be mapped from disk. Finalize it"):
        split_map(loadstone.detect(path), {"cpu": 150_000})


def test_unpack_int4_tiles() -> None:
    """Against the packing kernel's own loop, written out lane by lane."""
    torch.manual_seed(0)
    n, k = 16, 256
    values = torch.randint(0, 16, (n, k), dtype=torch.int32)
    packed = torch.zeros(n // 8, k // 128, 32, 4, dtype=torch.int64)
    for n_tile in range(n // 8):
        for k_outer in range(k // 128):
            for lane in range(32):
                for pair in range(4):
                    base = k_outer * 128 + pair * 32 + 2 * (lane % 4)
                    row = values[n_tile * 8 + lane // 4]
                    v = [(int(row[base + c]), int(row[base + c + 1])) for c in (0, 8, 16, 24)]
                    word = sum(high << (4 * i) for i, (high, _) in enumerate(v))
                    word |= sum(low << (16 + 4 * i) for i, (_, low) in enumerate(v))
                    packed[n_tile, k_outer, lane, pair] = word
    assert torch.equal(unpack_int4_tiles(packed.to(torch.int32)), values)


def test_no_driver_no_gpu_and_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from loadstone.loading import devices

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices, "_certainly_no_gpu", lambda: True)
    assert devices.quantize_device("auto") == "cpu"
    monkeypatch.setattr(devices, "_certainly_no_gpu", lambda: False)
    assert devices.quantize_device("auto") == "cuda:0" and devices.quantize_device("cpu") == "cpu"


@pytest.mark.parametrize("driver", ["nvidiactl", "dxg", "kfd", "nvhost-gpu"])
def test_a_gpu_shows_by_its_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, driver: str) -> None:
    from loadstone.loading import devices

    monkeypatch.setattr(devices, "Path", lambda folder: tmp_path)
    monkeypatch.setattr(devices.sys, "platform", "linux")
    assert devices._certainly_no_gpu()
    (tmp_path / driver).touch()
    assert not devices._certainly_no_gpu()


def test_a_callers_default_device_changes_nothing(
    tiny: Path, quantize_to: Callable[..., Path], tmp_path: Path
) -> None:
    w4 = quantize_to(tiny, W4)
    expected = logits(loadstone.load(w4))
    text = ["One two three, four five six. " * 100]
    options = {"recipe": "intx4-weight-only", "algorithm": "gptq", "calibrate": text, "calibrate_tokens": 256}
    plain = loadstone.finalize(tiny, tmp_path / "plain", **options).out
    # On a machine without a GPU: numpy and copies refuse tensors on the meta device as they do a GPU's.
    with torch.device("meta"):
        model = loadstone.load(w4)
        found = loadstone.finalize(tiny, tmp_path / "found", **options, verify=True).out
        loadstone.evaluate(w4, baseline=tiny, limit=1, context_length=32, separator="2", kl=True)
        loadstone.export_fakequant(tiny, tmp_path / "fq", format="nvfp4")
        assert torch.get_default_device().type == "meta"
    assert torch.equal(logits(model), expected)
    name = "model.safetensors"
    assert (found / name).read_bytes() == (plain / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": torch.device("cpu")}, r"device\(type='cpu'\) is not known"),
        ({"dtype": torch.float16}, "torch.float16"),
    ],
)
def test_names_are_texts(options: dict[str, Any], says: str, tiny: Path) -> None:
    with pytest.raises(UsageError, match=says):
        loadstone.load(tiny, **options)
    with pytest.raises(UsageError, match="empty text"):
        loadstone.load("")
