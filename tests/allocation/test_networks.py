from dataclasses import replace

import numpy as np
import pytest
import torch
from stacks import PRIOR, SMALL, make_reader, simulations

from mlsbi.allocation import networks
from mlsbi.allocation.networks import FOLDS, STATES, Reader, fold_of, train_states
from mlsbi.density.embeddings import SetEmbedding
from mlsbi.density.mixture_density import MDN
from mlsbi.priors import Unbounded
from mlsbi.randomness import child_seed
from mlsbi.strategies.fitting import Problem


def read(n=24, levels=2, estimator="npe"):
    """A reader, and the sets of rows of each level as in a pilot: joint ones, and rows of level 0 alone."""
    theta, outputs = simulations(n, levels)
    alone, (x, *_) = simulations(n, levels, seed=1)
    reader = make_reader(theta, outputs, estimator)
    own = [[reader.rows(theta, [x])] for x in outputs]
    own[0].append(reader.rows(alone, [x]))
    return reader, own


def states_of(reader, own, seed=3, builder=SMALL):
    """Parameters of each network at each state."""
    found = {}
    for state, trained in train_states(reader, own, builder=builder, embedding=None, seed=seed, device="cpu",
                                       progress=False):
        found[state] = [{name: value.clone() for name, value in network.state_dict().items()} for network in trained]
    return found


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


def changed(own, *, fold, levels, by=0.5):
    """The same rows with other outputs in one fold of some levels."""
    found = []
    for level, sets in enumerate(own):
        found.append([])
        for rows in sets:
            here = (fold_of(len(rows)) == fold) & (level in levels)
            terms = []
            for term in rows.terms:
                fine, input = term.fine.clone(), term.input.clone()
                fine[here] += by
                input[here] -= by
                terms.append(replace(term, fine=fine, input=input))
            found[-1].append(replace(rows, terms=tuple(terms)))
    return found


def test_every_row_is_in_one_fold():
    assert fold_of(5).tolist() == [0, 1, 0, 1, 0]
    assert FOLDS == 2


@pytest.mark.parametrize("estimator", ["npe", "nle"])
def test_a_reader_reads_all_rows_alike_in_float64(estimator):
    theta, outputs = simulations(30)
    reader = make_reader(theta, outputs, estimator)
    rows = reader.rows(theta, outputs)
    assert len(rows.terms) == 2
    for term in rows.terms:
        assert term.input.dtype == term.fine.dtype == torch.float64
        assert term.coarse is None
        assert term.of_outputs == (estimator == "nle")
    z = Unbounded(PRIOR).to(theta).double()
    whole = torch.cat(outputs).double()
    for level, term in enumerate(rows.terms):
        x = (outputs[level] - whole.mean(0)) / whole.std(0, correction=0)
        if estimator == "npe":
            assert torch.allclose(term.fine, x, atol=1e-12)
            assert torch.allclose(term.input, (z - z.mean(0)) / z.std(0, correction=0), atol=1e-12)
        else:
            assert torch.allclose(term.input, x, atol=1e-12)
            wide = theta.double()  # inside a box, a likelihood is conditioned on theta itself
            assert torch.allclose(term.fine, (wide - wide.mean(0)) / wide.std(0, correction=0), atol=1e-12)
    assert np.array_equal(reader.features(theta), theta.double().numpy())


def test_features_of_an_unbounded_prior_are_unbounded():
    prior = torch.distributions.Independent(torch.distributions.LogNormal(torch.zeros(2), torch.ones(2)), 1)
    theta = prior.sample((20,))
    reader = Reader.fit(prior, "nle", [(theta, theta)], x_transform="none")
    assert np.allclose(reader.features(theta), theta.double().log().numpy())


def test_what_an_embedding_shares_is_scaled_alike():
    theta, outputs = simulations(30)
    rows = [(theta, x) for x in outputs]
    shared = Reader.fit(PRIOR, "npe", rows, x_transform="none", embedding=SetEmbedding()).scalers[1]
    own = Reader.fit(PRIOR, "npe", rows, x_transform="none").scalers[1]
    assert len(set(shared.scale.tolist())) == 1
    assert len(set(own.scale.tolist())) == 4


def test_asinh_bends_the_outputs_and_nothing_else():
    theta, outputs = simulations(30)
    for estimator, bent in (("npe", 1), ("nle", 0)):
        scalers = make_reader(theta, outputs, estimator, x_transform="asinh").scalers
        assert [scaler.transform for scaler in scalers] == ["asinh" if at == bent else "none" for at in (0, 1)]


@pytest.mark.usefixtures("brief")
def test_states_follow_on_each_other_in_the_same_networks():
    reader, own = read()
    seen = []
    for state, trained in train_states(reader, own, builder=SMALL, embedding=None, seed=3, device="cpu",
                                       progress=False):
        seen.append((state, [id(network) for network in trained]))
        if state == STATES[0]:
            for fold, network in enumerate(trained):
                fresh = Problem((), *reader.scalers).network(SMALL, None, seed=child_seed(3, fold))
                assert same(network.state_dict(), fresh.state_dict())
        else:
            assert not any(network.training for network in trained)
    assert tuple(state for state, _ in seen) == STATES
    assert len({tuple(ids) for _, ids in seen}) == 1
    found = states_of(reader, own)
    for earlier, later in zip(STATES, STATES[1:], strict=False):
        assert not any(same(one, other) for one, other in zip(found[earlier], found[later], strict=True))
    first, second = found[STATES[-1]]
    assert not same(first, second)


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("estimator", ["npe", "nle"])
@pytest.mark.parametrize("fold", range(FOLDS))
def test_a_network_never_sees_rows_of_its_fold(fold, estimator):
    """Other numbers there leave it as it is, bit for bit, and change the other network."""
    reader, own = read(estimator=estimator)
    before, after = states_of(reader, own), states_of(reader, changed(own, fold=fold, levels=(0, 1)))
    for state in STATES:
        assert same(before[state][fold], after[state][fold])
        assert same(before[state][1 - fold], after[state][1 - fold]) == (state == STATES[0])


@pytest.mark.usefixtures("brief")
def test_level_0_alone_comes_first():
    reader, own = read(levels=3)
    before, after = (states_of(reader, rows) for rows in (own, changed(own, fold=0, levels=(1, 2))))
    assert same(before[STATES[1]][1], after[STATES[1]][1])
    assert not same(before[STATES[2]][1], after[STATES[2]][1])


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("n", [8, 9, 10, 11, 17])
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_any_number_of_rows_and_levels_will_do(n, levels):
    theta, outputs = simulations(n, levels)
    reader = make_reader(theta, outputs)
    found = states_of(reader, [[reader.rows(theta, [x])] for x in outputs])
    assert tuple(found) == STATES
    assert all(value.isfinite().all() for own in found[STATES[-1]] for value in own.values() if value.numel())


@pytest.mark.parametrize("n", [8, 9, 17, 24, 31])
def test_rows_trained_on_and_held_out_are_the_other_fold(n):
    """All but one of each set at most, equally many for each network, the same ones at all levels."""
    theta, outputs = simulations(n, 3)
    for x in outputs:
        x[:, 0] = torch.arange(n)
    reader = make_reader(theta, outputs)
    rows, scaler = [reader.rows(theta, [x]) for x in outputs], reader.scalers[1]
    sizes = []
    for fold in range(FOLDS):
        parts = [networks._pool(rows, fold, held=held) for held in (False, True)]
        sizes.append([len(part) for part in parts])
        assert parts[0].input.dtype == torch.float32
        numbers = [(part.fine[:, 0] * scaler.scale[0] + scaler.mean[0]).round().int().tolist() for part in parts]
        train, held = (own[:len(own) // 3] for own in numbers)
        assert [train * 3, held * 3] == numbers
        outside = {row for row in range(n) if row % FOLDS != fold}
        assert not set(train) & set(held)
        assert set(train) | set(held) <= outside
        assert len(train) + len(held) == len(outside) - (n % 2 and fold)
        assert len(train) > len(held) > 0
    assert sizes[0] == sizes[1]


@pytest.mark.usefixtures("brief")
def test_a_seed_decides_and_torchs_random_state_is_left_alone():
    reader, own = read()
    state = torch.get_rng_state()
    first = states_of(reader, own)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again, other = states_of(reader, own), states_of(reader, own, seed=4)
    for name in STATES:
        assert all(same(one, two) for one, two in zip(first[name], again[name], strict=True))
        assert not any(same(one, two) for one, two in zip(first[name], other[name], strict=True))


def test_networks_learn_from_state_to_state():
    """Scored on rows of the finest level which neither has seen."""
    theta, outputs = simulations(120, shift=1.0)
    reader = make_reader(theta, outputs, "nle")
    fresh, (_, x) = simulations(500, shift=1.0, seed=9)
    term = reader.rows(fresh, [x]).terms[0]
    own = [[reader.rows(theta, [x])] for x in outputs]
    losses = []
    for _, trained in train_states(reader, own, builder=MDN(2, 8, 1), embedding=None, seed=0, device="cpu",
                                   progress=False):
        with torch.no_grad():
            losses.append([-float(network.standard_log_prob(term.input.float(), term.fine.float()).mean())
                           for network in trained])
    untrained, level_0, pilot = losses
    assert max(level_0) < min(untrained) - 0.2
    assert max(pilot) < min(level_0)
