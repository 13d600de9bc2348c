import math

import pytest
import torch

from mlsbi.strategies.stacking import Scores, stack_densities


def normal(x, mean, sd):
    return torch.distributions.Normal(mean, sd).log_prob(x)


def draws(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_true_mixture_is_found():
    """Rows from 0.7 N(-2, 1) + 0.3 N(2, 1); each candidate is one half of it."""
    x = draws(20_000)
    x = torch.where(torch.arange(len(x)) < 0.7 * len(x), x - 2, x + 2)
    found = stack_densities(Scores(torch.stack([normal(x, -2.0, 1.0), normal(x, 2.0, 1.0)])))
    # The information of a weight is about 1 / (w (1 - w)) here, so that its standard error is about 0.003.
    assert found.weights == pytest.approx((0.7, 0.3), abs=0.015)
    assert found.score > max(found.scores)


def test_no_other_weights_score_better():
    x = draws(400)
    scores = torch.stack([normal(x, mean, sd) for mean, sd in ((0.0, 0.6), (0.5, 1.0), (-1.0, 2.0))])
    found = stack_densities(Scores(scores))

    def penalised(weights):
        weights = torch.as_tensor(weights, dtype=torch.float64).clamp_min(1e-12)
        return float((scores + weights.log()[:, None]).logsumexp(0).mean() + 0.25 / 400 * weights.log().sum())

    best = penalised(found.weights)
    generator = torch.Generator().manual_seed(1)
    others = torch.distributions.Dirichlet(torch.ones(3))
    with torch.random.fork_rng():
        torch.manual_seed(int(torch.randint(1000, (1,), generator=generator)))
        assert all(penalised(weights) <= best + 1e-6 for weights in others.sample((500,)))


def test_pseudo_rows_are_shares_that_rows_outweigh():
    same = draws(1000)
    alike = stack_densities(Scores(torch.stack([same, same, same])), [1.0, 1.0, 2.0])
    assert alike.weights == pytest.approx((0.25, 0.25, 0.5), abs=1e-3)
    few, many = (stack_densities(Scores(torch.stack([same[:n], same[:n] - 1.0])), [0.5, 4.5]).weights
                 for n in (3, 1000))
    assert few[1] > 0.5
    assert many == (1.0, 0.0)


def test_many_equal_candidates_share_the_weight():
    weights = stack_densities(Scores(torch.zeros(25, 40))).weights
    assert weights == pytest.approx((0.04,) * 25)


def test_a_row_that_no_candidate_explains_says_nothing():
    good, bad = torch.zeros(200), torch.full((200,), -3.0)
    good[0] = bad[0] = -torch.inf
    found = stack_densities(Scores(torch.stack([good, bad])))
    assert found.weights == (1.0, 0.0)
    assert found.lost == 1


def test_rows_held_out_by_several_members_count_once():
    better, worse = draws(6), draws(6) - 0.5
    once = stack_densities(Scores(torch.stack([better, worse])))
    parts = [Scores(torch.stack([better[rows], worse[rows]]), most=6) for rows in (slice(4), slice(2, 6), slice(6))]
    several = stack_densities(Scores.joined([*parts, Scores(torch.stack([better[:2], worse[:2]]), most=6)]))
    assert (once.rows, several.rows) == (6, 6)
    assert several.weights == pytest.approx(once.weights, abs=0.02)  # the difference is the same in every row


def test_few_rows_leave_weights_near_equal_and_many_do_not():
    better, worse = torch.zeros(1000), torch.full((1000,), -0.7)
    few, many = (stack_densities(Scores(torch.stack([better[:n], worse[:n]]))).weights for n in (2, 1000))
    assert 0.05 < few[1] < 0.5
    assert many == (1.0, 0.0)


def test_equal_candidates_get_equal_weights_and_one_gets_all():
    same = draws(30)
    assert stack_densities(Scores(torch.stack([same] * 4))).weights == pytest.approx((0.25,) * 4, abs=1e-6)
    assert stack_densities(Scores(same[None])).weights == (1.0,)


def test_candidates_without_a_usable_score_get_nothing():
    good = torch.zeros(20)
    nan, never = torch.full((20,), torch.nan), torch.full((20,), -torch.inf)
    sometimes = torch.where(torch.arange(20) == 3, -torch.inf, 0.5)
    found = stack_densities(Scores(torch.stack([nan, good, never, sometimes])))
    assert found.weights[0] == found.weights[2] == 0.0
    assert math.isfinite(found.score)
    assert found.weights[3] > 0.5  # better at all other rows, and the mixture is not lost at that one
    with pytest.raises(ValueError, match="a finite score"):
        stack_densities(Scores(torch.stack([nan, never])))


def test_the_control_variate_finds_weights_nearer_to_those_of_many_rows():
    """Scores of pairs that go together: what few fine rows say by chance, their coarse halves say too."""
    n, m, repeats = 10, 4000, 60

    def scores(fine):
        return torch.stack([normal(fine, 0.0, 1.0), normal(fine, 0.0, 2.0)])

    target = stack_densities(Scores(scores(1.4 * draws(100_000, 99)))).weights[0]
    plain, corrected = [], []
    for seed in range(repeats):
        x, low = 1.4 * draws(n, seed), 1.4 * draws(m, 1000 + seed)
        coarse = x + 0.05 * draws(n, 2000 + seed)
        plain.append(stack_densities(Scores(scores(x))).weights[0])
        found = stack_densities(Scores(scores(x), scores(coarse), scores(low)))
        corrected.append(found.weights[0])
        assert 0 < found.factor <= 1
    errors = [torch.tensor([(weight - target) ** 2 for weight in some]).mean().sqrt() for some in (plain, corrected)]
    assert errors[1] < 0.8 * errors[0]


def test_unrelated_or_many_pairs_get_no_control_variate():
    fine, coarse, low = draws(10), draws(10, 1), draws(500, 2)
    pair = [torch.stack([part, part - 0.1]) for part in (fine, coarse, low)]
    assert stack_densities(Scores(*pair)).factor < 0.5
    many = [torch.stack([draws(200, seed), draws(200, seed) - 0.1]) for seed in (0, 0, 1)]
    assert stack_densities(Scores(*many)).factor == 0.0
    broken = [pair[0], torch.full_like(pair[1], -torch.inf), pair[2]]
    assert stack_densities(Scores(*broken)).factor == 0.0


def test_joined_scores_have_all_rows():
    one = Scores(torch.zeros(2, 3), torch.ones(2, 3), torch.zeros(2, 5))
    other = Scores(torch.zeros(2, 1), torch.ones(2, 1), torch.zeros(2, 4))
    joined = Scores.joined([one, other])
    assert joined.fine.shape == (2, 4)
    assert joined.coarse.shape == (2, 4)
    assert joined.low.shape == (2, 9)
    assert Scores.joined([one, Scores(torch.zeros(2, 1))]).coarse is None
