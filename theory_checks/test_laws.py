import math
import re
import time

import pytest
import torch
from torch import distributions
from torch.distributions import Distribution, Independent, constraints

from mlsbi.priors import BoxPrior
from theory_checks import poincare
from theory_checks.laws import noise_law, prior_law
from theory_checks.poincare import logit_beta

tensor = torch.tensor


def _independent(name, *parameters):
    return Independent(getattr(distributions, name)(*map(tensor, parameters)), 1)


class Joint(Distribution):
    """A distribution of two coordinates with any log density."""

    support = constraints.real_vector
    arg_constraints = {}  # noqa: RUF012

    def __init__(self, log_density, draw):
        self._log_density, self._draw = log_density, draw
        super().__init__(torch.Size(), torch.Size([2]), validate_args=False)

    def sample(self, sample_shape=()):
        return self._draw(torch.randn(*sample_shape, 2))

    def log_prob(self, value):
        return self._log_density(value)


TABLE = [
    # prior, NPE's constant, NLE's constant
    (BoxPrior([0.0, 1.0], [1.0, 4.0]), 4.0, 9 / math.pi**2),
    (_independent("Uniform", [-1.0, 0.0], [1.0, 1.0]), 4.0, 4 / math.pi**2),
    (_independent("Normal", [0.0, 5.0], [1.0, 3.0]), 9.0, 9.0),
    (_independent("LogNormal", [-1.0, -2.0], [0.5, 0.25]), 0.25, 0.25),
    (_independent("Exponential", [0.1, 7.0]), 4.0, 4.0),
    (_independent("Gamma", [0.5, 5.0], [1.0, 2.0]), 16.0, 16.0),
    (_independent("HalfNormal", [2.0, 3.0]), 4.0, 4.0),
    (_independent("Laplace", [0.0], [0.5]), 1.0, 1.0),
    (_independent("Gumbel", [0.0], [0.5]), 1.0, 1.0),
    (_independent("HalfCauchy", [2.0]), 4.0, 4.0),
    (_independent("Weibull", [1.0], [4.0]), 0.25, 0.25),
    (_independent("InverseGamma", [3.0], [2.0]), 0.5, 0.5),
    (distributions.MultivariateNormal(torch.zeros(2), tensor([[2.0, 1.0], [1.0, 2.0]])), 3.0, 3.0),
    (distributions.LowRankMultivariateNormal(torch.zeros(2), tensor([[1.0], [1.0]]), torch.ones(2)), 3.0, 3.0),
]


@pytest.mark.parametrize(("prior", "npe", "nle"), TABLE)
def test_usual_priors_have_their_constants(prior, npe, nle):
    for estimator, constant in (("npe", npe), ("nle", nle)):
        law = prior_law(prior, estimator)
        assert law.constant == pytest.approx(constant, rel=1e-6)
        assert law.source == "table"
        assert law.log_concave is True
        assert law.coordinates == prior.event_shape[0]


@pytest.mark.parametrize("prior", [row[0] for row in TABLE[1:]])
def test_the_table_agrees_with_the_density_in_the_estimators_coordinates(prior, monkeypatch):
    known = prior_law(prior, "npe").constant
    monkeypatch.setattr("theory_checks.laws._known_prior", lambda prior, as_is: None)
    assert prior_law(prior, "npe").constant == pytest.approx(known, rel=2e-3)


def test_a_prior_that_cannot_be_evaluated_in_float64_is_told_so():
    rounded = Joint(lambda z: -(z.float() ** 2).sum(-1), lambda e: e)
    refusing = Joint(lambda z: -(z * (z @ torch.eye(2))).sum(-1), lambda e: e)
    for prior, problem in ((rounded, "it gives torch.float32"), (refusing, "same dtype|scalar type")):
        law = prior_law(prior, "npe")
        assert law.constant is None
        assert re.search(f"cannot be evaluated in float64 .*({problem})", law.reason)


def test_a_beta_prior_is_read_as_it_is_by_nle():
    prior = _independent("Beta", [3.0, 3.0], [3.0, 3.0])
    assert prior_law(prior, "npe").constant == pytest.approx(logit_beta(3.0, 3.0).constant)
    own = prior_law(prior, "nle")
    assert own.source == "bracketed"
    assert 1 / 28 < own.constant < poincare.uniform(0.0, 1.0).constant  # above its variance, below a flat law's


def test_a_dirichlet_prior_has_the_law_of_its_sticks():
    law = prior_law(distributions.Dirichlet(tensor([2.0, 3.0, 4.0])), "npe")
    assert law.coordinates == 2
    assert law.constant == pytest.approx(max(logit_beta(2.0, 7.0).constant, logit_beta(3.0, 4.0).constant), rel=1e-3)


def test_numeric_priors_on_boxes_and_half_lines():
    assert prior_law(_independent("Kumaraswamy", [1.0], [1.0]), "npe").constant == pytest.approx(4.0, rel=1e-3)
    # log(theta - 1) of a Pareto law: a logistic left tail, and the rate of its power on the right.
    assert prior_law(_independent("Pareto", [1.0], [0.5]), "npe").constant == pytest.approx(16.0, rel=1e-3)


@pytest.mark.parametrize("prior", [_independent("StudentT", [3.0]), _independent("Cauchy", [0.0], [1.0])])
def test_heavy_tails_are_refused_with_words(prior):
    law = prior_law(prior, "npe")
    assert law.constant is None
    assert law.log_concave is False
    assert "heavier than exponential" in law.reason


def test_joint_priors_are_judged_by_their_density():
    apart = Joint(lambda z: -z[..., 0] ** 2 / 2 - z[..., 1].exp() + 5 * z[..., 1], lambda e: e)
    assert prior_law(apart, "npe").constant == pytest.approx(1.0, rel=1e-3)
    tied = Joint(lambda z: -z[..., 0] ** 2 / 2 - (z[..., 1] - z[..., 0]) ** 2 / 2,
                 lambda e: torch.stack([e[..., 0], e[..., 0] + e[..., 1]], -1))
    law = prior_law(tied, "nle")
    assert law.constant == pytest.approx((3 + math.sqrt(5)) / 2, rel=1e-6)  # of [[1, 1], [1, 2]]
    assert law.source == "sampled"
    modes = Joint(lambda z: torch.logaddexp(-((z - 2) ** 2).sum(-1) / 2, -((z + 2) ** 2).sum(-1) / 2), lambda e: e)
    law = prior_law(modes, "npe")
    assert law.constant is None
    assert law.log_concave is False


def test_a_declared_constant_replaces_the_found_one():
    law = prior_law(_independent("StudentT", [3.0]), "npe", given=2.5)
    assert (law.constant, law.source, law.log_concave) == (2.5, "given", False)
    assert noise_law(_student, given=0.5).law.constant == 0.5
    noise = noise_law("seed", given=0.5)  # nothing is differentiated in a seed, whatever is declared
    assert noise.law.constant is None
    assert "of no use" in noise.law.reason
    with pytest.raises(ValueError, match="positive, finite constant"):
        prior_law(BoxPrior([0.0], [1.0]), "npe", given=0.0)


def test_the_random_state_is_left_alone():
    state = torch.random.get_rng_state()
    prior_law(BoxPrior([0.0], [1.0]), "npe")
    noise_law(lambda n, generator: torch.randn(n, 1, generator=generator), rows=2000)
    assert torch.equal(state, torch.random.get_rng_state())


def _student(n, generator):
    chi = sum(torch.randn(n, 2, generator=generator) ** 2 for _ in range(3))
    return torch.randn(n, 2, generator=generator) / (chi / 3).sqrt()


def _squared(n, generator):
    u = torch.randn(n, 1, generator=generator)
    return torch.cat([u, u**2], 1)


def _mixture(n, generator):
    return torch.randn(n, 2, generator=generator) + 4.0 * torch.randint(0, 2, (n, 2), generator=generator)


@pytest.mark.parametrize("seed", range(3))
def test_standard_noise_has_its_exact_constant(seed):
    normal = noise_law(lambda n, generator: torch.randn(n, 20, generator=generator), seed=seed)
    assert normal.law.constant == 1.0
    assert normal.law.source == "table"
    assert normal.law.coordinates == 20
    assert "20 coordinates recognised as standard normal from 20000 draws (Kolmogorov distance 0.0" in normal.law.reason
    uniform = noise_law(lambda n, generator: torch.rand(n, 2, 5, generator=generator), seed=seed)
    assert uniform.law.constant == poincare.uniform(0.0, 1.0).constant
    assert uniform.law.log_concave is True


def test_a_tree_is_judged_leaf_by_leaf():
    noise = noise_law(lambda n, generator: {"a": torch.randn(n, 3, generator=generator),
                                            "b": 3 * torch.rand(n, 2, generator=generator), "c": torch.ones(n, 4)})
    assert {name: law.name for name, law in noise.parts} == {
        "noise['a']": "standard normal", "noise['b']": "uniform(0, 3)", "noise['c']": "constant"}
    assert noise.law.constant == 1.0
    assert noise.law.coordinates == 9


def test_one_hundred_coordinates_take_little_time():
    start = time.process_time()
    noise_law(lambda n, generator: torch.randn(n, 100, generator=generator))
    assert time.process_time() - start < 5.0  # about one second on an idle core


def test_a_seed_and_whole_numbers_have_no_constant():
    law = noise_law("seed").law
    assert law.constant is None
    assert "noise is a seed (discrete): there is no derivative in it" in law.reason
    law = noise_law(lambda n, generator: (torch.randn(n, 1, generator=generator), torch.arange(n))).law
    assert law.constant is None
    assert "noise[1] holds int64 numbers" in law.reason
    law = noise_law(lambda n, generator: torch.randint(0, 9, (n, 1), generator=generator).float()).law
    assert law.constant is None
    assert "repeats values" in law.reason


def test_unusual_noise_is_refused_with_words_or_estimated():
    heavy = noise_law(_student).law
    assert heavy.constant is None
    assert "heavier than exponential" in heavy.reason
    tied = noise_law(_squared).law
    assert tied.constant is None
    assert "depend on each other and are not jointly normal" in tied.reason
    modes = noise_law(_mixture).law
    assert modes.constant == pytest.approx(8.4, rel=0.1)
    assert (modes.log_concave, modes.source, modes.coordinates) == (False, "sampled", 2)


def test_dependence_between_leaves_is_seen():
    def noise(n, generator):
        u = torch.randn(n, 1, generator=generator)
        return u, u + torch.randn(n, 1, generator=generator)

    law = noise_law(noise)
    assert law.law.constant == pytest.approx((3 + math.sqrt(5)) / 2, rel=0.05)
    assert law.parts[0][0] == "noise[0] and noise[1]"


def test_of_large_leaves_some_coordinates_are_looked_at():
    law = noise_law(lambda n, generator: torch.randn(n, 1000, generator=generator), rows=4000).law
    assert law.constant == 1.0
    assert law.coordinates == 1000
    assert "200 of 200 coordinates looked at, out of 1000" in law.reason
    tied = noise_law(lambda n, generator: torch.randn(n, 1001, generator=generator).unfold(1, 2, 1).sum(-1),
                     rows=4000).law
    assert tied.constant is None
    assert tied.coordinates == 1000
    assert "a constant would need all of them" in tied.reason


def test_no_noise_does_no_harm():
    law = noise_law(lambda n, generator: torch.zeros(n, 0)).law
    assert (law.constant, law.coordinates, law.log_concave) == (0.0, 0, True)


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="'npe' or 'nle'"):
        prior_law(BoxPrior([0.0], [1.0]), "nre")
    with pytest.raises(TypeError, match='noise\\(n, generator\\) or "seed"'):
        noise_law("sead")
    with pytest.raises(ValueError, match="at least 2000 rows"):
        noise_law(lambda n, generator: torch.randn(n, 1, generator=generator), rows=100)
    with pytest.raises(ValueError, match="usable support|discrete"):
        prior_law(_independent("Poisson", [1.0]), "npe")
