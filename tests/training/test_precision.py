import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from trainings import DROPPING, MIXTURE, SMALL, fit, loss_of, make_members, make_network, make_terms, train

from mlsbi import NLE, NPE, BoxPrior, MCMCOptions, MLPEmbedding, MultilevelData, TrainingOptions, load
from mlsbi.density.flows import MAF
from mlsbi.density.linear import SolvedLULinear
from mlsbi.density.splines import RationalQuadraticSpline
from mlsbi.training.descent import Objective

OPTIONS = TrainingOptions(epochs=3, learning_rate=5e-3, precision="float64")
PRIOR = BoxPrior([0.0], [1.0])


def toy_data(dtype=torch.float32):
    levels = []
    for level, term in enumerate(make_terms((80, 20), dtype=dtype)):
        theta = term.input.sigmoid()
        levels.append((theta, term.fine, term.coarse) if level else (theta, term.fine))
    return MultilevelData.from_arrays(levels)


def estimator(kind, options=OPTIONS, **given):
    return kind(PRIOR, training=options, seed=3, **given).fit(toy_data(), progress=False)


def dtypes_of(network):
    return {parameter.dtype for parameter in network.parameters()}


@pytest.mark.parametrize("density", [DROPPING, MAF(transforms=2, hidden=8), MIXTURE], ids=["nsf", "maf", "mdn"])
@pytest.mark.parametrize("strategy", ["multilevel", "transfer"])
def test_a_posterior_in_double_precision(density, strategy, tmp_path):
    npe = estimator(NPE, density=density, strategy=strategy, embedding=MLPEmbedding(3, 8, 1))
    network, = npe.networks
    assert dtypes_of(network) == {torch.float64}
    x, theta = torch.tensor([0.2, 0.4]), torch.linspace(0.1, 0.9, 5)[:, None]
    posterior = npe.posterior(x)
    found = posterior.log_prob(theta)
    assert found.dtype == torch.float64
    assert bool(found.isfinite().all())
    again = load(npe.save(tmp_path / "model"))
    assert dtypes_of(again.networks[0]) == {torch.float64}
    assert torch.equal(again.posterior(x).log_prob(theta), found)
    draws = posterior.sample((50,), seed=1)
    assert bool(((draws > 0) & (draws < 1)).all())
    assert torch.equal(again.posterior(x).sample((50,), seed=1), draws)
    assert 0 < posterior.map(draws=20, steps=5).item() < 1


@pytest.mark.parametrize("density", [SMALL, MIXTURE], ids=["nsf", "mdn"])
def test_a_likelihood_in_double_precision(density, tmp_path):
    nle = estimator(NLE, density=density, embedding=MLPEmbedding(3, 8, 1))
    assert dtypes_of(nle.networks[0]) == {torch.float64}
    theta = torch.linspace(0.1, 0.9, 5)[:, None]
    x = theta.expand(-1, 2)
    found = nle.likelihood.log_prob(x, theta)
    assert found.dtype == torch.float64
    again = load(nle.save(tmp_path / "model"))
    assert dtypes_of(again.networks[0]) == {torch.float64}
    assert torch.equal(again.likelihood.log_prob(x, theta), found)
    assert nle.likelihood.sample(theta, seed=1).shape == (5, 2)


@pytest.mark.parametrize("method", ["emcee", "hmc", "importance"])
def test_chains_of_a_likelihood_in_double_precision(method):
    nle = estimator(NLE, density=MIXTURE)
    posterior = nle.posterior(torch.tensor([[0.2, 0.4]]), mcmc=MCMCOptions(method=method, effective=50))
    assert posterior.log_prob(torch.tensor([[0.3], [0.4]])).isfinite().all()
    draws = posterior.sample((20,), seed=1)
    assert bool(((draws > 0) & (draws < 1)).all())


def test_double_precision_is_more_than_single():
    """Both are of one training; what they differ by is the rounding of single precision."""
    found = []
    for precision, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        options = replace(OPTIONS, precision=precision, batch_size=None)
        network, history, held = fit(options=options, network=make_network(dtype=dtype), terms=make_terms(dtype=dtype))
        found.append((loss_of(network, held), history.best_loss))
    (single, single_told), (double, double_told) = found
    assert single != double
    assert single == pytest.approx(double, abs=1e-4)
    assert single_told == pytest.approx(single, abs=1e-5)
    assert double_told == pytest.approx(double, abs=1e-12)


def test_data_in_double_precision_keep_their_digits():
    """Rows that differ in digits that single precision does not have."""
    g = torch.Generator().manual_seed(0)
    theta = torch.rand(200, 1, generator=g, dtype=torch.float64)
    x = 1e9 + theta
    data = MultilevelData.from_arrays([(theta, x), (theta[:40], x[:40], x[:40])])
    npe = NPE(PRIOR, training=replace(OPTIONS, epochs=40, learning_rate=0.02, batch_size=None), density=MIXTURE, seed=1)
    npe.fit(data, progress=False)
    assert npe.history.best_loss < npe.history.epochs[0]["validation_loss"] - 1.0


@pytest.mark.parametrize("builder", [SMALL, DROPPING, MAF(transforms=2, hidden=8), MIXTURE],
                         ids=["nsf", "dropout", "maf", "mdn"])
@pytest.mark.parametrize("objective", [Objective(), Objective("estimated", rescale=True, project=True)])
@pytest.mark.parametrize("together", [True, False])
def test_mixed_precision_is_close_to_single(builder, objective, together):
    losses = []
    for precision in ("float32", "bfloat16"):
        members = make_members(2, builder)
        histories = train(members, objective, TrainingOptions(
            epochs=4, batch_size=None, learning_rate=5e-3, precision=precision, together=together))
        assert all(dtypes_of(member.network) == {torch.float32} for member in members)
        assert histories[0].notes == ()
        losses.append([record["loss"] for history in histories for record in history.epochs])
    # Eight bits in products: two digits.
    assert losses[1] == pytest.approx(losses[0], abs=0.05)
    assert losses[1] != losses[0]


def test_mixed_precision_learns():
    options = TrainingOptions(epochs=40, learning_rate=1e-2, batch_size=None, precision="bfloat16")
    network, history, held = fit(options=options)
    assert history.best_loss < history.epochs[0]["validation_loss"] - 0.3
    assert loss_of(network, held) == pytest.approx(history.best_loss, abs=0.05)


def test_mixed_precision_posterior(tmp_path):
    npe = estimator(NPE, replace(OPTIONS, precision="bfloat16"), density=SMALL)
    x, theta = torch.tensor([0.2, 0.4]), torch.linspace(0.1, 0.9, 5)[:, None]
    found = npe.posterior(x).log_prob(theta)
    assert found.dtype == torch.float32
    assert torch.equal(load(npe.save(tmp_path / "model")).posterior(x).log_prob(theta), found)


def test_a_network_of_a_users_own_takes_the_precision():
    npe = estimator(NPE, density=MIXTURE, embedding=nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3)))
    assert dtypes_of(npe.networks[0]) == {torch.float64}
    assert math.isfinite(npe.history.best_loss)


@pytest.mark.parametrize("name", ["float16", "double", "fp32", 32, None])
def test_unknown_precisions(name):
    with pytest.raises(ValueError, match="Expected a precision out of float32, float64, bfloat16"):
        TrainingOptions(precision=name)


def test_precisions_are_those_of_weights():
    assert [TrainingOptions(precision=name).dtype for name in ("float32", "float64", "bfloat16")] == [
        torch.float32, torch.float64, torch.float32]


def test_splines_keep_their_digits_in_mixed_precision():
    """Knots near the ends of a wide interval would coincide with eight bits."""
    spline = RationalQuadraticSpline(10, 8.0)
    g = torch.Generator().manual_seed(0)
    inputs = 5 * torch.randn(2, 300, generator=g)
    sizes, slopes = 3 * torch.randn(10, 2, 2, 300, generator=g), torch.randn(11, 2, 300, generator=g)
    expected = spline(inputs, sizes, slopes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = spline(inputs, sizes, slopes)
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


def test_linear_maps_keep_their_digits_in_mixed_precision():
    layer, x = SolvedLULinear(3), 1 + 1e-4 * torch.randn(3, 50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.columns(x, None)[0], layer.columns(x.clone(), None)[0])
        assert (layer.columns(x, None)[0] - x).abs().max() < 1e-5
