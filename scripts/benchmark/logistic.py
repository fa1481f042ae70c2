"""Speed and accuracy of a path of logistic regressions: ours and scikit-learn's, beside the optimum.

    python scripts/benchmark/logistic.py
    python scripts/benchmark/logistic.py --repeats 20 --json logistic.json

Two classes, six strengths from the strongest penalty on, each fit begun at the one before, as `brainfm.scoring.linear`
tunes them; rows are standardised and have a mean square length of 1. Time is processor time on one thread, the least of
the repeats. The gap is the largest difference of a probability from that of a fit to a gradient of 1e-12.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from brainfm.scoring.linear import LOGISTIC, fit_logistic

SIZES = ((40, 5), (128, 5), (128, 30), (128, 128), (500, 30), (500, 500), (5000, 40))  # rows, features
SOLVERS = ("lbfgs", "newton-cholesky", "liblinear")


def ours(x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    return [theta[0] for theta in fit_logistic(x, y, np.ones(len(y)), LOGISTIC)]


def theirs(solver: str) -> Callable[[np.ndarray, np.ndarray], list[np.ndarray]]:
    def fit(x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
        warm = solver != "liblinear"  # which cannot begin anywhere
        model = LogisticRegression(solver=solver, max_iter=500, warm_start=warm)
        found = []
        for strength in LOGISTIC:
            model.set_params(C=strength).fit(x, y)
            found.append(np.append(model.coef_[0], model.intercept_))
        return found

    return fit


def optimum(x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    exact = {"solver": "newton-cholesky", "max_iter": 10_000, "tol": 1e-12}
    fits = [LogisticRegression(C=strength, **exact).fit(x, y) for strength in LOGISTIC]
    return [np.append(fit.coef_[0], fit.intercept_) for fit in fits]


def measured(rows: int, features: int, repeats: int) -> list[dict[str, object]]:
    """A row of the table for each solver."""
    rng = np.random.default_rng(rows + features)
    x = rng.standard_normal((rows, features)) / np.sqrt(features)
    y = (x[:, : min(3, features)].sum(axis=1) * np.sqrt(features) + rng.standard_normal(rows) > 0).astype(np.int64)
    best = [expit(x @ theta[:-1] + theta[-1]) for theta in optimum(x, y)]
    found = []
    for name, fit in {"brainfm": ours, **{solver: theirs(solver) for solver in SOLVERS}}.items():
        seconds = []
        for _ in range(repeats):
            began = time.process_time()
            thetas = fit(x, y)
            seconds.append(time.process_time() - began)
        guesses = [expit(x @ theta[:-1] + theta[-1]) for theta in thetas]
        gap = max(float(np.abs(guess - p).max()) for guess, p in zip(guesses, best))
        found.append({"rows": rows, "features": features, "solver": name, "ms": 1e3 * min(seconds), "gap": gap})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print("| rows | features | solver | ms | gap |\n|--|--|--|--|--|")
    table: list[dict[str, object]] = []
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of convergence: the gap tells
        for rows, features in SIZES:
            for line in measured(rows, features, args.repeats):
                print(f"| {rows} | {features} | {line['solver']} | {line['ms']:.2f} | {line['gap']:.1e} |", flush=True)
                table.append(line)
    if args.json is not None:
        args.json.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
