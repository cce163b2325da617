"""PFNs: the model, its training-context KV cache, and the cache on disk."""
