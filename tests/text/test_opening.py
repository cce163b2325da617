"""Text files of every kind: compressed, without a suffix, in a data set's folder; bombs and FIFOs."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import resource
from pathlib import Path

import pyarrow
import pytest
from tests.text.test_corpus import ROWS, write

from loadstone.errors import LoadstoneError, UsageError
from loadstone.text.corpus import read_corpus
from loadstone.text.opening import undecodable

_PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.Codec("zstd").compress(data, asbytes=True),
}


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".arrow"])
@pytest.mark.parametrize("packed", _PACK)
def test_every_kind_of_file_compressed(tmp_path: Path, suffix: str, packed: str) -> None:
    plain = Path(write(tmp_path / f"a{suffix}"))
    data = _PACK[packed](plain.read_bytes())
    file = tmp_path / f"b{suffix}{packed}"
    file.write_bytes(data)
    assert read_corpus(str(file)).documents == tuple(ROWS)
    # As `cat a b` makes them, of what may follow itself.
    if suffix == ".jsonl":
        file.write_bytes(data + data)
        assert read_corpus(str(file)).documents == tuple(ROWS * 2)
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(UsageError, match=r"not a whole|cannot be read"):
        read_corpus(str(file))


def test_plain_text_has_many_suffixes(tmp_path: Path) -> None:
    for name in ("notes", "README.md", "wiki.train.raw"):
        (tmp_path / name).write_text("Some text.\n")
        assert read_corpus(str(tmp_path / name)).documents == ("Some text.",)


def test_lines_under_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("".join(json.dumps({"text": row}) + "\n" for row in ROWS))
    assert read_corpus(str(tmp_path / "a.json")).documents == tuple(ROWS)


def test_a_data_sets_folder_has_splits(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "train-00000-of-00002.parquet", ROWS[:1])
    write(tmp_path / "data" / "train-00001-of-00002.parquet", ROWS[1:])
    write(tmp_path / "data" / "test-00000-of-00001.parquet", ["Held out."])
    assert read_corpus(str(tmp_path)).documents == ("Held out.",)
    assert read_corpus(str(tmp_path), split="train").documents == tuple(ROWS)
    with pytest.raises(UsageError, match="no split 'dev'"):
        read_corpus(str(tmp_path), split="dev")


def test_the_limit_ends_decompression(tmp_path: Path) -> None:
    line = json.dumps({"text": "word " * 200}).encode() + b"\n"
    with lzma.open(tmp_path / "a.jsonl.xz", "wb", preset=0) as handle:
        for _ in range(200):
            handle.write(line * 1000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(read_corpus(str(tmp_path / "a.jsonl.xz"), limit=1).documents) == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_a_line_without_end_takes_no_memory(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "a.txt.gz", "wb") as handle:
        for _ in range(300):
            handle.write(b"x" * 1_000_000)
        handle.write("é".encode()[:1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert undecodable(tmp_path / "a.txt.gz", "utf-8") == (300_000_000, 0xC3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_a_fifo_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(UsageError, match="not a regular file"):
        read_corpus(str(tmp_path / "a.jsonl"))


def test_damaged_pages_and_saved_data_sets_name_the_file(tmp_path: Path) -> None:
    """Of 60 damaged copies each is read, or refused in loadstone's own words."""
    import datasets

    write(tmp_path / "a.parquet", ["Many words in one place."] * 50)
    datasets.Dataset.from_list([{"text": "Some words."}] * 50).save_to_disk(tmp_path / "saved")
    refused = 0
    for name in ("a.parquet", "saved/data-00000-of-00001.arrow", "saved/state.json"):
        raw = (tmp_path / name).read_bytes()
        for number in range(20):
            at = number * len(raw) // 20
            (tmp_path / name).write_bytes(raw[:at] + b"\xff" * 20 + raw[at + 20 :])
            try:
                read_corpus(str(tmp_path / name.split("/")[0]))
            except LoadstoneError as error:
                assert str(tmp_path / name.split("/")[0]) in str(error) or "state.json" in str(error)
                refused += 1
        (tmp_path / name).write_bytes(raw)
    assert refused > 20


def test_a_parquet_of_one_long_text_repeated(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": pyarrow.array(["word " * 20_000] * 1000)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 1_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert len(read_corpus(str(tmp_path / "a.parquet"), limit=1).documents) == 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024
