import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.helpers import run

W4 = "int8-dynamic-act-int4-weight"


def test_finalize_then_json(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "w4"
    code, stdout, stderr = run(capsys, "finalize", "-M", tiny, "--quantize", W4, "-o", out, "--json")
    assert code == 0
    result = json.loads(stdout)
    assert result["recipe"] == W4 and result["bytes_after"] < result["bytes_before"]
    assert (out / "loadstone.json").is_file()
    assert json.loads((out / "loadstone.json").read_text())["recipe"] == W4
    assert stderr.count("load path") == 1


def test_table(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, stdout, stderr = run(
        capsys, "finalize", "-M", tiny, "--quantize", W4, "-o", tmp_path / "o", "--quiet"
    )
    assert code == 0 and "quantize (int8-dynamic-act-int4-weight)" in stdout and stderr == ""


def test_dry_run_writes_nothing(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, stdout, _ = run(
        capsys, "finalize", "-M", tiny, "--quantize", W4, "-o", tmp_path / "out", "--dry-run"
    )
    assert (
        code == 0
        and "Would write this quantization_config" in stdout
        and '"quant_method": "torchao"' in stdout
    )
    assert not any(tmp_path.iterdir())


def test_list_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    code, stdout, _ = run(capsys, "finalize", "--list-recipes", "--json")
    recipes = {r["name"]: r for r in json.loads(stdout)}
    assert code == 0 and recipes[W4]["stored_bits"] == 8.75
    assert run(capsys, "finalize", "--list-recipes")[0] == 0


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (
            ["-M", "{tiny}", "--quantize", "int8-weight", "-o", "{tmp}/o"],
            2,
            "Did you mean 'int8-weight-only'",
        ),
        (["-M", "{tiny}x", "-o", "{tmp}/o"], 2, "there is no directory"),
        (["-M", "{tmp}", "-o", "{tmp}/o"], 3, "is not a model directory"),
        (["-M", "{tiny}", "-o", "{tmp}"], 2, "exists"),
        (["-M", "{tiny}"], 2, "-o OUT"),
        (["-M", "{tiny}", "-o", "{tmp}/o", "--skip", "x"], 2, "--quantize"),
        (["-M", "{tiny}", "-o", "{tmp}/o", "--max-shard-size", "big"], 2, "500MB"),
        (["-M", "{tiny}", "-o", "{tmp}/o", "--dtype", "int4"], 2, "float32"),
        (
            [
                "-M",
                "{tiny}",
                "-o",
                "{tmp}/o",
                "--quantize",
                "nvfp4-dynamic-act-nvfp4-weight",
                "--device",
                "cpu",
            ],
            5,
            "Use nvfp4-weight-only",
        ),
    ],
)
def test_wrong_use(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], code: int, says: str
) -> None:
    got, stdout, stderr = run(capsys, "finalize", *[a.format(tiny=tiny, tmp=tmp_path) for a in args])
    lines = [line for line in stderr.splitlines() if "error:" in line]
    assert got == code and len(lines) == 1 and says in lines[0], stderr
    assert stdout == "" and not any(tmp_path.iterdir())


def test_already_quantized(
    tiny: Path, quantize_to, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is decoded, and the manifest says what it was before."""
    code, _, stderr = run(
        capsys, "finalize", "-M", quantize_to(tiny, W4), "--quantize", W4, "-o", tmp_path / "o"
    )
    assert code == 0, stderr
    manifest = json.loads((tmp_path / "o" / "loadstone.json").read_text())
    assert manifest["source"]["decoded"] == [W4] and manifest["recipe"] == W4


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadstone", "finalize", "-M", str(tmp_path), "-o", str(tmp_path / "o")]
    plain = subprocess.run(command, capture_output=True, text=True, check=False)
    debug = subprocess.run([*command, "--debug"], capture_output=True, text=True, check=False)
    assert plain.returncode == 3 and "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr


def test_sigterm_leaves_nothing(smollm2: Path, tmp_path: Path) -> None:
    import signal
    import time

    command = [sys.executable, "-m", "loadstone", "finalize", "-M", str(smollm2), "-o", str(tmp_path / "o")]
    process = subprocess.Popen([*command, "--quantize", W4], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (tmp_path / ".o.partial").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert not (tmp_path / "o").exists()
