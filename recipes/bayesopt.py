"""Bayesian optimisation of Branin and Hartmann-6: the shipped PFN's cached context against a GP in BoTorch.

    python recipes/bayesopt.py --trials 24 --seeds 3 --out docs/bayesopt.png

Both start from the same Sobol points, take the point of largest LogEI each time, and pay no attention to noise. Prints
the simple regret (best value found, above the true minimum) and the time of a step; draws the medians over seeds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from botorch.acquisition import LogExpectedImprovement
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.transforms import Standardize
from botorch.optim import optimize_acqf
from botorch.test_functions import Branin, Hartmann
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor

from loadstone.context.bayesopt.acquisition import log_ei
from loadstone.context.bayesopt.optimize import optimize_acquisition
from loadstone.context.pfn.bases import load_base

PROBLEMS = {"Branin": (Branin(), 0.397887), "Hartmann-6": (Hartmann(dim=6), -3.32237)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=positive, default=24)
    parser.add_argument("--seeds", type=positive, default=3)
    parser.add_argument("--base", default="builtin:tiny-pfn")
    parser.add_argument("--out", type=Path, default=Path("docs/bayesopt.png"))
    args = parser.parse_args()
    # What the end needs is tried before the work.
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("the picture needs matplotlib: pip install matplotlib")
    reported = sorted({n for n in (8, 16, args.trials) if n <= args.trials})
    warnings.filterwarnings("ignore")
    base = load_base(args.base)

    def by_context(x: Tensor, y: Tensor, seed: int) -> Tensor:
        context = base.fit(x, y)
        box = torch.stack((torch.zeros(x.shape[1]), torch.ones(x.shape[1]))).double()
        acquisition = lambda q: log_ei(context.posterior(q), y.min(), maximize=False)  # noqa: E731
        return optimize_acquisition(acquisition, box, restarts=16, raw_samples=256, steps=30, seed=seed).x

    methods: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
        "PFN, cached context": by_context,
        "GP (BoTorch)": by_gp,
        "Sobol": lambda x, y, seed: (
            torch.quasirandom.SobolEngine(x.shape[1], scramble=True, seed=seed).draw(len(x) + 1)[-1].double()
        ),
    }
    regrets: dict[str, dict[str, Tensor]] = {}
    for problem, (function, minimum) in PROBLEMS.items():
        regrets[problem] = {}
        for name, propose in methods.items():
            runs, started = [], time.process_time()
            for seed in range(args.seeds):
                runs.append(run(function, minimum, propose, args.trials, seed))
            seconds = (time.process_time() - started) / (args.seeds * args.trials)
            regrets[problem][name] = torch.stack(runs)
            medians = torch.stack(runs).median(0).values
            row = {"problem": problem, "method": name, "seconds_a_step": round(seconds, 3)}
            row |= {f"regret_at_{n}": float(f"{medians[n - 1]:.3g}") for n in reported}
            print(json.dumps(row), flush=True)
    draw(regrets, args.out)


def positive(text: str) -> int:
    """A count from the command line."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def by_gp(x: Tensor, y: Tensor, seed: int) -> Tensor:
    """BoTorch's default: a GP with fitted hyperparameters and LogEI."""
    torch.manual_seed(seed)
    gp = SingleTaskGP(x, -y.unsqueeze(-1), outcome_transform=Standardize(1))
    fit_gpytorch_mll(ExactMarginalLogLikelihood(gp.likelihood, gp))
    box = torch.stack((torch.zeros(x.shape[1]), torch.ones(x.shape[1]))).double()
    acquisition = LogExpectedImprovement(gp, best_f=(-y).max())
    return optimize_acqf(acquisition, box, q=1, num_restarts=8, raw_samples=128)[0][0].detach()


def run(function: object, minimum: float, propose: Callable[..., Tensor], trials: int, seed: int) -> Tensor:
    """Simple regret after each trial that follows the 2 (d + 1) starting points, (trials,)."""
    low, high = function.bounds  # type: ignore[attr-defined]
    d = len(low)
    x = torch.quasirandom.SobolEngine(d, scramble=True, seed=100 + seed).draw(2 * (d + 1)).double()
    y = function(low + x * (high - low))  # type: ignore[operator]
    best = []
    for trial in range(trials):
        new = propose(x, y, 1000 * seed + trial).unsqueeze(0)
        x, y = torch.cat((x, new)), torch.cat((y, function(low + new * (high - low))))  # type: ignore[operator]
        best.append(y.min() - minimum)
    return torch.stack(best).clamp(min=1e-6)


def draw(regrets: dict[str, dict[str, Tensor]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(regrets), figsize=(9, 3.4), layout="constrained")
    for axis, (problem, methods) in zip(axes, regrets.items(), strict=True):
        for name, runs in methods.items():
            trials = range(1, runs.shape[1] + 1)
            (line,) = axis.plot(trials, runs.median(0).values, label=name)
            low, high = runs.min(0).values, runs.max(0).values
            axis.fill_between(trials, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
        axis.set(title=problem, yscale="log", xlabel="evaluations after the start", ylabel="simple regret")
    axes[0].legend()
    figure.savefig(out, dpi=110)


if __name__ == "__main__":
    main()
