"""The shipped PFN beside scikit-learn's models: small tables, five random splits, defaults everywhere, one thread.

    python -m tests.bench.bench_pfn_quality [--base DIR] [--splits 5]

Regression: R² and, where a model has a predictive distribution, its negative log likelihood in nats. Classification:
accuracy and log loss. ``s`` is the mean CPU time of fitting and predicting. "true GP" is the exact posterior with the
covariance that drew the table, which no fitted model can beat on average.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np


def main() -> None:
    import torch

    parser = argparse.ArgumentParser()
    parser.add_argument("--base", default="builtin:tiny-pfn")
    parser.add_argument("--splits", type=int, default=5)
    args, _ = parser.parse_known_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    for kind, tables, models in (
        ("classification: accuracy / log loss / s", classification_tables(), classifiers(args.base)),
        ("regression: R² / NLL / s", regression_tables(), regressors(args.base)),
    ):
        print(f"\n{kind}\n{'':<22}" + "".join(f"{name:>26}" for name in models), flush=True)
        for name, make in tables.items():
            cells = ""
            for predict in models.values():
                found = [one(predict, *make(split)) for split in range(args.splits)]
                mean = np.mean(found, 0)
                nll = "-" if np.isnan(mean[1]) else f"{mean[1]:.3f}"
                cells += f"{f'{mean[0]:.3f} / {nll} / {mean[2]:.2f}':>26}"
            print(f"{name:<22}{cells}", flush=True)


def one(predict: Callable[..., tuple[float, float]], *data: Any) -> tuple[float, float, float]:
    started = time.process_time()
    quality, loss = predict(*data)
    return quality, loss, time.process_time() - started


def split_of(x: np.ndarray, y: np.ndarray, split: int, stratify: bool) -> tuple[Any, ...]:
    from sklearn.model_selection import train_test_split

    x, x_test, y, y_test = train_test_split(
        x, y, test_size=0.3, random_state=split, stratify=y if stratify else None
    )
    return x, x_test, y, y_test, None


def classification_tables() -> dict[str, Callable[[int], tuple[Any, ...]]]:
    from sklearn import datasets

    loaded = {
        name: getattr(datasets, f"load_{name}")(return_X_y=True) for name in ("iris", "wine", "breast_cancer")
    }
    moons = datasets.make_moons(200, noise=0.25, random_state=0)
    made = datasets.make_classification(300, 10, n_informative=5, n_classes=4, random_state=0)
    tables = loaded | {"moons": moons, "made, 4 classes": made}
    return {
        f"{name} {x.shape[0]}x{x.shape[1]}": lambda split, x=x, y=y: split_of(x, y, split, True)
        for name, (x, y) in tables.items()
    }


def regression_tables() -> dict[str, Callable[[int], tuple[Any, ...]]]:
    from sklearn import datasets

    tables = {
        "diabetes": datasets.load_diabetes(return_X_y=True),
        "friedman1": datasets.make_friedman1(200, noise=1.0, random_state=0),
        "friedman2": datasets.make_friedman2(200, noise=50.0, random_state=0),
    }
    found: dict[str, Callable[[int], tuple[Any, ...]]] = {
        f"{name} {x.shape[0]}x{x.shape[1]}": lambda split, x=x, y=y: split_of(x, y, split, False)
        for name, (x, y) in tables.items()
    }
    return found | {f"GP draws, d={d}": lambda split, d=d: gp_draw(split, d) for d in (1, 2, 6)}


def gp_draw(split: int, d: int) -> tuple[Any, ...]:
    """50 + 100 noisy rows of a draw from a known Gaussian process; the last item holds its covariance."""
    draw = np.random.default_rng(split)
    x = draw.random((150, d))
    length, noise = 0.4 * d**0.5, 0.1
    distance = ((x[:, None] - x[None]) ** 2).sum(-1) / length**2
    covariance = np.exp(-distance / 2) + noise**2 * np.eye(150)
    y = np.linalg.cholesky(covariance) @ draw.standard_normal(150)
    return x[:50], x[50:], y[:50], y[50:], covariance


def classifiers(base: str) -> dict[str, Callable[..., tuple[float, float]]]:
    from sklearn.ensemble import GradientBoostingClassifier, RandomForestClassifier
    from sklearn.gaussian_process import GaussianProcessClassifier
    from sklearn.gaussian_process.kernels import RBF
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import accuracy_score, log_loss
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def score(probabilities: np.ndarray, y: np.ndarray) -> tuple[float, float]:
        return accuracy_score(y, probabilities.argmax(1)), log_loss(y, probabilities)

    def by(make: Callable[[], Any]) -> Callable[..., tuple[float, float]]:
        return lambda x, x_test, y, y_test, _: score(make().fit(x, y).predict_proba(x_test), y_test)

    def pfn(
        x: np.ndarray, x_test: np.ndarray, y: np.ndarray, y_test: np.ndarray, _: Any
    ) -> tuple[float, float]:
        import torch

        from loadstone.context.pfn.bases import load_base

        context = load_base(base, device="cpu").fit(torch.from_numpy(x), torch.from_numpy(y))
        return score(context.probabilities(torch.from_numpy(x_test)).numpy(), y_test)

    scaled = lambda model: make_pipeline(StandardScaler(), model)  # noqa: E731
    return {
        "PFN": pfn,
        "random forest": by(lambda: RandomForestClassifier(random_state=0)),
        "gradient boosting": by(lambda: GradientBoostingClassifier(random_state=0)),
        "GP": by(lambda: scaled(GaussianProcessClassifier(RBF(1.0), random_state=0))),
        "logistic regression": by(lambda: scaled(LogisticRegression(max_iter=2000))),
    }


def regressors(base: str) -> dict[str, Callable[..., tuple[float, float]]]:
    from scipy.stats import norm
    from sklearn.ensemble import GradientBoostingRegressor, RandomForestRegressor
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
    from sklearn.metrics import r2_score
    from sklearn.preprocessing import StandardScaler

    def by(make: Callable[[], Any]) -> Callable[..., tuple[float, float]]:
        return lambda x, x_test, y, y_test, _: (r2_score(y_test, make().fit(x, y).predict(x_test)), np.nan)

    def gp(
        x: np.ndarray, x_test: np.ndarray, y: np.ndarray, y_test: np.ndarray, _: Any
    ) -> tuple[float, float]:
        scaler = StandardScaler().fit(x)
        kernel = ConstantKernel() * Matern(np.ones(x.shape[1]), nu=2.5) + WhiteKernel()
        model = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0).fit(scaler.transform(x), y)
        mean, std = model.predict(scaler.transform(x_test), return_std=True)
        return r2_score(y_test, mean), -norm.logpdf(y_test, mean, std).mean()

    def truth(x: Any, x_test: Any, y: np.ndarray, y_test: np.ndarray, covariance: Any) -> tuple[float, float]:
        if covariance is None:
            return np.nan, np.nan
        n = len(y)
        weights = np.linalg.solve(covariance[:n, :n], covariance[:n, n:])
        mean = weights.T @ y
        variance = np.diag(covariance[n:, n:] - covariance[n:, :n] @ weights)
        return r2_score(y_test, mean), -norm.logpdf(y_test, mean, variance**0.5).mean()

    def pfn(
        x: np.ndarray, x_test: np.ndarray, y: np.ndarray, y_test: np.ndarray, _: Any
    ) -> tuple[float, float]:
        import torch

        from loadstone.context.pfn.bases import load_base

        context = load_base(base, device="cpu").fit(torch.from_numpy(x), torch.from_numpy(y).double())
        posterior = context.posterior(torch.from_numpy(x_test))
        return r2_score(y_test, posterior.mean.numpy()), -posterior.log_prob(
            torch.from_numpy(y_test)
        ).mean().item()

    return {
        "PFN": pfn,
        "random forest": by(lambda: RandomForestRegressor(random_state=0)),
        "gradient boosting": by(lambda: GradientBoostingRegressor(random_state=0)),
        "GP": gp,
        "true GP": truth,
    }


if __name__ == "__main__":
    main()
