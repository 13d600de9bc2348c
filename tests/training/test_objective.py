import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsbi.training.gradients import combine_gradients, project, rescale
from mlsbi.training.objective import Term, batch_terms, split_terms, telescope
from mlsbi.training.weights import LaggedWeights, solve_weights


def estimator_variance(weights, n, f, c, cov):
    a, before = np.asarray(weights), np.concatenate([[0.0], weights[:-1]])
    return float((a**2 * f / n + before**2 * c / n - 2 * a * before * cov / n).sum())


@st.composite
def moments(draw):
    levels = draw(st.integers(2, 5))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    n = rng.integers(2, 5000, levels)
    f, c = rng.uniform(0.1, 9, levels), rng.uniform(0.1, 9, levels)
    cov = rng.uniform(-0.99, 0.99, levels) * np.sqrt(f * c)
    c[0] = cov[0] = 0.0
    return n, f, c, cov


@settings(deadline=None)
@given(moments())
def test_solved_weights_minimise_the_variance(case):
    n, f, c, cov = case
    weights = solve_weights(n, f, c, cov)
    assert weights[-1] == 1.0
    best = estimator_variance(weights, n, f, c, cov)
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = weights + np.append(0.05 * rng.standard_normal(len(n) - 1), 0.0)
        assert estimator_variance(other, n, f, c, cov) >= best * (1 - 1e-10)


def test_levels_without_variance_get_weight_zero():
    assert solve_weights([10, 10], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]).tolist() == [0.0, 1.0]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(-2, 2), min_size=2, max_size=2), st.integers(0, 10**6))
def test_telescope_is_unbiased_for_any_fixed_weights(weights, seed):
    rng = np.random.default_rng(seed)
    exact = 3.0
    estimates = []
    for _ in range(400):
        u = [rng.standard_normal(n) for n in (20, 10, 5)]
        f = [torch.as_tensor(level + (1 + level) * u[max(level, 0)]) for level in range(3)]
        f = [
            torch.as_tensor(1 + 1.0 * u[0]),
            torch.as_tensor(2 + 1.5 * u[1]), torch.as_tensor(1 + 1.0 * u[1]),
            torch.as_tensor(3 + 2.0 * u[2]), torch.as_tensor(2 + 1.5 * u[2]),
        ]
        estimates.append(float(telescope(f, [*weights, 1.0])))
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - exact) < 5 * error  # 25 examples at five standard errors: 1e-5


def test_swapped_levels_are_biased():
    low, high, twin = torch.full((5,), 1.0), torch.full((3,), 2.0), torch.full((3,), 1.0)
    assert telescope([low, high, twin], [1.0, 1.0]).item() == 2.0
    assert telescope([low, twin, high], [1.0, 1.0]).item() != 2.0


def halves(n0, n1, agree, seed=0):
    g = torch.Generator().manual_seed(seed)
    low, coarse = torch.randn(n0, generator=g), torch.randn(n1, generator=g)
    return [low, agree * coarse + (1 - agree**2) ** 0.5 * torch.randn(n1, generator=g), coarse]


def test_lagged_weights_do_not_see_the_rows_they_multiply():
    lagged = LaggedWeights([100, 10])
    assert lagged.current == (1.0, 1.0)  # the published objective, before anything is known
    lagged.update(halves(100, 10, agree=1.0))
    assert lagged.current[0] == pytest.approx(100 / 110, abs=0.01)  # full correlation: n_0 / (n_0 + n_1)
    assert lagged.current[1] == 1.0


def test_weights_follow_the_correlation_of_many_pairs():
    for agree in (0.0, 0.5, 0.9):
        lagged = LaggedWeights([10**6, 1000])
        lagged.update(halves(20_000, 5000, agree))
        assert lagged.current[0] == pytest.approx(agree, abs=0.05)  # three standard errors of both variances


def test_few_pairs_keep_to_the_published_objective():
    few, many = LaggedWeights([1000, 10]), LaggedWeights([1000, 10])
    few.update(halves(200, 3, agree=0.0))
    many.update(halves(200, 300, agree=0.0))
    assert few.current[0] > 0.5 > 0.1 > many.current[0]


def test_one_pair_is_enough_and_weights_stay_between_zero_and_one():
    lagged = LaggedWeights([100, 4])
    lagged.update(halves(30, 1, agree=1.0))
    assert lagged.current[0] == pytest.approx(100 / 104, abs=0.01)
    lagged.update([torch.randn(30), -torch.arange(9.0), torch.arange(9.0)])
    assert 0.0 <= lagged.current[0] <= 1.0


def test_weights_are_smoothed():
    lagged = LaggedWeights([10**6, 1000])
    lagged.update(halves(5000, 5000, agree=1.0))
    lagged.update(halves(5000, 5000, agree=0.0))
    assert lagged.current[0] == pytest.approx(0.8, abs=0.05)


def terms(n0=40, n1=10):
    g = torch.Generator().manual_seed(0)
    return [
        Term(torch.randn(n0, 2, generator=g), torch.randn(n0, 3, generator=g)),
        Term(torch.randn(n1, 2, generator=g), torch.randn(n1, 3, generator=g), torch.randn(n1, 3, generator=g)),
    ]


def test_splits_keep_pairs_together_and_lose_nothing():
    kept, held = split_terms(terms(), 0.2, torch.Generator().manual_seed(1))
    assert [len(t) for t in kept] == [32, 8]
    assert [len(t) for t in held] == [8, 2]
    original = terms()[1]
    for part in (kept[1], held[1]):
        for row in range(len(part)):
            index = int((original.input == part.input[row]).all(1).nonzero())
            assert torch.equal(part.fine[row], original.fine[index])
            assert torch.equal(part.coarse[row], original.coarse[index])


def test_members_hold_every_row_out_equally_often():
    counts = torch.zeros(10)
    for member in range(5):
        _, held = split_terms(terms(), 0.2, torch.Generator().manual_seed(1), member=member, members=5)
        counts += (terms()[1].input[:, None] == held[1].input[None]).all(-1).any(1)
    assert counts.tolist() == [1.0] * 10


def test_two_rows_are_the_least_to_split():
    kept, held = split_terms(terms(n1=2), 0.1, torch.Generator())
    assert (len(kept[1]), len(held[1])) == (1, 1)
    with pytest.raises(ValueError, match="at least 2 rows in term 1"):
        split_terms(terms(n1=1), 0.1, torch.Generator())


def test_batch_joins_halves_in_order():
    parts = terms()
    batch = batch_terms(parts)
    assert batch.sizes == (40, 10, 10)
    (_, c0), (i1, c1), (i2, c2) = batch.halves()
    assert torch.equal(c0, parts[0].fine)
    assert torch.equal(c1, parts[1].fine)
    assert torch.equal(c2, parts[1].coarse)
    assert torch.equal(i1, i2)


vectors = st.integers(0, 10**6).map(lambda s: torch.randn(2, 6, generator=torch.Generator().manual_seed(s)))


@given(vectors)
def test_projected_gradients_do_not_conflict(pair):
    base, correction = pair
    new_base, new_correction, conflict = project(base, correction)
    assert bool(conflict) == bool(base @ correction < 0)
    if conflict:
        assert (new_base @ correction).item() == pytest.approx(0.0, abs=1e-5)  # float32
        assert (new_correction @ base).item() == pytest.approx(0.0, abs=1e-5)
    else:
        assert torch.equal(new_base, base)
        assert torch.equal(new_correction, correction)


@given(vectors)
def test_rescaled_gradient_keeps_direction_and_takes_length(pair):
    coarse, fine = pair
    new = rescale(coarse, fine)
    assert new.norm().item() == pytest.approx(fine.norm().item(), rel=1e-5)
    assert torch.nn.functional.cosine_similarity(new, coarse, dim=0).item() == pytest.approx(1.0, abs=1e-5)


def test_zero_gradients_are_harmless():
    zero = torch.zeros(3)
    combined = combine_gradients([zero, zero, zero], [1.0, 1.0], use_rescale=True, use_project=True)
    assert torch.equal(combined.gradient, zero)
    assert combined.cosine.item() == 0.0


def test_without_adjustments_the_step_is_the_gradient_of_the_telescope():
    g = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    weights = [0.3, 0.6, 1.0]
    combined = combine_gradients(list(g), weights, use_rescale=False, use_project=False)
    exact = 0.3 * g[0] + 0.6 * g[1] - 0.3 * g[2] + g[3] - 0.6 * g[4]
    assert torch.allclose(combined.gradient, exact, atol=1e-6)
    assert not bool(combined.projected)


def test_rescaling_does_not_cancel_the_weights():
    fine, coarse = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 5.0])
    combined = combine_gradients([torch.zeros(2), fine, coarse], [0.5, 1.0], use_rescale=True, use_project=False)
    assert combined.gradient.tolist() == [1.0, -0.5]
