import pytest
import torch
from torch import distributions
from torch.distributions import Independent

from mlsbi.priors import BoxPrior, Unbounded
from theory_checks.precision import in_float64

PRIORS = {
    "box": BoxPrior([0.1, 1.0], [1.0, 3.0]),
    "gamma": Independent(distributions.Gamma(torch.tensor([0.5, 5.0]), torch.tensor([1.0, 2.0])), 1),
    "log-normal": Independent(distributions.LogNormal(torch.zeros(2), torch.ones(2)), 1),
    "low rank": distributions.LowRankMultivariateNormal(torch.zeros(2), torch.ones(2, 1), torch.ones(2)),
    "logistic": Independent(distributions.TransformedDistribution(
        distributions.Uniform(torch.zeros(2), torch.ones(2)),
        [distributions.SigmoidTransform().inv, distributions.AffineTransform(torch.zeros(2), torch.ones(2) / 3)]), 1),
    "dirichlet": distributions.Dirichlet(torch.tensor([1.0, 2.0, 3.0])),
}


@pytest.mark.parametrize("name", PRIORS)
def test_the_copy_has_the_same_density_in_float64(name):
    prior = PRIORS[name]
    theta = prior.sample((10,))
    before = prior.log_prob(theta)
    twin = in_float64(prior)
    values = twin.log_prob(theta.double())
    assert values.dtype == torch.float64
    assert torch.allclose(values, before.double(), atol=1e-4)
    assert Unbounded(twin).to(theta.double()).dtype == torch.float64
    # The original is as it was.
    assert torch.equal(prior.log_prob(theta), before)
    assert prior.sample().dtype == torch.float32
