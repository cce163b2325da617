"""Stop every command that writes at every file-system call, in four ways, and hold what is left to what is promised.

``python -m tests.attacks.crash`` tries all of them; ``--sample 100`` a hundred of them, chosen by ``--seed``.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import json
import os
import random
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Set
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path

from tests.attacks.faults import KILL, TERMINATE, Call, Decide, Ended, watch, why_not

from loadstone.text.arrays import read_arrays

WAYS: dict[str, int] = {"kill": KILL, "EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "SIGTERM": TERMINATE}
# Exit codes that each way may end with, when the command notices.
_CODES = {"kill": {-9}, "EIO": {2, 3, 5}, "ENOSPC": {5}, "SIGTERM": {143}}
# Where a way makes a difference: a full disk refuses what needs space, and between two calls that change nothing a
# kill leaves the same.
_WHERE: dict[str, Callable[[Call], bool]] = {"kill": lambda c: c.changes, "ENOSPC": lambda c: c.needs_space}
State = dict[str, str]


def directory_state(path: Path) -> State | None:
    """The sha256 of each file of a directory; None where there is none."""
    if not path.is_dir():
        return None
    files = (p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def evaluation_state(path: Path) -> State | None:
    """What a result says, without the times that it took."""
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    (record,) = result["models"]
    return {"loss": repr(record["loss"]), "sums": repr(record["unit_losses"])}


@dataclass(frozen=True)
class Scene:
    """A command that writes ``out``: its arguments in the folder, and those that made an earlier output."""

    name: str
    command: str
    earlier: str
    replace: str = " --overwrite"
    state: Callable[[Path], State | None] = directory_state
    # Whether transformers reads the model.
    by_library: bool = False


_EVAL = "eval -M model --separator 1 --cache cache --json out --data"
SCENES = (
    Scene(
        "finalize",
        "finalize -M model --quantize int8-weight-only --max-shard-size 60KB -o out",
        "finalize -M model --quantize intx4-weight-only -o out",
    ),
    Scene(
        "export-fakequant",
        "export-fakequant -M model --format nvfp4 -o out",
        "export-fakequant -M model --format mxfp4 -o out",
    ),
    Scene(
        "fit-table",
        "fit --table table.csv --target y -o out",
        "fit --table table.csv --target a -o out",
    ),
    Scene(
        "fit-prompt",
        "fit -M model --prompt prompt.txt -o out",
        "fit -M model --prompt prompt.txt --cache-dtype bfloat16 -o out",
        by_library=True,
    ),
    Scene(
        "eval",
        f"{_EVAL} text.txt",
        f"{_EVAL} prompt.txt",
        replace="",
        state=evaluation_state,
        by_library=True,
    ),
)


@dataclass
class Stage:
    """A folder with a model, a table and texts, in which a scene is played again and again."""

    folder: Path
    scene: Scene
    overwrite: bool
    given: set[str] = field(default_factory=set)
    old: State | None = None
    new: State | None = None
    names: set[str] = field(default_factory=set)
    calls: list[Call] = field(default_factory=list)
    said: set[str] = field(default_factory=set)

    def prepare(self) -> list[str]:
        """Play the scene undisturbed; returns what is wrong with it."""
        self.given = _names(self.folder)
        if self.overwrite:
            ended = self.run(self.scene.earlier)
            assert ended.code == 0, ended.printed
            self.old = self.scene.state(self.out)
            self.outputs = _names(self.folder) - self.given
            (self.folder.parent / "earlier").mkdir()
            for name in self.outputs:
                _copy(self.folder / name, self.folder.parent / "earlier" / name)
        else:
            self.outputs = set()
        states: list[tuple[Call, State | None]] = []

        def note(call: Call) -> None:
            self.calls.append(call)
            if len(self.calls) == 1 or self.calls[-2].changes:
                # What another process would find at this moment.
                states.append((call, self.scene.state(self.out)))

        ended = self.run(self.command, note)
        assert ended.code == 0, ended.printed
        self.new = self.scene.state(self.out)
        self.names = {self.folder.name} | {path.name for path in self.folder.rglob("*")}
        assert self.new and self.new != self.old, "the scene changes nothing"
        return [
            f"before {call} the output was neither" for call, found in states if not self.is_whole(found)
        ] + self.left_over()

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def command(self) -> str:
        return self.scene.command + (self.scene.replace if self.overwrite else "")

    def is_whole(self, found: State | None) -> bool:
        return found in (self.old, self.new)

    def run(self, command: str, decide: Decide = lambda call: None) -> Ended:
        def work() -> int:
            import torch

            from loadstone.cli.app import main

            # Torch renews its threads at the first call after a fork, which two threads must not do at once.
            torch.set_num_threads(1)
            os.chdir(self.folder)
            try:
                main(command.split())
            except SystemExit as stop:
                return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
            return 0

        return watch(work, self.folder, decide)

    def reset(self) -> None:
        for name in _names(self.folder) - self.given:
            _remove(self.folder / name)
        for name in self.outputs:
            _copy(self.folder.parent / "earlier" / name, self.folder / name)

    def left_over(self, allowed: Set[str] = frozenset()) -> list[str]:
        """Names that a finished command should not leave."""
        names = _names(self.folder) - self.given - {"out", "cache"}
        cache = self.folder / "cache"
        found = [p for p in cache.rglob("*") if p.is_file()] if cache.is_dir() else []
        names |= {str(p.relative_to(self.folder)) for p in found if p.suffix != ".npz"}
        names -= allowed
        return [f"left over: {', '.join(sorted(names))}"] if names else []

    def disturbed(self, number: int, way: str) -> list[str]:
        """Stop the command at its call ``number``; returns the promises that were broken."""
        self.reset()
        before = _everything(self.folder)
        count, hit = -1, None

        def decide(call: Call) -> int | None:
            nonlocal count, hit
            count += 1
            # Calls of several threads come in an order of their own.
            if count < number or not _WHERE.get(way, lambda call: True)(call) or (hit and way != "ENOSPC"):
                return None
            hit = hit or call
            # A full disk stays full.
            return WAYS[way]

        ended = self.run(self.command, decide)
        if self.scene.by_library and hit and way == "EIO" and hit.looks_up and ended.code == 0:
            # transformers takes a file that cannot be looked up for an absent one.
            return []
        wrong = self._after_fault(way, hit, ended)
        found = self.scene.state(self.out)
        if _everything(self.folder) == before:
            # Another run would be the undisturbed one.
            return wrong
        again = self.run(self.command)
        refused = not self.overwrite and found is not None and self.scene.replace
        if again.code != (2 if refused else 0):
            wrong.append(f"the run after it ended with {again.code}: {_last(again.printed)}")
        if self.scene.state(self.out) != self.new:
            wrong.append("the run after it gave other bytes")
        return wrong + [f"{line} (after another run)" for line in self.left_over()]

    def _after_fault(self, way: str, hit: Call | None, ended: Ended) -> list[str]:
        wrong = []
        entries = (self.folder / "cache").rglob("*.npz")
        if not self.is_whole(self.scene.state(self.out)) or None in map(read_arrays, entries):
            wrong.append("the output is neither the earlier one nor the new one")
        if ended.code not in _CODES[way] | {0}:
            wrong.append(f"exit code {ended.code}: {_last(ended.printed)}")
        if ended.code == 0 and hit and self.scene.state(self.out) != self.new:
            wrong.append("exit code 0 without the output")
        if way in ("EIO", "ENOSPC") and ended.code:
            lines = [line for line in ended.printed.splitlines() if line.startswith("loadstone: error: ")]
            self.said.update(re.sub(r"/tmp/\w+/", "", line) for line in lines)
            if ended.code == 2 and "Invalid value for" in ended.printed:
                lines = re.findall("(?i)path '.*' is not readable", ended.printed)
            if len(lines) != 1 or "Traceback" in ended.printed:
                wrong.append(f"not one line of error: {ended.printed[-400:]}")
            elif not any(re.search(rf"\b{re.escape(name)}\b", lines[0]) for name in self.names):
                wrong.append(f"no path in: {lines[0]}")
        # Finished shards are kept for a resume, what the disk refused to remove or lock cannot be removed, and of two
        # outputs none is removed where it cannot be seen which is in place.
        paths = hit.paths if hit and way == "EIO" else ()
        paths = [os.path.relpath(path, self.folder) for path in paths]
        refused = {*paths, *(path.partition("/")[0] for path in paths)}
        if hit and hit.looks_up and "out" in paths:
            refused.add(".out.replaced")
        if way != "kill":
            wrong += self.left_over({".out.partial"} | refused)
        return wrong


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def _everything(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What is in a folder, by inode, size and time of change."""
    stats = {str(path): path.lstat() for path in folder.rglob("*")}
    return {
        name: (found.st_ino, found.st_size, found.st_mtime_ns)
        for name, found in stats.items()
        if not stat.S_ISDIR(found.st_mode)
    } | {name: (0, 0, 0) for name, found in stats.items() if stat.S_ISDIR(found.st_mode)}


def _last(printed: str) -> str:
    return " | ".join(printed.strip().splitlines()[-2:])[-400:]


def _copy(one: Path, other: Path) -> None:
    if one.is_dir():
        shutil.copytree(one, other)
    else:
        shutil.copy(one, other)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def make_inputs(folder: Path) -> None:
    """A tiny Llama in two shards with a tokenizer, a table, a prompt and a text."""
    import torch
    import transformers
    from tests.conftest import tiny_config, write_tokenizer

    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config("llama-tied"), dtype=torch.bfloat16)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder / "model", max_shard_size="100KB")
    write_tokenizer(folder / "model")
    rows = "".join(f"{a},{a * 7 % 5},{'xy'[a % 2]}\n" for a in range(20))
    (folder / "table.csv").write_text("a,b,y\n" + rows)
    (folder / "prompt.txt").write_text("Once upon a time there was a tiny model.")
    (folder / "text.txt").write_text("The text to measure on. " * 10)


def trials(
    scenes: tuple[Scene, ...], ways: list[str], sample: int | None, seed: int, verbose: bool = False
) -> Iterator[str]:
    """Yields what was wrong; ``sample``: trials for each scene, with an earlier output and without."""
    chance = random.Random(seed)
    for scene in scenes:
        for overwrite in (False, True):
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place).resolve() / "folder"
                folder.mkdir()
                make_inputs(folder)
                stage = Stage(folder, scene, overwrite)
                name = f"{scene.name}{' --overwrite' if overwrite else ''}"
                for wrong in stage.prepare():
                    yield f"{name}: {wrong}"
                chosen = [
                    (number, way)
                    for number, call in enumerate(stage.calls)
                    for way in ways
                    if way not in _WHERE or _WHERE[way](call)
                ]
                started, count = time.monotonic(), len(chosen)
                if sample is not None and sample < count:
                    chosen = sorted(chance.sample(chosen, sample))
                for number, way in chosen:
                    for wrong in stage.disturbed(number, way):
                        yield f"{name}, {way} at {number}, {stage.calls[number]}: {wrong}"
                for line in sorted(stage.said) if verbose else ():
                    print(f"  {line}")
                seconds = time.monotonic() - started
                print(
                    f"{name}: {len(stage.calls)} calls, {len(chosen)} of {count} trials in {seconds:.0f} s",
                    flush=True,
                )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument(
        "--sample", type=int, help="trials of each command, with an earlier output and without"
    )
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--scenes", default=",".join(scene.name for scene in SCENES))
    options.add_argument("--ways", default=",".join(WAYS))
    options.add_argument("--verbose", action="store_true", help="show the errors that users would see")
    given = options.parse_args()
    if reason := why_not():
        sys.exit(reason)
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    warm_up()
    scenes = tuple(scene for scene in SCENES if scene.name in given.scenes.split(","))
    found = 0
    for wrong in trials(scenes, given.ways.split(","), given.sample, given.seed, given.verbose):
        found += 1
        print(wrong, flush=True)
    print(f"{found} broken promises")
    sys.exit(found > 0)


def warm_up() -> None:
    """Play every scene in this process, so that those forked from it import nothing."""
    import torch

    from loadstone.cli.app import main as loadstone

    torch.set_num_threads(1)
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as place:
        make_inputs(Path(place))
        os.chdir(place)
        for scene in SCENES:
            try:
                with redirect_stdout(io.StringIO()):
                    loadstone(["-q", *scene.command.split()])
            except SystemExit as stop:
                assert not stop.code, scene.name
            if Path("out").exists():
                _remove(Path("out"))
        os.chdir(before)


if __name__ == "__main__":
    main()
