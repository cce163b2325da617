"""bitsandbytes' formats: what it stored itself, decoded to the bits that it gives, and refused where damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import packed
from tests.helpers import run

import loadstone
from loadstone.errors import ArtifactError
from loadstone.loading.decoded import dense_view

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("golden_bitsandbytes.json").read_text())
UP = "model.layers.0.mlp.up_proj"
NAME = f"{UP}.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


def write(directory: Path, name: str, **block: Any) -> Path:
    return packed.write_recorded(
        directory, GOLDEN[name]["tensors"], block or {"quant_method": "bitsandbytes"}
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_weights_are_those_that_bitsandbytes_decodes(name: str, tmp_path: Path) -> None:
    artifact = loadstone.detect(write(tmp_path, name))
    assert artifact.kind == "bitsandbytes" and loadstone.plan(artifact).load_path == "native-unpacked"
    view = dense_view(artifact, GOLDEN[name]["dtype"])
    assert list(view.tensors) == [NAME]
    found = view.source.read(view.tensors[NAME])
    assert packed.digest(found) == GOLDEN[name]["dense"]
    view.source.check_values({})
    with view.source.opened() as (unread, _):
        for part in ((slice(3, 17), slice(None)), (slice(0, 24), slice(9, 40))):
            assert torch.equal(unread[NAME][part].to(dtype=found.dtype), found[part])
    for start, stop in ((0, 1), (100, 500), (found.numel() - 7, found.numel())):
        assert torch.equal(view.source.read(view.tensors[NAME], start, stop), found.flatten()[start:stop])


def test_a_weight_is_rounded_to_the_dtype_that_was_quantized(tmp_path: Path) -> None:
    artifact = loadstone.detect(write(tmp_path, "nf4"))
    wide, narrow = (dense_view(artifact, dtype) for dtype in ("float32", "bfloat16"))
    found = wide.source.read(wide.tensors[NAME])
    assert torch.equal(found, narrow.source.read(narrow.tensors[NAME]).float())


@pytest.mark.parametrize("block", [{"load_in_4bit": True}, {"load_in_4bit": True, "quant_method": None}])
def test_blocks_without_a_method(block: dict[str, Any], tmp_path: Path) -> None:
    assert loadstone.detect(write(tmp_path, "nf4", **block)).kind == "bitsandbytes"


def _state(**changes: Any) -> Callable[[packed.Tensors], Any]:
    def edit(tensors: packed.Tensors) -> None:
        state = json.loads(bytes(tensors[STATE].tolist())) | changes
        tensors[STATE] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    return edit


DAMAGES: dict[str, tuple[str, Callable[[packed.Tensors], Any], str]] = {
    "no state": ("nf4 double", lambda t: t.pop(STATE), "is uint8|is U8 and has no scales"),
    "no JSON": ("nf4", lambda t: t[STATE].fill_(1), "is not JSON"),
    "shape": ("nf4", _state(shape=[24, 65]), "takes"),
    "no matrix": ("nf4", _state(shape=[1536]), "none of a matrix"),
    "many sides": ("nf4", _state(shape=[4_000_000_000] * 1000), "none of a matrix"),
    "blocks": ("nf4", _state(blocksize=0), "says blocksize 0"),
    "offset": ("nf4 double", _state(nested_offset=float("nan")), "says nested_offset nan"),
    "offset of 400 digits": ("nf4 double", _state(nested_offset=10**400), "says nested_offset 1000"),
    "dtype": ("nf4", _state(dtype="int8"), "no dtype of float16"),
    "dtype that is none": ("nf4", _state(dtype=["bfloat16"]), "no dtype of float16"),
    "deep JSON": (
        "nf4",
        lambda t: t.update({STATE: torch.full((9999,), ord("["), dtype=torch.uint8)}),
        "is not JSON",
    ),
    "no factors": ("nf4", lambda t: t.pop(f"{NAME}.absmax"), "has no absmax beside it"),
    "no map": ("nf4 double", lambda t: t.pop(f"{NAME}.nested_quant_map"), "has no nested_quant_map"),
    "values cut": ("nf4", lambda t: t.update({NAME: t[NAME][:-1].clone()}), "not two values a byte"),
    "no values": ("nf4", lambda t: t.pop(NAME), "has no values beside it"),
    "table": ("nf4", lambda t: t[f"{NAME}.quant_map"].mul_(0.9), "is not the table of NF4"),
    "negative factor": ("nf4", lambda t: t[f"{NAME}.absmax"].neg_(), "not above zero"),
    "no rows": ("int8", lambda t: t.pop(f"{UP}.SCB"), "is I8 and has no scales"),
    "no int8": ("int8", lambda t: t.pop(NAME), "has no int8 matrix beside it"),
    "column order": ("int8", lambda t: t[f"{UP}.weight_format"].fill_(2), "another order of values"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    name, edit, message = DAMAGES[damage]
    directory = packed.change(write(tmp_path, name), edit)
    with pytest.raises(ArtifactError, match=message) as error:
        view = dense_view(loadstone.detect(directory))
        view.source.read(view.tensors[NAME])
    assert UP in error.value.message


def test_the_commands_take_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = packed.nf4(packed.save_model("llama", tmp_path / "plain"), tmp_path / "nf4")
    code, out, _ = run(capsys, "inspect", source)
    assert code == 0 and "NF4 g64" in out
    code, out, err = run(capsys, "finalize", "-M", source, "-o", tmp_path / "out", "--dry-run")
    assert code == 0 and "from NF4 g64" in out, err
    code, _, err = run(capsys, "eval", "-M", source, "--native-kernels", "--device", "cpu")
    assert code == 5 and "pip install bitsandbytes" in err
