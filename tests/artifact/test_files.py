"""Files that are not trusted: what is opened, how much of it is read, and what errors of libraries become."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path

import pytest

from loadstone.artifact.files import check_folder, open_regular, read_json, read_text, translated
from loadstone.artifact.formats.safetensors import open_tensors
from loadstone.artifact.hashing import sha256_file
from loadstone.errors import ArtifactError, UsageError


@pytest.fixture(params=["fifo", "socket", "device", "directory"])
def special(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """What no reader may open."""
    path = tmp_path / "special"
    if request.param == "fifo":
        os.mkfifo(path)
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(str(path))
    elif request.param == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    return path


@pytest.mark.parametrize("read", [open_regular, read_json, read_text, sha256_file])
def test_only_regular_files_are_opened(special: Path, read) -> None:
    with pytest.raises(ArtifactError, match="special: not a regular file"):
        read(special)


def test_so_does_the_reader_of_tensors(special: Path) -> None:
    with pytest.raises(ArtifactError, match="special: not a regular file"), open_tensors(special):
        pass


def test_folders_that_a_library_reads(special: Path) -> None:
    if special.is_dir():
        check_folder(special.parent)
        return
    with pytest.raises(ArtifactError, match="special: not a regular file"):
        check_folder(special.parent)


def test_a_file_exchanged_for_a_fifo_at_the_last_moment(tmp_path: Path, monkeypatch) -> None:
    path, opened = tmp_path / "a", os.open
    path.write_text("x")

    def exchange(*args: object, **options: object) -> int:
        path.unlink()
        os.mkfifo(path)
        return opened(*args, **options)

    monkeypatch.setattr("os.open", exchange)
    with pytest.raises(UsageError, match="a: not a regular file"):
        open_regular(path, UsageError)


def test_tensors_of_a_file_that_changed(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"\x10" + bytes(30))
    with (
        pytest.raises(ArtifactError, match=r"a\.safetensors: cannot be read"),
        open_tensors(tmp_path / "a.safetensors"),
    ):
        pass


def test_text_of_other_encodings_and_sizes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"ab\xff")
    with pytest.raises(UsageError, match="a is not UTF-8 text: byte 2"):
        read_text(tmp_path / "a", kind=UsageError)
    with pytest.raises(ArtifactError, match="a: 3 bytes, over the limit of 2"):
        read_text(tmp_path / "a", 2)


@pytest.mark.parametrize(("depth", "good"), [(90, True), (110, False), (900, False)])
def test_json_is_no_deeper_than_its_writers_follow(tmp_path: Path, depth: int, good: bool) -> None:
    (tmp_path / "a.json").write_text(
        '{"wide": [' + "[]," * 200 + "[]]," + f'"deep": {"[" * depth}{"]" * depth}}}'
    )
    if good:
        assert json.dumps(read_json(tmp_path / "a.json"))
        return
    with pytest.raises(ArtifactError, match=r"a\.json: not a valid JSON object"):
        read_json(tmp_path / "a.json")


class PanicException(BaseException):
    """As libraries in Rust raise it."""


@pytest.mark.parametrize(
    "error", [ValueError("odd\n value"), RecursionError("deep"), PanicException("unwrapped")]
)
def test_errors_of_libraries_name_the_file(error: BaseException) -> None:
    said = r"a\.x: cannot be read \((odd value|deep|unwrapped)\)\. Mend it"
    with pytest.raises(UsageError, match=said), translated("a.x: cannot be read", "Mend it", UsageError):
        raise error


@pytest.mark.parametrize(
    "error", [ArtifactError("ours"), MemoryError(), OSError(28, "No space"), KeyboardInterrupt()]
)
def test_errors_of_loadstone_and_the_machine_stay(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, translated("a.x: cannot be read"):
        raise error
    assert caught.value is error


# Where a file of others is opened, or given to a library by its path, and nowhere else.
OPENERS = {
    "artifact/files.py": ("os.open(",),
    "artifact/formats/safetensors.py": ("safe_open(",),
    "artifact/formats/bin.py": ("torch.load(path",),
    # A directory, to see whether another takes its name.
    "artifact/unchanged.py": ("os.open(",),
}
OWN = ("finalization/", "writing/", "cli/streams.py")  # what loadstone has written itself


def test_there_is_one_opener() -> None:
    source = Path(__file__).parents[2] / "src" / "loadstone"
    opened = re.compile(
        r"os\.open\(|safe_open\(|load_file\(|torch\.load\(path|\.open\(\"rb\"|\.read_bytes\(\)"
    )
    found = {
        str(path.relative_to(source)): tuple(dict.fromkeys(names))
        for path in sorted(source.rglob("*.py"))
        if not str(path.relative_to(source)).startswith(OWN) and (names := opened.findall(path.read_text()))
    }
    # The package's own texts.
    found.pop("text/corpus.py", None)
    assert found == OPENERS
