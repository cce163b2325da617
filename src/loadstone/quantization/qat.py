"""Quantization-aware training: prepare a model with torchao's fake quantization, record the recipe with its checkpoint.

A checkpoint that was trained under fake quantization fits one recipe only, and its weights do not say which. So the
recipe goes into config.json under `QAT_KEY`, where `finalize` finds it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loadstone.artifact import Artifact
from loadstone.artifact.detect import CONFIG, QAT, QAT_KEY
from loadstone.artifact.files import read_json
from loadstone.errors import ArtifactError, UsageError
from loadstone.quantization.recipe_file import MixedRecipe
from loadstone.quantization.schemes import RECIPES, Recipe, parse_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_qat(recipe: Recipe | MixedRecipe) -> Recipe:
    """Return the recipe; raises `UsageError` naming the recipes that can be trained when this one cannot."""
    if isinstance(recipe, MixedRecipe) or not recipe.scheme.trains_exactly:
        able = ", ".join(r.name for r in RECIPES.values() if r.scheme.trains_exactly)
        raise UsageError(
            f"torchao has no fake quantization that converts exactly to '{recipe}'",
            f"Train with one of {able} (mapping=symmetric, rounding=affine)",
        )
    return recipe


def prepare(model: PreTrainedModel, recipe: Recipe | str) -> PreTrainedModel:
    """Put fake quantization into the Linears that ``finalize`` will quantize; trains as before. Returns the model.

    Raises `UsageError` for a recipe without exact fake quantization.
    """
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    from loadstone.quantization.model_facts import facts_of
    from loadstone.quantization.rules import decide
    from loadstone.quantization.torchao_config import to_torchao

    recipe = check_qat(parse_recipe(recipe) if isinstance(recipe, str) else recipe)
    chosen = {name.removesuffix(".weight") for name, d in decide(facts_of(model), recipe).items() if d.scheme}
    quantize_(
        model,
        QATConfig(to_torchao(recipe.scheme), step="prepare"),
        filter_fn=lambda module, name: name in chosen,
    )
    return model


def record(target: str | Path | Any, recipe: Recipe | str) -> None:
    """Record the recipe: in a checkpoint directory's config.json, or in a transformers config before saving.

    With ``model.config`` every checkpoint that a Trainer saves afterwards carries the record. Raises `UsageError` for a
    recipe without exact fake quantization and a directory without config.json, `ArtifactError` for one that is damaged.
    """
    recipe = check_qat(parse_recipe(recipe) if isinstance(recipe, str) else recipe)
    entry = {"recipe": str(recipe)}
    if not isinstance(target, str | Path):
        setattr(target, QAT_KEY, entry)
        return
    file = Path(target) / CONFIG
    if not file.is_file():
        raise UsageError(f"'{target}' has no {CONFIG}", "Save the model there first")
    config = read_json(file) | {QAT_KEY: entry}
    work = file.with_name(f".{CONFIG}.partial")
    try:
        # A new file: whatever lies there is not followed.
        with work.open("x", encoding="utf-8") as opened:
            opened.write(json.dumps(config, indent=2) + "\n")
    except FileExistsError:
        raise UsageError(f"'{work}' is in the way of a new {CONFIG}", "Remove it") from None
    work.replace(file)


def recorded_recipe(artifact: Artifact, asked: Recipe | MixedRecipe | None) -> Recipe | MixedRecipe | None:
    """The recipe to finalize with: ``asked``, unless the checkpoint records that it was trained for one.

    Raises `UsageError` when both are there and differ, `ArtifactError` for a record that cannot be read.
    """
    if artifact.kind != QAT:
        return asked
    entry = artifact.config.get(QAT_KEY)
    text = entry.get("recipe") if isinstance(entry, dict) else None
    try:
        if not isinstance(text, str):
            raise UsageError("there is no recipe in it")
        trained = check_qat(parse_recipe(text))
    except UsageError as error:
        raise ArtifactError(
            f"{artifact.config_dir / CONFIG}: the recipe recorded under {QAT_KEY} cannot be used ({error.message})",
            f"Correct it, or remove {QAT_KEY} to finalize as a plain checkpoint",
        ) from None
    if asked is not None and str(asked) != str(trained):
        raise UsageError(
            f"the checkpoint was trained for '{trained}', and '{asked}' is asked for",
            f"Leave the flag out, or remove {QAT_KEY} from {artifact.config_dir / CONFIG}",
        )
    return trained
