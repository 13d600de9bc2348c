import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trainings import make_terms

from mlsbi.density.columns import Dropout
from mlsbi.training.objective import Term
from mlsbi.training.plan import Plan, batch_rows, stack_rows


def make_plan(n=(500, 100), *, members=1, batch_size=150, dropouts=None, seeds=None, terms=None):
    rows = [make_terms(n, seed=member) for member in range(members)] if terms is None else terms
    return Plan(rows, batch_size=batch_size, dropouts=dropouts or {}, seeds=seeds or list(range(len(rows))))


def same(one, other):
    return (torch.equal(one.input, other.input) and torch.equal(one.condition, other.condition)
            and one.sizes == other.sizes and one.keep.keys() == other.keep.keys()
            and all(torch.equal(one.keep[name], other.keep[name]) for name in one.keep))


def alone(rows, member):
    """One member's part of a step."""
    index = slice(member, member + 1)
    return type(rows)(rows.input[index], rows.condition[index], rows.sizes,
                      {name: mask[index] for name, mask in rows.keep.items()})


def test_minibatches_use_every_row_and_keep_pairs():
    plan = make_plan(members=2)
    terms = [make_terms((500, 100), seed=member) for member in range(2)]
    steps = list(plan.epoch())
    assert len(steps) == plan.steps == 4
    for member in range(2):
        seen = [[], []]
        low, high = terms[member]
        for step in steps:
            fine_0, fine_1, coarse_1 = step.halves()
            assert torch.equal(fine_1.input, coarse_1.input)
            for at, row in enumerate(fine_1.input[member]):
                index = int((high.input == row).all(1).nonzero())
                assert torch.equal(high.fine[index], fine_1.condition[member, at])
                assert torch.equal(high.coarse[index], coarse_1.condition[member, at])
            for at, row in enumerate(fine_0.input[member]):
                assert torch.equal(low.fine[int((low.input == row).all(1).nonzero())], fine_0.condition[member, at])
            seen[0] += fine_0.input[member].flatten().tolist()
            seen[1] += fine_1.input[member].flatten().tolist()
        assert set(seen[0]) == set(low.input.flatten().tolist())
        assert set(seen[1]) == set(high.input.flatten().tolist())


def test_a_likelihoods_pairs_keep_their_own_inputs():
    terms = make_terms((90, 80))
    turned = [Term(term.fine, term.input, None if term.coarse is None else term.input, term.coarse, of_outputs=True)
              for term in terms]
    for step in make_plan(terms=[turned], batch_size=100).epoch():
        _, fine, coarse = step.halves()
        assert torch.equal(fine.condition, coarse.condition)
        for at, row in enumerate(fine.condition[0]):
            index = int((terms[1].input == row).all(1).nonzero())
            assert torch.equal(terms[1].fine[index], fine.input[0, at])
            assert torch.equal(terms[1].coarse[index], coarse.input[0, at])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 700), min_size=1, max_size=3), st.integers(1, 900), st.integers(0, 99))
def test_an_epoch_holds_every_row_at_least_once(n, batch_size, seed):
    plan = make_plan(n, batch_size=batch_size, seeds=[seed])
    seen = [torch.cat(parts) for parts in zip(*([half.input[0, :, 0] for half in step.halves()]
                                                for step in plan.epoch()), strict=True)]
    for term, parts in zip(plan.term, seen, strict=True):
        counts = torch.unique(parts, return_counts=True)[1]
        assert len(counts) == n[term]
        assert counts.max() - counts.min() <= 1  # as often as any other


@pytest.mark.parametrize("n", [(2000, 500), (3000, 300, 200)])
def test_levels_are_in_proportion_where_they_have_rows(n):
    plan = make_plan(n, batch_size=1000)
    for count, taken in zip(n, plan.taken, strict=True):
        assert taken == max(math.ceil(count * plan.steps**-1), 64)
    assert plan.sizes == (plan.taken[0], *(size for size in plan.taken[1:] for _ in range(2)))


def test_a_term_with_few_rows_gives_at_least_as_many_as_make_sense():
    assert make_plan((5000, 100, 20), batch_size=500).taken == (455, 64, 20)


def test_a_full_batch_has_every_row_in_its_order():
    terms = make_terms((30, 20, 10))
    for batch_size in (None, 60, 1000):
        plan = make_plan((30, 20, 10), batch_size=batch_size, seeds=[3])
        first, again = ([*plan.epoch()] for _ in range(2))
        assert len(first) == len(again) == 1
        step = first[0]
        assert step.sizes == (30, 20, 20, 10, 10)
        assert step.input is again[0].input  # not copied every epoch
        expected = [terms[0].fine, terms[1].fine, terms[1].coarse, terms[2].fine, terms[2].coarse]
        assert torch.equal(step.condition[0], torch.cat(expected))
        assert torch.equal(step.input[0], torch.cat([terms[term].input for term in plan.term]))
    assert not make_plan((30, 20, 10), batch_size=59).full


def test_automatic_batches_are_a_quarter_within_bounds():
    assert [batch_rows("auto", total) for total in (10, 1000, 4000, 10**6)] == [256, 256, 1000, 2048]
    assert batch_rows(None, 77) == 77
    assert batch_rows(5, 77) == 5


def test_orders_and_masks_change_from_epoch_to_epoch():
    plan = make_plan(dropouts={"a.keep": (4, 0.5)})
    first, again = ([*plan.epoch()] for _ in range(2))
    assert not torch.equal(first[0].input, again[0].input)
    assert not torch.equal(first[0].keep["a.keep"], again[0].keep["a.keep"])
    assert not torch.equal(first[0].keep["a.keep"], first[1].keep["a.keep"])
    assert not torch.equal(first[0].input[0, :20].sort().values, first[1].input[0, :20].sort().values)


@pytest.mark.parametrize("batch_size", [None, 150])
def test_a_members_steps_do_not_depend_on_the_others(batch_size):
    rows = [make_terms((200, 60), seed=member) for member in range(3)]
    layers = {"a.keep": (3, 0.3), "b.keep": (5, 0.1)}
    together = Plan(rows, batch_size=batch_size, dropouts=layers, seeds=[5, 6, 7])
    apart = [Plan([rows[member]], batch_size=batch_size, dropouts=layers, seeds=[5 + member]) for member in range(3)]
    for _ in range(2):
        epochs = [list(plan.epoch()) for plan in apart]
        for at, step in enumerate(together.epoch()):
            for member in range(3):
                assert same(alone(step, member), epochs[member][at])
    twice = Plan([rows[0], rows[0]], batch_size=batch_size, dropouts=layers, seeds=[5, 5])
    for step in twice.epoch():
        assert same(alone(step, 0), alone(step, 1))


@pytest.mark.parametrize("batch_size", [None, 150])
def test_members_that_are_let_go_leave_the_others_as_they_were(batch_size):
    layers = {"a.keep": (3, 0.3)}
    whole, fewer = (make_plan((200, 60), members=4, batch_size=batch_size, dropouts=layers) for _ in range(2))
    list(whole.epoch()), list(fewer.epoch())
    fewer.select([1, 3])
    assert len(fewer) == 2
    for _ in range(2):
        for full, part in zip(whole.epoch(), fewer.epoch(), strict=True):
            assert same(alone(full, 1), alone(part, 0))
            assert same(alone(full, 3), alone(part, 1))
    whole.select([1, 3])
    whole.select([1])
    fewer.select([1])
    for full, part in zip(whole.epoch(), fewer.epoch(), strict=True):
        assert same(full, part)


def masks_of(plan, p, dtype=torch.float32):
    """What a layer multiplies the units of the first step by."""
    keep = next(iter(plan.epoch())).keep["a.keep"]
    layer = Dropout(keep.shape[1], p)
    return torch.stack([torch.func.functional_call(layer, {"keep": own}, torch.ones(own.shape, dtype=dtype))
                        for own in keep])


@pytest.mark.parametrize("p", [0.001, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_masks_keep_their_share_and_have_mean_one(p, dtype):
    rows = [make_terms((4000, 500), dtype=dtype) for _ in range(2)]
    plan = Plan(rows, batch_size=None, dropouts={"b.keep": (3, 0.5), "a.keep": (25, p)}, seeds=[3, 4])
    mask = masks_of(plan, p, dtype)
    assert mask.shape == (2, 25, 5000)
    assert mask.dtype == dtype
    kept = mask != 0
    for own in kept[:, :, :4500]:
        deviation = math.sqrt(p * (1 - p) / own.numel())
        # Five standard errors, and the 16 bits that a share is rounded to.
        assert abs(own.double().mean() - (1 - p)) < 5 * deviation + 2**-17
    # Mean one in expectation: the value times the share that 16 bits give.
    value = mask[kept].unique().item()
    share = round((1 - p) * 2**16) / 2**16
    assert value * share == pytest.approx(1.0, rel=1e-6)
    assert torch.equal(mask[:, :, 4000:4500], mask[:, :, 4500:])  # the halves of a pair
    if 25 * 500 * p > 100:
        assert not torch.equal(mask[:, :, :500], mask[:, :, 4500:])
    assert not torch.equal(mask[0], mask[1])


@pytest.mark.parametrize("batch_size", [None, 150])
def test_pairs_of_every_level_have_one_mask(batch_size):
    plan = make_plan((200, 90, 90), batch_size=batch_size, dropouts={"a.keep": (9, 0.5)})
    for step in plan.epoch():
        low, fine_1, coarse_1, fine_2, coarse_2 = (half.keep["a.keep"] for half in step.halves())
        assert torch.equal(fine_1, coarse_1)
        assert torch.equal(fine_2, coarse_2)
        assert not torch.equal(fine_1, fine_2)
        assert not torch.equal(low[..., :fine_1.shape[2]], fine_1[..., :low.shape[2]])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_features_rows_and_layers_are_dropped_independently(p):
    plan = Plan([make_terms((4500,))], batch_size=None, dropouts={"b.keep": (25, p), "a.keep": (25, p)}, seeds=[3])
    step, = plan.epoch()
    both = torch.cat([step.keep[name][0] for name in ("a.keep", "b.keep")])
    layer = Dropout(50, p)
    kept = torch.func.functional_call(layer, {"keep": both}, torch.ones(50, 4500)) != 0
    centred = (kept.double() - (1 - p)) / math.sqrt(p * (1 - p))
    correlation = centred @ centred.T / 4500
    # 1225 pairs of features at six standard errors: 1e-6.
    assert (correlation - torch.diag(correlation.diag())).abs().max() < 6 / math.sqrt(4500)
    assert abs((centred[:, 1:] * centred[:, :-1]).mean()) < 5 / math.sqrt(50 * 4499)


@pytest.mark.parametrize("p", [1e-7, 1 - 1e-7])
def test_a_probability_that_sixteen_bits_cannot_tell_from_zero_or_one_is_neither(p):
    mask = masks_of(make_plan((3000,), batch_size=None, dropouts={"a.keep": (30, p)}), p)
    rare = (mask == 0) if p < 0.5 else (mask != 0)
    assert rare.sum() < 20  # 1.4 expected
    assert bool(mask.isfinite().all())


def test_random_states_give_the_same_steps_again():
    plan, other = (make_plan(members=2, dropouts={"a.keep": (5, 0.3)}, seeds=seeds) for seeds in ([1, 2], [3, 4]))
    list(plan.epoch())
    state = {name: tensor.clone() for name, tensor in plan.random_state().items()}
    expected = list(plan.epoch())
    other.blocks = plan.blocks
    other.set_random_state(state)
    for one, again in zip(expected, other.epoch(), strict=True):
        assert same(one, again)
    plan.set_random_state(state)
    assert same(expected[0], next(plan.epoch()))
    assert not same(expected[0], next(plan.epoch()))


@pytest.mark.parametrize("features", [1, 2, 3, 7])
def test_masks_of_any_size(features):
    plan = make_plan((5, 3), batch_size=None, dropouts={"a": (features, 0.5)})
    assert next(iter(plan.epoch())).keep["a"].shape == (1, features, 11)


def test_a_few_rows_drop_nothing():
    few = make_plan((50, 5), members=2, dropouts={"a": (3, 0.5)}).few((10, 5))
    assert few.sizes == (10, 5, 5)
    assert few.input.shape == (2, 20, 1)
    dropped = torch.func.functional_call(Dropout(3, 0.5), {"keep": few.keep["a"]}, torch.ones(2, 3, 20))
    assert torch.equal(dropped, torch.ones(2, 3, 20))


def test_halves_split_rows_and_masks():
    plan = make_plan((20, 10), batch_size=None, dropouts={"a": (3, 0.5)})
    step, = plan.epoch()
    halves = step.halves()
    assert [half.sizes for half in halves] == [(20,), (10,), (10,)]
    assert torch.equal(torch.cat([half.input for half in halves], 1), step.input)
    assert torch.equal(torch.cat([half.keep["a"] for half in halves], 2), step.keep["a"])


def test_one_members_rows_are_not_copied():
    terms = make_terms((20, 10))
    blocks = stack_rows([terms])
    assert blocks[0][0].data_ptr() == terms[0].input.data_ptr()
    assert blocks[2][1].data_ptr() == terms[1].coarse.data_ptr()
    assert blocks[2][0].data_ptr() == terms[1].input.data_ptr()
