"""Where the files and rows of a data set are: folders laid out as on the hub, saved data sets, the hub's names."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loadstone.artifact.files import check_folder, check_inside, read_json, translated
from loadstone.errors import MissingError, UsageError
from loadstone.text.files import Choose, Row, beside_others, known, read_rows

log = logging.getLogger(__name__)
_MARKERS = ("state.json", "dataset_info.json", "dataset_dict.json")
# Rows that are checked at once.
_BATCH = 1000
# Which split is read unless one is asked for.
_SPLITS = ("test", "validation", "train")


def is_saved(path: Path) -> bool:
    """Whether `datasets` saved this directory."""
    return path.is_dir() and any((path / marker).exists() for marker in _MARKERS)


def saved_rows(path: Path, split: str | None, choose: Choose) -> Iterator[Row]:
    """The rows of a directory that `datasets` saved."""
    import datasets

    for folder in (path, *sorted(p for p in path.iterdir() if p.is_dir())):
        check_folder(folder)
        stored = read_json(folder / "state.json") if (folder / "state.json").exists() else {}
        with translated(f"{folder}/state.json: cannot be read", "Save the dataset again"):
            for file in stored.get("_data_files", []):
                check_inside(folder, file["filename"])
    with translated(f"{path}: cannot be read", "Save the dataset again"):
        yield from _rows(datasets.load_from_disk(str(path)), split, str(path), choose)


def hub_rows(name: str, split: str | None, choose: Choose) -> Iterator[Row]:
    """The rows of a dataset of the hub: ``owner/name`` or ``owner/name:config``."""
    import datasets

    repo, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(repo, config or None)
    except (ConnectionError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise MissingError(
            f"{name!r} is not a file, and could not be loaded as a dataset: {reason}",
            "Give a file, a directory, or the name of a dataset that can be reached",
        ) from None
    yield from _rows(loaded, split, name, choose)


def folder_rows(path: Path, config: str, split: str | None, choose: Choose) -> Iterator[Row]:
    """The rows of a folder's files: of one split where their names, or the README's ``configs``, say what is which;
    otherwise of all files that lie in it. ``config``: one of the README's, empty for its default."""
    parts = _split_files(path, config)
    if parts:
        for file in parts[_choose_split(split, list(parts), str(path))]:
            yield from read_rows(file, choose)
        return
    inner = sorted(file for file in path.iterdir() if beside_others(file))
    if not inner:
        raise UsageError(
            f"the directory '{path}' holds neither a saved dataset nor text", f"Known: {known()}"
        )
    if split is not None:
        log.warning("--split %s has no effect: %s has no splits", split, path)
    for file in inner:
        yield from read_rows(file, choose)


def _split_files(path: Path, config: str) -> dict[str, list[Path]]:
    """The files of each split, by the rules of `datasets`; empty where nothing names splits."""
    from datasets.data_files import DataFilesDict, get_data_patterns, sanitize_patterns

    patterns = _configured(path, config)
    try:
        found = get_data_patterns(str(path)) if patterns is None else sanitize_patterns(patterns)
        named = patterns is not None or list(found) != ["train"] or found["train"] != ["**"]
        files = DataFilesDict.from_patterns(found, base_path=str(path)) if named else {}
    except (
        OSError,
        ValueError,
    ) as error:  # its errors for a folder without files, and for patterns that match none
        if patterns is None:
            return {}
        raise UsageError(
            f"{path}/README.md: {' '.join(str(error).split())[:200]}", "Mend its configs"
        ) from None
    inside = {str(split): [Path(str(file)) for file in each] for split, each in files.items()}
    kept = {split: [file for file in each if beside_others(file)] for split, each in inside.items()}
    return {split: each for split, each in kept.items() if each}


def _configured(path: Path, config: str) -> Any:
    """The ``data_files`` of one of the README's configs; None where it has none. Files elsewhere are not read."""
    readme = path / "README.md"
    configs: dict[str, Any] = {}
    default = None
    if readme.is_file():
        from datasets.utils.metadata import MetadataConfigs
        from huggingface_hub import DatasetCard

        try:
            configs = MetadataConfigs.from_dataset_card_data(DatasetCard.load(readme).data)
            default = configs.get_default_config_name() if configs else None  # type: ignore[attr-defined]
        except Exception as error:  # of yaml and of huggingface_hub; a README need not describe data
            log.debug("%s: %s", readme, error)
            configs = {}
    if config and config not in configs:
        raise UsageError(f"{path} has no config {config!r}", f"It has: {', '.join(configs) or 'none'}")
    if configs and not config and default is None:
        raise UsageError(f"{path} has several configs", f"Name one, as in {path}:{next(iter(configs))}")
    patterns = configs.get(config or default or "", {}).get("data_files")
    for pattern in _strings(patterns):
        if "://" in pattern or pattern.startswith(("/", "~")) or ".." in Path(pattern).parts:
            raise UsageError(f"{readme}: {pattern!r} is outside the folder", "Only files in it are read")
    return patterns


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(list(value.values()))
    elif isinstance(value, list):
        for each in value:
            yield from _strings(each)


def _rows(loaded: Any, split: str | None, where: str, choose: Choose) -> Iterator[Row]:
    if hasattr(loaded, "keys"):
        loaded = loaded[_choose_split(split, list(loaded.keys()), where)]
    elif split is not None:
        log.warning("--split %s has no effect: %s has no splits", split, where)
    chosen = loaded.select_columns(choose(loaded.column_names, where))
    for at in range(0, len(chosen), _BATCH):
        part = chosen.select(range(at, min(at + _BATCH, len(chosen))))
        # Offsets of a damaged file would be followed out of memory.
        part.data.table.validate(full=True)
        for row in part:
            yield row, where


def _choose_split(split: str | None, names: Sequence[str], where: str) -> str:
    chosen = split or next((s for s in _SPLITS if s in names), names[0])
    if chosen not in names:
        raise UsageError(f"{where} has no split {chosen!r}", f"It has: {', '.join(names)}")
    if split is None and len(names) > 1:
        log.info("%s: reading the split %s (of %s)", where, chosen, ", ".join(names))
    return chosen
