"""Weights packed for one kind of device, brought to the packing of another: the same integers, scales and zeros."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadstone.artifact import FlatTensor
from loadstone.errors import ArtifactError

if TYPE_CHECKING:
    import torch


def int4_tiles_to_cpu(flat: FlatTensor, parts: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """An int4 weight packed for CUDA's tinygemm kernel, as torchao's tensor for the CPU's own int4 kernel.

    ``parts``: ``qdata`` int32 (out/8, in/128, 32, 4) and ``scale_and_zero`` bfloat16 (in/group, out, 2), both padded.
    ``dtype``: floating type to compute in. Raises `ArtifactError` for a group size that the CPU kernel lacks.
    """
    import torch
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

    out_features, in_features = flat.attributes["shape"]
    group = int(flat.attributes["block_size"][-1])
    if group not in (32, 64, 128) or "act_pre_scale" in parts:
        raise ArtifactError(
            f"tensor '{flat.name}' is packed for CUDA in groups of {group}, which no CPU kernel takes",
            "Use --device cuda, or finalize again with intx4-weight-only",
        )
    values = unpack_int4_tiles(parts["qdata"])[:out_features, :in_features]
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.contiguous(), 1)
    scales = parts["scale_and_zero"][: in_features // group, :out_features].to(dtype).contiguous()
    return Int4OpaqueTensor(packed, scales, [1, group], torch.Size((out_features, in_features)))


def unpack_int4_tiles(tiles: torch.Tensor) -> torch.Tensor:
    """The uint4 values, int32 (out, in), of a weight that `aten::_convert_weight_to_int4pack` packed with 8 k-tiles.

    Layout (aten/src/ATen/native/cuda/int4mm.cu, matrix_to_m16n8k16_Bint4_layout): int32 ``[n/8, k/128, lane, j]`` of
    lane ``t`` holds row ``8 n + t/4``; its eight nibbles, lowest first, are columns ``2 (t%4) + c`` of k-tiles ``2j``
    and ``2j+1`` for c = 0, 8, 16, 24 (even), then 1, 9, 17, 25 (odd), where 16 starts the second k-tile.
    """
    import torch

    n_tiles, k_tiles, lanes, pairs = tiles.shape
    device = tiles.device
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=device)
    nibbles = (tiles.unsqueeze(-1) >> shifts) & 0xF
    lane = torch.arange(lanes)
    row = (lane // 4)[:, None, None]
    offset = torch.tensor([0, 8, 16, 24, 1, 9, 17, 25])
    column = 2 * (lane % 4)[:, None, None] + 32 * torch.arange(pairs)[None, :, None] + offset
    width = 32 * pairs
    place = (row * width + column).reshape(-1)
    block = torch.empty(n_tiles, k_tiles, 8 * width, dtype=torch.int32, device=device)
    block[:, :, place.to(device)] = nibbles.reshape(n_tiles, k_tiles, -1).to(torch.int32)
    return block.reshape(n_tiles, k_tiles, 8, width).permute(0, 2, 1, 3).reshape(n_tiles * 8, k_tiles * width)
