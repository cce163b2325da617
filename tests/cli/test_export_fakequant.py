"""The command: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.helpers import run

NAME = "export-fakequant"


def test_export_then_inspect(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out [bold]"
    code, stdout, _ = run(capsys, NAME, "-M", tiny, "--format", "nvfp4", "-o", out)
    assert code == 0 and f"{out}: 14 weights fake-quantized" in stdout and "as it is: embedding" in stdout
    code, stdout, _ = run(capsys, "inspect", out, "--verify", "--json")
    facts = json.loads(stdout)
    assert code == 0 and facts["kind"] == "fakequant" and facts["verified"] is True
    path = out / "fakequant_manifest.json"
    path.write_text(path.read_text().replace("nvfp4", "mxfp4", 1))
    code, stdout, _ = run(capsys, "inspect", out, "--verify")
    assert code == 3 and "fakequant_manifest.json: content differs" in stdout


def test_json(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Call me Ishmael. Some years ago, never mind how long precisely.")
    args = ("-M", tiny, "--format", "fp8", "--calibrate", text, "-o", tmp_path / "out", "--json", "-q")
    code, stdout, stderr = run(capsys, NAME, *args)
    result = json.loads(stdout)
    assert code == 0 and stderr == "" and result["folded"] == result["quantizers"] == 14
    assert result["sha256"].keys() >= {
        "config.json",
        "fakequant_state.safetensors",
        "fakequant_manifest.json",
    }


def test_dry_run_writes_nothing(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, stdout, _ = run(capsys, NAME, "-M", tiny, "--format", "int8", "--dry-run", "-o", tmp_path / "out")
    assert code == 0 and "nothing was written" in stdout and not any(tmp_path.iterdir())
    code, stdout, _ = run(capsys, NAME, "-M", tiny, "--format", "int8", "--dry-run", "--json")
    assert json.loads(stdout)["folded"] == 14


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--format", "nvfp", "-o", "{tmp}/o"], 2, "Did you mean 'nvfp4'"),
        (["-o", "{tmp}/o"], 2, "no format is named"),
        (["--format", "fp8"], 2, "needs -o OUT"),
        (["--format", "fp8", "-o", "{tmp}"], 2, "exists"),
        (["--format", "fp8", "-o", "{tiny}/o"], 2, "overlap"),
        (["--format", "fp8", "-o", "{tmp}/o", "--rules", "{tmp}/none.yaml"], 2, "there is no rules file"),
        (["--format", "fp8", "-o", "{tmp}/o", "--activations"], 2, "--calibrate FILE"),
        (["--format", "fp8", "-o", "{tmp}/o", "--remote-code", "run"], 2, "strip, copy"),
        (["--format", "fp8", "-o", "{tmp}/o", "-M", "{tmp}"], 3, "is not a model directory"),
        (["--format", "fp8", "-o", "{tmp}/o", "--device", "cuda:77"], 5, "layers.0.mlp.down_proj.weight"),
    ],
)
def test_wrong_use(
    args: list[str],
    code: int,
    says: str,
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [a.format(tmp=tmp_path, tiny=tiny) for a in args]
    found, stdout, stderr = run(capsys, NAME, *([] if "-M" in given else ["-M", tiny]), *given)
    assert (found, stdout) == (code, "") and says in stderr and stderr.count("error:") == 1
    assert not any(tmp_path.iterdir())


def test_words_are_checked_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from loadstone.cli import main\n"
        "try: main(['export-fakequant', '-M', 'x', '--format', 'fp9', '-o', 'y'])\n"
        "except SystemExit as stop: print(stop.code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "2 False False", done.stderr
