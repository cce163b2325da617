"""eval and prefixes on each model of the zoo, against a plain loop: batch 1, no padding, no cache; eval's in float64.

Each column (`columns`) is a function of a model's directory, which gets a tokenizer of plain words unless it has one.
A worker calls `check`; ``python -m tests.zoo.eval_checks DIR...`` tries all columns.
"""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Largest difference of a mean loss to the plain loop's, relative.
LIMIT = 1e-5
# Largest difference of a log-probability after a prefix to one uncached pass, both in float32.
PREFIX_LIMIT = 1e-4
CONTEXT = 48
_DOCUMENTS, _ALIKE = 7, 8


@dataclass(frozen=True)
class Finding:
    """``status``: right, refused or the kind of fault, as `checks.Result` has them."""

    status: str
    detail: str = ""


@dataclass
class Subject:
    """A model's directory and what the plain loop gave for it, by column."""

    path: Path
    class_name: str = ""
    model: Any = None
    plain: dict[str, np.ndarray] = field(default_factory=dict)

    def loaded(self) -> Any:
        """The model as stock transformers loads it, in float64."""
        if self.model is None:
            self.model = stock_class(self.path, self.class_name).from_pretrained(
                self.path, dtype=torch.float64, experts_implementation="eager"
            )
            self.model.eval()
        return self.model


_subjects: dict[Path, Subject] = {}


def check(path: str, class_name: str, column: str) -> dict[str, str]:
    """One column for one model, in the process that calls this; the model of the last call is kept."""
    folder = Path(path)
    if folder not in _subjects:
        _subjects.clear()
        _subjects[folder] = Subject(folder, class_name)
        if not (folder / "documents.jsonl").exists():
            sharpen(folder)
        if not (folder / "tokenizer_config.json").exists():
            add_tokenizer(folder)
    found = columns[column](_subjects[folder])
    return {"status": found.status, "detail": found.detail}


def stock_class(path: Path, class_name: str) -> Any:
    import transformers

    if class_name:
        module, _, name = class_name.partition(":")
        return getattr(importlib.import_module(module), name)
    return getattr(transformers, json.loads((path / "config.json").read_text())["architectures"][0])


def sharpen(path: Path) -> None:
    """Make a new model's matrices eight times as large: with those of 0.02 that classes start with, all tokens are
    about equally likely whatever came before, and errors hardly show."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            metadata = handle.metadata()
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and tensor.dim() > 1 and 0.01 < tensor.double().std() < 0.04:
                tensors[name] = tensor * 8
        save_file(tensors, file, metadata=metadata)


def add_tokenizer(path: Path) -> None:
    """A tokenizer of the words w0, w1, …; w1 ends a document."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = getattr(text_config(path), "vocab_size", None) or 100
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(min(vocabulary, 200))}, unk_token="w2"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="w1").save_pretrained(path)


def write_documents(path: Path, alike: bool) -> Path:
    """Documents of different lengths as JSON lines, in words of the model's tokenizer; ``alike``: they share a long
    beginning."""
    from transformers import AutoTokenizer

    config = json.loads((path / "config.json").read_text())
    special = set(_special(config))
    tokenizer = AutoTokenizer.from_pretrained(path)
    words = [t for t, i in sorted(tokenizer.get_vocab().items(), key=lambda x: x[1]) if i not in special]
    words = [w for w in words if w not in tokenizer.all_special_tokens][:150]
    random = np.random.default_rng(0)

    def some(count: int) -> str:
        return tokenizer.convert_tokens_to_string([words[i] for i in random.integers(len(words), size=count)])

    start = some(110)
    texts = (
        [f"{start} {some(5 + 4 * i)}" for i in range(_ALIKE)]
        if alike
        else [some(9 + 11 * i) for i in range(_DOCUMENTS)]
    )
    file = path / ("alike.jsonl" if alike else "documents.jsonl")
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return file


def text_config(path: Path) -> Any:
    """The config of a model's text part; None where several parts read text."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path).get_text_config()
    except ValueError:
        return None


def context_of(path: Path, wanted: int) -> int:
    """A context length that the model takes."""
    limit = getattr(text_config(path), "max_position_embeddings", None)
    # Some have rows for two positions that they never use.
    return min(wanted, limit - 2) if isinstance(limit, int) and limit > 4 else wanted


def _special(config: Any) -> list[int]:
    """Ids that a config names, such as image placeholders."""
    found = []
    for key, value in config.items() if isinstance(config, dict) else ():
        if isinstance(value, dict):
            found += _special(value)
        elif isinstance(value, int) and key.endswith(("_token_id", "_token_index")):
            found.append(value)
    return found


@torch.no_grad()
def plain_losses(model: Any, task: Any) -> np.ndarray:
    """Losses of the scored tokens, one window at a time."""
    stream, windows = task.stream, task.windows
    losses = np.full(len(stream.ids), np.nan)
    for start, length, first in zip(windows.start, windows.length, windows.first, strict=True):
        ids = torch.from_numpy(stream.ids[start : start + length])[None].clone()
        if task.protocol.bos_each_window:
            ids[0, 0] = task.protocol.separator_id
        # A short pass resets frequencies that transformers keeps from a longer one.
        model(input_ids=ids[:, :1], use_cache=False)
        logits = model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)
        for at in range(first, start + length + 1):
            losses[at] = -float(logits[at - 1 - start, stream.ids[at]])
    return losses[stream.scored]


def compare(subject: Subject, key: str, *, alike: bool = False, **options: Any) -> Finding:
    """One evaluation against the plain loop of the same windows; ``key`` names these."""
    import loadstone
    from loadstone.errors import LoadstoneError

    data = write_documents(subject.path, alike)
    try:
        found = loadstone.evaluate(
            subject.path,
            data=data,
            context_length=context_of(subject.path, 160 if alike else CONTEXT),
            dtype="float32",
            **options,
        )
    except LoadstoneError as error:
        return Finding("refused", f"exit {error.exit_code}: {error}")
    except Exception as error:
        return Finding("exit 1", _place(error))
    if key not in subject.plain:
        try:
            subject.plain[key] = plain_losses(subject.loaded(), found.task)
        except RuntimeError as error:  # some models cast to float32 on their way
            return Finding("none", f"no plain loop in float64: {' '.join(str(error).split())[:150]}")
    plain, ours = subject.plain[key], next(iter(found.values.values()))["nll"]
    mean = abs(float(ours.astype(np.float64).mean()) / float(plain.mean()) - 1)
    worst = float(np.abs(ours - plain).max())
    text = f"mean loss {mean:.1e} relative, a token's {worst:.1e} nats"
    return Finding("right" if mean <= LIMIT else "wrong number", text)


def packed(subject: Subject) -> Finding:
    return compare(subject, "packed", batch_size=1)


def packed_in_batches(subject: Subject) -> Finding:
    return compare(subject, "packed")


def rolling(subject: Subject) -> Finding:
    return compare(subject, "rolling", protocol="rolling", batch_size=1)


def rolling_in_batches(subject: Subject) -> Finding:
    return compare(subject, "rolling", protocol="rolling", batch_size=3)


def rolling_plain_modules(subject: Subject) -> Finding:
    return compare(subject, "rolling", protocol="rolling", fast=False)


def alike(subject: Subject) -> Finding:
    return compare(subject, "alike", alike=True, protocol="rolling")


def alike_plain_modules(subject: Subject) -> Finding:
    return compare(subject, "alike", alike=True, protocol="rolling", fast=False)


def streamed(subject: Subject) -> Finding:
    """--stream gives the resident model's losses, bit for bit."""
    import loadstone
    from loadstone.errors import LoadstoneError

    data = write_documents(subject.path, False)
    options: dict[str, Any] = {"data": data, "dtype": "float32", "batch_size": 3, "protocol": "rolling"}
    options["context_length"] = context_of(subject.path, CONTEXT)
    for fast in (True, False):
        values = []
        for stream in (False, True):
            try:
                found = loadstone.evaluate(subject.path, fast=fast, stream=stream, **options)
            except LoadstoneError as error:
                where = "--stream" if stream else "resident"
                return Finding("refused", f"{where}, exit {error.exit_code}: {error}")
            except Exception as error:
                return Finding("exit 1", f"{'--stream' if stream else 'resident'} {_place(error)}")
            values.append(next(iter(found.values.values()))["nll"])
        if not np.array_equal(*values):
            return Finding("wrong number", f"largest difference {np.abs(values[0] - values[1]).max():.1e}")
    return Finding("right")


# Tokens of the prefix, and of the texts after it, two of which go into one padded batch.
_PREFIX, _AFTER, _GENERATED = 14, (7, 3), 5


def prefix(subject: Subject) -> Finding:
    """A prefix made by fit and read from disk: logits after it, a padded batch and greedy generation are those of one
    uncached pass of stock transformers in float32."""
    import loadstone
    from loadstone.errors import LoadstoneError

    words = json.loads(write_documents(subject.path, True).read_text().partition("\n")[0])["text"].split(" ")
    prompt, out = subject.path / "prompt.txt", subject.path.with_name(f"{subject.path.name}-prefix")
    prompt.write_text(" ".join(words[:_PREFIX]))
    texts = [" ".join(words[_PREFIX : _PREFIX + count]) for count in _AFTER]
    try:
        loadstone.fit(subject.path, out, prompt=prompt, dtype="float32", overwrite=True)
        cache = loadstone.load_context(out)
    except LoadstoneError as error:
        return Finding("refused", f"exit {error.exit_code}: {error}")
    except Exception as error:
        return Finding("exit 1", _place(error))
    finally:
        shutil.rmtree(out, ignore_errors=True)
    stock = (
        stock_class(subject.path, subject.class_name)
        .from_pretrained(subject.path, dtype=torch.float32)
        .eval()
    )
    if not all(cache.tokenizer(texts, add_special_tokens=False)["input_ids"]):
        return Finding("none", "its tokenizer's class makes no tokens of the zoo's words")
    try:
        found = {"logits": _continued(stock, cache, texts[0])}
        for name, rows in (("generation", texts[:1]), ("padded generation", texts)):
            if name != "padded generation" or cache.takes_padding:
                found[name] = _generated(stock, cache, rows)
    except LoadstoneError as error:
        return Finding("wrong number", f"refused after it was made: {error}")
    except Exception as error:
        return Finding("exit 1", _place(error))
    far = {name: apart for name, apart in found.items() if not apart <= PREFIX_LIMIT}
    text = ", ".join(f"{name} {apart:.1e}" for name, apart in (far or found).items())
    return Finding("wrong number" if far else "right", f"log-probabilities differ by: {text}")


@torch.no_grad()
def _one_pass(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)


@torch.no_grad()
def _continued(stock: Any, cache: Any, text: str) -> float:
    """The text after the prefix in one call, against one pass."""
    ids = cache.inputs(text)["input_ids"]
    own = ids[:, cache.tokens.shape[1] :]
    logits = cache.model(input_ids=own, past_key_values=cache.fork(), use_cache=True).logits
    apart = logits.double().log_softmax(-1) - _one_pass(stock, ids)[:, -own.shape[1] :]
    return float(apart.abs().max())


@torch.no_grad()
def _generated(stock: Any, cache: Any, texts: list[str]) -> float:
    """Greedy tokens after the prefix and each text, in one batch: the logits of each, against one pass over its row."""
    inputs = cache.inputs(texts)
    mask = inputs["attention_mask"].bool()
    out = cache.model.generate(
        **inputs, max_new_tokens=_GENERATED, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    apart = 0.0
    for row, sequence in enumerate(out.sequences):
        steps = len(out.logits)
        own = torch.cat([sequence[: mask.shape[1]][mask[row]], sequence[mask.shape[1] :]])[None]
        expected = _one_pass(stock, own)[0, -steps - 1 : -1]
        found = torch.stack([step[row] for step in out.logits]).double().log_softmax(-1)
        apart = max(apart, float((found - expected).abs().max()))
    return apart


def _place(error: Exception) -> str:
    """An exception and where it was raised."""
    import traceback

    last = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:150]
    return f"{type(error).__name__} {Path(last.filename).name}:{last.lineno} {text}"


columns: dict[str, Callable[[Subject], Finding]] = {
    "eval packed, batch 1": packed,
    "eval packed": packed_in_batches,
    "eval rolling, batch 1": rolling,
    "eval rolling": rolling_in_batches,
    "eval --no-fast": rolling_plain_modules,
    "eval alike": alike,
    "eval alike --no-fast": alike_plain_modules,
    "eval --stream": streamed,
    "prefix": prefix,
}


def main() -> int:
    import time

    torch.set_num_threads(1)
    faults = 0
    for name in sys.argv[1:]:
        clock = time.monotonic()
        results = {column: Finding(**check(name, "", column)) for column in columns}
        wrong = {c: r for c, r in results.items() if r.status not in ("right", "refused")}
        refused = {c: r for c, r in results.items() if r.status == "refused"}
        faults += len(wrong)
        print(f"{Path(name).name} {time.monotonic() - clock:.1f} s {'ok' if not wrong | refused else ''}")
        for column, result in (wrong | refused).items():
            print(f"    {column}: {result.status}: {result.detail[:260]}")
        sys.stdout.flush()
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
