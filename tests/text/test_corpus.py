from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from loadstone.errors import MissingError, UsageError
from loadstone.text.corpus import read_corpus

ROWS = ["One document.", "Another — with a dash.\nTwo lines.", "Third."]


def write(path: Path, rows: list[str] = ROWS, column: str = "text") -> str:
    records = [{"id": i, column: row} for i, row in enumerate(rows)]
    match path.suffix:
        case ".txt":
            path.write_text("\n\f\n".join(rows), encoding="utf-8")
        case ".jsonl":
            path.write_text("\n".join(json.dumps(r) for r in records) + "\n\n")
        case ".json":
            path.write_text(json.dumps(records))
        case ".csv":
            import csv

            with path.open("w", newline="", encoding="utf-8") as f:
                writer = csv.DictWriter(f, ["id", column])
                writer.writeheader()
                writer.writerows(records)
        case ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            pq.write_table(pa.Table.from_pylist(records), path)
        case ".arrow":
            import pyarrow as pa

            table = pa.Table.from_pylist(records)
            with pa.ipc.new_stream(str(path), table.schema) as stream:
                stream.write_table(table)
    return str(path)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_every_format_gives_the_same_documents_and_hash(tmp_path: Path, suffix: str) -> None:
    corpus = read_corpus(write(tmp_path / f"a{suffix}"))
    assert corpus.documents == tuple(ROWS)
    assert corpus.sha256 == read_corpus(write(tmp_path / "b.jsonl")).sha256
    assert corpus.bytes == sum(len(r.encode()) for r in ROWS)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_text_column(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a{suffix}", column="body")
    assert read_corpus(path, column="body").documents == tuple(ROWS)
    with pytest.raises(UsageError, match=r"no column 'text'.*id, body"):
        read_corpus(path)


def test_hash_knows_document_borders(tmp_path: Path) -> None:
    a = read_corpus(write(tmp_path / "a.jsonl", ["ab", "c"]))
    b = read_corpus(write(tmp_path / "b.jsonl", ["a", "bc"]))
    assert a.sha256 != b.sha256


def test_saved_dataset_and_its_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": ROWS})
    table.save_to_disk(str(tmp_path / "one"))
    assert read_corpus(str(tmp_path / "one")).documents == tuple(ROWS)
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(str(tmp_path / "two"))
    assert read_corpus(str(tmp_path / "two")).documents == (ROWS[1],)
    assert len(read_corpus(str(tmp_path / "two"), split="train").documents) == 3
    with pytest.raises(UsageError, match=r"no split 'dev'.*train, test"):
        read_corpus(str(tmp_path / "two"), split="dev")


def test_directory_of_files(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", ["second"])
    write(tmp_path / "a.txt", ["first"])
    (tmp_path / "C.TXT").write_text("zeroth")
    (tmp_path / "notes.md").write_text("not text to score")
    assert read_corpus(str(tmp_path)).documents == ("zeroth", "first", "second")


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.json", "a.jsonl", "a.txt.xz"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    """As Windows programs save UTF-8."""
    plain = tmp_path / "plain" / name.removesuffix(".xz")
    plain.parent.mkdir()
    raw = b"\xef\xbb\xbf" + Path(write(plain, ROWS[:1], column="text")).read_bytes()
    raw = raw.replace(b"id,text", b"text,id").replace(b"0,One", b"One") if name == "a.csv" else raw
    (tmp_path / name).write_bytes(lzma.compress(raw) if name.endswith(".xz") else raw)
    assert read_corpus(str(tmp_path / name)).documents == (ROWS[0],)


def test_a_split_of_what_has_none_is_said_to_have_no_effect(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read_corpus(write(tmp_path / "a.txt"), split="dev")
    assert "--split dev has no effect" in caplog.text


def test_texts_of_the_package() -> None:
    sample, stories, austen = (read_corpus(name) for name in ("sample", "stories", "austen"))
    assert sample == read_corpus() and len(sample.documents) == 240 and sample.bytes > 300_000
    assert stories.documents[:240] == sample.documents and len(stories.documents) == 3277
    assert len(set(stories.documents)) == 3277 and all(d.isascii() for d in stories.documents)
    assert len(austen.documents) == 96 and austen.bytes > 250_000
    assert read_corpus(limit=5).documents == sample.documents[:5]


def test_compressed_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt.xz"
    file.write_bytes(lzma.compress(b"one\n\f\ntwo\n"))
    assert read_corpus(str(file)).documents == ("one", "two")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UsageError, match="not a whole xz file"):
        read_corpus(str(file))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "no text"),
        ("a.txt", " \n\t\n", "no text"),
        ("a.jsonl", '{"text": ""}\n{"text": null}\n', "no text"),
        ("a.jsonl", '{"text": "fine"}\n{broken\n', r"a\.jsonl:2 is not JSON"),
        ("a.jsonl", '{"text": 3}\n', "holds int, not text"),
        ("a.jsonl", "[1]\n", "neither a string nor a record"),
        ("a.json", '{"text":\n"x"}', "not a list"),
        ("a.docx", "text", r"unknown suffix '\.docx'.*\.csv, \.json"),
        ("a.parquet", "no parquet", "cannot be read"),
        ("a.json", "[" * 100_000, "is not JSON"),
        ("a.jsonl", '"whole"\n"cut \\ud83d here"\n', r"document 1 of .* half a character .* at 4"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        read_corpus(str(tmp_path / name))


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.txt")

    def refused(*args: object, **kwargs: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.open", refused)
    with pytest.raises(UsageError, match=r"a\.txt: cannot be read \(Permission denied\)"):
        read_corpus(path)


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match="not UTF-8 text: byte 3 is 0xe9"):
        read_corpus(str(tmp_path / "a.txt"))


def test_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no file or directory"):
        read_corpus(str(tmp_path / "absent.txt"))
    with pytest.raises(UsageError, match="neither a saved dataset nor text"):
        read_corpus(str(tmp_path))
    with pytest.raises(UsageError, match="--data is empty"):
        read_corpus("")
    with pytest.raises(UsageError, match="--limit"):
        read_corpus(limit=0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(MissingError, match="could not be loaded as a dataset"):
        read_corpus("nobody/nothing-here")
