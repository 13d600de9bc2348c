import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import (
    Bernoulli,
    Dirichlet,
    Gamma,
    Independent,
    LogNormal,
    MultivariateNormal,
    Normal,
    Uniform,
)

from mlsbi import BoxPrior
from mlsbi.priors import Unbounded, check_prior, check_theta, in_support, parameter_names, sample_prior

PRIORS = {
    "box": BoxPrior([0.0, -2.0], [1.0, 5.0]),
    "normal": MultivariateNormal(torch.zeros(2), torch.eye(2)),
    "positive": Independent(LogNormal(torch.zeros(2), torch.ones(2)), 1),
    "gamma": Independent(Gamma(torch.ones(2) * 3, torch.ones(2)), 1),
    "simplex": Dirichlet(torch.ones(3)),
}


@pytest.mark.parametrize("name", PRIORS)
def test_unbounded_is_a_bijection_with_the_right_jacobian(name):
    prior = PRIORS[name]
    check_prior(prior)
    unbounded = Unbounded(prior)
    theta = sample_prior(prior, 50, seed=1).double()
    z = unbounded.to(theta)
    assert torch.allclose(unbounded.back(z), theta, atol=1e-5)  # float32 edges of the support
    point = z[0].requires_grad_()
    jacobian = torch.autograd.functional.jacobian(unbounded.back, point)[: len(point)]
    log_det = unbounded.log_abs_det(z[:1], theta[:1])[0]
    assert log_det.item() == pytest.approx(torch.linalg.slogdet(jacobian).logabsdet.item(), abs=1e-5)


def test_box_log_prob_is_flat_inside_and_closed():
    prior = BoxPrior([1.0, 0.0], [3.0, 0.5])
    points = torch.tensor([[1.0, 0.0], [3.0, 0.5], [2.0, 0.25], [3.1, 0.1]])
    assert prior.log_prob(points).tolist() == [0.0, 0.0, 0.0, -math.inf]


@given(st.integers(1, 5), st.integers(0, 10**6))
def test_extreme_coordinates_stay_in_the_support(dim, seed):
    prior = BoxPrior([2.0] * dim, [3.0] * dim)
    z = 200 * torch.randn(50, dim, generator=torch.Generator().manual_seed(seed))
    theta = Unbounded(prior).back(z)
    assert bool(in_support(prior, theta).all())
    assert bool(torch.isfinite(prior.log_prob(theta)).all())


def test_sampling_is_seeded_and_leaves_global_state():
    before = torch.get_rng_state()
    first, second = (sample_prior(PRIORS["box"], 3, seed=4) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


def test_edges_in_float64_belong_to_the_box_and_stay_finite():
    prior = BoxPrior([0.1], [0.3])
    theta = torch.linspace(0.1, 0.3, 21, dtype=torch.float64)[:, None]
    check_theta(prior, theta, where="here")
    z = Unbounded(prior).to(theta.float())
    assert z.abs().max() < 18  # the logit of half a float32 step
    assert torch.allclose(Unbounded(prior).back(z), theta.float(), atol=1e-6)


def test_names_that_do_not_fit_are_not_used():
    prior = MultivariateNormal(torch.zeros(2), torch.eye(2))
    prior.names = None
    assert parameter_names(prior) == ("theta_1", "theta_2")
    prior.names = ["only one"]
    assert parameter_names(prior) == ("theta_1", "theta_2")


def test_names():
    assert parameter_names(BoxPrior([0.0], [1.0], names=["a"])) == ("a",)
    assert parameter_names(PRIORS["normal"]) == ("theta_1", "theta_2")


@pytest.mark.parametrize(
    ("low", "high", "names", "match"),
    [
        ([0.0], [1.0, 2.0], None, "one shape"),
        ([], [], None, "one shape"),
        ([1.0], [1.0], None, "low < high"),
        ([0.0], [math.inf], None, "finite edges"),
        ([0.0, 0.0], [1.0, 1.0], ["a", "a"], "different names"),
        ([0.0], [1.0], ["a", "b"], "1 different names"),
    ],
)
def test_bad_boxes(low, high, names, match):
    with pytest.raises(ValueError, match=match):
        BoxPrior(low, high, names=names)


class Undefined(Normal):
    support = None


class Unsupported(Normal):
    @property
    def support(self):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("prior", "error", "match"),
    [
        ("uniform", TypeError, "BoxPrior"),
        (Uniform(torch.zeros(2), torch.ones(2)), ValueError, r"Independent\(prior, 1\)"),
        (Uniform(0.0, 1.0), ValueError, "event_shape"),
        (Independent(Bernoulli(torch.ones(2) * 0.5), 1), ValueError, "discrete"),
        (Independent(Unsupported(torch.zeros(2), torch.ones(2)), 1), ValueError, "usable support"),
    ],
)
def test_unusable_priors(prior, error, match):
    with pytest.raises(error, match=match):
        check_prior(prior)


def test_check_theta_counts_rows_outside():
    theta = torch.tensor([[0.5, 0.0], [2.0, 0.0], [math.nan, 0.0]])
    with pytest.raises(ValueError, match="2 of 3 rows"):
        check_theta(PRIORS["box"], theta, where="here")
    with pytest.raises(ValueError, match=r"shape \(n, 2\)"):
        check_theta(PRIORS["box"], theta[:, :1], where="here")
