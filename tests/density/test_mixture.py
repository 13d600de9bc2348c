import math

import pytest
import torch

from mlsbi import MAF, MDN, NSF
from mlsbi.density.conditional import ConditionalDensity
from mlsbi.density.mixture import DensityMixture
from mlsbi.density.standardise import Standardiser

GAUSSIAN = MDN(components=1, hidden=4, layers=1)


def density(mean, builder=GAUSSIAN, seed=0, scale=2.0):
    """A density of two numbers given three that sits at `mean`, in standardised units."""
    scalers = Standardiser(torch.zeros(2), scale * torch.ones(2)), Standardiser(torch.zeros(3), torch.ones(3))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = ConditionalDensity(builder, *scalers)
    if isinstance(builder, MDN):
        with torch.no_grad():
            network.density.head.bias[1:3] = mean
    return network.eval()


ROWS = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)), torch.randn(
    50, 3, generator=torch.Generator().manual_seed(1))


def test_densities_add_up_with_their_weights():
    parts = [density(0.0), density(1.0), density(-2.0, NSF(transforms=2, hidden=4))]
    mixture = DensityMixture(parts, [2.0, 1.0, 1.0]).eval()
    expected = (0.5 * parts[0].log_prob(*ROWS).exp() + 0.25 * parts[1].log_prob(*ROWS).exp()
                + 0.25 * parts[2].log_prob(*ROWS).exp()).log()
    assert torch.allclose(mixture.log_prob(*ROWS), expected, atol=1e-5)
    assert torch.allclose(mixture.log_prob_embedded(ROWS[0], mixture.embed(ROWS[1])), expected, atol=1e-5)
    rows = mixture.input_scaler(ROWS[0]), mixture.condition_scaler(ROWS[1])
    assert torch.allclose(mixture.standard_log_prob(*rows) - 2 * math.log(2.0), expected, atol=1e-5)


def test_parts_of_weight_zero_are_not_evaluated(monkeypatch):
    parts = [density(0.0), density(1.0)]
    mixture = DensityMixture(parts, [1.0, 0.0])
    monkeypatch.setattr(parts[1], "log_prob", lambda *rows: pytest.fail("it was evaluated"))
    assert torch.equal(mixture.log_prob(*ROWS), parts[0].log_prob(*ROWS))
    assert mixture.embed(ROWS[1]).shape == (50, 3)


def test_draws_come_from_every_part_as_often_as_its_weight_says():
    """Parts far apart, so that a draw tells where it comes from; every row has draws of both."""
    mixture = DensityMixture([density(-20.0), density(20.0)], [0.3, 0.7])
    torch.manual_seed(0)
    drawn = mixture.sample(4000, ROWS[1][:5])
    assert drawn.shape == (4000, 5, 2)
    share = (drawn[..., 0] > 0).double().mean(0)
    assert share.sub(0.7).abs().max() < 4 * math.sqrt(0.21 / 4000)  # four standard errors
    one = mixture.sample(1, ROWS[1][:1].expand(4000, -1))[0, :, 0]
    assert abs(float((one > 0).double().mean()) - 0.7) < 4 * math.sqrt(0.21 / 4000)


def test_the_state_of_one_fits_another():
    mixture = DensityMixture([density(0.0, MAF(transforms=1), seed) for seed in (0, 1)], [0.2, 0.8])
    other = DensityMixture([density(0.0, MAF(transforms=1), seed) for seed in (2, 3)])
    assert not torch.allclose(other.log_prob(*ROWS), mixture.log_prob(*ROWS))
    other.load_state_dict(mixture.state_dict())
    assert torch.equal(other.log_prob(*ROWS), mixture.log_prob(*ROWS))
    assert torch.equal(other.weights, mixture.weights)
    other.become(DensityMixture([density(1.0)]))
    assert len(other.parts) == 1
    assert torch.equal(other.log_prob(*ROWS), density(1.0).log_prob(*ROWS))


@pytest.mark.parametrize("weights", [[1.0], [0.5, -0.1], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ValueError, match="2 weights of at least 0"):
        DensityMixture([density(0.0), density(1.0)], weights)
