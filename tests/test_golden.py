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


def test_loss_of_the_source() -> None:
    assert _recorder().record({"source"})["source loss"] == pytest.approx(EXPECTED["source loss"], rel=1e-6)


@pytest.mark.parametrize(("table", "name"), ROWS, ids=[f"{t}-{n}" for t, n in ROWS])
def test_bytes_and_loss(table: str, name: str) -> None:
    row = _recorder().record({name})[table][name]
    expected = EXPECTED[table][name]
    assert row["weights"] == expected["weights"]
    assert row["block"] == expected["block"]
    if "loss" in expected:
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-6)
