import math

import numpy as np
import pytest
import torch

from mlsbi import NPE, NSF, TrainingOptions, tasks
from mlsbi.report.checking import check_likelihood, check_posterior, compare, lost_rows, verdict, worst_level

CREDIBILITY = [0.5, 0.8, 0.9, 0.95]


def make_results(**changes):
    checks = {
        "n_test": 400, "draws": 500, "nlpd": {"mean": -0.9, "median": -1.0, "standard_error": 0.05, "n": 400},
        "prior_nlpd": 0.27, "reference_nlpd": None, "kld": None,
        "coverage": {"credibility": CREDIBILITY, "found": [0.51, 0.79, 0.9, 0.94], "p": 0.4}, "sbc": {"p": [0.3, 0.6]},
        "likelihood_kld": None, "mcmc": None,
    }
    record = {"name": "multilevel", "error": None, "posterior": {"mcmc": None}, "checks": {**checks, **changes}}
    return {"asked": {"parameters": ["gamma", "mu"], "on_failure": "drop"}, "strategies": [record],
            "levels": [{"name": "low", "cost": 1.0}, {"name": "high", "cost": 10.0}],
            "spent": {"n": [100, 27], "failures": [0, 0]}, "comparison": None}


def score(mean, error=0.1):
    return {"mean": mean, "median": mean, "standard_error": error, "n": 400}


@pytest.mark.parametrize(
    ("changes", "said", "unsaid"),
    [
        ({}, ["worth 1.17 +- 0.05 nats more", "consistent with what happens: 90% regions hold the truth in 90%"],
         ["ranks", "failed"]),
        ({"nlpd": score(0.9)}, ["worse than the prior by 0.63", "do not use it"], []),
        ({"nlpd": score(0.25)}, ["cannot be told from the prior"], []),
        ({"nlpd": score(math.inf, math.nan)}, ["no density at all", "must not be used"], []),
        ({"coverage": {"credibility": CREDIBILITY, "found": [0.3, 0.6, 0.7, 0.8], "p": 1e-6}}, ["is overconfident"],
         []),
        ({"coverage": {"credibility": CREDIBILITY, "found": [0.3, 0.6, 0.7, 0.8], "p": 0.02}},
         ["may be overconfident"], ["consistent"]),
        ({"coverage": {"credibility": CREDIBILITY, "found": [0.7, 0.95, 0.99, 1.0], "p": 1e-6}}, ["too cautious"], []),
        ({"sbc": {"p": [0.001, 0.4]}}, ["ranks of gamma are not uniform"], []),
        ({"sbc": {"p": [0.007, 0.4]}}, [], ["ranks"]),  # two tests: 0.005 each
        ({"likelihood_kld": score(0.156, 0.004)}, ["exact likelihood is known here", "0.156 +- 0.004 nats per output"],
         []),
        ({"mcmc": {"chains": 100, "converged": 97, "method": "HMC"}},
         ["At 3 of the 100 test observations HMC has not converged"], []),
        ({"nlpd": score(0.2, math.nan)}, ["One test observation cannot tell"], ["nan", "learned"]),
        ({"mcmc": {"chains": 100, "converged": 100}}, [], ["converged"]),
        ({"reference_nlpd": -1.5, "kld": score(0.6)}, ["scores -1.50", "0.60 nats per observation"], []),
    ],
    ids=str,
)
def test_numbers_become_sentences(changes, said, unsaid):
    text = " ".join(verdict(make_results(**changes)))
    assert all(part in text for part in said)
    assert not any(part in text for part in unsaid)


def test_unchecked_and_failing_runs_say_so():
    unchecked = make_results()
    unchecked["strategies"][0]["checks"] = None
    assert "Do not trust" in verdict(unchecked)[0]
    stuck = make_results()
    stuck["strategies"][0]["posterior"] = {"mcmc": {"warning": "It is stuck."}}
    assert "The chain of the observation has not converged: It is stuck." in verdict(stuck)
    unobserved = make_results()
    unobserved["strategies"][0]["posterior"] = None
    assert len(verdict(unobserved)) == 2


@pytest.mark.parametrize(("on_failure", "done"), [
    ("drop", "left out with their twins"), ("redraw", "replaced by others, with their twins"),
    (None, "left out with their twins"),  # runs from before there was a choice
])  # fmt: skip
def test_failed_rows_are_told_by_level_with_what_was_done(on_failure, done):
    results = {**make_results(), "spent": {"n": [100, 27], "failures": [0, 3]}}
    results["asked"]["on_failure"] = on_failure
    told = f"3 of 30 rows (10.0%) of level 'high' failed and were {done}: what is learned holds for the part of"
    assert verdict(results)[-1].startswith(told)
    assert lost_rows(results) == verdict(results)[-1:]
    del results["asked"]["on_failure"]
    assert "left out" in verdict(results)[-1]
    results["spent"]["failures"] = [100, 3]
    assert verdict(results)[-1].startswith("100 of 200 rows (50.0%) of level 'low', 3 of 30 rows")


def test_the_level_that_lost_most():
    assert worst_level(make_results()) is None
    assert worst_level({}) is None
    assert worst_level({"spent": {"n": [9, 9, 9], "failures": [1, 4, 4]}}) == 1


def test_a_comparison_names_the_best_and_how_far_behind_the_others_are():
    rows = np.random.default_rng(0).normal(size=200)
    noise = 0.001 * np.arange(-99, 101)  # of mean 0.0005
    log_q = {"transfer": rows - 0.5, "multilevel": rows, "high": rows - noise, "low": rows.copy()}
    log_q["low"][3] = -np.inf
    records = [{**make_results(nlpd=score(-float(values.mean())))["strategies"][0], "name": name}
               for name, values in log_q.items()]
    comparison = compare([*records, {"name": "broken", "error": "it diverged"}], log_q)
    assert comparison["best"] == "multilevel"
    assert comparison["behind"]["transfer"]["mean"] == pytest.approx(0.5)
    assert comparison["behind"]["transfer"]["standard_error"] == pytest.approx(0.0, abs=1e-12)
    results = {**make_results(), "strategies": [*records, {"name": "broken", "error": "it diverged"}],
               "comparison": comparison}
    said = verdict(results)
    assert said[0] == "Training 'broken' failed: it diverged"
    assert said[1].startswith("'multilevel' knows most about the parameters")
    assert "'transfer' is behind by 0.50 +- 0.00" in said[1]
    assert "'high' is behind by 0.00 +- 0.00 nats per observation, which these tests cannot tell" in said[1]
    assert "'low' gives some true parameters no density at all" in said[1]
    assert compare(records[:1], log_q) is None
    hopeless = [{**record, "checks": {**record["checks"], "nlpd": score(math.inf, math.nan)}} for record in records[:2]]
    assert compare(hopeless, {name: np.full(200, -np.inf) for name in log_q}) is None


def test_a_likelihood_is_judged_by_the_exact_one():
    task = tasks.get("g_and_k")
    theta, x = task.test(4000, 0)

    def shifted(x, theta):
        return task.likelihood(x + 0.3, theta)

    assert check_likelihood(task.likelihood, task.likelihood, theta, x).mean == 0.0
    off = check_likelihood(shifted, task.likelihood, theta, x)
    assert off.mean > 5 * off.standard_error > 0


class Exact:
    """The exact posterior in the place of a trained one."""

    def __init__(self, task, shift=0.0):
        self.prior, self.reference, self.shift = task.prior, task.reference, shift

    def log_prob_batched(self, theta, x):
        columns = [self.reference.log_prob((theta[:, i] - self.shift).double(), x[i].expand(len(theta), -1))
                   for i in range(len(x))]
        return torch.stack(columns, 1)

    def log_normaliser(self, x, *, draws=None, seed=0):
        return torch.zeros(len(x))

    def sample_batched(self, shape, x, seed):
        drawn = [self.reference.sample(shape[0], row, seed + i) + self.shift for i, row in enumerate(x)]
        return torch.stack(drawn, 1).float()


def test_the_exact_posterior_passes_every_check_and_a_shifted_one_does_not():
    task = tasks.get("ou2")
    theta, x = task.test(150, 5)
    found, arrays = check_posterior(Exact(task), theta, x, draws=100, seed=0, reference=task.reference)
    assert abs(found["kld"]["mean"]) < 1e-3  # the same density, scored twice
    assert found["nlpd"]["mean"] == pytest.approx(found["reference_nlpd"], abs=1e-6)
    assert found["coverage"]["p"] > 0.01
    assert min(found["sbc"]["p"]) > 0.01 / 2
    assert arrays["ranks"].shape == (150, 2)
    shifted, _ = check_posterior(Exact(task, shift=0.15), theta, x, draws=100, seed=0)
    assert min(shifted["sbc"]["p"]) < 1e-3


def test_checks_of_a_trained_posterior_are_reproducible():
    task = tasks.get("ou")
    npe = NPE(task.prior, density=NSF(transforms=2, hidden=8, blocks=1), training=TrainingOptions(epochs=2), seed=0)
    posterior = npe.fit(task.simulate((50, 10), 0), progress=False).posterior()
    theta, x = task.test(20, 0)
    (first, one), (again, two) = (check_posterior(posterior, theta, x, draws=30, seed=3) for _ in range(2))
    assert first == again
    assert np.array_equal(one["hpd_levels"], two["hpd_levels"])
    assert first["kld"] is None
    assert first["prior_nlpd"] == pytest.approx(-task.prior.log_prob(theta).mean().item())
