"""What an export will do, decided before any tensor is read: which tensor is folded, how, and into which
file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from loadstone.artifact import TensorInfo
from loadstone.errors import ArtifactError, UsageError
from loadstone.fakequant.formats import Format
from loadstone.fakequant.rules import Decision, Role, RuleSet, decide
from loadstone.writing.index import in_shards, shard_name


@dataclass(frozen=True)
class Step:
    """One output tensor. ``source``: the key it is read by; ``output``: its name, dtype, shape, size and
    file."""

    source: str
    output: TensorInfo
    decision: Decision
    role: Role

    @property
    def name(self) -> str:
        return self.output.name

    @property
    def format(self) -> Format | None:
        return self.decision.format


@dataclass(frozen=True)
class ExportPlan:
    """All of an export as data. ``aliases``: stored names that become one tensor with another; ``untied``:
    names that become tensors of their own."""

    rules: RuleSet
    steps: tuple[Step, ...]
    aliases: dict[str, str]
    untied: tuple[str, ...]
    config: dict[str, Any] = field(repr=False)

    @property
    def files(self) -> dict[str, list[TensorInfo]]:
        """The tensors of each output file."""
        found: dict[str, list[TensorInfo]] = {}
        for step in self.steps:
            found.setdefault(step.output.file, []).append(step.output)
        return found

    @property
    def nbytes(self) -> int:
        return sum(step.output.nbytes for step in self.steps)

    @property
    def folded(self) -> list[Step]:
        return [step for step in self.steps if step.format is not None]

    @property
    def summary(self) -> list[tuple[str, int, int]]:
        """(format or the reason for none, tensors, bytes), largest first."""
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for step in self.steps:
            what = str(step.format) if step.format else f"as it is: {step.decision.reason}"
            counts[what] += 1
            sizes[what] += step.output.nbytes
        return [(what, counts[what], size) for what, size in sizes.most_common()]


def make_plan(
    rules: RuleSet,
    infos: dict[str, TensorInfo],
    roles: dict[str, Role],
    ties: dict[str, str],
    config: dict[str, Any],
    *,
    untie: bool = False,
) -> ExportPlan:
    """``infos``: each tensor with the file it goes to. ``ties``: name -> the stored name it is one tensor
    with; such a name may itself be stored (then it becomes an alias) or not.

    Raises `UsageError` for a rule that decides nothing and for a tie that the rules fold on one side only,
    `ArtifactError` when nothing at all would be folded.
    """
    sides = {target: source for target, source in ties.items() if source in infos}
    both = {k: (roles[k], infos[k].shape) for k in infos}
    # The target of a tie is judged by its own name: a rule may name the head of a tied model.
    for target, source in sides.items():
        role = roles.get(target) or Role(False, "output head", inputs=True)
        both[target] = (role, infos[source].shape)
    decisions = decide(rules, dict(sorted(both.items())))
    steps: dict[str, Step] = {
        k: Step(k, i, decisions[k], roles[k]) for k, i in infos.items() if k not in sides
    }
    untied = []
    for target, source in sides.items():
        if decisions[target].format == decisions[source].format:
            continue
        if not untie:
            one, other = (target, source) if decisions[target].format else (source, target)
            raise UsageError(
                f"'{one}' would be folded and '{other}', which is the same tensor, not ({rules})",
                "Give both one format by rules, or pass --untie to store two tensors",
            )
        stored = target if target in infos else source
        output = infos[stored]._replace(name=target)
        steps[target] = Step(stored, output, decisions[target], both[target][0])
        untied.append(target)
    if not any(step.format for step in steps.values()):
        raise ArtifactError(f"no weight of this model can be folded by {rules}", "Name weights by --rules")
    aliases = {t: s for t, s in sides.items() if t in infos and t not in untied}
    if untied:
        config = _set_untied(config)
    return ExportPlan(rules, _numbered([steps[k] for k in sorted(steps)]), aliases, tuple(untied), config)


def _numbered(steps: list[Step]) -> tuple[Step, ...]:
    """The steps with files counted anew: one that held aliases only is not written."""
    files = sorted({step.output.file for step in steps})
    names = {file: shard_name(number, len(files)) for number, file in enumerate(files)}
    return tuple(replace(step, output=step.output._replace(file=names[step.output.file])) for step in steps)


def _set_untied(config: dict[str, Any]) -> dict[str, Any]:
    changed = config | {"tie_word_embeddings": False}
    for key, value in config.items():
        if isinstance(value, dict) and value.get("tie_word_embeddings"):
            changed[key] = value | {"tie_word_embeddings": False}
    return changed


def with_files(infos: dict[str, TensorInfo], max_bytes: int) -> dict[str, TensorInfo]:
    """The same tensors with the file that each goes to, in name order.

    A single file is named as a shard too: with an index beside it, no reader takes the quantizer state for weights, as
    vLLM would that globs a directory without one.
    """
    shards = in_shards([info for _, info in sorted(infos.items())], max_bytes)
    return {
        info.name: info._replace(file=shard_name(number, len(shards)))
        for number, shard in enumerate(shards)
        for info in shard
    }
