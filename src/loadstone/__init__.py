"""loadstone: turn a trained model into an artifact that anyone can load, trust and measure.

    import loadstone

    loadstone.finalize("run/checkpoint-900", "tiny-w4", recipe="int8-dynamic-act-int4-weight")
    model = loadstone.load("tiny-w4")  # an ordinary transformers model
    result = loadstone.evaluate(["run/checkpoint-900", "tiny-w4"])

The functions below are the public API (docs/api.md); docs/index.md lists the other pages. Nothing heavy is imported
before one of them is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from loadstone._version import __version__

if TYPE_CHECKING:
    from loadstone.artifact import detect as detect
    from loadstone.artifact.files import following_links as following_links
    from loadstone.context import fit as fit
    from loadstone.context import load as load
    from loadstone.context import load_context as load_context
    from loadstone.context import predict as predict
    from loadstone.evaluation import evaluate as evaluate
    from loadstone.fakequant import export_fakequant as export_fakequant
    from loadstone.fakequant import plan_export as plan_export
    from loadstone.finalization import finalize as finalize
    from loadstone.finalization import plan_finalize as plan_finalize
    from loadstone.loading import load_tokenizer as load_tokenizer
    from loadstone.loading import plan as plan
    from loadstone.loading.greedy import greedy_decoding as greedy_decoding

__all__ = [
    "__version__",
    "detect",
    "evaluate",
    "export_fakequant",
    "finalize",
    "fit",
    "following_links",
    "greedy_decoding",
    "load",
    "load_context",
    "load_tokenizer",
    "plan",
    "plan_export",
    "plan_finalize",
    "predict",
]

_HOMES = {
    "detect": "loadstone.artifact",
    "evaluate": "loadstone.evaluation",
    "export_fakequant": "loadstone.fakequant",
    "finalize": "loadstone.finalization",
    "fit": "loadstone.context",
    "following_links": "loadstone.artifact.files",
    "greedy_decoding": "loadstone.loading.greedy",
    "load": "loadstone.context",
    "load_context": "loadstone.context",
    "load_tokenizer": "loadstone.loading",
    "plan": "loadstone.loading",
    "plan_export": "loadstone.fakequant",
    "plan_finalize": "loadstone.finalization",
    "predict": "loadstone.context",
}


def __getattr__(name: str) -> Any:
    # Imported on first use: `import loadstone`, and with it the command line, starts at once.
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'loadstone' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
