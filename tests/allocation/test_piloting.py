import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from stacks import SMALL, exact, off, stack
from torch import nn

from mlsbi import BoxPrior, Level, LevelStack, open_store, optimal_allocation, pilot, simulate
from mlsbi.allocation import networks, piloting
from mlsbi.allocation.checking import consistency
from mlsbi.allocation.integrands import resolve_integrand
from mlsbi.allocation.moments import compact, measure
from mlsbi.allocation.networks import STATES, fold_of
from mlsbi.allocation.piloting import FEWEST, pilot_cost
from mlsbi.density.mixture_density import MDN

MIXTURE = MDN(components=2, hidden=8, layers=1)


def total(theta, x):
    return x.sum(1)


INTEGRANDS = ("loss", "gradient", "output", total)


def run(levels, n=64, seed=0, **options):
    return pilot(levels, n, seed=seed, **{"density": MIXTURE, "progress": False, **options})


@pytest.fixture(scope="module")
def report():
    return run(stack(off(0.2), exact), density=SMALL)


def alike(one, other):
    """Whether two reports are the same, bit for bit."""
    assert one.to_frame().equals(other.to_frame())
    assert one.spent == other.spent
    assert str(one) == str(other)
    assert (one.losses is None) == (other.losses is None)
    assert one.losses is None or np.array_equal(one.losses, other.losses)
    for state, moments in one.states.items():
        for name, values in vars(moments).items():
            assert np.array_equal(values, getattr(other.states[state], name), equal_nan=True)
    for mine, others in zip(one.data, other.data, strict=True):
        assert torch.equal(mine.theta, others.theta)
        assert torch.equal(mine.fine, others.fine)
    return True


# What it measures


def test_moments_are_those_of_the_losses_within_folds(report):
    f, fold = report.losses, fold_of(64).numpy()
    assert f.dtype == np.float64
    assert f.shape == (64, 2)

    def pooled(statistic):
        return (statistic(f[fold == 0]) + statistic(f[fold == 1])) / 2

    assert report.variances[0] == pytest.approx(pooled(lambda own: own[:, 0].var(ddof=1)))
    assert report.variances[1] == pytest.approx(pooled(lambda own: (own[:, 1] - own[:, 0]).var(ddof=1)))
    assert report.covariance == pytest.approx(pooled(lambda own: np.cov(own.T)))
    assert report.single_level_variance == report.covariance[1, 1]
    assert report.correlations[0] == pytest.approx(report.covariance[0, 1] / np.sqrt(np.diag(report.covariance).prod()))


def test_outputs_have_the_variance_that_numpy_gives():
    report = run(stack(off(0.2), exact), integrand="output")
    cheap, fine = (x.double().numpy() for x in report.outputs)
    everything = np.concatenate([cheap, fine, report.data.levels[0].fine.double().numpy()])
    for at, values in enumerate((cheap, fine - cheap)):
        expected = (values / everything.std(0)).var(0, ddof=1).sum()
        assert report.variances[at] == pytest.approx(expected, rel=1e-6)


def test_a_function_has_the_variance_that_numpy_gives():
    report = run(stack(off(0.2), exact), integrand=total)
    assert report.integrand == "total"
    assert report.losses is None
    y = (report.outputs[1] - report.outputs[0]).double().sum(1).numpy()
    assert report.variances[1] == pytest.approx(y.var(ddof=1), rel=1e-5)
    assert list(report.states) == ["total"]


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("integrand", ["loss", "gradient"])
def test_every_state_is_measured_on_rows_its_networks_have_not_seen(integrand, monkeypatch):
    """By hand, with the networks of each state."""
    expected, train_states = {}, piloting.train_states
    kept = {}

    def spy(reader, levels, **options):
        joint = [sets[0] for sets in levels]
        together = reader.rows(joint[0].theta, [rows.outputs[0] for rows in joint])
        kept["fold"] = fold_of(len(together))
        for state, trained in train_states(reader, levels, **options):
            folds = [compact(resolve_integrand(integrand).blocks(network, together.rows(kept["fold"] == own)))
                     for own, network in enumerate(trained)]
            expected[state] = measure(folds, seed=0)
            yield state, trained

    monkeypatch.setattr(piloting, "train_states", spy)
    report = run(stack(off(0.2), exact), 17, integrand=integrand)
    assert tuple(report.states) == tuple(expected) == STATES
    for state, moments in report.states.items():
        assert np.array_equal(moments.variances, expected[state].variances)
        assert np.array_equal(moments.covariance, expected[state].covariance)
    assert np.array_equal(report.variances, report.states["after the pilot"].variances)
    assert not np.allclose(report.variances, report.states["untrained"].variances)
    assert kept["fold"].tolist() == [row % 2 for row in range(17)]


@pytest.mark.usefixtures("brief")
def test_networks_are_trained_on_all_rows_that_were_run(monkeypatch):
    given, train_states = [], piloting.train_states

    def spy(reader, levels, *, seed, **options):
        given.append(([[rows.outputs[0] for rows in sets] for sets in levels], seed))
        return train_states(reader, levels, seed=seed, **options)

    monkeypatch.setattr(piloting, "train_states", spy)
    report, _ = (run(stack(off(0.4), off(0.1), exact), 16, seed=seed) for seed in (0, 1))
    (levels, seed), (_, other) = given
    assert [len(sets) for sets in levels] == [2, 2, 1]
    for joint, sets in zip(report.outputs, levels, strict=True):
        assert torch.equal(sets[0], joint)
        assert all(len(rows) == 16 and not torch.isin(rows, joint).any() for rows in sets[1:])
    assert torch.equal(levels[0][1], report.data.levels[0].fine)
    assert seed != other


@pytest.mark.slow
def test_the_variance_of_a_gradient_has_many_components(report):
    gradient = run(stack(off(0.2), exact), integrand="gradient", density=SMALL)
    assert gradient.integrand == "gradient"
    assert np.array_equal(gradient.losses, report.losses)  # the same networks
    assert not np.allclose(gradient.variances / report.variances, 1, rtol=0.1)
    assert np.array_equal(gradient.consistency, report.consistency)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("integrand", INTEGRANDS, ids=lambda each: getattr(each, "__name__", each))
def test_close_levels_have_small_corrections(integrand):
    near, far = (run(stack(off(amount), exact), 32, integrand=integrand) for amount in (0.01, 0.5))
    assert near.variances[1] < 0.1 * far.variances[1]
    assert near.correlations[0] > far.correlations[0]


@pytest.mark.parametrize("estimator", ["npe", "nle"])
@pytest.mark.parametrize("integrand", INTEGRANDS, ids=lambda each: getattr(each, "__name__", each))
@pytest.mark.usefixtures("brief")
def test_identical_levels_have_no_correction_at_all(integrand, estimator):
    report = run(stack(off(0.2), off(0.2), exact), 16, integrand=integrand, estimator=estimator)
    for moments in report.states.values():
        assert moments.variances[1] == 0.0
        assert (moments.draws[:, 1] == 0).all()
        assert math.isnan(moments.kurtosis[1])
        assert moments.variances[2] > 0
    assert any("'level 1' adds nothing" in warning for warning in report.warnings)
    assert not any("'level 2' adds nothing" in warning for warning in report.warnings)


@pytest.mark.usefixtures("brief")
def test_no_more_rows_are_bought_of_a_level_that_adds_nothing():
    report = run(stack(exact, exact), 32)
    assert optimal_allocation(report, budget=2000).n[1] == 32  # the pilot's own rows


def test_simulators_in_float64_keep_tiny_differences():
    """Levels that differ by a factor 1 + 1e-10, for numbers of size one."""
    def double(theta, noise):
        return exact(theta.double(), noise.double())

    def nearly(theta, noise):
        return double(theta, noise) * (1 + 1e-10)

    for integrand in ("output", total):
        report = run(stack(nearly, double), 32, integrand=integrand)
        assert report.variances[1] == pytest.approx(1e-20 * report.variances[0], rel=1e-4)
    single = run(stack(lambda theta, noise: nearly(theta, noise).float(), lambda *both: double(*both).float()), 32,
                 integrand="output")
    assert not 0.5 < single.variances[1] / (1e-20 * single.variances[0]) < 2


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("integrand", ["loss", "gradient"])
def test_networks_keep_tiny_differences(integrand):
    """Of the same untrained networks, a difference a thousand times smaller has a millionth of the variance."""
    variances = []
    for step in (1e-5, 1e-8):
        levels = stack(lambda theta, noise, step=step: exact(theta.double(), noise.double()) + step * noise.sin(),
                       lambda theta, noise: exact(theta.double(), noise.double()))
        variances.append(run(levels, 16, integrand=integrand).states["untrained"].variances[1])
    assert variances[1] == pytest.approx(1e-6 * variances[0], rel=1e-3)


@pytest.mark.usefixtures("brief")
def test_a_likelihoods_pilot_measures_a_likelihoods_loss():
    """The coupling shows in the loss of x given theta as in a posterior's, on the same rows."""
    near, far = (run(stack(off(amount), exact), estimator="nle") for amount in (0.01, 0.5))
    assert near.variances[1] < 0.1 * far.variances[1]
    posterior = run(stack(off(0.01), exact))
    assert not np.allclose(near.losses, posterior.losses)
    assert torch.equal(near.data.levels[1].fine, posterior.data.levels[1].fine)


def test_heavy_tails_can_be_transformed():
    """So that a few rows no longer decide the variance."""

    def far(theta, noise):
        return exact(theta, noise).sinh() ** 3

    heavy = stack(lambda theta, noise: far(theta, noise) * 1.1, far)
    plain, bent = (run(heavy, integrand="output", x_transform=transform) for transform in ("none", "asinh"))
    assert bent.kurtosis[0] < 0.5 * plain.kurtosis[0]


class Counted(nn.Module):
    """An embedding that tells how many rows of which shape it was given."""

    seen: list = []  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        Counted.seen.append(tuple(x.shape))
        return self.layer(x)


@pytest.mark.usefixtures("brief")
def test_the_pilots_networks_are_of_the_chosen_density_and_embedding():
    built = []

    def builder(dim, condition_dim):
        built.append((dim, condition_dim))
        return MIXTURE(dim, condition_dim)

    run(stack(off(0.2), exact), 16, density=builder)
    run(stack(off(0.2), exact), 16, density=builder, embedding=Counted())
    run(stack(off(0.2), exact), 16, density=builder, estimator="nle")
    assert built == [(2, 4)] * 2 + [(2, 2)] * 2 + [(4, 2)] * 2
    assert Counted.seen
    for density in ("nsf", "maf", "mdn"):
        assert np.isfinite(run(stack(off(0.2), exact), 8, density=density, embedding="mlp").variances).all()


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("n", [8, 9, 11])
@pytest.mark.parametrize("integrand", INTEGRANDS, ids=lambda each: getattr(each, "__name__", each))
def test_few_and_odd_numbers_of_rows_will_do(n, integrand):
    report = run(stack(off(0.4), off(0.1), exact), n, integrand=integrand)
    assert report.n == n == len(report.theta)
    assert np.isfinite(report.variances).all()
    assert (report.variance_draws >= 0).all()
    assert str(report)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("integrand", INTEGRANDS, ids=lambda each: getattr(each, "__name__", each))
def test_one_level_alone_will_do(integrand):
    report = run(stack(exact), 16, integrand=integrand)
    assert report.data.n == (16,)
    assert report.data.runs == (16,)
    assert report.spent == 16.0
    assert report.data.levels[0].coarse is None
    assert report.single_level_variance == pytest.approx(report.variances[0])
    assert len(report.correlations) == len(report.shuffled) == len(report.consistency) == 0
    assert len(report.noise_correlations) == 0
    assert report.rates is None
    assert report.sizes(10.0)["n"].to_numpy() == pytest.approx([10.0] * len(report.states))
    assert "level 0" in str(report)


def test_three_levels_give_rates_and_leave_the_middle_to_be_simulated():
    levels = stack(off(0.4), off(0.1), exact)
    report = run(levels, 48, integrand="output")
    assert report.data.n == (48, 0, 48)
    assert report.rates["beta"] > 0
    assert report.rates["gamma"] == pytest.approx(math.log2(50 / 20))
    assert len(report.consistency) == len(report.correlations) == len(report.noise_correlations) == 2
    assert report.covariance.shape == (3, 3)
    data = simulate(levels, (100, 20, 48), seed=1, reuse=report.data, progress=False)
    assert data.n == (100, 20, 48)


@pytest.mark.parametrize("integrand", ["output", total], ids=lambda each: getattr(each, "__name__", each))
def test_without_a_network_none_is_trained(integrand, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a network was trained")

    monkeypatch.setattr(networks, "minimise", refuse)
    report = run(stack(off(0.2), exact), 16, integrand=integrand)
    assert list(report.states) == [report.integrand]
    assert report.drift.tolist() == [1.0, 1.0]
    with pytest.raises(AssertionError, match="was trained"):
        run(stack(off(0.2), exact), 16, integrand="loss")


# Published values


def paths(levels):
    """Euler paths of a geometric Brownian motion of 4^l steps, which share their increments; the last price."""
    finest = 4 ** (levels - 1)

    def draw(n, generator):
        return torch.randn(n, finest, generator=generator, dtype=torch.float64) / math.sqrt(finest)

    def euler(steps):
        def price(theta, noise):
            increments = noise.reshape(len(noise), steps, -1).sum(2)
            return 100 * (1 + 0.05 / steps + 0.2 * increments).prod(1, keepdim=True)

        return price

    return LevelStack(BoxPrior([0.0], [1.0]), draw,
                      [Level(f"{4**level} steps", euler(4**level), 4.0**level) for level in range(levels)])


def european(theta, price):
    return math.exp(-0.05) * (price[:, 0] - 100).clamp_min(0)


def digital(theta, price):
    return math.exp(-0.05) * 100 * (price[:, 0] > 100)


def test_variances_of_a_european_call_are_the_published_ones():
    """Each within four standard errors, and the slopes of variance and cost; nothing to warn of."""
    report = run(paths(4), 2000, integrand=european)
    published = np.array([161.79, 4.4421, 1.0584, 0.27246])
    assert (np.abs(report.variances / published - 1) < 4 * report.relative_errors).all()
    assert report.relative_errors.max() < 0.15
    assert report.single_level_variance == pytest.approx(215.6, rel=4 * report.relative_errors[0])
    assert report.rates["beta"] == pytest.approx(2, abs=0.3)
    assert report.rates["gamma"] == 2
    assert report.kurtosis[1] > 2 * report.kurtosis[3]
    assert report.warnings == ()


def test_rare_events_of_a_digital_call_are_a_warning():
    """The kurtosis of its corrections is 32, 54, 105, 209, within four standard errors of about as many events."""
    report = run(paths(5), 2000, integrand=digital)
    events = 2000 / np.array([32, 54, 105, 209])
    assert (np.abs(report.kurtosis[1:] * events / 2000 - 1) < 4 / np.sqrt(events)).all()
    assert report.rates["beta"] == pytest.approx(0.91, abs=0.4)
    rare = [warning for warning in report.warnings if "few rare rows" in warning]
    assert "'256 steps'" in rare[-1]
    assert len(rare) == len(report.warnings) <= 2


# Checks


def test_a_healthy_stack_gives_no_warning(report):
    assert report.warnings == ()
    assert report.consistency[0] < 1
    assert report.noise_correlations[0] > 0.8 > report.noise_shuffled[0]
    assert report.correlations[0] > 0.8 > report.shuffled[0]


@pytest.mark.parametrize("seed", range(3))
def test_uncoupled_noise_is_seen(seed):
    """Although theta makes the outputs of both levels agree."""
    def uncoupled(theta, noise):
        return exact(theta, noise.flip(1))

    coupled, apart = (run(stack(off(0.01), f), seed=seed, integrand="output") for f in (exact, uncoupled))
    assert apart.variances[1] > 10 * coupled.variances[1]
    assert coupled.warnings == ()
    assert apart.correlations[0] > 2 * apart.shuffled[0]  # which alone would not tell
    warning, = apart.warnings
    assert "no shared noise" in warning


def test_pairs_that_have_nothing_in_common_are_seen():
    report = run(stack(lambda theta, noise: noise[:, :2], lambda theta, noise: noise[:, 2:]), integrand="output")
    assert sum("agree no better" in warning for warning in report.warnings) == 1


def test_levels_without_noise_share_none_and_are_not_blamed():
    report = run(stack(lambda theta, noise: 1.1 * theta + 0.1 * theta**2, lambda theta, noise: theta),
                 integrand="output")
    assert np.isnan(report.noise_correlations).all()
    assert report.warnings == ()


def test_consistency_compares_pairs_with_rows_alone(report, monkeypatch):
    given = []

    def spy(fine, coarse, alone):
        given.append((fine, coarse, alone))
        return consistency(fine, coarse, alone)

    monkeypatch.setattr(piloting, "consistency", spy)
    again = run(stack(off(0.4), off(0.1), exact), 32, integrand=total)
    for level, (fine, coarse, alone) in enumerate(given, start=1):
        assert np.allclose(fine[:, 0], total(None, again.outputs[level].double()), atol=1e-5)
        assert np.allclose(coarse[:, 0], total(None, again.outputs[level - 1].double()), atol=1e-5)
        assert not np.isin(alone, coarse).any()
    assert np.allclose(given[0][2][:, 0], total(None, again.data.levels[0].fine.double()), atol=1e-5)
    assert len(given) == 2


def test_joint_and_own_rows_are_independent(report):
    joint, own = report.data.levels[1].theta, report.data.levels[0].theta
    assert not torch.isin(joint, own).any()


# Rows and costs


def test_the_pilots_rows_are_training_rows_and_its_cost_is_counted(report):
    # 64 joint rows, 64 independent ones of level 0, two replayed: level 0 twice each, the finest once.
    levels = stack(off(0.2), exact)
    assert report.data.n == (64, 64)
    assert report.data.runs == (64 + 2 + 64, 64)
    assert report.spent == 130 * 1.0 + 64 * 20.0 == pilot_cost(levels, 64)
    plan = optimal_allocation(report, budget=5000)
    assert plan.cost <= 5000
    data = simulate(levels, plan, seed=1, reuse=report.data, progress=False)
    assert data.n == plan.n
    assert torch.equal(data.levels[1].coarse[:64], report.data.levels[1].coarse)
    assert data.runs[0] * 1.0 + data.runs[1] * 20.0 == pytest.approx(plan.cost)


def test_the_pilots_data_are_its_rows(report):
    finest = report.data.levels[1]
    assert torch.equal(finest.theta, report.theta)
    assert torch.equal(finest.fine, report.outputs[1])
    assert torch.equal(finest.coarse, report.outputs[0])
    assert report.data.checked


@pytest.mark.parametrize("pair_costs", [None, (1.0, 20.0, 50.0)])
def test_what_a_pilot_costs_is_known_before(pair_costs):
    levels = replace(stack(off(0.4), off(0.1), exact), pair_costs=pair_costs)
    report = run(levels, 8, integrand="output")
    assert report.spent == pytest.approx(pilot_cost(levels, 8))
    assert report.pair_costs == (pair_costs or (1.0, 21.0, 70.0))
    assert pilot_cost(stack(exact, costs=None), 8) is None


def test_measured_costs_are_seconds_a_run():
    def slow(theta, noise):
        torch.linalg.eigvals(torch.ones(150, 150))
        return exact(theta, noise)

    report = run(stack(exact, slow, costs=None), 16, integrand="output")
    assert report.cost_unit == "seconds"
    assert report.costs[1] > report.costs[0] > 0
    assert report.pair_costs[1] == pytest.approx(sum(report.costs))
    assert report.spent == pytest.approx(sum(report.data.seconds))


def test_a_budget_below_the_pilots_cost_is_refused(report):
    with pytest.raises(ValueError, match="already spent"):
        optimal_allocation(report, budget=100)


def failing(theta, noise):
    return torch.where(theta[:, :1] > 0.9, torch.nan, exact(theta, noise))


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("integrand", INTEGRANDS, ids=lambda each: getattr(each, "__name__", each))
def test_rows_that_fail_are_reported(integrand):
    with pytest.warns(UserWarning, match="level 0, level 1"):
        report = run(stack(exact, failing), on_failure="drop", integrand=integrand)
    assert report.data.failures[1] == 64 - report.n > 0
    assert (report.theta[:, 0] <= 0.9).all()
    assert report.data.n == (64, report.n)
    assert report.data.runs == (130, 64)
    assert f"{report.n} joint rows" in str(report)


def test_too_few_rows_that_work_are_refused():
    def never(theta, noise):
        return torch.where(theta[:, :1] > 0.3, torch.nan, exact(theta, noise))

    with pytest.warns(UserWarning, match="Left out"), pytest.raises(ValueError, match=r"of 12 pilot rows gave finite"):
        run(stack(exact, never), 12, on_failure="drop", integrand="output")


# The same again


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("integrand", INTEGRANDS, ids=lambda each: getattr(each, "__name__", each))
def test_a_seed_reproduces_and_global_random_states_are_left_alone(integrand):
    levels = stack(off(0.2), exact)
    first = run(levels, 16, integrand=integrand)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    state, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    assert alike(first, run(levels, 16, integrand=integrand))
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpys)  # noqa: NPY002
    assert not np.allclose(run(levels, 16, seed=1, integrand=integrand).variances, first.variances, rtol=1e-6)


@pytest.mark.usefixtures("brief")
def test_a_store_is_read_instead_of_simulating_again(tmp_path):
    calls = []

    def counted(theta, noise):
        calls.append(len(theta))
        return exact(theta, noise)

    levels = stack(off(0.2), counted)
    first = run(levels, 16, store=tmp_path / "rows")
    assert sum(calls) == 16
    for integrand in INTEGRANDS:
        again = run(levels, 16, store=tmp_path / "rows", integrand=integrand)
        assert sum(calls) == 16
        assert integrand != "loss" or alike(first, again)
        assert again.spent == first.spent
    longer = run(levels, 24, store=open_store(tmp_path / "rows"))
    assert sum(calls) == 24
    assert torch.equal(longer.theta[:16], first.theta)
    assert alike(longer, run(levels, 24))


def test_measured_costs_come_from_the_store(tmp_path):
    first, again = (run(stack(off(0.2), exact, costs=None), 16, store=tmp_path / "rows", integrand="output")
                    for _ in range(2))
    assert again.costs == pytest.approx(first.costs, rel=1e-12)
    assert again.spent == pytest.approx(first.spent, rel=1e-12)


@pytest.mark.usefixtures("brief")
def test_a_pilot_that_broke_off_goes_on_from_its_store(tmp_path):
    finest, broken = tmp_path / "finest", tmp_path / "broken"

    def breaking(theta, noise):
        if finest.exists() and not broken.exists():
            broken.touch()
            raise KeyboardInterrupt
        return off(0.2)(theta, noise)

    def counted(theta, noise):
        with finest.open("a") as file:
            file.write("x" * len(theta))
        return exact(theta, noise)

    levels = stack(breaking, counted)
    with pytest.raises(KeyboardInterrupt):
        run(levels, 16, store=tmp_path / "rows")
    assert broken.exists()
    again = run(levels, 16, store=tmp_path / "rows")
    assert finest.stat().st_size == 16  # no row of the finest level twice
    assert alike(again, run(levels, 16))


def test_a_function_that_changes_its_inputs_changes_no_rows():
    def spoil(theta, x):
        x *= 0
        theta *= 0
        return x.sum(1)

    spoiled, plain = (run(stack(off(0.2), exact), 16, integrand=each) for each in (spoil, total))
    assert torch.equal(spoiled.theta, plain.theta)
    assert all(torch.equal(one, other) for one, other in zip(spoiled.outputs, plain.outputs, strict=True))


# Bad requests


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n": 7}, "at least 8 pilot rows; got 7"), ({"estimator": "npr"}, 'estimator "npe" or "nle"'),
        ({"x_transform": "log"}, "x_transform"), ({"integrand": "entropy"}, "integrand"),
        ({"density": "gan"}, "Unknown density"), ({"embedding": "rnn"}, "Unknown embedding"),
        ({"device": "moon"}, "device"), ({"seed": -1}, "seed"), ({"on_failure": "ignore"}, "on_failure"),
        ({"embedding": nn.Linear(3, 2)}, "embedding cannot read"),
        ({"integrand": lambda theta, x: x[:3, 0]}, r"shape \(16,\) or \(16, k\)"),
        ({"integrand": lambda theta, x: x * torch.nan}, "finite numbers from the integrand"),
    ],
)  # fmt: skip
def test_bad_requests(options, match):
    calls = []

    def counted(theta, noise):
        calls.append(len(theta))
        return exact(theta, noise)

    with pytest.raises(ValueError, match=match):
        run(stack(off(0.2), counted), **{"n": 16, **options})
    late = callable(options.get("integrand")) or isinstance(options.get("embedding"), nn.Module)
    assert bool(calls) == late  # what can be seen before anything is simulated is


def test_simulators_that_misbehave_are_refused():
    with pytest.raises(ValueError, match="deterministic"):
        run(stack(lambda theta, noise: exact(theta, torch.rand(len(theta), 4)), exact), 16)
    with pytest.raises(ValueError, match="shape"):
        run(stack(lambda theta, noise: exact(theta, noise)[:, :2], exact), 16)


def test_a_loss_that_is_not_finite_is_refused():
    """As of a density of bounded support, scored on rows outside it."""
    class Bounded(nn.Module):
        def __init__(self, dim, condition_dim):
            super().__init__()
            self.inside = MIXTURE(dim, condition_dim)

        def log_prob(self, input, condition):
            return torch.where(input.abs().amax(1) < 1, self.inside.log_prob(input, condition), -torch.inf)

    with pytest.raises(ValueError, match="Expected finite numbers of every row"):
        run(stack(off(0.2), exact), 16, density=Bounded)


def test_the_fewest_rows_are_what_is_asked_for():
    assert FEWEST == 8
    assert run(stack(exact), FEWEST, integrand="output").n == FEWEST
