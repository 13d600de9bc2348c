import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Independent, LogNormal, MultivariateNormal

import mlsbi
from mlsbi import (
    MDN,
    NPE,
    NSF,
    BoxPrior,
    Level,
    LevelStack,
    Multilevel,
    MultilevelData,
    SingleLevel,
    TrainingOptions,
    simulate,
)
from mlsbi.diagnostics import nlpd

QUICK = TrainingOptions(epochs=3)
SMALL = NSF(transforms=2, hidden=8, blocks=1)
SHIFT = 0.5  # of the low level: a posterior that believes it loses more than a nat
BOX = BoxPrior([2.0, -1.0], [3.0, 1.0], names=["rate", "shift"])


def normal_noise(n, generator):
    return torch.randn(n, 3, generator=generator)


def low(theta, noise):
    return torch.cat([theta, theta[:, :1]], 1) + 0.5 * noise + SHIFT


def high(theta, noise):
    return torch.cat([theta, theta[:, :1]], 1) + 0.5 * noise


def data_for(prior, n=(200, 40), seed=0):
    stack = LevelStack(prior, normal_noise, [Level("low", low, 1), Level("high", high, 10)])
    return simulate(stack, n, seed=seed, progress=False)


@pytest.fixture(scope="module")
def box_npe():
    return NPE(BOX, density=SMALL, training=QUICK, seed=1).fit(data_for(BOX), ensemble=2, progress=False)


GAUSSIAN = MultivariateNormal(torch.zeros(2), torch.eye(2))


def exact_gaussian(x):
    """Posterior of theta ~ N(0, I), x = A theta + 0.5 noise."""
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    precision = torch.eye(2) + a.T @ a / 0.25
    mean = torch.linalg.solve(precision, a.T @ x.T / 0.25).T
    return MultivariateNormal(mean, precision_matrix=precision)


def fit_gaussian(strategy):
    """A posterior trained on plenty of data, test rows, and how many nats it loses against the exact one on them."""
    options = TrainingOptions(epochs=120, learning_rate=2e-3, patience=20)
    npe = NPE(GAUSSIAN, strategy=strategy, density=NSF(transforms=2, hidden=16, blocks=1), training=options, seed=3)
    posterior = npe.fit(data_for(GAUSSIAN, n=(3000, 1500)), progress=False).posterior()
    test = data_for(GAUSSIAN, n=(1, 1000), seed=99).levels[1]
    found = nlpd(posterior.log_prob_batched(test.theta[None], test.fine)[0].numpy()).mean
    return posterior, test, found + exact_gaussian(test.fine).log_prob(test.theta).mean().item()


RECOVER = ["multilevel", "high", *(pytest.param(strategy, marks=pytest.mark.slow) for strategy in (
    Multilevel("estimated"), Multilevel(rescale=True, project=True)))]


@pytest.mark.parametrize("strategy", RECOVER, ids=str)
def test_npe_recovers_a_gaussian_posterior(strategy):
    posterior, test, loss = fit_gaussian(strategy)
    assert loss < 0.05  # nats; what a small flow loses on 3000 rows
    x = test.fine[:1]
    samples = posterior.sample((4000,), x, seed=0)
    distribution = exact_gaussian(x)
    spread = distribution.variance[0].sqrt()
    assert torch.allclose(samples.mean(0), distribution.mean[0], atol=0.25 * spread.min().item())
    assert torch.allclose(samples.std(0), spread, rtol=0.15)


@pytest.mark.slow
def test_the_low_level_alone_recovers_another_posterior():
    """The negative control of the test above: its bound would notice a strategy that believes the low level."""
    assert fit_gaussian("low")[2] > 0.5


def test_levels_are_used_as_the_strategies_say():
    data = data_for(BOX)
    terms = mlsbi.strategies.fitting.posterior_problem(data, BOX).terms
    assert [len(t) for t in Multilevel().terms(terms)] == [200, 40]
    assert [len(t) for t in SingleLevel(-1).terms(terms)] == [40]
    assert [len(t) for t in SingleLevel(0).terms(terms)] == [240]
    with pytest.raises(ValueError, match="between -2 and 1"):
        SingleLevel(2).terms(terms)


def test_posterior_shapes(box_npe):
    posterior = box_npe.posterior(torch.tensor([2.5, 0.0, 2.5]))
    assert posterior.sample((7,), seed=1).shape == (7, 2)
    assert posterior.sample().shape == (1, 2)
    assert posterior.log_prob(torch.tensor([[2.5, 0.0]] * 5)).shape == (5,)
    assert posterior.log_prob(torch.tensor([2.5, 0.0])).shape == (1,)
    x = torch.randn(4, 3)
    assert posterior.sample_batched((6,), x, seed=1).shape == (6, 4, 2)
    theta = BOX.sample((6, 4))
    batched = posterior.log_prob_batched(theta, x)
    assert batched.shape == (6, 4)
    for b in range(4):
        assert torch.allclose(batched[:, b], posterior.log_prob(theta[:, b], x[b]), atol=1e-5)
    assert posterior.log_prob_batched(theta[:1], x).shape == (1, 4)
    assert posterior.map().shape == (2,)
    assert list(posterior.to_frame(5, seed=0)) == ["rate", "shift"]


def test_observation_with_and_without_batch_dimension(box_npe):
    x = torch.tensor([2.5, 0.0, 2.5])
    one, other = box_npe.posterior(x), box_npe.posterior(x[None])
    assert torch.equal(one.sample((5,), seed=1), other.sample((5,), seed=1))
    later = box_npe.posterior().set_default_x(x.tolist())
    assert torch.equal(one.sample((5,), seed=1), later.sample((5,), seed=1))


def test_seeds_reproduce_and_leave_global_state(box_npe):
    posterior = box_npe.posterior(torch.zeros(3))
    before = torch.get_rng_state()
    assert torch.equal(posterior.sample((9,), seed=1), posterior.sample((9,), seed=1))
    assert not torch.equal(posterior.sample((9,), seed=1), posterior.sample((9,), seed=2))
    assert not torch.equal(posterior.sample((9,)), posterior.sample((9,)))
    assert torch.equal(before, torch.get_rng_state())


POSITIVE = Independent(LogNormal(torch.zeros(2), torch.ones(2)), 1)


@pytest.mark.parametrize("prior", [BOX, POSITIVE], ids=["box", "positive"])
def test_posterior_never_leaves_the_support_and_integrates_to_one(prior):
    npe = NPE(prior, density=SMALL, training=QUICK, seed=1).fit(data_for(prior), progress=False)
    # An observation far outside what was seen drives the flow to extremes.
    posterior = npe.posterior(torch.tensor([50.0, -50.0, 50.0]))
    samples = posterior.sample((2000,), seed=0)
    assert bool(prior.support.check(samples).all())
    assert bool(torch.isfinite(posterior.log_prob(samples)).all())
    assert posterior.log_prob(torch.tensor([[-1.0, 0.5]])).item() == -np.inf
    # Importance sampling from the prior: E_prior[q / p] = 1.
    near = npe.posterior(torch.tensor([2.5, 0.2, 2.5]))
    draws = prior.sample((40_000,))
    ratio = (near.log_prob(draws) - prior.log_prob(draws)).exp()
    assert ratio.mean().item() == pytest.approx(1.0, abs=5 * ratio.std().item() / 200)


def test_ensemble_is_the_mixture_of_its_members(box_npe):
    x = torch.tensor([2.5, 0.0, 2.5])
    theta = BOX.sample((20,))
    members = torch.stack([
        mlsbi.DirectPosterior([network], BOX, x).log_prob(theta) for network in box_npe.networks
    ])
    assert not torch.allclose(members[0], members[1])
    mixture = box_npe.posterior(x).log_prob(theta)
    assert torch.allclose(mixture, members.exp().mean(0).log(), atol=1e-5)
    assert len(box_npe.histories) == 2


def test_map_is_not_below_any_sample(box_npe):
    posterior = box_npe.posterior(torch.tensor([2.5, 0.0, 2.5]))
    best = posterior.log_prob(posterior.map()).item()
    assert best >= posterior.log_prob(posterior.sample((2000,), seed=0)).max().item() - 1e-4


def test_training_is_reproducible():
    data = data_for(BOX)
    first, again, other = (
        NPE(BOX, density=SMALL, training=QUICK, seed=seed).fit(data, progress=False).posterior(torch.zeros(3))
        for seed in (1, 1, 2)
    )
    theta = BOX.sample((10,))
    assert torch.equal(first.log_prob(theta), again.log_prob(theta))
    assert not torch.equal(first.log_prob(theta), other.log_prob(theta))


class Centre(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x)


def test_reload_is_bit_equal(tmp_path, box_npe):
    box_npe.save(tmp_path / "npe")
    again = mlsbi.load(tmp_path / "npe")
    theta, x = BOX.sample((50,)), torch.tensor([2.5, 0.0, 2.5])
    assert torch.equal(box_npe.posterior(x).log_prob(theta), again.posterior(x).log_prob(theta))
    assert torch.equal(box_npe.posterior(x).sample((9,), seed=4), again.posterior(x).sample((9,), seed=4))
    assert again.strategy == box_npe.strategy
    assert again.history.epochs == json.loads(json.dumps(box_npe.history.epochs))
    assert again.prior.names == ("rate", "shift")


def test_custom_objects_are_passed_again(tmp_path):
    embedding = Centre()

    def build(dim, condition_dim):
        return SMALL(dim, condition_dim)

    npe = NPE(GAUSSIAN, density=build, embedding=embedding, training=QUICK, seed=1)
    npe.fit(data_for(GAUSSIAN), progress=False).save(tmp_path)
    for given, match in (
        ({}, "density of your own"),
        ({"density": build}, "with an embedding"),
        ({"density": build, "embedding": Centre()}, "prior that is not a BoxPrior"),
        ({"density": NSF(transforms=3), "embedding": Centre(), "prior": GAUSSIAN}, "do not fit"),
    ):
        with pytest.raises(ValueError, match=match):
            mlsbi.load(tmp_path, **given)
    again = mlsbi.load(tmp_path, density=build, embedding=Centre(), prior=GAUSSIAN)
    x, theta = torch.zeros(3), torch.randn(5, 2)
    assert torch.equal(npe.posterior(x).log_prob(theta), again.posterior(x).log_prob(theta))


def test_members_own_their_embedding():
    npe = NPE(BOX, density=SMALL, embedding=Centre(), training=QUICK, seed=1)
    npe.fit(data_for(BOX), ensemble=2, progress=False)
    first, second = (network.embedding.linear.weight for network in npe.networks)
    assert not torch.equal(first, second)


def test_a_given_embedding_is_where_training_starts():
    frozen = Centre().requires_grad_(requires_grad=False)
    npe = NPE(BOX, density=SMALL, embedding=frozen, training=QUICK, seed=1)
    npe.fit(data_for(BOX), ensemble=2, progress=False)
    for network in npe.networks:
        assert torch.equal(network.embedding.linear.weight, frozen.linear.weight)


def test_one_observation_is_embedded_once(monkeypatch):
    npe = NPE(BOX, density=SMALL, embedding=Centre(), training=QUICK, seed=1).fit(data_for(BOX), progress=False)
    rows = []
    npe.networks[0].embedding.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    npe.posterior(torch.zeros(3)).log_prob(BOX.sample((5000,)))
    assert rows == [1]


def test_map_leaves_no_gradients(box_npe):
    parameters = [parameter for network in box_npe.networks for parameter in network.parameters()]
    for parameter in parameters:
        parameter.grad = None
    box_npe.posterior(torch.zeros(3)).map()
    assert all(parameter.grad is None for parameter in parameters)


def test_a_large_offset_costs_no_digits():
    days = 2_459_000.0
    prior = BoxPrior([0.0], [1.0])
    theta = torch.rand(200, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    fits = []
    for shift in (0.0, days):
        data = mlsbi.MultilevelData.from_arrays([(theta, theta + shift)])
        npe = NPE(prior, strategy="high", density=SMALL, training=QUICK, seed=1).fit(data, progress=False)
        fits.append(npe.posterior(theta[0] + shift).log_prob(torch.tensor([[0.2], [0.6]])))
    assert torch.allclose(*fits, atol=1e-3)  # float64 keeps 1e-10 of a day


def test_numpy_numbers_are_saved(tmp_path):
    options = TrainingOptions(epochs=np.int64(2))
    npe = NPE(BOX, density=NSF(transforms=2, hidden=np.int64(8)), training=options, seed=np.int64(3))
    npe.fit(data_for(BOX), progress=False).save(tmp_path)
    assert mlsbi.load(tmp_path).seed == 3


def test_a_prior_of_another_size_is_refused(tmp_path, box_npe):
    box_npe.save(tmp_path)
    with pytest.raises(ValueError, match="over 2 parameters"):
        mlsbi.load(tmp_path, prior=BoxPrior([0.0], [1.0]))


def test_newer_and_damaged_models_are_refused(tmp_path, box_npe):
    folder = box_npe.save(tmp_path / "npe")
    config = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps({**config, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        mlsbi.load(folder)
    (folder / "model.json").write_text("not json")
    with pytest.raises(ValueError, match="not a model configuration"):
        mlsbi.load(folder)
    (folder / "model.json").write_text(json.dumps({**config, "format": 1}))
    with pytest.raises(ValueError, match="format 1.*Train and save it again"):
        mlsbi.load(folder)
    for key, value, match in (
        ("density", {"name": "nsf", "options": {"transformers": 3}}, "saved density cannot be read"),
        ("density", {"name": "os.system", "options": {}}, "saved density cannot be read"),
        ("embedding", {"name": "mlp", "options": {"rows": 3}}, "saved embedding cannot be read"),
        ("training", {"epoch": 3}, "saved training cannot be read"),
        ("histories", [{}], "saved histories cannot be read"),
        ("estimator", "npu", "Unknown estimator 'npu'"),
        ("x_transform", "log", "x_transform"),
    ):
        (folder / "model.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ValueError, match=match):
            mlsbi.load(folder)
    (folder / "model.json").write_text(json.dumps({key: value for key, value in config.items() if key != "x_shape"}))
    with pytest.raises(ValueError, match="lacks 'x_shape'"):
        mlsbi.load(folder)
    (folder / "model.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(ValueError, match="damaged"):
        mlsbi.load(folder)
    with pytest.raises(FileNotFoundError, match="Expected a saved model"):
        mlsbi.load(tmp_path)


class Malicious:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (torch.zeros(4), "one observation of shape"),
        (torch.zeros(2, 3), "sample_batched"),
        (torch.tensor([0.0, float("nan"), 0.0]), "finite observation"),
    ],
)
def test_bad_observations(box_npe, x, match):
    with pytest.raises(ValueError, match=match):
        box_npe.posterior(x)
    with pytest.raises(ValueError, match=match):
        box_npe.posterior().sample((3,), x)


def test_bad_calls(box_npe):
    posterior = box_npe.posterior()
    with pytest.raises(ValueError, match="No observation"):
        posterior.sample((3,))
    with pytest.raises(TypeError, match=r"sample\(\(100,\)\)"):
        posterior.sample(100, torch.zeros(3))
    with pytest.raises(TypeError, match="from_arrays"):
        NPE(BOX).fit((torch.zeros(3, 2), torch.zeros(3, 3)))
    with pytest.raises(ValueError, match="at least 0 as seed"):
        NPE(BOX, seed=-1)
    with pytest.raises(ValueError, match="device that torch can use"):
        NPE(BOX, device="nowhere")
    with pytest.raises(ValueError, match=r"\(n,\) with n >= 1"):
        posterior.sample((3, 3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"theta of shape \(n, 4, 2\)"):
        posterior.log_prob_batched(torch.zeros(5, 3, 2), torch.zeros(4, 3))
    with pytest.raises(RuntimeError, match="not trained yet"):
        NPE(BOX).posterior(torch.zeros(3))
    with pytest.raises(ValueError, match="Unknown strategy 'best'"):
        NPE(BOX, strategy="best")
    with pytest.raises(TypeError, match=r"Multilevel\(\)"):
        NPE(BOX, strategy=3)
    with pytest.raises(ValueError, match="ensemble >= 1"):
        NPE(BOX).fit(data_for(BOX), ensemble=0)
    with pytest.raises(ValueError, match="inside the prior's support"):
        NPE(BoxPrior([0.0, 0.0], [1.0, 1.0])).fit(data_for(BOX))


@pytest.mark.gpu
def test_gpu_posterior_agrees_with_cpu(box_npe):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x, theta = torch.tensor([2.5, 0.0, 2.5]), BOX.sample((50,))
    here = box_npe.posterior(x).log_prob(theta)
    there = box_npe.to("cuda").posterior(x).log_prob(theta)
    box_npe.to("cpu")
    assert torch.allclose(here, there, atol=1e-4)


def test_training_goes_on_from_another_estimator():
    g = torch.Generator().manual_seed(0)

    def rows(n, low, high):
        theta = low + (high - low) * torch.rand(n, 1, generator=g)
        return MultilevelData.from_arrays([(theta, theta + 0.1 * torch.randn(n, 1, generator=g))])

    prior, options = BoxPrior([0.0], [1.0]), {"density": MDN(1, 8, 1), "strategy": "high"}
    first = NPE(prior, training=TrainingOptions(epochs=60, learning_rate=1e-2), **options)
    first.fit(rows(400, 0.0, 1.0), ensemble=2, progress=False)
    before = first.posterior([0.5]).sample((9,), seed=0)
    few = rows(20, 0.4, 0.6)
    still = TrainingOptions(epochs=1, learning_rate=1e-9, cross_fit=False)
    later = NPE(prior, training=still, seed=1, **options).fit(few, ensemble=2, start=first, progress=False)
    # With a step that changes nothing it is the same density, in the units of the first rows.
    assert torch.allclose(later.posterior([0.5]).sample((9,), seed=0), before, atol=1e-4)
    anew = NPE(prior, training=still, seed=1, **options).fit(few, ensemble=2, progress=False)
    assert not torch.allclose(anew.posterior([0.5]).sample((9,), seed=0), before, atol=1e-2)
    trained = NPE(prior, training=TrainingOptions(epochs=9), seed=1, **options)
    trained.fit(few, ensemble=2, start=first, progress=False)
    assert not torch.allclose(trained.posterior([0.5]).sample((9,), seed=0), before, atol=1e-4)
    assert torch.equal(first.posterior([0.5]).sample((9,), seed=0), before)  # copies were trained
    with pytest.raises(ValueError, match="same kind, density"):
        NPE(prior, density=MDN(2, 8, 1)).fit(few, start=first)
    with pytest.raises(ValueError, match="begins anew"):
        NPE(prior, density=MDN(1, 8, 1), strategy="auto").fit(few, start=first)
