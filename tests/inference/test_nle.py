import math
import warnings

import pytest
import torch
from torch.distributions import Independent, LogNormal, MultivariateNormal, Normal

import mlsbi
from mlsbi import (
    MAF,
    MDN,
    NLE,
    NPE,
    NSF,
    BoxPrior,
    Level,
    LevelStack,
    MCMCOptions,
    MCMCPosterior,
    MultilevelData,
    SetEmbedding,
    TrainingOptions,
    simulate,
)
from mlsbi.diagnostics import c2st

PRIOR = MultivariateNormal(torch.zeros(2), torch.eye(2))
BOX = BoxPrior([-1.0, 0.0], [1.0, 2.0])
A = torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.0, -1.0]])
SIGMA = 0.6
QUICK = TrainingOptions(epochs=3)
SMALL = MDN(1, 8, 1)


def noise(n, generator):
    return torch.randn(n, 3, generator=generator)


def low(theta, noise):
    return theta @ A.T + SIGMA * noise + 0.5


def high(theta, noise):
    return theta @ A.T + SIGMA * noise


def data_for(prior=PRIOR, n=(200, 40), seed=0):
    stack = LevelStack(prior, noise, [Level("low", low, 1), Level("high", high, 10)])
    return simulate(stack, n, seed=seed, progress=False)


def exact_likelihood(x, theta):
    return Normal(theta @ A.T, SIGMA).log_prob(x).sum(-1)


def exact_posterior(x):
    """Of theta ~ N(0, I) given m outputs A theta + noise, x (m, 3)."""
    precision = torch.eye(2) + len(x) * A.T @ A / SIGMA**2
    return MultivariateNormal(torch.linalg.solve(precision, A.T @ x.sum(0) / SIGMA**2), precision_matrix=precision)


def observe(m, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return high(torch.tensor([[0.4, -0.7]]).expand(m, -1), noise(m, generator))


@pytest.fixture(scope="module")
def small():
    """A likelihood hardly trained, of two networks."""
    return NLE(BOX, density=SMALL, training=QUICK, seed=1).fit(data_for(BOX), ensemble=2, progress=False)


def fit_likelihood(strategy, density=None):
    """A likelihood trained on plenty of data, and how many nats it loses against the exact one on test rows."""
    options = TrainingOptions(epochs=150, learning_rate=2e-3, patience=20)
    nle = NLE(PRIOR, strategy=strategy, density=density or MDN(1, 8, 1), training=options, seed=3)
    nle.fit(data_for(n=(3000, 3000)), progress=False)
    test = data_for(n=(1, 2000), seed=99).levels[1]
    loss = exact_likelihood(test.fine, test.theta) - nle.likelihood.log_prob(test.fine, test.theta)
    return nle, loss.mean().item()


@pytest.mark.parametrize("strategy", ["multilevel",
                                      *(pytest.param(name, marks=pytest.mark.slow) for name in ("transfer", "high"))])
def test_nle_recovers_a_gaussian_likelihood_and_posterior(strategy):
    nle, loss = fit_likelihood(strategy)
    assert loss < 0.05  # nats; what a small network loses on 3000 rows
    x = observe(8)
    posterior, exact = nle.posterior(x), exact_posterior(x)
    samples = posterior.sample((2000,), seed=0)
    spread = exact.variance.sqrt()
    assert torch.allclose(samples.mean(0), exact.mean, atol=0.35 * spread.min().item())
    assert torch.allclose(samples.std(0), spread, rtol=0.15)
    assert posterior.convergence[0].converged
    normaliser = posterior.log_normaliser(x[None], seed=1)
    found = posterior.log_prob(samples[:50]) - normaliser
    assert (found - exact.log_prob(samples[:50])).mean().item() == pytest.approx(0.0, abs=0.25)


def test_the_low_level_alone_recovers_another_likelihood():
    """The negative control of the test above."""
    assert fit_likelihood("low")[1] > 0.5


@pytest.mark.parametrize("density", [MAF(3, 16), pytest.param(NSF(2, 16), marks=pytest.mark.slow)],
                         ids=lambda density: type(density).__name__)
def test_other_densities_recover_it_too(density):
    assert fit_likelihood("multilevel", density)[1] < 0.08


@pytest.mark.parametrize("method", ["emcee", pytest.param("hmc", marks=pytest.mark.slow)])
def test_mcmc_with_the_exact_likelihood_gives_the_exact_posterior(method):
    x = observe(5)
    posterior, exact = MCMCPosterior(exact_likelihood, PRIOR, (3,), x), exact_posterior(x)
    posterior.mcmc = MCMCOptions(method=method, effective=2000)
    samples = posterior.sample((2000,), seed=0)
    assert posterior.convergence[0].converged
    standard_error = exact.variance.sqrt() / math.sqrt(1000)
    assert ((samples.mean(0) - exact.mean).abs() < 4 * standard_error).all()
    assert c2st(exact.sample((2000,)).numpy(), samples.numpy()) < 0.55
    evidence = posterior.evidence(x[None], draws=samples[:, None])
    values = posterior.log_prob(samples[:200]) - evidence.value
    assert torch.allclose(values.float(), exact.log_prob(samples[:200]), atol=5 * evidence.standard_error.item() + 1e-3)


@pytest.mark.slow
def test_more_observations_narrow_the_posterior():
    widths = []
    for m in (1, 4, 16):
        samples = MCMCPosterior(exact_likelihood, PRIOR, (3,), observe(m)).sample((1000,), seed=0)
        widths.append(samples.std(0).mean().item())
    assert widths[0] > 1.5 * widths[1] > 2.25 * widths[2]


def test_batches_are_the_posteriors_one_by_one():
    sets = torch.stack([observe(4, seed=seed) for seed in range(3)])
    posterior = MCMCPosterior(exact_likelihood, PRIOR, (3,))
    samples = posterior.sample_batched((400,), sets, seed=0)
    assert samples.shape == (400, 3, 2)
    assert len(posterior.convergence) == 3
    theta = torch.randn(7, 3, 2, generator=torch.Generator().manual_seed(0))
    found = posterior.log_prob_batched(theta, sets)
    for index, x in enumerate(sets):
        exact = exact_posterior(x)
        assert torch.allclose(samples[:, index].mean(0), exact.mean, atol=0.3 * exact.variance.sqrt().max().item())
        assert torch.allclose(found[:, index], posterior.log_prob(theta[:, index], x), atol=1e-4)
    assert posterior.log_prob_batched(theta[:, :1], sets).shape == (7, 3)
    single = posterior.log_prob_batched(theta, sets[:, 0])  # (B, ...) is one output each
    assert torch.allclose(single, posterior.log_prob_batched(theta, sets[:, :1]))


@pytest.mark.parametrize("prior", [
    BOX, Independent(LogNormal(torch.zeros(2), torch.ones(2)), 1),
    BoxPrior([0.3, -0.8], [0.5, -0.6]),  # much narrower than the likelihood: mass at every edge
], ids=["box", "log-normal", "narrow box"])  # fmt: skip
def test_walkers_never_leave_the_support(prior):
    posterior = MCMCPosterior(exact_likelihood, prior, (3,), observe(3))
    samples = posterior.sample((1000,), seed=0)
    assert prior.support.check(samples).all()
    assert torch.isfinite(posterior.log_prob(samples)).all()
    # Importance weights of prior draws give the same mean.
    theta = prior.sample((200_000,))
    weight = posterior.log_prob(theta) - prior.log_prob(theta)
    weight = (weight - weight.max()).exp()[:, None]
    mean = (weight * theta).sum(0) / weight.sum()
    sd = ((weight * (theta - mean) ** 2).sum(0) / weight.sum()).sqrt()
    assert ((samples.mean(0) - mean).abs() < 5 * sd / math.sqrt(400)).all()
    assert torch.allclose(samples.std(0), sd, rtol=0.15)


def test_outside_the_support_the_density_is_zero(small):
    posterior = small.posterior(observe(2))
    assert posterior.log_prob(torch.tensor([[5.0, 1.0], [0.0, 1.0]])).isinf().tolist() == [True, False]


def test_seeds_reproduce_and_leave_global_state(small):
    posterior = small.posterior(observe(3), mcmc=MCMCOptions(effective=10))
    torch_state = torch.get_rng_state()
    first, again, other = (posterior.sample((10,), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    quick = small.posterior(observe(3), mcmc=MCMCOptions(method="importance"))
    one, same = (quick.evidence(observe(3)[None], seed=4).value for _ in range(2))
    assert torch.equal(one, same)
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_map_is_not_below_any_sample(small):
    posterior = small.posterior(observe(4))
    samples = posterior.sample((500,), seed=0)
    assert posterior.log_prob(posterior.map()).item() >= posterior.log_prob(samples).max().item() - 1e-4


def test_ensembles_are_mixtures_of_likelihoods(small):
    theta, x = BOX.sample((6,)), torch.randn(6, 3)
    members = [network.log_prob(x, theta) for network in small.networks]
    expected = torch.stack(members).logsumexp(0) - math.log(2)
    assert torch.allclose(small.likelihood.log_prob(x, theta), expected.detach(), atol=1e-5)


def test_likelihood_draws_follow_its_density():
    nle = NLE(PRIOR, density=MDN(1, 8, 1), training=TrainingOptions(epochs=60, learning_rate=1e-2), seed=0)
    nle.fit(data_for(n=(2000, 2000)), progress=False)
    theta = torch.tensor([[0.3, -0.2]])
    drawn = nle.likelihood.sample(theta.expand(4000, -1), seed=0)
    assert drawn.shape == (4000, 3)
    assert torch.allclose(drawn.mean(0), (theta @ A.T)[0], atol=0.2)
    assert torch.allclose(drawn.std(0), torch.full((3,), SIGMA), rtol=0.2)
    assert torch.equal(drawn, nle.likelihood.sample(theta.expand(4000, -1), seed=0))


def test_outputs_of_any_shape():
    theta = torch.rand(60, 2, generator=torch.Generator().manual_seed(0))
    x = theta[:, :, None] + torch.randn(60, 2, 3, generator=torch.Generator().manual_seed(1))
    data = MultilevelData.from_arrays([(theta, x), (theta[:20], x[:20] + 0.1, x[:20])])
    nle = NLE(BoxPrior([0.0, 0.0], [1.0, 1.0]), density="mdn", training=QUICK).fit(data, progress=False)
    assert nle.posterior(x[:4]).log_prob(theta[:5]).shape == (5,)
    assert nle.posterior(x[0]).log_prob(theta[:5]).shape == (5,)
    assert nle.likelihood.sample(theta[:5], seed=0).shape == (5, 2, 3)


def test_reload_is_bit_equal(tmp_path, small):
    theta, x = BOX.sample((9,)), torch.randn(9, 3)
    nle = NLE(BOX, density="mdn", embedding="mlp", x_transform="asinh", strategy="transfer", training=QUICK).fit(
        data_for(BOX), progress=False)
    for index, estimator in enumerate((small, nle)):
        estimator.save(tmp_path / str(index))
        loaded = mlsbi.load(tmp_path / str(index))
        assert isinstance(loaded, NLE)
        assert torch.equal(loaded.likelihood.log_prob(x, theta), estimator.likelihood.log_prob(x, theta))
        assert [history.n_train for history in loaded.histories] == [h.n_train for h in estimator.histories]
        assert loaded.history.to_frame().equals(estimator.history.to_frame())
        assert loaded.strategy == estimator.strategy
        again = loaded.fit(data_for(BOX), progress=False, ensemble=len(estimator.networks))
        assert torch.equal(again.likelihood.log_prob(x, theta), estimator.likelihood.log_prob(x, theta))


def test_posteriors_with_our_embeddings_reload_without_being_told(tmp_path):
    theta, x = torch.rand(50, 1), torch.randn(50, 20) ** 3
    data = MultilevelData.from_arrays([(theta, x), (theta[:20], x[:20] + 0.1, x[:20])])
    npe = NPE(BoxPrior([0.0], [1.0]), embedding=SetEmbedding(4, 8), x_transform="asinh", training=QUICK).fit(
        data, progress=False)
    npe.save(tmp_path)
    loaded = mlsbi.load(tmp_path)
    points = torch.rand(5, 1)
    assert torch.equal(loaded.posterior(x[0]).log_prob(points), npe.posterior(x[0]).log_prob(points))
    # A set has no order, through standardiser and network.
    assert torch.allclose(npe.posterior(x[0]).log_prob(points), npe.posterior(x[0].flip(0)).log_prob(points), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [6, 12])
def test_many_parameters(dim):
    """Hamiltonian Monte Carlo beyond ten; as many draws as asked; a normaliser whatever draws it is given."""
    prior = MultivariateNormal(torch.zeros(dim), torch.eye(dim))
    x = torch.linspace(-1, 1, dim).expand(3, -1)
    posterior = MCMCPosterior(lambda x, theta: Normal(theta, 1.0).log_prob(x).sum(-1), prior, (dim,), x)
    samples = posterior.sample((3000,), seed=0)
    assert samples.shape == (3000, dim)
    assert posterior.convergence[0].method == ("HMC" if dim > 10 else "emcee")
    error = 0.5 / min(posterior.convergence[0].effective) ** 0.5
    assert torch.allclose(samples.mean(0), 0.75 * x[0], atol=4.5 * error)
    exact = MultivariateNormal(torch.zeros(dim), torch.eye(dim) / 3 + torch.eye(dim)).log_prob(x[0])
    exact += dim * (-math.log(2 * math.pi) - 0.5 * math.log(3))  # three equal outputs: their mean, and no spread
    evidence = posterior.evidence(x[None], draws=samples[:100, None], seed=1)
    assert evidence.value.item() == pytest.approx(exact.item(), abs=5 * evidence.standard_error.item() + 0.01)
    assert posterior.sample_batched((50,), x[None].expand(2, -1, -1), seed=0).shape == (50, 2, dim)


def test_non_convergence_is_said(small):
    posterior = small.posterior(observe(6), mcmc=MCMCOptions(method="emcee", max_steps=12))
    with pytest.warns(UserWarning, match="MCMC has not converged"):
        posterior.sample((50,), seed=0)
    assert not posterior.convergence[0].converged
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        small.posterior(observe(6)).sample((50,), seed=0)
    assert not caught


def test_a_chain_that_cannot_start_says_so():
    posterior = MCMCPosterior(lambda x, theta: torch.full((len(x),), -torch.inf), PRIOR, (3,), observe(2))
    with pytest.raises(ValueError, match="No prior draw has a finite likelihood: the chain cannot start"):
        posterior.sample((10,), seed=0)
    posterior = MCMCPosterior(lambda x, theta: torch.full((len(x),), torch.nan), PRIOR, (3,), observe(2))
    with pytest.raises(ValueError, match="cannot start"):
        posterior.sample((10,), seed=0)


@pytest.mark.parametrize(("x", "match"), [
    (torch.zeros(4), r"m independent observations of shape \(m, 3\), or one of \(3,\); got \(4,\)"),
    (torch.zeros(2, 4), r"got \(2, 4\)"),
    (torch.zeros(0, 3), r"got \(0, 3\)"),
    (torch.zeros(2, 2, 3), r"got \(2, 2, 3\).*sample_batched"),
    (torch.full((2, 3), torch.nan), "NaN or infinite"),
    (torch.tensor(1.0), r"got \(\)"),
])
def test_bad_observations(small, x, match):
    with pytest.raises(ValueError, match=match):
        small.posterior(x)


def test_bad_calls(small):
    with pytest.raises(ValueError, match="No observation"):
        small.posterior().sample((10,))
    with pytest.raises(ValueError, match="sets of observations"):
        small.posterior().sample_batched((10,), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"theta of shape \(n, 2, 2\)"):
        small.posterior().log_prob_batched(torch.zeros(3, 4, 2), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="as many outputs as theta"):
        small.likelihood.log_prob(torch.zeros(3, 3), BOX.sample((2,)))
    with pytest.raises(ValueError, match="inside the prior's support"):
        small.likelihood.log_prob(torch.zeros(1, 3), torch.full((1, 2), 9.0))
    with pytest.raises(TypeError, match=r"write sample\(\(5,\)\)"):
        small.posterior(observe(1)).sample(5)
    with pytest.raises(RuntimeError, match="not trained yet"):
        NLE(BOX).likelihood  # noqa: B018
    with pytest.raises(ValueError, match="method"):
        MCMCOptions(method="nuts")
    with pytest.raises(ValueError, match="positive numbers"):
        MCMCOptions(effective=0)
    with pytest.raises(ValueError, match='x_transform "none" or "asinh"'):
        NLE(BOX, x_transform="log")


@pytest.mark.slow
def test_one_line_changes_the_method():
    """The whole grid on one data object."""
    data = data_for(BOX, n=(60, 20))
    for kind in (NPE, NLE):
        for strategy in ("multilevel", "transfer", "high", "low"):
            estimator = kind(BOX, strategy=strategy, density=SMALL, training=QUICK).fit(data, progress=False)
            posterior = estimator.posterior(data.levels[1].fine[0])
            assert torch.isfinite(posterior.log_prob(BOX.sample((4,)))).all()
            assert len(posterior.to_frame(100, seed=0)) == 100


@pytest.mark.gpu
def test_gpu_likelihood_agrees_with_cpu(small):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    theta, x = BOX.sample((20,)), observe(4)
    before = small.posterior(x).log_prob(theta)
    try:
        after = small.to("cuda").posterior(x)
        assert torch.allclose(after.log_prob(theta), before, atol=1e-3)
        assert after.sample((100,), seed=0).shape == (100, 2)
    finally:
        small.to("cpu")
