"""A small real tokenizer and small random language models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def make_tokenizer(*, bos: str | None = None, eos: str | None = "<end>", vocabulary: int = 400) -> Any:
    """A byte-level BPE tokenizer trained on the embedded sample."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from loadstone.text.corpus import read_corpus

    special = [t for t in (eos, bos) if t]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet)
    raw.train_from_iterator(read_corpus(limit=6).documents, trainer)
    if bos:
        pair = (bos, raw.token_to_id(bos))
        raw.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[pair])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token=bos, eos_token=eos)


def make_model(seed: int = 0, *, family: str = "llama", **changes: Any) -> Any:
    """A tiny random causal language model in float32, with logits spread enough to be worth scoring."""
    import transformers

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "gpt2":
        config: Any = transformers.GPT2Config(
            vocab_size=400,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            initializer_range=0.2,
            eos_token_id=0,
        )
        model: Any = transformers.GPT2LMHeadModel(config)
    else:
        config_class, model_class = {
            "llama": ("LlamaConfig", "LlamaForCausalLM"),
            "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
            "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
            "granite": ("GraniteConfig", "GraniteForCausalLM"),
            "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
        }[family]
        model = getattr(transformers, model_class)(
            getattr(transformers, config_class)(**{**sizes, **changes})
        )
    return model.float().eval()


def save(model: Any, tokenizer: Any, path: Path) -> Path:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
