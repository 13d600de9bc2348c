import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mlsbi import tasks
from mlsbi.levels import map_noise
from mlsbi.priors import sample_prior
from mlsbi.tasks.toggle_switch import noise, run, truncated_normal

STEPS = (50, 80, 300)
USUAL = [22.0, 12.0, 4.0, 4.5, 325.0, 0.25, 0.15]  # Bonassi and West's example
LEAST, GREATEST = 2.0**-25, 1 - 2.0**-24  # of the uniforms


@pytest.fixture(scope="module")
def task():
    return tasks.get("toggle_switch")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def inverse_cdf(uniform, mean, sd):
    return stats.truncnorm.ppf(uniform, -mean / sd, np.inf, loc=mean, scale=sd)


def simulate_one(theta, path, last, steps, scale=1.0):
    """The task's formulas at one theta, as they are written."""
    alpha_1, alpha_2, beta_1, beta_2, mu, sigma, gamma = theta
    u = v = 10.0
    for t in range(steps):
        mean_u = u + alpha_1 / (1 + v**beta_1) - (1 + 0.03 * u)
        mean_v = v + alpha_2 / (1 + u**beta_2) - (1 + 0.03 * v)
        u, v = inverse_cdf(path[0, t], mean_u, 0.5 * scale), inverse_cdf(path[1, t], mean_v, 0.5 * scale)
    return min(inverse_cdf(last[0], mu + u, scale * mu * sigma / u**gamma), 2000.0)


@pytest.mark.parametrize("sd", ["paper", "code"])
def test_levels_are_the_formulas(sd):
    task = tasks.get("toggle_switch", sd=sd)
    scale = {"paper": 1.0, "code": 1 / math.sqrt(2)}[sd]
    theta, uniforms = sample_prior(task.prior, 4, seed=1), noise(4, generator(1))
    rows = [array.double().numpy() for array in (theta, uniforms["path"], uniforms["last"])]
    for level, steps in zip(task.stack.levels, STEPS, strict=True):
        x = level.simulate(theta, uniforms)
        expected = [simulate_one(*row, steps, scale) for row in zip(*rows, strict=True)]
        assert x.shape == (4, 1)
        assert x[:, 0].tolist() == pytest.approx(expected, rel=1e-6)  # x is float32
    assert expected != pytest.approx([simulate_one(*row, 299, scale) for row in zip(*rows, strict=True)], rel=1e-6)


def test_costs_are_the_published_ones(task):
    assert task.level_costs == STEPS
    costs = [sum(n * cost for n, cost in zip(budget, task.stack.row_costs, strict=True)) for budget in task.budgets]
    assert costs == [603_000, 603_000, 603_120]
    assert (task.estimator, task.test_rows, task.x_transform) == ("nle", 1000, "none")
    assert task.likelihood is task.reference is None
    assert list(task.prior.names) == ["alpha_1", "alpha_2", "beta_1", "beta_2", "mu", "sigma", "gamma"]


@settings(deadline=None, max_examples=100)
@given(st.floats(-3.0, 50.0), st.floats(-6.0, 6.0), st.floats(LEAST, GREATEST))
def test_truncated_normal_is_that_of_scipy(ratio, log_sd, uniform):
    sd = math.exp(log_sd)
    x = truncated_normal(*(torch.tensor([value], dtype=torch.float64) for value in (ratio * sd, sd, uniform))).item()
    assert x > 0
    # Rounding is some 1e-16 of sd, and x may be as small as 1e-8 of it.
    assert x == pytest.approx(inverse_cdf(uniform, ratio * sd, sd), rel=1e-6)


def test_truncated_normal_has_its_law_and_grows_with_the_uniform():
    uniform = torch.rand(4000, generator=generator(), dtype=torch.float64)
    for ratio in (-2.8, 0.0, 1.0, 30.0):
        x = truncated_normal(torch.full_like(uniform, ratio), torch.ones_like(uniform), uniform)
        assert stats.kstest(x.numpy(), stats.truncnorm(-ratio, np.inf, loc=ratio).cdf).pvalue > 1e-3
        assert (x[uniform.argsort()].diff() > 0).all()
    assert stats.kstest(x.numpy(), stats.norm(30.5).cdf).pvalue < 1e-3  # the test can see another law


def test_single_precision_would_not_do():
    """What the formula gives in float32, as the upper tail and what is next to zero are lost."""
    mean, sd, uniform = torch.tensor([10.0, -1.0, -1.0]), torch.full((3,), 0.5), torch.tensor([GREATEST, LEAST, 1e-7])
    cdf = torch.special.ndtr(-mean / sd)
    coarse = mean + sd * torch.special.ndtri(cdf + uniform * (1 - cdf))
    assert not (torch.isfinite(coarse) & (coarse > 0)).all()
    fine = truncated_normal(mean, sd, uniform)
    assert (torch.isfinite(fine) & (fine > 0)).all()


def test_published_code_has_narrower_noise():
    r"""The inverse CDF by erf(x / s) is that of a normal with standard deviation s / sqrt(2)."""
    mean, uniform = torch.linspace(-1, 2, 50, dtype=torch.float64), torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    sd = torch.full_like(mean, 0.5)
    below = torch.erf(-mean / sd)
    published = mean + sd * torch.erfinv(below + uniform * (1 - below))
    assert torch.allclose(truncated_normal(mean, sd / math.sqrt(2), uniform), published, rtol=1e-9)
    assert not torch.allclose(truncated_normal(mean, sd, uniform), published, rtol=1e-2)


def test_outputs_are_finite_and_positive_at_every_corner_of_the_prior(task):
    edges = zip(task.prior.low.tolist(), task.prior.high.tolist(), strict=True)
    corners = torch.tensor(list(itertools.product(*edges)))
    n = len(corners)
    one = torch.ones(n, 2, 300)
    paths = [LEAST * one, GREATEST * one, torch.stack([LEAST * one[:, 0], GREATEST * one[:, 1]], 1),
             torch.stack([GREATEST * one[:, 0], LEAST * one[:, 1]], 1), noise(n, generator())["path"]]
    for path, last, level in itertools.product(paths, (LEAST, 0.5, GREATEST), task.stack.levels):
        x = level.simulate(corners, {"path": path, "last": torch.full((n, 1), last)})
        assert torch.isfinite(x).all()
        assert ((x > 0) & (x <= 2000)).all()
    assert (x == 2000).any()


def test_noise_is_uniform_and_open(monkeypatch):
    drawn = noise(2000, generator())
    assert {name: tuple(tensor.shape) for name, tensor in drawn.items()} == {"path": (2000, 2, 300), "last": (2000, 1)}
    for tensor in drawn.values():
        assert tensor.dtype == torch.float32
        assert ((tensor > 0) & (tensor < 1)).all()
        assert stats.kstest(tensor.flatten()[:10_000].numpy(), "uniform").pvalue > 1e-3
    assert len(drawn["path"][0].unique()) == 600
    monkeypatch.setattr(torch, "rand", lambda shape, generator: torch.zeros(shape))  # once in 16 million draws
    assert (noise(3, generator())["path"] == LEAST).all()


def test_shorter_paths_read_the_first_uniforms(task):
    theta, uniforms, other = sample_prior(task.prior, 30, seed=0), noise(30, generator()), noise(30, generator(1))

    def outputs(until, last):
        """Of the levels, where uniforms from step `until` on are others."""
        mixed = torch.cat([uniforms["path"][:, :, :until], other["path"][:, :, until:]], 2)
        return [level.simulate(theta, {"path": mixed, "last": last["last"]}) for level in task.stack.levels]

    own = outputs(300, uniforms)
    for until, kept in ((80, [True, True, False]), (50, [True, False, False]), (49, [False, False, False])):
        same = [torch.equal(x, y) for x, y in zip(outputs(until, uniforms), own, strict=True)]
        assert same == kept
    assert not any(torch.isclose(x, y).any() for x, y in zip(outputs(300, other), own, strict=True))


def test_shared_noise_couples_levels_and_other_noise_does_not(task):
    n = 4000
    theta = torch.tensor([USUAL]).expand(n, -1)
    own, other = noise(n, generator()), noise(n, generator(1))
    outputs = [run(theta, own, steps)[:, 0] for steps in STEPS]
    for low, high, steps in zip(outputs, outputs[1:], STEPS, strict=False):
        apart = run(theta, other, steps)[:, 0]
        assert np.corrcoef(low, high)[0, 1] > 0.9
        assert abs(np.corrcoef(apart, high)[0, 1]) < 4 / math.sqrt(n)  # 4 standard errors
        last_alone = run(theta, {"path": other["path"], "last": own["last"]}, steps)[:, 0]
        assert np.corrcoef(last_alone, high)[0, 1] < np.corrcoef(low, high)[0, 1]  # the path's noise is shared too


def test_coarse_halves_have_the_law_of_the_level_below(task):
    data = task.simulate(8000, 11)
    for below, above in zip(data.levels, data.levels[1:], strict=False):
        plain, coarse, fine = (x[:, 0].numpy() for x in (below.fine, above.coarse, above.fine))
        assert stats.ks_2samp(plain, coarse).pvalue > 1e-3
        assert stats.ks_2samp(plain, fine).pvalue < 1e-5  # the test can tell levels apart


def test_simulators_are_pure_and_treat_rows_alone(task):
    theta, uniforms = sample_prior(task.prior, 37, seed=1), noise(37, generator(1))
    before = theta.clone(), map_noise(torch.clone, uniforms)
    for level in task.stack.levels:
        x = level.simulate(theta, uniforms)
        assert x.dtype == torch.float32
        assert torch.equal(theta, before[0])
        assert all(torch.equal(uniforms[name], before[1][name]) for name in uniforms)
        for rows in (slice(0, 5), slice(7, 8), slice(11, 37)):
            part = {name: tensor[rows] for name, tensor in uniforms.items()}
            assert torch.equal(level.simulate(theta[rows], part), x[rows])


def test_wrong_options_are_named():
    with pytest.raises(ValueError, match="sd='paper' or sd='code' for task 'toggle_switch'; got 'half'"):
        tasks.get("toggle_switch", sd="half")
