r"""Spending in rounds: within the budget, by all that is known, on rows that scoring networks have not seen."""

import time

import numpy as np
import pytest
import torch

from mlsbi import BoxPrior, Level, LevelStack, open_store, optimal_allocation, pilot, simulate
from mlsbi.allocation import adaptive, remeasuring
from mlsbi.allocation.adaptive import simulate_adaptively
from mlsbi.allocation.networks import FOLDS

PRIOR = BoxPrior([0.0, -1.0], [1.0, 1.0])
COSTS = (1.0, 4.0, 20.0)
SPREADS = (1.0, 0.5, 0.1)  # sd of what each level adds


def noise(n, generator):
    return torch.randn(n, 3, generator=generator)


def level(index):
    def simulate_level(theta, noise):
        return (noise * torch.tensor(SPREADS))[:, : index + 1].sum(1, keepdim=True)

    return simulate_level


def stack(levels=3, costs=COSTS):
    return LevelStack(PRIOR, noise, [Level(f"level {i}", level(i), cost) for i, cost in enumerate(costs[:levels])])


def value(theta, x):
    return x[:, 0]


OPTIONS = {"seed": 0, "integrand": value, "pilot_rows": 16, "progress": False}


@pytest.fixture(scope="module")
def campaign():
    return simulate_adaptively(stack(), 4000, **OPTIONS)


def test_the_budget_is_spent_and_kept(campaign):
    assert campaign.spent <= 4000
    assert 4000 - campaign.spent < COSTS[0]  # nothing more could be bought
    assert campaign.spent == pytest.approx(campaign.plan.cost)
    runs = campaign.data.runs
    assert campaign.spent == sum(number * cost for number, cost in zip(runs, COSTS, strict=True))
    assert campaign.data.n == campaign.plan.n == campaign.rounds[-1].n


def test_rounds_grow_and_stay_within_their_parts(campaign):
    assert len(campaign.rounds) == 3
    for before, after in zip(campaign.rounds, campaign.rounds[1:], strict=False):
        assert all(a <= b for a, b in zip(before.n, after.n, strict=True))
        assert before.spent < after.spent
    assert all(done.spent <= done.budget for done in campaign.rounds)
    factors = [b.budget / a.budget for a, b in zip(campaign.rounds, campaign.rounds[1:], strict=False)]
    assert factors[0] == pytest.approx(factors[1])
    assert campaign.rounds[0].budget / campaign.pilot.spent == pytest.approx(factors[0])


def test_later_rounds_know_the_variances_better():
    errors = []
    for seed in range(8):
        done = simulate_adaptively(stack(), 8000, **{**OPTIONS, "seed": seed}).rounds
        errors.append([np.abs(np.array(each.variances) / np.square(SPREADS) - 1).mean() for each in done])
    first, _, last = np.mean(errors, 0)
    # 16 normal rows know a variance to sqrt(2 / 16) = 35%, a few hundred to some 10%.
    assert last < 0.5 * first


def test_one_round_is_a_pilot_and_a_plan():
    campaign = simulate_adaptively(stack(), 3000, rounds=1, **OPTIONS)
    report = pilot(stack(), 16, seed=0, integrand=value, progress=False)
    plan = optimal_allocation(report, budget=3000)
    data = simulate(stack(), plan, seed=0, reuse=report.data, progress=False)
    assert campaign.plan == plan
    for one, other in zip(campaign.data.levels, data.levels, strict=True):
        assert torch.equal(one.theta, other.theta)
        assert torch.equal(one.fine, other.fine)


def test_rows_of_levels_are_independent_and_never_repeated(campaign):
    rows = torch.cat([each.theta for each in campaign.data.levels])
    assert len(rows.unique(dim=0)) == len(rows)


@pytest.mark.slow
def test_a_seed_reproduces_with_networks_too():
    options = {**OPTIONS, "integrand": "loss", "rounds": 2}
    one, other = (simulate_adaptively(stack(2), 1000, **options) for _ in range(2))
    assert one.plan == other.plan
    assert one.rounds == other.rounds


def test_an_interrupted_campaign_goes_on_with_the_same_result(tmp_path, campaign):
    class Stop(BaseException):
        pass

    calls = []

    def breaking(theta, noise):
        calls.append(len(theta))
        if sum(calls) > 25:
            raise Stop
        return level(2)(theta, noise)

    levels = list(stack().levels)
    with pytest.raises(Stop):
        simulate_adaptively(LevelStack(PRIOR, noise, [*levels[:2], Level("level 2", breaking, COSTS[2])]), 4000,
                            store=tmp_path / "store", **OPTIONS)
    kept = len(open_store(tmp_path / "store").data().levels[0])
    assert kept > 0
    from mlsbi import accept_code

    accept_code(tmp_path / "store", stack())
    again = simulate_adaptively(stack(), 4000, store=tmp_path / "store", **OPTIONS)
    assert again.plan == campaign.plan
    for one, other in zip(again.data.levels, campaign.data.levels, strict=True):
        assert torch.equal(one.fine, other.fine)


def test_a_finished_campaign_runs_nothing_again(tmp_path, monkeypatch):
    first = simulate_adaptively(stack(), 4000, store=tmp_path / "store", **OPTIONS)
    rows = open_store(tmp_path / "store")
    before = {name.name for name in (tmp_path / "store" / "rows").iterdir()}
    again = simulate_adaptively(stack(), 4000, store=rows, **OPTIONS)
    assert {name.name for name in (tmp_path / "store" / "rows").iterdir()} == before
    assert again.rounds == first.rounds


@pytest.mark.parametrize("pilot_rows", [16, 17])  # with an odd number folds of joined sets would cross over
def test_scoring_networks_have_not_seen_the_rows(monkeypatch, pilot_rows):
    class Memory:
        def __init__(self):
            self.seen = set()

    def remember(reader, levels, **options):
        networks = [Memory() for _ in range(FOLDS)]
        for own in levels:
            for rows in own:
                for row, theta in enumerate(rows.theta):
                    for fold, network in enumerate(networks):
                        if row % FOLDS != fold:
                            network.seen.add(theta.numpy().tobytes())
        yield "after the pilot", networks

    scored = []

    class Checked:
        name, needs_network = "checked", True

        def blocks(self, network, rows):
            if isinstance(network, Memory):
                assert network.seen
                for theta in rows.theta:
                    assert theta.numpy().tobytes() not in network.seen
                    scored.append(theta.numpy().tobytes())
            yield torch.stack([x.double() for x in rows.outputs]).numpy()

    monkeypatch.setattr(remeasuring, "train_states", remember)
    monkeypatch.setattr(adaptive, "resolve_integrand", lambda integrand: Checked())
    campaign = simulate_adaptively(stack(), 3000, **{**OPTIONS, "pilot_rows": pilot_rows, "rounds": 2})
    assert len(set(scored)) >= sum(campaign.rounds[0].n)  # all rows are scored


def test_bounds_are_kept():
    campaign = simulate_adaptively(stack(), 4000, minimum=[1, 40, 1], maximum=[300, None, None], **OPTIONS)
    assert campaign.data.n[1] >= 40
    assert all(done.n[0] <= 300 for done in campaign.rounds)


def test_measured_costs_are_seconds():
    def slow(theta, noise):
        time.sleep(2e-3 * len(theta))
        return level(1)(theta, noise)

    two = LevelStack(PRIOR, noise, [Level("quick", level(0)), Level("slow", slow)])
    campaign = simulate_adaptively(two, 0.5, **OPTIONS)
    assert campaign.pilot.cost_unit == "seconds"
    assert campaign.spent == sum(campaign.data.seconds)
    assert campaign.spent < 0.75  # as far as costs stay what they were: a busy machine changes them
    assert "seconds spent" in str(campaign)


def failing(index, share):
    """A level that fails on a share of the rows, by their noise."""

    def simulate_level(theta, noise):
        unlucky = torch.special.ndtr(noise[:, index: index + 1]) * 1000 % 1 < share
        return torch.where(unlucky, torch.nan, level(index)(theta, noise))

    return simulate_level


@pytest.mark.filterwarnings("ignore:(Left out|Replaced) rows")
@pytest.mark.parametrize("on_failure", ["drop", "redraw"])
@pytest.mark.parametrize("shares", [(0.0, 0.0, 0.5), (0.5, 0.0, 0.0), (0.3, 0.3, 0.3)])
@pytest.mark.parametrize("rounds", [1, 3])
def test_failed_rows_are_paid_for_and_what_they_leave_is_spent(on_failure, shares, rounds):
    levels = [Level(f"level {i}", failing(i, share), cost)
              for i, (share, cost) in enumerate(zip(shares, COSTS, strict=True))]
    for seed in range(4):
        campaign = simulate_adaptively(LevelStack(PRIOR, noise, levels), 6000, on_failure=on_failure,
                                       **{**OPTIONS, "seed": seed, "rounds": rounds, "pilot_rows": 40})
        runs = campaign.data.runs
        assert campaign.spent == pytest.approx(sum(number * cost for number, cost in zip(runs, COSTS, strict=True)))
        assert 0.985 * 6000 < campaign.spent <= 6000  # less than a row and its failures may be left
        assert campaign.data.n == campaign.plan.n  # the variance it predicts is that of the rows there are
        assert sum(campaign.data.failures) > 0


def test_identical_levels_get_no_more_than_the_pilots_pairs():
    same = LevelStack(PRIOR, noise, [Level("one", level(0), 1.0), Level("other", level(0), 20.0)])
    campaign = simulate_adaptively(same, 2000, **OPTIONS)
    assert campaign.data.n[1] == 16
    assert campaign.spent <= 2000


def test_it_prints_and_makes_a_table(campaign):
    text = str(campaign)
    assert "round 3" in text
    assert "level 2" in text
    frame = campaign.to_frame()
    assert len(frame) == 9
    assert frame["spent"].is_monotonic_increasing


@pytest.mark.parametrize(
    ("budget", "options", "match"),
    [
        (4000, {"rounds": 0}, "rounds"), (4000, {"rounds": 1.5}, "rounds"), (-1, {}, "positive"),
        (4000, {"rounds": float("nan")}, "rounds"), (4000, {"pilot_rows": 16.5}, "pilot_rows"), (None, {}, "budget"),
        ("1e4", {}, "budget"), (491, {}, "the minimum of every level, 495"), (4000, {"minimum": 1000}, "minimum"),
        (float("nan"), {}, "finite"), (400, {}, "beyond the cost of a pilot of 16 rows, 490"),
        (4000, {"integrand": "entropy"}, "integrand"), (4000, {"density": "gan"}, "density"),
        (4000, {"maximum": 5}, "maximum"), (4000, {"pilot_rows": 4}, "pilot_rows"),
        (4000, {"batch_size": 0}, "batch_size"), (4000, {"minimum": 0}, "minimum"),
        (4000, {"minimum": [5, 5]}, "minimum"),
    ],
)  # fmt: skip
def test_bad_requests_cost_nothing(budget, options, match):
    def never(theta, noise):
        raise AssertionError("simulated")

    levels = [Level(f"level {i}", never, cost) for i, cost in enumerate(COSTS)]
    with pytest.raises(ValueError, match=match):
        simulate_adaptively(LevelStack(PRIOR, noise, levels), budget, **{**OPTIONS, **options})


def test_nothing_is_simulated_for_a_budget_below_the_pilots(tmp_path):
    with pytest.raises(ValueError, match="fewer pilot rows"):
        simulate_adaptively(stack(), 400, store=tmp_path / "store", **OPTIONS)
    assert not (tmp_path / "store").exists()


def test_what_was_spent_is_kept_where_costs_turn_out_too_high(tmp_path):
    measured = stack(2, (None, None))
    with pytest.raises(ValueError, match="already spent"):
        simulate_adaptively(measured, 1e-12, store=tmp_path / "store", **OPTIONS)
    assert open_store(tmp_path / "store").costs[0] > 0
    report = pilot(measured, 16, seed=0, integrand=value, store=tmp_path / "store", progress=False)
    assert report.n == 16
