import numpy as np
import pytest
import torch

from theory_checks.drawing import draw_leaves


def _draw(noise, rows=2000, seed=0):
    return draw_leaves(noise, rows=rows, seed=seed)


def test_leaves_are_flattened_to_columns_and_named():
    leaves = _draw(lambda n, generator: {"path": torch.randn(n, 2, 3, generator=generator),
                                         "last": torch.rand(n, generator=generator, dtype=torch.float64)})
    assert [(leaf.name, leaf.size) for leaf in leaves] == [("noise['path']", 6), ("noise['last']", 1)]
    assert [leaf.looked_at for leaf in leaves] == [6, 1]
    assert leaves[0].columns.shape == (6, 2000)
    assert leaves[0].columns.dtype == np.float64
    assert [leaf.name for leaf in _draw(lambda n, generator: (torch.rand(n, 1), torch.rand(n, 1)))] == [
        "noise[0]", "noise[1]"]


def test_the_seed_decides_the_draws():
    def noise(n, generator):
        return torch.randn(n, 2, generator=generator)

    assert np.array_equal(_draw(noise)[0].columns, _draw(noise)[0].columns)
    assert not np.array_equal(_draw(noise)[0].columns, _draw(noise, seed=1)[0].columns)


def test_rows_of_one_block_are_drawn_together_and_columns_keep_their_place():
    (leaf,) = _draw(lambda n, generator: torch.arange(5.0).expand(n, 5) + 0 * torch.rand(n, 1, generator=generator))
    assert np.array_equal(leaf.columns[:, 0], np.arange(5.0))


def test_large_leaves_are_looked_at_in_part_with_a_run_of_neighbours():
    (leaf,) = _draw(lambda n, generator: torch.arange(30_000.0).expand(n, -1), rows=20_000)
    assert (leaf.size, leaf.looked_at) == (30_000, 200)
    assert leaf.columns.shape[1] == 2000  # 4 10^7 numbers would be 1333 rows
    places = leaf.columns[:, 0]
    assert (np.diff(places) == 1).sum() >= 99
    assert places.max() - places.min() > 10_000


def test_integers_are_not_drawn_as_columns_and_complex_numbers_are_two():
    integer, pair = _draw(lambda n, generator: (torch.randint(0, 5, (n, 2), generator=generator),
                                                torch.randn(n, 2, generator=generator, dtype=torch.complex64)))
    assert integer.columns is None
    assert (integer.kind, integer.size, integer.looked_at) == ("int64", 2, 0)
    assert pair.columns.shape == (4, 2000)


def test_empty_noise_has_no_columns():
    (leaf,) = _draw(lambda n, generator: torch.zeros(n, 0))
    assert leaf.size == 0


def test_noise_that_is_not_noise_is_refused():
    with pytest.raises(TypeError, match="noise is a ndarray"):
        _draw(lambda n, generator: np.zeros(n))
    with pytest.raises(ValueError, match=r"noise\[1\] with leading dimension 1"):
        _draw(lambda n, generator: (torch.zeros(n, 1), torch.zeros(n + 1, 1)))
    with pytest.raises(ValueError, match="Expected finite noise"):
        _draw(lambda n, generator: torch.rand(n, 1, generator=generator) / 0)
