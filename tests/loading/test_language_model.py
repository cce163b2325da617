"""Models that are no causal language models through every command: what they are told works when it is done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.small_models import make_tokenizer

import loadstone
from loadstone.artifact.report import collect
from loadstone.cli.inspect import _plan
from loadstone.errors import LoadstoneError

SIZES: dict[str, Any] = {
    "vocab_size": 400, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
DISTILBERT = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}
# Class -> config class, options, and what stock transformers runs it on.
MODELS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "BertModel": ("BertConfig", {}, ("input_ids",)),
    "BertForMaskedLM": ("BertConfig", {}, ("input_ids",)),
    "BertForSequenceClassification": ("BertConfig", {}, ("input_ids",)),
    "DistilBertForQuestionAnswering": ("DistilBertConfig", DISTILBERT, ("input_ids",)),
    "LlamaModel": ("LlamaConfig", {}, ("input_ids",)),
    "LlamaForSequenceClassification": ("LlamaConfig", {}, ("input_ids",)),
    "T5EncoderModel": ("T5Config", T5, ("input_ids",)),
    "T5ForConditionalGeneration": ("T5Config", T5, ("input_ids", "decoder_input_ids")),
    "ViTForImageClassification": ("ViTConfig", {"image_size": 32, "patch_size": 8}, ("pixel_values",)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``saved(class name)``: the directory of a random model with a tokenizer, made once."""
    made: dict[str, Path] = {}
    tokenizer = make_tokenizer()

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "model"
            torch.manual_seed(0)
            config = getattr(transformers, MODELS[name][0])(**SIZES | MODELS[name][1])
            getattr(transformers, name)(config).save_pretrained(made[name])
            tokenizer.save_pretrained(made[name])
            (made[name] / "prompt.txt").write_text("Once upon a time")
        return made[name]

    return make


def runs(path: Path, name: str) -> bool:
    """Whether the directory loads as what was saved and gives finite outputs."""
    inputs = {x: torch.zeros((1, 8), dtype=torch.long) for x in MODELS[name][2]}
    if "pixel_values" in inputs:
        inputs = {"pixel_values": torch.zeros((1, 3, 32, 32))}
    model = loadstone.load(path)
    with torch.no_grad():
        out: Any = model(**inputs)[0]
    return type(model).__name__ == name and bool(out.isfinite().all())


def export(path: Path, out: Path, **options: Any) -> Any:
    return loadstone.export_fakequant(path, out, format="fp8", **options)


def calibrated(path: Path, out: Path, recipe: str, **options: Any) -> Any:
    return loadstone.finalize(path, out, recipe=recipe, calibrate="sample", calibrate_tokens=256, **options)


SERVED: dict[str, Any] = {"layout": "compressed-tensors"}
NVFP4 = "nvfp4-dynamic-act-nvfp4-weight"
COMMANDS: dict[str, Callable[[Path, Path], Any]] = {
    "eval": lambda path, out: loadstone.evaluate(path, limit=1),
    "eval --stream": lambda path, out: loadstone.evaluate(path, limit=1, stream=True),
    "fit": lambda path, out: loadstone.fit(path, out, prompt=path / "prompt.txt"),
    "finalize --calibrate": lambda path, out: calibrated(path, out, "intx4-weight-only"),
    "finalize nvfp4": lambda path, out: calibrated(path, out, NVFP4, **SERVED),
    "export --calibrate": lambda path, out: export(path, out, calibrate="sample", calibrate_limit=1),
}
# What an error says to do -> doing it.
ADVICE: dict[str, Callable[[Path, Path, str], Any]] = {
    "Load it with loadstone.load, and measure it on its own task": lambda path, out, name: runs(path, name),
    "Name one with -M": lambda path, out, name: True,
    "Use a rounding that needs no text: affine, mse or hqq": lambda path, out, name: [
        loadstone.finalize(path, out / r, recipe=f"intx4-weight-only:rounding={r}")
        for r in ("affine", "mse", "hqq")
    ],
    "Leave them plain by a rule of a recipe file, or use nvfp4-weight-only": lambda path, out, name: (
        loadstone.finalize(path, out, recipe="nvfp4-weight-only", **SERVED)
    ),
    "Leave --calibrate out, and quantize weights alone or inputs by a dynamic format": lambda path, out, name: (
        export(path, out)
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_commands_advise_works(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    path, told = saved(name), set()
    for number, (command, act) in enumerate(COMMANDS.items()):
        try:
            act(path, tmp_path / f"out{number}")
        except LoadstoneError as error:
            told.add(error.remedy)
        else:
            assert command not in ("eval", "eval --stream", "fit"), command
    for number, advice in enumerate(told):
        assert ADVICE[advice](path, tmp_path / f"done{number}", name), advice


@pytest.mark.parametrize("layout", ["torchao", "compressed-tensors"])
@pytest.mark.parametrize("name", MODELS)
def test_what_finalize_writes_has_no_problem(
    name: str, layout: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    loadstone.finalize(saved(name), tmp_path / "out", recipe="int8-weight-only", layout=layout)
    report = collect(tmp_path / "out")
    assert [str(p) for p in (*report.problems, *report.serving)] == []
    assert runs(tmp_path / "out", name)


@pytest.mark.parametrize(
    ("name", "recipe"), [*((name, "") for name in MODELS), ("LlamaModel", "int8-weight-only")]
)
def test_inspect_and_load_agree_without_architectures(
    name: str, recipe: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "model"
    if recipe:
        loadstone.finalize(saved(name), path, recipe=recipe)
    else:
        shutil.copytree(saved(name), path)
    assert _plan(collect(path))[1] == []
    config = json.loads((path / "config.json").read_text())
    del config["architectures"]
    (path / "config.json").write_text(json.dumps(config))
    (refusal,) = _plan(collect(path))[1] or [None]
    if refusal is None:
        loadstone.load(path)
        return
    assert "names no architectures" in refusal.message and '"architectures"' in refusal.remedy
    for act in (loadstone.load, loadstone.evaluate):
        with pytest.raises(LoadstoneError, match="names no architectures"):
            act(path)
    (path / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
    assert runs(path, name)
