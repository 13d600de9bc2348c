import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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
    weights = solve_weights(n, f, c, cov).numpy()
    assert weights[-1] == 1.0
    best = estimator_variance(weights, n, f, c, cov)
    rng = np.random.default_rng(0)
    for _ in range(20):
        other = weights + np.append(0.05 * rng.standard_normal(len(n) - 1), 0.0)
        assert estimator_variance(other, n, f, c, cov) >= best * (1 - 1e-10)


def test_levels_without_variance_get_weight_zero():
    assert solve_weights([10, 10], [0.0, 1.0], [0.0, 0.0], [0.0, 0.0]).tolist() == [0.0, 1.0]


@settings(deadline=None, max_examples=20)
@given(st.lists(moments(), min_size=2, max_size=4))
def test_weights_of_several_problems_are_those_of_each(cases):
    levels = min(len(case[0]) for case in cases)
    n = cases[0][0][:levels]
    parts = [np.stack([case[part][:levels] for case in cases]) for part in (1, 2, 3)]
    together = solve_weights(n, *parts)
    assert together.dtype == torch.float64
    for row, one in enumerate(together):
        assert torch.allclose(one, solve_weights(n, *(part[row] for part in parts)), rtol=1e-9, atol=1e-9)


def test_one_level_has_weight_one():
    assert solve_weights([5], [[2.0], [3.0]], [[0.0], [0.0]], [[0.0], [0.0]]).tolist() == [[1.0], [1.0]]


def halves(n0, n1, agree, seed=0):
    """Losses of one member, `(1, rows)`; a pair's go together as `agree` says."""
    g = torch.Generator().manual_seed(seed)
    low, coarse = torch.randn(1, n0, generator=g), torch.randn(1, n1, generator=g)
    return [low, agree * coarse + (1 - agree**2) ** 0.5 * torch.randn(1, n1, generator=g), coarse]


def weight(lagged, member=0, level=0):
    return lagged.current[member, level].item()


def stacked(*members):
    return [torch.cat(parts) for parts in zip(*members, strict=True)]


def test_lagged_weights_do_not_see_the_rows_they_multiply():
    lagged = LaggedWeights([100, 10])
    assert lagged.current.tolist() == [[1.0, 1.0]]  # the published objective, before anything is known
    lagged.update(halves(100, 10, agree=1.0))
    assert weight(lagged) == pytest.approx(100 / 110, abs=0.01)  # full correlation: n_0 / (n_0 + n_1)
    assert weight(lagged, level=1) == 1.0


def test_weights_follow_the_correlation_of_many_pairs():
    for agree in (0.0, 0.5, 0.9):
        lagged = LaggedWeights([10**6, 1000])
        lagged.update(halves(20_000, 5000, agree))
        assert weight(lagged) == pytest.approx(agree, abs=0.05)  # three standard errors of both variances


def test_few_pairs_keep_to_the_published_objective():
    few, many = LaggedWeights([1000, 10]), LaggedWeights([1000, 10])
    few.update(halves(200, 3, agree=0.0))
    many.update(halves(200, 300, agree=0.0))
    assert weight(few) > 0.5 > 0.1 > weight(many)


def test_one_pair_is_enough_and_weights_stay_between_zero_and_one():
    lagged = LaggedWeights([100, 4])
    lagged.update(halves(30, 1, agree=1.0))
    assert weight(lagged) == pytest.approx(100 / 104, abs=0.01)
    lagged.update([torch.randn(1, 30), -torch.arange(9.0)[None], torch.arange(9.0)[None]])
    assert 0.0 <= weight(lagged) <= 1.0


def test_weights_are_smoothed():
    lagged = LaggedWeights([10**6, 1000])
    lagged.update(halves(5000, 5000, agree=1.0))
    lagged.update(halves(5000, 5000, agree=0.0))
    assert weight(lagged) == pytest.approx(0.8, abs=0.05)


def three_levels(seed, agree=0.8):
    g = torch.Generator().manual_seed(seed)
    low, (middle, twin), (top, below) = torch.randn(1, 40, generator=g), torch.randn(2, 1, 12, generator=g), \
        torch.randn(2, 1, 6, generator=g)
    return [low, agree * twin + 0.5 * middle, twin, agree * below + 0.5 * top, below]


@pytest.mark.parametrize("n", [(100, 10), (100, 20, 5)])
def test_members_have_the_weights_that_each_would_have_alone(n):
    make = three_levels if len(n) == 3 else lambda seed: halves(40, 8, 0.7, seed)
    together, alone = LaggedWeights(n, members=3), [LaggedWeights(n) for _ in range(3)]
    for step in range(4):
        seen = [make(10 * member + step) for member in range(3)]
        together.update(stacked(*seen))
        for one, losses in zip(alone, seen, strict=True):
            one.update(losses)
        assert torch.allclose(together.current, torch.cat([one.current for one in alone]), atol=1e-12)
    assert len({round(value, 6) for value in together.current[:, 0].tolist()}) == 3


def test_three_levels_follow_their_correlations():
    lagged = LaggedWeights([10**6, 10**4, 100])
    g = torch.Generator().manual_seed(0)
    low, twin, below = (torch.randn(1, 20_000, generator=g) for _ in range(3))
    noise, other = (torch.randn(1, 20_000, generator=g) for _ in range(2))
    lagged.update([low, 0.6 * twin + 0.8 * noise, twin, 0.9 * below + 0.4 * other, below])
    # Rows of a level are far more than those above it: each weight is the slope times that of the level above.
    assert weight(lagged, level=1) == pytest.approx(0.9, abs=0.03)
    assert weight(lagged, level=0) == pytest.approx(0.9 * 0.6, abs=0.03)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("half", [0, 1, 2])
def test_losses_that_are_not_finite_change_the_weights_of_no_other_member(bad, half):
    lagged, sound = LaggedWeights([100, 10], members=3), LaggedWeights([100, 10], members=3)
    first = stacked(*(halves(40, 8, 0.5, seed) for seed in range(3)))
    for one in (lagged, sound):
        one.update(first)
    before = lagged.current.clone()
    second = stacked(*(halves(40, 8, 0.1, seed) for seed in range(3, 6)))
    sound.update(second)
    second[half][1, 2] = bad
    lagged.update(second)
    assert lagged.current[1].tolist() == before[1].tolist()
    assert torch.equal(lagged.current[[0, 2]], sound.current[[0, 2]])
    assert not torch.equal(lagged.current[[0, 2]], before[[0, 2]])
    # Its next finite losses count as if the others had not been.
    third = stacked(*(halves(40, 8, 0.9, seed) for seed in range(6, 9)))
    alone = LaggedWeights([100, 10])
    for losses in (first, third):
        alone.update([part[1:2] for part in losses])
    lagged.update(third)
    assert torch.allclose(lagged.current[1:2], alone.current, atol=1e-12)


def test_losses_that_are_not_finite_at_first_leave_the_published_objective():
    lagged = LaggedWeights([100, 10])
    lagged.update([torch.full((1, 5), math.nan), torch.zeros(1, 3), torch.zeros(1, 3)])
    assert lagged.current.tolist() == [[1.0, 1.0]]
    lagged.update(halves(100, 10, agree=1.0))
    assert weight(lagged) == pytest.approx(100 / 110, abs=0.01)


def test_one_level_keeps_weight_one():
    lagged = LaggedWeights([100], members=2)
    lagged.update([torch.randn(2, 9)])
    assert lagged.current.tolist() == [[1.0], [1.0]]


def test_weights_go_on_from_what_was_kept_and_with_some_of_the_members():
    lagged, other = LaggedWeights([100, 10], members=3), LaggedWeights([100, 10], members=2)
    lagged.update(stacked(*(halves(40, 8, 0.5, seed) for seed in range(3))))
    kept = {name: tensor.clone() for name, tensor in lagged.tensors().items()}
    lagged.select([2, 0])
    assert torch.equal(lagged.current, kept["weights"][[2, 0]])
    other.load({name: tensor[[2, 0]] for name, tensor in kept.items()})
    following = stacked(*(halves(40, 8, 0.2, seed) for seed in (5, 6)))
    for one in (lagged, other):
        one.update(following)
    assert torch.equal(lagged.current, other.current)
