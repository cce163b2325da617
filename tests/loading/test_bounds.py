"""Configs that ask for what the stored tensors cannot be, or for the network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import loadstone
from loadstone import plan
from loadstone.artifact.patterns import may_not_end
from loadstone.errors import ArtifactError

sys.path.insert(0, str(Path(__file__).parents[1] / "artifact"))
from builders import CONFIG, dense


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decoder_layers": 100_000}, "decoder_layers asks for more"),
        ({"num_hidden_layers": 20_000}, "num_hidden_layers asks for more"),
        ({"num_labels": 10**8}, "num_labels asks for more"),
        ({"text_config": {"num_local_experts": 10**7}}, "num_local_experts asks for more"),
        ({"attn_implementation": "owner/kernel"}, "fetch and run the kernel"),
        ({"_attn_implementation": {"text_config": "owner/kernel"}}, "fetch and run the kernel"),
    ],
)
def test_configs_are_held_against_the_headers(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    directory = dense(tmp_path / "m", config=CONFIG | change)
    with pytest.raises(ArtifactError, match=words):
        plan(directory)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("Llama", {"vocab_size": 10**9}, "asks for .* values of"),
        (
            "Llama",
            {"hidden_size": 2**16, "intermediate_size": 2**16},
            "asks for .* values of|cannot be built",
        ),
        ("GPT2", {"n_positions": 10**9}, "asks for .* values of"),
        ("ViT", {"image_size": 10**7}, "asks for .* values of|cannot be built"),
    ],
)
def test_what_is_not_stored_is_not_made(
    tmp_path: Path, kind: str, change: dict[str, Any], words: str
) -> None:
    """The process would need up to 120 GB."""
    import transformers

    model_class = {
        "ViT": "ViTForImageClassification",
        "GPT2": "GPT2LMHeadModel",
        "Llama": "LlamaForCausalLM",
    }[kind]
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"vocab_size": 64} if kind != "ViT" else {"image_size": 28, "patch_size": 14}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    getattr(transformers, model_class)(config).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stored | change))
    with pytest.raises(ArtifactError, match=words):
        loadstone.load(tmp_path, device="cpu")


PROBE = """
import socket, sys
opened = []
sys.addaudithook(lambda name, args: opened.append(name) if name in ("socket.connect", "socket.getaddrinfo") else None)
import loadstone
from loadstone.errors import ArtifactError
try:
    loadstone.load(sys.argv[1])
except ArtifactError as error:
    print("refused", error)
print("sockets", opened)
"""


@pytest.mark.parametrize("model_type", ["detr", "upernet"])
def test_a_load_opens_no_socket(tmp_path: Path, model_type: str) -> None:
    directory = dense(tmp_path / "m")
    names = {"detr": "DetrForObjectDetection", "upernet": "UperNetForSemanticSegmentation"}
    config = {"model_type": model_type, "architectures": [names[model_type]], "backbone": "owner/name"}
    (directory / "config.json").write_text(json.dumps(config))
    environment = {
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": ":".join(sys.path),
        "HF_HOME": str(tmp_path / "hub"),
    }
    command = [sys.executable, "-c", PROBE, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert "sockets []" in done.stdout and "refused" in done.stdout, done.stdout + done.stderr[-2000:]


@pytest.mark.parametrize(
    "pattern",
    ["(.*.*)*x!", "(a+)+b", "(a|aa)*b", "(a?a?)*b", "(?:(?:ab|a)b?)+c", ".*.*.*.*.*x", "(?:a{1,50}){1,50}"],
)
def test_patterns_that_may_not_end(pattern: str) -> None:
    assert may_not_end(pattern)


@pytest.mark.parametrize(
    "pattern",
    [r"model\.layers\.\d+\..*", ".*lm_head", r".*(q|k)_proj$", "a{2}b?", r"(?:\d{2}x)+", "[ab]*(c|d)?"],
)
def test_patterns_that_end(pattern: str) -> None:
    assert not may_not_end(pattern)
