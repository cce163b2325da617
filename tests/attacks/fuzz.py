"""A seeded fuzzer: one change at a time to a sound directory or file of every kind that a command reads.

``python tests/attacks/fuzz.py --cases 5000 --seed 0`` prints every case that breaks a promise of docs/security.md, and
ends with 1 if there was one. A case is known by its number alone: ``--seed N --cases 1 --show`` repeats it.

Each case is a command in a process forked from one that has imported everything. It must end by itself with exit code
0, 2, 3 or 5, within ten seconds of CPU and a gigabyte, open no socket, start no process and write nothing that moves a
terminal's cursor. Where it ends with 0, ``inspect --verify`` finds the change or the tensors are those from before.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# As few threads as possible, for a process with threads cannot be forked; and no hub, as for a user without network.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HOME": "/nonexistent",
}
sys.path.insert(0, str(Path(__file__).parent))

import templates
import tqdm
from mutations import SPECIAL, mutate, special
from templates import OTHERS, SCORING, command

from loadstone.artifact.context_file import read_context
from loadstone.artifact.manifest import verify_files
from loadstone.errors import LoadstoneError

SECONDS = 10
MEMORY = 1_000_000_000
OUTPUT = 200_000
ALLOWED = (0, 2, 3, 5)


@dataclass(frozen=True)
class Reader:
    """What is changed, relative to the templates, and the commands that read it: ``@`` stands for its copy, ``%`` for
    the templates' directory, ``+`` for an output."""

    target: str
    commands: tuple[str, ...]
    model: bool = False


_MODEL = (
    "inspect @ --verify",
    "inspect @ --json",
    "load @",
    "load @",
    "load @",
    "late @",
    "late @",
    "eval -M @ --data %/text/a.txt",
    "finalize -M @ -o +",
    "finalize -M @ -o + --quantize int8-weight-only",
    "export-fakequant -M @ -o + --format int8",
)
CALIBRATED = "--quantize intx4-weight-only:group_size=32 --calibrate-tokens 512"
_EVAL = "eval -M %/dense --data"
READERS = {
    **{
        kind: Reader(kind, _MODEL, model=True)
        for kind in (
            "dense",
            "sharded",
            "bin",
            "distributed",
            "torchao",
            "packed",
            "fakequant",
            "adapter",
            "experts",
        )
    },
    **{
        kind: Reader(kind, tuple(line for line in _MODEL if not line.startswith("eval")), model=True)
        for kind in OTHERS
    },
    "run": Reader("run", (*_MODEL, "inspect @ --checkpoint best", "load-best @")),
    "fitted": Reader(
        "fitted", ("inspect @ --verify", "predict -M @ --data %/table.csv", "eval -M @ --data %/table.csv")
    ),
    "prefix": Reader(
        "prefix",
        (
            "inspect @ --verify",
            "eval -M @ --data %/text/a.txt",
            "eval -M @ --data %/text/a.jsonl --base %/dense",
        ),
    ),
    "cache": Reader("cache", (f"{_EVAL} %/text/a.txt --cache @",)),
    "baseline": Reader("base.json", (f"{_EVAL} %/text/a.txt --baseline @",)),
    "recipe": Reader(
        "recipe.yaml", ("finalize -M %/dense --recipe @ -o +", "finalize -M %/dense --recipe @ --dry-run")
    ),
    "rules": Reader("rules.yaml", ("export-fakequant -M %/dense -o + --rules @",)),
    "prompt": Reader("prompt.json", ("fit -M %/dense --prompt @ -o +",)),
    "prompt text": Reader("prompt.txt", ("fit -M %/dense --prompt @ -o +",)),
    "base of a context": Reader(
        "dense", ("eval -M %/prefix --data %/text/a.txt --base @", "inspect %/prefix --base @")
    ),
    "base of an adapter": Reader("dense", ("load-adapter @", "inspect %/adapter --base @")),
    "table": Reader(
        "table.csv",
        ("predict -M %/fitted --data @", "eval -M %/fitted --data @", "fit --table @ --target label -o +"),
    ),
    "parquet table": Reader(
        "table.parquet", ("predict -M %/fitted --data @", "fit --table @ --target label -o +")
    ),
    **{
        f"text {name}": Reader(
            f"text/{name}",
            (
                "corpus @",
                "corpus @ 1",
                "corpus @",
                f"{_EVAL} @",
                f"finalize -M %/dense -o + {CALIBRATED} --calibrate @",
            ),
        )
        for name in (
            "a.txt",
            "a.jsonl",
            "a.json",
            "a.csv",
            "a.txt.gz",
            "a.jsonl.xz",
            "a.txt.bz2",
            "a.parquet",
            "saved",
        )
    },
}


def digest(directory: Path, **options: Any) -> str:
    """sha256 over the tensors of the loaded model, by name."""
    import torch

    import loadstone

    total = hashlib.sha256()
    for name, tensor in sorted(loadstone.load(directory, device="cpu", **options).state_dict().items()):
        whole = (
            tensor.dequantize()
            if type(tensor) is not torch.Tensor and hasattr(tensor, "dequantize")
            else tensor
        )
        total.update(f"{name}\0{whole.dtype}{tuple(whole.shape)}".encode())
        total.update(whole.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _call(work: Any, *args: Any, **options: Any) -> None:
    """A call of the library, ended as the command line ends."""
    from loadstone.cli.app import _fail, _outcome

    try:
        work(*args, **options)
    except Exception as error:
        _fail(*_outcome(error))
    sys.exit(0)


class Fuzzer:
    """The templates in ``folder``, and a process that has everything imported."""

    def __init__(self, folder: Path, show: bool = False) -> None:
        self.show = show
        self.folder, self.work = folder, folder / "work"
        self.templates = folder / "templates"
        self.log = folder / "log"
        # tqdm's bars start a thread otherwise.
        tqdm.tqdm.monitor_interval = 0
        # Made in this process, which then has imported what every command needs.
        with (folder / "made").open("w") as file, redirect_stdout(file), redirect_stderr(file):
            templates.make(self.templates)
            self.digests = {k: digest(self.templates / r.target) for k, r in READERS.items() if r.model}
            command("predict", "-M", self.templates / "fitted", "--data", self.templates / "table.parquet")
            for text in ("a.parquet", "saved"):
                place = self.templates / "text" / text
                command("eval", "-M", self.templates / "prefix", "--data", place, *SCORING)
        # The handler writes to the file above.
        logging.getLogger("loadstone").handlers.clear()
        warnings.simplefilter("ignore")
        # pyarrow's allocator has a thread of its own, which takes care of forks.
        if threading.active_count() > 1:
            raise RuntimeError(f"{threading.enumerate()}: threads before the fork")
        gc.collect()
        gc.freeze()

    def child(self, work: Any, *, limited: bool = True, unprivileged: bool = False) -> tuple[int, str]:
        """Exit code (negative: a signal) and output of ``work`` in a forked process."""
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            code = 97
            try:
                _enter(self.log, limited, unprivileged)
                work()
                code = 0
            except SystemExit as stop:
                code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 98
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status, usage = os.wait4(pid, 0)
        self.peak, self.seconds = usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime
        return os.waitstatus_to_exitcode(status), self.log.read_bytes().decode(errors="surrogateescape")

    def case(self, seed: int) -> str | None:
        """What went wrong in one case; None when every promise was kept."""
        chance = random.Random(seed)
        kind = chance.choice(sorted(READERS))
        line = chance.choice(READERS[kind].commands)
        others = self.templates / chance.choice(["dense", "torchao", "bin", "adapter", "fitted", "text"])
        return self.attempt(f"seed {seed}", kind, line, lambda target: mutate(target, others, chance))

    def walk(self, every: bool) -> Iterator[str | None]:
        """Each file that a command may read, replaced by what no command may open; by each of these if ``every``."""
        number = 0
        for kind, reader in sorted(READERS.items()):
            origin = self.templates / reader.target
            for path in sorted(origin.rglob("*")) if origin.is_dir() else [origin]:
                if path.is_dir():
                    continue
                for way in range(len(SPECIAL)) if every else [number % len(SPECIAL)]:
                    line = reader.commands[number % len(reader.commands)]
                    name = path.relative_to(origin)
                    number += 1
                    yield self.attempt("walk", kind, line, lambda t, n=name, w=way: special(t / n, w))  # type: ignore[misc]

    def attempt(self, label: str, kind: str, line: str, change: Callable[[Path], str]) -> str | None:
        """One command after a change to its target, or (``late``) with the change after it was looked at."""
        reader = READERS[kind]
        _clear(self.work)
        self.work.mkdir()
        target, origin = self.work / Path(reader.target).name, self.templates / reader.target
        shutil.copytree(origin, target) if origin.is_dir() else shutil.copyfile(origin, target)
        late = line.startswith("late ")
        what = "afterwards" if late else change(target)
        label = f"{label}: {kind}, {what}: {line}"
        words = (
            line.replace("@", str(target))
            .replace("%", str(self.templates))
            .replace("+", str(self.work / "out"))
        )

        def work() -> None:
            if late:
                _late(target, lambda: print(change(target)))
            else:
                _run(words.split())

        code, log = self.child(work, unprivileged="locked" in what)
        if self.show:
            print(f"{label} -> {code}, {self.seconds:.2f} s\n{log}", flush=True)
        problem = self.judge(code, log)
        if problem is None and code == 0 and reader.model and not late:
            problem = self.compare(kind, target)
        if problem is None and kind in ("fitted", "prefix") and code == 0 and "--verify" not in line:
            problem = self.compare_context(target, origin)
        return f"{label}: {problem}" if problem else None

    def judge(self, code: int, log: str) -> str | None:
        last = " ".join(log.split())[-400:]
        if code not in ALLOWED:
            reasons = {-14: "does not end", 96: "a socket or a process", -24: "over 10 seconds of CPU"}
            return f"exit {code} {reasons.get(code, '')} {last!r}"
        if self.peak > _pages(1) + MEMORY:
            return f"{(self.peak - _pages(1)) / 1e6:.0f} MB"
        if len(log) > OUTPUT:
            return f"{len(log)} characters of output"
        if "Traceback" in log:
            return f"a traceback: {last!r}"
        odd = sorted({c for c in log if not c.isprintable() and c not in "\n\t\r"})
        if odd:
            return f"prints {odd[:4]}"
        left = [
            p.name
            for p in self.work.iterdir()
            if ".partial" in p.name or ".lock" in p.name or p.name == "out"
        ]
        if left and code:
            return f"leaves {left}"
        return None

    def compare(self, kind: str, target: Path) -> str | None:
        try:
            if verify_files(target):
                return None
        except LoadstoneError:
            return None
        place = self.folder / "digest"
        code, _ = self.child(lambda: place.write_text(digest(target)), limited=False)
        if code or place.read_text() == self.digests[kind]:
            return None
        return "exit 0 with other tensors, and --verify finds nothing"

    def compare_context(self, target: Path, origin: Path) -> str | None:
        if all(
            (target / p.name).is_file() and _content(target / p.name) == _content(p) for p in origin.iterdir()
        ):
            return None
        try:
            read_context(target, verify=True)
        except LoadstoneError:
            return None
        return "exit 0 with another context, and --verify finds nothing"


def _content(path: Path) -> Any:
    """The bytes of a file, or what its JSON says, in whatever layout."""
    raw = path.read_bytes()
    try:
        return json.loads(raw) if path.suffix == ".json" else raw
    except ValueError:
        return raw


def _run(words: list[str]) -> None:
    import loadstone
    from loadstone.cli import main
    from loadstone.text.corpus import read_corpus

    name, *rest = words
    if name == "corpus":
        _call(read_corpus, rest[0], limit=int(rest[1]) if rest[1:] else None)
    elif name == "load":
        _call(loadstone.load, rest[0], device="cpu")
    elif name == "load-best":
        _call(loadstone.load, rest[0], device="cpu", checkpoint="best")
    elif name == "load-adapter":
        _call(loadstone.load, Path(rest[0]).parents[1] / "templates" / "adapter", device="cpu", base=rest[0])
    elif name == "eval" and "table.csv" not in " ".join(rest):
        rest += [str(a) for a in SCORING]
    main([name, *rest])


def _late(directory: Path, change: Any) -> None:
    """A load of a directory that changes after it was looked at."""
    import loadstone

    plan = loadstone.plan(directory, device="cpu")
    change()
    _call(loadstone.load, plan)


def _enter(log: Path, limited: bool, unprivileged: bool) -> None:
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if not limited:
        return
    resource.setrlimit(resource.RLIMIT_AS, (_pages(0) + MEMORY + 200_000_000,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    # More by the clock, for a machine that does other work; what waits for ever does not end in any time.
    signal.alarm(6 * SECONDS)
    if unprivileged:
        _obey_permissions()
    sys.addaudithook(_guard)


def _pages(which: int) -> int:
    """Bytes of this process: of address space (0), or resident (1)."""
    return int(Path("/proc/self/statm").read_text().split()[which]) * resource.getpagesize()


def _obey_permissions() -> None:
    """Give up root's right to read every file (the capabilities DAC_OVERRIDE and DAC_READ_SEARCH)."""
    import ctypes

    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None)
    libc.capget(header, data)
    data[0] &= ~6
    data[1] &= ~6
    libc.capset(header, data)


def _guard(event: str, arguments: tuple[Any, ...]) -> None:
    if event in (
        "socket.connect",
        "socket.getaddrinfo",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "subprocess.Popen",
    ):
        os.write(2, f"{event} {arguments!r:.300}\n".encode())
        import traceback

        traceback.print_stack()
        os._exit(96)


def _clear(folder: Path) -> None:
    if folder.exists():
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir() and not path.is_symlink():
                path.chmod(0o700)
        shutil.rmtree(folder)


def fuzz(first: int, cases: int, walk: str | None, show: bool = False) -> int:
    """Print the cases that went wrong; returns how many."""
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder), show)
        walked = fuzzer.walk(walk == "every") if walk else iter(())
        for bad in itertools.chain(map(fuzzer.case, range(first, first + cases)), walked):
            if bad:
                wrong += 1
                print(bad, flush=True)
        _clear(fuzzer.work)
    return wrong


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fuzz every reader of every command, seeded.")
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--walk", choices=["some", "every"], help="also FIFOs, sockets and devices at every name"
    )
    parser.add_argument("--show", action="store_true", help="print each case and its output")
    options = parser.parse_args()
    begun = time.monotonic()
    found = fuzz(options.seed, options.cases, options.walk, options.show)
    print(f"{options.cases} cases in {time.monotonic() - begun:.0f} s: {found} broke a promise")
    sys.exit(bool(found))
