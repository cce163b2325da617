"""What is copied beside the weights, and what is never copied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadstone.errors import ArtifactError
from loadstone.writing.sidecars import copy_sidecars, sidecars_in


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "models--x" / "snapshots" / "abc"
    (folder / "additional_chat_templates").mkdir(parents=True)
    for name in (
        "tokenizer.json", "README.md", "model.safetensors", "config.json", "code.py",
        "additional_chat_templates/tool.jinja",
    ):  # fmt: skip
        (folder / name).write_text("x")
    return folder


def test_what_is_copied(model: Path, tmp_path: Path) -> None:
    assert set(sidecars_in((model,))) == {
        "tokenizer.json", "README.md", "additional_chat_templates/tool.jinja"
    }  # fmt: skip
    assert "code.py" in sidecars_in((model,), remote_code=True)
    (tmp_path / "out").mkdir()
    copy_sidecars(sidecars_in((model,)), tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").read_text() == "x"


@pytest.mark.parametrize("name", ["notes.txt", "additional_chat_templates/more.jinja"])
def test_a_link_that_leaves_the_directory_is_not_copied(model: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("secret")
    (model / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ArtifactError, match="link that leaves the directory"):
        sidecars_in((model,))


def test_links_of_the_hugging_face_cache_are_followed(model: Path) -> None:
    blobs = model.parents[1] / "blobs"
    blobs.mkdir()
    (blobs / "1234").write_text("x")
    (model / "vocab.json").symlink_to("../../blobs/1234")
    checkpoint = model / "checkpoint-5"
    checkpoint.mkdir()
    (checkpoint / "vocab.json").symlink_to("../../../blobs/1234")
    for folder in (model, checkpoint):
        assert "vocab.json" in sidecars_in((folder,))


@pytest.mark.parametrize("content", ['{"chat_template": "x"', "[1]"])
def test_a_tokenizer_config_that_is_no_object(tmp_path: Path, content: str) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    (source / "tokenizer_config.json").write_text(content)
    (source / "chat_template.jinja").write_text("x")
    with pytest.raises(ArtifactError, match=r"tokenizer_config\.json: not a valid JSON object"):
        copy_sidecars(sidecars_in((source,)), out)


def test_an_inline_template_that_differs_is_a_note(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    config = {"chat_template": "é inline", "other": "é"}
    (source / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    (source / "chat_template.jinja").write_text("é", encoding="utf-8")
    (note,) = copy_sidecars(sidecars_in((source,)), out)
    assert "two different chat templates" in note
    assert json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8")) == {"other": "é"}
