"""A derivative through an optimum by JAXopt, which shares no code with ours.

To be computed in a process of its own: JAX's threads make every later fork unsafe, such as those of
a DataLoader's workers.
"""

import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np


def optimum_and_derivative(
    task: str, training: tuple[np.ndarray, np.ndarray], held_out: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, float]:
    """Return the weights of least L + λ ‖w‖² / 2 at λ = 0.3, and dE/dλ there.

    Args:
        task: "ridge" or "logistic regression"; its labels are the signs of y − 5.
        training: x and y of L.
        held_out: x and y of E.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_compute, task, training, held_out).result()


def _compute(task, training, held_out):
    warnings.simplefilter("ignore", DeprecationWarning)  # JAXopt is no longer maintained
    import jax
    import jax.numpy as jnp
    import jaxopt

    jax.config.update("jax_enable_x64", True)

    def loss(w, x, y):
        if task == "ridge":
            return 0.5 * jnp.square(x @ w - y).mean()
        return jnp.logaddexp(0, -jnp.sign(y - 5) * (x @ w)).mean()

    def stationarity(w, decay):
        return jax.grad(loss)(w, *training) + decay * w

    @jax.jit
    def newton(w, decay):
        return w - jnp.linalg.solve(jax.jacobian(stationarity)(w, decay), stationarity(w, decay))

    def solution(start, decay):
        w = start
        for _ in range(30):
            w = newton(w, decay)
        return w

    rooted = jaxopt.implicit_diff.custom_root(
        jax.jit(stationarity), solve=jaxopt.linear_solve.solve_lu
    )(solution)
    start = jnp.zeros(training[0].shape[1])
    derivative = jax.grad(lambda decay: loss(rooted(start, decay), *held_out))(0.3)
    return np.array(solution(start, 0.3)), float(derivative)
