import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributions import Independent, LogNormal

pytest.importorskip("sklearn")

from mlsbi import BoxPrior, Level, LevelStack, StoreError, pilot, tasks  # noqa: E402
from mlsbi.diagnostics import transfer  # noqa: E402
from mlsbi.simulation.campaign import simulate_joint  # noqa: E402
from mlsbi.store.records import JOINT_STREAM  # noqa: E402

PRIOR = BoxPrior([-2.0, 0.0], [2.0, 4.0], names=["shift", "slope"])
TIMES = torch.linspace(0, 1, 5)


def finest(theta, noise):
    return theta[:, :1] + theta[:, 1:] * TIMES + 0.5 * noise


def mixed(theta, noise):
    return finest(theta, noise)[:, [3, 0, 4, 1, 2]]


def noisy(theta, noise):
    return finest(theta, noise) + 3 * noise


def flipped(theta, noise):
    return -finest(theta, noise)


def useless(theta, noise):
    return noise.flip(1)


def stack_of(*simulators, prior=PRIOR, costs=(1.0, 10.0, 100.0)):
    names = [simulate.__name__ for simulate in simulators]
    return LevelStack(prior, lambda n, generator: torch.randn(n, 5, generator=generator),
                      [Level(name, simulate, cost) for name, simulate, cost in zip(names, simulators, costs,
                                                                                   strict=False)])


def report_on(stack, n=100, costs=None, losses=None):
    """What a pilot reports, with a sum over x as the loss, and without its networks."""
    rows = simulate_joint(stack, n, seed=0, stream=JOINT_STREAM)
    if losses is None:
        losses = np.stack([x.numpy() @ np.arange(x.shape[1]) for x in rows.outputs], 1)
    corrections = np.concatenate([losses[:, :1], np.diff(losses, axis=1)], 1)
    costs = costs or stack.costs
    return SimpleNamespace(
        names=stack.names, variances=corrections.var(0, ddof=1), covariance=np.cov(losses, rowvar=False), costs=costs,
        pair_costs=[costs[0], *(a + b for a, b in zip(costs, costs[1:], strict=False))], cost_unit="declared",
        single_level_variance=None, data=None, spent=0.0, theta=rows.theta, outputs=rows.outputs,
    )  # fmt: skip


@pytest.mark.slow
def test_a_copy_is_worth_more_than_levels_made_worse():
    def copy(theta, noise):
        return finest(theta, noise)

    found = {}
    for simulate in (copy, mixed, noisy, useless, flipped):
        stack = stack_of(simulate, finest)
        found[simulate.__name__] = transfer(stack, report_on(stack), progress=False).levels[0]
    assert found["copy"].score > 2 * found["noisy"].score > 0
    assert found["copy"].score > 2 * found["mixed"].score > 0
    assert found["mixed"].information.mean == pytest.approx(found["copy"].information.mean, abs=0.05)
    assert found["useless"].score < 0.02
    assert found["copy"].variance_reduction == pytest.approx(0.9)  # of costs 1 and 10
    assert found["copy"].correlation == pytest.approx(1)
    assert found["copy"].verdict.startswith("worth it: multilevel training needs 10 times less cost for the same")
    for name in ("mixed", "flipped"):
        assert "a fixed linear map of its output would explain 100%" in found[name].verdict
    assert found["flipped"].verdict.startswith("worth it only after a fixed map of its output: ")
    assert found["flipped"].score == 0
    assert "linear map" not in found["copy"].verdict
    assert found["useless"].verdict.startswith("not worth it: multilevel training needs")
    assert "100 rows show no more about theta that both levels know" in found["useless"].verdict


@pytest.mark.slow
def test_perturbed_levels_are_ordered_by_noise_and_order():
    scores = []
    for extra, reverse in ((0.0, False), (0.3, False), (0.0, True), (3.0, True)):
        stack = tasks.get("ou2", low="ou", extra_noise=extra, reverse=reverse).stack
        scores.append(transfer(stack, report_on(stack), progress=False).levels[0].score)
    assert scores == sorted(scores, reverse=True)


def root(*terms):
    return sum(np.sqrt(values.var(ddof=1) * cost) for values, cost in terms)


@pytest.mark.slow
def test_a_level_is_judged_beside_the_best_of_the_others():
    stack = stack_of(noisy, mixed, finest)
    losses = np.random.default_rng(0).normal(size=(30, 3)) @ np.array([[1, 0.9, 0.9], [0, 0.3, 0.25], [0, 0, 0.1]])
    found = transfer(stack, report_on(stack, 30, losses=losses), progress=False).levels
    low, middle, high = losses.T
    ways = {(0, 1): root((low, 1), (middle - low, 11), (high - middle, 110)),
            (0,): root((low, 1), (high - low, 101)), (1,): root((middle, 10), (high - middle, 110)),
            (): root((high, 100))}
    for level, one in enumerate(found):
        without = min(value for kept, value in ways.items() if level not in kept)
        with_it = min(value for kept, value in ways.items() if level in kept)
        assert one.cost_factor == pytest.approx((without / with_it) ** 2)
        assert one.variance_reduction == pytest.approx(1 - 1 / one.cost_factor)
        assert one.correlation == pytest.approx(np.corrcoef(losses[:, level], high)[0, 1])
        assert one.cost_interval is None


def test_no_level_is_worth_it_where_the_finest_alone_is_best():
    stack = stack_of(noisy, mixed, finest)
    rng = np.random.default_rng(1)
    first, last = rng.normal(size=(2, 40))
    losses = np.stack([4 * first, first, last], 1)  # beside the first level the second helps
    low, middle, high = losses.T
    assert root((low, 1), (high - low, 101)) > root((low, 1), (middle - low, 11), (high - middle, 110))
    assert root((low, 1), (high - low, 101)) > root((high, 100))
    found = transfer(stack, report_on(stack, 40, losses=losses), progress=False)
    assert all(level.cost_factor < 1 for level in found.levels)


@pytest.mark.slow
def test_identical_levels_have_one_score():
    def first(theta, noise):
        return finest(theta, noise)

    def second(theta, noise):
        return finest(theta, noise)

    stack = stack_of(first, second, finest)
    report = pilot(stack, 40, seed=0, integrand="output", progress=False)
    assert len(report.data.levels[0].theta) > 0  # rows of its own, which would favour the cheapest
    one, two = transfer(stack, report, progress=False).levels
    assert one.score == two.score > 0.3
    assert one.information.mean == two.information.mean
    assert two.cost_factor == pytest.approx(1)


@pytest.mark.slow
def test_the_cost_factor_has_an_interval():
    stack = stack_of(noisy, finest)
    rng = np.random.default_rng(0)
    told = {}
    for coupling in (0.999, 0.8):  # clear, and about where costs of 1 and 10 break even
        losses = rng.normal(size=(60, 2)) @ np.array([[1, coupling], [0, np.sqrt(1 - coupling**2)]])
        report = report_on(stack, 60, losses=losses)
        rows = rng.integers(60, size=(200, 60))
        report.covariance_draws = np.stack([np.cov(losses[row], rowvar=False) for row in rows])
        told[coupling] = transfer(stack, report, progress=False).levels[0]
        low, high = told[coupling].cost_interval
        assert low < told[coupling].cost_factor < high
        expected = [(root((x[:, 1], 10)) / root((x[:, 0], 1), (x[:, 1] - x[:, 0], 11))) ** 2
                    for x in (losses[row] for row in rows)]
        assert (low, high) == pytest.approx(np.quantile(expected, [0.05, 0.95]))
    assert re.match(r"worth it: multilevel training needs [\d.]+ times \([\d.]+ to [\d.]+\) less cost",
                    told[0.999].verdict)
    assert re.match(r"worth it for transfer learning: whether it saves multilevel training cost cannot be told from "
                    r"60 rows \(without it [\d.]+ times the cost, 0[\d.]+ to 1[\d.]+\)", told[0.8].verdict)
    report.covariance_draws = report.covariance_draws[:, :1]
    with pytest.raises(ValueError, match=r"covariance_draws of shape \(draws, 2, 2\)"):
        transfer(stack, report)


@pytest.mark.slow
def test_variance_saved_by_a_network_that_learns_nothing_is_not_worth_it():
    stack = stack_of(useless, finest)
    losses = np.random.default_rng(0).normal(size=(100, 1)) * [1, 1] + [0, 1]  # functions of theta alone
    found = transfer(stack, report_on(stack, losses=losses), progress=False).levels[0]
    assert found.cost_factor == pytest.approx(10)
    assert found.verdict.startswith("not worth it: multilevel training needs 10 times less cost")
    assert "saved only because the network learns nothing from the outputs" in found.verdict


@pytest.mark.slow
def test_an_integrand_that_is_constant_at_the_finest_level_only():
    stack = stack_of(noisy, finest)
    losses = np.random.default_rng(0).normal(size=(40, 2)) * [1, 0]
    found = transfer(stack, report_on(stack, 40, losses=losses), progress=False)
    assert np.isnan([found.levels[0].cost_factor, found.levels[0].variance_reduction]).all()
    assert "there is no variance that multilevel training could reduce" in str(found)


@pytest.mark.slow
def test_words_for_every_cost():
    stack = stack_of(mixed, finest)
    dear = transfer(stack, report_on(stack, 40, costs=(9.0, 10.0)), progress=False)
    assert re.match(r"worth it for transfer learning only: multilevel training needs [\d.]+ times the cost for the "
                    "same variance, and for transfer learning both levels know at least", dear.verdicts[0])
    assert "so few rows miss much of it: take 50 at least" in dear.verdicts[0]
    flat = transfer(stack, report_on(stack, 40, losses=np.ones((40, 2))), progress=False).levels[0]
    assert "there is no variance that multilevel training could reduce" in flat.verdict
    assert np.isnan([flat.cost_factor, flat.correlation]).all()
    directions = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 3)) * [0, 1, 1] + [1, 0, 0])[0]
    losses = directions[:, 1:] @ np.array([[1, 1], [0, 0.353]])  # S = 1 + 0.353 sqrt(3.5), without sqrt(2.5 * 1.125)
    near = transfer(stack, report_on(stack, 40, costs=(1.0, 2.5), losses=losses), progress=False).levels[0]
    assert 1 / 1.1 < near.cost_factor < 1.1
    assert "multilevel training costs as much with it as without" in near.verdict


@pytest.mark.slow
def test_repeats_are_paid_for_kept_and_matched_by_theta(tmp_path):
    def failing(theta, noise):
        return torch.where(noise > 2, torch.inf, finest(theta, noise))

    stack = stack_of(failing, mixed, finest)
    with pytest.warns(UserWarning, match="Left out rows"):
        report = report_on(stack, 120)
    assert 80 < len(report.theta) < 120
    options = {"store": tmp_path / "store", "progress": False, "on_failure": "drop"}
    with pytest.warns(UserWarning, match="Left out rows"):
        first, second = (transfer(stack, report, **options) for _ in range(2))
    assert first.spent == second.spent == len(report.theta) + 10 * first.levels[0].rows  # level 0 fails before level 1
    assert str(first) == str(second)
    assert first.levels[0].rows < len(report.theta)
    assert first.levels[0].score > 0.5  # rows out of step would share nothing
    report.theta = report.theta.flip(0)
    with pytest.raises(StoreError, match="Pass another seed"):
        transfer(stack, report, **options)


def test_a_pilots_report_is_what_it_reads():
    stack = stack_of(noisy, finest)
    report = pilot(stack, 40, seed=0, integrand="output", progress=False)
    found = transfer(stack, report, seed=1, progress=False)
    assert found.spent == 40
    assert found.levels[0].correlation == pytest.approx(report.correlations[0])
    assert found.finest == "finest"
    assert (found.to_frame()["score"] == [found.levels[0].score]).all()
    told = str(found)
    assert "about shift" in told
    assert "about slope" in told
    assert f"noisy: {found.verdicts[0]}" in told
    assert "repeats cost 40 cost units" in told


def test_summaries_and_priors_without_a_box_and_reports_of_other_stacks():
    prior = Independent(LogNormal(torch.zeros(2), 0.5 * torch.ones(2)), 1)
    stack = stack_of(noisy, finest, prior=prior)
    report = report_on(stack, 60)
    assert transfer(stack, report, progress=False).levels[0].information.values.shape == (2,)

    def mean_and_spread(x):
        return np.stack([x.mean(1), x[:, -1] - x[:, 0]], 1)

    own = transfer(stack, report, summary=mean_and_spread, progress=False)
    assert own.summaries == ("summary 0", "summary 1")
    found = own.levels[0].information
    assert ((found.carried == found.values) | (found.carried == 0)).all()  # one summary, and what has its sign
    other = BoxPrior([-2.0, 0.0], [2.0, 0.1])
    for stack, match in ((stack_of(noisy, finest, prior=other), "pilot's report to be finite and inside the prior"),
                         (stack_of(noisy, finest, prior=BoxPrior([-9.0], [9.0])), r"theta of shape \(n, 1\)")):
        with pytest.raises(ValueError, match=match):
            transfer(stack, report, progress=False)
    narrow = LevelStack(prior, stack.noise, [Level("noisy", lambda theta, noise: noisy(theta, noise)[:, :3], 1.0),
                                             stack.levels[1]])
    with pytest.raises(ValueError, match=r"outputs of 'noisy' have shape \(5,\), and runs give \(3,\)"):
        transfer(narrow, report, progress=False)


def test_bad_requests():
    stack, alone = stack_of(noisy, finest), stack_of(finest)
    report = report_on(stack, 20)
    with pytest.raises(ValueError, match=r"got one on \['noisy', 'finest'\] for the levels \['finest'\]"):
        transfer(alone, report)
    report.covariance = None
    with pytest.raises(ValueError, match="covariance of all levels"):
        transfer(stack, report)
    never_run = stack_of(lambda theta, noise: 1 / 0, finest)
    with pytest.raises(ValueError, match="at least 20 pilot rows; got 19"):
        transfer(never_run, SimpleNamespace(**{**vars(report_on(stack, 19)), "names": never_run.names}))


def test_without_scikit_learn(monkeypatch):
    stack = stack_of(noisy, finest)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"transfer needs scikit-learn.*pip install mlsbi\[metrics\]"):
        transfer(stack, report_on(stack, 20))
    code = "import sys; sys.modules['sklearn'] = None; from mlsbi.diagnostics import transfer; print('imported')"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
