"""A seeded fuzzer: one change at a time to a good directory, which must be read or refused by `plan`, and found
by `verify_files`.

``python tests/attacks/fuzz.py --cases 1500 --seed 0`` prints every case that ends in another error or takes over ten
seconds, and exits with 1 if there was one. A case is known by its seed.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "artifact"))

from builders import dense, torchao

from loadstone import plan
from loadstone.artifact.hashing import sha256_file
from loadstone.artifact.manifest import MANIFEST, verify_files
from loadstone.errors import LoadstoneError

KINDS: dict[str, Callable[[Path], Any]] = {
    "dense": dense,
    "sharded": lambda d: dense(d, shards=2),
    "torchao": torchao,
    "run": lambda d: (dense(d / "checkpoint-1"), dense(d / "checkpoint-2", shards=2)),
}
ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    2**63,
    1e308,
    "",
    "x" * 1000,
    "../x",
    "\x1b[2J",
    [],
    {},
    [[]],
    {"a": 1},
)
SECONDS = 10


def mutate(directory: Path, chance: random.Random) -> str:
    """Make one change below ``directory``; returns what it was."""
    path = chance.choice(sorted(p for p in directory.rglob("*") if p.is_file()))
    raw = bytearray(path.read_bytes())
    ways = ["json"] * 6 if path.suffix == ".json" else ["header"] * 6
    way = chance.choice([*ways, "byte", "truncate", "grow", "directory", "fifo", "gone", "locked"])
    if way == "json":
        path.write_text(json.dumps(_edit(json.loads(raw), chance)))
    elif way == "header" and len(raw) > 8:
        length = int.from_bytes(raw[:8], "little")
        header = json.dumps(_edit(json.loads(raw[8 : 8 + length]), chance)).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    elif way == "byte" and raw:
        raw[chance.randrange(min(len(raw), 4096))] = chance.randrange(256)
        path.write_bytes(raw)
    elif way == "truncate":
        path.write_bytes(raw[: chance.randrange(len(raw) + 1)])
    elif way == "grow":
        path.write_bytes(raw + bytes(chance.randrange(1, 100)))
    elif way == "locked":
        path.chmod(0)
    else:
        path.unlink()
        if way == "directory":
            path.mkdir()
        elif way == "fifo":
            os.mkfifo(path)
    return f"{way} {path.relative_to(directory)}"


def _edit(value: Any, chance: random.Random) -> Any:
    """Replace one value, at any depth, or remove it, or rename its key."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(sorted(value))
        way = chance.random()
        if way < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if way < 0.2:
            return {(chance.choice(["", "x", key + "x"]) if k == key else k): v for k, v in value.items()}
        return value | {key: _edit(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        return [*value[:place], _edit(value[place], chance), *value[place + 1 :]]
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return json.dumps(_edit(json.loads(value), chance))
        except ValueError:
            pass
    return chance.choice(ODD)


def run_case(seed: int, folder: Path) -> str | None:
    """What went wrong in one case; None when it was read or refused."""
    chance = random.Random(seed)
    kind = chance.choice(sorted(KINDS))
    directory = folder / "m"
    shutil.rmtree(directory, ignore_errors=True)
    KINDS[kind](directory)
    files = {p.name: sha256_file(p) for p in directory.iterdir() if p.is_file()}
    (directory / MANIFEST).write_text(json.dumps({"format_version": 1, "files": files}))
    what = mutate(directory, chance)
    changed = any(
        not (directory / name).is_file() or sha256_file(directory / name) != digest
        for name, digest in files.items()
    )
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        for ask in (plan, verify_files):
            try:
                if ask(directory) == [] and changed and MANIFEST not in what:
                    return f"seed {seed}: {kind}, {what}: --verify does not find it"
            except LoadstoneError:
                pass
            except Exception as error:
                return f"seed {seed}: {kind}, {what}: {type(error).__name__}: {str(error)[:200]}"
    finally:
        signal.alarm(0)
    return None


def _too_long(signum: int, frame: Any) -> None:
    raise TimeoutError(f"over {SECONDS} seconds")


def fuzz(first: int, cases: int) -> list[str]:
    """The cases that went wrong."""
    logging.disable(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory() as folder:
            return [bad for seed in range(first, first + cases) if (bad := run_case(seed, Path(folder)))]
    finally:
        logging.disable(logging.NOTSET)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fuzz detect and plan, seeded.")
    parser.add_argument("--cases", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    wrong = fuzz(options.seed, options.cases)
    print("\n".join(wrong) or f"{options.cases} cases: each was read or refused")
    sys.exit(bool(wrong))
