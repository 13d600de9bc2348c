"""Rows with all that bounds are made of: closed forms, blocks, shared runs, time, and what goes wrong."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mlsbi import BoxPrior, Level, LevelStack, per_sample
from theory_checks import measuring
from theory_checks.bounds import check_bounds
from theory_checks.densities import AffineGaussian
from theory_checks.integrands import Gradient, Loss
from theory_checks.measuring import FEWEST_ROWS, Measured, measure, measure_all
from theory_checks.stacks import random_network
from theory_checks.testing import normal_prior_of

GAUSSIAN = AffineGaussian([[0.5]], [0.1], [0.2])


def normal_noise(n, generator):
    return torch.randn(n, 1, generator=generator)


def stack_of(*simulators, prior=None, noise=normal_noise):
    levels = [Level(f"run {index}", run) for index, run in enumerate(simulators)]
    return LevelStack(prior or normal_prior_of(1), noise, levels)


def cheap(theta, noise):
    return theta + noise


def dear(theta, noise):
    return theta + noise + 0.1 * theta * noise


def tensors(measured):
    found = {name: value for name, value in vars(measured).items() if isinstance(value, torch.Tensor)}
    return {**found, **{f"outputs[{index}]": x for index, x in enumerate(measured.outputs)}}


def assert_same(one, other, *, rows=None, **tolerance):
    """All tensors of two records agree, up to a number of rows of the second."""
    for name, expected in tensors(one).items():
        found = tensors(other)[name]
        if rows is not None and name != "jumps":
            axis = 0 if name.startswith(("outputs", "theta")) else 1
            found = found.narrow(axis, 0, min(rows, found.shape[axis]))
        assert found.shape == expected.shape, name
        torch.testing.assert_close(found, expected, **{"rtol": 1e-10, "atol": 1e-12, **tolerance}, msg=name)


def test_every_number_of_an_affine_stack_is_the_one_by_hand():
    def fine(theta, noise):
        return torch.cat([theta[:, :1] + 2 * noise, 3 * theta[:, 1:]], 1)

    def coarse(theta, noise):
        return torch.cat([theta[:, :1], 2 * theta[:, 1:] + noise], 1)

    stack = stack_of(coarse, fine, prior=normal_prior_of(2))
    loss = Loss(lambda theta, x: -(theta[:, 0] + 4 * x[:, 0] - 2 * x[:, 1]), "npe")
    found = measure(stack, loss, rows=50, seed=2)
    theta = found.theta
    noise = ((found.outputs[1][:, :1] - theta[:, :1]) / 2)
    x = torch.stack([coarse(theta, noise), fine(theta, noise)])
    torch.testing.assert_close(torch.stack(found.outputs), x)
    torch.testing.assert_close(found.values[..., 0], theta[:, 0] + 4 * x[..., 0] - 2 * x[..., 1])
    # Slopes in (theta_1, theta_2, u): coarse (1 + 4, -4, -2); fine (1 + 4, -6, 8); so the difference is (0, -2, 10).
    torch.testing.assert_close(found.slopes[..., 0], torch.tensor([[45.0], [104.0]]).double().expand(2, 50))
    torch.testing.assert_close(found.gradient_square, torch.tensor([[6.0], [14.0]]).double().expand(2, 50))
    torch.testing.assert_close(found.gradient_fourth, torch.tensor([[36.0], [196.0]]).double().expand(2, 50))
    torch.testing.assert_close(found.difference_gradient_fourth, torch.full((1, 50), 36.0).double())  # 4 + (1 + 1)
    torch.testing.assert_close(found.joint_fourth, torch.tensor([[64.0], [256.0]]).double().expand(2, 50))
    torch.testing.assert_close(found.density_fourth[..., 0], torch.full((2, 50), 441.0).double())  # 1 + 16 + 4
    torch.testing.assert_close(found.output_fourth, x.square().sum(2).square())
    torch.testing.assert_close(found.difference_fourth[0], (x[1] - x[0]).square().sum(1).square())
    torch.testing.assert_close(found.theta_fourth, theta.square().sum(1).square())
    torch.testing.assert_close(found.differences[1], found.values[1] - found.values[0])
    torch.testing.assert_close(found.differences[0], found.values[0])


def test_slopes_of_a_posterior_are_in_the_logit_of_theta():
    stack = stack_of(lambda theta, noise: theta * noise, prior=BoxPrior([2.0], [4.0]))
    found = measure(stack, Loss(GAUSSIAN, "npe"), rows=100)
    z, x = found.theta[:, 0], found.outputs[0][:, 0]
    theta = 2 + 2 * torch.sigmoid(z)
    stretch, noise = (theta - 2) * (4 - theta) / 2, x / theta
    off = math.exp(0.4) * (z - 0.5 * x - 0.1)
    torch.testing.assert_close(found.slopes[0, :, 0], (off * (1 - 0.5 * noise * stretch)).square()
                               + (off * 0.5 * theta).square(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.gradient_square[0], (noise * stretch).square() + theta.square())


def test_slopes_of_a_likelihood_are_in_theta_itself():
    stack = stack_of(lambda theta, noise: theta * noise, prior=BoxPrior([2.0], [4.0]))
    found = measure(stack, Loss(GAUSSIAN, "nle"), estimator="nle", rows=100)
    theta, x = found.theta[:, 0], found.outputs[0][:, 0]
    assert bool(((theta > 2) & (theta < 4)).all())
    noise = x / theta
    off = math.exp(0.4) * (x - 0.5 * theta - 0.1)
    torch.testing.assert_close(found.slopes[0, :, 0], (off * (noise - 0.5)).square() + (off * theta).square())


@pytest.mark.parametrize("hidden", [False, True])
def test_the_bound_is_attained_by_linear_losses_of_normals(hidden):
    """Var f = E|grad f|^2 = 1 + 9 for f = 2 theta - 3 (theta + u), in the limit of many rows."""
    def run(theta, noise):
        x = theta + noise
        return torch.from_numpy(x.numpy()) if hidden else x

    found = measure(stack_of(run), Loss(lambda theta, x: 3 * x[:, 0] - 2 * theta[:, 0], "npe"), rows=8000)
    slopes = found.slopes[0, :, 0]
    error = float(slopes.std()) / len(slopes) ** 0.5
    assert abs(float(slopes.mean()) - 10) < 4 * error + 1e-6
    assert (error > 0.01) == hidden
    assert float(found.values[0].var()) == pytest.approx(10, rel=4 * (2 / 8000) ** 0.5)


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_shapes(levels):
    stack = stack_of(*(lambda theta, noise, k=k: (theta * k + noise)[:, :, None].expand(-1, 1, 3)
                       for k in range(levels)))
    density = AffineGaussian([[0.5, 1.0, 2.0]], [0.1], [0.2])
    integrands = [Loss(density, "npe"), Gradient(density, "npe"), None]
    loss, gradient, nothing = measure_all(stack, integrands, rows=[200, 100, 70])
    for found, rows, components in ((loss, 200, 1), (gradient, 100, 5)):
        for name in ("values", "slopes", "density_fourth", "differences"):
            assert getattr(found, name).shape == (levels, rows, components), name
    for found, rows in ((loss, 200), (gradient, 100), (nothing, 70)):
        assert found.rows == rows
        for name in ("output_fourth", "gradient_square", "gradient_fourth", "joint_fourth"):
            assert getattr(found, name).shape == (levels, rows), name
        assert found.theta.shape == (rows, 1)
        assert [x.shape for x in found.outputs] == [(rows, 1, 3)] * levels
        if levels > 1:
            assert found.difference_fourth.shape == found.difference_gradient_fourth.shape == (levels - 1, rows)
    assert nothing.values.numel() == 0


@pytest.mark.parametrize(("numbers", "largest"), [(1 << 22, 100), (1 << 22, 1024), (700, 4096), (1, 4096)])
def test_the_size_of_blocks_changes_nothing(monkeypatch, numbers, largest):
    rows = [100, 80, 70] if numbers == 1 else [3000, 700, 90]

    def run():
        integrands = [Loss(GAUSSIAN, "npe"), Gradient(GAUSSIAN, "npe"), None]
        return measure_all(stack_of(cheap, dear), integrands, rows=rows, seed=3)

    whole = run()
    monkeypatch.setattr(measuring, "_BLOCK_NUMBERS", numbers)
    monkeypatch.setattr(measuring, "_LARGEST_BLOCK", largest)
    for one, other in zip(whole, run(), strict=True):
        assert_same(one, other)


def test_the_size_of_blocks_changes_directions_of_finite_differences_alone(monkeypatch):
    def run():
        hidden = stack_of(*(lambda theta, noise, run=run: torch.from_numpy(run(theta, noise).numpy())
                            for run in (cheap, dear)))
        return measure(hidden, Loss(GAUSSIAN, "npe"), rows=3000, seed=3)

    whole = run()
    monkeypatch.setattr(measuring, "_LARGEST_BLOCK", 300)
    parts = run()
    for name in ("values", "output_fourth", "difference_fourth", "theta_fourth", "density_fourth"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=0)
    for name in ("slopes", "gradient_square", "gradient_fourth", "difference_gradient_fourth"):
        difference = (getattr(parts, name) - getattr(whole, name)).flatten(1)
        assert float(difference.abs().max()) > 0
        assert bool((difference.mean(1).abs() < 4.5 * difference.std(1) / 3000**0.5).all()), name


def test_an_integrand_is_measured_alone_as_among_others():
    stack = stack_of(cheap, dear)
    integrands = [Loss(GAUSSIAN, "npe"), None, Gradient(GAUSSIAN, "npe")]
    together = measure_all(stack, integrands, rows=[5000, 100, 300], seed=1)
    assert_same(measure(stack, Gradient(GAUSSIAN, "npe"), rows=300, seed=1), together[2])
    assert_same(measure(stack, rows=100, seed=1), together[1])
    assert together[0].theta.shape == (4096, 1)
    assert [len(x) for x in together[0].outputs] == [4096, 4096]
    assert together[0].rows == 5000


def test_more_rows_extend_fewer():
    stack = stack_of(cheap, dear)
    some, more = (measure(stack, Loss(GAUSSIAN, "npe"), rows=rows, seed=1) for rows in (300, 1500))
    assert_same(some, more, rows=300)


def counting(counts, run):
    def counted(theta, noise):
        counts.append(len(theta))
        return run(theta, noise)

    return counted


def test_integrands_share_the_runs():
    alone, together = [], []
    rows = [1500, 1500, 1500]
    measure(stack_of(counting(alone, cheap), counting(alone, dear)), Loss(GAUSSIAN, "npe"), rows=1500)
    integrands = [Loss(GAUSSIAN, "npe"), Gradient(GAUSSIAN, "npe"), Loss(random_network(1, 1, seed=0), "npe")]
    measure_all(stack_of(counting(together, cheap), counting(together, dear)), integrands, rows=rows)
    assert sum(together) == sum(alone)


def test_black_boxes_are_run_twice_a_direction_and_once_more():
    counts = {2: [], 5: []}
    for directions, runs in counts.items():
        hidden = stack_of(counting(runs, lambda theta, noise: torch.from_numpy((theta + noise).numpy())))
        measure(hidden, Loss(GAUSSIAN, "npe"), rows=1000, directions=directions)
    assert sum(counts[5]) - sum(counts[2]) == 2 * 3 * (1000 + 2 * 256)  # 256 rows with two steps, to see its error


def test_the_same_seed_gives_the_same_numbers_and_leaves_random_states_alone():
    stack = stack_of(cheap, dear)
    np.random.seed(7)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    one, same, other = (measure(stack, Loss(GAUSSIAN, "npe"), rows=100, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert_same(one, same, rtol=0, atol=0)
    assert not bool((one.theta == other.theta).any())


def test_progress_adds_up_to_the_rows():
    told = []
    measure(stack_of(cheap), rows=5000, advance=told.append)
    assert sum(told) == 5000
    told.clear()
    measure(stack_of(cheap), rows=5000, advance=told.append, seconds=1e6)
    assert sum(told) == 5000
    assert told[0] == FEWEST_ROWS  # the first of few, so that time can be kept


def test_levels_that_add_nothing_differ_by_zero_everywhere():
    found = measure(stack_of(cheap, lambda theta, noise: theta + noise), Loss(GAUSSIAN, "npe"), rows=300)
    for name in ("difference_fourth", "difference_gradient_fourth"):
        assert float(getattr(found, name).abs().max()) == 0
    assert float(found.differences[1].abs().max()) == float(found.slopes[1].abs().max()) == 0
    verdicts = {check.verdict for check in check_bounds(found) if check.level == 1}
    assert verdicts == {"holds"}


def test_a_seed_leaves_derivatives_in_theta_and_no_constant():
    @per_sample
    def walk(theta, seed):
        return theta * 2 + np.random.default_rng(seed).normal(size=1)

    found = measure(stack_of(walk, noise="seed"), Loss(lambda theta, x: x[:, 0], "npe"), rows=150)
    assert found.problem is None
    torch.testing.assert_close(found.gradient_square[0], torch.full((150,), 4.0).double(), rtol=1e-4, atol=1e-4)
    assert found.noise_law.constant is None
    assert {check.verdict for check in check_bounds(found)} == {"not applicable"}


def one_number(n, generator):
    return torch.randn(n, generator=generator)


def one_number_and_a_count(n, generator):
    return {"a": torch.randn(n, generator=generator), "k": torch.randint(0, 2, (n, 1), generator=generator)}


@pytest.mark.parametrize("noise", [one_number, one_number_and_a_count])
def test_noise_may_be_one_number_a_row(noise):
    def run(theta, noise):
        return theta + (noise["a"] if isinstance(noise, dict) else noise)[:, None]

    for simulate in (run, lambda theta, noise: torch.from_numpy(run(theta, noise).numpy())):
        found = measure(stack_of(simulate, noise=noise), rows=200)
        assert found.problem is None
        assert float(found.gradient_square.mean()) == pytest.approx(2, rel=0.3)


def test_declared_constants_are_used():
    found = measure(stack_of(cheap), rows=64, theta_constant=2.5, noise_constant=7.0)
    assert (found.theta_law.constant, found.noise_law.constant, found.law.constant) == (2.5, 7.0, 7.0)


def nan_later(theta, noise):
    return torch.where(noise > 2.9, math.nan, theta + noise)


@pytest.mark.parametrize(("runs", "message"), [
    ([cheap, lambda theta, noise: theta.round()], "level 'run 1' is not differentiable"),
    ([lambda theta, noise: 1 / 0, lambda theta, noise: [][0]], "run 0.*ZeroDivisionError.*; .*run 1.*IndexError"),
    ([cheap, lambda theta, noise: torch.cat([theta, noise], 1)], r"shapes \(1,\) and \(2,\)"),
    ([cheap, lambda theta, noise: (theta + noise)[:, 0]], r"level 'run 1' gave shape \(\d+,\)"),
    ([lambda theta, noise: theta + torch.rand_like(noise)], "not deterministic"),
    ([nan_later], r"level 'run 0' gives .* not finite in \d+ of"),
])  # fmt: skip
def test_what_is_wrong_with_simulators_is_told_and_not_raised(runs, message):
    found = measure(stack_of(*runs), Loss(lambda theta, x: theta[:, 0], "npe"), rows=4000)
    assert isinstance(found, Measured)
    assert found.rows == 0
    assert found.values.numel() == 0
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found.problem)
    assert {check.verdict for check in check_bounds(found)} == {"not applicable"}


@pytest.mark.parametrize("log_q", [
    lambda theta, x: theta[:, 0].log(),
    lambda theta, x: torch.where(theta[:, 0] > 1, -math.inf, -theta[:, 0].square()),
])  # fmt: skip
def test_a_loss_that_is_not_finite_is_no_violation(log_q):
    try:
        checks = check_bounds(stack_of(cheap, dear), log_q, rows=200)
    except ValueError as error:
        assert "finite" in str(error)  # noqa: PT017 (either way of saying it will do)
    else:
        assert {check.verdict for check in checks} == {"not applicable"}


@pytest.mark.parametrize(("log_q", "expected"), [
    (lambda theta, x: -(theta - x).abs().sum(1), 0),
    (lambda theta, x: -1e8 * (theta - x).square().sum(1), 0),  # a posterior far narrower than its prior
    (lambda theta, x: (theta > x).double().sum(1), 1),
    (lambda theta, x: (5 * x).floor().sum(1) - (theta - x).square().sum(1), 1),
    (lambda theta, x: torch.zeros(len(theta)), 0),
])  # fmt: skip
def test_jumps_of_the_loss_are_told_from_steep_slopes(log_q, expected):
    found = measure(stack_of(lambda theta, noise: theta + 1e-4 * noise), Loss(log_q, "npe"), rows=500)
    assert found.jumps.shape == (1,)
    assert bool(found.jumps[0] > 0) == expected


@pytest.mark.parametrize(("options", "message"), [
    ({"rows": 1}, r"at least 2 rows for every integrand.*got \[1\]"),
    ({"rows": 0}, "at least 2 rows"),
    ({"seconds": 0.0}, "seconds > 0; got 0.0"),
    ({"seconds": math.nan}, "seconds > 0"),
    ({"seconds": -1.0}, "seconds > 0"),
    ({"directions": 1}, "at least 2 directions"),
    ({"seed": -1}, "seed"),
    ({"estimator": "nope"}, "estimator"),
    ({"theta_constant": 0.0}, "positive, finite constant"),
])  # fmt: skip
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        measure(stack_of(cheap), **{"rows": 64, **options})


def test_as_many_numbers_of_rows_as_integrands():
    with pytest.raises(ValueError, match="every integrand"):
        measure_all(stack_of(cheap), [None, None], rows=[64])
    with pytest.raises(ValueError, match="every integrand"):
        measure_all(stack_of(cheap), [], rows=[])


def slow_stack(monkeypatch, each, levels=2):
    """Black boxes that let a clock of their own run on by `each` seconds a row, and that clock."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(measuring, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def simulator(factor):
        def run(theta, noise):
            clock.now += each * len(theta)
            return torch.from_numpy((theta + factor * noise).numpy())

        return run

    return stack_of(*(simulator(1 + level) for level in range(levels))), clock


@pytest.mark.parametrize(("each", "seconds"), [(1e-3, 1.0), (1e-3, 10.0), (1e-4, 3.0), (1e-2, 30.0)])
def test_time_is_kept(monkeypatch, each, seconds):
    stack, clock = slow_stack(monkeypatch, each)
    found = measure(stack, Loss(GAUSSIAN, "npe"), rows=20_000, seconds=seconds)
    least = 2 * each * FEWEST_ROWS * 9  # of both levels, which are run whatever time it takes
    assert found.rows >= FEWEST_ROWS
    assert clock.now < 2 * seconds + 1.5 * least
    assert found.rows == FEWEST_ROWS or clock.now > 0.3 * seconds


def test_plenty_of_time_changes_nothing(monkeypatch):
    stack, _ = slow_stack(monkeypatch, 1e-6)
    hurried, patient = (measure(stack, Loss(GAUSSIAN, "npe"), rows=500, seconds=seconds) for seconds in (1e6, None))
    torch.testing.assert_close(hurried.values, patient.values, rtol=1e-12, atol=1e-12)
    # Derivatives of a black box are along other directions in other blocks.
    torch.testing.assert_close(hurried.slopes.mean(1), patient.slopes.mean(1), rtol=0.2, atol=0)


def test_simulators_that_are_far_too_slow_are_refused_with_what_would_help(monkeypatch):
    stack, clock = slow_stack(monkeypatch, 60.0)
    with pytest.raises(ValueError, match=r"One run of every level takes 120 s.*hours.*seconds="):
        measure(stack, rows=1000, seconds=10.0)
    assert clock.now <= 4 * 60.0


def test_without_a_limit_all_rows_are_run(monkeypatch):
    stack, _ = slow_stack(monkeypatch, 60.0)
    assert measure(stack, rows=300).rows == 300
