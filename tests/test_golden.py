"""What commands write for the model in the package, and its losses, equal those recorded in tests/golden."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).with_name("golden")
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "tiny_llama.json").read_text())
ROWS = [(table, name) for table in ("finalized", "exported") for name in EXPECTED[table]]


def _recorder() -> Any:
    spec = importlib.util.spec_from_file_location("golden_record", GOLDEN / "record.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _close(loss: float, row: dict[str, Any]) -> Any:
    """``loss`` to the last digits that the processors of both runs share."""
    return pytest.approx(loss, rel=1e-6 if row["machine"] == EXPECTED["machine"] else 5e-4)


def test_loss_of_the_source() -> None:
    found = _recorder().record({"source"})
    assert found["source loss"] == _close(EXPECTED["source loss"], found)


@pytest.mark.parametrize(("table", "name"), ROWS, ids=[f"{t}-{n}" for t, n in ROWS])
def test_bytes_and_loss(table: str, name: str) -> None:
    found = _recorder().record({name})
    row, expected = found[table][name], EXPECTED[table][name]
    if found["machine"] == EXPECTED["machine"] or name not in ("int4 gptq", "int8 smoothquant"):
        assert row["weights"] == expected["weights"]
    assert row["block"] == expected["block"]
    if "loss" in expected:
        assert row["loss"] == _close(expected["loss"], found)
