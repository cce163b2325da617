"""A language-model prefix on disk: the state of every layer after a prompt, bound to the model that read it."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loadstone.artifact import Artifact
from loadstone.artifact.builtin import PREFIX as BUILTIN
from loadstone.artifact.builtin import shown
from loadstone.artifact.context_errors import (
    ArchitectureMismatch,
    BaseMismatch,
    CorruptContext,
    FormatUnsupported,
    ProbeFailed,
    RecipeMismatch,
    TokenizerMismatch,
)
from loadstone.artifact.context_file import (
    CONTEXT_JSON,
    CONTEXT_TENSORS,
    PREFIX,
    ContextFile,
    read_context,
    require_kind,
)
from loadstone.artifact.formats.safetensors import open_tensors
from loadstone.artifact.values import check_values
from loadstone.context.fingerprint import Fingerprint, check_same, fingerprint
from loadstone.context.prefix.base import (
    architecture_of,
    language_artifact,
    load_language_model,
    recipe_of,
    tokenizer_facts,
)
from loadstone.context.prefix.cache import EMPTY, FULL, LINEAR, SLIDING, LayerState, Prefix, PrefixCache
from loadstone.context.prefix.continuation import Continuation, versions
from loadstone.context.prefix.fit import check, compute_dtype, share_attention
from loadstone.context.prefix.reading import last_only
from loadstone.context.prefix.stored_states import CACHE_KINDS, Stored, check_kind
from loadstone.errors import ArtifactError, LoadstoneError, MissingError
from loadstone.writing.contexts import write_context

log = logging.getLogger(__name__)
# Largest difference of a logit, relative to the largest, between the machine that read the prompt and this one.
PROBE_TOLERANCE = {"float64": 1e-9, "float32": 2e-3, "bfloat16": 0.1, "float16": 0.05}
_PREVIEW = 120
_AGAIN = "Make the prefix again with loadstone fit --prompt"


def save_prefix(
    cache: PrefixCache, path: Path, *, source: Artifact | None = None, overwrite: bool = False
) -> Path:
    """Write a prefix as the directory ``path``, whole or not at all. ``source``: the base's artifact, recorded with it.

    Raises `UsageError` for an existing output.
    """
    prefix = cache.prefix
    tensors = {
        f"layers.{number}.{name}": tensor
        for number, layer in enumerate(prefix.layers)
        for name, tensor in layer.tensors().items()
    }
    tensors |= {
        "tokens": prefix.tokens.to(torch.int32),
        "state.hidden": prefix.hidden,
        "state.logits": prefix.logits,
        "probe.logits": _proven(cache),
    }
    return write_context(path, tensors, describe(prefix, source), overwrite=overwrite)


def probe(cache: PrefixCache) -> Tensor:
    """Logits after the prefix and its own first token once more: float32 (1, V)."""
    with torch.no_grad():
        ids = cache.tokens[:, :1]
        out = cache.model(input_ids=ids, past_key_values=cache.fork(keeps=False), use_cache=True)
    return out.logits[:, -1].float()  # type: ignore[no-any-return]


def _proven(cache: PrefixCache) -> Tensor:
    """The probe's logits from one uncached pass, after the cached ones were held against them: float32 (1, V).

    A quantized cache changes logits on purpose; of one the cached logits are stored.
    """
    found = probe(cache)
    prefix = cache.prefix
    if prefix.cache_kind != _name(prefix.dtype):
        return found
    ids = torch.cat([prefix.tokens, prefix.tokens[:, :1]], 1)
    with torch.no_grad():
        out = cache.model(input_ids=ids, use_cache=False, **last_only(cache.model))
    expected: Tensor = out.logits[:, -1].float()
    apart = ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
    # `not <=` and not `>`: a NaN fails too.
    if not apart <= PROBE_TOLERANCE[_name(prefix.dtype)]:
        raise ArtifactError(
            f"{type(cache.model).__name__} does not continue this prefix as in one pass: logits differ by {apart:.2g}",
            "Evaluate this model without a prefix",
        )
    return expected


def describe(prefix: Prefix, source: Artifact | None) -> dict[str, Any]:
    """What context.json holds of a prefix; ``docs/prefixes.md`` documents every key."""
    model = prefix.model
    base = fingerprint(model)
    text = " ".join(prefix.text.split())
    return {
        "kind": PREFIX,
        "prompt": {
            "tokens": prefix.length,
            "sha256": tokens_sha256(prefix.tokens),
            "template": prefix.template,
            "preview": text[:_PREVIEW] + ("…" if len(text) > _PREVIEW else ""),
        },
        "base": {
            "source": shown(source.own_path.resolve()) if source else None,
            "recipe": recipe_of(source) if source else None,
            "fingerprint": base.digest,
            "architecture": architecture_of(model.config),
            "tensors": base.to_json(),
        },
        "tokenizer": tokenizer_facts(prefix.tokenizer) if prefix.tokenizer is not None else {},
        "cache": {
            "dtype": prefix.cache_kind,
            "layers": len(prefix.layers),
            "layout": "1, heads, rows, head size",
            "extendable": True,
        },
        "layers": [_layer_facts(layer) for layer in prefix.layers],
        # Of this process: nothing is compared again.
        "continuation": check(model, prefix.tokens).to_json(),
        "numerics": {
            "dtype": _name(prefix.dtype),
            "device": prefix.tokens.device.type,
            "torch": torch.__version__,
            "transformers": versions()["transformers"],
            "probe_tolerance": PROBE_TOLERANCE[_name(prefix.dtype)],
        },
        # Anyone with the model can recover the prompt from keys and values.
        "contains_prompt": True,
    }


def _layer_facts(layer: LayerState) -> dict[str, Any]:
    facts: dict[str, Any] = {"kind": layer.kind, "rows": layer.rows}
    if layer.window is not None:
        facts["window"] = layer.window
    for name, stored in (("keys", layer.keys), ("values", layer.values)):
        if stored is not None and stored.facts:
            facts[name] = stored.facts
    return facts


def tokens_sha256(tokens: Tensor) -> str:
    """Hash of token ids, equal for equal prompts of one tokenizer."""
    return hashlib.sha256(tokens.cpu().numpy().astype("<i8").tobytes()).hexdigest()


def load_prefix(
    path: str | Path,
    base: Any = None,
    *,
    device: str | None = None,
    tokenizer: Any = None,
    share: bool = True,
    trust_remote_code: bool = False,
) -> PrefixCache:
    """A prefix as a transformers cache; give every request its own ``fork()`` of it.

    ``base``: a directory or a loaded transformers model, the recorded directory by default; ``tokenizer`` is checked
    too when a model is given (a directory has its own). ``share``: let the model's attention read the prefix in place
    where it can. Raises what `load_context` lists.
    """
    directory = Path(path)
    require_kind(directory, PREFIX, by="this loader")
    file = read_context(directory, verify=True)
    check_facts(file)
    given = base if base is not None and not isinstance(base, str | Path) else None
    if given is None:
        artifact = find_base(file, base)
        dtype = file.facts["numerics"]["dtype"]
        own = _tokenizer(artifact, trust_remote_code)
        check_base(file, artifact, own)
        model, tokenizer = load_language_model(
            artifact, device=device or "auto", dtype=dtype, trust_remote_code=trust_remote_code
        )
        name = str(artifact.root)
    else:
        model, name = given, str(getattr(given, "name_or_path", "") or type(given).__name__)
        if tokenizer is not None:
            check_tokenizer(file, tokenizer, name)
    return bind_prefix(file, model, tokenizer, name, share=share)


def bind_prefix(
    file: ContextFile, model: Any, tokenizer: Any, name: str, *, share: bool = True
) -> PrefixCache:
    """The cache of a checked file with its model, once architecture, weights and a probe agree."""
    check_architecture(file, model.config, name)
    check_same(Fingerprint.from_json(file.facts["base"]["tensors"]), fingerprint(model), name)
    dtype = file.facts["numerics"]["dtype"]
    if _name(compute_dtype(model)) != dtype:
        raise BaseMismatch(
            f"the base model '{name}' computes in {_name(compute_dtype(model))}, the prefix was made in {dtype}",
            "Load the base in that dtype",
        )
    prefix = _read(file, model, tokenizer)
    continuation = Continuation.from_json(file.facts.get("continuation")) or check(model, prefix.tokens)
    cache = PrefixCache(replace(prefix, padding=continuation.padding))
    if share:
        share_attention(cache)
    _check_probe(cache, file)
    return cache


def find_base(file: ContextFile, base: str | Path | None) -> Artifact:
    """The base's artifact: as named, or where it was; raises `MissingError` when it is not there."""
    if base is not None:
        return language_artifact(base)
    recorded = file.facts["base"].get("source")
    if isinstance(recorded, str) and recorded.startswith(BUILTIN):
        return language_artifact(recorded)
    for place in (Path(recorded), file.path / recorded) if isinstance(recorded, str) else ():
        if place.is_dir():
            return language_artifact(place)
    raise MissingError(
        f"the base model of '{file.path}' is not here: it was '{recorded}', fingerprint "
        f"{file.facts['base'].get('fingerprint', '?')[:16]}",
        "Name its directory (--base DIR, or base=)",
    )


def check_base(file: ContextFile, artifact: Artifact, tokenizer: Any) -> None:
    """Check recipe, tokenizer and chat template, which need no weights; raises the mismatch found."""
    recorded, found = file.facts["base"].get("recipe"), recipe_of(artifact)
    if recorded is not None and recorded != found:
        raise RecipeMismatch(
            f"the base model '{artifact.root}' is quantized by {found}, the prefix was made with {recorded}",
            f"Name the model it was made with, or: {_AGAIN}",
        )
    check_tokenizer(file, tokenizer, str(artifact.root))


def check_tokenizer(file: ContextFile, tokenizer: Any, name: str) -> None:
    """Raise `TokenizerMismatch` unless tokenizer and chat template are those the prefix was made with."""
    wanted, found = file.facts["tokenizer"], tokenizer_facts(tokenizer)
    if not wanted:
        return
    if wanted.get("sha256") != found["sha256"]:
        raise TokenizerMismatch(
            f"the tokenizer of '{name}' ({found['class']}, {found['tokens']} tokens) is not the prefix's "
            f"({wanted.get('class')}, {wanted.get('tokens')} tokens): they differ in content",
            f"Restore its tokenizer.json, or: {_AGAIN}",
        )
    if wanted.get("chat_template_sha256") != found["chat_template_sha256"]:
        raise TokenizerMismatch(
            f"the chat template of '{name}' is not the one the prefix was made with",
            f"Restore chat_template.jinja (or tokenizer_config.json), or: {_AGAIN}",
        )


def check_architecture(file: ContextFile, config: Any, name: str) -> None:
    """Raise `ArchitectureMismatch`, naming keys of config.json that decide about the arithmetic and differ."""
    wanted, found = file.facts["base"]["architecture"], architecture_of(config)
    # Keys that only one version of transformers writes are left alone.
    differ = [key for key in wanted if key in found and wanted[key] != found[key]]
    if differ:
        what = ", ".join(f"{k} {_short(found[k])} (made with {_short(wanted[k])})" for k in differ[:5])
        more = f" and {len(differ) - 5} more" if len(differ) > 5 else ""
        raise ArchitectureMismatch(
            f"the base model '{name}' is another architecture: {what}{more}",
            "Name the model it was made with",
        )


def check_facts(file: ContextFile) -> None:
    """Hold the description against itself and the tensors it comes with."""
    facts = file.facts
    kind, dtype = facts["cache"]["dtype"], facts["numerics"].get("dtype")
    if kind not in CACHE_KINDS or dtype not in PROBE_TOLERANCE:
        raise FormatUnsupported(
            f"{CONTEXT_JSON}: a cache in {str(kind)[:40]!a}, computed in {str(dtype)[:40]!a}, is not known here",
            "Update loadstone",
        )
    check_kind(kind, getattr(torch, dtype))
    problem = None
    expected = {"tokens", "state.hidden", "state.logits", "probe.logits"}
    for number, layer in enumerate(facts["layers"]):
        if not isinstance(layer, dict) or layer.get("kind") not in (FULL, SLIDING, LINEAR, EMPTY):
            problem = f"layer {number} is of no known kind"
            break
        has = {n.removeprefix(f"layers.{number}.") for n in file.tensors if n.startswith(f"layers.{number}.")}
        expected |= {f"layers.{number}.{name}" for name in has}
        if layer["kind"] in (FULL, SLIDING) and not {"keys.data", "values.data"} <= has:
            problem = f"layer {number} lacks keys or values"
        if layer["kind"] == SLIDING and (type(layer.get("window")) is not int or layer["window"] < 2):
            problem = f"layer {number} has no window"
        if layer.get("rows") != facts["prompt"].get("tokens"):
            problem = f"layer {number} has seen {layer.get('rows')} tokens of {facts['prompt'].get('tokens')}"
        problem = problem or _plain_shapes(file, number, layer, kind)
    tokens = file.tensors.get("tokens")
    if problem is None and (tokens is None or tokens.shape != (1, facts["prompt"].get("tokens"))):
        problem = "the tokens are not those that it counts"
    wrong = expected.symmetric_difference(file.tensors)
    if problem is None and wrong:
        problem = f"tensor '{min(wrong)}' is missing or does not belong"
    if problem:
        raise CorruptContext(f"{CONTEXT_JSON} and {CONTEXT_TENSORS} disagree: {problem}", _AGAIN)
    try:
        check_values(file.path, list(file.tensors.values()))
    except ArtifactError as error:
        raise CorruptContext(error.message, error.remedy) from None


def _plain_shapes(file: ContextFile, number: int, layer: dict[str, Any], kind: str) -> str | None:
    if layer["kind"] not in (FULL, SLIDING) or kind.startswith(("hqq", "quanto")):
        return None
    rows = layer["rows"] if layer["kind"] == FULL else min(layer["rows"], layer["window"] - 1)
    for name in ("keys", "values"):
        shape = file.tensors[f"layers.{number}.{name}.data"].shape
        if len(shape) != 4 or shape[0] != 1 or shape[2] != rows:
            return f"layer {number} has {name} of shape {list(shape)} for {rows} rows"
    return None


def _read(file: ContextFile, model: Any, tokenizer: Any) -> Prefix:
    facts = file.facts
    device = model.get_input_embeddings().weight.device
    devices = _layer_devices(model, facts["cache"]["layers"], device)
    kind = facts["cache"]["dtype"]
    layers = []
    with open_tensors(file.path / CONTEXT_TENSORS) as handle:

        def take(name: str, where: torch.device) -> Tensor:
            # A copy on the CPU too: a mapped tensor would change with the file under it.
            tensor = handle.get_tensor(name)
            return tensor.clone() if where.type == "cpu" else tensor.to(where)

        for number, layer in enumerate(facts["layers"]):
            start = f"layers.{number}."
            own = {
                n.removeprefix(start): take(n, devices[number]) for n in file.tensors if n.startswith(start)
            }
            held = {
                part: Stored(
                    kind,
                    {n.partition(".")[2]: t for n, t in own.items() if n.startswith(f"{part}.")},
                    layer.get(part, {}),
                )
                for part in ("keys", "values")
                if f"{part}.data" in own
            }
            states = {n: t for n, t in own.items() if n.startswith(("conv.", "recurrent."))}
            layers.append(
                LayerState(
                    layer["kind"],
                    layer["rows"],
                    held.get("keys"),
                    held.get("values"),
                    layer.get("window"),
                    states,
                )
            )
        tokens = take("tokens", device).long()
        hidden, logits = take("state.hidden", device), take("state.logits", device)
    if tokens_sha256(tokens) != facts["prompt"].get("sha256"):
        raise CorruptContext(f"{CONTEXT_TENSORS}: the tokens are not those of {CONTEXT_JSON}", _AGAIN)
    dtype = getattr(torch, facts["numerics"]["dtype"])
    text, template = str(facts["prompt"].get("preview", "")), bool(facts["prompt"].get("template"))
    return Prefix(tokens, tuple(layers), logits, hidden, dtype, kind, text, template, model, tokenizer)


def _layer_devices(model: Any, count: int, default: torch.device) -> list[torch.device]:
    """Where each decoder layer of a model lies, which may be spread over several devices."""
    from loadstone.loading.layers import layer_stack

    stack = layer_stack(model)
    if stack is None or len(stack.layers) != count:
        return [default] * count
    parameters = [next(layer.parameters(), None) for layer in stack.layers]
    return [default if p is None else p.device for p in parameters]


def _check_probe(cache: PrefixCache, file: ContextFile) -> None:
    with open_tensors(file.path / CONTEXT_TENSORS) as handle:
        expected = handle.get_tensor("probe.logits").double()
    try:
        found = probe(cache).cpu().double()
        if found.shape != expected.shape:
            raise ValueError(f"{list(found.shape)} logits, {list(expected.shape)} were recorded")
    except LoadstoneError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CorruptContext(f"'{file.path}' does not fit its model ({reason})", _AGAIN) from None
    apart = ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
    tolerance = PROBE_TOLERANCE[file.facts["numerics"]["dtype"]]
    # `not <=` and not `>`: a NaN fails too.
    if not apart <= tolerance:
        raise ProbeFailed(
            f"'{file.path}': the probe's logits differ by {apart:.2g} here, {tolerance:g} is allowed",
            "The machine or library computes differently from where it was made: make it again here",
        )


def _tokenizer(artifact: Artifact, trust_remote_code: bool) -> Any:
    from loadstone.loading import load_tokenizer

    return load_tokenizer(artifact, trust_remote_code=trust_remote_code)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
