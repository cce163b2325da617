"""A local model never opens a socket and runs no code of elsewhere, whatever its files name.

One process reads every directory, by one command after another, and an audit hook ends it at the first connection,
look-up of a name or other process.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "artifact"))
from builders import edit_json

HUB = "owner/name"
CODE = {
    "AutoConfig": f"{HUB}--evil.C",
    "AutoModelForCausalLM": f"{HUB}--evil.M",
    "AutoTokenizer": [f"{HUB}--evil.T", None],
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "auto_map of a repository": ("config.json", {"auto_map": CODE}),
    "auto_map beside it": (
        "config.json",
        {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}},
    ),
    "a tokenizer's code": ("tokenizer_config.json", {"auto_map": CODE, "tokenizer_class": "Evil"}),
    "a tokenizer's name": ("tokenizer_config.json", {"name_or_path": HUB, "special_tokens_map_file": HUB}),
    "a kernel": ("config.json", {"attn_implementation": HUB}),
    "a kernel's version": ("config.json", {"_attn_implementation": f"{HUB}@main:f"}),
    "a kernel of a part": ("config.json", {"_attn_implementation": {"text_config": HUB}}),
    "a backbone": (
        "config.json",
        {"backbone": HUB, "use_pretrained_backbone": True, "use_timm_backbone": True},
    ),
    "its origin": (
        "config.json",
        {"_name_or_path": HUB, "name_or_path": HUB, "base_model_name_or_path": HUB},
    ),
    "parts elsewhere": ("config.json", {"text_config": HUB, "vision_config": {"_name_or_path": HUB}}),
    "a quantizer": ("config.json", {"quantization_config": {"quant_method": "auto-round", "model": HUB}}),
    "weights elsewhere": ("config.json", {"transformers_weights": f"{HUB}/model.safetensors"}),
    "generation code": ("generation_config.json", {"custom_generate": HUB, "_from_model_config": False}),
    "an assistant": ("generation_config.json", {"assistant_model": HUB, "_name_or_path": HUB}),
    "an adapter": ("adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": HUB}),
    "an image processor": ("preprocessor_config.json", {"auto_map": CODE, "image_processor_type": HUB}),
    "a processor": ("processor_config.json", {"auto_map": CODE, "processor_class": HUB}),
    **{
        f"the backbone of {kind}": (
            "config.json",
            {"model_type": kind, "architectures": [name], "backbone": HUB},
        )
        for kind, name in {
            "detr": "DetrForObjectDetection",
            "upernet": "UperNetForSemanticSegmentation",
            "dpt": "DPTForDepthEstimation",
            "rt_detr": "RTDetrForObjectDetection",
            "maskformer": "MaskFormerForInstanceSegmentation",
        }.items()
    },
}

PROBE = """
import os, sys
sys.path[:0] = {paths!r}
def guard(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "subprocess.Popen", "os.system"):
        os.write(2, f"OPENED {{event}} {{arguments!r}}\\n".encode())
        os._exit(96)
sys.addaudithook(guard)
from loadstone.cli import main
from loadstone import load
from loadstone.loading import load_tokenizer
text, out = sys.argv[1:3]
for number, directory in enumerate(sys.argv[3:]):
    codes = []
    lines = [["eval", "-M", directory, "--data", text, "--limit", "1", "--context-length", "16"],
             ["finalize", "-M", directory, "-o", out, "--overwrite"],
             ["export-fakequant", "-M", directory, "-o", out, "--format", "int8", "--overwrite"],
             ["fit", "-M", directory, "--prompt", text, "-o", out + "-c", "--overwrite"]]
    # Every directory is inspected and loaded, and goes through another command in turn.
    for line in (["inspect", directory], lines[number % len(lines)]):
        try:
            main(line)
        except SystemExit as stop:
            codes.append(stop.code or 0)
    for call in (load, load_tokenizer):
        try:
            call(directory)
        except Exception as error:
            assert type(error).__module__.startswith("loadstone"), repr(error)
    print(os.path.basename(directory), codes, flush=True)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, make_model: Callable[..., Path]) -> dict[str, str]:
    """Case -> the exit codes of the commands."""
    folder = tmp_path_factory.mktemp("offline")
    (folder / "text.txt").write_text("A short text that is read by every command, and then read once more.")
    for name, (file, changes) in CASES.items():
        directory = Path(shutil.copytree(make_model("llama-tied"), folder / name.replace(" ", "-")))
        if not (directory / file).exists():
            (directory / file).write_text("{}")
        edit_json(directory / file, lambda content, c=changes: content.update(c))
        (directory / "evil.py").write_text(f"open({str(folder / 'executed')!r}, 'w')")
    program = PROBE.format(paths=[p for p in sys.path if p])
    command = [sys.executable, "-c", program, str(folder / "text.txt"), str(folder / "out")]
    command += [str(folder / name.replace(" ", "-")) for name in CASES]
    # The hub is not switched off for this process: loadstone has to do that itself.
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")}
    environment |= {"HF_HOME": str(folder / "hub"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "OPENED" not in done.stderr and done.returncode == 0, done.stdout[-300:] + done.stderr[-3000:]
    assert not (folder / "executed").exists() and "Traceback" not in done.stderr
    lines = [
        line
        for line in done.stdout.splitlines()
        if line.split(" ")[0] in {n.replace(" ", "-") for n in CASES}
    ]
    return {line.split(" ")[0]: line.partition(" ")[2] for line in lines}


@pytest.mark.parametrize("name", CASES)
def test_no_socket_no_code(found: dict[str, str], name: str) -> None:
    codes = json.loads(found[name.replace(" ", "-")])
    assert len(codes) == 2 and set(codes) <= {0, 2, 3, 5}
