"""Single entry points for loading a model or a context of any kind."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact.context_file import CONTEXT_JSON, PREFIX, TABPFN, context_kind
from loadstone.artifact.unchanged import read_at_once
from loadstone.errors import UsageError
from loadstone.loading.devices import cpu_by_default

if TYPE_CHECKING:
    from loadstone.artifact import Artifact
    from loadstone.context.pfn.training_context import TrainingContext
    from loadstone.context.prefix.cache import PrefixCache
    from loadstone.loading import LoadPlan


def load(
    target: str | Path | Artifact | LoadPlan,
    *,
    device: str = "auto",
    dtype: str = "auto",
    checkpoint: str | None = None,
    no_checkpoint: bool = False,
    trust_remote_code: bool = False,
    base: str | Path | None = None,
    fast: bool = False,
    native_kernels: bool = False,
) -> Any:
    """Load any model in eval mode: an ordinary transformers model or, for an in-context model, a `PFN`.

    target: a directory, a name such as ``builtin:tiny-llama``, or a plan that `plan` made, which has its own options.
    device: auto, cpu, cuda, cuda:N.
    dtype: auto (as stored), float32, bfloat16 or float16.
    checkpoint: of a training run: newest (default), best, a step or a folder. no_checkpoint: its own directory instead.
    trust_remote_code: run Python code that came with the model.
    base: of an adapter, the model to merge it into, if it is not where the adapter says.
    fast: write tokens faster with quantized layers, on a GPU weight-only ones, to rounding; such a model is not saved
        again.
    native_kernels: run weights of other quantizers on their format's own kernels instead of decoding them.

    Raises `ArtifactError` (damaged, or cannot be loaded here), `MissingError` (package or GPU) or `UsageError`.
    """
    from loadstone.loading import plan
    from loadstone.loading.plan import LoadPlan

    options = {
        "device": device, "dtype": dtype, "checkpoint": checkpoint, "no_checkpoint": no_checkpoint,
        "trust_remote_code": trust_remote_code, "base": base, "native_kernels": native_kernels,
    }  # fmt: skip
    if isinstance(target, LoadPlan):
        given = [name for name, value in options.items() if value not in ("auto", None, False)]
        if given:
            raise UsageError(f"{', '.join(given)}: a plan is loaded as it is", "Give options to plan()")
        return _load(target, fast)
    if isinstance(target, str | Path):
        return read_at_once(Path(target), lambda: _load(plan(target, **options), fast))  # type: ignore[arg-type]
    return _load(plan(target, **options), fast)  # type: ignore[arg-type]


def _load(chosen: LoadPlan, fast: bool) -> Any:
    from loadstone.loading import load as load_model
    from loadstone.loading.plan import IN_CONTEXT

    if chosen.load_path != IN_CONTEXT:
        return load_model(chosen, fast=fast)
    from loadstone.context.pfn.load import load_pfn

    return load_pfn(chosen)


@cpu_by_default
def load_context(
    path: str | Path, base: Any = None, *, device: str | None = None, **options: Any
) -> TrainingContext | PrefixCache | Any:
    """A context from its directory, bound to its base model and checked against everything it recorded.

    ``base`` is a loaded model or a directory; without it the recorded one is taken, or one already loaded with the
    right fingerprint. ``device``: auto, cpu, cuda, cuda:N. A PFN's context comes as a `TrainingContext`, a language
    model's prefix as a transformers cache (`PrefixCache`; ``options``: ``tokenizer``, ``share``, see `load_prefix`), a
    TabPFN estimator as that estimator.
    Raises `CorruptContext`, `FormatUnsupported`, `UnsafeContent`, `BaseMismatch`, `ArchitectureMismatch`,
    `TokenizerMismatch`, `RecipeMismatch` or `ProbeFailed` (all `ArtifactError`), or `MissingError` for a base that is
    not here.
    """
    directory = Path(path)
    return read_at_once(directory, lambda: _load_context(directory, base, device, options))


def _load_context(directory: Path, base: Any, device: str | None, options: dict[str, Any]) -> Any:
    kind = context_kind(directory) if directory.is_dir() else None
    if kind is None:
        raise UsageError(f"'{directory}' is not a fitted context", f"Name a directory with a {CONTEXT_JSON}")
    if kind == PREFIX:
        from loadstone.context.prefix.store import load_prefix

        return load_prefix(directory, base, device=device, **options)
    if kind == TABPFN:
        from loadstone.context.tabpfn import estimator as tabpfn

        return tabpfn.load(directory, base=base, device=device or "auto", **options)
    from loadstone.context.pfn.store import load_table_context

    return load_table_context(directory, base, device=device, **options)
