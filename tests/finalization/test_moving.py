"""torchao artifacts in the serving layout: not a value changes, and the file is what finalize writes at once."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import loadstone
from loadstone.errors import UsageError
from loadstone.finalization import units

RECIPES = [
    "intx4-weight-only",
    "intx4-weight-only:mapping=asymmetric,group_size=64",
    "intx4-weight-only:bits=8,rounding=mse",
    "int8-weight-only",
    "int8-weight-only:granularity=tensor",
    "int8-dynamic-act-int8-weight",
    "float8-weight-only",
    "mxfp4-dynamic-act-mxfp4-weight",
    "mxfp8-dynamic-act-mxfp8-weight",
]


def stored(path: Path) -> dict[str, bytes]:
    artifact = loadstone.detect(path)
    return {n: (path / t.file).read_bytes()[t.begin : t.end] for n, t in artifact.tensors.items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_moving_gives_the_bytes_of_finalizing_at_once(
    recipe: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loadstone.finalize(tiny, tmp_path / "torchao", recipe=recipe)
    loadstone.finalize(tiny, tmp_path / "direct", recipe=recipe, layout="compressed-tensors")
    monkeypatch.setattr(units, "BLOCK", 1 << 10)
    done = loadstone.finalize(
        tmp_path / "torchao", tmp_path / "moved", layout="compressed-tensors", verify=True
    )
    assert done.verified
    assert stored(tmp_path / "moved") == stored(tmp_path / "direct")
    moved, direct = (loadstone.detect(tmp_path / name) for name in ("moved", "direct"))
    assert moved.config == direct.config
    assert moved.kind == "compressed-tensors"


def test_experts_are_divided(make_model: Callable[..., Path], tmp_path: Path) -> None:
    source = make_model("qwen3-moe")
    loadstone.finalize(source, tmp_path / "torchao", recipe="float8-weight-only")
    loadstone.finalize(source, tmp_path / "direct", recipe="float8-weight-only", layout="compressed-tensors")
    assert (
        len(loadstone.detect(tmp_path / "torchao").quantized["model.layers.0.mlp.experts.down_proj"].shape)
        == 3
    )
    loadstone.finalize(tmp_path / "torchao", tmp_path / "moved", layout="compressed-tensors")
    assert stored(tmp_path / "moved") == stored(tmp_path / "direct")


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("int8-dynamic-act-int4-weight", "has no serving layout"),
        ("nvfp4-weight-only", "schemes or scales differ"),
    ],
)
def test_what_cannot_be_moved(recipe: str, said: str, tiny: Path, tmp_path: Path) -> None:
    loadstone.finalize(tiny, tmp_path / "torchao", recipe=recipe)
    with pytest.raises(UsageError, match=said):
        loadstone.finalize(tmp_path / "torchao", tmp_path / "moved", layout="compressed-tensors")
    assert not (tmp_path / "moved").exists()


def test_a_layout_needs_something_quantized(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="about quantized weights"):
        loadstone.finalize(tiny, tmp_path / "out", layout="compressed-tensors")


@pytest.mark.parametrize("family", ["llama-tied", "qwen3-moe"])
@pytest.mark.parametrize("recipe", ["intx4-weight-only:mapping=asymmetric", "nvfp4-weight-only"])
def test_a_packed_artifact_is_a_source_like_a_dense_one(
    recipe: str, family: str, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded to plain weights, or quantized again from these."""
    loadstone.finalize(make_model(family), tmp_path / "packed", recipe=recipe, layout="compressed-tensors")
    monkeypatch.setattr(units, "BLOCK", 1 << 10)
    loadstone.finalize(tmp_path / "packed", tmp_path / "dense")
    dense, packed = loadstone.load(tmp_path / "dense"), loadstone.load(tmp_path / "packed")
    assert loadstone.detect(tmp_path / "dense").kind == "dense"
    for name, parameter in packed.named_parameters():
        assert torch.equal(dense.get_parameter(name), parameter), name
    for source in ("packed", "dense"):
        loadstone.finalize(tmp_path / source, tmp_path / f"{source}-int8", recipe="int8-weight-only")
    assert stored(tmp_path / "packed-int8") == stored(tmp_path / "dense-int8")
