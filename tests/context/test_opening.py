"""Contexts of every kind: public names, and versions that are no longer read."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tests.helpers import run

from loadstone.artifact.context_errors import FormatUnsupported
from loadstone.artifact.context_file import FORMAT_VERSIONS, PFN, PREFIX, TABPFN, read_context
from loadstone.writing.contexts import write_context


@pytest.mark.parametrize("room", ["pfn", "tabpfn", "prefix", "bayesopt", "tables"])
def test_public_names_exist(room: str) -> None:
    package = import_module(f"loadstone.context.{room}")
    assert package.__all__ and all(hasattr(package, name) for name in package.__all__)


@pytest.mark.parametrize("kind", [PFN, TABPFN, PREFIX])
@pytest.mark.parametrize("change", [-1, 1])
def test_other_versions_are_refused_with_the_remedy(
    kind: str, change: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    version = FORMAT_VERSIONS[kind] + change
    out = write_context(tmp_path / "context", {"x": torch.zeros(2)}, {"kind": kind}, overwrite=False)
    facts = json.loads((out / "context.json").read_text())
    (out / "context.json").write_text(json.dumps(facts | {"format_version": version}))
    with pytest.raises(
        FormatUnsupported, match="Fit the context again" if change < 0 else "Update loadstone"
    ):
        read_context(out)
    code, printed, err = run(capsys, "inspect", out)
    assert code == 3 and f"version {version}" in printed + err
