"""Everything beside the weights: config.json without code references, sidecar files byte for byte, the
code itself."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from loadstone.artifact.files import MAX_CONFIG_BYTES, check_inside, is_file, read_text
from loadstone.errors import ArtifactError

STRIP, COPY = "strip", "copy"
AUTO_MAP = "auto_map"
_RELATIVE_IMPORT = re.compile(
    r"^\s*(?:from\s+\.(\w+)(?:\.\w+)*\s+import|from\s+\.\s+import\s+(\w+))", re.MULTILINE
)


def without_auto_map(value: Any) -> Any:
    """``value`` (parsed JSON) without ``auto_map`` at any depth: it names code that would not be there."""
    if isinstance(value, dict):
        return {k: without_auto_map(v) for k, v in value.items() if k != AUTO_MAP}
    if isinstance(value, list):
        return [without_auto_map(v) for v in value]
    return value


def config_text(config: dict[str, Any]) -> str:
    """config.json as transformers writes it."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def code_files(folder: Path, config: dict[str, Any]) -> dict[str, Path]:
    """The Python files that ``auto_map`` names, and those that they import, by name.

    Raises `ArtifactError` when one of them is not in the directory: a copy is whole or it is no copy.
    """
    wanted = sorted(set(_modules(config)))
    found: dict[str, Path] = {}
    while wanted:
        module = wanted.pop()
        name = f"{module}.py"
        if name in found:
            continue
        if "--" in module or not is_file(folder / name):
            raise ArtifactError(
                f"{folder}/config.json: auto_map needs {name}, which is not in the directory",
                "Copy the file beside config.json, or use --remote-code strip",
            )
        found[name] = check_inside(folder, name)
        for pair in _RELATIVE_IMPORT.findall(read_text(found[name], MAX_CONFIG_BYTES)):
            wanted += [part for part in pair if part]
    return found


def _modules(value: Any) -> list[str]:
    """``{"auto_map": {"AutoModel": "modeling_x.X"}} -> ["modeling_x"]``, at any depth."""
    modules: list[str] = []
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == AUTO_MAP and isinstance(inner, dict):
                for reference in inner.values():
                    names = reference if isinstance(reference, list) else [reference]
                    modules += [str(n).rpartition(".")[0] for n in names if n]
            else:
                modules += _modules(inner)
    elif isinstance(value, list):
        for inner in value:
            modules += _modules(inner)
    return modules


def copy_files(files: dict[str, Path], out: Path) -> None:
    """Copy each file byte for byte."""
    for name, path in files.items():
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
