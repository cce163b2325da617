"""Everything that makes an output directory appear: locking, shards, side files, the final rename."""
