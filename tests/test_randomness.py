import numpy as np
import pytest
import torch

from mlsbi.randomness import check_device, check_seed, child_seed, seeded


def test_child_seeds_are_63_bit_and_differ():
    seeds = {child_seed(seed, *key) for seed in range(20) for key in ((), (0,), (1,), (0, 0), (0, 1))}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert child_seed(None) != child_seed(None)


def test_seeded_draws_reproduce_and_leave_no_trace():
    before = torch.get_rng_state()
    with seeded(3):
        first = torch.randn(4)
    with seeded(3):
        assert torch.equal(first, torch.randn(4))
    assert torch.equal(before, torch.get_rng_state())


def test_an_error_inside_leaves_no_trace_either():
    before = torch.get_rng_state()
    def fail():
        with seeded(3):
            torch.randn(4)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert torch.equal(before, torch.get_rng_state())


def test_no_seeding_is_queued_for_other_devices():
    queued = len(torch.cuda._queued_calls)
    with seeded(3):
        torch.randn(1)
    assert len(torch.cuda._queued_calls) == queued


@pytest.mark.parametrize("seed", [-1, None, 1.5, "1", True])
def test_bad_seeds(seed):
    with pytest.raises(ValueError, match="at least 0 as seed"):
        check_seed(seed)


def test_numpy_seeds_become_plain_numbers():
    assert type(check_seed(np.int64(3))) is int


def test_bad_devices():
    assert check_device("cpu") == torch.device("cpu")
    for device in ("nowhere", "cuda:99"):
        with pytest.raises(ValueError, match="device that torch can use"):
            check_device(device)
