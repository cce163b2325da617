"""Quantized tensors and config blocks as torchao and transformers store them, without importing torchao."""
