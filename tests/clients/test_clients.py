"""Programs of others on our artifacts, as their users run them: `make test-clients` (docs/serving.md has the table)."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import loadstone

PROMPT = "Once upon a time"


@contextmanager
def serving(model: Path) -> Iterator[str]:
    """The address of a `transformers serve` of one model, stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = "from transformers.cli.transformers import main; main()"
    options = ["serve", str(model), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen([sys.executable, "-c", start, *options])
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except (urllib.error.URLError, TimeoutError):
                assert process.poll() is None, "the server ended"
                time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def ask(address: str, model: Path, **options: Any) -> str:
    body = {"model": str(model), "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 8}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        json.dumps(body | options).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=240) as answer:
        text: str = answer.read().decode()
    return text


@pytest.mark.clients("`transformers serve`, whole and streamed")
def test_transformers_serve(artifact: Path) -> None:
    with serving(artifact) as address:
        whole = json.loads(ask(address, artifact, temperature=0))["choices"][0]["message"]["content"]
        lines = ask(address, artifact, temperature=0, stream=True).splitlines()
    events = [json.loads(x.removeprefix("data: ")) for x in lines if x.startswith("data: {")]
    parts = [e["choices"][0]["delta"].get("content") or "" for e in events if e["choices"]]
    assert whole.strip() and "".join(parts).strip() == whole.strip()


@pytest.mark.clients("`pipeline`")
def test_pipeline(artifact: Path) -> None:
    from transformers import AutoTokenizer, pipeline

    write = pipeline("text-generation", model=str(artifact), device="cpu")
    found = write(PROMPT, max_new_tokens=8, do_sample=False)[0]["generated_text"]
    model, tokenizer = loadstone.load(artifact), AutoTokenizer.from_pretrained(artifact)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    expected = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert found == tokenizer.decode(expected[0], skip_special_tokens=True)


@pytest.mark.clients("PEFT on `loadstone.load`: train, save, reload")
def test_peft(artifact: Path, kind: str, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    ids = torch.randint(10, 400, (2, 32))
    model = get_peft_model(loadstone.load(artifact), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        if not loss.requires_grad and kind == "int8-dynamic-act-int4-weight":
            pytest.xfail("torchao's products with rounded inputs have no gradient")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "lora")
    again = PeftModel.from_pretrained(loadstone.load(artifact), tmp_path / "lora")
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.clients("`lm_eval`, equal to `eval --tasks`")
def test_lm_eval(artifact: Path, tmp_path: Path) -> None:
    rows = [{"text": f"The {word} went to the"} for word in ("cat", "dog", "bird", "fox", "bear", "king")]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "clients_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "d.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_choice": [" park", " shop", " house"],
        "doc_to_target": 0,
        "metric_list": [
            {"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")
        ],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "t.yaml").write_text(yaml.safe_dump(task))
    # In the stored dtype: torchao's products do not compute in another one after a stock load.
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={artifact},dtype=bfloat16",
        "--tasks", "clients_choice", "--include_path", str(tmp_path / "tasks"), "--device", "cpu",
        "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, text=True)
    (result,) = (tmp_path / "out").rglob("*.json")
    theirs = json.loads(result.read_text())["results"]["clients_choice"]
    found = loadstone.evaluate(
        artifact, dtype="bfloat16", limit=6, tasks=["clients_choice"], task_path=tmp_path / "tasks"
    )
    ours = {score["metric"]: score["value"] for score in found.records[0]["tasks"]}
    assert ours == {metric: theirs[f"{metric},none"] for metric in ("acc", "acc_norm")}


@pytest.mark.clients("`SentenceTransformer` of an encoder (compressed-tensors: see below)")
def test_sentence_transformer(
    kind: str, tmp_path_factory: pytest.TempPathFactory, make_artifact: Callable[[Path, str], Path]
) -> None:
    source = _sentence_encoder(tmp_path_factory)
    least = 0.999 if kind == "int8-weight-only" else 0.98
    assert _cosines(source, make_artifact(source, kind)).min() >= least


@pytest.mark.clients
@pytest.mark.parametrize("recipe", ["int8-weight-only", "int8-dynamic-act-int8-weight"])
def test_sentence_transformer_of_a_served_encoder(
    recipe: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = _sentence_encoder(tmp_path_factory)
    loadstone.finalize(source, tmp_path / "out", recipe=recipe, layout="compressed-tensors")
    assert _cosines(source, tmp_path / "out").min() >= 0.999


def _cosines(source: Path, artifact: Path) -> np.ndarray:
    """Between the embeddings of an encoder and of what was made of it, for a few texts."""
    from sentence_transformers import SentenceTransformer
    from transformers import CompressedTensorsConfig

    texts = ["iron", "the stone shows the way", "a ship at sea", "nobody knows why it rains"]
    expected = SentenceTransformer(str(source), device="cpu").encode(texts)
    options = {}
    if loadstone.detect(artifact).quant_method == "compressed-tensors":
        # It calls the model's forward itself, and compressed-tensors unpacks in a hook of the model's call.
        options = {"model_kwargs": {"quantization_config": CompressedTensorsConfig(dequantize=True)}}
    found = SentenceTransformer(str(artifact), device="cpu", **options).encode(texts)
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    return np.asarray((found * expected).sum(1) / norms)


_ENCODER: list[Path] = []


def _sentence_encoder(factory: pytest.TempPathFactory) -> Path:
    """A small BERT that sentence-transformers wrote, with a pooling and a dense module."""
    if not _ENCODER:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import Dense, Pooling, Transformer
        from transformers import BertConfig, BertModel, BertTokenizerFast

        base = factory.mktemp("bert")
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *list("abcdefghijklmnopqrstuvwxyz")]
        words += [f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz"]
        (base / "vocab.txt").write_text("\n".join(words))
        torch.manual_seed(1)
        config = BertConfig(
            vocab_size=len(words),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=128,
        )
        BertModel(config).save_pretrained(base)
        BertTokenizerFast(str(base / "vocab.txt")).save_pretrained(base)
        modules = [Transformer(str(base)), Pooling(64), Dense(64, 32)]
        SentenceTransformer(modules=modules, device="cpu").save(str(base / "sentence"))
        _ENCODER.append(base / "sentence")
    return _ENCODER[0]


@pytest.mark.clients("`Trainer` goes on beside `finalize`")
def test_trainer_resumes(source: Path, kind: str, tmp_path: Path) -> None:
    from tests.clients.conftest import ARTIFACTS
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    rows = [{"input_ids": (ids := torch.arange(10 * i + 5, 10 * i + 37)), "labels": ids} for i in range(8)]

    def train(folder: str, resume: str | None = None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        arguments = TrainingArguments(
            str(tmp_path / folder), max_steps=4, save_steps=2, per_device_train_batch_size=2, report_to=[],
            use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(AutoModelForCausalLM.from_pretrained(source), arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=resume)
        return dict(trainer.model.state_dict())

    whole = train("run")
    first = tmp_path / "run" / "checkpoint-2"
    loadstone.finalize(first, tmp_path / "out", **ARTIFACTS[kind])
    resumed = train("again", str(first))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert torch.isfinite(loadstone.load(tmp_path / "out")(torch.arange(9)[None]).logits).all()


@pytest.mark.clients("`accelerate launch`, two processes as one")
def test_accelerate_launch(artifact: Path) -> None:
    command = ["-m", "loadstone", "eval", "-M", str(artifact), "--limit", "4", "--json", "-"]
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    losses = []
    for prefix in ([], launch):
        done = subprocess.run([sys.executable, *prefix, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        losses.append(json.loads(done.stdout)["models"][0]["loss"])
    assert losses[0] == losses[1]


@pytest.mark.clients("`safetensors`: read, write, load again")
def test_safetensors(artifact: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    for shard in copy.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as opened:
            metadata = opened.metadata()
        save_file(load_file(shard), shard, metadata=metadata)
    # The manifest holds hashes of the files as they were written.
    (copy / "loadstone.json").unlink(missing_ok=True)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(loadstone.load(copy)(ids).logits, loadstone.load(artifact)(ids).logits)
