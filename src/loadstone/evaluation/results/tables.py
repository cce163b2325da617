"""What the command prints: records as columns and rows of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loadstone.text.tokens import Protocol

Records = Sequence[dict[str, Any]]
Table = tuple[list[str], list[list[str]]]


def tables(records: Records) -> list[Table]:
    """Every table that the records have figures for: column names, and rows."""
    wanted = [losses(records)]
    for key, make in (("kl", divergences), ("tasks", tasks), ("speed", speeds)):
        if any(record.get(key) for record in records):
            wanted.append(make(records))
    return wanted


def describe(protocol: Protocol) -> str:
    """One line that says what was asked of the models."""
    start = "every document and window" if protocol.bos_each_window else "every document"
    if protocol.prefix_tokens:
        start = f"a prefix of {protocol.prefix_tokens} tokens comes before every document and window"
    else:
        start = f"{protocol.separator} starts {start}"
    stride = f", stride {protocol.stride}" if protocol.name == "strided" else ""
    return (
        f"{protocol.documents} documents, {protocol.tokens} tokens of {protocol.data}; {protocol.name} "
        f"windows of {protocol.context_length}{stride}; {start}; {protocol.dtype}"
    )


def losses(records: Records) -> Table:
    """Loss, perplexity and bits per byte, differences where there are any, and what it took."""
    compared = any(r["delta_loss"] is not None for r in records)
    deltas = ["Δ loss", "Δ ppl"] if compared else []
    columns = ["model", "loss", "perplexity", "bits/byte", *deltas, "tokens/s", "peak MiB", "load s"]
    return columns, [_loss_row(record, compared) for record in records]


def _loss_row(record: dict[str, Any], compared: bool) -> list[str]:
    delta: list[str] = []
    if compared and record["delta_loss"] is None:
        delta = ["reference", ""]
    elif compared:
        relative = record["delta_perplexity_relative"]
        shown = "inf" if relative is None else f"{100 * relative:+.2f} %"
        delta = [_pm(record["delta_loss"], record["delta_loss_stderr"], "+.4f"), shown]
    speed = record["tokens_per_second"]
    return [
        record["path"],
        _pm(record["loss"], record["loss_stderr"], ".4f"),
        _pm(record["perplexity"], record["perplexity_stderr"], ".3f"),
        _pm(record["bits_per_byte"], record["bits_per_byte_stderr"], ".4f"),
        *delta,
        "" if speed is None else f"{speed:.0f}",
        f"{record['peak_memory_bytes'] / 2**20:.0f}",
        f"{record['load_seconds']:.1f}",
    ]


def divergences(records: Records) -> Table:
    """KL divergence and its quantiles, of the models that have them."""
    columns = ["model", "KL", "KL reverse", "median", "90 %", "99 %", "99.9 %", "max", "same top-1"]
    rows = [
        [
            r["path"],
            _pm(r["kl"], r["kl_stderr"], ".5f"),
            _pm(r["kl_reverse"], r["kl_reverse_stderr"], ".5f"),
            *(f"{r[key]:.4g}" for key in ("kl_median", "kl_p90", "kl_p99", "kl_p999", "kl_max")),
            f"{100 * r['top1_agreement']:.2f} %",
        ]
        for r in records
        if "kl" in r
    ]
    return columns, rows


def tasks(records: Records) -> Table:
    """A row for each model, task and metric."""
    rows = []
    for r in records:
        for t in r.get("tasks", ()):
            delta = "" if t["delta"] is None else _pm(t["delta"], t["delta_stderr"], "+.4f")
            p_value = "" if t["p_value"] is None else f"{t['p_value']:.3f}"
            rows.append(
                [r["path"], t["task"], t["metric"], _pm(t["value"], t["stderr"], ".4f"), delta, p_value]
            )
    return ["model", "task", "metric", "value", "paired Δ", "p"], rows


def speeds(records: Records) -> Table:
    """A row for each model and batch size."""
    rows = [
        [
            r["path"],
            str(s["batch_size"]),
            f"{s['prefill_tokens_per_second']:.0f}",
            f"{1000 * s['first_token_seconds']:.0f}",
            f"{s['decode_tokens_per_second']:.1f}",
            f"{s['peak_memory_bytes'] / 2**20:.0f}",
        ]
        for r in records
        for s in r.get("speed", ())
    ]
    return ["model", "batch", "prefill tokens/s", "first token ms", "decode tokens/s", "peak MiB"], rows


def _pm(value: float | None, error: float | None, form: str) -> str:
    if value is None:
        return "inf"
    return format(value, form) if error is None else f"{value:{form}} ± {error:{form.lstrip('+')}}"
