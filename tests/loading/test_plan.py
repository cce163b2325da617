import logging
import shutil
from pathlib import Path

import pytest

import loadstone
from loadstone.errors import ArtifactError, MissingError, UsageError
from loadstone.loading.devices import resolve_device
from loadstone.loading.plan import QUANTIZER_PACKAGES

from .test_native import W4, edit_config, logits, stock


@pytest.fixture
def run(tiny: Path, tmp_path: Path) -> Path:
    """A training run of two checkpoints whose weights differ."""
    import torch

    root = tmp_path / "run"
    for step in (1, 2):
        model = stock(tiny)
        with torch.no_grad():
            model.model.embed_tokens.weight += step
        model.save_pretrained(root / f"checkpoint-{step}")
    shutil.copy(tiny / "tokenizer.json", root)
    shutil.copy(tiny / "tokenizer_config.json", root)
    return root


def test_the_detection_line_appears_once(tiny: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="loadstone"):
        loadstone.load(tiny)
    assert [r.getMessage() for r in caplog.records if "load path" in r.getMessage()] == [
        f"{tiny}: dense; load path: native (plain tensors in safetensors)"
    ]


def test_checkpoint_chooses_within_a_run(run: Path) -> None:
    import torch

    newest, first = loadstone.load(run), loadstone.load(run, checkpoint="1")
    assert torch.equal(logits(newest), logits(stock(run / "checkpoint-2")))
    assert torch.equal(logits(first), logits(stock(run / "checkpoint-1")))
    assert not torch.equal(logits(newest), logits(first))
    assert loadstone.loading.load_tokenizer(run)("a").input_ids


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        ({"checkpoint": "some/checkpoint-3"}, "--checkpoint some/checkpoint-3"),
        ({"no_checkpoint": True}, "--no-checkpoint"),
    ],
)
def test_flags_that_a_quantized_artifact_overrides(
    tiny: Path, quantize_to, caplog: pytest.LogCaptureFixture, options: dict, flag: str
) -> None:
    import torch

    path = quantize_to(tiny, W4)
    with caplog.at_level(logging.INFO, logger="loadstone"):
        model = loadstone.load(path, **options)
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and warnings[0].startswith(f"{flag} is overridden") and str(path) in warnings[0]
    assert torch.equal(logits(model), logits(loadstone.load(path)))


def test_flags_that_exclude_each_other(tiny: Path) -> None:
    with pytest.raises(UsageError, match="exclude"):
        loadstone.plan(tiny, checkpoint="1", no_checkpoint=True)


def test_no_checkpoint_on_a_run_without_weights_of_its_own(run: Path) -> None:
    with pytest.raises(UsageError, match="holds checkpoints and no weights of its own"):
        loadstone.plan(run, no_checkpoint=True)


def test_remote_code_is_off_until_asked_for(tiny: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(tiny, tmp_path / "copy"))
    edit_config(path, auto_map={"AutoModelForCausalLM": "evil.Model"})
    (path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ArtifactError, match=r"auto_map.*--trust-remote-code"):
        loadstone.load(path)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "bitsandbytes"])
def test_other_quantizers_name_their_package(tiny: Path, tmp_path: Path, method: str) -> None:
    path = Path(shutil.copytree(tiny, tmp_path / "copy"))
    edit_config(path, quantization_config={"quant_method": method, "bits": 4})
    assert loadstone.plan(path).load_path == "from_pretrained"
    with pytest.raises(MissingError, match=f"pip install {QUANTIZER_PACKAGES[method][1]}"):
        loadstone.load(path)


def test_devices(tiny: Path) -> None:
    artifact = loadstone.detect(tiny)
    assert resolve_device("cpu", artifact) is None
    with pytest.raises(UsageError, match="One of auto, cpu"):
        resolve_device("tpu", artifact)


def test_cuda_that_is_not_there(tiny: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(MissingError, match="no CUDA device is visible"):
        loadstone.load(tiny, device="cuda")


def test_unknown_dtype(tiny: Path) -> None:
    with pytest.raises(UsageError, match="float32"):
        loadstone.plan(tiny, dtype="int3")
