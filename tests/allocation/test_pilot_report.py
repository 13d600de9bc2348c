import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsbi import optimal_allocation
from mlsbi.allocation.checking import convergence_rates
from mlsbi.allocation.moments import compact, measure
from mlsbi.allocation.pilot_report import PilotReport
from mlsbi.data import LevelData, MultilevelData
from mlsbi.levels import sum_pair_costs

STATES = ("untrained", "after level 0", "after the pilot")


def values(n=200, levels=3, seed=0, steps=(2.0, 0.5, 0.1)):
    """f^0 .. f^L of n rows, `(levels, n, 1)`."""
    corrections = np.random.default_rng(seed).normal(size=(levels, n, 1)) * np.array(steps[:levels])[:, None, None]
    return np.cumsum(corrections + np.array(steps[:levels])[:, None, None], axis=0)


def make(states=None, *, costs=(1.0, 5.0, 30.0), n=200, levels=3, **changes):
    """A healthy report of three states that all say the same, with what is changed."""
    f = values(n, levels)
    states = states or {name: measure([compact([f])], seed=0) for name in STATES}
    last = list(states.values())[-1]
    costs = tuple(costs[:levels])
    theta, x = torch.rand(n, 1), torch.from_numpy(f)
    runs = (2 * n + 2,) * (levels - 1) + (n,)
    ends = [LevelData(theta, x[0]), LevelData(theta, x[-1], x[-2])]
    data = MultilevelData((ends[0], *[LevelData(theta[:0], x[0][:0], x[0][:0])] * (levels - 2), ends[1]),
                          tuple(f"level {i}" for i in range(levels)), (0,) * levels, runs, (1.0,) * levels)
    report = PilotReport(
        names=data.names, integrand="loss", variances=last.variances, covariance=last.covariance, costs=costs,
        pair_costs=sum_pair_costs(costs), cost_unit="declared",
        single_level_variance=float(last.covariance[-1, -1]), correlations=last.correlations,
        shuffled=np.full(levels - 1, 0.1), noise_correlations=np.full(levels - 1, 0.9),
        noise_shuffled=np.full(levels - 1, 0.1), kurtosis=last.kurtosis, consistency=np.full(levels - 1, 0.2),
        rates=convergence_rates(last.means, last.variances, costs),
        spent=sum(run * cost for run, cost in zip(runs, costs, strict=True)), data=data, losses=f[..., 0].T,
        theta=theta, outputs=tuple(x), states=states,
    )  # fmt: skip
    return replace(report, **changes)


def moving(*steps, n=200):
    """States whose corrections have these standard deviations."""
    return {f"state {i}": measure([compact([values(n, steps=own)])], seed=0) for i, own in enumerate(steps)}


@pytest.fixture(scope="module")
def healthy():
    return make()


def test_a_healthy_report_has_nothing_to_say(healthy):
    assert healthy.warnings == ()


def test_sizes_are_the_optimal_ones_at_every_state():
    report = make(moving((2.0, 0.5, 0.1), (2.0, 1.0, 0.4), (1.0, 1.0, 1.0)))
    sizes = report.sizes(1e6)
    assert list(sizes["state"].unique()) == ["state 0", "state 1", "state 2"]
    for state, moments in report.states.items():
        own = sizes[sizes["state"] == state]
        plan = optimal_allocation(moments.variances, report.costs, budget=1e6)
        assert own["n"].to_numpy() == pytest.approx(plan.continuous, rel=1e-9)
        assert own["level"].tolist() == list(report.names)
        assert float(own["n"].to_numpy() @ np.array(report.pair_costs)) == pytest.approx(1e6)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(0.01, 10), min_size=3, max_size=3), st.lists(st.floats(0.1, 50), min_size=3, max_size=3))
def test_sizes_follow_the_square_root_of_variance_over_cost(steps, costs):
    report = make(moving(steps, n=20), costs=tuple(np.cumsum(costs)))
    n = report.sizes(1000.0)["n"].to_numpy()
    ideal = np.sqrt(report.variances / np.array(report.pair_costs))
    assert n / n[0] == pytest.approx(ideal / ideal[0], rel=1e-9)


def test_intervals_are_about_the_sizes(healthy):
    sizes, wide = healthy.sizes(1e5), healthy.sizes(1e5, level=0.99)
    assert (sizes["low"] < sizes["n"]).all()
    assert (sizes["n"] < sizes["high"]).all()
    assert (wide["low"] < sizes["low"]).all()
    assert (wide["high"] > sizes["high"]).all()
    share = np.log(sizes["high"] / sizes["low"])
    assert (share < 4 * 1.645 * np.nanmax(healthy.relative_errors)).all()
    few = make(n=20).sizes(1e5)
    assert (np.log(few["high"] / few["low"]).to_numpy() > 2 * share.to_numpy()).all()


def test_intervals_are_quantiles_over_the_draws(healthy):
    costs = np.array(healthy.pair_costs)
    shares = np.sqrt(healthy.variance_draws / costs)
    drawn = 1e5 * shares / (shares @ costs)[:, None]
    own = healthy.sizes(1e5, level=0.8).iloc[-3:]
    assert own["low"].to_numpy() == pytest.approx(np.quantile(drawn, 0.1, axis=0), rel=1e-9)
    assert own["high"].to_numpy() == pytest.approx(np.quantile(drawn, 0.9, axis=0), rel=1e-9)


def test_sizes_grow_with_the_budget_and_have_a_default(healthy):
    one, two = healthy.sizes(1e4), healthy.sizes(2e4)
    for column in ("n", "low", "high"):
        assert two[column].to_numpy() == pytest.approx(2 * one[column].to_numpy())
    default = healthy.sizes()["n"].to_numpy()[:3] @ np.array(healthy.pair_costs)
    assert default == pytest.approx(10 * healthy.spent, rel=0.5)
    assert default == float(f"{default:.1g}")


def test_levels_without_variance_get_no_rows():
    report = make(moving((2.0, 0.0, 0.1)), n=50, variances=np.array([4.0, 0.0, 0.01]))
    sizes = report.sizes(100.0)
    assert sizes[["n", "low", "high"]].to_numpy()[1].tolist() == [0, 0, 0]
    nothing = make(moving((0.0, 0.0, 0.0)), n=50).sizes(100.0)
    assert (nothing[["n", "low", "high"]].to_numpy() == 0).all()


@pytest.mark.parametrize("budget", [0, -1.0, math.inf, math.nan])
def test_sizes_need_a_budget(healthy, budget):
    with pytest.raises(ValueError, match="positive, finite budget"):
        healthy.sizes(budget)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, 90])
def test_intervals_need_a_probability(healthy, level):
    with pytest.raises(ValueError, match="level between 0 and 1"):
        healthy.sizes(level=level)


def test_drift_is_how_far_sizes_move():
    report = make(moving((2.0, 0.5, 0.1), (2.0, 0.5, 0.1)))
    assert report.drift == pytest.approx(np.ones(3))
    report = make(moving((2.0, 0.5, 0.1), (2.0, 2.0, 0.4), (2.0, 4.0, 0.1)))
    table = report.sizes(1.0)["n"].to_numpy().reshape(3, 3)
    assert report.drift == pytest.approx(table.max(0) / table.min(0))
    assert report.drift.max() > 2
    assert make(moving((2.0, 0.0, 0.1), (2.0, 0.0, 0.2))).drift[1] == 1


def test_errors_are_those_of_the_kurtosis(healthy):
    assert healthy.relative_errors == pytest.approx(np.sqrt((healthy.kurtosis - 1) / 200))
    report = make(kurtosis=np.array([3.0, math.nan, 9.0]))
    assert report.relative_errors[[0, 2]] == pytest.approx([0.1, 0.2])
    assert math.isnan(report.relative_errors[1])
    assert make(kurtosis=np.array([1 - 1e-16, 1.0, 1.0])).relative_errors.tolist() == [0, 0, 0]


def test_rows_for_an_error():
    report = make(kurtosis=np.array([3.0, math.nan, 9.0]))
    assert report.rows_for() == report.rows_for(0.2) == 200  # 8 / 0.04
    assert report.rows_for(0.1) == 800
    assert make(kurtosis=np.full(3, math.nan)).rows_for() == 0
    for error in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="positive relative error"):
            report.rows_for(error)


def test_the_draws_are_those_of_the_last_state():
    report = make(moving((2.0, 0.5, 0.1), (1.0, 1.0, 1.0)))
    assert report.variance_draws is list(report.states.values())[-1].draws
    assert report.variance_draws.mean(0) == pytest.approx(report.variances, rel=0.1)


def test_other_costs_change_all_that_depends_on_costs(healthy):
    report = healthy.with_costs([0.5, 7.0, 98.0])
    assert report.costs == (0.5, 7.0, 98.0)
    assert report.pair_costs == (0.5, 7.5, 105.0)
    assert report.cost_unit == "seconds"
    assert report.spent == pytest.approx(402 * 0.5 + 402 * 7.0 + 200 * 98.0)
    assert report.rates["gamma"] == pytest.approx(math.log2(98 / 7))
    assert report.rates["beta"] == healthy.rates["beta"]
    assert np.array_equal(report.variances, healthy.variances)
    plan = optimal_allocation(report.variances, report.costs, budget=1e6)
    assert report.sizes(1e6)["n"].to_numpy()[:3] == pytest.approx(plan.continuous, rel=1e-9)
    assert make(levels=2).with_costs([1, 2]).rates is None


@pytest.mark.parametrize("costs", [[1.0, 2.0], [1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 2.0], [1.0, -1.0, 2.0],
                                   [1.0, math.nan, 2.0], [1.0, math.inf, 2.0]])  # fmt: skip
def test_other_costs_must_be_costs(healthy, costs):
    with pytest.raises(ValueError, match="positive, finite cost for each of the levels"):
        healthy.with_costs(costs)


WARNINGS = {
    "A few rare rows decide the variance of 'level 2' (kurtosis 120 in 200 rows)":
        {"kurtosis": np.array([3.0, 3.0, 120.0])},
    "it is known to within 63% at best": {"kurtosis": np.array([3.0, 3.0, 81.0])},
    "'level 1' adds nothing to the level below": {"variances": np.array([4.0, 0.0, 0.01])},
    "'level 0' does not vary on any pilot row": {"variances": np.array([0.0, 0.3, 0.01])},
    "The coarse halves of 'level 2' do not have the law of 'level 1' (consistency 1.20 > 1)":
        {"consistency": np.array([0.2, 1.2])},
    "Pairs of 'level 1' and 'level 0' agree no better (correlation 0.05 of the loss) than rows paired at random "
    "do (up to 0.10): their outputs do, so that it is this loss": {"correlations": np.array([0.05, 0.9])},
    "'level 2' and 'level 1' show no shared noise: beyond what theta explains their outputs correlate by -0.05":
        {"noise_correlations": np.array([0.9, -0.05])},
    "'level 1' was measured as no dearer than 'level 0'": {"costs": (2.0, 2.0, 9.0), "cost_unit": "seconds"},
}  # fmt: skip


@pytest.mark.parametrize("said", WARNINGS)
def test_each_warning_is_about_its_own_number(said):
    found = make(**WARNINGS[said]).warnings
    assert len(found) == 1
    assert said in found[0]


@pytest.mark.parametrize(
    "change",
    [
        {"kurtosis": np.array([3.0, 3.0, 50.0])}, {"kurtosis": np.full(3, math.nan)},
        {"consistency": np.array([0.99, 1.0])}, {"noise_correlations": np.full(2, math.nan)},
        {"correlations": np.full(2, math.nan), "shuffled": np.full(2, math.nan)},
        {"rates": {"alpha": math.nan, "beta": math.nan, "gamma": math.nan}}, {"rates": None},
        {"noise_correlations": np.full(2, 0.2)}, {"noise_correlations": np.full(2, -0.9)},
        {"correlations": np.full(2, 0.2)},
    ],
)  # fmt: skip
def test_what_is_just_right_or_unknown_is_no_warning(change):
    assert make(**change).warnings == ()


def test_rows_that_are_not_paired_are_named():
    found = make(correlations=np.array([0.05, 0.9]), noise_correlations=np.array([0.05, 0.9])).warnings
    assert len(found) == 2
    assert "check that row i of both is the same theta and noise" in found[0]


def test_few_rows_are_not_called_rare_ones():
    found, = make(n=20, kurtosis=np.array([3.0, 3.0, 9.0])).warnings
    assert "20 rows tell the variance of 'level 2' to within 63% only" in found


@pytest.mark.parametrize(("n", "steps", "warned"), [
    (200, (2.0, 0.2, 0.4), True), (200, (2.0, 0.4, 0.2), False),
    (16, (2.0, 0.2, 0.22), False),  # beta below 0, by chance as far as 16 rows know
])  # fmt: skip
def test_corrections_that_clearly_grow_are_a_warning(n, steps, warned):
    report = make(moving(steps, n=n), n=n)
    assert any("grows from level to level" in warning for warning in report.warnings) == warned


def test_sizes_that_move_are_a_warning():
    steady, drifting = make(moving((2.0, 0.5, 0.1), (2.0, 0.8, 0.2))), make(moving((2.0, 0.5, 0.1), (2.0, 0.5, 2.0)))
    assert steady.warnings == ()
    found, = (warning for warning in drifting.warnings if "move by a factor" in warning)
    moved = int(np.argmax(drifting.drift))
    assert f"The rows that 'level {moved}' should get move by a factor of {drifting.drift[moved]:.1f}" in found
    assert ".sizes()" in found


def test_the_table_has_a_row_per_level(healthy):
    frame = healthy.to_frame()
    assert list(frame.columns) == [
        "level", "cost per run", "cost per row", "variance", "variance of correction", "correlation with level below",
        "correlation of shuffled rows", "correlation of the noise", "noise of shuffled rows", "kurtosis",
        "consistency",
    ]  # fmt: skip
    assert frame["level"].tolist() == ["level 0", "level 1", "level 2"]
    assert frame["variance"].to_numpy() == pytest.approx(np.diag(healthy.covariance))
    assert frame["variance of correction"].to_numpy() == pytest.approx(healthy.variances)
    assert frame["correlation with level below"].tolist()[1:] == healthy.correlations.tolist()
    assert frame.iloc[0][["correlation with level below", "consistency", "noise of shuffled rows"]].isna().all()


def test_the_report_reads_as_text(healthy):
    text = str(healthy)
    lines = text.splitlines()
    spent = 402 * 1.0 + 402 * 5.0 + 200 * 30.0
    assert lines[0] == f"Pilot: 200 joint rows, {spent:.4g} cost units spent; variances of the loss"
    assert "Rows that 80,000 cost units beside the pilot would buy [90% interval]:" in lines
    for state in STATES:
        assert any(line.startswith(state) for line in lines)
    assert "Variances are known to within" in lines[-1]
    assert "nan" not in text
    assert max(map(len, lines)) < 160


def test_the_text_tells_how_many_rows_it_takes():
    text = str(make(kurtosis=np.array([3.0, 3.0, 51.0]), cost_unit="seconds"))
    assert "known to within 50% or better (one standard error); 1,250 pilot rows would give 20%." in text
    assert "seconds spent" in text
    assert "would give" not in str(make(kurtosis=np.array([3.0, 3.0, 5.0])))


def test_the_text_ends_with_the_warnings():
    report = make(consistency=np.array([2.0, 2.0]))
    assert str(report).splitlines()[-2:] == [f"- {warning}" for warning in report.warnings]


def test_reports_where_nothing_varies_read_as_text():
    moments = {"output": measure([np.zeros((3, 20, 1))], seed=0)}
    report = make(moments, n=20, variances=np.zeros(3), kurtosis=np.full(3, math.nan), integrand="output")
    assert len(report.warnings) == 3
    assert "does not vary" in str(report)


@pytest.mark.parametrize("levels", [2, 3])
def test_an_allocation_takes_it(levels):
    report = make(levels=levels)
    plan = optimal_allocation(report, budget=20 * report.spent)
    rest = 20 * report.spent - report.spent + float(np.array(report.data.n) @ np.array(report.pair_costs))
    expected = optimal_allocation(report.variances, report.costs, budget=rest).continuous
    assert plan.continuous == pytest.approx(expected, rel=1e-6)
    assert plan.names == report.names
