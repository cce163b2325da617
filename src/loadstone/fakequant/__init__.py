"""Fake-quantized exports: weights folded in place of themselves, quantizers of inputs beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loadstone.fakequant.api import export_fakequant as export_fakequant
    from loadstone.fakequant.api import plan_export as plan_export
    from loadstone.fakequant.export import Exported as Exported
    from loadstone.fakequant.plan import ExportPlan as ExportPlan

_HOMES = {"ExportPlan": "plan", "Exported": "export", "export_fakequant": "api", "plan_export": "api"}
__all__ = ["ExportPlan", "Exported", "export_fakequant", "plan_export"]


def __getattr__(name: str) -> Any:
    # The command line parses formats without torch: the rest is imported on first use.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(f"loadstone.fakequant.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'loadstone.fakequant' has no attribute {name!r}")
