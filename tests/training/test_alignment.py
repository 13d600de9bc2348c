import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mlsbi.training.alignment import align_terms, fit_affine
from mlsbi.training.objective import Term


def make_terms(n=(300, 60, 40), seed=0):
    """Three levels of x = theta + noise; each lower one is halved and shifted by one."""
    g = torch.Generator().manual_seed(seed)
    terms = []
    for level, rows in enumerate(n):
        z = torch.randn(rows, 1, generator=g)
        top = z + 0.3 * torch.randn(rows, 2, generator=g)
        outputs = [(top / 2 - 1) / 2 - 1, top / 2 - 1, top]
        terms.append(Term(z, outputs[level], outputs[level - 1] if level else None))
    return terms


def split(terms, kept):
    return [t.rows(torch.arange(kept)) for t in terms], [t.rows(torch.arange(kept, len(t))) for t in terms]


def test_levels_that_differ_by_an_affine_map_become_one():
    train, held = align_terms(*split(make_terms(), 30))
    for terms in (train, held):
        for term in terms[1:]:
            # Four pairs of slope 1 against thirty of slope 2 leave a tenth of the way.
            assert torch.allclose(term.fine, term.coarse, atol=0.7)
            assert (term.fine - term.coarse).abs().mean() < 0.15
    assert train[0].fine.mean().abs() < 0.3


def test_the_finest_level_is_left_alone():
    before = make_terms()
    train, held = align_terms(before, [])
    assert torch.equal(train[-1].fine, before[-1].fine)
    assert held == []


def test_both_halves_of_a_level_are_mapped_alike():
    """So the sum telescopes whatever the map: the same output gives the same mapped output in either half."""
    terms = make_terms(n=(60, 60, 40))
    terms[0] = Term(terms[1].input, terms[1].coarse)  # the same rows in both halves
    terms[2] = Term(terms[1].input[:40], terms[2].fine, terms[1].fine[:40])
    train, _ = align_terms(terms, [])
    assert torch.equal(train[0].fine, train[1].coarse)
    assert torch.equal(train[1].fine[:40], train[2].coarse)


def test_identical_levels_stay_as_they_are():
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    train, _ = align_terms([Term(x, x), Term(x, x, x)], [])
    assert torch.allclose(train[1].coarse, x, atol=1e-6)
    assert torch.allclose(train[0].fine, x, atol=1e-6)


def test_held_out_rows_do_not_move_the_map():
    kept, held = split(make_terms(), 30)
    spoiled = [Term(t.input, t.fine + 100, t.coarse) for t in held]
    first, again = align_terms(kept, held)[0], align_terms(kept, spoiled)[0]
    assert all(torch.equal(a.fine, b.fine) for a, b in zip(first, again, strict=True))


@given(st.integers(1, 50), st.integers(0, 10**6))
def test_few_or_constant_pairs_give_finite_maps_between_the_identity_and_regression(n, seed):
    g = torch.Generator().manual_seed(seed)
    coarse, spread = torch.randn(n, 2, generator=g), torch.tensor([1.0, 0.0])
    coarse[:, 1] = 3.0
    slope, shift = fit_affine(coarse, 2 * coarse + 1, spread)
    assert bool(torch.isfinite(slope).all() & torch.isfinite(shift).all())
    assert 1 - 1e-5 <= slope[0].item() <= 2 + 1e-5
    assert slope[1].item() == 1.0
    assert (shift + slope * coarse).mean(0).tolist() == pytest.approx((2 * coarse + 1).mean(0).tolist(), abs=1e-4)


def test_likelihood_terms_are_aligned_in_their_inputs():
    """Outputs are what a likelihood is the density of: the same maps, on the other side."""
    terms = make_terms()
    swapped = [Term(t.fine, t.input, None if t.coarse is None else t.input, t.coarse, of_outputs=True) for t in terms]
    plain, _ = align_terms(terms, [])
    train, _ = align_terms(swapped, [])
    for one, other in zip(train, plain, strict=True):
        assert torch.equal(one.input, other.fine)
        assert one.coarse_input is other.coarse is None or torch.equal(one.coarse_input, other.coarse)
        assert torch.equal(one.fine, other.input)


def test_exchangeable_outputs_share_their_map():
    g = torch.Generator().manual_seed(0)
    fine = torch.randn(5, 400, generator=g)
    terms = [Term(fine[:, :1], fine), Term(fine[:, :1], 2 * fine + 1, fine)]
    (low, high), _ = align_terms(terms, [], shared=(0,))
    assert low.fine.shape == high.coarse.shape == (5, 400)
    assert torch.allclose(high.coarse, high.fine, atol=0.1)  # 2000 pairs of numbers, where 5 rows alone leave half
    apart = align_terms(terms, [])[0][1]
    assert (apart.coarse - apart.fine).abs().mean() > 0.3


def test_levels_that_agree_but_for_their_tails_are_left_alone():
    g = torch.Generator().manual_seed(0)
    coarse = torch.randn(200, 2, generator=g)
    fine = torch.where(coarse.abs() > 1.8, 4 * coarse, coarse)  # a slope of 1.8 by least squares
    fine[:, 1] = 2 * coarse[:, 1] + 1
    terms = [Term(torch.zeros(200, 1), coarse), Term(torch.zeros(200, 1), fine, coarse)]
    (low, high), _ = align_terms(terms, [])
    assert torch.equal(high.coarse[:, 0], coarse[:, 0])
    assert torch.equal(low.fine[:, 0], coarse[:, 0])
    assert (high.coarse[:, 1] - fine[:, 1]).abs().mean() < 0.1
    slope, _ = fit_affine(coarse, fine, coarse.var(0))
    assert slope[0] > 1.5  # the map that was not used
