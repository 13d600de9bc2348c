r"""Small stacks, readers and networks that the tests of this folder measure."""

import torch

from mlsbi import BoxPrior, Level, LevelStack
from mlsbi.allocation.networks import Reader
from mlsbi.density.embeddings import resolve_embedding
from mlsbi.density.flows import NSF
from mlsbi.strategies.fitting import Problem
from mlsbi.training.options import TrainingOptions

PRIOR = BoxPrior([0.0, -1.0], [1.0, 1.0])
BRIEF = TrainingOptions(epochs=3)
SMALL = NSF(transforms=2, hidden=8, bins=3)


def noise(n, generator):
    return torch.randn(n, 4, generator=generator)


def exact(theta, noise):
    return torch.cat([theta, theta], 1) + 0.3 * noise


def off(amount):
    def simulate_off(theta, noise):
        return exact(theta, noise) + amount * torch.sin(5 * noise)

    return simulate_off


def stack(*functions, costs=(1.0, 20.0, 50.0), draw=noise):
    """A level per function, cheapest first; costs are measured when `None`."""
    if costs is None:
        costs = (None,) * len(functions)
    levels = [Level(f"level {i}", f, cost) for i, (f, cost) in enumerate(zip(functions, costs, strict=False))]
    return LevelStack(PRIOR, draw, levels)


def simulations(n=24, levels=2, seed=0, shift=0.3):
    """Theta and the outputs of each level, `(n, 4)`, float32."""
    generator = torch.Generator().manual_seed(seed)
    theta = torch.rand(n, 2, generator=generator) * torch.tensor([1.0, 2.0]) - torch.tensor([0.0, 1.0])
    u = noise(n, generator)
    return theta, [off(shift * (levels - 1 - level))(theta, u) for level in range(levels)]


def make_reader(theta, outputs, estimator="npe", embedding=None, x_transform="none"):
    return Reader.fit(PRIOR, estimator, [(theta, x) for x in outputs], x_transform=x_transform,
                      embedding=resolve_embedding(embedding))


def make_network(reader, builder=SMALL, embedding=None, seed=0, spread=0.2):
    """A fresh network, moved away from where it starts, where parts of it are zero."""
    network = Problem((), *reader.scalers).network(builder, resolve_embedding(embedding), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=generator)
    return network
