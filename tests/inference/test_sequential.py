import json
import math
import os
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import mlsbi
from mlsbi import (
    MDN,
    NLE,
    BoxPrior,
    Level,
    LevelStack,
    MCMCOptions,
    Multilevel,
    SimulationError,
    SingleLevel,
    TrainingOptions,
)
from mlsbi.inference.active import ActiveProposal, disagreement
from mlsbi.inference.budgeting import Bought, Budget
from mlsbi.inference.sequential import infer_sequentially
from mlsbi.inference.surprise import outside_all, surprise
from mlsbi.inference.truncated import TruncatedPrior, TruncationError
from mlsbi.priors import sample_prior

SD = 0.05
CALLS = []


def low(theta, noise):
    CALLS.append(("low", len(theta)))
    return 1.2 * theta + SD * noise + 0.2


def high(theta, noise):
    CALLS.append(("high", len(theta)))
    return theta + SD * noise


def make_stack(levels=2, low=low, high=high, **changes):
    """Outputs about theta: the posterior at x is a normal of sd .05 about x."""
    return replace(LevelStack(
        prior=BoxPrior([0.0, 0.0], [2.0, 2.0], names=["rate", "shift"]),
        noise=lambda n, generator: torch.randn(n, 2, generator=generator),
        levels=[Level("low", low, cost=1.0), Level("high", high, cost=20.0)][-levels:],
    ), **changes)


X_O = torch.tensor([0.5, 1.2])
QUICK = {"density": MDN(components=1, hidden=16, layers=1), "progress": False,
         "training": TrainingOptions(epochs=60, learning_rate=5e-3)}


def infer(stack=None, x_o=X_O, *, seed=0, strategy="multilevel", **options):
    return infer_sequentially(make_stack() if stack is None else stack, x_o, seed=seed, strategy=strategy,
                              **{**QUICK, **options})


@pytest.fixture(scope="module")
def budgeted():
    return infer(rounds=3, budget=9000, pilot_rows=8, integrand="output", ensemble=3)


def test_rounds_close_in_on_the_posterior(budgeted):
    shares = [done.share for done in budgeted.rounds]
    assert shares[0] == 1.0
    assert shares[0] > shares[1] > shares[2]
    # The truth: a disc of 4 sd about the observation is 3% of the prior.
    assert 0.01 < shares[2] < 0.2
    exact = X_O + SD * torch.randn(5000, 2, generator=torch.Generator().manual_seed(0))
    assert budgeted.truncation_error(exact)[-1] < 1e-3
    draws = budgeted.posterior.sample((4000,), seed=1)
    assert float((draws.mean(0) - X_O).abs().max()) < 0.4 * SD
    assert float((draws.std(0) / SD - 1).abs().max()) < 0.4
    first = budgeted.posteriors[0].sample((4000,), seed=1)
    assert float((first.std(0) - SD).abs().max()) > float((draws.std(0) - SD).abs().max())


def test_a_budget_is_kept_and_divided_anew_in_every_round(budgeted):
    assert [done.spent for done in budgeted.rounds] == sorted(done.spent for done in budgeted.rounds)
    for number, done in enumerate(budgeted.rounds, 1):
        assert done.spent <= 3000 * number + 1e-6
        assert done.spent > 3000 * number - 21  # a whole pair did not fit any more
    runs = budgeted.data.runs
    assert budgeted.spent == pytest.approx(runs[0] + 20 * runs[1])
    assert budgeted.rounds[0].variances != budgeted.rounds[1].variances
    for done in budgeted.rounds:
        assert done.trained == done.inside
    # Rows of earlier rounds that lie inside count.
    assert all(a > b for a, b in zip(budgeted.rounds[2].inside, budgeted.rounds[2].n, strict=True))


def test_rows_come_from_the_truncated_prior_at_every_level(budgeted):
    for number, (prior, done) in enumerate(zip(budgeted.priors, budgeted.rounds, strict=True)):
        before = [sum(each.n[level] for each in budgeted.rounds[:number]) for level in range(2)]
        for level in range(2):
            new = budgeted.data.levels[level].theta[before[level]: before[level] + done.n[level]]
            assert len(new) == done.n[level]
            if number:
                assert prior.holds(new).all()
                inside = prior.holds(budgeted.data.levels[level].theta[: before[level] + done.n[level]])
                assert int(inside.sum()) == done.inside[level]


def test_a_likelihood_is_learned_from_the_rows_inside(budgeted, tmp_path):
    inside, prior = budgeted.inside, budgeted.priors[-1]
    assert inside.n == budgeted.rounds[-1].inside
    assert all(prior.holds(level.theta).all() for level in inside.levels)
    nle = NLE(prior, strategy="transfer_then_multilevel", seed=0, density=MDN(components=1, hidden=16, layers=1),
              training=TrainingOptions(epochs=60, learning_rate=5e-3)).fit(inside, 3, progress=False)
    nle.save(tmp_path / "likelihood")
    posterior = mlsbi.load(tmp_path / "likelihood", prior).posterior(budgeted.x, mcmc=MCMCOptions(method="importance"))
    draws = posterior.sample((2000,), seed=1)
    assert prior.holds(draws).all()
    theta = sample_prior(prior, 2000, seed=2)
    assert float((theta.std(0) / SD - 1).abs().min()) > 0.4  # which what follows tells from the posterior
    # Draws err by 2% of an sd; the rest is what the few pairs of the finest level leave unknown.
    assert float((draws.mean(0) - X_O).abs().max()) < 0.3 * SD
    assert float((draws.std(0) / SD - 1).abs().max()) < 0.2
    outside = X_O + 20 * SD * torch.tensor([1.0, -1.0])  # inside the prior, where nothing was learned any more
    assert budgeted.priors[0].log_prob(outside).isfinite()
    assert posterior.log_prob(outside).isneginf()
    assert float((posterior.map(seed=0) - X_O).abs().max()) < 0.3 * SD


def test_regions_are_nested(budgeted):
    assert [len(prior.regions) for prior in budgeted.priors[1:]] == [1, 2]


def test_regions_are_of_each_network_or_of_their_mixture(budgeted):
    assert [len(region.thresholds) for region in budgeted.priors[-1].regions] == [3, 3]
    found = infer(rounds=2, n=(80, 16), ensemble=3, region="mixture")
    assert [len(region.thresholds) for region in found.priors[-1].regions] == [1]


def test_tables_and_words(budgeted):
    frame = budgeted.to_frame()
    assert list(frame["n"]) == [n for done in budgeted.rounds for n in done.n]
    assert "round 3: " in str(budgeted)
    assert "cost units" in str(budgeted)
    assert budgeted.posterior is budgeted.posteriors[-1]
    assert budgeted.names == ("low", "high")
    assert budgeted.unit == "declared"


def test_seeds_reproduce_and_leave_global_state():
    state = torch.get_rng_state()
    one, again, other = (infer(rounds=2, n=(80, 16), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.data.levels[1].theta, again.data.levels[1].theta)
    assert torch.equal(one.posterior.sample((5,), seed=0), again.posterior.sample((5,), seed=0))
    assert not torch.equal(one.data.levels[1].theta, other.data.levels[1].theta)


def test_published_methods_are_options():
    """MF-TSNPE: all cheap runs in the first round, and every round trains on all rows; TSNPE: one level."""
    found = infer(rounds=3, n=[(200, 10), (0, 10), (0, 10)], strategy=("transfer", "high", "high"), go_on=True,
                  keep="all", region="mixture", outside=1e-3)
    assert [done.n for done in found.rounds] == [(200, 10), (0, 10), (0, 10)]
    assert found.rounds[-1].trained == (200, 30)
    assert [len(prior.regions) for prior in found.priors[1:]] == [1, 1]  # the last round's alone
    assert found.rounds[-1].inside[0] < 200
    assert found.inside.n == found.rounds[-1].inside  # which are fewer than it trained on
    assert found.spent == pytest.approx(30 * 21 + 200 + 2)  # two rows of the first round are replayed
    single = infer(make_stack(levels=1), rounds=2, n=(41,), strategy=SingleLevel(-1), outside=1e-3)
    assert [done.n for done in single.rounds] == [(21,), (20,)]


def test_active_rounds_go_where_networks_disagree():
    options = {"rounds": 2, "n": [(100, 20), (0, 50)], "strategy": "transfer", "keep": "all", "ensemble": 3}
    found = infer(active=0.2, outside=1e-3, **options)
    truncated, posterior = found.priors[1], found.posteriors[0]
    proposal = ActiveProposal(truncated, posterior, 0.2, pool=500)
    draws = sample_prior(proposal, 50, seed=3)
    chosen = torch.arange(50) % 5 == 4
    pool = sample_prior(found.estimator.prior, 5000, seed=4)
    scores = disagreement(posterior, pool)
    # The best 10 of a pool of 500 are far above what is drawn otherwise, and the first is the best.
    assert disagreement(posterior, draws[chosen]).min() > scores.quantile(0.9)
    assert disagreement(posterior, draws[chosen]).argmax() == 0
    assert truncated.holds(draws[~chosen]).all()
    new = found.data.levels[1].theta[20:]
    assert disagreement(posterior, new[4::5]).mean() > 2 * disagreement(posterior, new[chosen[: len(new)].logical_not()]
                                                                        ).mean()
    # Members of equal weights do not disagree.
    same = mlsbi.DirectPosterior([posterior.networks[0]] * 3, posterior.prior, posterior.x)
    assert float(disagreement(same, pool).abs().max()) < 1e-12


def test_a_folder_goes_on_where_it_stopped(tmp_path, monkeypatch):
    options = {"rounds": 3, "budget": 3000, "pilot_rows": 8, "integrand": "output", "outside": 1e-3,
               "folder": tmp_path / "kept"}
    whole = infer(**{**options, "folder": None})
    fit = mlsbi.NPE.fit
    trained = []

    def fails(self, *arguments, **how):
        trained.append(1)
        if len(trained) == 2:
            raise KeyboardInterrupt
        return fit(self, *arguments, **how)

    monkeypatch.setattr(mlsbi.NPE, "fit", fails)
    with pytest.raises(KeyboardInterrupt):
        infer(**options)
    CALLS.clear()
    found = infer(**options)
    assert len(trained) == 4  # the first round's networks were read
    again = sum(n for name, n in CALLS if name == "high")
    assert again == found.rounds[2].n[1]  # the rows of two rounds were read too
    for one, other in zip(whole.data.levels, found.data.levels, strict=True):
        assert torch.equal(one.theta, other.theta)
        assert torch.equal(one.fine, other.fine)
    assert torch.equal(whole.posterior.sample((9,), seed=0), found.posterior.sample((9,), seed=0))
    own, = (tmp_path / "kept").glob("observation-*")
    assert torch.tensor(json.loads((own / "x_o.json").read_text())).tolist() == X_O.tolist()
    model = mlsbi.load(own / "round-3/model")
    assert torch.equal(model.posterior(X_O).sample((9,), seed=0), found.posterior.sample((9,), seed=0))
    CALLS.clear()
    assert infer(**options).rounds[-1].n == found.rounds[-1].n
    assert sum(n for name, n in CALLS if name == "high") == 0
    assert len(trained) == 4
    # The first round is every observation's.
    other = infer(x_o=X_O + 0.1, **options)
    assert len(trained) == 6
    assert sum(n for name, n in CALLS if name == "high") == sum(done.n[1] for done in other.rounds[1:])
    assert other.rounds[0].n == found.rounds[0].n
    assert infer(x_o=X_O + 0.1, **{**options, "folder": None}).rounds[2].mean == other.rounds[2].mean
    with pytest.raises(ValueError, match=r"other settings \(outside\)"):
        infer(**{**options, "outside": 1e-2})


def test_a_pilots_rows_are_not_run_again(tmp_path):
    mlsbi.pilot(make_stack(), 8, seed=3, integrand="output", store=tmp_path / "kept", progress=False)
    CALLS.clear()
    options = {"rounds": 2, "budget": 3000, "pilot_rows": 8, "integrand": "output", "seed": 3}
    found = infer(store=tmp_path / "kept", **options)
    ran = sum(n for name, n in CALLS if name == "high")
    assert ran == sum(done.n[1] for done in found.rounds) - 8
    CALLS.clear()
    alone = infer(**options)
    assert sum(n for name, n in CALLS if name == "high") == ran + 8
    assert torch.equal(alone.posterior.sample((5,), seed=0), found.posterior.sample((5,), seed=0))
    with pytest.warns(UserWarning, match="No row in .*kept is of seed 4, .* rows of 3"):
        infer(store=tmp_path / "kept", **{**options, "rounds": 1, "seed": 4})
    # A folder knows where the first round's rows are: without them they would be paid for twice.
    options |= {"rounds": 1, "n": (40, 8), "budget": None, "folder": tmp_path / "rounds"}
    infer(store=tmp_path / "kept", **options)
    with pytest.raises(ValueError, match=r"other settings \(store\)"):
        infer(**options)


def test_a_failed_run_leaves_what_was_finished(tmp_path, monkeypatch):
    monkeypatch.setenv("BROKEN", "yes")
    CALLS.clear()

    def fragile(theta, noise):
        if os.environ.get("BROKEN") and float(noise[0, 0]) > 1.5:
            raise RuntimeError("no")
        return high(theta, noise)

    stack = make_stack(high=fragile)
    with pytest.raises(SimulationError):
        infer(stack, rounds=2, n=(100, 60), folder=tmp_path / "kept", batch_size=1)
    finished = sum(n for name, n in CALLS if name == "high")
    assert finished > 2
    monkeypatch.delenv("BROKEN")
    CALLS.clear()
    found = infer(stack, rounds=2, n=(100, 60), folder=tmp_path / "kept", batch_size=1, retry_failed=True)
    assert sum(n for name, n in CALLS if name == "high") == 60 - finished
    assert [done.n[1] for done in found.rounds] == [30, 30]


def test_rows_that_fail_are_dropped_and_paid_for():
    def fragile(theta, noise):
        return torch.where(noise[:, :1] > 1.5, math.nan, high(theta, noise))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = infer(make_stack(high=fragile), rounds=2, n=(200, 80), on_failure="drop")
    assert all(done.n[1] < 40 for done in found.rounds)
    assert found.data.runs[1] >= 80
    assert found.spent == pytest.approx(found.data.runs[0] + 20 * found.data.runs[1])


def test_rows_that_are_mended_later_are_trained_on_by_later_rounds(tmp_path, monkeypatch):
    monkeypatch.setenv("BROKEN", "yes")

    def fragile(theta, noise):
        bad = (noise[:, :1] > 1.0) & bool(os.environ.get("BROKEN"))
        return torch.where(bad, math.nan, high(theta, noise))

    options = {"rounds": 2, "n": (100, 60), "folder": tmp_path / "kept", "on_failure": "drop"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = infer(make_stack(high=fragile), **options)
        monkeypatch.delenv("BROKEN")
        after = infer(make_stack(high=fragile), retry_failed=True, **options)
    assert [done.n[1] for done in after.rounds] == [30, 30]
    assert before.rounds[0].n[1] < 30
    assert after.rounds[0].mean == before.rounds[0].mean  # what the second round was decided by
    assert after.rounds[1].share == before.rounds[1].share
    assert after.rounds[1].mean != before.rounds[1].mean


def test_costs_may_be_measured():
    stack = make_stack()
    timed = replace(stack, levels=[replace(level, cost=None) for level in stack.levels])
    found = infer(timed, rounds=2, n=(60, 16))
    assert found.unit == "seconds"
    assert found.spent == pytest.approx(sum(found.data.seconds))


def test_a_tiny_truncated_prior_is_told_and_resampled(monkeypatch):
    monkeypatch.setattr("mlsbi.inference.truncated.LEAST_ACCEPTANCE", 0.99)
    with pytest.warns(UserWarning, match="resampled by their weights"):
        found = infer(rounds=2, n=(200, 40), outside=1e-2, ensemble=2)
    last = found.rounds[-1]
    assert last.resampled
    assert 1 <= last.effective <= 256
    assert any("resampled by their weights" in note for note in last.notes)
    assert isinstance(found.priors[1], TruncatedPrior)
    assert found.priors[1].holds(found.data.levels[1].theta[20:]).all()


def test_a_far_observation_is_warned_of_before_more_is_spent():
    with pytest.warns(UserWarning, match=r"farther from the simulations.*entries \[1\]"):
        found = infer(x_o=torch.tensor([0.5, 9.0]), rounds=1, n=(200, 40))
    assert "farther" in found.rounds[0].notes[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        infer(rounds=1, n=(200, 40))


def test_one_simulation_in_n_is_farther_out_than_all_others():
    generator = torch.Generator().manual_seed(0)
    found = [surprise(x[0], x[1:]) for x in torch.randn(600, 20, 3, generator=generator)]
    assert sum(value > 1 for value in found) / 600 == pytest.approx(1 / 20, abs=4 * math.sqrt(0.05 * 0.95 / 600))
    assert sum(value > 1.5 for value in found) < 15
    constant = torch.cat([torch.randn(50, 1, generator=generator), torch.ones(50, 1)], 1)
    assert surprise(torch.tensor([0.0, 1.0]), constant) < 1
    assert surprise(torch.tensor([0.0, 1.1]), constant) > 10


def test_an_observation_like_the_finest_level_alone_is_no_surprise():
    generator = torch.Generator().manual_seed(0)
    low, high = torch.randn(50, 2, generator=generator) + 20, torch.randn(10, 2, generator=generator)
    assert outside_all(torch.zeros(2), {"low": low, "high": high}) is None
    assert outside_all(torch.full((2,), 20.0), {"low": low, "high": high}) is None
    assert "10 of 'high'" in outside_all(torch.full((2,), 10.0), {"low": low, "high": high})
    assert "too few to tell" in outside_all(torch.full((2,), 10.0), {"low": low, "high": high[:7]})
    assert outside_all(torch.full((2,), 20.0), {"low": low, "high": high[:7]}) is None
    assert outside_all(torch.full((2,), 10.0), {"low": low[:7], "high": high[:7]}) is None


@pytest.mark.parametrize(("options", "match"), [
    ({}, "a budget or n"),
    ({"n": (100, 10), "budget": 3.0}, "got both"),
    ({"n": (100, 10), "rounds": 0}, "rounds"),
    ({"n": (100, 3), "rounds": 3}, r"round 1 of 3 has \(34, 1\)"),
    ({"n": (100, 6), "rounds": 9}, r"round 1 of 9 has \(12, 1\)"),
    ({"n": 60}, "one a level"),
    ({"n": (100, 10), "ensemble": 0}, "ensemble of at least 1"),
    ({"n": (60, 10), "strategy": "auto", "training": TrainingOptions(validation_fraction=0.0)}, "held-out rows"),
    ({"n": [(100, 2)], "rounds": 2}, "one entry a round, 2"),
    ({"n": [(0, 2), (0, 2)], "rounds": 2}, "every level in the first round"),
    ({"n": [(9, 2), (9, 0)], "rounds": 2}, "the finest in each"),
    ({"budget": 1000.0, "rounds": 3}, "beyond the cost of a pilot of 64 rows, 1410"),
    ({"budget": math.nan}, "finite number as budget"),
    ({"n": (100, 10), "keep": "some"}, "keep="),
    ({"n": (100, 10), "outside": 1.0}, "outside"),
    ({"n": (100, 10), "region": "all"}, "region="),
    ({"n": (100, 10), "active": 1.0}, "active"),
    ({"n": (100, 10), "active": 0.2}, 'keep="all"'),
    ({"n": (100, 10), "active": 0.2, "keep": "all"}, "ensemble of at least 2"),
    ({"n": (100, 10), "strategy": "auto", "go_on": True}, "mix no others"),
    ({"n": (100, 10), "strategy": ("high", "low")}, "one for each of 3 rounds"),
    ({"n": (100, 10), "strategy": "best"}, "best"),
    ({"n": (100, 10), "x_o": torch.zeros(3)}, "one observation of shape"),
    ({"n": (100, 10), "x_o": torch.tensor([0.0, math.nan])}, "finite"),
    ({"n": (100, 10), "seed": -1}, "seed"),
])
def test_bad_requests_stop_before_anything_is_spent(options, match):
    CALLS.clear()
    with pytest.raises(ValueError, match=match):
        infer(**options)
    assert sum(n for _, n in CALLS) <= 1
    assert not any(name == "high" for name, _ in CALLS)


def test_a_strategy_that_cannot_use_the_stack_is_told_after_one_run():
    CALLS.clear()
    with pytest.raises(ValueError, match="at least 2 levels"):
        infer(make_stack(levels=1), n=(60,), strategy="transfer")
    assert CALLS == [("high", 1)]


def test_a_strategy_for_each_round():
    found = infer(rounds=2, n=(60, 20), strategy=("high", Multilevel()))
    assert found.estimator.strategy == Multilevel()


def test_a_round_without_rows_to_train_on_stops_before_it_is_paid_for():
    CALLS.clear()
    with pytest.raises(ValueError, match=r"Round 2 would train on \d of 'low', .*keep=\"all\""):
        infer(rounds=2, n=[(2, 60), (0, 60)], strategy="transfer", outside=0.5)
    assert sum(n for name, n in CALLS if name == "high") == 60


@pytest.mark.parametrize("on_failure", [pytest.param("drop", marks=pytest.mark.slow), "redraw"])
def test_a_budget_holds_where_rows_fail(on_failure):
    def fragile(theta, noise):
        return torch.where(noise[:, :1] > 0.3, math.nan, high(theta, noise))  # 38%

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = infer(make_stack(high=fragile), rounds=3, budget=6000, pilot_rows=24, integrand="output",
                      on_failure=on_failure)
    assert all(done.spent <= 2000 * number for number, done in enumerate(found.rounds, 1))
    assert found.rounds[-1].spent > 5000
    assert found.spent == pytest.approx(found.data.runs[0] + 20 * found.data.runs[1])


@pytest.mark.parametrize("pair_costs", [pytest.param(None, marks=pytest.mark.slow), [1.0, 5.0, 20.0],
                                        pytest.param([1.0, 30.0, 60.0], marks=pytest.mark.slow)])
def test_three_levels_and_costs_of_pairs(pair_costs):
    base = make_stack()
    middle = Level("middle", lambda theta, noise: 1.05 * theta + SD * noise, cost=6.0)
    stack = replace(base, levels=[base.levels[0], middle, base.levels[1]], pair_costs=pair_costs)
    found = infer(stack, rounds=2, budget=4000, pilot_rows=8, integrand="output")
    costs = stack.row_costs
    assert found.spent <= 4000
    # Every row as it is paid for; the pilot's eight joint rows and their replays by themselves.
    later = sum(n * cost for n, cost in zip(found.rounds[1].n, costs, strict=True))
    assert found.rounds[1].spent - found.rounds[0].spent == pytest.approx(later)
    first = mlsbi.simulate_adaptively(stack, 2000, seed=0, rounds=1, pilot_rows=8, minimum=8,
                                      integrand="output", progress=False)
    assert first.data.n == found.rounds[0].n
    assert found.rounds[0].spent == pytest.approx(first.spent)


def test_a_budget_that_costs_have_outrun_buys_what_it_can():
    budget = Budget(total=100.0, rounds=2, pilot_rows=8, pilot_options={}, remeasuring=None)
    inside = mlsbi.MultilevelData.from_arrays([(torch.rand(3, 1), torch.rand(3, 1)),
                                               (torch.rand(2, 1), torch.rand(2, 1), torch.rand(2, 1))])
    for spent, expected in ((99.9, (0, 0)), (57.0, (1, 2)), (0.0, None)):
        purchase = budget.more(make_stack(), 2, Bought(inside, spent, (1.0, 20.0), (1.0, 1.0), (1.0, 1.0)), seed=0)
        cost = purchase.n[0] + 21 * purchase.n[1]
        assert cost <= 100 - spent
        if expected is not None:
            assert purchase.n == expected
            assert any("bought no 8 rows" in note for note in purchase.notes)


def test_one_level_with_a_budget():
    found = infer(make_stack(levels=1), rounds=2, budget=1600, pilot_rows=8, integrand="output", strategy="high")
    assert found.spent <= 1600
    assert len(found.rounds[1].n) == 1


def test_other_priors_and_fewer_parameters():
    stack = replace(make_stack(), prior=torch.distributions.Independent(
        torch.distributions.Normal(torch.ones(2), torch.ones(2)), 1))
    found = infer(stack, rounds=2, n=(200, 40), outside=1e-2)
    assert found.rounds[1].share < 1
    assert found.priors[1].holds(found.data.levels[1].theta[20:]).all()
    base = make_stack()
    part = Level("part", lambda theta, noise: theta + SD * noise, cost=1.0, parameters=["rate"])
    partly = replace(base, levels=[part, base.levels[1]])
    assert infer(partly, rounds=2, n=(200, 40), outside=1e-2).rounds[1].share < 1


def test_rounds_that_contradict_each_other_give_what_was_found(monkeypatch):
    def contradict(*arguments, **options):
        raise TruncationError("rounds contradict each other")

    monkeypatch.setattr("mlsbi.inference.sequential.truncate_prior", contradict)
    with pytest.raises(TruncationError) as caught:
        infer(rounds=2, n=(60, 16))
    assert len(caught.value.found.rounds) == 1
    assert caught.value.found.inside.n == caught.value.found.data.n  # of the whole prior
    assert caught.value.found.posterior.sample((2,), seed=0).shape == (2, 2)


def test_what_was_decided_stands_when_networks_come_out_otherwise(tmp_path, monkeypatch):
    """Another machine rounds otherwise: plans and regions are read, not found anew."""
    options = {"rounds": 2, "budget": 3000, "pilot_rows": 8, "integrand": "output", "folder": tmp_path / "kept"}
    found = infer(**options)
    monkeypatch.setattr("mlsbi.inference.sequential.density_region", None)
    monkeypatch.setattr("mlsbi.inference.budgeting.optimal_allocation", None)
    CALLS.clear()
    again = infer(**options)
    assert [done.n for done in again.rounds] == [done.n for done in found.rounds]
    assert not any(name == "high" for name, _ in CALLS)
    assert not list((tmp_path / "kept").glob("**/training"))
    assert infer(**{**options, "rounds": np.int64(2), "seed": np.int64(0)}).rounds[1].n == found.rounds[1].n


def test_leakage_is_warned_of(monkeypatch):
    monkeypatch.setattr("mlsbi.inference.sequential._LEAKY", -1.0)
    with pytest.warns(UserWarning, match="lie outside what its theta were drawn from"):
        infer(rounds=1, n=(60, 16))
