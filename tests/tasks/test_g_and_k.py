import math
import pickle

import numpy as np
import pytest
import torch
from scipy import special, stats

from mlsbi import tasks
from mlsbi.priors import sample_prior
from mlsbi.tasks.g_and_k import exact, invert, log_density, noise, octiles, quantile, taylor

OPTIONS = [{"x": x, "prior": prior} for x in ("draw", "quantiles", "draws") for prior in ("code", "paper")]


@pytest.fixture(params=OPTIONS, ids=lambda options: "-".join(options.values()))
def options(request):
    return request.param


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def prior_draws(n, seed=0):
    return sample_prior(tasks.get("g_and_k").prior, n, seed=seed).double()


def spread_around(theta, nodes):
    """Points x `(n, nodes)` from 1e6 scales below the location to 1e6 above, even in s of x = sinh(s), and dx / ds."""
    s = torch.linspace(-14.5, 14.5, nodes, dtype=torch.float64)
    return theta[:, :1] + theta[:, 1:2] * s.sinh(), theta[:, 1:2] * s.cosh() * (s[1] - s[0])


def each(x, theta):
    """Log density of every entry of x `(n, m)` on its own."""
    return log_density(x.reshape(-1, 1), theta.repeat_interleave(x.shape[1], 0)).reshape(x.shape)


def test_options_agree_on_shapes(options):
    task = tasks.get("g_and_k", draws=50, **options)
    width = {"draw": 1, "quantiles": 4, "draws": 50}[options["x"]]
    data = task.simulate((200, 100), 0)
    theta, x = task.test(100, 0)
    assert [tuple(level.fine.shape) for level in data] == [(200, width), (100, width)]
    assert x.shape == (100, width)
    assert theta.dtype == x.dtype == torch.float32
    assert torch.isfinite(x).all()
    assert data.failures == (0, 0)
    assert len(task.x_names) == x.ndim - 1
    assert task.estimator == ("nle" if options["x"] == "draw" else "npe")
    assert (task.embedding == "set") == (options["x"] == "draws")
    again = pickle.loads(pickle.dumps(task))
    assert torch.equal(again.test(5, 0)[1], x[:5])
    if options["prior"] == "paper" or options["x"] == "quantiles":
        assert task.likelihood is None
    else:
        own = task.likelihood(x, theta)
        assert own.shape == (100,)
        assert torch.equal(own, again.likelihood(x, theta))
        assert own.mean() > task.likelihood(x, theta.roll(1, 0)).mean() + 0.5  # rows of others are less likely


def test_priors_are_those_stated():
    edge = math.exp(0.5)
    for prior, tails in (("code", (edge, 3.0)), ("paper", (0.0, edge))):
        box = tasks.get("g_and_k", prior=prior).prior
        assert box.low.tolist() == pytest.approx([0, 0, 0, tails[0]])
        assert box.high.tolist() == pytest.approx([3, 3, 3, tails[1]])


def test_exact_is_the_formula():
    theta, u = prior_draws(50), noise(50, generator(), draws=20).double()
    z, (a, b, g, t) = stats.norm.ppf(u.numpy()), (column[:, None] for column in theta.numpy().T)
    expected = a + b * (1 + 0.8 * (1 - np.exp(-g * z)) / (1 + np.exp(-g * z))) * (1 + z**2) ** np.log(t) * z
    assert exact(theta, u).numpy() == pytest.approx(expected, rel=1e-12)  # float64 algebra
    assert exact(theta.float(), u.float()).dtype == torch.float32


def test_taylor_is_the_third_order_series():
    r"""The error of the cubic falls as v^5; the published code's factor pi/2 is an error of first order."""
    theta = torch.tensor([[0.0, 1.0, 0.0, 1.0]], dtype=torch.float64)  # x = z
    v = torch.tensor([[0.4, 0.2, 0.1, 0.05]], dtype=torch.float64)
    u = (v + 1) / 2
    assert taylor(theta, u)[0].numpy() == pytest.approx(
        math.sqrt(2) * math.sqrt(math.pi) / 2 * (v + math.pi / 12 * v**3)[0].numpy(), rel=1e-14)
    error = (exact(theta, u) - taylor(theta, u)).abs()[0]
    assert ((error[:-1] / error[1:]).log2() == pytest.approx(5, abs=0.2))
    published = math.sqrt(2) * math.pi / 2 * (v + math.pi / 12 * v**3)[0]
    error = (exact(theta, u)[0] - published).abs()
    assert ((error[:-1] / error[1:]).log2() == pytest.approx(1, abs=0.2))
    assert taylor(theta, torch.ones(1, 1)).item() < 1.59


def test_noise_is_uniform_and_open():
    u = noise(200_000, generator())
    assert u.dtype == torch.float32
    assert ((u > 0) & (u < 1)).all()
    assert (u * 2**24 % 2 == 1).all()  # so that 0, 1/2 and 1 cannot be drawn, however many are
    assert stats.kstest(u[:, 0].numpy(), "uniform").pvalue > 1e-3
    ends = torch.tensor([[2.0**-24, 1 - 2.0**-24]])  # the least and the greatest there are
    z = exact(torch.tensor([[0.0, 1.0, 0.0, 1.0]]), ends)[0]
    assert z.tolist() == pytest.approx([stats.norm.ppf(2.0**-24), -stats.norm.ppf(2.0**-24)], rel=1e-6)
    assert torch.isfinite(exact(torch.full((1, 4), 3.0), ends)).all()


def test_shared_noise_couples_levels_and_other_noise_does_not():
    theta, n = prior_draws(1).expand(20_000, -1), 20_000
    low, high, other = (
        level(theta, noise(n, generator(seed)))[:, 0] for level, seed in ((taylor, 0), (exact, 0), (taylor, 1))
    )
    assert stats.spearmanr(low, high).statistic > 1 - 1e-9  # both grow with u
    assert np.corrcoef(low.asinh(), high.asinh())[0, 1] > 0.9
    assert abs(np.corrcoef(other.asinh(), high.asinh())[0, 1]) < 4 / math.sqrt(n)  # 4 standard errors


def test_inverting_gives_back_what_went_in():
    theta = prior_draws(20_000)
    z = 2 * torch.randn(len(theta), 3, generator=generator(), dtype=torch.float64)
    # x is rounded at 1e-16 of the location: that is much, in units of z, where the scale is small.
    rounding = 1e-14 * (1 + theta[:, :1] / theta[:, 1:2])
    assert ((invert(quantile(z, theta), theta) - z).abs() < rounding * (1 + z.abs())).all()
    direction = torch.randn(len(theta), 1, generator=generator(), dtype=torch.float64)
    for size in (1e-30, 1e-8, 1.0, 1e3, 1e5, 1e30):
        x = theta[:, :1] + size * direction
        assert (quantile(invert(x, theta), theta) - x).abs().max() < 1e-12 * max(1.0, size)
        assert torch.isfinite(log_density(x, theta)).all()


def test_inverting_works_beyond_the_prior():
    r"""Tails of 1 and skewness of any size and sign: where the function is the least linear."""
    unit = torch.rand(50_000, 4, generator=generator(), dtype=torch.float64)
    theta = unit * torch.tensor([3.0, 3.0, 60.0, 5.0]) + torch.tensor([0.0, 1e-3, -30.0, 1.0])
    theta[:10_000, 3] = 1.0
    x = 10 * torch.randn(len(theta), 1, generator=generator(), dtype=torch.float64)
    assert (quantile(invert(x, theta), theta) - x).abs().max() < 1e-12 * 40  # 1e-12 of the largest |x|


def test_density_integrates_to_one():
    theta = prior_draws(30)
    theta[0], theta[1] = torch.tensor([0.0, 1.0, 3.0, math.exp(0.5)]), torch.tensor([3.0, 3.0, 3.0, 3.0])
    x, weight = spread_around(theta, 20_001)
    density = each(x, theta).exp()
    # The rule for smooth functions that vanish at both ends; the tails beyond 1e6 scales hold less than 1e-9.
    assert (density * weight).sum(1).numpy() == pytest.approx(1, abs=1e-8)


def test_density_is_the_slope_of_the_cdf():
    theta = prior_draws(500)
    x = quantile(torch.randn(500, 4, generator=generator(), dtype=torch.float64), theta)
    step = 1e-4 * theta[:, 1:2]
    above, below = (torch.special.ndtr(invert(x + sign * step, theta)) for sign in (1, -1))
    slope = (above - below) / (2 * step)
    # Second order in the step: 1e-8, times the third derivative of the CDF in units of the scale.
    assert each(x, theta).exp().numpy() == pytest.approx(slope.numpy(), rel=1e-4)


def test_simulated_draws_follow_the_density():
    r"""Counts of exact draws in 40 bins against the density integrated over each; the low level's must fail."""
    nodes, weights = np.polynomial.legendre.leggauss(40)
    for theta in prior_draws(3, seed=3):
        u = noise(100_000, generator())[:, 0]
        high, low = (level(theta[None], u[None])[0].numpy() for level in (exact, taylor))
        inner = np.quantile(high, np.linspace(0.01, 0.99, 39))
        points = (inner[1:] + inner[:-1])[:, None] / 2 + (inner[1:] - inner[:-1])[:, None] / 2 * nodes
        density = each(torch.from_numpy(points.reshape(-1, 1)), theta[None].expand(points.size, -1)).exp().numpy()
        mass = (density.reshape(points.shape) * weights).sum(1) * (inner[1:] - inner[:-1]) / 2
        assert mass.sum() == pytest.approx(0.98, abs=4 * math.sqrt(0.02 * 0.98 / len(high)))
        p_values = []
        for draws in (high, low):
            counts = np.histogram(draws, inner)[0]
            p_values.append(stats.chisquare(counts, mass * counts.sum() / mass.sum()).pvalue)
        assert p_values[0] > 1e-3 > p_values[1]


def test_inverted_draws_are_normal():
    task = tasks.get("g_and_k")
    theta, x = task.test(20_000, 1)
    assert stats.kstest(invert(x, theta)[:, 0].numpy(), "norm").pvalue > 1e-3
    assert stats.kstest(invert(x, theta.roll(1, 0))[:, 0].numpy(), "norm").pvalue < 1e-3
    # E[-log p], which a learned density cannot beat: the mean over 200 000 draws of other seeds is 2.141.
    loss = -task.likelihood(x, theta)
    assert abs(loss.mean() - 2.141) < 4 * loss.std() / len(loss) ** 0.5


def test_density_without_skewness_and_tails_is_normal():
    theta = torch.tensor([[1.0, 2.0, 0.0, 1.0]])
    x = torch.linspace(-20, 20, 41, dtype=torch.float64)[:, None]
    assert log_density(x, theta).numpy() == pytest.approx(stats.norm(1, 2).logpdf(x[:, 0].numpy()), rel=1e-12)


def test_rows_of_draws_add_up():
    theta = prior_draws(70)
    x = exact(theta, noise(70, generator(), draws=1000))
    together = log_density(x, theta)  # more entries than are evaluated at once
    assert torch.allclose(together, each(x, theta).sum(1), rtol=1e-12)
    assert torch.allclose(log_density(x[:1], theta), log_density(x[:1].expand(70, -1), theta), rtol=1e-12)
    assert torch.allclose(log_density(x, theta[:1]), log_density(x, theta[:1].expand(70, -1)), rtol=1e-12)


def test_no_scale_is_no_density():
    theta = torch.tensor([[1.0, 0.0, 1.0, 2.0]])
    assert log_density(torch.tensor([[2.0]]), theta).item() < -1e30
    assert not torch.isnan(log_density(torch.tensor([[1.0]]), theta)).any()


def test_octiles_are_those_of_numpy():
    x = torch.randn(30, 53, generator=generator(), dtype=torch.float64)
    e = np.quantile(x.numpy(), np.arange(9) / 8, axis=1)
    spread = e[6] - e[2]
    expected = np.stack([e[4], spread, (e[6] + e[2] - 2 * e[4]) / spread, (e[7] - e[5] + e[3] - e[1]) / spread], 1)
    assert octiles(x).numpy() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_octiles_of_a_normal_are_known():
    theta = torch.tensor([[1.0, 2.0, 0.0, 1.0]])
    u = (torch.arange(100_000, dtype=torch.float64)[None] + 0.5) / 100_000
    e = special.ndtri(np.arange(1, 8) / 8)
    expected = [1.0, 2 * 2 * 0.6744897501960817, 0.0, (e[6] - e[4] + e[2] - e[0]) / (e[5] - e[1])]
    assert octiles(exact(theta, u)).tolist()[0] == pytest.approx(expected, abs=1e-4)  # as far apart as the draws
    assert expected[3] == pytest.approx(1.2331, abs=5e-5)  # Moors, 1988
    skewed = octiles(exact(torch.tensor([[1.0, 2.0, 1.0, 2.0]]), u))[0]
    assert skewed[2] > 0.1
    assert skewed[3] > 1.3


def test_quantiles_are_the_statistics_of_the_draws():
    raw, reduced = (tasks.get("g_and_k", x=x, draws=100).simulate(20, 0).levels[1] for x in ("draws", "quantiles"))
    assert torch.equal(raw.theta, reduced.theta)
    for draws, statistics in ((raw.fine, reduced.fine), (raw.coarse, reduced.coarse)):
        # Draws are rounded to float32, beside a location much larger than their scale.
        assert torch.allclose(octiles(draws.double()).float(), statistics, rtol=1e-4, atol=1e-4)


def test_the_prior_of_the_paper_has_no_quantile_function():
    z = torch.linspace(-8, 8, 2001, dtype=torch.float64)[None].expand(2000, -1)
    turns = [
        (quantile(z, sample_prior(tasks.get("g_and_k", prior=prior).prior, 2000, seed=0)).diff(dim=1) <= 0).any(1)
        for prior in ("code", "paper")
    ]
    assert not turns[0].any()
    assert abs(turns[1].double().mean() - 0.55) < 4 * math.sqrt(0.55 * 0.45 / 2000)


@pytest.mark.parametrize(("options", "match"), [
    ({"x": "octiles"}, "x='draw', x='quantiles' or x='draws'.*'octiles'"),
    ({"prior": "box"}, "prior='code' or prior='paper'.*'box'"),
    ({"draws": 0}, "at least 1 for x='draw'; got 0"),
    ({"x": "quantiles", "draws": 7}, "at least 8 for x='quantiles'; got 7"),
    ({"x": "draws", "draws": 10.0}, "whole number of draws"),
    ({"x": "draws", "draws": True}, "whole number of draws"),
])
def test_wrong_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        tasks.get("g_and_k", **options)


@pytest.mark.parametrize(("x", "theta", "match"), [
    (torch.zeros(3, 1), torch.ones(3, 3), r"theta of shape \(n, 4\); got \(3, 3\)"),
    (torch.zeros(3), torch.ones(3, 4), r"x of shape \(n, m\).*got \(3,\)"),
    (torch.zeros(2, 1), torch.ones(3, 4), r"one per row of theta, 3; got \(2, 1\)"),
    (torch.full((1, 1), torch.nan), torch.ones(1, 4), "finite x"),
    (torch.full((1, 1), torch.inf), torch.ones(1, 4), "finite x"),
    (torch.zeros(1, 1), torch.tensor([[1.0, -1.0, 1.0, 2.0]]), "scale >= 0"),
    (torch.zeros(1, 1), torch.tensor([[1.0, 1.0, 1.0, 0.9]]), "tails >= 1"),
    (torch.zeros(1, 1), torch.tensor([[1.0, 1.0, torch.nan, 2.0]]), "finite theta"),
])
def test_wrong_arguments_are_named(x, theta, match):
    for function in (log_density, invert):
        with pytest.raises(ValueError, match=match):
            function(x, theta)
