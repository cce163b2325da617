"""Statistics, metrics, gates, tables and reports."""
