"""What only a GPU can show; run with ``-m gpu``."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from loadstone.evaluation.fast.replace import speed_up
from loadstone.evaluation.options import Options
from loadstone.evaluation.run import run
from loadstone.evaluation.scoring.batching import choose_batch_size
from loadstone.evaluation.scoring.losses import BatchMaker, plan_batches, score, token_losses
from loadstone.text.corpus import read_corpus
from loadstone.text.tokenizing import tokenize
from loadstone.text.tokens import make_protocol, make_windows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_gpu_and_cpu_agree(model_dir: Path, worse_dir: Path) -> None:
    options = Options((str(model_dir), str(worse_dir)), limit=10, divergence=True, dtype="float32")
    cpu, gpu = (run(replace(options, device=device)) for device in ("cpu", "cuda"))
    for a, b in zip(cpu.records, gpu.records, strict=True):
        assert b["device"].startswith("cuda") and b["loss"] == pytest.approx(a["loss"], abs=1e-4)
    assert gpu.records[1]["kl"] == pytest.approx(cpu.records[1]["kl"], rel=1e-2)


@pytest.mark.parametrize("vocabulary", [1000, 32_000, 262_144])
def test_losses_over_large_vocabularies(vocabulary: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    logits = 10 + 4 * torch.randn((1 << 23) // vocabulary, vocabulary, device="cuda", generator=generator)
    targets = torch.randint(vocabulary, (len(logits),), device="cuda", generator=generator)
    apart = token_losses(logits, targets).double() - token_losses(logits.double(), targets)
    assert apart.mean().abs() < 1e-6 and apart.abs().max() < 6e-6
    rounded = logits.bfloat16()
    assert torch.equal(token_losses(rounded, targets), token_losses(rounded.float(), targets))


def test_batch_size_does_not_matter_and_auto_fits(model_dir: Path) -> None:
    losses = [
        run(Options((str(model_dir),), limit=10, dtype="float32", device="cuda", batch_size=size)).records[0]
        for size in (1, 16, None)
    ]
    assert losses[2]["batch_size"] >= 16
    assert losses[1]["loss"] == pytest.approx(losses[0]["loss"], abs=1e-5)
    assert losses[2]["loss"] == pytest.approx(losses[0]["loss"], abs=1e-5)


def test_auto_batch_size_respects_memory(
    model_factory: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_factory(max_position_embeddings=512, hidden_size=512, intermediate_size=4096).cuda()
    stream = tokenize(read_corpus(limit=60), tokenizer)
    protocol = make_protocol(stream, dtype="float32", longest=512, context_length=512)
    windows = make_windows(stream, protocol)
    maker = BatchMaker(stream, protocol, windows, torch.device("cuda"))
    held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    room = 512 << 20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (room - held, 80 << 30))
    size = choose_batch_size(model, maker, 512)
    assert 1 <= size < 128
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    score(model, maker, plan_batches(windows, size), name="m")
    assert torch.cuda.max_memory_allocated() - before <= room


def test_memory_is_flat_in_context_and_vocabulary(model_factory: Any, tokenizer: Any) -> None:
    """Full logits of the longer context would take 2 GiB; the chunked head stays far below."""
    peaks = []
    for context in (2048, 8192):
        model = model_factory(vocab_size=65536, max_position_embeddings=8192).cuda()
        stream = tokenize(read_corpus(limit=40), tokenizer)
        protocol = make_protocol(stream, dtype="float32", longest=8192, context_length=context)
        windows = make_windows(stream, protocol)
        maker = BatchMaker(stream, protocol, windows, torch.device("cuda"))
        torch.cuda.reset_peak_memory_stats()
        score(model, maker, plan_batches(windows, 1), name="m")
        peaks.append(torch.cuda.max_memory_allocated())
        del model, maker
    assert peaks[1] < 1.3 * peaks[0]


@pytest.mark.parametrize(
    "recipe",
    [
        "int8-dynamic-act-int4-weight",
        "int8-dynamic-act-int8-weight",
        "intx4-weight-only",
        "int8-weight-only",
        "float8-weight-only",
        "float8-dynamic-act-float8-weight",
        "nvfp4-weight-only",
        "mxfp4-dynamic-act-mxfp4-weight",
        "mxfp8-dynamic-act-mxfp8-weight",
    ],
)
def test_fast_path_gives_the_same_bits(model_factory: Any, recipe: str) -> None:
    from torchao.quantization import quantize_

    from loadstone.quantization import parse_recipe, to_torchao

    model = model_factory(hidden_size=128, intermediate_size=256).to("cuda", torch.bfloat16)
    quantize_(model.model, to_torchao(parse_recipe(recipe).scheme))
    fast = copy.deepcopy(model)
    assert speed_up(fast).dequantized == 14
    ids = torch.randint(0, 400, (3, 50), generator=torch.Generator().manual_seed(1)).cuda()
    with torch.inference_mode():
        assert torch.equal(fast(input_ids=ids).logits, model(input_ids=ids).logits)


def test_int4_tiles_are_multiplied_by_cublas_to_rounding(model_factory: Any) -> None:
    from torchao.quantization import quantize_

    from loadstone.quantization import parse_recipe, to_torchao

    model = model_factory(hidden_size=256, intermediate_size=512).to("cuda", torch.bfloat16)
    quantize_(model.model, to_torchao(parse_recipe("int4-weight-only:group_size=32").scheme))
    fast = copy.deepcopy(model)
    assert speed_up(fast).repacked == 14
    for name, linear in model.named_modules():
        if name.endswith("proj"):
            # A row of the identity reads one column of the weight: the values are the kernel's own.
            eye = torch.eye(linear.in_features, dtype=torch.bfloat16, device="cuda")
            assert torch.equal(linear(eye), fast.get_submodule(name)(eye)), name
    ids = torch.randint(0, 400, (3, 50), generator=torch.Generator().manual_seed(1)).cuda()
    targets = ids.roll(-1, 1).flatten()
    with torch.inference_mode():
        a, b = (
            torch.nn.functional.cross_entropy(m(input_ids=ids).logits.flatten(0, 1).float(), targets)
            for m in (model, fast)
        )
    assert abs(float(a - b)) < 2e-3 * float(a)


@pytest.mark.parametrize("recipe", ["int8-dynamic-act-int8-weight", "int8-dynamic-act-int4-weight"])
def test_quantized_and_compiled(
    model_dir: Path, tmp_path: Path, save_model: Any, tokenizer: Any, recipe: str
) -> None:
    """A text so short that its only batch has fewer rows than integer products take."""
    import loadstone
    from loadstone.finalization.plan import make_plan
    from loadstone.finalization.run import write_plan
    from loadstone.quantization import parse_recipe

    plan = make_plan(loadstone.detect(model_dir), parse_recipe(recipe), device="cuda:0")
    write_plan(plan, tmp_path / "q", device="cuda:0")
    tokenizer.save_pretrained(tmp_path / "q")
    text = tmp_path / "t.txt"
    text.write_text("It is a truth")
    for data, limit in ((str(text), None), ("sample", 4)):
        options = Options((str(tmp_path / "q"),), data=data, limit=limit, device="cuda", dtype="bfloat16")
        eager, compiled = (run(replace(options, compile=on)).records[0] for on in (False, True))
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=0.03), data


def test_two_processes_on_one_gpu_give_the_result_of_one(
    model_dir: Path, worse_dir: Path, tmp_path: Path
) -> None:
    arguments = ["-M", str(model_dir), "-M", str(worse_dir), "--limit", "6", "--batch-size", "2", "--kl"]
    records = []
    for processes in (1, 2):
        file = tmp_path / f"{processes}.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command = [*launcher, str(processes), "-m", "loadstone", "eval", *arguments, "--json", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        records.append(json.loads(file.read_text())["models"][1])
    for name in ("loss", "delta_loss", "delta_loss_stderr", "kl", "kl_max", "top1_agreement"):
        assert records[1][name] == pytest.approx(records[0][name], rel=1e-9, abs=1e-12), name


def divided(directory: Path, ranks: int, file: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [
        *launcher,
        "-m",
        "loadstone",
        "eval",
        "-M",
        str(directory),
        "--limit",
        "6",
        "--json",
        str(file),
    ]
    return subprocess.run([*command, *flags], capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("dtype", "apart"), [("float32", 1e-5), ("bfloat16", 5e-3)])
def test_a_model_divided_among_two_gpus_gives_the_loss_of_one(
    model_dir: Path, tmp_path: Path, dtype: str, apart: float
) -> None:
    alone = run(Options((str(model_dir),), limit=6, device="cuda", dtype=dtype)).records[0]
    done = divided(model_dir, 2, tmp_path / "two.json", "--parallel", "tensor", "--dtype", dtype)
    assert done.returncode == 0, done.stderr
    (record,) = json.loads((tmp_path / "two.json").read_text())["models"]
    assert record["ranks_per_copy"] == 2 and record["device"] == "cuda:0"
    assert record["loss"] == pytest.approx(alone["loss"], abs=apart)


def test_more_ranks_than_gpus_are_refused(model_dir: Path, tmp_path: Path) -> None:
    count = torch.cuda.device_count()
    done = divided(model_dir, 2 * count, tmp_path / "none.json", "--parallel", "tensor=2")
    assert done.returncode and f"{2 * count} ranks of this machine have {count} GPUs" in done.stderr


def test_compiled_layers_agree(model_dir: Path) -> None:
    options = Options((str(model_dir),), limit=20, device="cuda", dtype="float32")
    eager, compiled = (run(replace(options, compile=on)) for on in (False, True))
    assert compiled.records[0]["loss"] == pytest.approx(eager.records[0]["loss"], abs=1e-4)
    a, b = (next(iter(o.values.values()))["nll"] for o in (eager, compiled))
    assert np.abs(a - b).max() < 1e-2


def test_long_texts_are_compiled(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from loadstone.evaluation.scoring import compiling

    options = Options((str(model_dir),), limit=5, device="cuda")
    assert run(options).protocol["compiled"] is False
    monkeypatch.setattr(compiling, "_FLOPS", 1.0)
    chosen, asked, plain = (run(replace(options, compile=mode)) for mode in (None, True, False))
    assert chosen.protocol["compiled"] and not plain.protocol["compiled"]
    assert chosen.records[0]["loss"] == asked.records[0]["loss"]


@pytest.mark.parametrize("recipe", ["int8-dynamic-act-int4-weight", "float8-weight-only"])
def test_streamed_layers_give_the_result_of_resident_ones(
    model_dir: Path, tmp_path: Path, tokenizer: Any, recipe: str
) -> None:
    import loadstone
    from loadstone.finalization.plan import make_plan
    from loadstone.finalization.run import write_plan
    from loadstone.quantization import parse_recipe

    plan = make_plan(loadstone.detect(model_dir), parse_recipe(recipe), device="cuda:0")
    write_plan(plan, tmp_path / "q", device="cuda:0")
    tokenizer.save_pretrained(tmp_path / "q")
    options = Options(
        (str(model_dir), str(tmp_path / "q")), limit=4, batch_size=4, divergence=True, device="cuda"
    )
    resident, streamed = (run(replace(options, stream=on)) for on in (False, True))
    for name, values in resident.values.items():
        for key, expected in values.items():
            assert np.array_equal(streamed.values[name][key], expected), (name, key)
