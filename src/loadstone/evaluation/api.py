"""`loadstone.evaluate`."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from loadstone.artifact.context_file import PREFIX, context_kind
from loadstone.artifact.kinds import holds_adapter
from loadstone.errors import UsageError
from loadstone.evaluation.options import DEFAULT_DATA, Options
from loadstone.evaluation.result import Evaluation
from loadstone.evaluation.results.gates import parse_gate
from loadstone.loading.devices import cpu_by_default

log = logging.getLogger(__name__)
StrPath = str | os.PathLike[str]


@cpu_by_default
def evaluate(
    models: StrPath | Sequence[StrPath],
    *,
    data: StrPath = DEFAULT_DATA,
    baseline: StrPath | None = None,
    base: StrPath | None = None,
    checkpoint: str | None = None,
    no_checkpoint: bool = False,
    trust_remote_code: bool = False,
    native_kernels: bool = False,
    text_column: str | None = None,
    split: str | None = None,
    limit: int | None = None,
    chat: bool = False,
    protocol: str | None = None,
    context_length: int | None = None,
    stride: int | None = None,
    separator: str = "auto",
    batch_size: int | str = "auto",
    device: str = "auto",
    dtype: str = "auto",
    fast: bool = True,
    compile: bool | None = None,
    stream: bool | None = None,
    activations: bool = False,
    parallel: str | None = None,
    cache: StrPath | None = None,
    resume: bool = False,
    kl: bool = False,
    worst: int = 5,
    tasks: Sequence[str] = (),
    task_path: StrPath | None = None,
    speed: bool = False,
    report: StrPath | None = None,
    fail_if: Sequence[str] = (),
    progress: Callable[[str, int], AbstractContextManager[Callable[[int], None]]] | None = None,
) -> Evaluation:
    """Measure models on text, or fitted tables on a table; several are compared with the first, or with ``baseline``.

    ``models`` are directories of any kind, or ``builtin:`` names. On text the result has loss (nats per token),
    perplexity and bits per byte with standard errors, and paired differences to the reference on the same tokens.

    Example::

        result = loadstone.evaluate("tiny-w4", baseline="run/checkpoint-900", fail_if=["dloss>0.03@95"])
        result.records[1]["delta_loss"], result.failures

    Models
        ``baseline``: a model the others are compared with, or the ``--json`` file of an earlier run. ``base``: the base
        model of a context, if it is not the recorded one. ``checkpoint``, ``no_checkpoint``: within a training run.
        ``trust_remote_code``: run Python code that came with the model. ``native_kernels``: run weights of other
        quantizers on their format's own kernels instead of decoding them.
    Text
        ``data``: a file (.txt .jsonl .json .csv .parquet .arrow), a directory, a dataset's name, or a text in the
        package (``sample``, ``stories``, ``austen``); a table for fitted contexts. ``text_column``, ``split``,
        ``limit`` (documents). ``chat``: rows are conversations (``messages``, or ``prompt`` and ``completion``),
        rendered by the tokenizer's chat template. ``protocol``: ``packed``, ``strided`` or ``rolling`` (default:
        packed, with ``chat`` rolling), with ``context_length`` and ``stride`` in tokens. ``separator``: ``auto``,
        ``bos``, ``eos`` or a token id.
    Computation
        ``batch_size``: windows computed at once, or ``auto``. ``device``, ``dtype``: names, or ``auto``. ``fast``: use
        faster kernels that give the same bits, and read common prefixes once. ``compile``: compile the decoder layers;
        None: on a GPU, where a long text saves more time than compiling takes. ``stream``: hold one layer in memory at
        a time; None: if the models do not fit. ``activations``: round inputs of layers as vLLM does, where the scheme
        of a compressed-tensors artifact has quantized inputs. ``parallel``: ``tensor=N`` divides each copy of a model
        among N ranks of a ``torchrun`` job. ``cache``: a directory of finished scores, found by
        content; ``resume``: continue an interrupted run from it.
    Results
        ``kl``: also KL divergence and top-1 agreement with the reference, and the ``worst`` documents. ``tasks``: also
        lm-eval tasks, with ``task_path`` a folder of more of them. ``speed``: also prefill and decode speed.
        ``report``: write an HTML page and its pictures to this directory. ``fail_if``: gates such as ``dloss>0.03``;
        see ``result.failures``. ``progress(label, total)``: opens a progress bar that
        counts tokens, or bytes of a long text that is tokenized.

    Raises:
        UsageError: options that contradict each other, or do not apply to these models.
        ArtifactError: a model that is invalid or cannot be loaded here, or whose losses are not finite.
        MissingError: a package, device or dataset that is not available.
    """
    names = [models] if isinstance(models, str | os.PathLike) else list(models)
    options = Options(
        models=tuple(os.fspath(name) for name in names),
        base=_path(base),
        baseline=_path(baseline),
        data=os.fspath(data),
        text_column=text_column,
        split=split,
        limit=limit,
        chat=chat,
        protocol=protocol,
        context_length=context_length,
        stride=stride,
        separator=separator,
        batch_size=_batch_size(batch_size),
        device=device,
        dtype=dtype,
        checkpoint=checkpoint,
        no_checkpoint=no_checkpoint,
        trust_remote_code=trust_remote_code,
        native_kernels=native_kernels,
        divergence=kl,
        worst=worst,
        fast=fast,
        compile=compile,
        stream=stream,
        activations=activations,
        parallel=parallel,
        cache=_path(cache),
        resume=resume,
        tasks=(tasks,) if isinstance(tasks, str) else tuple(tasks),
        task_path=_path(task_path),
        speed=speed,
        gates=tuple(map(parse_gate, [fail_if] if isinstance(fail_if, str) else fail_if)),
    )
    kinds = [context_kind(Path(model)) for model in options.models]
    if any(kind not in (None, PREFIX) for kind in kinds):
        if report is not None:
            raise UsageError("--report is about language models", "Leave it out")
        from loadstone.evaluation.fitted_tables import evaluate_tables

        return evaluate_tables(options)
    if options.base is not None and PREFIX not in kinds and not any(map(holds_adapter, options.models)):
        raise UsageError(f"--base {options.base} is for contexts and adapters", "Leave it out")
    from loadstone.evaluation.results import report as page

    if report is not None:
        page.check_report(Path(report))
    from loadstone.evaluation.run import run
    from loadstone.progress import no_progress

    result = run(options, progress or no_progress)
    if report is not None and result.first:
        log.info("report: %s", page.write_report(result, Path(report)))
    return result


def _path(value: StrPath | None) -> str | None:
    return None if value is None else os.fspath(value)


def _batch_size(value: int | str) -> int | None:
    """The number of windows, None for ``auto``."""
    if value == "auto":
        return None
    if not str(value).isdecimal() or int(value) < 1:
        raise UsageError(f"--batch-size {value!r} is neither a positive number nor auto")
    return int(value)
