"""What an export will do, decided before any tensor is read: which tensor is folded, how, and into which
file."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from loadstone.artifact import TensorInfo
from loadstone.errors import ArtifactError, UsageError
from loadstone.fakequant.encoder import FakeQuantEncoding
from loadstone.fakequant.formats import Format
from loadstone.fakequant.formats.spec import Own
from loadstone.fakequant.rules import Decision, Role, RuleSet, decide
from loadstone.finalization.plan import Step
from loadstone.loading.model_class import untied as set_untied
from loadstone.writing.index import in_shards, shard_name


@dataclass(frozen=True)
class ExportPlan:
    """All of an export as data. ``shards``: the steps of each output file; ``decisions`` and ``roles``: of each output
    tensor; ``aliases``: stored names that become one tensor with another; ``untied``: names that become tensors of
    their own."""

    rules: RuleSet
    shards: tuple[tuple[Step, ...], ...]
    decisions: dict[str, Decision] = field(repr=False)
    roles: dict[str, Role] = field(repr=False)
    aliases: dict[str, str]
    untied: tuple[str, ...]
    config: dict[str, Any] = field(repr=False)

    @property
    def steps(self) -> list[Step]:
        """All steps, in name order."""
        return sorted((step for shard in self.shards for step in shard), key=lambda step: step.name)

    @property
    def files(self) -> dict[str, str]:
        """The output file of each tensor.

        A single file is named as a shard too: with an index beside it, no reader takes the quantizer state for weights,
        as vLLM would that globs a directory without one.
        """
        names = [shard_name(number, len(self.shards)) for number in range(len(self.shards))]
        return {step.name: name for name, shard in zip(names, self.shards, strict=True) for step in shard}

    @property
    def nbytes(self) -> int:
        return sum(step.nbytes for shard in self.shards for step in shard)

    @property
    def folded(self) -> list[Step]:
        return [step for step in self.steps if self.format(step) is not None]

    def format(self, step: Step) -> Format | None:
        """What a tensor is rounded to; None: it stays as it is."""
        return self.decisions[step.name].format

    @property
    def summary(self) -> list[tuple[str, int, int]]:
        """(format or the reason for none, tensors, bytes), largest first."""
        counts: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for step in self.steps:
            decision = self.decisions[step.name]
            what = str(decision.format) if decision.format else f"as it is: {decision.reason}"
            counts[what] += 1
            sizes[what] += step.nbytes
        return [(what, counts[what], size) for what, size in sizes.most_common()]


def make_plan(
    rules: RuleSet,
    infos: dict[str, TensorInfo],
    files: dict[str, str],
    roles: dict[str, Role],
    ties: dict[str, str],
    config: dict[str, Any],
    *,
    untie: bool = False,
    infinite: frozenset[str] = frozenset(),
) -> ExportPlan:
    """``infos``: each source tensor; ``files``: which go into one output file, by any name of it. ``ties``: name -> the
    stored name it is one tensor with; such a name may itself be stored (then it becomes an alias) or not. ``infinite``:
    buffers that the model makes infinite itself.

    Raises `UsageError` for a rule that decides nothing and for a tie that the rules fold on one side only,
    `ArtifactError` when nothing at all would be folded, and for a weight whose shape its rule's format cannot take.
    """
    sides = {target: source for target, source in ties.items() if source in infos}
    both = {k: (roles[k], infos[k].shape) for k in infos}
    # The target of a tie is judged by its own name: a rule may name the head of a tied model.
    for target, source in sides.items():
        role = roles.get(target) or Role(False, "output head", inputs=True)
        both[target] = (role, infos[source].shape)
    decisions = decide(rules, dict(sorted(both.items())))
    sources = {name: name for name in infos if name not in sides}
    for target, source in sides.items():
        if decisions[target].format == decisions[source].format:
            continue
        if not untie:
            one, other = (target, source) if decisions[target].format else (source, target)
            raise UsageError(
                f"'{one}' would be folded and '{other}', which is the same tensor, not ({rules})",
                "Give both one format by rules, or pass --untie to store two tensors",
            )
        sources[target] = target if target in infos else source
    untied = tuple(target for target in sides if target in sources)
    if not any(decisions[name].format for name in sources):
        matrices = [name for name in sources if both[name][0].matrix]
        reasons = Counter(decisions[name].reason for name in matrices or sources)
        raise ArtifactError(
            f"no weight of this model can be folded by {rules} ({reasons.most_common(1)[0][0]})",
            "Name weights by --rules" if matrices else "It holds no matrix that a format could round",
        )
    if untied:
        config = set_untied(config)
    shards: dict[str, list[Step]] = {}
    for name, stored in sorted(sources.items()):
        step = _step(name, infos[stored], decisions[name], both[name][0], stored in infinite)
        shards.setdefault(files[stored], []).append(step)
    return ExportPlan(
        rules,
        tuple(tuple(shards[file]) for file in sorted(shards)),
        {name: decisions[name] for name in sources},
        {name: both[name][0] for name in sources},
        {t: s for t, s in sides.items() if t in infos and t not in untied},
        untied,
        config,
    )


def _step(name: str, source: TensorInfo, decision: Decision, role: Role, infinite: bool) -> Step:
    output = source._replace(name=name)
    encoding = None
    if decision.format and not isinstance(decision.format.weight, Own):
        encoding = FakeQuantEncoding(output, decision.format, role.transposed)
    return Step((source,), name, (output,), encoding, decision.reason, infinite=infinite)


def files_of(infos: dict[str, TensorInfo], max_bytes: int) -> dict[str, str]:
    """The output file of each tensor of a source that has no division of its own: filled in name order."""
    shards = in_shards([info for _, info in sorted(infos.items())], max_bytes)
    return {info.name: f"{number:05d}" for number, shard in enumerate(shards) for info in shard}
