"""Fake-quantized exports: weights folded in place of themselves, quantizers of inputs beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loadstone.fakequant.export import Exported as Exported
    from loadstone.fakequant.run import export_fakequant as export_fakequant

__all__ = ["Exported", "export_fakequant"]


def __getattr__(name: str) -> Any:
    # The command line parses formats without torch: the rest is imported on first use.
    if name in __all__:
        from loadstone.fakequant import run

        return getattr(run, name)
    raise AttributeError(f"module 'loadstone.fakequant' has no attribute {name!r}")
