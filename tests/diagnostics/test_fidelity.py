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


def test_a_copy_is_worth_more_than_levels_made_worse():
    def copy(theta, noise):
        return finest(theta, noise)

    found = {}
    for simulate in (copy, mixed, noisy, useless):
        stack = stack_of(simulate, finest)
        found[simulate.__name__] = transfer(stack, report_on(stack), progress=False).levels[0]
    assert found["copy"].score > 2 * found["noisy"].score > 0
    assert found["copy"].score > 2 * found["mixed"].score > 0
    assert found["mixed"].information.mean == pytest.approx(found["copy"].information.mean, abs=0.05)
    assert found["useless"].score < 0.02
    assert found["copy"].variance_reduction == pytest.approx(0.9)  # of costs 1 and 10
    assert found["copy"].correlation == pytest.approx(1)
    assert found["copy"].verdict.startswith("worth it: multilevel training needs 10 times less cost for the same")
    assert "a fixed linear map of its output, such as another order, would explain 100%" in found["mixed"].verdict
    assert "linear map" not in found["copy"].verdict
    assert found["useless"].verdict.startswith("not worth it: multilevel training needs")
    assert "100 rows show transfer learning no more" in found["useless"].verdict


def test_perturbed_levels_are_ordered_by_noise_and_order():
    scores = []
    for extra, reverse in ((0.0, False), (0.3, False), (0.0, True), (3.0, True)):
        stack = tasks.get("ou2", low="ou", extra_noise=extra, reverse=reverse).stack
        scores.append(transfer(stack, report_on(stack), progress=False).levels[0].score)
    assert scores == sorted(scores, reverse=True)


def test_variance_reduction_is_against_the_stack_without_the_level():
    stack = stack_of(noisy, mixed, finest)
    rng = np.random.default_rng(0)
    losses = rng.normal(size=(30, 3)) @ np.array([[1, 0.9, 0.9], [0, 0.3, 0.25], [0, 0, 0.1]])
    report = report_on(stack, 30, losses=losses)
    first, second = transfer(stack, report, progress=False).levels

    def root(*terms):
        return sum(np.sqrt(values.var(ddof=1) * cost) for values, cost in terms)

    low, middle, high = losses.T
    whole = root((low, 1), (middle - low, 11), (high - middle, 110))
    assert first.cost_factor == pytest.approx((root((middle, 10), (high - middle, 110)) / whole) ** 2)
    assert second.cost_factor == pytest.approx((root((low, 1), (high - low, 101)) / whole) ** 2)
    assert first.variance_reduction == pytest.approx(1 - 1 / first.cost_factor)
    assert first.correlation == pytest.approx(np.corrcoef(low, high)[0, 1])
    assert second.correlation == pytest.approx(np.corrcoef(middle, high)[0, 1])


def test_words_for_every_cost():
    stack = stack_of(mixed, finest)
    dear = transfer(stack, report_on(stack, 40, costs=(9.0, 10.0)), progress=False)
    assert re.match(r"worth it for transfer learning only: multilevel training needs [\d.]+ times the cost for the "
                    "same variance, and for transfer learning both levels know", dear.verdicts[0])
    flat = transfer(stack, report_on(stack, 40, losses=np.ones((40, 2))), progress=False).levels[0]
    assert "there is no variance that multilevel training could reduce" in flat.verdict
    assert np.isnan([flat.cost_factor, flat.correlation]).all()
    directions = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 3)) * [0, 1, 1] + [1, 0, 0])[0]
    losses = directions[:, 1:] @ np.array([[1, 1], [0, 0.353]])  # S = 1 + 0.353 sqrt(3.5), without sqrt(2.5 * 1.125)
    near = transfer(stack, report_on(stack, 40, costs=(1.0, 2.5), losses=losses), progress=False).levels[0]
    assert 1 / 1.1 < near.cost_factor < 1.1
    assert "multilevel training costs as much with it as without" in near.verdict


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
    assert "40 cost units spent on repeats" in told


def test_summaries_and_priors_without_a_box():
    prior = Independent(LogNormal(torch.zeros(2), 0.5 * torch.ones(2)), 1)
    stack = stack_of(noisy, finest, prior=prior)
    report = report_on(stack, 60)
    assert transfer(stack, report, progress=False).levels[0].information.values.shape == (2,)

    def mean_and_spread(x):
        return np.stack([x.mean(1), x[:, -1] - x[:, 0]], 1)

    own = transfer(stack, report, summary=mean_and_spread, progress=False)
    assert own.summaries == ("summary 0", "summary 1")
    assert (own.levels[0].information.values == own.levels[0].information.carried).all()


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
