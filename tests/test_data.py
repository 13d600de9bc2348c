import numpy as np
import pytest
import torch

from mlsbi import MultilevelData


def make(n0=10, n1=4, shape=(3,)):
    g = torch.Generator().manual_seed(0)
    low = torch.rand(n0, 2, generator=g), torch.randn(n0, *shape, generator=g)
    high = torch.rand(n1, 2, generator=g), torch.randn(n1, *shape, generator=g), torch.randn(n1, *shape, generator=g)
    return [low, high]


def test_save_and_load_are_exact_and_without_pickle(tmp_path):
    data = MultilevelData.from_arrays(make(), names=["low", "high"])
    path = data.save(tmp_path / "folder" / "data")
    with np.load(path, allow_pickle=False) as file:
        assert {"theta_0", "fine_0", "theta_1", "fine_1", "coarse_1"} <= set(file)
    again = MultilevelData.load(path)
    assert (again.names, again.n, again.runs, again.failures, again.seconds) == (
        data.names, data.n, data.runs, data.failures, data.seconds)
    for one, other in zip(data, again, strict=True):
        assert torch.equal(one.theta, other.theta)
        assert torch.equal(one.fine, other.fine)
    assert again.levels[0].coarse is None
    assert torch.equal(data.levels[1].coarse, again.levels[1].coarse)


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    data = MultilevelData.from_arrays(make())
    path = data.save(tmp_path / "data.npz")
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        data.save(path)
    assert path.read_bytes() == before


def test_newer_format_is_refused(tmp_path):
    path = MultilevelData.from_arrays(make()).save(tmp_path / "data.npz")
    with np.load(path) as file:
        arrays = dict(file)
    np.savez(path, **{**arrays, "format": 99})
    with pytest.raises(ValueError, match="format 99"):
        MultilevelData.load(path)


def test_a_foreign_file_is_refused(tmp_path):
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="not written by MultilevelData.save"):
        MultilevelData.load(tmp_path / "other.npz")


def test_head():
    data = MultilevelData.from_arrays(make())
    assert data.head(5).n == (5, 4)
    assert data.head(np.int64(5)).n == (5, 4)
    assert data.head((7, 2)).n == (7, 2)
    assert torch.equal(data.head((7, 2)).levels[1].coarse, data.levels[1].coarse[:2])
    with pytest.raises(ValueError, match="between 1 and 4"):
        data.head((5, 5))
    with pytest.raises(ValueError, match="one number per level"):
        data.head((5, 2, 1))


def test_runs_count_both_halves():
    assert MultilevelData.from_arrays(make()).runs == (14, 4)


def test_levels_may_be_simulated_apart(tmp_path):
    (theta, x), (other, fine, _) = make()
    data = MultilevelData.from_arrays([(theta, x), (other, fine)])
    assert data.runs == (10, 4)
    assert data.levels[1].coarse is None
    loaded = MultilevelData.load(data.save(tmp_path / "apart"))
    assert loaded.levels[1].coarse is None
    assert torch.equal(loaded.levels[1].fine, fine)


def test_integers_become_floats():
    theta = np.ones((2, 1))
    data = MultilevelData.from_arrays([(theta, np.array([[1], [2]]))])
    assert data.levels[0].fine.dtype == torch.get_default_dtype()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: [], "at least one level"),
        (lambda d: [d[0], d[1][:1]], r"\(theta, fine, coarse\) or \(theta, fine\) for level 1"),
        (lambda d: [(d[0][0], d[0][1][:5]), d[1]], "fine outputs of shape"),
        (lambda d: [d[0], (d[1][0], d[1][1], d[1][2][:, :2])], "coarse outputs of shape"),
        (lambda d: [(d[0][0], d[0][1] * float("nan")), d[1]], "10 fine rows of level 'level 0' are not"),
        (lambda d: [(d[0][0][:, 0], d[0][1]), d[1]], "theta of shape"),
        (lambda d: [(d[0][0], d[0][1].to(torch.complex64))], "complex"),
        (lambda d: [(d[0][0], d[0][1][:, 0])], r"x\[:, None\]"),
    ],
)
def test_bad_arrays(change, match):
    with pytest.raises(ValueError, match=match):
        MultilevelData.from_arrays(change(make()))
