"""Token losses: batches, windows, streaming, divergence, speed."""
