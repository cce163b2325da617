"""``--parallel tensor``: models divided among ranks give the losses of one rank, to the order of additions."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import packed
from tests.small_models import make_model, make_tokenizer, save

import loadstone
from loadstone.errors import UsageError
from loadstone.evaluation import parallel
from loadstone.evaluation.models import EvalModel, plan_models
from loadstone.evaluation.options import Options
from loadstone.evaluation.parallel import divide_models
from loadstone.ranks import Ranks

FAMILIES = ("llama", "qwen3_moe", "gemma3")
# Of a loss, in float32 (docs/eval.md).
TOLERANCE = 1e-5
TEXT = {"limit": 3, "batch_size": 2, "context_length": 64}


@pytest.fixture(scope="module")
def family_dirs(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    changes: dict[str, dict[str, Any]] = {
        "llama": {},
        "qwen3_moe": moe | {"head_dim": 8},
        "gemma3": {"head_dim": 8, "sliding_window": 16, "tie_word_embeddings": True},
    }
    return {
        name: save(make_model(family=name, num_key_value_heads=4, **changes[name]), tokenizer, root / name)
        for name in FAMILIES
    }


def evaluated(ranks: int, calls: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The results of evaluations on that many ranks."""
    (folder / "calls.json").write_text(json.dumps(calls))
    files = (folder / "calls.json", folder / "results.json")
    command = [sys.executable, "-m", "tests.evaluation.parallel_ranks", str(ranks), *map(str, files)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    return json.loads(files[1].read_text())  # type: ignore[no-any-return]


def assert_close(call: dict[str, Any], divided: dict[str, Any], ranks: int) -> None:
    """The figures of a divided run are those of one process."""
    assert "error" not in divided, divided
    options = {key: value for key, value in call.items() if key not in ("parallel", "cache", "resume")}
    alone = loadstone.evaluate(**options)
    for one, many in zip(alone.records, divided["models"], strict=True):
        assert many["ranks_per_copy"] == ranks and one["ranks_per_copy"] == 1
        assert many["loss"] == pytest.approx(one["loss"], abs=TOLERANCE)
        assert many["unit_losses"] == pytest.approx(one["unit_losses"], rel=TOLERANCE)
        assert (many["tokens"], many["parameters"]) == (one["tokens"], one["parameters"])
        if one.get("kl") is not None:
            assert many["kl"] == pytest.approx(one["kl"], abs=TOLERANCE)
            assert many["top1_agreement"] == pytest.approx(one["top1_agreement"], abs=2e-3)


def test_two_ranks_give_the_losses_of_one(
    family_dirs: dict[str, Path], model_dir: Path, worse_dir: Path, tokenizer: Any, tmp_path: Path
) -> None:
    broken = save(make_model(), tokenizer, tmp_path / "broken")
    damage(broken)
    int8 = tmp_path / "int8"
    loadstone.finalize(family_dirs["llama"], int8, recipe="int8-weight-only")
    fp8 = packed.fp8(family_dirs["llama"], tmp_path / "fp8", (16, 16))
    tokenizer.save_pretrained(fp8)
    # Its experts are divided among the ranks, and nothing else of its layers.
    gpt_oss = packed.mxfp4(tmp_path / "mxfp4", experts=4)
    make_tokenizer(vocabulary=320).save_pretrained(gpt_oss)
    cache = str(tmp_path / "cache")
    families = [{"models": [str(family_dirs[name])], "parallel": "tensor", **TEXT} for name in FAMILIES]
    pair = {"models": [str(model_dir), str(worse_dir)], "kl": True, "parallel": "tensor=2", **TEXT}
    quantized = [{"models": [str(each)], "parallel": "tensor", **TEXT} for each in (fp8, int8, gpt_oss)]
    refused = {"models": [str(broken)], "parallel": "tensor", **TEXT}
    kept = families[0] | {"cache": cache, "resume": True}
    calls = [*families, pair, *quantized, refused, kept | {"interrupt": True}, kept, kept]
    *compared, failed, interrupted, resumed, cached = evaluated(2, calls, tmp_path)
    for call, divided in zip(calls, compared, strict=False):
        assert_close(call, divided, 2)
    found, told = sorted(failed["error"], key=lambda error: "another rank" in error)
    assert "'lm_head.weight' holds NaN" in found and "cannot be loaded by another rank" in told
    assert interrupted == {"error": ["interrupted"]}
    assert resumed["models"][0]["unit_losses"] == compared[0]["models"][0]["unit_losses"]
    assert [r["models"][0]["cached"] for r in (resumed, cached)] == [False, True]
    # One process adds in another order, and does not take these scores for its own.
    options = {key: value for key, value in kept.items() if key != "parallel"}
    assert loadstone.evaluate(**options).records[0]["cached"] is False


def damage(directory: Path) -> None:
    """Put a NaN into the head, which one rank alone looks at."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"][-1, -1] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
def test_four_ranks_hold_one_copy_or_two(family_dirs: dict[str, Path], tmp_path: Path) -> None:
    calls = [
        {"models": [str(family_dirs[name])], "parallel": f"tensor={size}", **TEXT}
        for name in FAMILIES
        for size in (2, 4)
    ]
    for call, divided in zip(calls, evaluated(4, calls, tmp_path), strict=True):
        assert_close(call, divided, int(call["parallel"][-1]))


def test_what_cannot_be_divided_is_refused(model_dir: Path, model_factory: Any, tmp_path: Path) -> None:
    gpt2 = model_factory(family="gpt2")
    gpt2.save_pretrained(tmp_path / "gpt2")

    def refused(ranks: int, parallel: str, message: str, model: Path = model_dir, **changes: Any) -> None:
        options = Options((str(model),), device="cpu", parallel=parallel, **changes)
        with pytest.raises(UsageError, match=message):
            divide_models(_planned(options), options, Ranks(0, ranks))

    refused(1, "tensor", "this is one")
    refused(4, "pipeline", "is not known")
    refused(4, "tensor=3", "4 ranks do not divide into groups of 3")
    refused(4, "tensor", r"num_key_value_heads \(2\) do not divide among 4 ranks")
    refused(2, "tensor", "no tensor-parallel plan for GPT2LMHeadModel", tmp_path / "gpt2")
    for flag, options in {
        "--stream": {"stream": True},
        "--compile": {"compile": True},
        "--speed": {"speed": True},
    }.items():
        refused(2, "tensor", flag, **options)


def test_one_rank_each_is_what_torchrun_does_anyway(model_dir: Path) -> None:
    options = Options((str(model_dir),), device="cpu", parallel="tensor=1")
    models, ranks = divide_models(_planned(options), options, Ranks(1, 4))
    assert ranks == Ranks(1, 4) and models[0].mesh is None


@pytest.mark.parametrize(
    ("flags", "one_fits", "largest_share", "chosen"),
    [
        ({}, False, 0.6, 2),
        ({}, False, 0.3, 4),
        ({}, False, 0.1, 1),
        ({}, True, 1.0, 1),
        ({"speed": True}, False, 0.6, 1),
    ],
)
def test_the_fewest_ranks_that_hold_a_copy_are_chosen(
    family_dirs: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    flags: dict[str, Any],
    one_fits: bool,
    largest_share: float,
    chosen: int,
) -> None:
    def fits(models: Any, options: Options, share: float = 1.0) -> bool:
        return one_fits if share == 1 else share <= largest_share

    monkeypatch.setattr(parallel, "fits", fits)
    monkeypatch.setattr(parallel, "input_device", lambda plan: torch.device("cuda"))
    monkeypatch.setattr(parallel, "_mesh", lambda ranks, size, device: f"mesh of {size}")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(Ranks, "gather", lambda self, value: [value])
    options = Options((str(family_dirs["llama"]),), **flags)
    with caplog.at_level("INFO", "loadstone"):
        models, ranks = divide_models(_planned(options), options, Ranks(3, 4))
    assert models[0].mesh == (f"mesh of {chosen}" if chosen > 1 else None)
    assert (ranks.size, ranks.members) == (4 // chosen, chosen)
    said = "divided as by --parallel tensor" if chosen > 1 else "is not divided among ranks: "
    assert one_fits or said in caplog.text


def test_ranks_in_copies() -> None:
    ranks = [Ranks(rank, 4).in_copies(2) for rank in range(4)]
    assert [(r.rank, r.size, r.member) for r in ranks] == [(0, 2, 0), (0, 2, 1), (1, 2, 0), (1, 2, 1)]
    assert [r.first for r in ranks] == [True, False, False, False]


def _planned(options: Options) -> tuple[EvalModel, ...]:
    return plan_models(options, "cpu")


torch.set_num_threads(1)
