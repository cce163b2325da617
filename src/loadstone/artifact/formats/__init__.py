"""Readers of weight file headers, one module per storage format."""
