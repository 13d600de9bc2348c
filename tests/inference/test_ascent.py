import torch

from mlsbi.inference.ascent import climb


def test_the_highest_point_on_the_way_is_found():
    """Of a function that rises to a cliff, beyond which it is not a number."""
    start = torch.tensor([[0.0], [0.4]])
    found = climb(lambda z: torch.where(z[:, 0] < 1, z[:, 0] ** 2, torch.nan), start, steps=400)
    assert found[0, 0] == 0  # where it is flat, nothing moves
    assert 0.97 < found[1, 0] < 1


def test_it_stops_where_nothing_is_gained():
    calls = []
    found = climb(lambda z: calls.append(len(z)) or -(z**2).sum(1), torch.full((3, 2), 0.5), steps=10_000)
    assert len(calls) < 400
    assert found.abs().max() < 0.02


def test_points_that_have_no_density_stay():
    start = torch.tensor([[1.0, 2.0]])
    assert torch.equal(climb(lambda z: z.sum(1) * torch.nan, start, steps=100), start)


def test_where_the_last_step_leads_counts():
    found = climb(lambda z: z[:, 0], torch.zeros(1, 1), steps=1)
    assert found.item() > 0
