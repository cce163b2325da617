"""What is copied beside the weights, and what is never copied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loadstone.artifact.files import following_links
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
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "code.Model"}}')
    return folder


def test_what_is_copied(model: Path, tmp_path: Path) -> None:
    assert set(sidecars_in((model,))) == {
        "tokenizer.json", "README.md", "additional_chat_templates/tool.jinja"
    }  # fmt: skip
    assert "code.py" in sidecars_in((model,), remote_code=True)
    (tmp_path / "out").mkdir()
    copy_sidecars(sidecars_in((model,)), tmp_path / "out")
    assert (tmp_path / "out" / "additional_chat_templates" / "tool.jinja").read_text() == "x"


def test_a_sentence_encoder_is_carried_over_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    carried = (
        "modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "LICENSE", "vocab.bpe", "assets/a/b.png",
        "tokenization_x.py", "tokenizer_config.json",
    )  # fmt: skip
    left = (
        "model.safetensors",
        "onnx/model.onnx",
        "optimizer.pt",
        ".git/config",
        "runs/x/events.out.tfevents.1",
        "x.tmp",
    )
    left += ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quantization_config.json")
    for name in (*carried, *left):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "modules.json").write_text('[{"path": ""}, {"path": "1_Pooling"}]')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": [null, "tokenization_x.X"]}}'
    )
    caplog.set_level("INFO", "loadstone")
    assert set(sidecars_in((tmp_path,), remote_code=True)) == set(carried)
    (line,) = [r.getMessage() for r in caplog.records]
    assert "other weights (onnx/model.onnx)" in line and "training state (optimizer.pt)" in line
    assert "tokenization_x.py" not in sidecars_in((tmp_path,))


def test_links_are_followed_on_request(model: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("x")
    (model / "vocab.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="--follow-links"):
        sidecars_in((model,))
    with following_links():
        assert "vocab.json" in sidecars_in((model,))


def test_blobs_may_be_a_link(model: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "1234").write_text("x")
    (model.parents[1] / "blobs").symlink_to(tmp_path / "disk")
    (model / "vocab.json").symlink_to("../../blobs/1234")
    assert "vocab.json" in sidecars_in((model,))


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
