"""Prompts that a language model has read: their KV cache in memory and on disk."""
