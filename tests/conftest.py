"""Small real models, made once a session: one directory for each architecture, and SmolLM2 where `make` put it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).resolve().parents[1]
SMOLLM2 = ROOT / ".cache" / "models" / "smollm2-135m"

# Architecture -> (config class, options over the common ones). All sizes divide by 32, so every recipe fits.
ARCHITECTURES: dict[str, tuple[str, dict[str, object]]] = {
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "llama-untied": ("LlamaConfig", {"tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 16, "tie_word_embeddings": False}),
    "gemma2": ("Gemma2Config", {"head_dim": 16, "query_pre_attn_scalar": 16}),
    "gpt2": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ),
}
_COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _logs_as_imported() -> None:
    """A command that ran in this process logs to its test's stderr, which is closed by now, and to nobody else."""
    log = logging.getLogger("loadstone")
    log.setLevel(logging.NOTSET)
    log.propagate = True
    log.handlers.clear()


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``make_model(arch, dtype="bfloat16", max_shard_size="5GB")``: the directory of a random model, made once."""
    made: dict[tuple[str, str, str], Path] = {}

    def make(arch: str, dtype: str = "bfloat16", max_shard_size: str = "5GB") -> Path:
        key = (arch, dtype, max_shard_size)
        if key not in made:
            import torch
            import transformers

            torch.manual_seed(7)
            model = transformers.AutoModelForCausalLM.from_config(
                tiny_config(arch), dtype=getattr(torch, dtype)
            )
            made[key] = tmp_path_factory.mktemp(arch) / "model"
            model.save_pretrained(made[key], max_shard_size=max_shard_size)
            write_tokenizer(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny(make_model: Callable[..., Path]) -> Path:
    """A tiny Llama with a tokenizer; read only."""
    return make_model("llama-tied")


@pytest.fixture(scope="session")
def experts_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Small random mixtures by the name of a family: one for each layout of experts."""
    from tests.mixtures import save_mixture

    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = save_mixture(family, tmp_path_factory.mktemp(family) / "model")
        return made[family]

    return get


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny multimodal Gemma3 (three vision layers, two language layers) with a tokenizer; read only."""
    import torch
    import transformers

    text = _COMMON | {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=255,
        boi_token_index=254,
        eoi_token_index=253,
    )
    torch.manual_seed(7)
    model = transformers.Gemma3ForConditionalGeneration(config).to(torch.bfloat16)
    path = tmp_path_factory.mktemp("gemma3") / "model"
    model.save_pretrained(path)
    write_tokenizer(path)
    return path


@pytest.fixture(scope="session")
def quantize_to(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``quantize_to(source, recipe)``: the finalized directory, made once; read only."""
    made: dict[tuple[Path, str], Path] = {}

    def make(source: Path, recipe: str) -> Path:
        if (source, recipe) not in made:
            from loadstone.artifact import detect
            from loadstone.finalization.plan import make_plan
            from loadstone.finalization.run import write_plan
            from loadstone.quantization import parse_recipe

            out = tmp_path_factory.mktemp("finalized") / "model"
            write_plan(make_plan(detect(source), parse_recipe(recipe)), out)
            made[source, recipe] = out
        return made[source, recipe]

    return make


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in bf16, a real trained model."""
    if not (SMOLLM2 / "config.json").is_file():
        pytest.skip("no SmolLM2 directory: `make test` makes it")
    return SMOLLM2


def tiny_config(arch: str) -> Any:
    """The transformers config of a tiny model."""
    import transformers

    name, options = ARCHITECTURES[arch]
    return getattr(transformers, name)(**(_COMMON | options))


def write_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer without merges: 256 tokens, any text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {symbol: number for number, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(directory)
