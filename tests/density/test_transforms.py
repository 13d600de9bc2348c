import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nflows.nn.nets import ResidualNet
from nflows.transforms import MaskedAffineAutoregressiveTransform, ReversePermutation
from nflows.transforms.coupling import PiecewiseRationalQuadraticCouplingTransform
from nflows.transforms.lu import LULinear
from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline
from torch import nn
from torch.nn import functional

from mlsbi.density.autoregressive import AffineAutoregressive
from mlsbi.density.columns import ColumnResidualNet, Dropout, dropouts, relu
from mlsbi.density.flows import MAF, NSF
from mlsbi.density.linear import Reversal, SolvedLULinear
from mlsbi.density.mixture_density import MDN
from mlsbi.density.splines import UNIT_SLOPE, RationalQuadraticSpline, SplineCoupling
from mlsbi.randomness import seeded

ROWS = 12
# float64: the same algebra in another order. float32 against plain nflows in float64: rounding, which a narrow bin
# magnifies by its share of the interval and a network by its weights.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-3}
dtypes = st.sampled_from(sorted(TOLERANCE, key=str))
seeds = st.integers(0, 10**6)


def assert_same(ours, theirs, inputs, context, dtype):
    """Equal values, log-determinants, inverses and gradients, ours in `dtype` and theirs in float64."""
    with torch.no_grad(), seeded(1):
        for parameter in theirs.parameters():
            parameter.copy_((parameter + 0.2 * torch.randn_like(parameter)).float())  # the same in either precision
    ours.double().load_state_dict(theirs.state_dict())
    with seeded(2):
        weight = torch.randn(inputs.shape, dtype=torch.float64)
    found = []
    for transform, kind in ((ours, dtype), (theirs, torch.float64)):
        transform.to(kind)
        x, c = (rows.to(kind, copy=True).requires_grad_() for rows in (inputs, context))
        y, log_det = transform(x, c)
        back, log_det_back = transform.inverse(y.detach().to(kind), c)
        score = (y * weight.to(kind)).sum() + log_det.sum()
        wanted = [x, c, *(parameter for parameter in transform.parameters() if parameter.numel())]
        gradients = torch.autograd.grad(score, wanted, allow_unused=True, materialize_grads=True)
        found.append([y, log_det, back, log_det_back, *gradients])
    for one, other in zip(*found, strict=True):
        assert one.dtype == dtype
        assert one.shape == other.shape
        size = 1 + other.abs().max().item() if other.numel() else 1.0
        assert torch.allclose(one.double(), other, rtol=0, atol=TOLERANCE[dtype] * size)


@st.composite
def masks(draw):
    """Which features a coupling moves: every second one, or any."""
    dim = draw(st.integers(1, 6))
    if draw(st.booleans()):
        return [int(index % 2 == draw(st.integers(0, dim > 1))) for index in range(dim)] if dim > 1 else [1]
    mask = draw(st.lists(st.integers(0, 1), min_size=dim, max_size=dim))
    return mask if any(mask) else [1] * dim


@settings(deadline=None, max_examples=40)
@given(masks(), st.integers(1, 4), st.integers(2, 12), st.floats(0.5, 8.0), st.integers(1, 3), st.integers(1, 20),
       dtypes, seeds)
def test_coupling_equals_nflows(mask, condition_dim, bins, tail_bound, blocks, hidden, dtype, seed):
    if not any(mask):
        mask = [1, *mask[1:]]
    tail_bound = float(torch.tensor(tail_bound))  # an edge in float32 too

    def plain(inputs, outputs):
        return ResidualNet(inputs, outputs, hidden, context_features=condition_dim, num_blocks=blocks)

    def ours(inputs, outputs):
        return ColumnResidualNet(inputs, outputs, condition_dim=condition_dim, hidden=hidden, blocks=blocks, dropout=0)

    options = {"num_bins": bins, "tails": "linear", "tail_bound": tail_bound}
    with seeded(seed):
        theirs = PiecewiseRationalQuadraticCouplingTransform(torch.tensor(mask), plain, **options).double()
        mine = SplineCoupling(torch.tensor(mask), ours, **options)
        x, c = tail_bound * torch.randn(ROWS, len(mask)), torch.randn(ROWS, condition_dim)
    x[0], x[1], x[2], x[3] = tail_bound, -tail_bound, 50 * tail_bound, -50 * tail_bound
    assert_same(mine, theirs, x, c, dtype)


@pytest.mark.filterwarnings("ignore:torch.triangular_solve is deprecated:UserWarning")  # in the inverse of nflows
@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), dtypes, seeds)
def test_linear_map_equals_nflows(dim, dtype, seed):
    with seeded(seed):
        x, c = torch.randn(ROWS, dim), torch.randn(ROWS, 2)
    assert_same(SolvedLULinear(dim), LULinear(dim).double(), x, c, dtype)
    assert_same(Reversal(dim), ReversePermutation(dim).double(), x, c, dtype)


class Conditioned(nn.Module):
    """The masked network of nflows and one that shows the condition to its first feature."""

    def __init__(self, made, condition_dim, hidden):
        super().__init__()
        self.made = made
        self.first = nn.Sequential(nn.Linear(condition_dim, hidden), nn.ReLU(), nn.Linear(hidden, 2))

    def forward(self, inputs, context):
        return self.made(inputs, context) + functional.pad(self.first(context), (0, 2 * inputs.shape[1] - 2))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(1, 20), dtypes, seeds)
def test_autoregressive_map_equals_nflows(dim, condition_dim, blocks, hidden, dtype, seed):
    with seeded(seed):
        theirs = MaskedAffineAutoregressiveTransform(dim, max(hidden, dim), context_features=condition_dim,
                                                     num_blocks=blocks)
        theirs.autoregressive_net = Conditioned(theirs.autoregressive_net, condition_dim, hidden)
        mine = AffineAutoregressive(dim, condition_dim=condition_dim, hidden=hidden, blocks=blocks, dropout=0.0)
        x, c = torch.randn(ROWS, dim), torch.randn(ROWS, condition_dim)
    assert_same(mine, theirs.double(), x, c, dtype)


def test_the_comparison_can_fail():
    x, c = torch.randn(ROWS, 2), torch.randn(ROWS, 1)
    layer = SolvedLULinear(2)
    layer.register_load_state_dict_post_hook(lambda module, _: nn.init.constant_(module.bias, 0.01))
    with pytest.raises(AssertionError):
        assert_same(layer, LULinear(2).double(), x, c, torch.float32)


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 12), st.floats(0.5, 8.0), st.booleans(), seeds)
def test_spline_equals_nflows(bins, tail_bound, inverse, seed):
    g = torch.Generator().manual_seed(seed)
    x = 1.5 * tail_bound * torch.randn(2, 40, generator=g, dtype=torch.float64)
    x[0, 0], x[1, 0] = tail_bound, -tail_bound  # the edges belong to the spline
    sizes = 2 * torch.randn(bins, 2, 2, 40, generator=g, dtype=torch.float64)
    slopes = 2 * torch.randn(bins - 1, 2, 40, generator=g, dtype=torch.float64)
    padded = functional.pad(slopes, (0, 0, 0, 0, 1, 1), value=UNIT_SLOPE)
    ours = RationalQuadraticSpline(bins, tail_bound).double()(x, sizes, padded, inverse=inverse)
    widths, heights = sizes.permute(1, 2, 3, 0)
    theirs = unconstrained_rational_quadratic_spline(x, widths, heights, slopes.permute(1, 2, 0), inverse=inverse,
                                                     tail_bound=tail_bound)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-10, rtol=1e-10)  # float64 algebra in another order


@pytest.mark.parametrize(("builder", "farthest"), [
    (NSF(transforms=3, hidden=16), 1e30), (MDN(hidden=16), 1e30), (MAF(transforms=3, hidden=16), 1e10),
], ids=lambda builder: type(builder).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_points_have_a_density_of_zero_and_not_nan(builder, farthest, dtype):
    """In nflows as well; a masked flow multiplies what is far by what is far, and overflows sooner."""
    with seeded(0):
        density = builder(3, 2).to(dtype)
    far = torch.logspace(3, math.log10(farthest), 20, dtype=dtype)[:, None]
    for signs in ([1, 1, 1], [-1, 1, 0], [0, 0, -1]):
        value = density.log_prob(far * torch.tensor(signs, dtype=dtype), torch.zeros(20, 2, dtype=dtype))
        assert not value.isnan().any()
        assert (value < -1e4).all()
    assert not density.log_prob(torch.zeros(20, 3, dtype=dtype), far.expand(20, 2)).isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_features_are_left_as_they_are(dtype):
    with seeded(0):
        layer = SplineCoupling(
            torch.tensor([1, 0]), lambda n, k: ColumnResidualNet(n, k, condition_dim=1, hidden=4, blocks=1, dropout=0),
            num_bins=3, tails="linear", tail_bound=2.0,
        ).to(dtype)
    far = torch.tensor([2.001, -7.0, 1e30, -1e30, float("inf"), -float("inf")], dtype=dtype, requires_grad=True)
    x = torch.stack([far, torch.zeros_like(far)], 1)
    for move in (layer, layer.inverse):
        y, log_det = move(x, torch.zeros(len(far), 1, dtype=dtype))
        assert torch.equal(y, x)
        assert torch.equal(log_det, torch.zeros_like(far))
        gradient, = torch.autograd.grad((y + log_det[:, None]).sum(), far)
        assert torch.equal(gradient, torch.ones_like(far))


def test_relu_is_the_same_in_either_form(monkeypatch):
    values = torch.tensor([-float("inf"), -2.0, -0.0, 0.0, 1e-30, 2.0, float("inf")])
    found = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        x = values.clone().requires_grad_()
        y = relu(x)
        found.append((y.detach(), *torch.autograd.grad(y, x, torch.arange(1.0, 8.0))))
        assert relu(torch.tensor(float("nan"))).isnan()
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].tolist() == [0, 0, 0, 0, 5, 6, 7]


class TestDropout:
    def test_is_the_identity_in_evaluation_and_without_probability(self):
        x = torch.ones(3, 4)
        assert Dropout(3, 0.5).eval()(x) is x
        assert Dropout(3, 0.0)(x) is x

    def test_draws_from_the_global_state_as_torch_does(self):
        x = torch.ones(300, 40)
        with seeded(0):
            drawn = Dropout(300, 0.25)(x)
        with seeded(0):
            assert torch.equal(drawn, nn.Dropout(0.25)(x))
        assert drawn.unique().tolist() == [0.0, pytest.approx(4 / 3)]
        assert drawn.mean().item() == pytest.approx(1.0, abs=4 * (1 / 3 / 12_000) ** 0.5)  # four standard errors

    def test_takes_a_mask_from_outside(self):
        layer, keep = Dropout(2, 0.5), torch.tensor([[0.0, 2.0, 2.0], [2.0, 0.0, 2.0]])
        x = torch.arange(6.0).view(2, 3)
        assert torch.equal(torch.func.functional_call(layer, {"keep": keep}, x), x * keep)
        assert torch.equal(torch.func.functional_call(layer.eval(), {"keep": keep}, x), x)
        assert not layer.state_dict()

    def test_those_of_a_network_are_named_by_their_buffer(self):
        density = NSF(transforms=2, hidden=5, blocks=2, dropout=0.1)(2, 3)
        found = dropouts(density)
        assert len(found) == 4
        assert set(found) < {name for name, _ in density.named_buffers()}
        assert all(part.features == 5 and part.p == 0.1 for part in found.values())
        assert len(dropouts(MAF(transforms=3, hidden=5, blocks=1, dropout=0.1)(7, 3))) == 3
        assert {part.features for part in dropouts(MAF(hidden=5, dropout=0.1)(7, 3)).values()} == {7}
        assert not dropouts(NSF()(2, 3))
        assert not dropouts(MDN()(2, 3))
        assert list(dropouts(Dropout(2, 0.5))) == ["keep"]
