r"""Small rows, networks and members that the tests of this folder train."""

import math

import torch
from torch import nn

from mlsbi.density.columns import dropouts
from mlsbi.density.conditional import ConditionalDensity
from mlsbi.density.flows import NSF
from mlsbi.density.mixture_density import MDN
from mlsbi.density.standardise import Standardiser
from mlsbi.training.descent import Descent, Objective
from mlsbi.training.history import TrainingError
from mlsbi.training.loop import minimise
from mlsbi.training.members import Member
from mlsbi.training.objective import Term, split_terms, telescope
from mlsbi.training.options import TrainingOptions
from mlsbi.training.plan import Plan
from mlsbi.training.stack import Stack

QUICK = TrainingOptions(epochs=5, batch_size=None)
SMALL = NSF(transforms=2, hidden=8, bins=3)
DROPPING = NSF(transforms=2, hidden=8, bins=3, dropout=0.3)
MIXTURE = MDN(components=2, hidden=8, layers=1)


def make_terms(n=(200, 40), seed=0, dtype=torch.float32):
    """Two outputs about theta, the level below shifted, up to three levels."""
    g = torch.Generator().manual_seed(seed)
    terms = []
    for level, rows in enumerate(n):
        z = torch.randn(rows, 1, generator=g).to(dtype)
        u = 0.3 * torch.randn(rows, 2, generator=g).to(dtype)
        outputs = [z + 0.2 * (len(n) - 1 - at) + u for at in range(len(n))]
        terms.append(Term(z, outputs[level], outputs[level - 1]) if level else Term(z, outputs[0]))
    return terms


def make_network(builder=SMALL, seed=0, embedding=None, dtype=torch.float32, spread=0.0):
    """A network of one number given two; `spread` moves it away from where it starts, where parts of it are zero."""
    scalers = Standardiser(torch.zeros(1), torch.ones(1)), Standardiser(torch.zeros(2), torch.ones(2))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = ConditionalDensity(builder, *scalers, embedding).to(dtype)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += spread * torch.randn(parameter.shape, generator=g).to(dtype)
    return network


def make_members(count=1, builder=SMALL, *, n=(200, 40), terms=None, fraction=0.2, embedding=None, dtype=torch.float32,
                 seed=1):
    """Members with networks, splits and seeds of their own; `embedding` builds one from the member's number."""
    rows = terms or make_terms(n, dtype=dtype)
    members = []
    for member in range(count):
        kept, held = rows, []
        if fraction:
            kept, held = split_terms(rows, fraction, torch.Generator().manual_seed(0), member=member, members=count)
        network = make_network(builder, member, None if embedding is None else embedding(member), dtype)
        members.append(Member(network, kept, held, seed + 10 * member))
    return members


def fit(objective=None, options=QUICK, *, network=None, terms=None, seed=1, **more):
    """Trains one network; gives it, its history and the rows held out."""
    network = network or make_network()
    kept, held = split_terms(terms or make_terms(), 0.2, torch.Generator().manual_seed(0))
    history, = train([Member(network, kept, held, seed)], objective, options, **more)
    return network, history, held


def train(members, objective=None, options=QUICK, *, show=False, **more):
    return minimise(members, objective=objective or Objective(), options=options, progress=show, **more)


def make_descent(networks, terms, objective=None, options=QUICK, *, together=True, draws=False):
    """What takes the steps, and the plan that says which rows they see; every member has the same rows."""
    layers = {name: (layer.features, layer.p) for name, layer in dropouts(networks[0]).items()}
    plan = Plan([terms] * len(networks), batch_size=options.batch_size, dropouts=layers,
                seeds=[10 * member for member in range(len(networks))])
    stack = Stack(networks)
    stack.train()
    descent = Descent(stack, objective or Objective(), options, n=plan.n, together=together and not draws, draws=draws)
    return descent, plan


def loss_of(network, terms):
    """The telescoped loss of rows, by the plainest path."""
    losses = []
    with torch.no_grad():
        for term in terms:
            losses.append(-network.standard_log_prob(term.input, term.fine))
            if term.coarse is not None:
                losses.append(-network.standard_log_prob(term.input, term.coarse))
    return float(telescope(losses, [1.0] * len(terms)))


def values_of(network):
    """All that a network holds, trained or not, in one vector."""
    return torch.cat([value.flatten().double() for value in network.state_dict().values()])


def table_of(history, epochs=None):
    """What a history recorded, `(epochs, numbers)`."""
    names = sorted(history.epochs[0])
    return torch.tensor([[record[name] for name in names] for record in history.epochs[:epochs]], dtype=torch.float64)


def agree(one, other, tolerance, epochs=None):
    """Whether two histories recorded the same."""
    tables = table_of(one, epochs), table_of(other, epochs)
    return tables[0].shape == tables[1].shape and torch.allclose(*tables, rtol=tolerance, atol=tolerance,
                                                                 equal_nan=True)


class Interrupted(Exception):
    """Stands for whatever ends a process."""


def spoil(monkeypatch, *, after, network=None):
    """Makes the gradient NaN once so many steps are done; of one network only, where one is given."""
    gradient = Descent.gradient

    def spoiled(self, rows, weights, seeds=()):
        losses, slope, recorded = gradient(self, rows, weights, seeds)
        if self.done > after:
            here = torch.tensor([network is None or own is network for own in self.stack.networks])
            slope = slope.masked_fill(here[:, None], math.nan)
        return losses, slope, recorded

    monkeypatch.setattr(Descent, "gradient", spoiled)


class ForeignDropout(nn.Module):
    """Drops by torch's global random state, as any network of a user's may."""

    def forward(self, x):
        return nn.functional.dropout(x, 0.5, self.training)


def message_of(call):
    """What the `TrainingError` of a call says."""
    try:
        call()
    except TrainingError as error:
        return str(error)
    raise AssertionError("no TrainingError was raised")
