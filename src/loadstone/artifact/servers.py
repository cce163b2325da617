"""Where a quantized artifact runs: transformers, vLLM, SGLang and TensorRT-LLM, by scheme and kernel.

Every line is from docs/serving.md, which names the release and the source of each: vLLM 0.32, SGLang 0.5.23,
TensorRT-LLM (2026), transformers 5.23 with compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import gcd
from typing import TYPE_CHECKING, Any, NamedTuple

from loadstone.artifact.compressed_tensors import PackedWeight
from loadstone.artifact.compressed_tensors.block import METHOD
from loadstone.artifact.compressed_tensors.merging import largest_division, merged_sets
from loadstone.artifact.compressed_tensors.scheme import FLOAT, INT, MXFP4, MXFP8, NVFP4, PACK, LayerScheme

if TYPE_CHECKING:
    from loadstone.artifact.detect import Artifact

TRANSFORMERS, VLLM, SGLANG, TENSORRT = "transformers", "vLLM", "SGLang", "TensorRT-LLM"
SERVERS = (TRANSFORMERS, VLLM, SGLANG, TENSORRT)
# torchao's products with rounded inputs, but those of MX, return tensors that autograd does not know.
NO_GRADIENT = ", without gradients (no LoRA on it)"


# Model types whose experts transformers 5.23 loads from one tensor of all of them only. loadstone merges others too.
MERGED_ONLY = frozenset((
    "aria", "aria_text", "diffusion_gemma", "diffusion_gemma_text", "gemma4", "gemma4_text", "gemma4_unified",
    "gemma4_unified_text", "gpt_oss", "hy_v4", "inkling_text", "inkling2", "inkling2_text", "mistral4", "muse_spark",
    "muse_spark_text", "qwen3_vl_moe", "qwen3_vl_moe_text", "zaya",
))  # fmt: skip


class Runs(NamedTuple):
    """Whether a server runs a scheme, and how: the kernels, or why not."""

    server: str
    scheme: str
    runs: bool
    how: str


def where_it_runs(
    schemes: Iterable[LayerScheme],
    experts: bool,
    plain_experts: bool = False,
    config: Mapping[str, Any] | None = None,
) -> tuple[Runs, ...]:
    """A line for each server and scheme of the compressed-tensors layout.

    ``experts``: some are quantized; ``plain_experts``: the model's experts are plain; ``config``: of the model.
    """
    inner = (config or {}).get("text_config")
    models = {each.get("model_type") for each in (config or {}, inner) if isinstance(each, dict)}
    found = []
    for scheme in dict.fromkeys(schemes):
        answers = _answers(scheme, experts)
        if experts and models & MERGED_ONLY:
            answers = ((False, "experts one by one do not merge on load of this model"), *answers[1:])
        if experts and "gpt_oss" in models:
            vllm = (False, "vLLM reads the experts of gpt-oss in one tensor only: MXFP4 or plain")
            answers = (answers[0], vllm, *answers[2:])
        if plain_experts and (scheme.weights.type, scheme.weights.bits) != ("float", 8):
            answers = ((False, "plain experts beside packed layers do not merge on load"), *answers[1:])
        found += [Runs(server, str(scheme), *answer) for server, answer in zip(SERVERS, answers, strict=True)]
    return tuple(found)


def torchao_runs(
    kinds: Iterable[str], inputs: bool, by_module: bool, experts: bool, split: bool
) -> tuple[Runs, ...]:
    """A line for each server about torchao's layout.

    ``kinds``: tensor classes; ``inputs``: some round their inputs; ``by_module``: the config names modules;
    ``experts``: some are quantized; ``split``: of layers that servers merge, some are plain.
    """
    kinds = set(kinds)
    reasons = {
        "its recipe names modules, which vLLM does not find after merging layers": by_module,
        "vLLM does not read quantized experts in this layout": experts,
        "layers that vLLM merges are partly plain": split,
        "vLLM cannot cut NVFP4 or MX tensors": bool(kinds & {"NVFP4Tensor", "MXTensor"}),
    }
    why = next((reason for reason, holds in reasons.items() if holds), "")
    name = ", ".join(sorted(kinds))
    untrained = inputs and kinds != {"MXTensor"}
    return (
        Runs(TRANSFORMERS, name, True, "torchao's own products" + (NO_GRADIENT if untrained else "")),
        Runs(VLLM, name, not why, why or "by torchao's own products, not on vLLM's kernels"),
        Runs(SGLANG, name, False, "SGLang has removed torchao"),
        Runs(TENSORRT, name, False, "TensorRT-LLM does not read torchao's tensors"),
    )


def runs_of(artifact: Artifact) -> tuple[Runs, ...]:
    """Where a quantized artifact runs; empty for others."""
    from loadstone.artifact.torchao.config import chooses_by_module

    if packed := compressed_weights(artifact):
        experts = any(".experts." in name for name in packed)
        plain = not experts and any(".experts." in name for name in artifact.tensors)
        schemes = (weight.scheme for weight in packed.values())
        return where_it_runs(schemes, experts, plain, artifact.config)
    if not artifact.quantized or not artifact.is_torchao:
        return ()
    block = artifact.quantization_config or {}
    quant_type = block.get("quant_type")
    recipe = quant_type.get("default") if isinstance(quant_type, dict) else None
    modules = {name.removesuffix(".weight"): True for name in artifact.quantized}
    modules |= {n.removesuffix(".weight"): False for n in artifact.tensors if n.endswith(".weight")}
    split = any(len({modules[m] for m in members}) > 1 for members in merged_sets(modules))
    return torchao_runs(
        (flat.type for flat in artifact.quantized.values()),
        any(flat.quantizes_activations for flat in artifact.quantized.values()),
        isinstance(recipe, dict) and chooses_by_module(recipe),
        any(len(flat.shape) == 3 for flat in artifact.quantized.values()),
        split,
    )


def compressed_weights(artifact: Artifact) -> dict[str, PackedWeight]:
    """The packed weights of the compressed-tensors layout; empty for other formats."""
    if artifact.quant_method != METHOD:
        # auto-round's own format holds such weights too, and has other readers.
        return {}
    return {name: weight for name, weight in artifact.packed.items() if isinstance(weight, PackedWeight)}


def largest_tensor_parallel(artifact: Artifact) -> int | None:
    """The most GPUs that packed weights and attention heads divide among evenly; None where nothing is packed."""
    packed = compressed_weights(artifact)
    if not packed:
        return None
    found = largest_division((w.module, w.scheme, w.shape) for w in packed.values())
    inner = artifact.config.get("text_config")
    config = inner if isinstance(inner, dict) else artifact.config
    heads = config.get("num_attention_heads")
    return gcd(found, heads) if isinstance(heads, int) and heads > 0 else found


def _answers(scheme: LayerScheme, experts: bool) -> tuple[tuple[bool, str], ...]:
    """(runs, how) for each of `SERVERS`."""
    weights, inputs = scheme.weights, scheme.inputs
    if scheme.format == PACK:
        return _packed_integers(scheme)
    if scheme.format == NVFP4:
        marlin = "Marlin from compute capability 7.5"
        loads = (
            (False, "loads experts without their global scale: wrong numbers") if experts else (True, _EQUAL)
        )
        if inputs is None:
            return loads, (True, marlin), (True, "Marlin"), (False, _NOT_TENSORRT)
        return (
            loads,
            (True, f"FlashInfer, CUTLASS from 10.0, else {marlin}"),
            (True, "from 10.0"),
            (True, "NVFP4"),
        )
    if scheme.format == MXFP4:
        vllm = (True, "Marlin from compute capability 7.5" if inputs is None else "FlashInfer from 10.0")
        sglang = (False, "no kernel for MXFP4 outside of experts")
        return (
            (True, _EQUAL),
            vllm,
            sglang,
            (inputs is None, "W4A16_MXFP4" if inputs is None else _NOT_TENSORRT),
        )
    if scheme.format == MXFP8:
        loads = (False, _NOT_MERGED) if experts else (True, _ROUNDS)
        return loads, (True, "FlashInfer from 10.0"), (False, "no kernel for MXFP8"), (False, _NOT_TENSORRT)
    if weights.type == "int":
        if scheme.format == INT and weights.bits == 8 and inputs and inputs.bits == 8 and not weights.grouped:
            loads = (False, _NOT_MERGED) if experts else (True, _ROUNDS)
            kernels = (True, "CUTLASS, Triton from compute capability 7.5; CPU: oneDNN")
            sglang = (False, "no kernel for int8 experts") if experts else (True, "CUTLASS")
            return loads, kernels, sglang, (False, "it would be read as FP8")
        return (not experts, _ROUNDS), (False, _NO_KERNEL), (False, _NO_KERNEL), (False, _NOT_TENSORRT)
    if weights.strategy == "block":
        loads = (True, f"{_ROUNDS}; widths must be multiples of the block")
        return loads, (True, "DeepGEMM, CUTLASS from 8.9"), (True, "from 8.9"), (True, "FP8_BLOCK_SCALES")
    if inputs is None:
        return (
            (True, _EQUAL),
            (True, "Marlin from compute capability 7.5"),
            (True, "Marlin"),
            (False, _NOT_TENSORRT),
        )
    dynamic = scheme.format == FLOAT and inputs.dynamic is True and weights.strategy == "channel"
    tensorrt = (True, "FP8_PER_CHANNEL_PER_TOKEN") if dynamic else (False, _NOT_TENSORRT)
    return (
        (True, _ROUNDS),
        (True, "FlashInfer, CUTLASS from 8.9, below it Marlin; CPU"),
        (True, "from 8.9"),
        tensorrt,
    )


def _packed_integers(scheme: LayerScheme) -> tuple[tuple[bool, str], ...]:
    weights, group = scheme.weights, scheme.weights.group_size
    loads = (True, _EQUAL)
    if not weights.symmetric:
        loads = (False, "zero points do not load; with dequantize=True they do")
    if (
        weights.bits not in (4, 8)
        or scheme.inputs is not None
        or (weights.bits == 8 and not weights.symmetric)
    ):
        return loads, (False, _NO_KERNEL), (False, _NO_KERNEL), (False, _NOT_TENSORRT)
    if group not in (None, 32, 64, 128):
        slow = f"groups of {group} have no Marlin kernel"
        return loads, (True, f"Triton: {slow}"), (False, slow), (False, _NOT_TENSORRT)
    machete = "" if group == 32 else ", Machete on 9.0"
    cpu = "; CPU" if weights.bits == 4 else "; not on a CPU"
    vllm = (True, f"Marlin from compute capability 7.5{machete}{cpu}")
    return loads, vllm, (True, "Marlin from 8.0"), (False, _NOT_TENSORRT)


_EQUAL = "unpacked to the model's dtype at the first forward"
_ROUNDS = "unpacked to the model's dtype, inputs rounded"
_NOT_MERGED = "experts do not merge on load"
_NO_KERNEL = "no kernel"
_NOT_TENSORRT = "TensorRT-LLM does not read this scheme"
