"""Losses and gradients: values and slopes by hand, what counts as a density, and which parameters are looked at."""

import math

import pytest
import torch
from torch import nn

from mlsbi import MDN, NLE, NPE, NSF, BoxPrior, MultilevelData, TrainingOptions
from mlsbi.priors import Unbounded
from theory_checks.densities import AffineGaussian, SharedMixture
from theory_checks.integrands import Gradient, Loss, as_density
from theory_checks.stacks import random_network
from theory_checks.testing import normal_prior_of

GAUSSIAN = AffineGaussian([[2.0, -1.0, 0.5]], [0.3], [0.2])  # one number given three


def rows(n=7, dim=1, shape=(3,), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, dim, generator=generator, dtype=torch.float64),
            torch.randn(n, *shape, generator=generator, dtype=torch.float64))


def fitted(kind, prior, *, dim=1, **options):
    """An estimator after two epochs, and what it was trained on."""
    generator = torch.Generator().manual_seed(0)
    theta = torch.rand(64, dim, generator=generator)
    x = theta.sum(1, keepdim=True) + 0.1 * torch.randn(64, 2, generator=generator)
    estimator = kind(prior, strategy="low", training=TrainingOptions(epochs=2), seed=1, **options)
    return estimator.fit(MultilevelData.from_arrays([(theta, x)]), progress=False), theta, x


@pytest.mark.parametrize("shape", [(3,), (1, 3), (3, 1)])
def test_the_loss_and_its_slopes_are_those_by_hand(shape):
    theta, x = rows(shape=shape)
    found = Loss(GAUSSIAN, "npe").evaluate(theta, x)
    slope = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64)
    precision = math.exp(0.4)
    off = theta - x.flatten(1) @ slope.T - 0.3
    values = 0.5 * precision * off.square() - 0.2 + 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(found.values, values)
    torch.testing.assert_close(found.theta, (precision * off)[:, None])
    torch.testing.assert_close(found.x, (-precision * off * slope)[:, None])
    torch.testing.assert_close(Loss(GAUSSIAN, "npe").values(theta, x), values)
    assert not found.values.requires_grad
    assert not Loss(GAUSSIAN, "npe").values(theta, x).requires_grad


def test_a_likelihood_has_theta_as_its_condition():
    density = AffineGaussian([[1.0, 2.0], [0.0, -1.0], [0.5, 0.5]], [0.0, 1.0, 2.0], [0.1, 0.2, 0.3])
    theta, x = rows(dim=2, shape=(3, 1))
    found = Loss(density, "nle").evaluate(theta, x)
    torch.testing.assert_close(found.values[:, 0], -density.log_prob(x.flatten(1), theta).detach())
    assert (found.theta.shape, found.x.shape) == ((7, 1, 2), (7, 1, 3))
    torch.testing.assert_close(found.theta[:, 0], -found.x[:, 0] @ density.slope.detach())


def test_slopes_match_finite_differences():
    density = random_network(2, 3, kind="maf", seed=1)
    loss, step = Loss(density, "npe"), 1e-6
    theta, x = rows(dim=2)
    found = loss.evaluate(theta, x)
    for index in range(2):
        by = step * torch.eye(2, dtype=torch.float64)[index]
        slope = (loss.values(theta + by, x) - loss.values(theta - by, x)) / (2 * step)
        torch.testing.assert_close(found.theta[..., index], slope, rtol=1e-4, atol=1e-6)
    for index in range(3):
        by = step * torch.eye(3, dtype=torch.float64)[index]
        slope = (loss.values(theta, x + by) - loss.values(theta, x - by)) / (2 * step)
        torch.testing.assert_close(found.x[..., index], slope, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("log_q", "slopes"), [
    (lambda theta, x: torch.zeros(len(theta)), (0.0, 0.0)),
    (lambda theta, x: theta[:, 0], (-1.0, 0.0)),
    (lambda theta, x: 2 * x[:, 0], (0.0, -2.0)),
])  # fmt: skip
def test_functions_that_ignore_an_argument_have_no_slope_in_it(log_q, slopes):
    theta, x = rows(shape=(1,))
    found = Loss(log_q, "npe").evaluate(theta, x)
    assert set(found.theta.flatten().tolist()) == {slopes[0]}
    assert set(found.x.flatten().tolist()) == {slopes[1]}


def test_known_constants_are_those_of_the_density_and_others_have_none():
    for density in (GAUSSIAN, SharedMixture([[1.0]], [[-1.0], [1.0]], [0.0], [[0.0], [0.3]], [[1.0]], [0.0])):
        loss = Loss(density, "npe")
        assert (float(loss.growth), float(loss.lipschitz)) == (density.constants.growth, density.constants.lipschitz)
    other = Loss(random_network(1, 1, seed=0), "npe")
    assert other.growth is None
    assert other.lipschitz is None
    assert Loss(GAUSSIAN, "npe").names == ("loss",)


@pytest.mark.parametrize(("density", "error", "message"), [
    (3.0, TypeError, "density with log_prob.*got float"),
    ("nsf", TypeError, "got str"),
    (None, TypeError, "got NoneType"),
    (NPE(BoxPrior([0.0], [1.0])), ValueError, "call .fit"),
])  # fmt: skip
def test_what_is_no_density_is_refused(density, error, message):
    with pytest.raises(error, match=message):
        Loss(density, "npe")


@pytest.mark.parametrize("log_q", [lambda theta, x: theta, lambda theta, x: theta.sum(), lambda theta, x: theta[:3, 0]])
def test_log_densities_of_the_wrong_shape_are_refused(log_q):
    theta, x = rows()
    for ask in (Loss(log_q, "npe").values, Loss(log_q, "npe").evaluate):
        with pytest.raises(ValueError, match=r"log densities of shape \(7,\)"):
            ask(theta, x)


def test_a_density_of_other_sizes_is_refused_by_name():
    theta, x = rows(shape=(2,))
    with pytest.raises(ValueError, match=r"cannot read theta of shape \(7, 1\) and x of shape \(7, 2\)"):
        Loss(GAUSSIAN, "npe").evaluate(theta, x)


@pytest.mark.parametrize("transform", ["none", "asinh"])
@pytest.mark.parametrize("density", [NSF(transforms=1, hidden=8), MDN(components=2, hidden=8)])
def test_a_fitted_posterior_is_its_first_network_in_float64(density, transform):
    prior = BoxPrior([0.0], [1.0])
    npe, theta, x = fitted(NPE, prior, density=density, x_transform=transform)
    network = npe.networks[0]
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    z = Unbounded(prior).to(theta.double())
    loss = Loss(npe, "npe").values(z, x.double())[:, 0]
    assert loss.dtype == torch.float64
    # The posterior's own density is of theta in the box: the Jacobian of the logit lies between the two.
    own = torch.stack([npe.posterior(x[i]).log_prob(theta[i:i + 1])[0] for i in range(20)])
    inside = -loss - Unbounded(prior).log_abs_det(z, theta.double())
    torch.testing.assert_close(inside[:20].float(), own.detach().float(), rtol=1e-4, atol=1e-4)
    after = network.state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
        assert after[name].dtype == tensor.dtype, name
    step = 1e-7
    slope = (Loss(npe, "npe").values(z + step, x.double())[:, 0] - loss) / step  # single precision would give noise
    torch.testing.assert_close(slope, Loss(npe, "npe").evaluate(z, x.double()).theta[:, 0, 0], rtol=1e-3, atol=1e-4)


def test_a_fitted_likelihood_reads_theta_in_its_box():
    nle, theta, x = fitted(NLE, BoxPrior([0.0], [1.0]), density=MDN(components=2, hidden=8))
    loss = Loss(nle, "nle").values(theta.double(), x.double())[:, 0]
    torch.testing.assert_close(-loss.float(), nle.likelihood.log_prob(x, theta).float(), rtol=1e-4, atol=1e-4)


class Dropped(nn.Module):
    """A density with dropout, which must be off."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1))

    def log_prob(self, input, condition):
        return -(input - self.body(condition)).square().sum(1)


def test_dropout_is_off_and_the_module_is_not_changed():
    module = Dropped()
    theta, x = rows()
    loss = Loss(module, "npe")
    assert torch.equal(loss.values(theta, x), loss.values(theta, x))
    assert module.training
    assert next(module.parameters()).dtype == torch.float32
    assert as_density(module) is not module
    gradient = Gradient(module, "npe")
    assert torch.equal(gradient.values(theta, x), gradient.values(theta, x))


def by_rows(density, theta, x, *, nle=False):
    """Gradients in all parameters, one row at a time, `(n, parameters)`."""
    found = []
    for one, output in zip(theta, x, strict=True):
        pair = (output.flatten()[None], one[None]) if nle else (one[None], output[None])
        slopes = torch.autograd.grad(-density.log_prob(*pair).sum(), list(density.parameters()))
        found.append(torch.cat([slope.flatten() for slope in slopes]))
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["maf", "mdn", "nsf"])
def test_gradients_in_parameters_are_those_of_single_rows(kind):
    density = random_network(1, 3, kind=kind, seed=2)
    theta, x = rows()
    expected = by_rows(density, theta, x)
    every = Gradient(density, "npe", most=10**6)
    assert expected.shape[1] == len(every.names)
    torch.testing.assert_close(every.values(theta, x), expected, rtol=1e-9, atol=1e-11)
    some = Gradient(density, "npe", most=20, seed=3)
    places = [every.names.index(name) for name in some.names]
    assert len(places) == len(set(places)) == 20
    torch.testing.assert_close(some.values(theta, x), expected[:, places], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(some.evaluate(theta, x).values, expected[:, places], rtol=1e-9, atol=1e-11)


def test_gradients_of_a_likelihood_have_the_arguments_the_other_way_round():
    density = AffineGaussian([[1.0], [2.0], [-1.0]], [0.0, 1.0, 2.0], [0.1, 0.2, 0.3])
    theta, x = rows(shape=(3, 1))
    found = Gradient(density, "nle").evaluate(theta, x)
    torch.testing.assert_close(found.values, by_rows(density, theta, x, nle=True), rtol=1e-10, atol=1e-12)
    assert (found.theta.shape, found.x.shape) == ((7, 9, 1), (7, 9, 3))


def test_slopes_of_gradients_are_those_by_hand():
    density = AffineGaussian([[2.0]], [0.3], [0.2])
    theta, x = rows(shape=(1,))
    gradient = Gradient(density, "npe")
    assert gradient.names == ("slope[0]", "shift[0]", "log_precision[0]")
    found, precision = gradient.evaluate(theta, x), math.exp(0.4)
    off, one = theta - 2 * x - 0.3, torch.ones_like(x)
    values = torch.cat([-precision * off * x, -precision * off, precision * off.square() - 1], 1)
    torch.testing.assert_close(found.values, values)
    torch.testing.assert_close(found.theta[..., 0], precision * torch.cat([-x, -one, 2 * off], 1))
    torch.testing.assert_close(found.x[..., 0], precision * torch.cat([2 * x - off, 2 * one, -4 * off], 1))


@pytest.mark.parametrize("shape", [(2, 2), (4, 1)])
def test_slopes_of_gradients_follow_the_flattened_output(shape):
    density = SharedMixture([[1.0, 2.0, -1.0, 0.3]], [[-1.0], [1.0]], [0.0], [[0.2], [0.3]],
                            [[1.0, 0.1, -2.0, 0.4]], [0.1])
    theta, x = rows(n=3, shape=shape)
    gradient, step = Gradient(density, "npe"), 1e-6
    found = gradient.evaluate(theta, x)
    assert found.x.shape == (3, len(gradient.names), 4)
    for index in range(4):
        by = (step * torch.eye(4, dtype=torch.float64)[index]).reshape(shape)
        slope = (gradient.values(theta, x + by) - gradient.values(theta, x - by)) / (2 * step)
        torch.testing.assert_close(found.x[..., index], slope, rtol=1e-4, atol=1e-6)


def test_known_constants_of_gradients_are_in_the_order_of_their_names():
    density = AffineGaussian([[2.0, -1.0], [0.5, 3.0]], [0.3, -4.0], [0.2, -0.7])
    known = density.gradient_constants
    every = Gradient(density, "npe", most=100)
    assert len(every.names) == 8
    for name, growth, lipschitz in zip(every.names, every.growth.tolist(), every.lipschitz.tolist(), strict=True):
        parameter, place = name.removesuffix("]").split("[")
        assert growth == pytest.approx(float(known[parameter].growth.flatten()[int(place)]))
        assert lipschitz == pytest.approx(float(known[parameter].lipschitz.flatten()[int(place)]))
    some = Gradient(density, "npe", most=3, seed=1)
    assert some.growth.tolist() == [float(every.growth[every.names.index(name)]) for name in some.names]
    assert Gradient(random_network(1, 1, seed=0), "npe").growth is None


def test_the_choice_of_parameters_depends_on_the_seed_alone():
    density = random_network(1, 1, seed=0)
    state = torch.get_rng_state()
    names = [Gradient(density, "npe", most=10, seed=seed).names for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert names[0] == names[1] != names[2]


def test_frozen_parameters_and_buffers_are_left_out():
    module = Dropped()
    module.register_buffer("offset", torch.ones(1))
    module.body[0].weight.requires_grad_(requires_grad=False)
    gradient = Gradient(module, "npe")
    assert len(gradient.names) == 8 + 8 + 1
    assert not any("body.0.weight" in name or "offset" in name for name in gradient.names)


@pytest.mark.parametrize(("density", "message"), [
    (lambda theta, x: theta[:, 0], "with parameters .an nn.Module.; got function"),
    (AffineGaussian([[1.0]], [0.0], [0.0]).requires_grad_(requires_grad=False),
     "parameters to train; AffineGaussian has none"),
])  # fmt: skip
def test_gradients_need_parameters(density, message):
    with pytest.raises(ValueError, match=message):
        Gradient(density, "npe")


def test_estimators_of_normal_parameters_work_too():
    npe, theta, x = fitted(NPE, normal_prior_of(2), dim=2, density=MDN(components=2, hidden=8))
    gradient = Gradient(npe, "npe", most=30)
    found = gradient.evaluate(theta.double(), x.double())
    assert found.values.shape == (64, 30)
    assert bool(found.values.isfinite().all())
