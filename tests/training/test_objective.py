import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlsbi.training.objective import Term, batch_terms, pool_level, split_terms, telescope


@settings(deadline=None, max_examples=25)
@given(st.lists(st.floats(-2, 2), min_size=2, max_size=2), st.integers(0, 10**6))
def test_telescope_is_unbiased_for_any_fixed_weights(weights, seed):
    rng = np.random.default_rng(seed)
    exact = 3.0
    estimates = []
    for _ in range(400):
        u = [rng.standard_normal(n) for n in (20, 10, 5)]
        f = [
            torch.as_tensor(1 + 1.0 * u[0]),
            torch.as_tensor(2 + 1.5 * u[1]), torch.as_tensor(1 + 1.0 * u[1]),
            torch.as_tensor(3 + 2.0 * u[2]), torch.as_tensor(2 + 1.5 * u[2]),
        ]
        estimates.append(float(telescope(f, [*weights, 1.0])))
    error = np.std(estimates) / np.sqrt(len(estimates))
    assert abs(np.mean(estimates) - exact) < 5 * error  # 25 examples at five standard errors: 1e-5


def test_swapped_levels_are_biased():
    low, high, twin = torch.full((5,), 1.0), torch.full((3,), 2.0), torch.full((3,), 1.0)
    assert telescope([low, high, twin], [1.0, 1.0]).item() == 2.0
    assert telescope([low, twin, high], [1.0, 1.0]).item() != 2.0


def terms(n0=40, n1=10):
    g = torch.Generator().manual_seed(0)
    return [
        Term(torch.randn(n0, 2, generator=g), torch.randn(n0, 3, generator=g)),
        Term(torch.randn(n1, 2, generator=g), torch.randn(n1, 3, generator=g), torch.randn(n1, 3, generator=g)),
    ]


def test_splits_keep_pairs_together_and_lose_nothing():
    kept, held = split_terms(terms(), 0.2, torch.Generator().manual_seed(1))
    assert [len(t) for t in kept] == [32, 8]
    assert [len(t) for t in held] == [8, 2]
    original = terms()[1]
    for part in (kept[1], held[1]):
        for row in range(len(part)):
            index = int((original.input == part.input[row]).all(1).nonzero())
            assert torch.equal(part.fine[row], original.fine[index])
            assert torch.equal(part.coarse[row], original.coarse[index])


def test_members_hold_every_row_out_equally_often():
    counts = torch.zeros(10)
    for member in range(5):
        _, held = split_terms(terms(), 0.2, torch.Generator().manual_seed(1), member=member, members=5)
        counts += (terms()[1].input[:, None] == held[1].input[None]).all(-1).any(1)
    assert counts.tolist() == [1.0] * 10


def test_two_rows_are_the_least_to_split():
    kept, held = split_terms(terms(n1=2), 0.1, torch.Generator())
    assert (len(kept[1]), len(held[1])) == (1, 1)
    with pytest.raises(ValueError, match="at least 2 rows in term 1"):
        split_terms(terms(n1=1), 0.1, torch.Generator())


def test_batch_joins_halves_in_order():
    parts = terms()
    batch = batch_terms(parts)
    assert batch.sizes == (40, 10, 10)
    (_, c0), (i1, c1), (i2, c2) = batch.halves()
    assert torch.equal(c0, parts[0].fine)
    assert torch.equal(c1, parts[1].fine)
    assert torch.equal(c2, parts[1].coarse)
    assert torch.equal(i1, i2)


def test_means_of_members_telescope_as_losses_do():
    g = torch.Generator().manual_seed(0)
    losses = [torch.randn(3, rows, generator=g, dtype=torch.float64) for rows in (7, 5, 5, 4, 4)]
    weights = torch.cat([torch.rand(3, 2, generator=g, dtype=torch.float64), torch.ones(3, 1).double()], 1)
    found = telescope(losses, weights)
    expected = [telescope([half[member] for half in losses], weights[member].tolist()) for member in range(3)]
    assert torch.allclose(found, torch.stack(expected), atol=1e-12)


def test_terms_keep_their_sides_apart():
    posterior, likelihood = terms()[1], Term(*(torch.full((2, 1), float(at)) for at in range(4)), of_outputs=True)
    assert posterior.outputs == (posterior.fine, posterior.coarse)
    assert likelihood.outputs == (likelihood.input, likelihood.coarse_input)
    moved = posterior.with_outputs(posterior.fine + 1, posterior.coarse + 1)
    assert torch.equal(moved.fine, posterior.fine + 1)
    assert moved.input is posterior.input
    moved = likelihood.with_outputs(likelihood.input + 1, likelihood.coarse_input + 1)
    assert (moved.input[0, 0], moved.fine[0, 0], moved.coarse[0, 0], moved.coarse_input[0, 0]) == (1.0, 1.0, 2.0, 4.0)
    rows = likelihood.rows(torch.tensor([1]))
    assert all(len(part) == 1 for part in (rows, rows.fine, rows.coarse, rows.coarse_input))
    assert rows.of_outputs


def test_the_finest_level_is_pooled_alone():
    whole = terms()
    assert len(pool_level(whole, 0)) == 50
    assert torch.equal(pool_level(whole, 1).fine, whole[1].fine)
