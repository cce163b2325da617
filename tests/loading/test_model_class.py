"""Which class a directory's model is, what a refused config is told, and values that a model makes infinite itself."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.helpers import logits
from tests.small_models import make_model

import loadstone
from loadstone.errors import ArtifactError
from loadstone.loading.model_class import load_config

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def change(folder: Path, **config: Any) -> Path:
    found = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in found.items() if v is not None}))
    return folder


def test_a_part_of_a_model_that_transformers_does_not_export(tmp_path: Path) -> None:
    from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionTransformer

    config = transformers.Idefics2Config().vision_config
    config = type(config)(**SIZES, intermediate_size=64, image_size=16, patch_size=8)
    assert not hasattr(transformers, "Idefics2VisionTransformer")
    Idefics2VisionTransformer(config).save_pretrained(tmp_path / "part")
    out = loadstone.finalize(tmp_path / "part", tmp_path / "out", recipe="int8-weight-only").out
    ours, stock = loadstone.load(out), Idefics2VisionTransformer.from_pretrained(out)
    assert type(ours) is Idefics2VisionTransformer
    for name, tensor in stock.state_dict().items():
        found = ours.state_dict()[name]
        assert torch.equal(*((t.dequantize() if hasattr(t, "qdata") else t) for t in (found, tensor)))


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "nothing_yet"}, r"Check model_type: transformers [\d.]+ has no such model"),
        (
            {"model_type": "nothing_yet", "transformers_version": "99.1.0"},
            r"written by transformers 99\.1\.0",
        ),
        ({"hidden_size": "wide"}, "Restore config.json"),
        ({"model_type": "idefics2_vision", "architectures": ["NoSuchClass"]}, r"has no class 'NoSuchClass'"),
    ],
)
def test_what_a_refused_config_is_told(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path / "model")
    change(tmp_path / "model", **config)
    with pytest.raises(ArtifactError, match=says):
        loadstone.finalize(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "complex64", 5])
def test_a_dtype_that_no_model_computes_in(dtype: Any, tiny: Path, tmp_path: Path) -> None:
    source = change(Path(shutil.copytree(tiny, tmp_path / "source")), dtype=dtype)
    for call in (
        lambda: loadstone.load(source),
        lambda: loadstone.load(source, dtype="float32"),
        lambda: loadstone.finalize(source, tmp_path / "out"),
        lambda: loadstone.export_fakequant(source, tmp_path / "out", format="fp8"),
    ):
        with pytest.raises(ArtifactError, match=f"cannot compute in the dtype '{dtype}'"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_flash_attention_that_is_not_here(tiny: Path, gemma3: Path, tmp_path: Path) -> None:
    asked = {"attn_implementation": "flash_attention_2"}
    source = change(Path(shutil.copytree(tiny, tmp_path / "source")), **asked)
    model = loadstone.load(source)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model), logits(loadstone.load(tiny)))
    out = loadstone.finalize(source, tmp_path / "out", recipe="int8-weight-only").out
    assert loadstone.load(out).is_quantized
    # Where it is here, it is used.
    assert json.loads((out / "config.json").read_text())["attn_implementation"] == "flash_attention_2"
    part = Path(shutil.copytree(gemma3, tmp_path / "part"))
    change(part, text_config=json.loads((part / "config.json").read_text())["text_config"] | asked)
    assert loadstone.load(part).config.text_config._attn_implementation == "sdpa"


def test_limits_that_limit_nothing(tmp_path: Path) -> None:
    config = transformers.Gemma4AudioConfig(
        **SIZES, output_proj_dims=32, subsampling_conv_channels=(8, 8), use_clipped_linears=True
    )
    transformers.Gemma4AudioModel(config).save_pretrained(tmp_path / "audio")
    file = tmp_path / "audio" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name, tensor in tensors.items() if tensor.isinf().all())
    for recipe in (None, "int8-weight-only"):
        out = loadstone.finalize(tmp_path / "audio", tmp_path / f"out-{recipe}", recipe=recipe).out
        assert torch.equal(loadstone.load(out).state_dict()[name], tensors[name])
    out = loadstone.export_fakequant(tmp_path / "audio", tmp_path / "fq", format="fp8").out
    assert torch.equal(load_file(next(out.glob("model*.safetensors")))[name], tensors[name])
    # Other infinities, and NaN, are damage.
    weight = next(name for name, tensor in tensors.items() if tensor.dim() == 2)
    for changed, value in ((name, float("nan")), (name, -tensors[name]), (weight, float("inf"))):
        save_file(tensors | {changed: torch.full_like(tensors[changed], float(value))}, file)
        for attempt in (loadstone.load, lambda source: loadstone.finalize(source, tmp_path / "no")):
            with pytest.raises(ArtifactError, match=f"{changed}' holds NaN or infinity"):
                attempt(tmp_path / "audio")


def test_a_config_that_was_exchanged_since_detect(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    artifact = loadstone.detect(tmp_path / "model")
    change(tmp_path / "model", architectures=5)
    with pytest.raises(ArtifactError, match="architectures is not a list"):
        load_config(artifact)
