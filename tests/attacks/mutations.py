"""One seeded change to a file or a directory: of its bytes, of what its format means, or of what lies at its name."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, 1e308, -0.5, "", "x" * 1000, "../x", "/etc/passwd",
    "\x1b[2J", "owner/name", "auto", "float16", [], {}, [[]], [None], ["x"], [-1, 2**40], {"a": 1}, {"": []},
    "(.*.*)*x!", "\ud800",
)  # fmt: skip
# What configs and descriptions may hold and a user would not: each leads a reader somewhere else.
KEYS: dict[str, tuple[Any, ...]] = {
    "auto_map": (
        {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
        {"AutoConfig": "owner/name--evil.C"},
    ),
    "attn_implementation": ("owner/kernel", "flash_attention_2", 3),
    "_attn_implementation": ("owner/kernel@main:f",),
    "backbone": ("owner/name",),
    "_name_or_path": ("owner/name",),
    "base_model_name_or_path": ("owner/name", "/dev/zero", "."),
    "custom_generate": ("owner/name",),
    "transformers_weights": ("../x.safetensors", "model.safetensors", 3),
    "quantization_config": ({"quant_method": "gptq"}, {"quant_method": "torchao"}, {"quant_method": []}, 7),
    "model_type": ("gpt2", "t5", "bert", "mamba", "qwen3_moe", "llava", "nothing", 4),
    "architectures": (["GPT2LMHeadModel"], ["LlamaModel"], ["Nothing"], [], "LlamaForCausalLM"),
    "tokenizer_class": ("BertTokenizer", "Nothing", 4),
    "num_hidden_layers": (0, 1, 10**4, 10**12, -3, "2", 2.5),
    "vocab_size": (0, 10**9, 10**13, -1),
    "hidden_size": (0, 7, 10**9),
    "chat_template": ("{% for x in range(10**9) %}{% endfor %}", "{{ ''.__class__.__mro__ }}", "{%", 3),
    "text_config": ({"num_hidden_layers": 10**6}, {}, 3),
}
YAML = (
    "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n",
    "default: !!python/object/apply:os.system [touch x]\n",
    "rules: &r\n  - *r\n",
    "rules:\n  - {modules: 're:(.*.*)*x!', scheme: skip}\n",
    "default: [" * 3000,
    "? [a]\n: b\n",
    "default: 3\n",
    "rules: []\nrules: []\n",
    "\t",
    "default: int8-weight-only:group_size=" + "9" * 5000 + "\n",
)
PLANTED = (
    "evil.py",
    "model.safetensors",
    "adapter_config.json",
    "context.json",
    "tokenizer.model",
    "x.pkl",
    "config.json",
    "chat_template.jinja",
    "processor_config.json",
    "generation_config.json",
    "vocab.json",
    "model.safetensors.index.json",
    "preprocessor_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def mutate(target: Path, others: Path, chance: random.Random) -> str:
    """Make one change to ``target`` (a file, or one below it); returns what it was.

    ``others``: a directory whose files may be put in its place.
    """
    files = [target] if target.is_file() else sorted(p for p in target.rglob("*") if p.is_file())
    path = chance.choice(files)
    ways = (
        _WAYS[_kind(path)]
        + (_BYTES if chance.random() < 0.4 else ())
        + (_NAMES if chance.random() < 0.4 else ())
    )
    way = chance.choice(ways)
    way(path, chance, others)
    return f"{way.__name__.strip('_')} {path.relative_to(target) if path != target else path.name}"


def _kind(path: Path) -> str:
    name = path.name
    if name == ".metadata":
        return "pickle"
    known = (".json", ".safetensors", ".bin", ".npz", ".yaml", ".distcp")
    return next((suffix for suffix in known if name.endswith(suffix)), "")


# Bytes, whatever they mean


def _some_bytes(path: Path, chance: random.Random, others: Path) -> None:
    raw = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 1, 4, 40])):
        if raw:
            # The first and the last bytes say where the others lie.
            within = chance.choice([len(raw), min(len(raw), 2048)])
            place = chance.randrange(within) if chance.random() < 0.8 else -1 - chance.randrange(within)
            raw[place] = chance.choice(
                [chance.randrange(256), raw[place] ^ (1 << chance.randrange(8)), 0, 255]
            )
    path.write_bytes(raw)


def _cut(path: Path, chance: random.Random, others: Path) -> None:
    raw = path.read_bytes()
    path.write_bytes(
        raw[: chance.choice([0, 1, 8, len(raw) // 2, len(raw) - 1, chance.randrange(len(raw) + 1)])]
    )


def _grow(path: Path, chance: random.Random, others: Path) -> None:
    tail = chance.choice([bytes(chance.randrange(1, 100)), b"\xff\xfe\x1b[2J", b"\n{}", b"x" * 300_000])
    raw = path.read_bytes()
    path.write_bytes(chance.choice([raw + tail, tail + raw]))


def _huge(path: Path, chance: random.Random, others: Path) -> None:
    # No more, since files that are hashed or copied whole take their time.
    os.truncate(path, 2 * 10**7 if path.suffix == ".gz" else 3 * 10**8)


def _moved_bytes(path: Path, chance: random.Random, others: Path) -> None:
    raw = path.read_bytes()
    a, b = sorted(chance.randrange(len(raw) + 1) for _ in range(2))
    path.write_bytes(chance.choice([raw[:a] + raw[b:], raw[:b] + raw[a:], raw[:a] + bytes(b - a) + raw[b:]]))


# What lies at a name


def _gone(path: Path, chance: random.Random, others: Path) -> None:
    path.unlink()


# What no command may open: a link to a device, a FIFO, a socket; and what no command may take for a file.
SPECIAL = (
    "/dev/zero",
    "fifo",
    "socket",
    "/dev/tty",
    "directory",
    "/dev/null",
    "loop",
    "nowhere",
    "..",
    "/etc/passwd",
)


def special(path: Path, which: int) -> str:
    """Put one of `SPECIAL` in the place of a file; returns its name."""
    path.unlink()
    what = SPECIAL[which]
    if what == "directory":
        path.mkdir()
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            # Names of sockets are short.
            here = os.open(path.parent, os.O_DIRECTORY)
            end.bind(f"/proc/self/fd/{here}/{path.name}")
            os.close(here)
    else:
        path.symlink_to(path.name if what == "loop" else what)
    return f"{what} {path.name}"


def _other_kind(path: Path, chance: random.Random, others: Path) -> None:
    special(path, chance.randrange(len(SPECIAL)))


def _locked(path: Path, chance: random.Random, others: Path) -> None:
    chance.choice([path, path.parent]).chmod(0)


def _swapped(path: Path, chance: random.Random, others: Path) -> None:
    shutil.copyfile(chance.choice(sorted(p for p in others.rglob("*") if p.is_file())), path)


def _planted(path: Path, chance: random.Random, others: Path) -> None:
    name = path.with_name(chance.choice(PLANTED))
    if not name.exists():
        _swapped(name, chance, others)
    if chance.random() < 0.3:
        name.unlink()
        os.mkfifo(name)


def _copied(path: Path, chance: random.Random, others: Path) -> None:
    name = chance.choice([n for n in (*PLANTED, path.name + ".bak") if n != path.name])
    shutil.copyfile(path, path.with_name(name))


# JSON and headers


def _json(path: Path, chance: random.Random, others: Path) -> None:
    path.write_bytes(_text(edited(json.loads(path.read_bytes()), chance)))


def _json_keys(path: Path, chance: random.Random, others: Path) -> None:
    key, value = chance.choice(sorted(KEYS)), json.loads(path.read_bytes())
    other = {key: chance.choice(KEYS[key])}
    path.write_bytes(_text(value | other if isinstance(value, dict) else [other, *value]))


def _json_deep(path: Path, chance: random.Random, others: Path) -> None:
    depth = chance.choice([50, 500, 5_000, 200_000])
    value = json.loads(path.read_bytes())
    key = chance.choice([*sorted(value), "x"]) if isinstance(value, dict) else "x"
    text = json.dumps({k: v for k, v in value.items() if k != key} if isinstance(value, dict) else {})
    path.write_text(f'{text[:-1]}{"," if len(text) > 2 else ""}"{key}":{"[" * depth}{"]" * depth}}}')


def _header(path: Path, chance: random.Random, others: Path) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = _text(edited(json.loads(raw[8 : 8 + length]), chance))
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


def _values(path: Path, chance: random.Random, others: Path) -> None:
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little") if path.suffix == ".safetensors" else 0
    if start < len(raw):
        at = chance.randrange(start, len(raw))
        some = chance.choice([b"\xff" * 8, bytes(64), chance.randbytes(4), b"\x7f\xc0" * 4])
        raw[at : at + len(some)] = some[: len(raw) - at]
    path.write_bytes(raw)


def _text(value: Any) -> bytes:
    return json.dumps(value).encode()


def edited(value: Any, chance: random.Random) -> Any:
    """Replace one value, at any depth, remove it, rename its key, or put another part of the whole in its place."""
    if isinstance(value, dict) and value and chance.random() < 0.9:
        key = chance.choice(sorted(value))
        way = chance.random()
        if way < 0.1:
            return {k: v for k, v in value.items() if k != key}
        if way < 0.2:
            other = chance.choice(["", "x", key + "x", chance.choice(sorted(value))])
            return {(other if k == key else k): v for k, v in value.items()}
        if way < 0.3:
            return value | {key: value[chance.choice(sorted(value))]}
        return value | {key: edited(value[key], chance)}
    if isinstance(value, list) and value and chance.random() < 0.7:
        place = chance.randrange(len(value))
        if chance.random() < 0.2:
            return value[:place] + value[place + 1 :] + chance.choice([[], value[place:] * 2])
        return [*value[:place], edited(value[place], chance), *value[place + 1 :]]
    if isinstance(value, str) and value[:1] in ("{", "["):
        try:
            return json.dumps(edited(json.loads(value), chance))
        except ValueError:
            pass
    if type(value) is int and chance.random() < 0.5:
        return chance.choice([value + 1, value - 1, value * 2, -value, value * 10**6])
    return chance.choice(ODD)


# Zip archives and pickles


def _archive(path: Path, chance: random.Random, others: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = [(e.filename, archive.read(e)) for e in archive.infolist()]
    at = chance.randrange(len(entries))
    pickles = [n for n, (name, _) in enumerate(entries) if name.endswith(".pkl")]
    at = pickles[0] if pickles and chance.random() < 0.6 else at
    name, raw = entries[at]
    way = chance.choice(["pickle", "cut", "gone", "twice", "renamed", "bomb", "packed"])
    compression = zipfile.ZIP_DEFLATED if way in ("bomb", "packed") else zipfile.ZIP_STORED
    if way == "pickle":
        entries[at] = (name, pickled(raw, chance))
    elif way == "cut":
        entries[at] = (name, raw[: len(raw) // 2])
    elif way == "gone":
        entries.pop(at)
    elif way == "twice":
        entries.append(entries[at])
    elif way == "renamed":
        entries[at] = (chance.choice(["../x", "/x", name + "x", entries[0][0]]), raw)
    elif way == "bomb":
        entries[at] = (name, chance.choice([raw + bytes(200_000_000), b"}" * 30_000_000]))
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, raw in entries:
            archive.writestr(name, raw)


def _pickle(path: Path, chance: random.Random, others: Path) -> None:
    path.write_bytes(pickled(path.read_bytes(), chance))


def pickled(raw: bytes, chance: random.Random) -> bytes:
    """A pickle with a few other instructions in it."""
    found = bytearray(raw)
    extra = (
        *(bytes([c]) for c in b"0(])}taesuRbN\x85\x88\x93Q."), b"h\x00", b"q\x01", b"h\x00h\x00\x86" * 3000,
        b"}" * 500_000,
        b"cos\nsystem\n", b"cbuiltins\neval\n", b"X\x03\x00\x00\x00abc", b"\x8a\x10" + b"\x7f" * 16, b"I9999999\n",
        b"r\xff\xff\xff\xff", b"J\xff\xff\xff\xff",
    )  # fmt: skip
    for _ in range(chance.choice([1, 1, 3])):
        at = chance.randrange(len(found))
        found[at : at + chance.choice([0, 0, 1, 2])] = chance.choice(extra)
    return bytes(found)


def _yaml(path: Path, chance: random.Random, others: Path) -> None:
    text = path.read_text()
    line = chance.choice(text.splitlines(keepends=True))
    odd = str(chance.choice(ODD)).encode("utf-8", "replace").decode()
    other = chance.choice([*YAML, line.replace(":", f": {odd}#", 1), line * 2, "", odd + "\n"])
    path.write_text(chance.choice([text.replace(line, other), text + other, other]))


_BYTES: tuple[Callable[..., None], ...] = (_some_bytes, _cut, _grow, _huge, _moved_bytes)
_NAMES: tuple[Callable[..., None], ...] = (
    _gone,
    _other_kind,
    _other_kind,
    _locked,
    _swapped,
    _planted,
    _copied,
)
_WAYS: dict[str, tuple[Callable[..., None], ...]] = {
    ".json": (_json,) * 6 + (_json_keys,) * 4 + (_json_deep,),
    ".safetensors": (_header,) * 5 + (_values,) * 2,
    ".bin": (_archive,) * 4 + (_values,),
    ".npz": (_archive,) * 4 + (_values,),
    ".distcp": (_some_bytes, _values, _cut),
    "pickle": (_pickle,) * 5,
    ".yaml": (_yaml,) * 6,
    "": _BYTES,
}
