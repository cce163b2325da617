"""Data sets' folders: splits by file names, configs by the README, nothing outside."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.text.test_corpus import ROWS, write

from loadstone.errors import UsageError
from loadstone.text.corpus import read_corpus


def test_splits_by_file_names(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "my-valid.csv", ["Held out."])
    (tmp_path / "README.md").write_text("# Stories\n")
    assert read_corpus(str(tmp_path)).documents == ("Held out.",)
    assert read_corpus(str(tmp_path), split="train").documents == tuple(ROWS)


def test_splits_by_folders(tmp_path: Path) -> None:
    for split, rows in (("train", ROWS), ("test", ["Held out."])):
        (tmp_path / split).mkdir()
        write(tmp_path / split / "part.parquet", rows)
    assert read_corpus(str(tmp_path)).documents == ("Held out.",)


def _configured(path: Path, configs: str) -> Path:
    (path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n# Stories\n")
    return path


def test_configs_of_the_readme(tmp_path: Path) -> None:
    write(tmp_path / "one.jsonl", ROWS)
    write(tmp_path / "two.jsonl", ["Zwei."])
    _configured(
        tmp_path,
        "- config_name: en\n  data_files: one.jsonl\n"
        "- config_name: de\n  data_files:\n  - split: dev\n    path: two.*\n",
    )
    assert read_corpus(f"{tmp_path}:en").documents == tuple(ROWS)
    assert read_corpus(f"{tmp_path}:de").documents == ("Zwei.",)
    assert read_corpus(f"{tmp_path}:de", split="dev").documents == ("Zwei.",)
    with pytest.raises(UsageError, match="several configs"):
        read_corpus(str(tmp_path))
    with pytest.raises(UsageError, match=r"no config 'fr'. It has: en, de"):
        read_corpus(f"{tmp_path}:fr")


@pytest.mark.parametrize("pattern", ["../a.jsonl", "/etc/*", "https://example.org/a.jsonl", "hf://x/y"])
def test_files_elsewhere_are_refused(tmp_path: Path, pattern: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    write(tmp_path / "a.jsonl")
    _configured(inner, f"- config_name: default\n  data_files: {pattern}\n")
    with pytest.raises(UsageError, match="outside the folder"):
        read_corpus(str(inner))


def test_pictures_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.png").write_bytes(b"x")
    with pytest.raises(UsageError, match="neither a saved dataset nor text"):
        read_corpus(str(tmp_path))
