"""auto-round's own format: what auto-round itself wrote, decoded to the weights that it computes with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import packed
from tests.helpers import logits

import loadstone
from loadstone.errors import ArtifactError
from loadstone.loading.decoded import dense_view

GOLDEN: dict[str, Any] = json.loads(Path(__file__).with_name("golden_auto_round.json").read_text())


@pytest.mark.parametrize("name", GOLDEN)
def test_weights_are_those_of_auto_rounds_own_layers(name: str, tmp_path: Path) -> None:
    golden = GOLDEN[name]
    artifact = loadstone.detect(packed.write_recorded(tmp_path, golden["tensors"], golden["block"]))
    assert artifact.kind == "auto-round" and loadstone.plan(artifact).load_path == "native-unpacked"
    view = dense_view(artifact, "float32")
    assert {f"{module}.weight" for module in golden["dense"]} == view.tensors.keys()
    for module, expected in golden["dense"].items():
        found = view.source.read(view.tensors[f"{module}.weight"])
        if name == "nvfp4":
            # auto-round multiplies by the reciprocal of the tensor's scale first.
            found = found.bfloat16().float()
        # Zeros have no sign after a product with the identity.
        assert packed.digest(found + 0.0) == expected, module


def rewritten(directory: Path, **block: Any) -> Path:
    """The directory with a block of auto-round's in the place of its own."""
    file = directory / "config.json"
    config = json.loads(file.read_text())
    own = {"quant_method": "auto-round", "data_type": "int", "bits": 4, "group_size": 64, "sym": True}
    file.write_text(json.dumps(config | {"quantization_config": own | block}))
    return directory


def test_a_mixed_model_is_loaded_and_finalized(tmp_path: Path) -> None:
    plain = packed.save_model("llama", tmp_path / "plain", torch.float16)
    four, eight = packed.gptq(plain, tmp_path / "four"), packed.gptq(plain, tmp_path / "eight", bits=8)
    layer = "model.layers.1.mlp.down_proj"
    values = {w: loadstone.load(d, device="cpu").state_dict() for w, d in (("four", four), ("eight", eight))}
    mixed = packed.auto_round(plain, tmp_path / "mixed")
    model = loadstone.load(mixed, device="cpu")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, values["eight" if name.startswith(layer) else "four"][name]), name
    out = loadstone.finalize(mixed, tmp_path / "out", verify=True).out
    assert torch.equal(logits(loadstone.load(out)), logits(model))
    again = loadstone.finalize(
        mixed, tmp_path / "w4", recipe="intx4-weight-only", layout="compressed-tensors", verify=True
    )
    manifest = json.loads((again.out / "loadstone.json").read_text())
    assert manifest["source"]["decoded"] == ["W4A16 g64 and W8A16 g64"]


@pytest.mark.parametrize(
    "block, reason",
    [
        (
            {"packing_format": "auto_round:auto_gptq", "rotation_config": {"block_size": 32}},
            "rotated weights",
        ),
        ({"packing_format": "auto_round:auto_gptq", "act_bits": 8}, "with quantized inputs"),
        ({"packing_format": "auto_round:auto_awq", "bits": 8}, "AWQ of 8 bits"),
        ({"packing_format": "auto_round", "data_type": "mx_int"}, "data type 'mx_int'"),
        (
            {"packing_format": "auto_round:llm_compressor_nvfp4_e5m3", "data_type": "nvfp4_v2"},
            "llm_compressor_nvfp4",
        ),
        ({"packing_format": "auto_round:llm_compressor", "data_type": "nvfp4_v2"}, "data type 'nvfp4_v2'"),
        ({"packing_format": "mlx"}, "packing_format 'mlx'"),
        ({}, "packing_format None"),
        ({"packing_format": ["auto_round"]}, "packing_format"),
    ],
)
def test_what_is_not_decoded_is_said(block: dict[str, Any], reason: str, tmp_path: Path) -> None:
    source = rewritten(packed.gptq(packed.save_model("llama", tmp_path / "plain"), tmp_path / "q"), **block)
    assert loadstone.detect(source).kind == "other-quantizer"
    assert reason in loadstone.plan(source).reason
    with pytest.raises(ArtifactError, match=reason):
        loadstone.finalize(source, tmp_path / "out")


def test_bits_that_the_tensors_do_not_hold(tmp_path: Path) -> None:
    source = packed.gptq(packed.save_model("llama", tmp_path / "plain"), tmp_path / "q")
    name = "model.layers.0.mlp.up_proj.qzeros"

    def halve(tensors: packed.Tensors) -> None:
        tensors[name] = torch.cat([tensors[name]] * 4, 1)

    rewritten(packed.change(source, halve), packing_format="auto_round")
    with pytest.raises(ArtifactError, match=r"up_proj\.qweight' is of 16 bits a value"):
        loadstone.detect(source)
