"""lm-evaluation-harness tasks."""
