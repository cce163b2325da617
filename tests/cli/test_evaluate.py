from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loadstone.cli.app import main

FIELDS = {
    "path", "kind", "load_path", "loss", "loss_stderr", "perplexity", "bits_per_byte", "tokens", "documents",
    "delta_loss", "delta_loss_stderr", "tokens_per_second", "load_seconds", "peak_memory_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny model, a noisy copy, and one with another tokenizer."""
    root = tmp_path_factory.mktemp("models")
    torch.set_num_threads(1)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {}
    for name in ("base", "noisy", "other"):
        order = alphabet[::-1] if name == "other" else alphabet
        raw = Tokenizer(models.BPE({c: i for i, c in enumerate([*order, "<end>"])}, []))
        raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=256, initializer_range=0.1, tie_word_embeddings=False,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        if name == "noisy":
            with torch.no_grad():
                model.lm_head.weight += 0.1 * torch.randn_like(model.lm_head.weight)
        model.save_pretrained(root / name)
        PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>").save_pretrained(root / name)
        names[name] = str(root / name)
    return names


def call(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["eval", *args])
    out = capsys.readouterr()
    return int(stop.value.code or 0), out.out, out.err


def test_table(dirs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "-M", dirs["base"], "-M", dirs["noisy"], "--limit", "3")
    assert code == 0
    assert "3 documents" in out and "packed windows of 256" in out and "Δ loss" in out and "reference" in out
    assert "\x1b[" not in out
    assert err.count(dirs["base"]) == 1 and "computing in float32" in err


def test_json_on_stdout_is_all_there_is(dirs: dict[str, str]) -> None:
    command = [sys.executable, "-m", "loadstone", "eval", "-M", dirs["base"], "--limit", "2", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout)
    (record,) = result["models"]
    assert set(record) >= FIELDS and record["delta_loss"] is None
    assert result["protocol"]["context_length"] == 256 and result["gates"] == []
    assert 4 < record["loss"] < 8 and record["tokens"] == result["protocol"]["bytes"]


def test_json_file_and_comparison(
    dirs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.json"
    code, out, _ = call(
        capsys, "-M", dirs["noisy"], "--baseline", dirs["base"], "--limit", "3", "--json", str(file),
        "--fail-if", "dloss>9",
    )  # fmt: skip
    assert code == 0 and "passed" in out
    result = json.loads(file.read_text())
    base, noisy = result["models"]
    assert base["path"] == dirs["base"] and base["reference"] and not noisy["reference"]
    assert noisy["delta_loss"] == pytest.approx(noisy["loss"] - base["loss"], abs=1e-12)
    assert noisy["delta_loss_stderr"] > 0 and base["loss_stderr"] > 0
    assert noisy["delta_loss_interval95"][0] < noisy["delta_loss"] < noisy["delta_loss_interval95"][1]
    assert result["gates"][0]["failed"] is False


def test_divergence_and_speed_tables(dirs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(
        capsys, "-M", dirs["base"], "-M", dirs["noisy"], "--limit", "2", "--kl", "--worst", "1", "--speed",
        "--batch-size", "2",
    )  # fmt: skip
    assert code == 0
    assert "same top-1" in out and "decode tokens/s" in out and "first token ms" in out
    assert out.count("worst token KL") == 1 and f"{dirs['noisy']}: document " in out


def test_gate_failure_exits_4_and_says_by_how_much(
    dirs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.json"
    code, out, err = call(
        capsys, "-M", dirs["noisy"], "--baseline", dirs["base"], "--limit", "2", "--fail-if", "dloss>0.001",
        "--fail-if", "loss<1", "--json", str(file),
    )  # fmt: skip
    assert code == 4
    assert "dloss>0.001 failed by" in err and "against 0.001" in err and "loss<1" not in err
    # The result is kept: a failed gate is when one wants to look at it.
    assert [g["failed"] for g in json.loads(file.read_text())["gates"]] == [True, False] and "failed" in out


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["--data", "absent.txt"], 2, "no file or directory"),
        (["--fail-if", "dloss>0.1"], 2, "needs a baseline"),
        (["--fail-if", "nonsense"], 2, "The form is METRIC"),
        (["--batch-size", "0"], 2, "neither a positive number nor auto"),
        (["--protocol", "odd"], 2, "none of packed, strided, rolling"),
        (["--json", "/nowhere/at/all.json"], 2, "directory does not exist"),
        (["--json", "/tmp"], 2, "--json /tmp is a directory"),
        (["--report", __file__], 2, "is a file"),
        (["--context-length", "0"], 2, "must be at least 2, not 0"),
        (["--dtype", "int3"], 2, "--dtype"),
        (["--device", "cuda:77"], 5, "cuda:77"),
    ],
)
def test_wrong_use(
    dirs: dict[str, str], capsys: pytest.CaptureFixture[str], args: list[str], code: int, message: str
) -> None:
    got, out, err = call(capsys, "-M", dirs["base"], "--limit", "1", *args)
    assert (got, out) == (code, "") and message in err
    assert len([line for line in err.splitlines() if "error" in line]) == 1


def test_a_gate_without_a_figure_fails_and_is_null(
    dirs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One segment of text has no spread, so a difference on it has no confidence bound."""
    (tmp_path / "short.txt").write_text("a few words")
    file = tmp_path / "r.json"
    code, _, err = call(
        capsys, "-M", dirs["noisy"], "--baseline", dirs["base"], "--data", str(tmp_path / "short.txt"),
        "--fail-if", "dloss>9@95", "--json", str(file),
    )  # fmt: skip
    assert code == 4 and "dloss>9@95 failed: the value cannot be determined (nan)" in err
    assert json.loads(file.read_text())["gates"][0]["value"] is None


def test_a_report_without_matplotlib_is_refused_before_the_work(
    dirs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, out, err = call(capsys, "-M", dirs["base"], "--report", str(tmp_path / "report"))
    assert (code, out) == (5, "") and "loadstone[report]" in err and not (tmp_path / "report").exists()


def test_models_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "-M", str(tmp_path / "absent"))[0] == 2
    assert call(capsys, "-M", str(tmp_path))[0] == 3
    code, _, err = call(capsys, "-M", "builtin:tiny-pfn")
    assert code == 2 and "predicts tables" in err and "loadstone fit" in err


def test_another_tokenizer_is_refused(dirs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = call(capsys, "-M", dirs["base"], "-M", dirs["other"], "--limit", "1")
    assert code == 2 and "tokenize the text differently" in err and "bits_per_byte" in err


def test_nan_weights_exit_3(dirs: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = LlamaForCausalLM.from_pretrained(dirs["base"])
    with torch.no_grad():
        model.model.norm.weight *= 1e38
        model.lm_head.weight *= 1e38
    model.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((Path(dirs["base"]) / file).read_bytes())
    code, _, err = call(capsys, "-M", str(tmp_path), "--limit", "1")
    assert code == 3 and "not finite" in err and str(tmp_path) in err


def test_quiet(dirs: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, "--quiet", "-M", dirs["base"], "--limit", "1")
    assert code == 0 and "loss" in out and err == ""


def test_the_command_module_imports_nothing_heavy() -> None:
    code = (
        "import sys, loadstone.cli.evaluate, loadstone.evaluation.results.gates;"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
