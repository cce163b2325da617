"""The ``quantization_config`` block of a compressed-tensors artifact: read (anybody's, versions 0.3 to 0.20) and
written."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loadstone.artifact.compressed_tensors.scheme import FORMATS, MIXED, MXFP8, LayerScheme, QuantArgs
from loadstone.artifact.patterns import unsound
from loadstone.errors import ArtifactError

METHOD = "compressed-tensors"
# The first release whose packing of 3, 5, 6 and 7 bits leaves no bit of a word unused.
DENSE_PACKING = (0, 18)
# What a written block says it was made by: the first release that has every format written here.
WRITTEN_VERSION = "0.15.0"


@dataclass(frozen=True)
class Group:
    """Layers that share a scheme: ``targets`` are module names, ``re:`` patterns or names of module classes."""

    name: str
    targets: tuple[str, ...]
    scheme: LayerScheme


@dataclass(frozen=True)
class Block:
    """A ``quantization_config`` block. ``status``: what it calls ``quantization_status``, None where it is missing."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...] = ()
    format: str | None = None
    version: str | None = None
    status: str | None = None
    kv_cache: QuantArgs | None = None

    @property
    def padded_packing(self) -> bool:
        """Whether a word holds ``32 // bits`` values only, as releases before 0.18 packed 3, 5, 6 and 7 bits."""
        numbers = re.findall(r"\d+", self.version or "")[:2]
        return bool(numbers) and tuple(map(int, numbers)) < DENSE_PACKING

    def ignores(self, module: str) -> bool:
        """Whether a module is named by ``ignore`` (class names in it say nothing about a name)."""
        return any(matches(target, module) for target in self.ignore)

    def scheme_of(self, module: str) -> LayerScheme | None:
        """The scheme of a quantized module, chosen as compressed-tensors does: exact names, then patterns, then
        classes. None where nothing names it."""
        for target, scheme in self._named:
            if matches(target, module):
                return scheme
        # A name does not tell its class. Quantized embeddings have a group of their own, others are Linears.
        wanted = "Embedding" if _EMBEDDING.search(module) else "Linear"
        return self._classes.get(wanted) or next(iter(self._classes.values()), None)

    @cached_property
    def _named(self) -> list[tuple[str, LayerScheme]]:
        pairs = [(t, group.scheme) for group in self.groups for t in group.targets if not _is_class(t)]
        return sorted(pairs, key=lambda pair: ("re:" in pair[0], pair[0]))

    @cached_property
    def _classes(self) -> dict[str, LayerScheme]:
        pairs = [(t, group.scheme) for group in self.groups for t in group.targets if _is_class(t)]
        return dict(reversed(pairs))


def matches(target: str, module: str) -> bool:
    """Whether a target names a module: exactly, or by a ``re:`` pattern anchored at the start only."""
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target == module


def unsupported(block: dict[str, Any]) -> str:
    """What a block asks for that is not decoded here (sparsity, rotations, a format); empty where all is."""
    block = _flat(block)
    if reason := obsolete(block):
        return reason
    transforms = block.get("transform_config")
    if isinstance(transforms, dict) and transforms.get("config_groups"):
        return "a transform_config (rotated weights)"
    other = next((name for name in _formats(block) if name not in (*FORMATS, MIXED)), None)
    return "" if other is None else f"the format {ascii(other)[:80]}"


def obsolete(block: dict[str, Any]) -> str:
    """What a block asks for that compressed-tensors of today does not read either: sparsity, marlin-24, formats that it
    never knew; empty for others."""
    block = _flat(block)
    sparsity = block.get("sparsity_config")
    kind = sparsity.get("format") if isinstance(sparsity, dict) else None
    if kind not in (None, "dense"):
        return f"the sparsity_config {ascii(kind)[:80]}"
    other = next((name for name in _formats(block) if name not in (*FORMATS, MIXED, *_ITS_OWN)), None)
    return "" if other is None else f"the format {ascii(other)[:80]}"


def _formats(block: dict[str, Any]) -> list[str]:
    groups = _values(block.get("config_groups"))
    given = [block.get("format"), *(g.get("format") for g in groups if isinstance(g, dict))]
    return [name for name in given if isinstance(name, str)]


def read_block(block: dict[str, Any]) -> Block:
    """The parsed block; raises `ArtifactError` naming the key that is malformed or that nothing here can decode."""
    block = _flat(block)
    if reason := unsupported(block):
        raise ArtifactError(
            f"{_WHERE} has {reason}, which is not decoded here",
            "Install compressed-tensors and load it with transformers",
        )
    groups = block.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise _wrong("has no config_groups")
    top = block.get("format")
    found = tuple(_group(name, entry, top) for name, entry in groups.items())
    kv_cache = block.get("kv_cache_scheme")
    return Block(
        groups=tuple(group for group in found if group is not None),
        ignore=_patterns(block.get("ignore") or (), "ignore"),
        format=_text(top),
        version=_text(block.get("version")),
        status=_text(block.get("quantization_status")),
        kv_cache=_args(kv_cache, "kv_cache_scheme") if kv_cache else None,
    )


def _patterns(value: Any, where: str) -> tuple[str, ...]:
    """Names of modules, class names and sound ``re:`` patterns."""
    found = _texts(value, where)
    for target in found:
        if target.startswith("re:") and (why := unsound(target[3:])):
            raise _wrong(f"{where}: {ascii(target)[:80]} {why}")
    return found


def _flat(block: dict[str, Any]) -> dict[str, Any]:
    """The block of today, out of one that holds its settings one level deeper."""
    inner = block.get("quantization_config")
    return block | inner if isinstance(inner, dict) and "config_groups" not in block else block


def _values(groups: Any) -> list[Any]:
    return list(groups.values()) if isinstance(groups, dict) else []


def _group(name: str, entry: Any, top: Any) -> Group | None:
    where = f"config_groups.{ascii(name)[1:-1][:80]}"
    if isinstance(entry, list):
        raise _wrong(f"{where} is the name of a preset, without its settings")
    if not isinstance(entry, dict):
        raise _wrong(f"{where} is not an object")
    targets = _patterns(entry.get("targets"), f"{where}.targets")
    if entry.get("weights") is None:
        # Attention or KV cache alone.
        return None
    weights = _args(entry["weights"], f"{where}.weights")
    inputs = entry.get("input_activations")
    given = _text(entry.get("format")) or (_text(top) if top != MIXED else None)
    arguments = _args(inputs, f"{where}.input_activations") if inputs else None
    return Group(
        name, targets, LayerScheme(given or _inferred_format(weights, arguments), weights, arguments)
    )


def _inferred_format(weights: QuantArgs, inputs: QuantArgs | None) -> str:
    """compressed-tensors' own choice where a block does not say (``infer_module_format``)."""
    if weights.type == "float":
        if weights.bits == 4:
            return "mxfp4-pack-quantized" if weights.group_size == 32 else "nvfp4-pack-quantized"
        if weights.group_size == 32 and weights.scale_dtype == "uint8":
            return MXFP8
        return "float-quantized" if inputs else "naive-quantized"
    return "int-quantized" if inputs else "pack-quantized"


def _args(entry: Any, where: str) -> QuantArgs:
    if not isinstance(entry, dict):
        raise _wrong(f"{where} is not an object")
    kind = str(entry.get("type", "int")).lower()
    bits, group = entry.get("num_bits", 8), entry.get("group_size")
    if kind not in ("int", "float") or type(bits) is not int or not 1 <= bits <= 16:
        raise _wrong(f"{where}: num_bits {ascii(bits)[:40]} of type {ascii(kind)[:40]} is not known")
    if group is not None and (type(group) is not int or not -1 <= group <= 1 << 20 or group == 0):
        raise _wrong(f"{where}: group_size {ascii(group)[:40]} is not possible")
    strategy = entry.get("strategy")
    if strategy is None:
        strategy = "tensor" if group is None else "channel" if group == -1 else "group"
    strategy = str(strategy).lower()
    if strategy not in _STRATEGIES:
        raise _wrong(f"{where}: the strategy {ascii(strategy)[:40]} is not known")
    if strategy in ("group", "tensor_group") and (group is None or group < 1):
        raise _wrong(f"{where}: strategy {strategy} needs a group_size above zero")
    symmetric, dynamic = entry.get("symmetric", True), entry.get("dynamic", False)
    if type(symmetric) is not bool or not (type(dynamic) is bool or dynamic == "local"):
        raise _wrong(f"{where}: symmetric and dynamic must be true or false")
    order = entry.get("actorder")
    dtype = _text(entry.get("scale_dtype"))
    return QuantArgs(
        bits=bits,
        type=kind,  # type: ignore[arg-type]
        strategy=strategy,  # type: ignore[arg-type]
        group_size=group if strategy in ("group", "tensor_group") else None,
        block=_block_structure(entry.get("block_structure"), where) if strategy == "block" else None,
        symmetric=symmetric,
        dynamic=dynamic,
        actorder={"static": "weight", "dynamic": "group", "true": "group"}.get(
            str(order).lower(), str(order).lower()
        )
        if order
        else None,
        scale_dtype=dtype.removeprefix("torch.") if dtype else None,
    )


def _block_structure(value: Any, where: str) -> tuple[int, int]:
    if isinstance(value, str) and re.fullmatch(r"\d{1,6}x\d{1,6}", value):
        value = [int(side) for side in value.split("x")]
    if (
        not isinstance(value, list)
        or len(value) != 2
        or not all(type(side) is int and 0 < side <= 1 << 20 for side in value)
    ):
        raise _wrong(f"{where}: block_structure {ascii(value)[:40]} is not two sizes above zero")
    return value[0], value[1]


def write_block(groups: Iterable[Group], ignore: Iterable[str]) -> dict[str, Any]:
    """The ``quantization_config`` to write.

    Only keys that every reader of the layout knows: compressed-tensors forbids others inside a group, so each
    optional one would narrow the releases that read the artifact.
    """
    groups = list(groups)
    formats = {group.scheme.format for group in groups}
    return {
        "quant_method": METHOD,
        "version": WRITTEN_VERSION,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": list(ignore),
        "config_groups": {
            group.name: {
                "targets": list(group.targets),
                "format": group.scheme.format,
                "weights": _written_args(group.scheme.weights, group.scheme.format),
                "input_activations": _written_args(group.scheme.inputs, group.scheme.format),
                "output_activations": None,
            }
            for group in groups
        },
    }


def _written_args(args: QuantArgs | None, layer_format: str) -> dict[str, Any] | None:
    if args is None:
        return None
    written: dict[str, Any] = {"num_bits": args.bits, "type": args.type, "strategy": args.strategy}
    if args.group_size is not None:
        written["group_size"] = args.group_size
    if args.block is not None:
        written["block_structure"] = list(args.block)
    if layer_format == MXFP8:
        # vLLM and compressed-tensors recognise MXFP8 by it.
        written["scale_dtype"] = "torch.uint8"
    return written | {"symmetric": args.symmetric, "dynamic": args.dynamic}


def _is_class(target: str) -> bool:
    # Names of modules have a dot, or are all lower case (lm_head).
    return not target.startswith("re:") and "." not in target and target[:1].isupper()


def _texts(value: Any, where: str) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise _wrong(f"{where} is not a list of names")
    return tuple(value)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _wrong(what: str) -> ArtifactError:
    return ArtifactError(f"{_WHERE}: {what}", "Restore config.json from the source")


_WHERE = "config.json: quantization_config (compressed-tensors)"
# Formats that the package reads, and that are not decoded here.
_ITS_OWN = ("dense", "mxfp6-pack-quantized")
_STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block", "token", "attn_head")
_EMBEDDING = re.compile(r"embed|wte|wpe|tok_")
