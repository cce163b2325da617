"""The command line stays light: what runs in every shell prompt may not import a deep-learning stack."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "artifact"))

from builders import dense, torchao

HEAVY = (
    "torch", "transformers", "datasets", "torchao", "accelerate", "numpy", "safetensors", "pandas", "pydantic",
)  # fmt: skip

# Runs the command line in this process, then says on stderr what got imported.
PROBE = """
import sys
from loadstone.cli import main
try:
    main(sys.argv[1:])
finally:
    print("IMPORTED", *sorted(m for m in sys.modules if "." not in m), file=sys.stderr)
"""


def imported(code: str, *args: str) -> set[str]:
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("IMPORTED")]
    return set(line.split())


def test_the_probe_sees_what_is_imported() -> None:
    assert "colorsys" in imported("import colorsys" + PROBE, "--version")


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["--version"],
        ["inspect", "--help"],
        ["finalize", "--help"],
        ["eval", "--help"],
        ["fit", "--help"],
    ],
    ids=" ".join,
)
def test_help_is_light(args: list[str]) -> None:
    assert not imported(PROBE, *args) & set(HEAVY)


@pytest.mark.parametrize("make", [dense, torchao])
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_inspect_is_light(tmp_path: Path, make, options: list[str]) -> None:
    assert not imported(PROBE, "inspect", str(make(tmp_path / "m")), *options) & set(HEAVY)


def test_the_library_is_light_until_it_loads(tmp_path: Path) -> None:
    dense(tmp_path / "m")
    code = (
        "import sys, loadstone; loadstone.detect(sys.argv[1]); loadstone.plan(sys.argv[1]);"
        "print('IMPORTED', *sys.modules, file=sys.stderr)"
    )
    assert not imported(code, str(tmp_path / "m")) & set(HEAVY)
