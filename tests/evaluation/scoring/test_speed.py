from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import loadstone
from loadstone.evaluation import passes
from loadstone.evaluation.scoring.speed import measure_speed
from loadstone.loading.few_rows_cpu import Int4Linear


def test_figures(model: Any) -> None:
    one, four = measure_speed(model, torch.arange(300), (4, 1, 4))
    assert (one["batch_size"], four["batch_size"]) == (1, 4)
    # Room is left in the context for what is written.
    assert one["prompt_tokens"] == 112
    for record in (one, four):
        rate = record["batch_size"] * record["prompt_tokens"] / record["first_token_seconds"]
        assert record["prefill_tokens_per_second"] == pytest.approx(rate)
        assert record["decode_tokens_per_second"] > 0 and record["peak_memory_bytes"] > 1 << 20


def test_writes_what_generate_writes(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoding that is timed is real greedy decoding."""
    seen: list[int] = []
    real = torch.Tensor.argmax

    def spy(self: torch.Tensor, *args: Any) -> torch.Tensor:
        result = real(self, *args)
        seen.append(int(result.flatten()[0]))
        return result

    monkeypatch.setattr(torch.Tensor, "argmax", spy)
    measure_speed(model, torch.arange(20, 60), (1,))
    monkeypatch.undo()
    expected = model.generate(torch.arange(20, 60)[None], max_new_tokens=17, do_sample=False)[0, 40:]
    assert seen[:17] == expected.tolist()


def test_compiled_rows_write_the_same(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`generate` by `greedy_decoding`, which writes what `generate` writes."""
    written: list[torch.Tensor] = []
    real = model.generate

    def spy(*args: Any, **kwargs: Any) -> Any:
        written.append(real(*args, **kwargs))
        return written[-1]

    monkeypatch.setattr(model, "generate", spy)
    (record,) = measure_speed(model, torch.arange(20, 60), (1,), compiled=True)
    assert record["compiled"] and record["decode_tokens_per_second"] > 0
    assert torch.equal(
        max(written, key=lambda ids: ids.shape[1]), real(torch.arange(20, 60)[None], max_new_tokens=16)
    )


def test_on_a_cpu_it_is_the_model_that_writes_fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def spy(model: Any, *args: Any) -> list[Any]:
        seen.append(sum(isinstance(m, Int4Linear) for m in model.modules()))
        return []

    monkeypatch.setattr(passes, "measure_speed", spy)
    loadstone.finalize("builtin:tiny-llama", tmp_path / "q", recipe="intx4-weight-only", device="cpu")
    for fast in (True, False):
        loadstone.evaluate(tmp_path / "q", limit=1, speed=True, fast=fast, device="cpu")
    assert seen == [28, 0]
