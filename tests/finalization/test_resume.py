"""Killed, resumed, spread over ranks, cut into row blocks: always the same bytes, and never a partial output."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.helpers import on_ranks

import loadstone
from loadstone.artifact.source import SafetensorsSource
from loadstone.errors import ArtifactError, MissingError, UsageError
from loadstone.finalization import units
from loadstone.finalization.journal import work_directory
from loadstone.finalization.run import write_plan
from loadstone.finalization.verify import verify
from loadstone.quantization import parse_recipe
from loadstone.writing.publish import locked

from .test_finalize import ON_CPU, W4, plan_of, snapshot


def many_shards(source: Path, recipe: str = W4):
    return plan_of(source, recipe, max_shard_bytes=12_000)


@pytest.mark.parametrize("recipe", ON_CPU)
def test_row_blocks_give_the_same_bytes(
    tiny: Path, quantize_to: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    monkeypatch.setattr(units, "BLOCK", 1000)
    write_plan(plan_of(tiny, recipe), tmp_path / "out")
    assert snapshot(tmp_path / "out") == snapshot(quantize_to(tiny, recipe))


@pytest.mark.parametrize("recipe, dtype", [(W4, "auto"), ("nvfp4-weight-only", "auto"), (None, "float32")])
def test_blocks_of_tensors_that_are_read_whole(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str | None, dtype: str
) -> None:
    """As of distributed checkpoints, whose tensors cannot be read in parts."""
    write_plan(plan_of(tiny, recipe, dtype=dtype), tmp_path / "once")
    monkeypatch.setattr(units, "BLOCK", 1000)
    monkeypatch.setattr(SafetensorsSource, "tile", lambda self, info: info.numel)
    write_plan(plan_of(tiny, recipe, dtype=dtype), tmp_path / "blocks")
    assert snapshot(tmp_path / "blocks") == snapshot(tmp_path / "once")


BY_EXTREMES = [
    "int8-weight-only:granularity=tensor",
    "int8-dynamic-act-int8-weight:granularity=tensor",
    "float8-weight-only:granularity=tensor",
]


@pytest.mark.parametrize("recipe", [*ON_CPU, f"{W4}:mapping=asymmetric", f"{W4}:rounding=mse", *BY_EXTREMES])
def test_blocks_of_weights_of_many_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    """Against torchao on whole tensors: rows that are no multiple of any tile, and extremes in the last of them."""
    from safetensors import safe_open
    from transformers import LlamaConfig, LlamaForCausalLM

    from loadstone.artifact.torchao.flatten import flatten
    from loadstone.quantization.quantize import quantize_weight

    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=352, num_hidden_layers=1, num_attention_heads=4
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight.data[-1, -1], mlp.up_proj.weight.data[200, 3] = 2.0, -3.0
    model.save_pretrained(tmp_path / "source")
    monkeypatch.setattr(units, "BLOCK", 4 * 64 * 130)
    plan = plan_of(tmp_path / "source", recipe)
    write_plan(plan, tmp_path / "out")
    assert verify(plan, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as stored:
        for name in ("up_proj", "gate_proj", "down_proj"):
            weight = mlp.get_submodule(name).weight.detach()
            whole = quantize_weight(weight, parse_recipe(recipe).scheme)
            for part, expected in flatten("x.weight", whole)[1].items():
                found = stored.get_tensor(f"model.layers.0.mlp.{name}._weight_{part}")
                raw = [each.reshape(-1).view(torch.uint8) for each in (found, expected.contiguous())]
                assert found.shape == expected.shape and torch.equal(*raw), (name, part)


def test_many_threads_give_the_same_bytes(
    tiny: Path, quantize_to: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loadstone.artifact import source
    from loadstone.finalization import run

    monkeypatch.setattr(source, "_RANGE", 1000)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(run, "_FLUSH", 1000)
    monkeypatch.setattr(units, "BLOCK", 1000)
    torch.set_num_threads(3)
    try:
        write_plan(plan_of(tiny, W4), tmp_path / "out")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert snapshot(tmp_path / "out") == snapshot(quantize_to(tiny, W4))


def test_cast_in_blocks(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_plan(plan_of(tiny, None, dtype="float32"), tmp_path / "whole")
    monkeypatch.setattr(units, "BLOCK", 1000)
    write_plan(plan_of(tiny, None, dtype="float32"), tmp_path / "blocks")
    assert snapshot(tmp_path / "whole") == snapshot(tmp_path / "blocks")


@pytest.fixture
def undisturbed(tiny: Path, tmp_path: Path) -> dict[str, str]:
    write_plan(many_shards(tiny), tmp_path / "undisturbed")
    return snapshot(tmp_path / "undisturbed")


def test_interrupted_at_every_shard(tiny: Path, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    before = snapshot(tiny)
    out = tmp_path / "out"
    runs = 0
    while not out.exists() and runs < 50:
        runs += 1
        notes = work_directory(out) / "journal"
        left = (len(list(notes.iterdir())) if notes.is_dir() else 0) + 8

        def stop_soon(count: int) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise KeyboardInterrupt

        try:
            write_plan(many_shards(tiny), out, on_progress=stop_soon)
        except KeyboardInterrupt:
            assert not out.exists()
    assert runs > 2
    assert snapshot(out) == undisturbed and snapshot(tiny) == before
    assert not work_directory(out).exists()


def _child(source: Path, out: Path) -> None:
    write_plan(many_shards(source), out, on_progress=lambda count: time.sleep(0.002))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_killed_at_random_moments(tiny: Path, tmp_path: Path, undisturbed: dict[str, str], how: int) -> None:
    out = tmp_path / "out"
    moments = random.Random(5)
    fork = multiprocessing.get_context("fork")
    before = snapshot(tiny)
    for _ in range(20):
        process = fork.Process(target=_child, args=(tiny, out))
        process.start()
        process.join(moments.uniform(0, 0.4))
        if process.exitcode is None:
            os.kill(process.pid, how)
            process.join()
        if out.exists():
            assert snapshot(out) == undisturbed
            shutil.rmtree(out)
    write_plan(many_shards(tiny), out)
    assert snapshot(out) == undisturbed and snapshot(tiny) == before


def test_killed_while_the_journal_is_removed(tiny: Path, tmp_path: Path, undisturbed: dict[str, str]) -> None:
    out = tmp_path / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("loadstone.finalization.run.close_journal", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_plan(many_shards(tiny), out)
    shutil.rmtree(work_directory(out) / "journal")
    write_plan(many_shards(tiny), out)
    assert snapshot(out) == undisturbed


def test_a_full_disk(
    tiny: Path, tmp_path: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small tmpfs where the machine allows mounting one, else writes that fail as on a full disk."""
    import errno

    from loadstone.writing.shards import ShardWriter

    out = tmp_path / "out"
    whole, calls = ShardWriter.write, []

    def fails(self: ShardWriter, *args: object) -> None:
        calls.append(1)
        if len(calls) > 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        whole(self, *args)

    monkeypatch.setattr(ShardWriter, "write", fails)
    with pytest.raises(MissingError, match="No space left on device"):
        write_plan(many_shards(tiny), out)
    assert not out.exists() and work_directory(out).exists()
    monkeypatch.undo()
    write_plan(many_shards(tiny), out)
    assert snapshot(out) == undisturbed


@pytest.mark.slow
def test_a_full_tmpfs(
    tiny: Path, tmp_path: Path, undisturbed: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from loadstone.finalization import run

    mount = tmp_path / "small"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", mount], check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        monkeypatch.setattr(run, "check_space", lambda *args: None)
        with pytest.raises(MissingError, match="No space left on device"):
            write_plan(many_shards(tiny), mount / "out")
        subprocess.run(["mount", "-o", "remount,size=4m", mount], check=True)
        write_plan(many_shards(tiny), mount / "out")
        assert snapshot(mount / "out") == undisturbed
    finally:
        subprocess.run(["umount", mount], check=True)


def test_another_jobs_partial_output_is_refused(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def stop(count: int) -> None:
        if any((work_directory(out) / "journal").iterdir()):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_plan(many_shards(tiny), out, on_progress=stop)
    with pytest.raises(UsageError, match=r"another job \(its recipe, layout differ\).*--no-resume"):
        write_plan(many_shards(tiny, "int8-weight-only"), out)
    write_plan(many_shards(tiny, "int8-weight-only"), out, resume=False)
    assert loadstone.detect(out).kind == "torchao"


@pytest.mark.parametrize("resume", [True, False])
def test_a_directory_of_someone_else_at_the_working_name_is_refused(
    tiny: Path, tmp_path: Path, resume: bool
) -> None:
    out = tmp_path / "out"
    work_directory(out).mkdir()
    (work_directory(out) / "precious").touch()
    with pytest.raises(UsageError, match=r"\.out\.partial' was not made by loadstone"):
        write_plan(plan_of(tiny), out, resume=resume)
    assert [p.name for p in work_directory(out).iterdir()] == ["precious"] and not out.exists()


@pytest.mark.parametrize("left", [(), ("journal",), ("key.json.tmp",), ("journal", "output"), ("output",)])
def test_what_a_run_killed_at_its_beginning_or_end_left(
    tiny: Path, tmp_path: Path, undisturbed: dict[str, str], left: tuple[str, ...]
) -> None:
    out = tmp_path / "out"
    work_directory(out).mkdir()
    for name in left:
        (work_directory(out) / name).mkdir() if "." not in name else (work_directory(out) / name).touch()
    write_plan(many_shards(tiny), out)
    assert snapshot(out) == undisturbed and not work_directory(out).exists()


def test_one_writer_at_a_time(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with locked(out), pytest.raises(UsageError, match="another process is writing"):
        write_plan(plan_of(tiny), out)
    write_plan(plan_of(tiny), out)
    assert {p.name for p in tmp_path.iterdir()} == {"out"}


def test_verify(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    plan = many_shards(tiny)
    write_plan(plan, out)
    assert verify(plan, out) == sum(len(step.outputs) for step in plan.steps)
    other = tmp_path / "other"
    write_plan(plan_of(tiny, "int8-dynamic-act-int4-weight:mapping=asymmetric"), other)
    with pytest.raises(ArtifactError, match="not that of the plan"):
        verify(plan_of(tiny, W4), other)
    file = out / plan.file_name(0)
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(ArtifactError, match=f"{file.name}: tensor"):
        verify(plan, out)


def test_two_ranks_give_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    def work() -> None:
        loadstone.finalize(tiny, tmp_path / "out", recipe=W4, max_shard_size="30kB", device="cpu")

    on_ranks(2, work)
    found = snapshot(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "two")
    work()
    assert snapshot(tmp_path / "out") == found


def test_a_write_that_the_disk_failed_is_an_error(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reported to the first sync alone, which is one in the middle of a shard."""
    import errno

    from loadstone.finalization import run
    from loadstone.writing.shards import ShardWriter

    def fails(self: ShardWriter) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(run, "_FLUSH", 1000)
    monkeypatch.setattr(ShardWriter, "flush", fails)
    with pytest.raises(MissingError, match="Input/output error"):
        write_plan(plan_of(tiny), tmp_path / "out")
    assert not (tmp_path / "out").exists()
