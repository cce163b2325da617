"""Prompts that a language model has read once: their KV cache in memory and on disk."""

from loadstone.context.prefix.cache import Prefix, PrefixCache
from loadstone.context.prefix.fit import encode_prompt, make_prefix, read_prompt
from loadstone.context.prefix.store import load_prefix, save_prefix

__all__ = [
    "Prefix",
    "PrefixCache",
    "encode_prompt",
    "load_prefix",
    "make_prefix",
    "read_prompt",
    "save_prefix",
]
