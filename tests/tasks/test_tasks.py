r"""What every task promises, through the registry: a new task needs no new test here."""

import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from mlsbi import tasks
from mlsbi.priors import Unbounded, check_prior, in_support
from mlsbi.tasks import Task


@pytest.fixture(params=tasks.names())
def task(request, camels_folder, monkeypatch):
    monkeypatch.setenv("MLSBI_CAMELS", str(camels_folder))
    return tasks.get(request.param)


def rows_of(task, top):
    """Few rows per level, halved from level to level."""
    return tuple(max(2, top >> level) for level in range(len(task.level_names)))


def is_in(rows, others):
    """Whether each of `rows` occurs in `others`."""
    return (rows.flatten(1)[:, None] == others.flatten(1)[None]).all(-1).any(1)


def test_describes_itself(task):
    check_prior(task.prior)
    assert task.name in tasks.names()
    assert task.title
    assert "\n" not in task.title
    assert task.citation
    assert len(set(task.level_names)) == len(task.level_names) >= 2
    assert list(task.level_costs) == sorted(task.level_costs)
    assert task.levels == tuple(zip(task.level_names, task.level_costs, strict=True))
    if task.stack is not None:
        assert (task.stack.names, task.stack.costs) == (task.level_names, task.level_costs)


def test_simulates_aligned_rows_of_one_shape(task):
    n = rows_of(task, 12)
    data = task.simulate(n, 0)
    theta, x = task.test(5, 0)
    assert data.n == n
    assert data.names == task.level_names
    assert x.shape == (5, *data.levels[0].fine.shape[1:])
    assert theta.shape == (5, task.prior.event_shape[0])
    assert torch.isfinite(x).all()
    for index, level in enumerate(data):
        assert in_support(task.prior, level.theta).all()
        assert (level.coarse is None) == (index == 0)
    assert in_support(task.prior, theta).all()
    if task.x_names is not None:
        assert len(task.x_names) == x.ndim - 1
    if task.x_axis is not None:
        assert len(task.x_axis) == x.shape[-1]


def test_pairs_are_coupled(task):
    # The levels of a row differ less than those of rows put together at random, or pairs are of no use.
    level = task.simulate(rows_of(task, 16), 0).levels[-1]
    own = (level.fine - level.coarse).abs().mean()
    other = (level.fine - level.coarse.roll(1, 0)).abs().mean()
    assert own < other


def test_is_repeatable_and_seeds_differ(task):
    n = rows_of(task, 12)
    state = torch.random.get_rng_state()
    once, again, other = task.simulate(n, 3), task.simulate(n, 3), task.simulate(n, 4)
    assert torch.equal(state, torch.random.get_rng_state())
    for a, b, c in zip(once, again, other, strict=True):
        assert torch.equal(a.theta, b.theta)
        assert torch.equal(a.fine, b.fine)
        assert not torch.equal(a.fine, c.fine)
    for (a, b, c) in zip(task.test(5, 3), task.test(5, 3), task.test(5, 4), strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_larger_n_extends_smaller(task):
    small, large = task.simulate(rows_of(task, 6), 1), task.simulate(rows_of(task, 12), 1)
    for a, b in zip(small, large.head(small.n), strict=True):
        assert torch.equal(a.theta, b.theta)
        assert torch.equal(a.fine, b.fine)
        assert a.coarse is None or torch.equal(a.coarse, b.coarse)
    for a, b in zip(task.test(4, 1), task.test(8, 1), strict=True):
        assert torch.equal(a, b[:4])


def test_rows_of_levels_and_test_rows_are_disjoint(task):
    data = task.simulate(rows_of(task, 16), 2)
    theta, x = task.test(16, 2)
    for level in data:
        assert not is_in(theta, level.theta).any()
        assert not is_in(x, level.fine).any()
    for level, above in zip(data.levels, data.levels[1:], strict=False):
        assert not is_in(level.theta, above.theta).any()
    assert is_in(theta, task.test(16, 2)[0]).all()  # the comparison can find rows


def test_budgets_can_be_simulated(task):
    assert task.budgets
    for budget in task.budgets:
        assert len(budget) == len(task.level_names)
        assert all(n >= 1 for n in budget)
        if task.stack is None:  # where only data exists, there may be too few rows
            assert task.simulate(budget, 0).n == budget
    assert len(task.test(min(task.test_rows, 20), 0)[0]) == min(task.test_rows, 20)


def test_likelihood_is_finite_and_prefers_the_right_theta(task):
    if task.likelihood is None:
        pytest.skip("no exact likelihood is known")
    theta, x = task.test(200, 0)
    value = task.likelihood(x, theta)
    assert value.shape == (200,)
    assert torch.isfinite(value).all()
    assert value.mean() > task.likelihood(x, theta.roll(1, 0)).mean()
    assert torch.equal(pickle.loads(pickle.dumps(task.likelihood))(x, theta), value)


def test_likelihood_and_reference_are_of_one_posterior(task):
    """Where both are known they differ by the prior and a constant of x."""
    if task.likelihood is None or task.reference is None:
        pytest.skip("not both are known")
    theta, x = task.test(6, 0)
    x = x[:1].expand(6, -1)
    gap = task.reference.log_prob(theta, x) - task.likelihood(x, theta) - task.prior.log_prob(theta)
    assert torch.allclose(gap, gap[:1].expand(6), atol=1e-4)


def test_survives_pickling(task):
    again = pickle.loads(pickle.dumps(task))
    assert torch.equal(again.simulate(rows_of(task, 4), 0).levels[0].fine,
                       task.simulate(rows_of(task, 4), 0).levels[0].fine)


def test_refuses_no_rows(task):
    with pytest.raises(ValueError, match="at least one|between 1"):
        task.test(0, 0)
    with pytest.raises(ValueError, match="at least one"):
        task.simulate([0] * len(task.level_names), 0)


def test_reference_is_normalised_and_samples_what_it_says(task):
    r"""Importance sampling from a heavy-tailed fit to the reference's own draws: weights must average to one."""
    if task.reference is None:
        pytest.skip(f"task '{task.name}' has no reference")
    space = Unbounded(task.prior)
    for row, x in enumerate(task.test(2, 5)[1]):
        draws = task.reference.sample(4000, x, row)
        assert torch.equal(draws, task.reference.sample(4000, x, row))
        assert in_support(task.prior, draws).all()
        z = space.to(draws).double()
        z = z[torch.isfinite(z).all(1)]  # a draw on the prior's edge has no finite coordinate
        assert len(z) > 3990
        generator = np.random.default_rng(row)
        proposal = torch.distributions.MultivariateNormal(z.mean(0), 1.5 * z.T.cov())
        noise = torch.from_numpy(generator.standard_normal((20_000, z.shape[1]))) @ proposal.scale_tril.T
        freedom = 5.0
        stretch = torch.from_numpy(generator.chisquare(freedom, (20_000, 1)) / freedom)
        points = proposal.loc + noise / stretch.sqrt()
        squared = torch.linalg.solve_triangular(proposal.scale_tril, (points - proposal.loc).T, upper=False).square()
        dim = z.shape[1]
        log_q = (math.lgamma((freedom + dim) / 2) - math.lgamma(freedom / 2) - dim / 2 * math.log(freedom * math.pi)
                 - proposal.scale_tril.logdet() - (freedom + dim) / 2 * (squared.sum(0) / freedom).log1p())
        theta = space.back(points)
        inside = in_support(task.prior, theta)
        log_p = torch.full_like(log_q, -torch.inf)
        log_p[inside] = task.reference.log_prob(theta[inside], x[None].expand(int(inside.sum()), *x.shape))
        weight = (log_p + space.log_abs_det(points, theta) - log_q).exp()
        error = weight.std() / len(weight) ** 0.5
        assert error < 0.02  # else the next line would say nothing
        assert abs(weight.mean() - 1) < 4 * error
        mean = (weight[:, None] * theta).mean(0) / weight.mean()
        # Both averages have noise: of 4000 draws, and of weights whose effective number is larger.
        assert ((mean - draws.mean(0)).abs() < 5 * draws.std(0) / 4000**0.5).all()


def test_reference_is_minus_infinity_outside_the_prior(task):
    if task.reference is None:
        pytest.skip(f"task '{task.name}' has no reference")
    theta, x = task.test(4, 0)
    assert torch.isfinite(task.reference.log_prob(theta, x)).all()
    outside = theta + 1e3
    if in_support(task.prior, outside).any():
        pytest.skip("the prior has no edge there")
    assert (task.reference.log_prob(outside, x) == -torch.inf).all()


def test_unknown_task_and_option_are_named():
    with pytest.raises(ValueError, match="ou, camels.*'banana'"):
        tasks.get("banana")
    with pytest.raises(TypeError, match="takes the options parameters; got dimension"):
        tasks.get("ou", dimension=3)


def test_listing_tasks_needs_no_torch():
    code = "import sys; from mlsbi import tasks; tasks.names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_task_checks_its_fields():
    task = tasks.get("ou")
    fields = {"title": "", "density": "nsf", "citation": ""}
    with pytest.raises(ValueError, match="budgets of 2 numbers"):
        Task.from_stack("ou", task.stack, budgets=((1, 2, 3),), **fields)
    with pytest.raises(ValueError, match="budgets of 2 numbers"):
        Task.from_stack("ou", task.stack, budgets=(), **fields)
    with pytest.raises(ValueError, match="2 level costs"):
        Task(name="ou", stack=None, prior=task.prior, level_names=("a", "b"), level_costs=(1.0,), budgets=((1, 1),),
             simulate=task.simulate, test=task.test, **fields)
