"""GPTQ and AWQ as gptqmodel itself wrote them, decoded to the weights that its layers multiply by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests import packed

import loadstone
from loadstone.errors import ArtifactError
from loadstone.loading.decoded import dense_view

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("golden_gptqmodel.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_weights_are_those_of_gptqmodels_layers(name: str, tmp_path: Path) -> None:
    golden = GOLDEN[name]
    artifact = loadstone.detect(packed.write_recorded(tmp_path, golden["tensors"], golden["block"]))
    assert loadstone.plan(artifact).load_path == "native-unpacked"
    view = dense_view(artifact, golden["dtype"])
    for module, expected in golden["dense"].items():
        assert packed.digest(view.source.read(view.tensors[f"{module}.weight"])) == expected, module


@pytest.mark.parametrize("name, key", [("v2", "checkpoint_format"), ("awq", "version")])
def test_a_layout_that_is_named_once(name: str, key: str, tmp_path: Path) -> None:
    golden = GOLDEN[name]
    block = {k: v for k, v in golden["block"].items() if k not in ("checkpoint_format", "version", "method")}
    view = dense_view(
        loadstone.detect(packed.write_recorded(tmp_path, golden["tensors"], block)), golden["dtype"]
    )
    for module, expected in golden["dense"].items():
        assert packed.digest(view.source.read(view.tensors[f"{module}.weight"])) == expected, module
    for other in ({"format": "marlin"}, {key: "gemv", "format": block["format"]}):
        artifact = loadstone.detect(packed.write_recorded(tmp_path, golden["tensors"], block | other))
        assert artifact.kind == "other-quantizer" and not artifact.packed


def test_the_first_pattern_that_fits_decides(tmp_path: Path) -> None:
    golden = GOLDEN["other bits by pattern"]
    kinds = {}
    for label, rules in {
        "written": golden["block"]["dynamic"],
        "by name": {"model.layers.0.self_attn.v_proj": {"bits": 8, "group_size": 16}},
        "first": {r".*\.v_proj": {"bits": 8, "group_size": 16}, "+:.*v_": {"bits": 2}},
    }.items():
        directory = tmp_path / label
        directory.mkdir()
        block = golden["block"] | {"dynamic": rules}
        artifact = loadstone.detect(packed.write_recorded(directory, golden["tensors"], block))
        kinds[label] = sorted(weight.type for weight in artifact.packed.values())
    assert kinds["written"] == kinds["by name"] == kinds["first"] == ["W4A16 g32", "W8A16 g16"]


@pytest.mark.parametrize(
    "rules, message",
    [
        ({}, r"v_proj\.qzeros' is I32"),
        ({".*v_proj": {"bits": "8"}}, "is of '8' bits a value"),
        ({".*v_proj": {"bits": 2}}, "v_proj"),
        ({"(": {}}, "is not a regular expression"),
        ({"(a+)+b": {}}, "could take for ever"),
        ({".*": 8}, "has no settings"),
        ([8], "dynamic is not an object"),
    ],
)
def test_patterns_that_cannot_be_right(rules: Any, message: str, tmp_path: Path) -> None:
    golden = GOLDEN["other bits by pattern"]
    packed.write_recorded(tmp_path, golden["tensors"], golden["block"] | {"dynamic": rules})
    with pytest.raises(ArtifactError, match=message):
        loadstone.detect(tmp_path)
