import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap

from mlsbi.density.columns import dropouts
from mlsbi.density.conditional import ConditionalDensity
from mlsbi.density.flows import MAF, NSF
from mlsbi.density.mixture_density import MDN
from mlsbi.density.standardise import Standardiser
from mlsbi.randomness import seeded

DIM, CONDITION, ROWS, NETWORKS = 3, 2, 5, 4
NSF_, MAF_, MDN_ = NSF(transforms=2, hidden=8, bins=4), MAF(transforms=2, hidden=8), MDN(components=3, hidden=8)
BUILDERS = [NSF_, MAF_, MDN_]
# float64 in another order of sums; compiled and batched matrix products may take another one.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def name(builder):
    return type(builder).__name__ + (" dropout" if getattr(builder, "dropout", 0) else "")


class LogProb(nn.Module):
    """A density whose `forward` is its log density, for `functional_call`."""

    def __init__(self, density):
        super().__init__()
        self.density = density

    def forward(self, x, condition):
        return self.density.log_prob(x, condition)


def stirred(builder, seed, dim=DIM):
    """A density in float64 whose parameters are far from their start, where many are zero."""
    with seeded(seed):
        density = LogProb(builder(dim, CONDITION).double())
        with torch.no_grad():
            for parameter in density.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
    return density


def rows(*shape, dim=DIM):
    g = torch.Generator().manual_seed(len(shape))
    return (torch.randn(*shape, dim, generator=g, dtype=torch.float64),
            torch.randn(*shape, CONDITION, generator=g, dtype=torch.float64))


@pytest.mark.parametrize("builder", BUILDERS, ids=name)
@pytest.mark.parametrize("own_rows", [True, False])
@pytest.mark.parametrize("own_conditions", [True, False])
def test_vmap_over_networks_equals_a_loop(builder, own_rows, own_conditions):
    networks = [stirred(builder, seed) for seed in range(NETWORKS)]
    parameters, buffers = stack_module_state(networks)
    x = rows(NETWORKS, ROWS)[0] if own_rows else rows(ROWS)[0]
    c = rows(NETWORKS, ROWS)[1] if own_conditions else rows(ROWS)[1]

    def one(parameters, x, c):
        return functional_call(networks[0], parameters, (x, c))

    together = vmap(one, (0, 0 if own_rows else None, 0 if own_conditions else None))(parameters, x, c)
    gradients = torch.autograd.grad(together.sum(), list(parameters.values()))
    for index, network in enumerate(networks):
        alone = network(x[index] if own_rows else x, c[index] if own_conditions else c)
        assert torch.allclose(together[index], alone, **CLOSE)
        expected = torch.autograd.grad(alone.sum(), list(network.parameters()))
        for ours, theirs in zip(gradients, expected, strict=True):
            assert torch.allclose(ours[index], theirs, **CLOSE)


@pytest.mark.parametrize("builder", [NSF(transforms=2, hidden=8, blocks=2, dropout=0.4),
                                     MAF(transforms=2, hidden=8, dropout=0.4)], ids=name)
def test_vmap_with_masks_of_dropout_equals_a_loop(builder):
    networks = [stirred(builder, seed) for seed in range(NETWORKS)]
    parameters, _ = stack_module_state(networks)
    (x, c), g = rows(NETWORKS, ROWS), torch.Generator().manual_seed(0)
    keep = {key: (torch.rand(NETWORKS, part.features, ROWS, generator=g) > part.p).double() / (1 - part.p)
            for key, part in dropouts(networks[0]).items()}

    def one(parameters, keep, x, c):
        return functional_call(networks[0], {**parameters, **keep}, (x, c))

    together = vmap(one)(parameters, keep, x, c)
    for index, network in enumerate(networks):
        own = {key: mask[index] for key, mask in keep.items()}
        assert torch.allclose(together[index], functional_call(network, own, (x[index], c[index])), **CLOSE)
        assert not torch.allclose(together[index], network.eval()(x[index], c[index]))


@pytest.mark.parametrize("builder", BUILDERS, ids=name)
def test_gradients_of_single_rows_equal_a_loop(builder):
    network, (x, c) = stirred(builder, 0), rows(ROWS)
    parameters = {key: parameter.detach() for key, parameter in network.named_parameters()}

    def loss(parameters, x, c):
        return functional_call(network, parameters, (x[None], c[None]))[0]

    together = vmap(grad(loss), (None, 0, 0))(parameters, x, c)
    for index in range(ROWS):
        alone = grad(loss)(parameters, x[index], c[index])
        for key, value in alone.items():
            assert torch.allclose(together[key][index], value, **CLOSE)


@pytest.mark.parametrize("builder", BUILDERS, ids=name)
def test_jacobians_equal_gradients(builder):
    network, (x, c) = stirred(builder, 0), rows(ROWS)
    x.requires_grad_()
    expected, = torch.autograd.grad(network(x, c).sum(), x)
    found = jacrev(lambda x: network(x, c))(x.detach())  # (ROWS, ROWS, DIM): a row sees itself only
    assert torch.allclose(found, torch.diag_embed(expected.T).permute(1, 2, 0), **CLOSE)


def compiled_equals_eager(builder, backend):
    networks = [stirred(builder, seed) for seed in range(2)]
    parameters, _ = stack_module_state(networks)
    x, c = rows(2, ROWS)

    def together(parameters, x, c):
        return vmap(lambda p, x, c: functional_call(networks[0], p, (x, c)))(parameters, x, c)

    torch._dynamo.reset()
    compiled = torch.compile(together, fullgraph=True, dynamic=False, backend=backend)
    values = [function(parameters, x, c) for function in (compiled, together)]
    assert torch.allclose(*values, **CLOSE)
    gradients = [torch.autograd.grad(value.sum(), list(parameters.values())) for value in values]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, **CLOSE)


@pytest.mark.parametrize("builder", [NSF_, pytest.param(MAF_, marks=pytest.mark.slow), MDN_], ids=name)
def test_compiled_as_one_graph_equals_eager(builder):
    compiled_equals_eager(builder, "aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns about its own parts
@pytest.mark.parametrize("builder", BUILDERS, ids=name)
def test_compiled_by_inductor_equals_eager(builder):
    compiled_equals_eager(builder, "inductor")


@pytest.mark.gpu
@pytest.mark.parametrize("builder", BUILDERS, ids=name)
def test_a_cuda_graph_replays_value_and_gradient(builder):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    networks = [stirred(builder, seed).cuda() for seed in range(NETWORKS)]
    parameters, _ = stack_module_state(networks)
    inputs = list(parameters.values())
    x, c = (part.cuda() for part in rows(NETWORKS, ROWS))

    def step():
        value = vmap(lambda p, x, c: functional_call(networks[0], p, (x, c)))(parameters, x, c)
        return value, torch.autograd.grad(value.sum(), inputs)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value, gradients = step()
    with torch.no_grad():
        x += 1
        inputs[0] += 0.1
    graph.replay()
    expected = step()
    assert torch.allclose(value, expected[0], **CLOSE)
    for ours, theirs in zip(gradients, expected[1], strict=True):
        assert torch.allclose(ours, theirs, **CLOSE)


@pytest.mark.parametrize("builder", BUILDERS, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("given", [torch.float32, torch.float64])
def test_one_precision_throughout(builder, dtype, given):
    """That of the scalers and the network, whatever comes in."""
    x, c = (part.to(given) for part in rows(40))
    for transform in ("none", "asinh"):
        scalers = [Standardiser.fit([part], transform=transform, dtype=dtype) for part in (x, c)]
        with seeded(0):
            density = ConditionalDensity(builder, *scalers).to(dtype)
        assert scalers[0](x).dtype == scalers[0].log_abs_det(x).dtype == dtype
        assert density.log_prob(x, c).dtype == dtype
        drawn = density.sample(2, c)
        assert drawn.dtype == dtype
        assert drawn.shape == (2, 40, DIM)


def test_more_precision_is_more_precise():
    """float64 throughout differs from float32 by the rounding of the latter, and float64 rows are not cut short."""
    x, c = rows(40)
    values = []
    for dtype in (torch.float32, torch.float64):
        scalers = [Standardiser.fit([part], dtype=dtype) for part in (x, c)]
        with seeded(0):
            values.append(ConditionalDensity(NSF_, *scalers).to(dtype).log_prob(x, c).double())
    assert 0 < (values[0] - values[1]).abs().max() < 1e-4
    nudged = Standardiser.fit([x], dtype=torch.float64)
    assert not torch.equal(nudged(x), nudged(x + 1e-12))


def test_an_embedding_of_either_precision_is_probed_in_its_own():
    x, c = rows(40)
    scalers = [Standardiser.fit([part], dtype=torch.float64) for part in (x, c)]
    density = ConditionalDensity(NSF_, *scalers, nn.Linear(CONDITION, 6).double()).double()
    assert density.log_prob(x, c).shape == (40,)


COUPLING = [
    "identity_features", "transform_features", "transform_net.initial_layer.weight", "transform_net.initial_layer.bias",
    "transform_net.blocks.0.context_layer.weight", "transform_net.blocks.0.context_layer.bias",
    "transform_net.blocks.0.linear_layers.0.weight", "transform_net.blocks.0.linear_layers.0.bias",
    "transform_net.blocks.0.linear_layers.1.weight", "transform_net.blocks.0.linear_layers.1.bias",
    "transform_net.final_layer.weight", "transform_net.final_layer.bias",
]
LINEAR = ["bias", "lower_entries", "upper_entries", "unconstrained_upper_diag"]
MASKED = ["weight", "bias", "mask", "degrees"]
AUTOREGRESSIVE = [
    *(f"autoregressive_net.made.initial_layer.{part}" for part in MASKED),
    "autoregressive_net.made.context_layer.weight", "autoregressive_net.made.context_layer.bias",
    "autoregressive_net.made.blocks.0.context_layer.weight", "autoregressive_net.made.blocks.0.context_layer.bias",
    *(f"autoregressive_net.made.blocks.0.linear_layers.0.{part}" for part in MASKED),
    *(f"autoregressive_net.made.blocks.0.linear_layers.1.{part}" for part in MASKED),
    *(f"autoregressive_net.made.final_layer.{part}" for part in MASKED),
    *(f"autoregressive_net.first.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")),
]


@pytest.mark.parametrize(("builder", "layers"), [
    (NSF(transforms=2, dropout=0.1), [COUPLING, LINEAR, COUPLING, LINEAR]),
    (MAF(transforms=2, dropout=0.1), [AUTOREGRESSIVE, ["_permutation"], AUTOREGRESSIVE]),
], ids=["NSF", "MAF"])
def test_flows_load_what_was_saved_before(builder, layers):
    expected = [f"flow._transform._transforms.{index}.{key}" for index, keys in enumerate(layers) for key in keys]
    assert list(builder(3, 2).state_dict()) == expected


def test_mixtures_load_what_was_saved_before():
    assert list(MDN()(3, 2).state_dict()) == ["body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias",
                                              "head.weight", "head.bias", "line.weight"]
