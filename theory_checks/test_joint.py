import math

import numpy as np
import pytest
import torch

from theory_checks.joint import from_joint_density, product_of_few
from theory_checks.poincare import logistic, normal

EVERYWHERE = {"low": torch.full((2,), -math.inf), "high": torch.full((2,), math.inf)}
NAMES = {"names": ["a", "b"]}


def _draws(n=1000):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_density_that_separates_is_bracketed_coordinate_by_coordinate():
    law = from_joint_density(lambda z: -z[:, 0] ** 2 / 8 - 2 * torch.cosh(z[:, 1] / 2).log(), _draws(), **EVERYWHERE,
                             **NAMES)
    assert law.constant == pytest.approx(4.0, rel=1e-3)  # both: a variance of 4, and a logistic law
    assert law.source == "bracketed"
    assert law.coordinates == 2


def test_a_heavy_coordinate_is_named():
    law = from_joint_density(lambda z: -z[:, 0] ** 2 / 2 - torch.log1p(z[:, 1] ** 2), _draws(), **EVERYWHERE, **NAMES)
    assert law.constant is None
    assert "no constant for b: left and right tails heavier" in law.reason


def test_an_interval_ends_at_its_edges():
    low, high = torch.tensor([0.0, -math.inf]), torch.tensor([1.0, math.inf])
    law = from_joint_density(lambda z: -z[:, 1] ** 2 * 50 + 0 * z[:, 0], _draws().abs().fmod(1.0), low=low, high=high,
                             **NAMES)
    assert law.constant == pytest.approx(1 / math.pi**2, rel=1e-3)


def test_correlated_normals_get_their_largest_eigenvalue_by_curvature():
    covariance = torch.tensor([[1.0, 0.6], [0.6, 2.0]], dtype=torch.float64)
    precision = torch.linalg.inv(covariance)
    draws = _draws() @ torch.linalg.cholesky(covariance).T
    law = from_joint_density(lambda z: -(z @ precision * z).sum(-1) / 2, draws, **EVERYWHERE, **NAMES)
    assert law.constant == pytest.approx(float(torch.linalg.eigvalsh(covariance)[-1]), rel=1e-9)
    assert law.source == "sampled"
    assert law.log_concave is True


def test_flat_tails_are_bounded_by_the_spread():
    # exp(-sqrt(1 + |z|^2)): its curvature vanishes far out, which draws in the bulk alone would not show.
    radius = _draws(4000).norm(dim=-1, keepdim=True)
    draws = _draws(4000) / radius * 2.5
    law = from_joint_density(lambda z: -(1 + (z**2).sum(-1)).sqrt(), draws, **EVERYWHERE, **NAMES)
    assert "Kannan" in law.reason
    assert law.constant == pytest.approx(16 * (2.5 / math.log(2)) ** 2, rel=0.01)


def test_two_modes_along_a_diagonal_are_refused():
    def log_density(z):
        return torch.logaddexp(-((z - 2) ** 2).sum(-1) / 2, -((z + 2) ** 2).sum(-1) / 2)

    law = from_joint_density(log_density, _draws(), **EVERYWHERE, **NAMES)
    assert law.constant is None
    assert law.log_concave is False
    assert "not concave at" in law.reason


def test_a_density_without_gradients_is_not_judged():
    law = from_joint_density(lambda z: (-(z**2).sum(-1) - (z[:, 0] - z[:, 1]) ** 2).detach(), _draws(), **EVERYWHERE,
                             **NAMES)
    assert law.constant is None
    assert law.log_concave is None
    assert "cannot be differentiated" in law.reason


def test_straight_tails_replace_those_that_rounding_spoils():
    def spoiled(z):  # the logit of a uniform variable by way of 1 - theta, which is 0 beyond 37
        theta = z.sigmoid()
        return (theta.log() + (1 - theta).log()).sum(-1)

    law = from_joint_density(spoiled, _draws(), **EVERYWHERE, **NAMES, straight_beyond=25 * math.log(2))
    assert law.constant == pytest.approx(4.0, rel=1e-3)
    assert law.log_concave is True


def test_equal_laws_are_named_once():
    law = product_of_few([normal(), logistic(), normal()])
    assert law.name == "standard normal x logistic(0, 1)"
    assert law.coordinates == 3
    assert np.isclose(law.constant, 4.0)
