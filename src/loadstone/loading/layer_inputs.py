"""Hooks that see or change the inputs of a model's layers: of Linears, and of both products of fused experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from loadstone.errors import ArtifactError

if TYPE_CHECKING:
    import torch

# Weights of transformers' fused experts: the input of the last is made inside the layer, between two products.
EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")
Change = Callable[["torch.Tensor"], "torch.Tensor"]


def change_inputs(model: Any, changes: Mapping[str, Change]) -> Callable[[], None]:
    """Pass what each parameter (by its name in ``model``) is multiplied by through its change; returns what takes it
    all back.

    Layers are changed before accelerate's own hooks move their inputs. Raises `ArtifactError` for a parameter that is
    neither the weight of a module nor one of fused experts that transformers computes itself.
    """
    undo = ExitStack()
    for name, change in changes.items():
        owner, _, weight = name.rpartition(".")
        try:
            module = model.get_submodule(owner)
        except AttributeError:
            module = None
        if module is None or (weight != "weight" and not sees_experts(module, weight)):
            raise ArtifactError(
                f"the inputs of '{name}' cannot be seen in {type(module or model).__name__}",
                "Leave them as they are",
            )
        if weight == "down_proj":
            _change_between(module, change, undo)
        else:
            undo.callback(_hook_input(module, change).remove)
    return undo.close


def sees_experts(module: Any, weight: str) -> bool:
    """Whether the input of a 3-D ``weight`` of fused experts can be seen."""
    return weight in EXPERT_WEIGHTS and (hasattr(module, "_apply_gate") or takes_batches(module))


def takes_batches(module: Any) -> bool:
    """Whether a module of experts takes the tokens of each expert one batch after the other: Llama 4's, which sends
    every token to every expert, times its score, and that is zero for all but the chosen ones."""
    return type(module).__name__ == "Llama4TextExperts"


def _hook_input(module: Any, change: Change) -> Any:
    return module.register_forward_pre_hook(lambda m, args: (change(args[0]), *args[1:]))


def _change_between(experts: Any, change: Change, undo: ExitStack) -> None:
    """Change what fused experts multiply by their last weight: the gated product, or the activation's output."""
    if takes_batches(experts):
        _change_batches(experts, change, undo)
        return
    if not experts.has_gate:
        undo.callback(experts.act_fn.register_forward_hook(lambda m, args, out: change(out)).remove)
        return
    gate = experts._apply_gate
    experts._apply_gate = lambda x: change(gate(x))
    undo.callback(delattr, experts, "_apply_gate")
    before = experts.config._experts_implementation
    if before not in ("grouped_mm", "batched_mm"):
        # The others compute the gate in place or in a kernel.
        experts.config._experts_implementation = "grouped_mm"
        undo.callback(setattr, experts.config, "_experts_implementation", before)


def _change_batches(experts: Any, change: Change, undo: ExitStack) -> None:
    """The same for Llama 4's experts, which compute it within their forward: as there, with the change."""
    import torch

    def forward(x: torch.Tensor) -> torch.Tensor:
        batches = x.view(experts.num_experts, -1, experts.hidden_size)
        gate, up = torch.bmm(batches, experts.gate_up_proj).chunk(2, -1)
        between = change(up * experts.act_fn(gate))
        return torch.bmm(between, experts.down_proj).view(-1, experts.hidden_size)

    # accelerate's own forward brings the weights and calls what was there before it.
    name = "_old_forward" if hasattr(experts, "_hf_hook") else "forward"
    before = vars(experts).get(name)
    setattr(experts, name, forward)
    undo.callback(delattr, experts, name) if before is None else undo.callback(setattr, experts, name, before)


class InputRanges:
    """The largest magnitude, a float32 scalar, of what each named input held: of keys, values and layer inputs."""

    def __init__(self) -> None:
        self.largest: dict[str, torch.Tensor] = {}

    def record(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Note ``x`` and return it: a `Change` that changes nothing."""
        import torch

        low, high = torch.aminmax(x.detach())
        amax = torch.maximum(low.abs(), high.abs()).float()
        self.largest[name] = torch.maximum(self.largest[name], amax) if name in self.largest else amax
        return x

    def require(self, names: list[str]) -> None:
        """Raise `ArtifactError` naming the first of ``names`` that no text reached."""
        unseen = [name for name in names if name not in self.largest]
        if unseen:
            raise ArtifactError(
                f"'{unseen[0]}' (of {len(unseen)}) saw no text during calibration", "Calibrate on more text"
            )
