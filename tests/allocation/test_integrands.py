import copy
import functools

import numpy as np
import pytest
import torch
from stacks import SMALL, make_network, make_reader, simulations
from torch import nn

from mlsbi.allocation import integrands
from mlsbi.allocation.integrands import Function, Gradient, Loss, Output, resolve_integrand
from mlsbi.allocation.moments import compact, corrections_of, measure
from mlsbi.density.flows import MAF, NSF
from mlsbi.density.mixture_density import MDN

FLOW, MASKED, MIXTURE = NSF(transforms=2, hidden=6, bins=3), MAF(transforms=2, hidden=6), MDN(2, 6, 1)


def row_gradients(network, rows):
    """By autograd, a row at a time, `(levels, n, parameters)`."""
    exact = copy.deepcopy(network).double().eval()
    trained = [parameter for parameter in exact.parameters() if parameter.requires_grad]
    levels = []
    for term in rows.terms:
        found = []
        for row in range(len(rows)):
            loss = -exact.standard_log_prob(term.input[[row]], term.fine[[row]])[0]
            parts = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
            found.append(torch.cat([part.flatten() for part in parts]))
        levels.append(torch.stack(found))
    return torch.stack(levels).numpy()


def joined(integrand, network, rows):
    return np.concatenate(list(integrand.blocks(network, rows)), axis=2)


def case(builder=FLOW, estimator="npe", embedding=None, *, n=7, levels=2, **more):
    theta, outputs = simulations(n, levels, **more)
    reader = make_reader(theta, outputs, estimator, embedding)
    return make_network(reader, builder, embedding), reader.rows(theta, outputs)


class Normed(nn.Module):
    """A user's embedding with batch statistics and a layer that is not trained."""

    def __init__(self):
        super().__init__()
        self.frozen, self.norm, self.last = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.frozen.requires_grad_(requires_grad=False)

    def forward(self, x):
        return self.last(self.norm(self.frozen(x)).tanh())


@pytest.mark.parametrize(
    ("builder", "estimator", "embedding"),
    [
        (FLOW, "npe", None), (MASKED, "npe", None), (MIXTURE, "npe", None), (FLOW, "npe", "mlp"),
        (MIXTURE, "npe", "set"), (FLOW, "npe", Normed()), (FLOW, "nle", None), (MASKED, "nle", None),
        (MIXTURE, "nle", "mlp"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)  # fmt: skip
def test_gradients_are_those_of_autograd_row_by_row(builder, estimator, embedding):
    network, rows = case(builder, estimator, embedding)
    found, expected = joined(Gradient(), network, rows), row_gradients(network, rows)
    assert found.dtype == np.float64
    assert found.shape == expected.shape
    assert np.abs(expected).max() > 0.1
    assert np.allclose(found, expected, rtol=1e-10, atol=1e-12)


def test_frozen_parameters_have_no_gradient():
    network, rows = case(embedding=Normed())
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    assert joined(Gradient(), network, rows).shape[2] == trained
    assert trained == sum(parameter.numel() for parameter in network.parameters()) - 25


def test_groups_of_parameters_and_chunks_of_rows_change_nothing(monkeypatch):
    network, rows = case()
    whole = list(Gradient().blocks(network, rows))
    assert len(whole) == 1
    monkeypatch.setattr(integrands, "_BLOCK_BYTES", 100 * 2 * 7 * 8)
    monkeypatch.setattr(integrands, "_CHUNK_ROWS", 3)
    parts = list(Gradient().blocks(network, rows))
    assert len(parts) > 3
    assert all(part.shape[:2] == (2, 7) for part in parts)
    assert np.allclose(np.concatenate(parts, 2), whole[0], rtol=1e-10, atol=1e-12)


def test_groups_hold_what_fits_and_every_parameter_once(monkeypatch):
    monkeypatch.setattr(integrands, "_BLOCK_BYTES", 8 * 10 * 5)
    groups = list(integrands._groups([("a", 2), ("b", 3), ("c", 1), ("d", 50), ("e", 5)], 10))
    assert groups == [["a", "b"], ["c"], ["d"], ["e"]]  # what is larger than that by itself goes alone


@pytest.mark.parametrize("estimator", ["npe", "nle"])
def test_the_variance_of_a_gradient_is_the_trace_of_its_covariance(estimator):
    network, rows = case(MIXTURE, estimator, n=40)
    gradients = row_gradients(network, rows)
    moments = measure([compact(Gradient().blocks(network, rows))], seed=0)
    cheap, fine = gradients
    for at, values in enumerate((cheap, fine - cheap)):
        assert moments.variances[at] == pytest.approx(np.trace(np.cov(values.T)), rel=1e-10)
        squares = ((values - values.mean(0)) ** 2).sum(1)
        assert moments.kurtosis[at] == pytest.approx((squares**2).mean() / squares.mean() ** 2, rel=1e-9)
        assert moments.means[at] == pytest.approx(np.linalg.norm(values.mean(0)), rel=1e-9)
    joint = np.cov(np.concatenate([cheap, fine], 1).T)
    k = cheap.shape[1]
    assert moments.covariance[0, 1] == pytest.approx(np.trace(joint[:k, k:]), rel=1e-9)
    assert moments.covariance[1, 1] == pytest.approx(np.trace(np.cov(fine.T)), rel=1e-9)


def test_a_network_that_looks_at_its_rows_is_refused():
    class Looks(nn.Flatten):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else 2 * x)

    network, rows = case(embedding=Looks())
    with pytest.raises(ValueError, match=r'differentiated row by row.*Use integrand="loss"'):
        joined(Gradient(), network, rows)
    assert np.isfinite(joined(Loss(), network, rows)).all()


def test_a_lack_of_memory_is_not_taken_for_that(monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    network, rows = case()
    monkeypatch.setattr(integrands, "vmap", lambda *_, **__: full)
    with pytest.raises(torch.OutOfMemoryError):
        joined(Gradient(), network, rows)


@pytest.mark.parametrize("integrand", [Loss(), Gradient()], ids=lambda each: each.name)
def test_scoring_leaves_a_network_as_it_was(integrand):
    network, rows = case(NSF(transforms=2, hidden=6, bins=3, dropout=0.5), embedding=Normed())
    network.train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    first, again = joined(integrand, network, rows), joined(integrand, network, rows)
    assert np.array_equal(first, again)  # without dropout
    assert network.training
    assert all(parameter.grad is None for parameter in network.parameters())
    for name, value in network.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("estimator", ["npe", "nle"])
def test_the_loss_is_taken_in_float64(estimator):
    network, rows = case(MIXTURE, estimator)
    exact = copy.deepcopy(network).double().eval()
    found = joined(Loss(), network, rows)
    assert found.shape == (2, 7, 1)
    for level, term in enumerate(rows.terms):
        expected = -exact.standard_log_prob(term.input, term.fine).detach().numpy()
        assert np.array_equal(found[level, :, 0], expected)


@pytest.mark.parametrize("estimator", ["npe", "nle"])
def test_levels_that_hardly_differ_keep_their_digits(estimator):
    """A loss's difference over a step of 1e-8 is its slope times the step; in float32 nothing of it is left."""
    theta, (x,) = simulations(16, 1)
    x = x.double()
    reader = make_reader(theta, [x], estimator)
    network = make_network(reader, MIXTURE)
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def corrections(step, integrand):
        return corrections_of(joined(integrand, network, reader.rows(theta, [x, x + step * way])))[1]

    slope = corrections(1e-4, Loss()) / 1e-4
    assert np.allclose(corrections(1e-8, Loss()) / 1e-8, slope, rtol=1e-2, atol=1e-3 * np.abs(slope).max())

    class Single(Loss):
        def blocks(self, network, rows):
            losses = [-network.standard_log_prob(term.input.float(), term.fine.float()) for term in rows.terms]
            yield torch.stack(losses).detach().double().numpy()[..., None]

    assert not np.allclose(corrections(1e-8, Single()) / 1e-8, slope, rtol=0.5, atol=0.5 * np.abs(slope).max())


@pytest.mark.parametrize("transform", ["none", "asinh"])
def test_outputs_are_standardised_alike_for_both_estimators(transform):
    theta, outputs = simulations(30)
    found = []
    for estimator in ("npe", "nle"):
        reader = make_reader(theta, outputs, estimator, x_transform=transform)
        found.append(joined(Output(), None, reader.rows(theta, outputs)))
    assert np.array_equal(*found)
    assert found[0].shape == (2, 30, 4)
    assert np.allclose(found[0].reshape(60, 4).mean(0), 0, atol=1e-12)
    assert np.allclose(found[0].reshape(60, 4).std(0), 1, rtol=1e-12)
    scale = np.concatenate([x.numpy() for x in outputs]).std(0)
    plain = (outputs[1] - outputs[0]).numpy() / scale
    assert np.allclose(found[0][1] - found[0][0], plain, atol=1e-5) == (transform == "none")


def values_of(function, n=6):
    theta, outputs = simulations(n)
    return joined(resolve_integrand(function), None, make_reader(theta, outputs).rows(theta, outputs)), theta, outputs


@pytest.mark.parametrize(
    "function",
    [
        lambda theta, x: x.sum(1) + theta[:, 0], lambda theta, x: (x.sum(1) + theta[:, 0]).numpy(),
        lambda theta, x: (x.sum(1) + theta[:, 0]).tolist(), lambda theta, x: (x.sum(1) + theta[:, 0])[:, None],
        lambda theta, x: (x.sum(1) + theta[:, 0]).requires_grad_(),
    ],
    ids=["tensor", "array", "list", "column", "leaf"],
)  # fmt: skip
def test_functions_read_theta_and_outputs_in_their_own_units(function):
    values, theta, outputs = values_of(function)
    assert values.shape == (2, 6, 1)
    assert values.dtype == np.float64
    for level, x in enumerate(outputs):
        assert np.allclose(values[level, :, 0], (x.sum(1) + theta[:, 0]).numpy(), rtol=1e-6)


def test_functions_may_give_several_numbers_or_truth_values():
    values, _, outputs = values_of(lambda theta, x: x[:, :3] > 0)
    assert np.array_equal(values[1], (outputs[1][:, :3] > 0).numpy())


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (lambda theta, x: x.sum(), r"shape \(6,\) or \(6, k\) for 6 rows; got \(\)"),
        (lambda theta, x: x[:5, 0], r"got \(5,\)"),
        (lambda theta, x: x[:, :, None], r"got \(6, 4, 1\)"),
        (lambda theta, x: x[:, :0], r"got \(6, 0\)"),
        (lambda theta, x: None, r"got \(\)"),
        (lambda theta, x: x / 0 * (x == x[0, 0]), "Expected finite numbers from the integrand; 24 of 24 are not"),
        (lambda theta, x: torch.where(x == x[0, 0], torch.inf, x), "1 of 24 are not"),
    ],
)
def test_functions_that_give_something_else_are_refused(function, match):
    with pytest.raises(ValueError, match=match):
        values_of(function)


def test_a_function_has_one_shape_at_all_levels():
    widths = iter((2, 3))
    with pytest.raises(ValueError, match="one shape at all levels"):
        values_of(lambda theta, x: x[:, :next(widths)])


def payoff(theta, x, *, strike=0.0):
    return (x[:, 0] - strike).clamp_min(0)


class Payoff:
    def __call__(self, theta, x):
        return payoff(theta, x)


@pytest.mark.parametrize(
    ("integrand", "name", "needs"),
    [
        ("loss", "loss", True), ("gradient", "gradient", True), ("output", "output", False),
        (payoff, "payoff", False), (functools.partial(payoff, strike=1.0), "partial", False),
        (Payoff(), "Payoff", False),
    ],
)  # fmt: skip
def test_integrands_have_names(integrand, name, needs):
    resolved = resolve_integrand(integrand)
    assert (resolved.name, resolved.needs_network) == (name, needs)
    assert isinstance(resolved, Function) == callable(integrand)


@pytest.mark.parametrize("integrand", ["entropy", None, 5, ("loss",)])
def test_what_is_no_integrand_is_refused(integrand):
    with pytest.raises(ValueError, match='Expected integrand "loss", "gradient", "output" or a function'):
        resolve_integrand(integrand)


@pytest.mark.parametrize("integrand", [Loss(), Gradient()], ids=lambda each: each.name)
def test_an_integrand_of_a_network_needs_one(integrand):
    _, rows = case(SMALL)
    with pytest.raises(ValueError, match="needs a network"):
        list(integrand.blocks(None, rows))


def test_rows_stay_aligned():
    _, rows = case()
    part = rows.rows(torch.tensor([4, 1]))
    assert len(part) == 2
    assert torch.equal(part.theta, rows.theta[[4, 1]])
    assert all(torch.equal(mine, whole[[4, 1]]) for mine, whole in zip(part.outputs, rows.outputs, strict=True))
    assert all(torch.equal(mine.fine, whole.fine[[4, 1]]) for mine, whole in zip(part.terms, rows.terms, strict=True))


def test_functions_are_worked_out_in_float64():
    """Differences of squares far from zero keep their digits, which float32 would lose."""
    theta, outputs = simulations(200, shift=1e-6)
    rows = make_reader(theta, outputs).rows(theta, outputs)

    def far(theta, x):
        assert theta.dtype == x.dtype == torch.float64
        return (x[:, 0] + 100) ** 2

    values, = Function(far).blocks(None, rows)
    exact = [((x[:, 0].double() + 100) ** 2).numpy() for x in outputs]
    rounded = [((x[:, 0] + 100) ** 2).double().numpy() for x in outputs]
    variance = (exact[1] - exact[0]).var()
    assert (values[1] - values[0]).var() == pytest.approx(variance, rel=1e-9)
    assert (rounded[1] - rounded[0]).var() > 1.01 * variance
