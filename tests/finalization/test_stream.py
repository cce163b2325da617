"""The threads that a finalize streams through: every element once, in order, and bounded in what they hold."""

import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch

import loadstone
from loadstone.artifact.source import SafetensorsSource
from loadstone.finalization import units
from loadstone.finalization.encoders import torchao
from loadstone.finalization.plan import QUANTIZE, make_plan
from loadstone.finalization.stream import _MemoryBudget, stream
from loadstone.finalization.units import Unit, units_of
from loadstone.quantization import parse_recipe

from .test_finalize import W4, plan_of


@pytest.mark.parametrize("arch", ["llama-tied", "qwen3-moe"])
@pytest.mark.parametrize("recipe", [None, W4, "float8-weight-only", "nvfp4-weight-only"])
def test_units_cover_every_element_once(
    make_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, arch: str, recipe: str | None
) -> None:
    monkeypatch.setattr(units, "BLOCK", 1000)
    plan = plan_of(make_model(arch), recipe, max_shard_bytes=30_000)
    for number, shard in enumerate(plan.shards):
        work = list(units_of(plan, number, "cpu", plan.source.source))
        assert sum(u.nbytes for u in work) == sum(s.source_bytes for s in shard)
        for step in shard:
            for n, source in enumerate(step.sources):
                own = [u for u in work if u.step is step and u.number == n]
                assert [u.start for u in own] == [0, *(u.stop for u in own[:-1])]
                assert own[-1].stop == source.numel
                if step.action == QUANTIZE:
                    assert all(u.stop % source.shape[-1] == 0 for u in own)


@pytest.mark.parametrize("recipe", [W4, f"{W4}:rounding=hqq"])
def test_what_is_held_is_bounded(tiny: Path, monkeypatch: pytest.MonkeyPatch, recipe: str) -> None:
    monkeypatch.setattr(units, "BLOCK", 1000)
    plan = plan_of(tiny, recipe)
    reader = plan.source.source
    lock, held, most, at_work, together = threading.Lock(), [0], [0], [0], [0]
    span, quantize = SafetensorsSource.read, torchao.quantize_weight

    def counted(self: SafetensorsSource, info: object, start: int, stop: int, **how: bool) -> torch.Tensor:
        values = span(self, info, start, stop, **how)  # type: ignore[arg-type]
        with lock:
            held[0] += values.nbytes
            most[0] = max(most[0], held[0])
        return values

    def slow(weight: torch.Tensor, scheme: object) -> torch.Tensor:
        with lock:
            at_work[0] += 1
            together[0] = max(together[0], at_work[0])
        time.sleep(0.002)
        with lock:
            at_work[0] -= 1
        return quantize(weight, scheme)  # type: ignore[arg-type]

    left: dict[tuple[str, int], int] = {}

    def put(unit: Unit, name: str, part: torch.Tensor, offset: int) -> None:
        with lock:
            key = (unit.step.name, unit.start)
            left[key] = left.get(key, len(unit.step.outputs)) - 1
            if left[key] == 0:
                held[0] -= unit.nbytes

    monkeypatch.setattr(SafetensorsSource, "read", counted)
    monkeypatch.setattr(torchao, "quantize_weight", slow)
    monkeypatch.setattr("loadstone.finalization.stream._MemoryBudget", lambda size: _MemoryBudget(50_000))
    torch.set_num_threads(4)
    try:
        with closing(stream(plan, units_of(plan, 0, "cpu", reader), reader, "cpu", put)) as done:
            order = [unit.step.name for unit in done]
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(1)
    assert order == sorted(order) and held == [0]
    whole = "hqq" in recipe
    assert together == [1] if whole else together[0] > 1
    assert most[0] <= 50_000


@pytest.mark.parametrize("at", [0, 5])
def test_a_failing_part_ends_the_stream(tiny: Path, at: int) -> None:
    plan = make_plan(loadstone.detect(tiny), parse_recipe(W4))

    def put(unit: Unit, name: str, part: torch.Tensor, offset: int) -> None:
        if unit.step is plan.steps[at]:
            raise OSError("no")

    with pytest.raises(OSError, match="no"), closing(_all(plan, put)) as done:
        for _ in done:
            pass
    assert threading.active_count() < 10


def _all(plan, put):
    return stream(plan, units_of(plan, 0, "cpu", plan.source.source), plan.source.source, "cpu", put)


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_span_is_a_part_of_the_tensor(tiny: Path, tmp_path: Path, form: str) -> None:
    source = tiny
    if form == "bin":
        source = tmp_path
        (source / "config.json").write_bytes((tiny / "config.json").read_bytes())
        torch.save(loadstone.load(tiny).state_dict(), source / "pytorch_model.bin")
    plan = plan_of(source, None)
    reader = plan.source.source
    expected = loadstone.load(tiny).state_dict()
    for step in plan.steps:
        whole = reader.read(step.source)
        assert torch.equal(whole, expected[step.source.name])
        count = step.source.numel
        for start, stop in ((0, count), (count // 3, count // 2), (count, count)):
            assert torch.equal(reader.read(step.source, start, stop), whole.reshape(-1)[start:stop])
