"""Two artifacts that llm-compressor makes of the built-in model (FP8 dynamic; W4A16 by GPTQ): evaluated with a gate
against their base, with the loss that stock transformers computes.

`LLMCOMPRESSOR=PYTHON make test-serving`, where PYTHON is that of an environment with llm-compressor 0.14.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from tests.helpers import run, stock

import loadstone
from loadstone.artifact.report import collect
from loadstone.loading import load_tokenizer
from loadstone.text.corpus import read_corpus

PYTHON = os.environ.get("LLMCOMPRESSOR")
pytestmark = [
    pytest.mark.serving,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not PYTHON, reason="LLMCOMPRESSOR names no Python with llm-compressor"),
]

MAKE = """
import json, sys, torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
try:
    from llmcompressor.modifiers.gptq import GPTQModifier
except ImportError:
    from llmcompressor.modifiers.quantization import GPTQModifier
source, out, kind, rows = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
if kind == "gptq":
    ids = json.load(open(rows))
    data = Dataset.from_list([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids])
    weights = dict(num_bits=4, type="int", strategy="group", group_size=64, symmetric=True, actorder="static")
    groups = {"group_0": dict(targets=["Linear"], weights=weights)}
    recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"])
    oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=256, num_calibration_samples=len(ids))
else:
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="FP8_DYNAMIC", ignore=["lm_head"]))
model.save_pretrained(out, save_compressed=True)
"""


@pytest.fixture(scope="module", params=["fp8", "gptq"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llm-compressor")
    source, out = loadstone.detect("builtin:tiny-llama").path, folder / request.param
    tokenizer = load_tokenizer(source)
    ids = [tokenizer(text)["input_ids"][:256] for text in read_corpus("stories").documents[:16]]
    (folder / "rows.json").write_text(json.dumps([row for row in ids if len(row) == 256] or ids))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(PYTHON), "-c", MAKE, str(source), str(out), request.param, str(folder / "rows.json")],
        capture_output=True, text=True, env=environment, cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    tokenizer.save_pretrained(out)
    return out


def test_evaluated_with_a_gate_against_its_base(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert loadstone.plan(made).load_path == "native-unpacked"
    assert collect(made).serving == ()
    text = tmp_path / "text.txt"
    text.write_text(read_corpus("sample").documents[0])
    options = ["--data", text, "--baseline", "builtin:tiny-llama", "--dtype", "bfloat16"]
    code, _, err = run(
        capsys, "eval", "-M", made, *options, "--fail-if", "dloss>0.2", "--json", tmp_path / "r.json"
    )
    assert code == 0, err
    record = json.loads((tmp_path / "r.json").read_text())["models"][1]
    code, _, _ = run(capsys, "eval", "-M", made, *options, "--fail-if", "dloss>-5")
    assert code == 4
    # The same tokens by stock transformers: weights of its own unpacking, inputs left as they are.
    theirs = stock(made, dtype=torch.bfloat16)
    tokenizer = load_tokenizer(made)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text.read_text())["input_ids"]]])
    assert record["tokens"] == ids.shape[1] - 1 < 512
    with torch.no_grad():
        first = theirs(ids).logits
        for module in theirs.modules():
            if hasattr(module, "quantization_enabled") or hasattr(module, "quantization_scheme"):
                module.quantization_enabled = False
        plain = theirs(ids).logits
    if "gptq" in made.name:
        assert torch.equal(first, plain)
    loss = torch.nn.functional.cross_entropy(plain[0, :-1].float(), ids[0, 1:])
    assert record["loss"] == pytest.approx(float(loss), abs=2e-5)
    ours, weights = loadstone.load(made), dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter, weights[name]), name
