"""dE/dλ before the inner problem has converged: by unrolling, and by the implicit function theorem.

K steps of gradient descent with momentum from w = 0. Unrolled, they give the exact derivative of
E(w_K) (Domke 2012); the implicit function theorem at w_K, and E there, that of a fixed point where
there is none yet (Larsen et al. 1996 ask for convergence). Both are compared with dE/dλ at w(λ).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import hypertorch
from experiments.studies.inputs_problems import Problem, Table, error_and_slope, hold_out
from hypertorch import ConjugateGradient, Engine, Implicit, Unroll

ENGINES: dict[str, Engine] = {
    "unrolled": Unroll(),
    "implicit": Implicit(ConjugateGradient(rtol=1e-8, max_steps=1000), warm_start=False),
}


def truncated(table: Table, steps: list[int], value: float) -> list[dict[str, Any]]:
    """The errors of both after some numbers of steps, on one split.

    Args:
        table: the data.
        steps: each K.
        value: of every λ_i.

    Returns:
        Rows with K, the engine, ‖p − p*‖ / ‖p*‖ of p = dE/dρ, and how many signs are wrong.
    """
    splits = hold_out(len(table.fit.y))
    values = np.full(len(table.inputs), value)
    truth = values * error_and_slope(table, splits, values)[1]
    rows: list[dict[str, Any]] = []
    for count in steps:
        for name, engine in ENGINES.items():
            problem = Problem(table, splits, value, (value / 2, value * 2))
            found = value * slope_after(problem, count, engine).numpy()
            rows.append(
                {
                    "what": "truncated",
                    "steps": count,
                    "engine": name,
                    "error": np.linalg.norm(found - truth) / np.linalg.norm(truth),
                    "wrong_signs": int(np.sum(found * truth < 0)),
                }
            )
    return rows


def slope_after(problem: Problem, steps: int, engine: Engine) -> torch.Tensor:
    """dE/dλ of so many steps of gradient descent with momentum from w = 0."""
    curvature = max(torch.linalg.eigvalsh(h)[-1].item() for h in problem.hessians())
    optimizer = hypertorch.HyperOptimizer(
        torch.optim.SGD(problem.parameters(), lr=1 / curvature, momentum=0.9),
        problem,
        learn=[problem.decays],
        outer=None,
    )
    counted = steps if isinstance(engine, Unroll) else 1  # of an implicit one the last alone counts
    for _ in range(steps - counted):
        optimizer.step(problem.inner_loss())
    losses = [problem.inner_loss] * counted
    return hypertorch.hypergradient(optimizer, losses, problem.outer_loss, engine)["decays"]
