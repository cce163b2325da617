from __future__ import annotations

from loadstone.evaluation.results.tables import tables

RECORD = {
    "path": "m", "loss": 2.0, "loss_stderr": 0.1, "perplexity": 7.4, "perplexity_stderr": 0.7, "bits_per_byte": 1.0,
    "bits_per_byte_stderr": 0.1, "tokens_per_second": 9.0, "peak_memory_bytes": 2**20, "load_seconds": 0.1,
    "delta_loss": None, "delta_loss_stderr": None, "delta_perplexity_relative": None,
}  # fmt: skip


def test_a_broken_model_beside_a_good_one() -> None:
    """A perplexity beyond what a float holds is null in the record."""
    broken = RECORD | {"perplexity": None, "loss": 900.0, "delta_loss": 898.0, "delta_loss_stderr": 0.1}
    (table,) = tables([RECORD, broken])
    columns, (good, bad) = table.columns, table.rows
    assert (good[columns.index("Δ loss")], good[columns.index("Δ ppl")]) == ("reference", "")
    assert (bad[columns.index("Δ loss")], bad[columns.index("Δ ppl")]) == ("+898.0000 ± 0.1000", "inf")
    assert bad[columns.index("perplexity")] == "inf"
