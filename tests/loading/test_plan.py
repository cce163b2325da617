import logging
import shutil
from pathlib import Path

import pytest
from tests import helpers
from tests.helpers import logits, stock

import loadstone
from loadstone.errors import ArtifactError, MissingError, UsageError
from loadstone.loading.placement import resolve_device, weight_bytes
from loadstone.loading.plan import QUANTIZER_PACKAGES

from .test_native import W4, edit_config


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
    edit_config(path, auto_map={"AutoModelForCausalLM": "evil.Model"}, architectures=["Model"])
    (path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ArtifactError, match=r"auto_map.*--trust-remote-code"):
        loadstone.load(path)


@pytest.fixture
def remote(tiny: Path, tmp_path: Path) -> Path:
    """A model whose class is code in its directory, and of a type that transformers does not have."""
    path = Path(shutil.copytree(tiny, tmp_path / "remote"))
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    edit_config(path, auto_map=auto_map, model_type="own", architectures=["OwnModel"])
    (path / "configuration_own.py").write_text(
        # transformers keeps the first model class that it saw for a config of the same text.
        f"# {tmp_path}\nfrom transformers import LlamaConfig\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
    )
    (path / "modeling_own.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_own import OwnConfig\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return path


def test_trusted_code_is_the_models_class(remote: Path, tiny: Path, tmp_path: Path) -> None:
    import torch

    from loadstone.fakequant import export_fakequant
    from loadstone.finalization.plan import make_plan
    from loadstone.finalization.run import write_plan
    from loadstone.loading.meta import meta_model

    artifact = loadstone.detect(remote)
    with pytest.raises(ArtifactError, match=r"auto_map.*--trust-remote-code"):
        meta_model(artifact)
    assert type(meta_model(artifact, trust_remote_code=True)).__name__ == "OwnModel"
    export_fakequant(
        artifact, tmp_path / "folded", format="fp8", trust_remote_code=True, calibrate=["Some text."]
    )
    write_plan(make_plan(artifact, None, trust_remote_code=True), tmp_path / "out")
    model = loadstone.load(tmp_path / "out", trust_remote_code=True)
    assert type(model).__name__ == "OwnModel" and torch.equal(logits(model), logits(stock(tiny)))


def test_finalize_takes_trusted_code(
    remote: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ("finalize", "-M", remote, "--quantize", "int8-dynamic-act-int4-weight", "-o", tmp_path / "out")
    code, _, error = helpers.run(capsys, *line)
    assert code == 3 and "--trust-remote-code" in error
    (tmp_path / "text.txt").write_text("Some text to calibrate with. " * 40)
    for more in ((), ("--algorithm", "gptq", "--calibrate", tmp_path / "text.txt", "--overwrite")):
        code, _, error = helpers.run(capsys, *line, *more, "--trust-remote-code")
        assert code == 0, error
    assert type(loadstone.load(tmp_path / "out", trust_remote_code=True)).__name__ == "OwnModel"


def test_trusted_code_reaches_the_tokenizer(remote: Path) -> None:
    assert loadstone.loading.load_tokenizer(remote, trust_remote_code=True)("a").input_ids
    plan = loadstone.plan(remote, trust_remote_code=True)
    assert loadstone.loading.load_tokenizer(plan)("a").input_ids


@pytest.mark.parametrize(
    ("line", "error", "says"),
    [
        ("import no_such_package_xyz", MissingError, "no_such_package_xyz"),
        ("raise KeyError('broken')", ArtifactError, "KeyError: 'broken'"),
    ],
)
def test_code_of_the_directory_that_fails_is_said_so(remote: Path, line: str, error: type, says: str) -> None:
    (remote / "modeling_own.py").write_text(line)
    with pytest.raises(error, match=f"its own code .*{says}"):
        loadstone.load(remote, trust_remote_code=True)


def test_remote_code_and_values_that_are_not_finite(remote: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(remote / "model.safetensors")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("inf"))
    save_file(tensors, remote / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"model.norm.weight' holds NaN or infinity"):
        loadstone.load(remote, trust_remote_code=True)


def test_a_directory_with_a_tokenizer_only(tiny: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, tmp_path)
    assert loadstone.loading.load_tokenizer(tmp_path)("a").input_ids


def test_options_that_come_too_late(tiny: Path) -> None:
    with pytest.raises(UsageError, match="device: a plan is loaded as it is"):
        loadstone.load(loadstone.plan(tiny), device="cpu")
    with pytest.raises(UsageError, match="a checkpoint is chosen by detect"):
        loadstone.load(loadstone.detect(tiny), checkpoint="1")


@pytest.mark.parametrize("method", ["aqlm", "quanto"])
def test_other_quantizers_name_their_package(tiny: Path, tmp_path: Path, method: str) -> None:
    path = Path(shutil.copytree(tiny, tmp_path / "copy"))
    edit_config(path, quantization_config={"quant_method": method, "bits": 4})
    assert loadstone.plan(path).load_path == "from_pretrained"
    with pytest.raises(MissingError, match=f"pip install {QUANTIZER_PACKAGES[method][1]}"):
        loadstone.load(path)


def test_devices(tiny: Path) -> None:
    artifact = loadstone.detect(tiny)
    assert resolve_device("cpu", artifact) is None
    for device in ("tpu", "cuda:x", 0):
        with pytest.raises(UsageError, match="One of auto, cpu"):
            resolve_device(device, artifact)
        with pytest.raises(UsageError, match="One of auto, cpu"):
            loadstone.plan(tiny, device=device)


def test_auto_counts_the_dtype_that_is_asked_for(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate.utils

    artifact = loadstone.detect(tiny)
    free = {0: int(weight_bytes(artifact) * 1.5), "cpu": 10**9}
    monkeypatch.setattr(accelerate.utils, "get_max_memory", lambda: free)
    assert weight_bytes(artifact, "float32") == 2 * weight_bytes(artifact)
    assert resolve_device("auto", artifact) == {"": "cuda:0"}
    spread = resolve_device("auto", artifact, "float32")
    assert set(spread.values()) == {0, "cpu"}


def test_auto_leaves_what_only_transformers_knows_to_it(
    remote: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import accelerate.utils

    monkeypatch.setattr(accelerate.utils, "get_max_memory", lambda: {0: 10_000, "cpu": 10**9})
    assert resolve_device("auto", loadstone.detect(remote)) == "auto"


def test_cuda_that_is_not_there(tiny: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(MissingError, match="no CUDA device is visible"):
        loadstone.load(tiny, device="cuda")


def test_unknown_dtype(tiny: Path) -> None:
    with pytest.raises(UsageError, match="float32"):
        loadstone.plan(tiny, dtype="int3")


def test_mx_tensors_in_float16(tiny: Path, quantize_to) -> None:
    path = quantize_to(tiny, "mxfp8-dynamic-act-mxfp8-weight")
    with pytest.raises(UsageError, match=r"--dtype float16: .* MX tensors.*Use --dtype bfloat16"):
        loadstone.load(path, dtype="float16")
