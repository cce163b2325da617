"""The compressed-tensors layout, which serving engines run on their own kernels.

Weights keep the names and shapes of the source checkpoint, experts one by one, since servers look for these. Rounding
is torchao's, as in its own layout: only the container differs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import lcm
from typing import TYPE_CHECKING, Any

from loadstone.artifact import TensorInfo
from loadstone.artifact.compressed_tensors import Group, LayerScheme, write_block
from loadstone.artifact.compressed_tensors.layout import row_tile, rows_needed, stored_tensors
from loadstone.artifact.compressed_tensors.merging import merged_sets
from loadstone.artifact.compressed_tensors.scheme import NVFP4
from loadstone.artifact.servers import Runs, where_it_runs
from loadstone.artifact.torchao.flatten import torch_dtype
from loadstone.errors import ArtifactError, UsageError
from loadstone.finalization.encoders.base import Encoding
from loadstone.quantization.model_facts import ModelFacts, Weight
from loadstone.quantization.packing import decode_rows
from loadstone.quantization.quantize import quantize_rows, quantize_weight
from loadstone.quantization.recipe_file import MixedRecipe
from loadstone.quantization.rules import Decision, decide
from loadstone.quantization.schemes import Float8Blocks, Float8WeightOnly, Recipe, Scheme, recipe_for
from loadstone.quantization.serving import float8_blocks, layer_scheme, stored_rows, whole_tensors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PackedEncoding:
    """A weight (out, in) in the compressed-tensors layout, under the name it has in the source checkpoint.

    ``largest_input``: the largest magnitude of the layer's inputs, where the layout stores a scale of them.
    """

    name: str
    scheme: Scheme
    shape: tuple[int, ...]
    dtype: str
    largest_input: float | None = None

    @cached_property
    def layer(self) -> LayerScheme:
        return layer_scheme(self.scheme)

    @cached_property
    def rounding(self) -> Scheme:
        return self.scheme.weight_only

    @cached_property
    def outputs(self) -> tuple[TensorInfo, ...]:
        module = self.name.removesuffix(".weight")
        stored = stored_tensors(self.layer, self.shape[0], self.shape[1], self.dtype)
        return tuple(
            TensorInfo(f"{module}.{suffix}", each.dtype, each.shape, "", 0, each.nbytes)
            for suffix, each in stored.items()
        )

    @property
    def row_multiple(self) -> int:
        return lcm(self.rounding.row_multiple, row_tile(self.layer))

    @property
    def rows_together(self) -> int:
        return self.shape[0] if self.rounding.whole_extremes or not self.row_multiple else 0

    @property
    def temporaries(self) -> int:
        return self.rounding.temporaries

    moves = False
    scales_inputs = False

    @property
    def shares_scale(self) -> bool:
        return self.layer.format == NVFP4

    def encode(
        self, rows: torch.Tensor, first_row: int, extremes: tuple[torch.Tensor, torch.Tensor] | None
    ) -> Iterator[tuple[str, torch.Tensor, int]]:
        if extremes:
            parts = quantize_rows(rows, self.rounding, *extremes)
        elif isinstance(self.rounding, Float8Blocks):
            parts = float8_blocks(rows)
        else:
            parts = _parts(quantize_weight(rows, self.rounding))
        stored = stored_rows(self.layer, parts, torch_dtype(self.dtype), self.name)
        yield from self.placed(stored, first_row, rows.shape[0])
        if first_row == 0:
            for name, tensor in self._whole(parts).items():
                yield name, tensor, 0

    def placed(
        self, stored: dict[str, torch.Tensor], first_row: int, count: int
    ) -> Iterator[tuple[str, torch.Tensor, int]]:
        """Stored tensors of ``count`` rows from ``first_row`` on, by suffix, with their names and byte offsets."""
        for output in self.outputs:
            suffix = output.name.rpartition(".")[2]
            if suffix in stored:
                start, _ = rows_needed(self.layer, suffix, output.shape, first_row, first_row + count)
                yield output.name, stored[suffix], start * (output.nbytes // output.shape[0])

    def with_scheme(self, scheme: Scheme) -> PackedEncoding:
        return replace(self, scheme=scheme)

    def store(self, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = _parts(tensor)
        if "act_pre_scale" in parts:
            raise ArtifactError(f"tensor '{self.name}' scales its inputs, which this layout has no place for")
        stored = stored_rows(self.layer, parts, torch_dtype(self.dtype), self.name)
        module = self.name.removesuffix(".weight")
        return {f"{module}.{suffix}": part for suffix, part in stored.items()} | self._whole(parts)

    def dequantize(self, stored: Mapping[str, torch.Tensor]) -> torch.Tensor:
        parts = {name.rpartition(".")[2]: tensor for name, tensor in stored.items()}
        return decode_rows(self.layer, parts, self.shape[1], torch_dtype(self.dtype))

    def _whole(self, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        shape = (self.shape[0], self.shape[1])
        module = self.name.removesuffix(".weight")
        if self.layer.measures_inputs and self.largest_input is None:
            raise UsageError(f"the inputs of '{module}' have to be measured on text", "Add --calibrate FILE")
        found = whole_tensors(self.layer, parts, shape, torch_dtype(self.dtype), self.largest_input)
        return {f"{module}.{suffix}": tensor for suffix, tensor in found.items()}


def _parts(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts of a torchao tensor by its own names."""
    names = (*tensor.tensor_data_names, *getattr(tensor, "optional_tensor_data_names", ()))  # type: ignore[attr-defined]
    return {name: part for name in names if (part := getattr(tensor, name)) is not None}


class PackedEncoder:
    """The compressed-tensors layout as an output format."""

    kind = "compressed-tensors"
    keeps_names = True

    def encoding(self, name: str, scheme: Scheme, shape: tuple[int, ...], dtype: str) -> PackedEncoding:
        return PackedEncoding(name, scheme, shape, dtype)

    def rounding(self, recipe: Recipe) -> Recipe:
        layer_scheme(recipe.scheme)
        own = isinstance(recipe.scheme.weight_only, Float8Blocks)
        return recipe_for(Float8WeightOnly() if own else recipe.scheme.weight_only)

    def decide(
        self, model: ModelFacts, recipe: Recipe | MixedRecipe, skip: list[str] | None
    ) -> dict[str, Decision]:
        """As `rules.decide`, for what servers can run: experts in any scheme, merged layers in one.

        Raises `UsageError` for a recipe without kernels, for quantized embeddings, and for one that would give layers
        that servers merge different schemes.
        """
        for each in recipe.recipes if isinstance(recipe, MixedRecipe) else (recipe,):
            layer_scheme(each.scheme)
        if isinstance(recipe, MixedRecipe) and recipe.embeddings:
            raise UsageError(
                f"{recipe.file or 'the recipe'}: no server reads quantized embeddings", "Remove embeddings"
            )
        decisions = decide(model, recipe, skip, _experts_misfit)
        return _merged_together(_routers_plain(decisions))

    def header(self, encodings: Mapping[str, Encoding | None]) -> dict[str, str]:
        return {"format": "pt"}

    def config(
        self,
        recipe: Recipe | MixedRecipe,
        skip: list[str] | None,
        decisions: Mapping[str, Decision],
        stored: Mapping[str, Encoding | TensorInfo],
    ) -> dict[str, Any]:
        packed = {
            name.removesuffix(".weight"): each.layer
            for name, each in stored.items()
            if isinstance(each, PackedEncoding)
        }
        plain = {
            name.removesuffix(".weight")
            for name, each in stored.items()
            if isinstance(each, TensorInfo) and name.endswith(".weight") and len(each.shape) == 2
        }
        # Experts that stay plain are one module for servers, whatever its parameters are called.
        plain |= {
            name.rpartition(".")[0]
            for name, each in stored.items()
            if isinstance(each, TensorInfo) and len(each.shape) == 3 and "experts" in name
        }
        # A head that is tied is stored nowhere and is a Linear all the same.
        plain |= {name.removesuffix(".weight") for name, d in decisions.items() if d.linear and not d.scheme}
        tables = {name.removesuffix(".weight") for name, d in decisions.items() if d.table and not d.linear}
        ignore = sorted(plain - tables - packed.keys(), key=_in_order)
        head = {name.removesuffix(".weight") for name, d in decisions.items() if d.table and d.linear}
        return {"quantization_config": write_block(_groups(packed, ignore, head), ignore)}

    def runs(
        self, stored: Mapping[str, Encoding | TensorInfo], config: Mapping[str, Any]
    ) -> tuple[Runs, ...]:
        found = {name: each.layer for name, each in stored.items() if isinstance(each, PackedEncoding)}
        experts = any(".experts." in name for name in found)
        plain = not experts and any(".experts." in name for name in stored)
        return where_it_runs(found.values(), experts, plain, config)


def _experts_misfit(scheme: Scheme, weight: Weight) -> str:
    """Why the experts of a 3-D weight cannot take a scheme one by one; empty when they can."""
    rows, columns = weight.shape[-2:]
    if weight.experts is not None and weight.experts.transposed:
        rows, columns = columns, rows
    # Gate and up are stored apart.
    parts = 2 if weight.name.endswith("gate_up_proj") else 1
    return scheme.misfit(rows // parts, columns)


def _routers_plain(decisions: dict[str, Decision]) -> dict[str, Decision]:
    """Servers compute the router of a layer's experts in the model's dtype, also where it is an ordinary Linear."""
    owners = {name.partition(".experts.")[0] for name in decisions if ".experts." in name}
    changed = {}
    for name, decision in decisions.items():
        owner, _, last = name.removesuffix(".weight").rpartition(".")
        router = decision.linear and last in ("gate", "router") and owner in owners
        changed[name] = replace(decision, scheme=None, reason="router of experts") if router else decision
    return changed


def _merged_together(decisions: dict[str, Decision]) -> dict[str, Decision]:
    """Layers that servers merge, and the experts of one layer, take one scheme or none."""
    modules = {name.removesuffix(".weight"): name for name, d in decisions.items() if d.linear}
    sets = [tuple(modules[m] for m in members) for members in merged_sets(modules)]
    experts: dict[str, list[str]] = {}
    for name, decision in decisions.items():
        if decision.fused:
            experts.setdefault(name.rpartition(".")[0], []).append(name)
    changed = dict(decisions)
    for members in (*sets, *(tuple(names) for names in experts.values() if len(names) > 1)):
        schemes = {changed[name].scheme for name in members}
        if len(schemes) == 1:
            continue
        unfit = next((name for name in members if changed[name].misfit), None)
        if unfit is None:
            raise _split(members, changed)
        for name in members:
            if changed[name].scheme:
                why = f"servers merge it with {unfit.removesuffix('.weight')}: {changed[unfit].reason}"
                changed[name] = replace(changed[name], scheme=None, reason=why, misfit=True)
    return changed


def _split(members: tuple[str, ...], decisions: Mapping[str, Decision]) -> UsageError:
    last = [name.removesuffix(".weight").rpartition(".")[2] for name in members]
    found = ", ".join(
        f"{name.removesuffix('.weight')}: {decisions[name].scheme or decisions[name].reason}"
        for name in members
    )
    return UsageError(
        f"servers merge {', '.join(last)} into one layer, and the recipe gives them different schemes ({found})",
        rf"Name them together: re:.*\.({'|'.join(last)})",
    )


def _groups(packed: Mapping[str, LayerScheme], ignore: Iterable[str], head: set[str]) -> list[Group]:
    """One group a scheme. A single one targets the class Linear, several disjoint sets of names."""
    schemes = list(dict.fromkeys(packed.values()))
    if len(schemes) == 1:
        # Class names do not match the output head of a server.
        names = sorted(head & packed.keys())
        return [Group("group_0", ("Linear", *names), schemes[0])]
    everything = {*packed, *ignore}
    return [
        Group(
            f"group_{number}",
            tuple(_targets([m for m, s in packed.items() if s == scheme], everything)),
            scheme,
        )
        for number, scheme in enumerate(schemes)
    ]


def _targets(modules: list[str], everything: set[str]) -> list[str]:
    """Patterns, anchored at both ends, that match ``modules`` and nothing else of ``everything``.

    Readers differ in which of several matching targets they take, so no module may match two.
    """
    families: dict[tuple[str, ...], list[str]] = {}
    for module in modules:
        families.setdefault(tuple(_NUMBER.split(module)[::2]), []).append(module)
    found = []
    for pieces, members in families.items():
        first = list(dict.fromkeys(_NUMBER.split(module)[1] for module in members if len(pieces) > 1))
        numbers = [rf"({'|'.join(first)})" if len(first) > 1 else "".join(first)]
        numbers += [r"\d+"] * (len(pieces) - 2)
        body = "".join(
            re.escape(piece) + (numbers[at] if at < len(pieces) - 1 else "")
            for at, piece in enumerate(pieces)
        )
        wanted = set(members)
        pattern = re.compile(body + "$")
        if len(members) > 1 and {m for m in everything if pattern.match(m)} == wanted:
            found.append(f"re:{body}$")
        else:
            found += members
    return found


def _in_order(name: str) -> list[tuple[int, int, str]]:
    """Names with their numbers in numeric order."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part
    ]


_NUMBER = re.compile(r"(?<=\.)(\d+)(?=\.)")
