import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import torch
from scipy.stats import truncnorm
from torch.distributions import MultivariateNormal

from mlsbi import BoxPrior
from mlsbi.inference import evidence as evidence_module
from mlsbi.inference import hmc
from mlsbi.inference.convergence import Convergence, diagnose, effective_size, forgotten, split_rhat
from mlsbi.inference.ensemble import run_emcee
from mlsbi.inference.evidence import log_evidence
from mlsbi.inference.hmc import run_hmc
from mlsbi.inference.mcmc import Chain, ChainError, start_points, thin
from mlsbi.priors import Unbounded

SIGMAS = 4.5  # standard errors; about 200 numbers are compared, under fixed seeds


def normals(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def correlated(dim, rho=0.9, shift=0.0):
    """A Gaussian whose parameters differ in scale by a factor of 100 and hang together."""
    scale = torch.logspace(-1, 1, dim)
    covariance = (rho + (1 - rho) * torch.eye(dim)) * scale[:, None] * scale
    return MultivariateNormal(torch.full((dim,), shift), covariance)


WIDTH_OF_BANANA = 0.4


def straight(z):
    """Coordinates in which the banana is a standard normal."""
    return torch.cat([z[..., :1], (z[..., 1:2] - z[..., :1] ** 2) / WIDTH_OF_BANANA, z[..., 2:]], -1)


def standard(z):
    return -0.5 * z.square().sum(-1) - z.shape[-1] / 2 * math.log(2 * math.pi)


def banana(z):
    return standard(straight(z)) - math.log(WIDTH_OF_BANANA)


def two_modes(z):
    """Weight 0.7 around 3, and 0.3 around -3, half as wide."""
    narrow = standard((z + 3) / 0.5) + z.shape[-1] * math.log(2)
    return torch.logaddexp(standard(z - 3) + math.log(0.7), narrow + math.log(0.3))


def two_modes_draws(n, dim, seed=0):
    upper = torch.rand((n, 1), generator=torch.Generator().manual_seed(seed)) < 0.7
    return torch.where(upper, 3 + normals(n, dim, seed=seed + 1), -3 + 0.5 * normals(n, dim, seed=seed + 1))


def off(draws, mean, covariance):
    """How many standard errors each first and second moment is off.

    The larger of what the effective size and what the spread between chains say.
    """
    z = draws.double().numpy() - mean.double().numpy()
    i, j = np.tril_indices(z.shape[-1])
    values = np.concatenate([z, z[..., i] * z[..., j]], -1)
    expected = np.concatenate([np.zeros(z.shape[-1]), covariance.double().numpy()[i, j]])
    within = values.std((0, 1)) / np.sqrt(effective_size(values))
    error = np.maximum(within, values.mean(0).std(0, ddof=1) / math.sqrt(values.shape[1]))
    return np.abs(values.mean((0, 1)) - expected) / error


# Convergence


def autoregressive(rho, steps=2000, chains=8, dim=50):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(steps, chains, dim))
    for t in range(1, steps):
        x[t] = rho * x[t - 1] + math.sqrt(1 - rho**2) * x[t]
    return x


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9])
def test_effective_size_of_autoregressive_chains(rho):
    x = autoregressive(rho)
    exact = 16_000 * (1 - rho) / (1 + rho)
    ratio = effective_size(x) / exact
    assert ratio.mean() == pytest.approx(1, abs=SIGMAS * ratio.std() / math.sqrt(50))
    assert ratio.std() < 0.15
    assert (split_rhat(x) < 1.03).all()


def test_monotone_maps_change_nothing():
    x = autoregressive(0.5, dim=2)
    assert np.allclose(effective_size(x), effective_size(np.exp(3 * x)))
    assert np.allclose(split_rhat(x), split_rhat(x**3), rtol=1e-3)  # the folded part does change a little


def test_chains_that_disagree_are_found():
    """The negative control of the two tests above."""
    x = autoregressive(0.0, steps=500, dim=4)
    x[:, 4:, 0] += 6  # stuck in two modes
    x[:, :, 1] += np.linspace(-2, 2, 500)[:, None]  # drift, common to all chains
    x[:, 4:, 2] *= 3  # the same centre, another width: only folding shows it
    rhat, effective = split_rhat(x), effective_size(x)
    assert (rhat[:3] > 1.1).all()
    assert rhat[3] < 1.01
    assert (effective[:2] < 50).all()
    assert effective[3] > 3500
    x[3, 2, 0], x[:, :, 1] = np.nan, 1.0
    assert np.isnan(split_rhat(x)[:2]).all()
    assert np.isnan(effective_size(x)[:2]).all()
    with pytest.raises(ValueError, match="at least 4 steps"):
        split_rhat(x[:3])


def test_convergence_says_what_is_wrong():
    x = autoregressive(0.0, steps=500, dim=3)
    good = diagnose(x, acceptance=0.25, warmup=10, seconds=1.0, method="emcee")
    assert good.converged
    assert good.warning is None
    assert str(good).startswith("emcee: converged, R-hat at most 1.0")
    x[:, 4:, 1] += 6
    x[0, 0, 2] = np.nan
    bad = diagnose(x, acceptance=0.25, warmup=10, seconds=1.0, method="emcee")
    assert not bad.converged
    assert "after 510 steps in parameters 2 (R-hat 1.69, 12 effective), 3 (R-hat nan" in bad.warning
    assert "more steps" in bad.warning
    assert "not converged" in str(bad)
    few = dataclasses.replace(good, effective=(4000.0, 99.0, 4000.0))
    assert "in parameter 2 (R-hat" in few.warning
    saved = json.loads(json.dumps(dataclasses.asdict(good)))
    assert Convergence(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}) == good


def test_a_start_far_off_is_thrown_away():
    x = autoregressive(0.5, steps=800, chains=16, dim=2)
    value = -0.5 * (x**2).sum(-1)
    assert 5 * 3 <= forgotten(x, value) < 60  # autocorrelation time 3
    x[:200] += np.linspace(30, 0, 200)[:, None, None]
    assert 190 <= forgotten(x, value) <= 400


# Starting points


def test_starts_are_posterior_draws_where_the_prior_hits_it():
    prior = 5 * normals(20_000, 2)
    starts = start_points(prior, two_modes(prior) - standard(prior / 5), 400, seed=1)
    assert starts.shape == (400, 2)
    upper = (starts.sum(1) > 0).double().mean().item()
    assert upper == pytest.approx(0.7, abs=SIGMAS * math.sqrt(0.21 / 400))
    assert torch.equal(starts, start_points(prior, two_modes(prior) - standard(prior / 5), 400, seed=1))


def test_starts_differ_however_narrow_the_likelihood_is():
    prior = normals(1000, 3)
    value = torch.stack([-0.5e8 * prior.square().sum(1), -0.5 * (prior - 1).square().sum(1)], 1)
    value[:500, 0] = math.nan
    value[500:510, 0] = math.inf
    starts = start_points(prior, value, 64, seed=0)
    assert starts.shape == (2, 64, 3)
    assert len(starts[0].unique(dim=0)) == 64
    allowed = {tuple(row) for row in prior[510:].tolist()}
    assert {tuple(row) for row in starts[0].tolist()} <= allowed
    # Tempered, but still close.
    assert starts[0].norm(dim=1).mean() < 0.6 * prior.norm(dim=1).mean()


def test_starts_need_finite_likelihoods():
    prior = normals(100, 2)
    with pytest.raises(ValueError, match="No prior draw has a finite likelihood: the chain cannot start"):
        start_points(prior, torch.full((100,), math.nan), 10, seed=0)
    value = torch.full((100, 2), -math.inf)
    value[:, 0] = value[:9, 1] = 0
    with pytest.raises(ValueError, match="at least 10 prior draws .* 9 of 100"):
        start_points(prior, value, 10, seed=0)
    assert start_points(prior, value, 9, seed=0).shape == (2, 9, 2)


# emcee


def test_emcee_recovers_a_gaussian():
    target = correlated(4)
    chain = run_emcee(target.log_prob, 0.1 * normals(64, 4), effective=4000, seed=0)  # starts far too close
    assert chain.draws.shape[1:] == (1, 64, 4)
    assert chain.convergence[0].converged
    assert min(chain.convergence[0].effective) >= 4000
    assert chain.convergence[0].steps == len(chain.draws)
    assert 0.15 < chain.convergence[0].acceptance < 0.5
    assert torch.allclose(chain.log_density, target.log_prob(chain.draws), atol=1e-4)
    assert (off(chain.draws[:, 0], target.mean, target.covariance_matrix) < SIGMAS).all()
    assert (off(chain.draws[:, 0], target.mean, 1.2 * target.covariance_matrix) > SIGMAS).any()


@pytest.mark.slow
def test_emcee_recovers_a_banana():
    chain = run_emcee(banana, normals(128, 3), effective=1500, seed=0)
    assert chain.convergence[0].converged
    assert (off(straight(chain.draws[:, 0]), torch.zeros(3), torch.eye(3)) < SIGMAS).all()


def test_emcee_weighs_two_modes():
    prior = 5 * normals(20_000, 2)
    start = start_points(prior, two_modes(prior) - standard(prior / 5), 100, seed=1)
    chain = run_emcee(two_modes, start, effective=1000, seed=0)
    assert chain.convergence[0].converged
    upper = (chain.draws[:, 0].sum(-1, keepdim=True) > 0).double().numpy()
    error = math.sqrt(0.21 / effective_size(upper)[0])
    assert error < 0.03
    assert upper.mean() == pytest.approx(0.7, abs=SIGMAS * error)


def half_normal(z):
    """NaN below zero, as a network may be where it was not trained."""
    return torch.where(z[..., 0] > 0, -0.5 * z.square().sum(-1), math.nan)


@pytest.mark.parametrize("sampler", ["emcee", "HMC"])
def test_nan_is_never_visited(sampler):
    start = normals(2, 32, 2).abs()
    chain = run_emcee(half_normal, start[0], seed=0) if sampler == "emcee" else run_hmc(half_normal, start, seed=0)
    z = chain.draws[:, 0]
    assert bool(chain.log_density.isfinite().all())
    assert chain.convergence[0].converged
    assert (z[..., 0] > 0).all()
    mean = torch.tensor([math.sqrt(2 / math.pi), 0.0])
    assert (off(z, mean, torch.diag(torch.tensor([1 - 2 / math.pi, 1.0]))) < SIGMAS).all()


def hard(z):
    return -0.5 * (z / torch.tensor([1e-3, 1e3])).square().sum(-1)


def test_a_chain_that_has_not_converged_says_so():
    chain = run_emcee(hard, normals(64, 2), max_steps=60, seed=0)
    convergence = chain.convergence[0]
    assert not convergence.converged
    assert convergence.steps + convergence.warmup == 60
    assert "not converged after 60 steps in parameter" in convergence.warning
    chain = run_hmc(correlated(20).log_prob, normals(1, 16, 20), warmup=20, max_steps=60, seed=0)
    assert not chain.convergence[0].converged
    assert "not converged after 60 steps" in chain.convergence[0].warning
    with pytest.raises(ValueError, match="max_steps of at least 208"):
        run_hmc(hard, normals(1, 16, 2), max_steps=200, seed=0)


def test_emcee_refuses_to_start():
    start = normals(64, 2)
    with pytest.raises(ChainError, match="not finite at 3 of 64 starting points") as caught:
        run_emcee(lambda z: torch.where(z[:, 0] > start[:, 0].topk(4, largest=False).values[-1] - 1e-6, 0.0, math.nan),
                  start, seed=0)
    assert caught.value.targets == (0,)
    with pytest.raises(ChainError, match="in a subspace"):
        run_emcee(standard, torch.cat([start, start[:, :1]], 1), seed=0)
    with pytest.raises(ValueError, match="at least 4 walkers for 2 parameters; got 3"):
        run_emcee(standard, start[:3], seed=0)
    calls = []

    def spikes(z):
        calls.append(1)
        return torch.full((len(z),), 0.0 if len(calls) == 1 else -math.inf)

    with pytest.raises(ChainError, match="No chain has moved in 200 steps"):
        run_emcee(spikes, start, seed=0)


# Hamiltonian Monte Carlo


def test_hmc_recovers_different_densities_at_once():
    targets = [correlated(20), correlated(20, rho=0.99, shift=5.0), correlated(20, rho=0.0)]
    factors = torch.stack([target.scale_tril for target in targets])
    centre = torch.stack([target.mean for target in targets])[:, None]

    def log_density(z):
        white = torch.linalg.solve_triangular(factors, (z - centre).mT, upper=False)
        return -0.5 * white.square().sum(1)

    start = 2 * normals(3, 16, 20) @ factors.mT + centre  # twice as wide as the densities
    chain = run_hmc(log_density, start, effective=1500, seed=0)
    assert chain.draws.shape[1:] == (3, 16, 20)
    for b, target in enumerate(targets):
        convergence = chain.convergence[b]
        assert convergence.converged
        assert 0.8 < convergence.acceptance < 0.97
        assert min(convergence.effective) >= 1500
        assert (off(chain.draws[:, b], target.mean, target.covariance_matrix) < SIGMAS).all()
    assert torch.allclose(chain.log_density[5], log_density(chain.draws[5]), atol=1e-4)


@pytest.mark.slow
def test_hmc_recovers_a_banana():
    chain = run_hmc(banana, normals(1, 32, 3), effective=1500, seed=0)
    assert chain.convergence[0].converged
    assert (off(straight(chain.draws[:, 0]), torch.zeros(3), torch.eye(3)) < SIGMAS).all()


@pytest.mark.parametrize("rule", [*(pytest.param(rule, marks=pytest.mark.slow) for rule in (1, 0)), -1],
                         ids=["right", "always", "sign-flipped"])
def test_hmc_without_its_accept_step_is_wrong(monkeypatch, rule):
    """The negative control of detailed balance: without it the moments are wrong."""
    target = correlated(20)
    calls = []

    def accept(gain, uniform):
        calls.append(1)
        return uniform.log() < (gain if len(calls) <= 200 else rule * gain)  # a sound warm-up

    monkeypatch.setattr(hmc, "_accept", accept)
    start = normals(1, 32, 20) @ target.scale_tril.T
    chain = run_hmc(target.log_prob, start, effective=10_000, seed=0)
    wrong = off(chain.draws[:, 0], target.mean, target.covariance_matrix) > SIGMAS
    assert wrong.any() == (rule != 1)


def test_hmc_keeps_the_weights_of_its_starts_and_does_not_claim_more():
    prior = 5 * normals(20_000, 2)
    start = start_points(prior, two_modes(prior) - standard(prior / 5), 400, seed=1)
    chain = run_hmc(two_modes, start[None], max_steps=300, seed=0)
    upper = (chain.draws[:, 0].sum(-1) > 0).double().mean().item()
    assert upper == pytest.approx(0.7, abs=SIGMAS * math.sqrt(0.21 / 400))
    assert not chain.convergence[0].converged


def test_hmc_refuses_to_start():
    start = normals(3, 16, 2)
    start[1] = start[1].abs()
    with pytest.raises(ChainError, match="cannot start") as caught:
        run_hmc(half_normal, start, seed=0)
    assert caught.value.targets == pickle.loads(pickle.dumps(caught.value)).targets == (0, 2)
    calls = []

    def spike(z):
        calls.append(1)
        frozen = torch.tensor([[0.0], [0.0 if len(calls) == 1 else -math.inf]])
        return standard(z) + frozen

    with pytest.raises(ChainError, match="No chain has moved") as caught:
        run_hmc(spike, start[:2], warmup=20, seed=0)
    assert caught.value.targets == (1,)
    with pytest.raises(ValueError, match=r"shape \(B, C, D\)"):
        run_hmc(standard, start[0], seed=0)


# Both


BOX = BoxPrior([0.0, -1.0], [1.0, 3.0])
SEEN, WIDTH = torch.tensor([0.02, 2.5]), torch.tensor([0.1, 0.5])  # close to a lower and an upper edge


def in_the_box(z):
    """A uniform prior and a Gaussian likelihood, in the coordinates where the prior's edges are at infinity."""
    space = Unbounded(BOX)
    theta = space.back(z)
    likelihood = standard((theta - SEEN) / WIDTH) - WIDTH.log().sum()
    return likelihood - math.log(4.0) + space.log_abs_det(z, theta)


def exact_in_the_box():
    low, high = (BOX.low - SEEN) / WIDTH, (BOX.high - SEEN) / WIDTH
    return truncnorm(low.double(), high.double(), loc=SEEN.double(), scale=WIDTH.double())


def in_the_box_start(n, seed=3):
    prior = normals(4000, 2, seed=seed)
    return start_points(prior, in_the_box(prior) - standard(prior), n, seed=1)


@pytest.mark.parametrize("sampler", ["emcee", "HMC"])
def test_posterior_at_the_edges_of_a_box(sampler):
    start = in_the_box_start(64)
    if sampler == "emcee":
        chain = run_emcee(in_the_box, start, effective=4000, seed=0)
    else:
        chain = run_hmc(in_the_box, start[None], effective=4000, seed=0)
    theta = Unbounded(BOX).back(chain.draws[:, 0])
    exact = exact_in_the_box()
    assert chain.convergence[0].converged
    assert (off(theta, torch.tensor(exact.mean()), torch.tensor(exact.var()).diag()) < SIGMAS).all()


def test_seeds_reproduce_and_leave_global_state():
    states = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    runs = {
        "emcee": lambda seed: run_emcee(standard, normals(16, 2), effective=100, max_steps=100, seed=seed).draws,
        "HMC": lambda seed: run_hmc(standard, normals(2, 8, 2), max_steps=50, warmup=20, seed=seed).draws,
        "starts": lambda seed: start_points(normals(100, 2), normals(100), 10, seed=seed),
        "evidence": lambda seed: log_evidence(standard, normals(500, 2, 2), seed=seed, proposals=100).value,
    }
    for run in runs.values():
        first = run(1)
        assert torch.equal(first, run(1))
        assert not torch.equal(first[:5], run(2)[:5])
    after = np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(states[0], after[0], strict=True))
    assert torch.equal(states[1], after[1])
    with pytest.raises(ValueError, match="as seed"):
        run_emcee(standard, normals(16, 2), seed=-1)


def test_a_progress_bar_says_how_far(capsys):
    run_emcee(standard, normals(16, 2), effective=3000, seed=0, progress=True, label="Sampling")
    text = capsys.readouterr().err
    assert "Sampling" in text
    assert "/3000 effective" in text


def test_thinned_draws_are_even_and_differ():
    steps, chains = 30, 8
    number = torch.arange(steps * chains, dtype=torch.float32).reshape(steps, 1, chains, 1).repeat(1, 2, 1, 1)
    number[:, 1] += 1000
    chain = Chain(number, number[..., 0], ())
    for n in (1, 8, 30, 64, 100, 240):
        taken = thin(chain, n, seed=0)
        assert taken.shape == (n, 2, 1)
        assert torch.equal(taken[:, 1], taken[:, 0] + 1000)
        assert len(taken[:, 0].unique()) == n
        step, which = taken[:, 0, 0].long() // chains, taken[:, 0, 0].long() % chains
        for each in (step.bincount(minlength=steps), which.bincount(minlength=chains)):
            assert each.max() - each.min() <= 1
    assert torch.equal(thin(chain, 64), thin(chain, 64, seed=0))
    assert not torch.equal(thin(chain, 64), thin(chain, 64, seed=1))
    with pytest.raises(ValueError, match="between 1 and 240 draws"):
        thin(chain, 241)


# Evidence


def bent(n, dim, seed):
    z = normals(n, dim, seed=seed)
    z[:, 1] = WIDTH_OF_BANANA * z[:, 1] + z[:, 0] ** 2
    return z


@pytest.mark.parametrize("dim", [2, 6])
def test_evidence_of_known_normalisers(dim):
    target = correlated(dim, rho=0.95)
    parts = [standard, target.log_prob, banana, two_modes]
    constants = torch.tensor([0.0, 1000.0, -3.0, 7.0], dtype=torch.float64)

    def log_density(z):
        return torch.stack([part(z[:, b]) for b, part in enumerate(parts)], 1).double() + constants

    draws = torch.stack([normals(2000, dim), normals(2000, dim, seed=1) @ target.scale_tril.T, bent(2000, dim, 2),
                         two_modes_draws(2000, dim, 3)], 1)
    found = log_evidence(log_density, draws, seed=0)
    assert found.value.shape == found.standard_error.shape == found.effective.shape == (4,)
    assert (found.standard_error < 0.02).all()
    assert (found.effective > 1000).all()
    assert ((found.value - constants).abs() < SIGMAS * found.standard_error).all()


def test_evidence_of_a_box_from_a_chain():
    chain = run_emcee(in_the_box, in_the_box_start(64), effective=1000, seed=0)
    found = log_evidence(lambda z: in_the_box(z), thin(chain, 2000), seed=0)
    low, high = (BOX.low - SEEN) / WIDTH, (BOX.high - SEEN) / WIDTH
    exact = torch.special.log_ndtr(high.double()).exp() - torch.special.log_ndtr(low.double()).exp()
    assert found.standard_error.item() < 0.02
    assert found.value.item() == pytest.approx(exact.log().sum().item() - math.log(4.0),
                                               abs=SIGMAS * found.standard_error.item())


def test_evidence_needs_draws_of_all_modes():
    """The negative control: without the narrow mode its weight is missing."""
    draws = 3 + normals(2000, 1, 4)
    assert log_evidence(two_modes, draws, seed=0).value.item() == pytest.approx(math.log(0.7), abs=0.1)


def test_evidence_in_chunks(monkeypatch):
    draws = normals(500, 3, 2)
    whole = log_evidence(standard, draws, seed=0)
    sizes = []

    def counted(z):
        sizes.append(z.shape[0] * z.shape[1])
        return standard(z)

    monkeypatch.setattr(evidence_module, "_CHUNK", 300)
    assert torch.allclose(log_evidence(counted, draws, seed=0).value, whole.value, atol=1e-6)
    assert max(sizes) == 300


def test_evidence_says_what_it_cannot_use():
    draws = normals(500, 2, 2)
    with pytest.raises(ValueError, match="at least 120 draws"):
        log_evidence(standard, draws[:100], seed=0)
    with pytest.raises(ValueError, match="finite draws"):
        log_evidence(standard, draws * math.inf, seed=0)
    with pytest.raises(ValueError, match="subspace"):
        log_evidence(standard, draws.new_zeros(500, 2, 2), seed=0)
    with pytest.raises(ValueError, match=r"densities \[1\]"):
        log_evidence(lambda z: standard(z) + torch.tensor([0.0, math.nan]), draws, seed=0)
