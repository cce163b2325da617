"""Every quantizer that the installed transformers knows: each command works, or says what is wrong and names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import packed
from tests.helpers import run
from tests.small_models import make_tokenizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

UP = "model.layers.0.mlp.up_proj"
COMMANDS: dict[str, tuple[Any, ...]] = {
    "inspect": ("inspect", "SOURCE"),
    "eval": ("eval", "-M", "SOURCE", "--data", "TEXT", "--separator", 1, "--json", "RESULT"),
    "finalize": ("finalize", "-M", "SOURCE", "-o", "OUT"),
    "export": ("export-fakequant", "-M", "SOURCE", "--format", "int8", "-o", "OUT"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = packed.save_model("llama", tmp_path_factory.mktemp("plain") / "model")
    make_tokenizer(vocabulary=300).save_pretrained(directory)
    return directory


def block_of(method: str) -> dict[str, Any]:
    """What transformers writes of a quantizer by default, where it does without the quantizer's package."""
    if method.startswith("bitsandbytes"):
        return {"quant_method": "bitsandbytes", f"load_in_{method[-4:]}": True}
    try:
        block = AUTO_QUANTIZATION_CONFIG_MAPPING[method]().to_dict()
        return json.loads(json.dumps(block)) | {"quant_method": method}
    except Exception:
        return {"quant_method": method}


def write(plain: Path, out: Path, method: str, *, packed: bool) -> Path:
    """The model with the method's config; ``packed``: one weight in integers, of no layout in particular."""
    shutil.copytree(plain, out)
    config = json.loads((out / "config.json").read_text()) | {"quantization_config": block_of(method)}
    (out / "config.json").write_text(json.dumps(config))
    if packed:
        tensors = load_file(out / "model.safetensors")
        shape = tensors.pop(f"{UP}.weight").shape
        tensors[f"{UP}.qweight"] = torch.zeros(shape[0], shape[1] // 8, dtype=torch.int32)
        tensors[f"{UP}.scale"] = torch.ones(shape[0], 1)
        save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("Once upon a time there was a stone that knew the way. ")
    return file


@pytest.mark.parametrize(
    "is_packed, commands",
    [
        pytest.param(True, ("eval", "finalize"), id="packed"),
        pytest.param(True, tuple(COMMANDS), id="packed, all", marks=pytest.mark.slow),
        pytest.param(False, tuple(COMMANDS), id="plain, all", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("method", AUTO_QUANTIZATION_CONFIG_MAPPING)
def test_a_command_works_or_names_the_quantizer(
    method: str,
    is_packed: bool,
    commands: tuple[str, ...],
    plain: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write(plain, tmp_path / "source", method, packed=is_packed)
    name = "bitsandbytes" if method.startswith("bitsandbytes") else method
    result = tmp_path / "result.json"

    def call(command: str, source: Path) -> tuple[int, str, str]:
        places = {"SOURCE": source, "TEXT": text, "RESULT": result, "OUT": tmp_path / command}
        return run(capsys, *(places.get(part, part) for part in COMMANDS[command]))

    for command in commands:
        code, out, err = call(command, source)
        assert code in (0, 3, 5), (command, err)
        says = any(each in out + err for each in (name, UP, "quantization_config"))
        assert code == 0 or says, (command, err)
        assert command in ("inspect", "eval") or code, "a checkpoint was made of weights that nobody decoded"
        assert not (tmp_path / command).exists()
        if command == "eval" and code == 0:
            assert not is_packed
            found = json.loads(result.read_text())["models"][0]["loss"]
            call("eval", plain)
            assert found == json.loads(result.read_text())["models"][0]["loss"]
