"""`inspect` of contexts whose fields are of other types, or hold terminal codes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "artifact"))
from builders import write_safetensors

from loadstone.artifact.context_file import CONTEXT_TENSORS, digest
from loadstone.artifact.hashing import sha256_file
from loadstone.cli import context_facts
from loadstone.errors import ArtifactError

GOOD: dict[str, Any] = {
    "format": "loadstone-context",
    "kind": "pfn",
    "base": {"tensors": {}, "architecture": {"width": 8, "layers": 1, "heads": 1}, "source": None, "fingerprint": "f"},
    "cache": {"dtype": "float32", "layers": 1},
    "numerics": {"torch": "2", "device": "cpu", "dtype": "float32"},
    "task": "classification", "rows": 1, "features": 1, "schema": {"names": ["a"]}, "classes": [],
    "encoder": {}, "contains_training_labels": True,
}  # fmt: skip


def write(directory: Path, change: dict[str, Any]) -> None:
    import json

    from loadstone.artifact.context_file import CONTEXT_JSON, FORMAT_VERSIONS

    directory.mkdir()
    tensors = directory / CONTEXT_TENSORS
    write_safetensors(tensors, {"x": ("F32", (1,))})
    entry = {"bytes": tensors.stat().st_size, "sha256": sha256_file(tensors)}
    facts = GOOD | {"format_version": FORMAT_VERSIONS["pfn"], "files": {CONTEXT_TENSORS: entry}} | change
    (directory / CONTEXT_JSON).write_text(json.dumps(facts | {"digest": digest(facts)}))


@pytest.mark.parametrize(
    "change",
    [
        {"schema": {"names": 3}},
        {"schema": {"names": [1, 2]}},
        {"cache": {"dtype": "float32"}},
        {"cache": {"dtype": "float32", "layers": [1], "members": 0}, "numerics": {}},
        {"base": GOOD["base"] | {"source": 7}},
        {"base": GOOD["base"] | {"architecture": {"models": 7}}},
    ],
)
def test_fields_of_other_types(tmp_path: Path, change: dict[str, Any]) -> None:
    write(tmp_path / "c", change)
    with pytest.raises(ArtifactError, match="a field is missing or of another type"):
        context_facts.inspect(tmp_path / "c", verify=True, json_to=None)


def test_no_terminal_codes_and_no_megabytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "c", {"task": "\x1b[2Jx" + "y" * 100_000})
    assert context_facts.inspect(tmp_path / "c", verify=True, json_to=None) is None
    out = capsys.readouterr().out
    assert "\x1b[2J" not in out and len(out) < 10_000
