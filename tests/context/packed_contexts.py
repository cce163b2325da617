"""Changing what a packed context says, with everything around it kept valid: what a forger would do."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loadstone.artifact.context_file import CONTEXT_JSON, CONTEXT_TENSORS, digest
from loadstone.artifact.formats.safetensors import read_header
from loadstone.artifact.manifest import sha256_file
from loadstone.context.tabpfn.packed_file import DESCRIPTION
from loadstone.context.tabpfn.packing import deflate, inflate


def redescribe(path: Path, stream: bytes) -> None:
    """Put ``stream`` in the place of a packed file's description."""
    raw = path.read_bytes()
    begin = read_header(path).tensors[DESCRIPTION].begin
    length = struct.unpack("<Q", raw[:8])[0]
    entries = json.loads(raw[8 : 8 + length])
    first = entries[DESCRIPTION]["data_offsets"][0]
    entries[DESCRIPTION] |= {"shape": [len(stream)], "data_offsets": [first, first + len(stream)]}
    header = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length : begin] + stream)


def rewrite(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change context.json, with its digest and the hash of its tensors made right again."""
    facts = json.loads((directory / CONTEXT_JSON).read_text())
    change(facts)
    path = directory / CONTEXT_TENSORS
    if isinstance(facts.get("files"), dict):
        facts["files"] = {CONTEXT_TENSORS: {"sha256": sha256_file(path), "bytes": path.stat().st_size}}
    facts["digest"] = digest(facts)
    (directory / CONTEXT_JSON).write_text(json.dumps(facts))


def rewrite_description(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the packed description of a context, and all that follows from it."""
    facts = json.loads((directory / CONTEXT_JSON).read_text())
    path, packed = directory / CONTEXT_TENSORS, facts["packed"]
    info = read_header(path).tensors[DESCRIPTION]
    stream = path.read_bytes()[info.begin : info.end]
    whole = inflate(DESCRIPTION, stream, packed["description"] + packed["small"])
    described = json.loads(whole[: packed["description"]])
    change(described)
    text = json.dumps(described).encode()
    redescribe(path, deflate(text + whole[packed["description"] :]))
    rewrite(directory, lambda f: f["packed"].update(description=len(text)))
