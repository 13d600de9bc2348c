import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from mlsbi.inference.importance import run_importance


def normals(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


SCALES = torch.tensor([0.02, 0.3, 3.0])
CENTRES = torch.tensor([4.0, -1.0, 0.0])


def gaussians(z):
    """Three correlated Gaussians of very different width, (n, 3, 2) -> (n, 3)."""
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    white = (z - CENTRES[:, None]) / SCALES[:, None]
    return MultivariateNormal(torch.zeros(2), covariance).log_prob(white) - 2 * SCALES.log() + 1.5


def test_narrow_and_wide_densities_at_once():
    sample = run_importance(gaussians, 5 * normals(300, 3, 2), 4000, effective=1000, seed=0)
    assert all(one.converged and one.effective[0] >= 1000 for one in sample.convergence)
    assert sample.convergence[0].rounds > 1  # the narrowest is 250 times narrower than the start
    error = SCALES / math.sqrt(1000)
    assert ((sample.draws.mean(0) - CENTRES[:, None]).abs() < 4.5 * error[:, None]).all()
    assert torch.allclose(sample.draws.std(0), SCALES[:, None].expand(3, 2), rtol=0.1)
    for b in range(3):
        assert torch.corrcoef(sample.draws[:, b].T)[0, 1].item() == pytest.approx(0.8, abs=0.06)


def test_separate_modes_keep_their_weights():
    def modes(z):
        near, far = (-0.5 * ((z - c) / 0.2).square().sum(-1) for c in (-2.0, 2.0))
        return torch.logaddexp(near + math.log(0.3), far + math.log(0.7))

    sample = run_importance(modes, 3 * normals(400, 1, 2), 4000, effective=1000, seed=1)
    assert (sample.draws[:, 0, 0] > 0).float().mean().item() == pytest.approx(0.7, abs=0.05)


def test_seeds_reproduce_and_leave_global_state():
    state = torch.get_rng_state()
    one, again, other = (run_importance(gaussians, 5 * normals(300, 3, 2), 50, seed=seed).draws for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_cannot_be_reached_is_said():
    """One round from far away cannot do it."""
    sample = run_importance(gaussians, 5 * normals(300, 3, 2), 100, seed=0, rounds=1)
    narrow = sample.convergence[0]
    assert not narrow.converged
    assert "method='hmc'" in narrow.warning


def test_a_density_that_is_nowhere_finite():
    with pytest.raises(ValueError, match="finite near its draws"):
        run_importance(lambda z: torch.full(z.shape[:2], -torch.inf), normals(300, 2, 2), 10, seed=0)
