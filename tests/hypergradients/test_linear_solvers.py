"""M v = b: every solver against dense linear algebra, at 0, 1 and n steps, and what it refuses."""

import dataclasses

import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hypertorch import ArgumentError, SolverError
from hypertorch.hypergradients.linear_solvers import (
    ConjugateGradient,
    FixedPoint,
    Lanczos,
    NormalConjugateGradient,
)
from hypertorch.hypergradients.nystrom import Nystrom

f64 = {"dtype": torch.float64}
SHAPES = [(2, 3), (), (5,)]  # a matrix, a scalar and a vector: n = 12
N = 12


def random(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), **f64)


def spd(n=N, seed=0, smallest=0.5, largest=4.0):
    """Return a symmetric matrix with eigenvalues spread between the two."""
    basis, _ = torch.linalg.qr(random(n, n, seed=seed))
    return basis @ torch.diag(torch.linspace(smallest, largest, n, **f64)) @ basis.T


def nonsymmetric(n=N, seed=0):
    return 3 * torch.eye(n, **f64) + 0.6 * random(n, n, seed=seed)


def contraction(n=N, seed=0, radius=0.8):
    """Return a nonsymmetric A with the spectral radius `radius`."""
    a = random(n, n, seed=seed)
    return a * radius / torch.linalg.eigvals(a).abs().max()


def split(vector, shapes=SHAPES):
    sizes = [int(np.prod(shape)) for shape in shapes]
    return [part.view(shape) for part, shape in zip(vector.split(sizes), shapes, strict=True)]


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


class Product:
    """v ↦ M v on lists of tensors, that counts itself."""

    def __init__(self, matrix, shapes=SHAPES):
        self.matrix, self.shapes, self.calls = matrix, shapes, 0

    def __call__(self, tensors):
        self.calls += 1
        return tuple(split(self.matrix @ flat(tensors), self.shapes))


def solved(solver, matrix, b, start=None, shapes=SHAPES):
    """Return the solution, once its residual and count are what they claim to be."""
    product, transposed = Product(matrix, shapes), Product(matrix.T, shapes)
    start = None if start is None else split(start, shapes)
    solution = solver.solve(product, split(b, shapes), start=start, transposed=transposed)
    assert [t.shape for t in solution.value] == [torch.Size(shape) for shape in shapes]
    residual = (b - matrix @ flat(solution.value)).norm().item()
    assert solution.residual == pytest.approx(residual, rel=1e-6, abs=1e-13)
    assert solution.products == product.calls + transposed.calls
    assert solution.converged == (solution.residual <= max(solver.rtol * b.norm(), solver.atol))
    return solution


TIGHT = {"rtol": 1e-13, "max_steps": 1000}
SOLVERS = {
    "fixed point": FixedPoint(step=0.3, **TIGHT),
    "conjugate gradient": ConjugateGradient(**TIGHT),
    "conjugate gradient on the normal equations": NormalConjugateGradient(**TIGHT),
    "Nystrom, refined": Nystrom(rank=N, damping=0.1, **TIGHT),
}
EVERY = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


@EVERY
def test_every_solver_finds_what_dense_algebra_finds(solver):
    m, b = spd(), random(N, seed=1)
    solution = solved(solver, m, b)
    assert solution.converged
    torch.testing.assert_close(
        flat(solution.value), torch.linalg.solve(m, b), rtol=1e-11, atol=1e-11
    )


@EVERY
def test_no_step_returns_the_start_and_its_residual(solver):
    m, b, start = spd(), random(N, seed=1), random(N, seed=2)
    none = dataclasses.replace(solver, max_steps=0)
    assert torch.equal(flat(solved(none, m, b, start).value), start)
    cold = solved(none, m, b)
    assert flat(cold.value).eq(0).all() and cold.products == 0 and not cold.converged


@EVERY
def test_a_start_that_is_the_solution_takes_no_step(solver):
    m, b = spd(), random(N, seed=1)
    exact = torch.linalg.solve(m, b)
    solution = solved(dataclasses.replace(solver, rtol=1e-10), m, b, start=exact)
    assert torch.equal(flat(solution.value), exact)
    assert solution.converged and solution.products == 1


@EVERY
def test_a_right_hand_side_of_zero_has_the_solution_zero_for_nothing(solver):
    solution = solved(solver, spd(), torch.zeros(N, **f64))
    assert flat(solution.value).eq(0).all() and solution.converged and solution.products == 0


@EVERY
def test_a_start_near_the_solution_saves_products(solver):
    if isinstance(solver, Nystrom):
        solver = dataclasses.replace(solver, damping=2.0)  # slow enough for a start to matter
    solver = dataclasses.replace(solver, rtol=1e-9)
    m, b = spd(), random(N, seed=1)
    near = torch.linalg.solve(m, b) + 1e-8 * random(N, seed=2)
    cold, warm = solved(solver, m, b), solved(solver, m, b, start=near)
    assert warm.converged and warm.products < cold.products
    torch.testing.assert_close(flat(warm.value), flat(cold.value), rtol=1e-7, atol=1e-7)


@EVERY
def test_the_tolerance_is_relative_or_absolute_whichever_is_larger(solver):
    m, b = spd(), 100 * random(N, seed=1)
    loose = solved(dataclasses.replace(solver, rtol=1e-1, atol=0.0), m, b)
    tight = solved(dataclasses.replace(solver, rtol=1e-9, atol=0.0), m, b)
    absolute = solved(dataclasses.replace(solver, rtol=1e-9, atol=20.0), m, b)
    assert loose.converged and tight.converged and absolute.converged
    assert loose.residual <= 0.1 * b.norm() and absolute.residual <= 20
    assert max(loose.products, absolute.products) < tight.products


@EVERY
def test_one_tensor_of_one_number(solver):
    m, b = torch.tensor([[2.0]], **f64), torch.tensor([3.0], **f64)
    solution = solved(solver, m, b, shapes=[()])
    assert solution.value[0].item() == pytest.approx(1.5, rel=1e-12)


@EVERY
def test_float32_comes_back_as_float32_and_no_graph_is_kept(solver):
    m = spd().float()
    b = [t.float().requires_grad_() for t in split(random(N, seed=1))]
    product = Product(m)
    solver = dataclasses.replace(solver, rtol=1e-5)
    solution = solver.solve(product, b, transposed=product)
    assert solution.converged
    assert all(t.dtype == torch.float32 and not t.requires_grad for t in solution.value)


def test_a_tolerance_below_float32_ends_honestly():
    m, b = spd(largest=1e4).float(), split(random(N, seed=1).float())
    product = Product(m)
    for solver in (ConjugateGradient(rtol=1e-12), NormalConjugateGradient(rtol=1e-12)):
        solution = solver.solve(product, b, transposed=product)
        true = (flat(b) - m @ flat(solution.value)).norm().item()
        assert not solution.converged and solution.products < 500
        assert solution.residual == pytest.approx(true, rel=1e-2)


# Conjugate gradient


def test_conjugate_gradient_is_exact_after_one_step_on_a_multiple_of_the_identity():
    m, b = 3.0 * torch.eye(N, **f64), random(N, seed=1)
    solution = solved(ConjugateGradient(max_steps=1), m, b)
    torch.testing.assert_close(flat(solution.value), b / 3, rtol=1e-15, atol=1e-15)


def test_conjugate_gradient_solves_the_two_by_two_system_that_others_get_wrong():
    m, b = torch.tensor([[4.0, 1.0], [1.0, 3.0]], **f64), torch.tensor([1.0, 2.0], **f64)
    solution = solved(ConjugateGradient(max_steps=2), m, b, shapes=[(2,)])
    torch.testing.assert_close(
        flat(solution.value), torch.tensor([1 / 11, 7 / 11], **f64), rtol=1e-14, atol=1e-14
    )


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12])
def test_conjugate_gradient_is_exact_after_n_steps(n):
    m, b = spd(n), random(n, seed=1)
    solution = solved(ConjugateGradient(rtol=0, max_steps=n), m, b, shapes=[(n,)])
    torch.testing.assert_close(
        flat(solution.value), torch.linalg.solve(m, b), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("steps", range(1, 9))
def test_conjugate_gradient_goes_step_by_step_where_scipy_goes(steps):
    m, b, start = spd(largest=40.0), random(N, seed=1), random(N, seed=2)
    solution = solved(ConjugateGradient(rtol=0, max_steps=steps), m, b, start)
    theirs, _ = scipy.sparse.linalg.cg(m.numpy(), b.numpy(), start.numpy(), rtol=0, maxiter=steps)
    np.testing.assert_allclose(flat(solution.value).numpy(), theirs, rtol=1e-11)


def test_without_a_tolerance_conjugate_gradient_ends_at_rounding():
    m, b = spd(), random(N, seed=1)
    for solver in (ConjugateGradient, NormalConjugateGradient):
        solution = solved(solver(rtol=0), m, b)
        assert solution.residual < 1e-14 and solution.products < 12 * N


INDEFINITE = {
    "negative definite": -spd(),
    "indefinite": spd() - 2 * torch.eye(N, **f64),
    "singular, b outside its range": spd(smallest=0.0),
    "zero": torch.zeros(N, N, **f64),
}


@pytest.mark.parametrize("steps", [0, 1, 2, 5, N])
def test_lanczos_makes_the_steps_of_conjugate_gradient(steps):
    m, b = spd(), random(N, seed=1)
    product = Product(m)
    found = Lanczos(max_steps=steps).solve(product, split(b), start=split(random(N, seed=2)))
    whole = solved(ConjugateGradient(rtol=0, max_steps=steps), m, b)
    assert torch.allclose(flat(found.value), flat(whole.value), rtol=1e-9, atol=1e-12)
    assert found.residual == pytest.approx((b - m @ flat(found.value)).norm().item(), abs=1e-12)
    assert found.products == product.calls == steps


@pytest.mark.parametrize("smallest", [-4.0, -1.0])
def test_lanczos_solves_with_the_absolute_value_of_an_indefinite_system(smallest):
    basis, _ = torch.linalg.qr(random(N, N))
    values = torch.linspace(smallest, 4.0, N, **f64)
    b = random(N, seed=1)
    v = flat(solved(Lanczos(max_steps=N), basis @ torch.diag(values) @ basis.T, b).value)
    expected = basis @ ((basis.T @ b) / values.abs().clamp(min=0.04))
    assert torch.allclose(v, expected, rtol=1e-8, atol=1e-10)
    for steps in range(1, N):
        v = flat(solved(Lanczos(max_steps=steps), basis @ torch.diag(values) @ basis.T, b).value)
        assert v @ b > 0


def test_lanczos_ends_where_the_span_does():
    b = random(N, seed=1)
    assert torch.allclose(flat(solved(Lanczos(), 4 * torch.eye(N, **f64), b).value), b / 4)
    assert torch.allclose(flat(solved(Lanczos(), -4 * torch.eye(N, **f64), b).value), b / 4)
    none = solved(Lanczos(), spd(), torch.zeros(N, **f64))
    assert flat(none.value).abs().max() == 0 == none.products


@pytest.mark.parametrize("m", INDEFINITE.values(), ids=INDEFINITE)
def test_conjugate_gradient_reports_a_system_that_is_not_positive_definite(m):
    with pytest.raises(SolverError, match=r"M is not positive definite: pᵀ M p = .* Add a mult"):
        solved(ConjugateGradient(**TIGHT), m, random(N, seed=1))


@given(st.integers(0, 10_000), st.integers(1, 9), st.floats(1.0, 1e6))
@settings(max_examples=60, deadline=None)
def test_conjugate_gradient_reaches_its_tolerance_for_any_positive_definite_system(
    seed, n, condition
):
    m, b = spd(n, seed, 1.0, condition), random(n, seed=seed + 1)
    solution = solved(ConjugateGradient(rtol=1e-8), m, b, shapes=[(n,)])
    assert solution.converged
    error = (flat(solution.value) - torch.linalg.solve(m, b)).norm()
    assert error <= 2e-8 * b.norm()  # ‖M⁻¹‖ = 1


# The normal equations


@given(st.integers(0, 10_000), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_the_normal_equations_solve_any_nonsymmetric_system(seed, n):
    m, b = nonsymmetric(n, seed), random(n, seed=seed + 1)
    solution = solved(NormalConjugateGradient(rtol=1e-10), m, b, shapes=[(n,)])
    assert solution.converged
    limit = 2e-10 * b.norm() / torch.linalg.svdvals(m)[-1]
    assert (flat(solution.value) - torch.linalg.solve(m, b)).norm() <= limit


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_normal_equations_are_exact_after_n_steps(n):
    m, b = nonsymmetric(n), random(n, seed=1)
    solution = solved(NormalConjugateGradient(rtol=0, max_steps=n), m, b, shapes=[(n,)])
    torch.testing.assert_close(
        flat(solution.value), torch.linalg.solve(m, b), rtol=1e-12, atol=1e-12
    )


def test_the_normal_equations_solve_what_is_indefinite():
    m, b = spd() - 2 * torch.eye(N, **f64), random(N, seed=1)
    solution = solved(NormalConjugateGradient(**TIGHT), m, b)
    torch.testing.assert_close(
        flat(solution.value), torch.linalg.solve(m, b), rtol=1e-10, atol=1e-10
    )


def test_the_normal_equations_end_unconverged_at_least_squares_where_there_is_no_solution():
    m, b = spd(smallest=0.0), random(N, seed=1)
    solution = solved(NormalConjugateGradient(**TIGHT), m, b)
    theirs, *_ = scipy.linalg.lstsq(m.numpy(), b.numpy())
    assert not solution.converged and solution.products < 12 * N
    np.testing.assert_allclose(flat(solution.value).numpy(), theirs, rtol=1e-8, atol=1e-8)


# Fixed point and Neumann


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_fixed_point_steps_from_zero_are_terms_of_the_neumann_series(terms):
    a, b = contraction(), random(N, seed=1)
    series = sum(torch.linalg.matrix_power(a, k) @ b for k in range(terms))
    m = torch.eye(N, **f64) - a
    solution = solved(FixedPoint(rtol=0, max_steps=terms), m, b)
    torch.testing.assert_close(flat(solution.value), series, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_with_a_step_they_are_those_of_lorraine(terms):
    h, b, alpha = spd(), random(N, seed=1), 0.2
    term, total = b, b
    for _ in range(terms - 1):
        term = term - alpha * (h @ term)
        total = total + term
    solution = solved(FixedPoint(step=alpha, rtol=0, max_steps=terms), h, b)
    torch.testing.assert_close(flat(solution.value), alpha * total, rtol=1e-14, atol=1e-14)


def test_the_error_falls_like_the_spectral_radius_to_the_power_of_the_steps():
    basis, b = nonsymmetric(), random(N, seed=1)
    spectrum = torch.cat([torch.tensor([0.8], **f64), torch.linspace(-0.4, 0.4, N - 1, **f64)])
    a = basis @ torch.diag(spectrum) @ torch.linalg.inv(basis)  # not symmetric, ρ(A) = 0.8
    m = torch.eye(N, **f64) - a
    exact = torch.linalg.solve(m, b)
    errors = []
    for steps in (30, 40, 60):
        solution = solved(FixedPoint(rtol=0, max_steps=steps), m, b)
        errors.append((flat(solution.value) - exact).norm().item())
    assert errors[1] / errors[0] == pytest.approx(0.8**10, rel=1e-6)
    assert errors[2] / errors[1] == pytest.approx(0.8**20, rel=1e-6)


def test_a_fixed_point_that_is_none_is_reported():
    a, b = contraction(radius=1.3), random(N, seed=1)
    with pytest.raises(SolverError, match=r"diverges: the residual .* lower `step` \(now 1\)"):
        solved(FixedPoint(), torch.eye(N, **f64) - a, b)


# Nyström


@pytest.mark.parametrize("damping", [1.0, 0.01])
def test_nystrom_with_every_column_is_the_damped_inverse(damping):
    m, b = spd(), random(N, seed=1)
    exact = torch.linalg.solve(m + damping * torch.eye(N, **f64), b)
    solution = solved(Nystrom(rank=N, damping=damping), m, b)
    torch.testing.assert_close(flat(solution.value), exact, rtol=1e-11, atol=1e-11)
    assert solution.products == N + 1


def test_nystrom_is_exact_when_the_rank_is_that_of_the_matrix():
    factor, b, damping = random(N, 3), random(N, seed=1), 0.1
    m = factor @ factor.T
    exact = torch.linalg.solve(m + damping * torch.eye(N, **f64), b)
    for rank in (3, 5, N, 10 * N):
        solution = solved(Nystrom(rank=rank, damping=damping), m, b)
        torch.testing.assert_close(flat(solution.value), exact, rtol=1e-10, atol=1e-10)
        assert solution.products == min(rank, N) + 1


@pytest.mark.parametrize("rank", [1, 4, 9])
@pytest.mark.parametrize("seed", [0, 1])
def test_nystrom_is_woodburys_formula_on_random_columns(rank, seed):
    m, b, damping = spd(), random(N, seed=1), 0.5
    chosen = torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:rank]
    c, w = m[:, chosen], m[chosen][:, chosen]
    inner = torch.linalg.solve(w + c.T @ c / damping, c.T @ b)
    woodbury = b / damping - c @ inner / damping**2  # eq. (6) of Hataya and Yamada 2023
    solution = solved(Nystrom(rank=rank, damping=damping, seed=seed), m, b)
    torch.testing.assert_close(flat(solution.value), woodbury, rtol=1e-11, atol=1e-11)


def test_nystrom_depends_on_its_seed_and_on_nothing_else():
    m, b = spd(), random(N, seed=1)
    one = flat(solved(Nystrom(rank=4, seed=1), m, b).value)
    torch.manual_seed(99)
    assert torch.equal(one, flat(solved(Nystrom(rank=4, seed=1), m, b).value))
    assert not torch.equal(one, flat(solved(Nystrom(rank=4, seed=2), m, b).value))


def test_nystrom_of_a_matrix_of_zeros_is_its_damping():
    b = random(N, seed=1)
    solution = solved(Nystrom(damping=0.5), torch.zeros(N, N, **f64), b)
    torch.testing.assert_close(flat(solution.value), 2 * b, rtol=1e-14, atol=0)


def test_nystrom_reports_a_matrix_that_is_not_positive_or_not_symmetric():
    b = random(N, seed=1)
    with pytest.raises(SolverError, match="M is not positive semi-definite: it has an eigenvalue"):
        solved(Nystrom(rank=N), spd() - 2 * torch.eye(N, **f64), b)
    with pytest.raises(SolverError, match="M is not symmetric, and `Nystrom` needs that"):
        solved(Nystrom(rank=N), nonsymmetric(), b)


# What is refused


@EVERY
def test_what_is_not_finite_is_reported(solver):
    m, b = spd(), random(N, seed=1)
    with pytest.raises(SolverError, match="nan"):
        solved(solver, m * float("nan"), b)
    with pytest.raises(SolverError, match=r"not finite|diverges"):
        solver.solve(Product(m), split(b * float("inf")), transposed=Product(m.T))


def test_the_normal_equations_need_the_transposed_product():
    with pytest.raises(ArgumentError, match="needs `transposed`, the product with Mᵀ"):
        NormalConjugateGradient().solve(Product(nonsymmetric()), split(random(N)))


@pytest.mark.parametrize("where", ["start", "matvec"])
def test_shapes_that_differ_are_refused(where):
    b, wrong = split(random(N)), [torch.ones(3, **f64)]
    arguments = {"matvec": Product(spd()), "start": None, where: wrong}
    if where == "matvec":
        arguments["matvec"] = lambda _: wrong
    with pytest.raises(ArgumentError, match=r"must have the shapes of the right-hand side. Got"):
        ConjugateGradient().solve(rhs=b, **arguments)


BAD = {
    "a negative tolerance": (FixedPoint, {"rtol": -1.0}, "`rtol` must be a finite number"),
    "a tolerance that is none": (FixedPoint, {"atol": float("nan")}, "`atol` must be a finite"),
    "negative steps": (ConjugateGradient, {"max_steps": -1}, "`max_steps` must be"),
    "a step of zero": (FixedPoint, {"step": 0.0}, "`step` must be a positive number. Got 0.0"),
    "no damping": (Nystrom, {"damping": 0.0}, "`damping` must be a positive number"),
    "no column": (Nystrom, {"rank": 0}, "`rank` must be a whole number, at least 1. Got 0"),
}


@pytest.mark.parametrize(("solver", "arguments", "message"), BAD.values(), ids=BAD)
def test_arguments_that_cannot_work_are_refused(solver, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        solver(**arguments)
