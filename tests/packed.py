"""Small models in the formats of other quantizers, and what each value of them is by the published layout."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

SIZES: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False, "initializer_range": 0.1,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
EXPERTS = {**SIZES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "head_dim": 64}
Tensors = dict[str, torch.Tensor]
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def save_model(family: str, directory: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A random plain model: llama, qwen3-moe, mixtral or deepseek-v3 (with a layer for multi-token prediction)."""
    import transformers

    torch.manual_seed(0)
    if family == "deepseek-v3":
        config: Any = transformers.DeepseekV3Config(
            **SIZES, moe_intermediate_size=128, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
            first_k_dense_replace=1, q_lora_rank=128, kv_lora_rank=160, qk_rope_head_dim=32, qk_nope_head_dim=32,
            v_head_dim=64, num_nextn_predict_layers=1,
        )  # fmt: skip
        model: Any = transformers.DeepseekV3ForCausalLM(config)
    elif family == "qwen3-moe":
        model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**EXPERTS))
    elif family == "mixtral":
        config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
        model = transformers.MixtralForCausalLM(config)
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    model.to(dtype).save_pretrained(directory)
    return directory


def write_recorded(directory: Path, tensors: dict[str, Any], block: dict[str, Any]) -> Path:
    """A directory of recorded tensors (name: dtype, shape, base64) with a ``quantization_config``."""
    found = {
        name: torch.frombuffer(bytearray(base64.b64decode(text)), dtype=getattr(torch, dtype)).view(shape)
        for name, (dtype, shape, text) in tensors.items()
    }
    save_file(found, directory / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    return directory


def recorded(tensors: Tensors) -> dict[str, Any]:
    """Tensors as `write_recorded` takes them."""
    return {
        name: [
            str(tensor.dtype).removeprefix("torch."),
            list(tensor.shape),
            base64.b64encode(_bytes(tensor)).decode(),
        ]
        for name, tensor in tensors.items()
    }


def float16_llama(directory: Path, hidden: int, intermediate: int) -> Path:
    """A Llama of one layer with a tokenizer, which other packages quantize."""
    from tests.small_models import make_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False, initializer_range=0.1,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(directory)
    make_tokenizer(vocabulary=300).save_pretrained(directory)
    return directory


def digest(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's bytes."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def rewrite(
    source: Path, out: Path, block: dict[str, Any], edit: Callable[[str, torch.Tensor], Tensors]
) -> Path:
    """The model with each weight of a Linear stored as ``edit`` says, and ``block`` in its config."""
    out.mkdir(parents=True)
    tensors: Tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            linear = tensor.dim() == 2 and ("proj" in name or ".experts." in name)
            tensors |= edit(name, tensor) if linear else {name: tensor}
    save_file(
        {n: t.contiguous() for n, t in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"}
    )
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": block}))
    return out


def change(directory: Path, edit: Callable[[Tensors], Any]) -> Path:
    """Change the stored tensors of a directory in place."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def fp8(source: Path, out: Path, sizes: tuple[int, int] | None = (128, 128)) -> Path:
    """By transformers' own quantizer."""
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    settings = FineGrainedFP8Config(weight_block_size=sizes)
    quantizer = Fp8Quantize(SimpleNamespace(quantization_config=settings))

    def edit(name: str, tensor: torch.Tensor) -> Tensors:
        rows, columns = tensor.shape
        if sizes and (rows % sizes[0] or columns % sizes[1]):
            return _ragged_fp8(name, tensor, sizes)
        return dict(quantizer._quantize_one(name, tensor))

    block = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": sizes and list(sizes),
    }
    return rewrite(source, out, block, edit)


def _ragged_fp8(name: str, tensor: torch.Tensor, sizes: tuple[int, int]) -> Tensors:
    """Blocks that end with the matrix, as DeepSeek-V3's kv_a_proj_with_mqa has them."""
    rows, columns = tensor.shape
    grid = torch.empty(-(-rows // sizes[0]), -(-columns // sizes[1]))
    values = torch.empty(tensor.shape, dtype=torch.float8_e4m3fn)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            at = slice(i * sizes[0], (i + 1) * sizes[0]), slice(j * sizes[1], (j + 1) * sizes[1])
            grid[i, j] = tensor[at].abs().max().float() / 448
            values[at] = (tensor[at].float() / grid[i, j]).to(torch.float8_e4m3fn)
    return {name: values, name.replace(".weight", ".weight_scale_inv"): grid}


def ragged_values(tensors: Tensors, name: str, sizes: tuple[int, int]) -> torch.Tensor:
    """What such a weight stands for, block by block."""
    values, grid = tensors[name].float(), tensors[name.replace(".weight", ".weight_scale_inv")]
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            values[i * sizes[0] : (i + 1) * sizes[0], j * sizes[1] : (j + 1) * sizes[1]] *= grid[i, j]
    return values


def mxfp8(source: Path, out: Path) -> Path:
    """float8 with a power of two, as a byte, for each 32 values of a row."""

    def edit(name: str, tensor: torch.Tensor) -> Tensors:
        groups = tensor.float().unflatten(1, (-1, 32))
        exponents = (groups.abs().amax(-1) / 448).log2().ceil()
        values = (groups / exponents.exp2().unsqueeze(-1)).flatten(1).to(torch.float8_e4m3fn)
        return {name: values, f"{name}_scale_inv": (exponents + 127).to(torch.uint8)}

    return rewrite(source, out, {"quant_method": "mxfp8", "weight_block_size": [1, 32]}, edit)


def fp8_rows(source: Path, out: Path, method: str = "fbgemm_fp8") -> Path:
    """A scale for each row (``fbgemm_fp8``), or one for the tensor and one for its inputs (``modelopt``)."""
    whole = method == "modelopt"

    def edit(name: str, tensor: torch.Tensor) -> Tensors:
        largest = tensor.abs().max() if whole else tensor.abs().amax(1, keepdim=True)
        scale = largest.float() / 448
        module = name.removesuffix(".weight")
        found = {name: (tensor.float() / scale).to(torch.float8_e4m3fn), f"{module}.weight_scale": scale}
        return found | ({f"{module}.input_scale": torch.tensor(0.5)} if whole else {})

    return rewrite(source, out, {"quant_method": method, "quant_algo": "FP8"}, edit)


def nvfp4(source: Path, out: Path) -> Path:
    """ModelOpt's NVFP4: e2m1 in groups of 16 with float8 scales, and one float32 scale."""
    codes = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])

    def edit(name: str, tensor: torch.Tensor) -> Tensors:
        module, groups = name.removesuffix(".weight"), tensor.float().unflatten(1, (-1, 16))
        whole = tensor.abs().max().float() / (6 * 448)
        scale = (groups.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
        scaled = groups / (scale.float() * whole).unsqueeze(-1)
        index = (scaled.abs().unsqueeze(-1) - codes).abs().argmin(-1) | ((scaled < 0).long() << 3)
        index = index.flatten(1).to(torch.uint8)
        return {
            name: index[:, 0::2] | index[:, 1::2] << 4,
            f"{module}.weight_scale": scale,
            f"{module}.weight_scale_2": whole,
            f"{module}.input_scale": torch.tensor(0.5),
        }

    return rewrite(source, out, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, edit)


def nvfp4_values(tensors: Tensors, name: str) -> torch.Tensor:
    """What an NVFP4 weight of ModelOpt's stands for, in float32."""
    module, packed = name.removesuffix(".weight"), tensors[name]
    numbers = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = torch.stack((numbers[(packed & 15).long()], numbers[(packed >> 4).long()]), -1).flatten(1)
    scale = tensors[f"{module}.weight_scale"].float() * tensors[f"{module}.weight_scale_2"]
    return values * scale.repeat_interleave(16, 1)


def gptq(
    source: Path, out: Path, *, bits: int = 4, sym: bool = True, desc_act: bool = False, group: int = 64,
    version: str = "gptq",
) -> Path:  # fmt: skip
    """By the layout that AutoGPTQ published: words along the inputs, zero points less one."""
    generator = torch.Generator().manual_seed(1)

    def edit(name: str, tensor: torch.Tensor) -> Tensors:
        columns = tensor.shape[1]
        module, size = name.removesuffix(".weight"), columns if group < 0 else group
        order = torch.arange(columns) // size
        if desc_act:
            order = order[torch.randperm(columns, generator=generator)]
        values, scale, zeros = _integers(tensor, order, bits, sym)
        stored = zeros - 1 if version == "gptq" else zeros
        return {
            f"{module}.qweight": _words(values.t(), bits, along=0),
            f"{module}.qzeros": _words(stored, bits, along=1),
            f"{module}.scales": scale,
            f"{module}.g_idx": order.to(torch.int32),
        }

    block = {
        "quant_method": "gptq", "bits": bits, "group_size": group, "sym": sym, "desc_act": desc_act,
        "checkpoint_format": version,
    }  # fmt: skip
    return rewrite(source, out, block, edit)


def nf4(source: Path, out: Path, *, double: bool = True) -> Path:
    """bitsandbytes' NF4 in blocks of 64, with factors that are quantized in turn (``double``), or floats."""
    numbers = torch.tensor(NF4)

    def edit(name: str, tensor: torch.Tensor) -> Tensors:
        blocks = tensor.float().reshape(-1, 64)
        largest = blocks.abs().amax(1)
        codes = (
            ((blocks / largest[:, None]).unsqueeze(-1) - numbers).abs().argmin(-1).flatten().to(torch.uint8)
        )
        state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(tensor.shape)}
        found = {name: (codes[0::2] << 4 | codes[1::2])[:, None], f"{name}.quant_map": numbers.clone()}
        if double:
            offset = largest.mean()
            groups = torch.arange(len(largest)) // 256
            nested = torch.stack(
                [(largest[groups == g] - offset).abs().max() for g in range(int(groups.max()) + 1)]
            )
            places = ((largest - offset) / nested[groups] * 127 + 128).round().to(torch.uint8)
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset.item()}
            found |= {
                f"{name}.absmax": places,
                f"{name}.nested_absmax": nested,
                f"{name}.nested_quant_map": (torch.arange(256) - 128) / 127,
            }
        else:
            found[f"{name}.absmax"] = largest
        raw = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return found | {f"{name}.quant_state.bitsandbytes__nf4": raw}

    return rewrite(source, out, {"quant_method": "bitsandbytes", "load_in_4bit": True}, edit)


def nf4_values(tensors: Tensors, name: str) -> torch.Tensor:
    """What an NF4 weight stands for, in bfloat16."""
    state = json.loads(bytes(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
    values, factors = tensors[name].flatten().long(), tensors[f"{name}.absmax"]
    if factors.dtype == torch.uint8:
        nested = tensors[f"{name}.nested_absmax"].repeat_interleave(256)[: len(factors)]
        factors = tensors[f"{name}.nested_quant_map"][factors.long()] * nested + torch.tensor(
            state["nested_offset"]
        )
    numbers = torch.tensor(NF4)[torch.stack((values >> 4, values & 15), 1).flatten()]
    return (numbers * factors.repeat_interleave(64)).view(state["shape"]).bfloat16()


def llm_int8(source: Path, out: Path) -> Path:
    """bitsandbytes' int8 with the largest magnitude of each row."""

    def edit(name: str, tensor: torch.Tensor) -> Tensors:
        module, largest = name.removesuffix(".weight"), tensor.float().abs().amax(1)
        return {
            name: (tensor.float() * (127 / largest[:, None])).round().to(torch.int8),
            f"{module}.SCB": largest,
            f"{module}.weight_format": torch.tensor(0, dtype=torch.uint8),
        }

    return rewrite(source, out, {"quant_method": "bitsandbytes", "load_in_8bit": True}, edit)


def auto_round(source: Path, out: Path) -> Path:
    """auto-round's own format with the bytes of GPTQ: 4 bits, and 8 in the last down_proj, which the block names."""
    gptq(source, out)
    layer = "model.layers.1.mlp.down_proj"
    eight = gptq(source, out.with_name(f"{out.name}-8"), bits=8)
    other = {n: t for n, t in load_file(eight / "model.safetensors").items() if n.startswith(layer)}
    change(out, lambda tensors: tensors.update(other))
    shutil.rmtree(eight)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "data_type": "int", "bits": 4,
        "group_size": 64, "sym": True, "extra_config": {layer: {"bits": 8}, "lm_head": {"bits": 16}},
    }  # fmt: skip
    (out / "config.json").write_text(json.dumps(config))
    return out


def awq(source: Path, out: Path, group: int = 64) -> Path:
    """By the layout that AutoAWQ published (gemm): words along the outputs, eight neighbours in its own order."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def edit(name: str, tensor: torch.Tensor) -> Tensors:
        columns, module = tensor.shape[1], name.removesuffix(".weight")
        values, scale, zeros = _integers(tensor, torch.arange(columns) // group, 4, False)
        places = torch.tensor([8 * (i // 8) + order[i % 8] for i in range(values.shape[0])])
        return {
            f"{module}.qweight": _words(values.t()[:, places], 4, along=1),
            f"{module}.qzeros": _words(zeros[:, places], 4, along=1),
            f"{module}.scales": scale,
        }

    block = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return rewrite(source, out, block, edit)


def _integers(
    tensor: torch.Tensor, order: torch.Tensor, bits: int, sym: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values (out, in), scales (groups, out) in float16 and zero points (groups, out)."""
    largest, groups = (1 << bits) - 1, int(order.max()) + 1
    scale = torch.empty(groups, tensor.shape[0], dtype=torch.float16)
    zeros = torch.empty(groups, tensor.shape[0], dtype=torch.int64)
    values = torch.empty(tensor.shape, dtype=torch.int64)
    for number in range(groups):
        part = tensor[:, order == number].float()
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if sym:
            high = torch.maximum(high, -low)
            low = -high
        scale[number] = ((high - low) / largest).half()
        step = scale[number].float()
        zeros[number] = (largest + 1) // 2 if sym else (-low / step).round().clamp(0, largest).long()
        rounded = (part / step[:, None]).round().long() + zeros[number][:, None]
        values[:, order == number] = rounded.clamp(0, largest)
    return values, scale, zeros


def _words(values: torch.Tensor, bits: int, along: int) -> torch.Tensor:
    """int32 words of whole numbers side by side ``along`` a dimension, the first in the lowest bits."""
    values = values if along == 1 else values.t()
    words = torch.zeros(values.shape[0], -(-values.shape[1] * bits // 32), dtype=torch.int64)
    for i in range(values.shape[1]):
        for bit in range(bits):
            at = i * bits + bit
            words[:, at // 32] |= ((values[:, i] >> bit) & 1) << (at % 32)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
    return words if along == 1 else words.t()


def _unpacked(words: torch.Tensor, bits: int, along: int) -> torch.Tensor:
    words = (words if along == 1 else words.t()).long() & 0xFFFFFFFF
    columns = [
        sum(((words[:, (i * bits + b) // 32] >> ((i * bits + b) % 32)) & 1) << b for b in range(bits))
        for i in range(words.shape[1] * 32 // bits)
    ]
    values = torch.stack(columns, 1)  # type: ignore[arg-type]
    return values if along == 1 else values.t()


def integer_values(tensors: Tensors, name: str, block: dict[str, Any]) -> torch.Tensor:
    """What a GPTQ or AWQ weight stands for, in float16: bit by bit, as the layouts are published."""
    module, bits = name.removesuffix(".weight"), block["bits"]
    scale = tensors[f"{module}.scales"]
    if block["quant_method"] == "awq":
        nibble = [0, 4, 1, 5, 2, 6, 3, 7]
        places = torch.tensor([8 * (i // 8) + nibble[i % 8] for i in range(scale.shape[1])])
        values = _unpacked(tensors[f"{module}.qweight"], 4, 1)[:, places]
        zeros = _unpacked(tensors[f"{module}.qzeros"], 4, 1)[:, places]
        order = torch.arange(len(values)) // block["group_size"]
    else:
        values = _unpacked(tensors[f"{module}.qweight"], bits, 0)
        zeros = _unpacked(tensors[f"{module}.qzeros"], bits, 1)[:, : scale.shape[1]]
        zeros = (zeros + (block["checkpoint_format"] == "gptq")) % (1 << bits)
        order = tensors[f"{module}.g_idx"].long()
    return ((values - zeros[order]).half() * scale[order]).t()


def mxfp4(out: Path, experts: int = 3) -> Path:
    """A tiny gpt-oss with random blocks and scales, as its files are published."""
    import transformers

    config = transformers.GptOssConfig(
        **{**SIZES, "hidden_size": 64, "intermediate_size": 96}, num_local_experts=experts, num_experts_per_tok=2,
        head_dim=16, layer_types=["full_attention", "full_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(out)

    def edit(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            _, columns, rows = tensors.pop(name).shape
            blocks = (experts, rows, columns // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*blocks, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(118, 124, blocks, dtype=torch.uint8)

    change(out, edit)
    text = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(text | {"quantization_config": {"quant_method": "mxfp4"}}))
    return out


def deepseek_v4(out: Path, experts: str) -> Path:
    """A tiny DeepSeek-V4 under its published names: float8 in square blocks with powers of two as scales, and experts
    in fp4 (two e2m1 values an int8), mxfp8 or fp8."""
    import transformers

    config = transformers.DeepseekV4Config(
        vocab_size=320, hidden_size=128, moe_intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        head_dim=64, q_lora_rank=128, num_experts_per_tok=2, n_routed_experts=2, max_position_embeddings=256,
        layer_types=["sliding_attention", "compressed_sparse_attention"], mlp_layer_types=["hash_moe", "moe"],
        o_groups=2, o_lora_rank=64, index_n_heads=2, index_head_dim=32, index_topk=4, sliding_window=16,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.DeepseekV4ForCausalLM(config).to(torch.bfloat16).save_pretrained(out / "plain")
    numbers = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])

    def edit(name: str, tensor: torch.Tensor) -> Tensors:
        kind = experts if ".experts." in name else "fp8"
        if kind == "fp8" and (tensor.shape[0] % 128 or tensor.shape[1] % 128):
            return {name: tensor}
        high, wide = (128, 128) if kind == "fp8" else (1, 32)
        blocks = tensor.float().unflatten(1, (-1, wide)).unflatten(0, (-1, high))
        scale = (blocks.abs().amax((1, 3)) / (6 if kind == "fp4" else 448)).log2().ceil().exp2()
        values = (blocks / scale[:, None, :, None]).reshape(tensor.shape)
        stored = values.to(torch.float8_e4m3fn)
        if kind == "fp4":
            codes = (values.unsqueeze(-1) - numbers).abs().argmin(-1).to(torch.uint8)
            stored = (codes[:, 0::2] | codes[:, 1::2] << 4).view(torch.int8)
        return {name: stored, name.replace(".weight", ".scale"): scale.to(torch.float8_e8m0fnu)}

    def linear(name: str, tensor: torch.Tensor) -> Tensors:
        quantized = (
            re.search(r"\.(wq_a|wq_b|wkv|wo_a|wo_b|w[123])\.weight$", name) and "compressor" not in name
        )
        return edit(name, tensor) if quantized else {name: tensor}

    tensors: Tensors = {}
    for name, tensor in load_file(out / "plain" / "model.safetensors").items():
        name = name.removeprefix("model.").replace("embed_tokens.", "embed.").replace("lm_head.", "head.")
        tensors |= linear(name.replace("hc_head.hc_", "hc_head_"), tensor)
    (out / "packed").mkdir()
    save_file(
        {n: t.contiguous() for n, t in tensors.items()},
        out / "packed" / "model.safetensors",
        {"format": "pt"},
    )
    found = json.loads((out / "plain" / "config.json").read_text())
    block = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    found |= {"quantization_config": block} | ({"expert_dtype": "fp4"} if experts == "fp4" else {})
    (out / "packed" / "config.json").write_text(json.dumps(found))
    return out / "packed"
