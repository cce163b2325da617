"""Many processes and threads at once: readers, and writers of one output. `make crash` runs the large numbers."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.finalization.test_finalize import snapshot

import loadstone
from loadstone.artifact.report import collect
from loadstone.artifact.unchanged import Changed
from loadstone.errors import LoadstoneError, UsageError
from loadstone.evaluation.results.store import Store
from loadstone.writing.publish import new_directory


def many(*values: Any, large: Any) -> Any:
    """Small numbers for every run of the tests, the large one for `make crash`."""
    return [*values, pytest.param(large, marks=pytest.mark.slow)]


def at_once(works: Iterable[Callable[[], Any]]) -> list[Any]:
    """Results, or errors of loadstone, of calls that start together, each in a thread."""
    calls = list(works)
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        barrier.wait()
        try:
            return call()
        except LoadstoneError as error:
            return error

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


@pytest.mark.parametrize("count", many(3, large=50))
def test_inspects(tiny: Path, count: int) -> None:
    running = [started("inspect", str(tiny), "--json") for _ in range(count)]
    printed = {process.communicate()[0] for process in running}
    assert len(printed) == 1 and {process.returncode for process in running} == {0}


def started(*arguments: str, folder: Path | None = None) -> subprocess.Popen[bytes]:
    """A command in a process of its own: one that is forked from this would share its threads' locks."""
    environment = os.environ | {"PYTHONPATH": str(Path(loadstone.__file__).parents[1])}
    command = [sys.executable, "-m", "loadstone", *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("count", many(2, large=8))
def test_evals_on_one_cache(tiny: Path, tmp_path: Path, count: int) -> None:
    """Each computes, or takes what another has finished; the losses are the same, and one entry is left."""
    (tmp_path / "text.txt").write_text("One text for all of them. " * 40)

    options = ["--data", "text.txt", "--separator", "1", "--cache", "cache", "--json"]
    running = [
        started("eval", "-M", str(tiny), *options, f"{number}.json", folder=tmp_path)
        for number in range(count)
    ]
    said = [process.communicate()[1] for process in running]
    assert {process.returncode for process in running} == {0}, said
    results = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(count)]
    assert len({result["models"][0]["loss"] for result in results}) == 1
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert [path.suffix for path in left] == [".npz"], left


def test_threads_that_load(tiny: Path, quantize_to: Callable[..., Path]) -> None:
    """Twenty, of a plain and of a quantized model, which has tensor subclasses."""
    paths = [tiny, quantize_to(tiny, "int8-weight-only")]
    expected = [loadstone.load(path)(torch.arange(8)[None]).logits for path in paths]
    models = at_once(lambda number=number: loadstone.load(paths[number % 2]) for number in range(20))
    for number, model in enumerate(models):
        assert torch.equal(model(torch.arange(8)[None]).logits, expected[number % 2])


def table(folder: Path) -> Path:
    path = folder / "table.csv"
    path.write_text("a,y\n" + "".join(f"{number},{number % 2}\n" for number in range(20)))
    return path


WRITERS: dict[str, Callable[[Path, Path, bool], Any]] = {
    "finalize": lambda tiny, out, overwrite: loadstone.finalize(
        tiny, out, recipe="int8-weight-only", overwrite=overwrite
    ),
    "export": lambda tiny, out, overwrite: loadstone.export_fakequant(
        tiny, out, format="fp8", overwrite=overwrite
    ),
    "context": lambda tiny, out, overwrite: loadstone.fit(
        out=out, table=out.parent / "table.csv", target="y", overwrite=overwrite
    ),
}


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("rounds", many(2, large=50))
def test_two_writers_of_one_output(tiny: Path, tmp_path: Path, kind: str, rounds: int) -> None:
    """One of them at least writes it; the other is refused, or replaces it when it may."""
    table(tmp_path)
    WRITERS[kind](tiny, tmp_path / "alone", False)
    expected = snapshot(tmp_path / "alone")
    out = tmp_path / "out"
    for number in range(rounds):
        overwrite = number % 2 == 1
        results = at_once([partial(WRITERS[kind], tiny, out, overwrite)] * 2)
        refused = [result for result in results if isinstance(result, LoadstoneError)]
        assert len(refused) in ((0, 1) if overwrite else (1,)), refused
        for error in refused:
            assert isinstance(error, UsageError)
            assert any(text in str(error) for text in ("another process is writing", "exists", "appeared"))
        assert snapshot(out) == expected
        assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "out", "table.csv"]
        if overwrite:
            shutil.rmtree(out)


@pytest.mark.parametrize("rounds", many(20, large=500))
def test_writers_and_readers_of_one_cache_entry(
    tmp_path: Path, rounds: int, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(tmp_path)

    def write(value: float) -> None:
        for _ in range(rounds):
            store.finish("ab1", {"nll": np.full(5000, value)}, {})

    def read() -> None:
        for _ in range(rounds):
            found = store.finished("ab1")
            assert found is None or len(set(found[0]["nll"])) == 1

    at_once([lambda: write(1.0), lambda: write(2.0), read, read])
    assert "damaged" not in caplog.text and "cannot be written" not in caplog.text
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["ab1.scores.npz"]


def filled(source: Path, out: Path, value: float) -> Path:
    """A copy whose weights are all ``value``, and whose config says so."""
    model = loadstone.load(source)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(value)
    model.config.fill = value
    model.save_pretrained(out)
    return out


@pytest.mark.parametrize("count", many(60, large=1000))
def test_readers_during_overwrites_find_one_whole_directory(tiny: Path, tmp_path: Path, count: int) -> None:
    """In every load and inspect, weights and config are of one write."""
    sources = [filled(tiny, tmp_path / f"{value}", float(value)) for value in range(3)]
    out = tmp_path / "out"
    shutil.copytree(sources[0], out)
    stop, found, wrong = threading.Event(), set[float](), list[str]()
    begun = time.monotonic()
    loadstone.load(out)
    chance, seconds = random.Random(0), time.monotonic() - begun

    def read() -> None:
        while not stop.is_set():
            if problems := collect(out).problems:
                wrong.append(str(problems))
            try:
                model = loadstone.load(out)
            except Changed:
                # Replaced during each of its tries.
                continue
            values = {weight.flatten()[0].item() for weight in model.parameters()} | {model.config.fill}
            found.update(values)
            if len(values) != 1:
                wrong.append(str(values))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    try:
        number = 0
        # A slow reader may see one write alone in so many.
        while number < count or (len(found) < 2 and number < 1000 * count):
            number += 1
            with new_directory(out, overwrite=True) as work:
                shutil.copytree(sources[number % 3], work, dirs_exist_ok=True)
            # Now and then long enough for a load: nobody reads what is replaced faster than that each time.
            stop.wait(chance.uniform(0, 2.5 * seconds))
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    assert not wrong and len(found) > 1
