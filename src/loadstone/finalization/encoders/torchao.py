"""torchao's tensors in safetensors, as transformers writes them: several stored tensors a weight, a header entry each,
and torchao's config in ``quantization_config``."""

from __future__ import annotations

import json
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from loadstone.artifact import FlatTensor, TensorInfo
from loadstone.artifact.compressed_tensors.merging import merged_sets
from loadstone.artifact.servers import Runs, torchao_runs
from loadstone.artifact.torchao.checks import rounds_inputs
from loadstone.artifact.torchao.config import chooses_by_module
from loadstone.artifact.torchao.flatten import describe, flatten
from loadstone.artifact.torchao.tensors import part_name
from loadstone.errors import ArtifactError, UsageError
from loadstone.finalization.encoders.base import Encoding, row_offset
from loadstone.quantization.model_facts import ModelFacts
from loadstone.quantization.quantize import (
    dense,
    quantize_rows,
    quantize_weight,
    template,
)
from loadstone.quantization.recipe_file import MixedRecipe
from loadstone.quantization.rules import NOT_CONVERTED, Decision, decide
from loadstone.quantization.schemes import (
    Float8Blocks,
    Recipe,
    Scheme,
)
from loadstone.quantization.torchao_config import to_torchao

if TYPE_CHECKING:
    import torch

# transformers' header entry for a tensor that is not quantized.
_PLAIN = '{"_type": "Tensor"}'


@dataclass(frozen=True)
class TorchaoEncoding:
    """A weight as a torchao tensor. ``metadata``: its entry in the header, as torchao writes it."""

    name: str
    scheme: Scheme
    shape: tuple[int, ...]
    dtype: str
    outputs: tuple[TensorInfo, ...]
    metadata: str

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def row_multiple(self) -> int:
        return self.scheme.row_multiple

    @property
    def rows_together(self) -> int:
        return self.rows if self.scheme.whole_extremes or not self.row_multiple else 0

    @property
    def temporaries(self) -> int:
        return self.scheme.temporaries

    moves = False
    shares_scale = False

    @property
    def scales_inputs(self) -> bool:
        return self.scheme.scales_inputs

    @cached_property
    def _parts(self) -> list[str]:
        """torchao's names of the stored tensors (``qdata``), in the order of ``outputs``."""
        return list(json.loads(self.metadata)["_tensor_data_names"])

    def encode(
        self, rows: torch.Tensor, first_row: int, extremes: tuple[torch.Tensor, torch.Tensor] | None
    ) -> Iterator[tuple[str, torch.Tensor, int]]:
        if extremes:
            parts = quantize_rows(rows, self.scheme, *extremes)
        else:
            tensor = quantize_weight(rows, self.scheme)
            if first_row == 0 and len(self.shape) == 2:
                self._check(tensor)
            parts = {part: getattr(tensor, part) for part in self._parts}
        for output, part in zip(self.outputs, self._parts, strict=True):
            if first_row == 0 or output.numel > 1:
                yield (
                    output.name,
                    parts[part],
                    row_offset(output, first_row, self.rows, self.row_multiple or 1),
                )

    def with_scheme(self, scheme: Scheme) -> TorchaoEncoding:
        return replace(self, scheme=scheme)

    def store(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        _, parts = flatten(self.name, tensor)
        return {o.name: part for o, part in zip(self.outputs, parts.values(), strict=True)}

    def dequantize(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        from loadstone.loading.rebuild import rebuild

        about = json.loads(self.metadata)
        flat = FlatTensor(self.name, about["_type"], about["_data"], {}, self.metadata)
        parts = {part: stored[o.name] for o, part in zip(self.outputs, self._parts, strict=True)}
        return dense(rebuild(flat, parts))

    def _check(self, tensor: torch.Tensor) -> None:
        written = describe(tensor)
        if written != self.metadata:
            raise ArtifactError(
                f"tensor '{self.name}': torchao stored it differently than planned ({written})",
                "Please report this with the versions that `loadstone --version` prints",
            )


class TorchaoEncoder:
    """torchao tensors as made on ``device``: what a GPU packs depends on the card."""

    kind = "torchao"
    keeps_names = False

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._templates: dict[tuple[Scheme, tuple[int, ...], str], FlatTensor] = {}

    def rounding(self, recipe: Recipe) -> Recipe:
        if isinstance(recipe.scheme.weight_only, Float8Blocks):
            raise UsageError(
                f"{recipe}: torchao's layout has no float8 weights in blocks",
                "Add --layout compressed-tensors",
            )
        return recipe

    def decide(
        self, model: ModelFacts, recipe: Recipe | MixedRecipe, skip: list[str] | None
    ) -> dict[str, Decision]:
        return decide(model, recipe, skip)

    def encoding(self, name: str, scheme: Scheme, shape: tuple[int, ...], dtype: str) -> TorchaoEncoding:
        key = (scheme, shape, dtype)
        if key not in self._templates:
            self._templates[key] = template(scheme, shape, dtype, self._device)
        flat = self._templates[key]
        outputs = tuple(info._replace(name=part_name(name, part)) for part, info in flat.parts.items())
        return TorchaoEncoding(name, scheme, shape, dtype, outputs, flat.metadata)

    def header(self, encodings: Mapping[str, Encoding | None]) -> dict[str, str]:
        # The whole set in every shard: stock transformers merges the sets, vLLM reads each alone.
        entries = {
            name: encoding.metadata if isinstance(encoding, TorchaoEncoding) else _PLAIN
            for name, encoding in encodings.items()
        }
        return {"format": "pt", "tensor_names": json.dumps(list(encodings))} | entries

    def config(
        self,
        recipe: Recipe | MixedRecipe,
        skip: list[str] | None,
        decisions: Mapping[str, Decision],
        stored: Mapping[str, Encoding | TensorInfo],
    ) -> dict[str, Any]:
        found: dict[str, Any] = {"quantization_config": quantization_block(recipe, skip, decisions)}
        if any(d.fused and d.scheme and d.scheme.experts_one_by_one for d in decisions.values()):
            # Or transformers would ask for a grouped product, which these tensors do not have.
            found["experts_implementation"] = "eager"
        return found

    def runs(
        self, stored: Mapping[str, Encoding | TensorInfo], config: Mapping[str, Any]
    ) -> tuple[Runs, ...]:
        found = {name: each for name, each in stored.items() if isinstance(each, TorchaoEncoding)}
        modules = {name.removesuffix(".weight"): name in found for name in stored if name.endswith(".weight")}
        written = [json.loads(each.metadata) for each in found.values()]
        return torchao_runs(
            (each["_type"] for each in written),
            any(rounds_inputs(each["_data"]) for each in written),
            chooses_by_module(config["quantization_config"]["quant_type"]["default"]),
            any(len(each.shape) == 3 for each in found.values()),
            any(len({modules[m] for m in members}) > 1 for members in merged_sets(modules)),
        )


def quantization_block(
    recipe: Recipe | MixedRecipe, skip: list[str] | None, decisions: Mapping[str, Decision]
) -> dict[str, Any]:
    """The ``quantization_config`` that transformers itself would write for this recipe.

    One scheme for all weights is torchao's own config of that scheme; several schemes, and fused experts, are its
    `FqnToConfig`, which names every module (experts: parameter).
    """
    modules = {
        name.removesuffix(".weight"): d
        for name, d in decisions.items()
        if d.linear or d.table or (d.fused and d.scheme)
    }
    unquantized = sorted(name for name, d in modules.items() if d.linear and d.scheme is None)
    schemes = list(dict.fromkeys(d.scheme for d in modules.values() if d.scheme))
    tables = any(d.table and d.scheme for d in modules.values())
    fused = any(d.fused for d in modules.values())
    if len(schemes) == 1 and not tables and not fused:
        # By default transformers leaves out just the output head. Where more is left out, all of it must be named.
        named = (
            unquantized
            if skip or any(modules[name].reason != NOT_CONVERTED for name in unquantized)
            else None
        )
        return _block(schemes[0], named)
    mixed = recipe if isinstance(recipe, MixedRecipe) else MixedRecipe(recipe)
    chosen = {name: d.scheme for name, d in modules.items() if d.linear or d.scheme}
    chosen["_default"] = mixed.default.scheme if mixed.default else None
    return _block_by_module(chosen, unquantized, tables)


def _block(scheme: Scheme, unquantized: list[str] | None) -> dict[str, Any]:
    from transformers import TorchAoConfig

    block = TorchAoConfig(to_torchao(scheme), modules_to_not_convert=unquantized).to_dict()
    return dict(json.loads(json.dumps(block)))


def _block_by_module(
    chosen: dict[str, Scheme | None], unquantized: list[str], tables: bool
) -> dict[str, Any]:
    from torchao.quantization import FqnToConfig
    from transformers import TorchAoConfig

    table: OrderedDict[str, Any] = OrderedDict(
        (name, to_torchao(scheme) if scheme else None) for name, scheme in chosen.items()
    )
    with warnings.catch_warnings():
        # `_default` is deprecated, and still what readers use for modules under another name.
        warnings.simplefilter("ignore")
        config = TorchAoConfig(
            FqnToConfig(table), modules_to_not_convert=unquantized, include_input_output_embeddings=tables
        )
        return dict(json.loads(json.dumps(config.to_dict())))
