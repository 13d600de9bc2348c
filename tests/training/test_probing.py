import pytest
import torch
from torch import nn
from trainings import DROPPING, MIXTURE, ForeignDropout, make_members, make_network, make_terms, train

from mlsbi.density.columns import dropouts
from mlsbi.training.members import Member
from mlsbi.training.options import TrainingOptions
from mlsbi.training.probing import find_traits

ROWS = torch.randn(4, 1), torch.randn(4, 2)


def traits(embedding=None, builder=MIXTURE):
    network = make_network(builder, embedding=embedding)
    keep = {name: torch.ones(layer.features, 4) for name, layer in dropouts(network).items()}
    return find_traits(network, *ROWS, keep)


@pytest.mark.parametrize(("embedding", "draws"), [
    (None, False), (nn.Dropout(0.0), False), (ForeignDropout(), True), (nn.Dropout(1e-4), True),
    (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.001)), True),
])
def test_drawing_is_found_however_seldom_it_shows(embedding, draws):
    assert traits(embedding).draws is draws


def test_the_library_s_own_dropout_draws_nothing_where_it_is_given_masks():
    assert not traits(builder=DROPPING).draws


def test_buffers_that_move_are_named_and_the_network_is_left_as_it_is():
    network = make_network(MIXTURE, embedding=nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = find_traits(network, *ROWS, {})
    assert set(found.moving) == {f"embedding.1.{name}" for name in ("running_mean", "running_var",
                                                                    "num_batches_tracked")}
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_a_frozen_batch_norm_is_accepted_with_levels():
    body = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    body.requires_grad_(requires_grad=False)
    terms = make_terms((40, 20))
    history, = train([Member(make_network(MIXTURE, embedding=body), terms, [], 0)])
    assert len(history.epochs) == 5


@pytest.mark.parametrize("freeze", [True, False])
def test_nothing_to_train_is_an_error(freeze):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            if freeze:
                self.mean = nn.Parameter(torch.zeros(1), requires_grad=False)

        def log_prob(self, input, condition):
            return -0.5 * input.square().sum(1)

    network = make_network(lambda dim, condition_dim: Fixed())
    with pytest.raises(ValueError, match="none requires a gradient"):
        train([Member(network, make_terms((40,)), [], 0)])


class Picky(nn.Module):
    """Raises whatever it likes where it cannot be mapped."""

    def __init__(self, error):
        super().__init__()
        self.line, self.error = nn.Linear(2, 2), error

    def forward(self, x):
        if torch._C._functorch.is_batchedtensor(x):
            raise self.error
        return self.line(x)


@pytest.mark.parametrize("error", [AssertionError("not here"), KeyError("rows"), IndexError("none")])
def test_whatever_a_module_raises_when_mapped_is_a_note(error):
    for history in train(make_members(2, MIXTURE, embedding=lambda member: Picky(error)),
                         options=TrainingOptions(epochs=2, together=True)):
        assert history.notes[0].startswith("members were evaluated one after the other: ")


class Other(nn.Module):
    """Gives other values where it is mapped."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(2, 2)

    def forward(self, x):
        return self.line(x) + torch._C._functorch.is_batchedtensor(x)


def test_a_module_that_gives_other_values_when_mapped_is_not_mapped():
    history, _ = train(make_members(2, MIXTURE, embedding=lambda member: Other()),
                       options=TrainingOptions(epochs=2, together=True))
    assert history.notes == ("members were evaluated one after the other: in one go the network gives other values",)
