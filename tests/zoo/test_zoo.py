"""One model of each kind of architecture through the checks of the zoo; `make zoo` tries every type."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.zoo.__main__ import try_type
from tests.zoo.process import Process
from tests.zoo.table import FAULTLESS, faults, write_table

# Causal, GPT-2's Conv1D, experts in one tensor, a weight that is read outside a layer's call, encoder and decoder,
# masked, two towers, image and text, sound, convolutions, a tensor without a dot in its name, an embedding that is a
# parameter, weights renamed on load, a generation config of its own, one float32 layer in a bfloat16 model, tied
# Linears, a part of another model.
KINDS = (
    *(
        "llama",
        "gpt2",
        "qwen3_moe",
        "mamba",
        "t5",
        "bert",
        "clip",
        "llava_next",
        "wav2vec2",
        "resnet",
        "bart",
    ),
    *("perceiver", "mistral_large4", "diffusion_gemma", "switch_transformers", "zamba", "got_ocr2_vision"),
)
# No weight of theirs can be quantized.
REFUSED = {("gpt2", "int8-weight-only"), ("resnet", "int8-weight-only")}
COLUMNS = ("load", "plain", "int8-weight-only", "export nvfp4")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], dict[str, Any]]]:
    """The entry of a model type, made once."""
    stock, loadstone = Process("stock"), Process("loadstone")
    known: dict[str, dict[str, Any]] = {}

    def get(model_type: str) -> dict[str, Any]:
        if model_type not in known:
            folder = tmp_path_factory.mktemp("zoo")
            known[model_type] = try_type(model_type, list(COLUMNS), folder, stock, loadstone)
        return known[model_type]

    yield get
    stock.close()
    loadstone.close()


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("kind", KINDS)
def test_kind(kind: str, column: str, results: Callable[[str], dict[str, Any]]) -> None:
    entry = results(kind)
    assert not entry["no_inputs"]
    status, detail, _ = entry["results"][column]
    assert status in FAULTLESS and (status != "refused" or (kind, column) in REFUSED), f"{status}: {detail}"


def test_most_types_have_a_model() -> None:
    """The rules make a configuration of every type, but for those that `exceptions` cannot mend."""
    from tests.zoo.classes import model_types
    from tests.zoo.configs import tiny_config

    wrong = {}
    for model_type in model_types():
        try:
            tiny_config(model_type)
        except Exception as error:
            wrong[model_type] = str(error)
    assert len(wrong) <= 4, wrong


def test_table_names_reasons_and_faults(tmp_path: Path) -> None:
    right, refused = ["right", "", 0.1], ["refused", "exit 3: LlamaModel has 7 odd tensors", 0.1]
    results = {
        "llama": {"class": "a.b:LlamaModel", "results": {"load": right, "plain": refused}},
        "bert": {"class": "a.b:BertModel", "results": {"load": ["exit 1", "boom", 0.1], "plain": refused}},
        "timm": {"none": "needs timm"},
    }
    write_table(json.loads(json.dumps(results)), tmp_path / "support.md")
    text = (tmp_path / "support.md").read_text()
    assert "| llama | LlamaModel | right | a |" in text
    assert "| bert | BertModel | **exit 1** | a |" in text
    assert "- **a**: exit N: CLASS has N odd tensors" in text
    assert "- needs timm: timm" in text
    assert set(faults(results)) == {("exit 1", "boom")}
