import pickle

import cloudpickle
import numpy as np
import pytest
import torch

from mlsbi.simulation.adapters import RowSimulator, noise_of_row, per_sample

THETA = torch.tensor([[0.1, 2.0], [0.3, -1.5]])
SEEDS = torch.tensor([5, 2**62 + 1])
ROW = THETA[0].numpy()


@per_sample
def decorated(theta, noise):
    return theta * noise


# One row of noise


@pytest.mark.parametrize("convert", [lambda leaf: leaf, lambda leaf: leaf.numpy()], ids=["tensors", "arrays"])
def test_a_row_of_noise_has_the_structure_of_the_noise(convert):
    leaf = torch.arange(6.0).reshape(2, 3)
    assert np.array_equal(noise_of_row(convert(leaf), 1), [3, 4, 5])
    one, other = noise_of_row((convert(leaf), convert(leaf[:, 0])), 1)
    assert np.array_equal(one, [3, 4, 5])
    assert other == 3
    assert np.array_equal(noise_of_row({"u": convert(leaf)}, 0)["u"], [0, 1, 2])
    seed = noise_of_row(convert(SEEDS), 1)
    assert type(seed) is int
    assert seed == 2**62 + 1  # not through a float


def test_a_row_of_noise_is_a_copy():
    noise = torch.zeros(2, 3)
    noise_of_row(noise, 0)[:] = 1
    assert not bool(noise.any())


# Functions of one sample


@pytest.mark.parametrize(
    ("output", "shape", "dtype"),
    [
        (3, (1,), torch.float64),
        (2.5, (1,), torch.float64),
        (True, (1,), torch.bool),
        ([1.0, 2.0], (2,), torch.float64),
        (np.float16([1, 2]), (2,), torch.float16),
        (np.ones((2, 3), np.float32), (2, 3), torch.float32),
        (np.ones(2, ">f8"), (2,), torch.float64),
        (torch.ones(3, dtype=torch.int32), (3,), torch.int32),
        (np.float64("nan"), (1,), torch.float64),
    ],
)
def test_outputs_keep_shape_and_type(output, shape, dtype):
    x = per_sample(lambda theta, noise: output)(THETA, SEEDS)
    assert x.shape == (2, *shape)
    assert x.dtype == dtype
    assert torch.equal(x[0].isnan(), torch.as_tensor(np.asarray(output, x.numpy().dtype)).reshape(shape).isnan())


@pytest.mark.parametrize(
    ("output", "error", "match"),
    [
        (1j, TypeError, "complex"),
        ("text", TypeError, "to return numbers"),
        (None, TypeError, "to return numbers.*NoneType"),
        (np.ones(2, np.longdouble), TypeError, "to return numbers"),
        ([[1], [1, 2]], ValueError, "one shape"),
    ],
)
def test_outputs_that_are_no_numbers(output, error, match):
    with pytest.raises(error, match=match):
        per_sample(lambda theta, noise: output).run_row(ROW, 1)


def test_rows_see_their_own_theta_and_noise():
    x = decorated(THETA, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert torch.equal(x, THETA * torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert x.dtype == torch.float32
    assert torch.equal(x, decorated(THETA.numpy(), np.float32([[1, 2], [3, 4]])))


def test_memory_used_again_for_the_next_row_does_no_harm():
    buffer = np.zeros(1)

    def fill(theta, noise):
        buffer[:] = noise
        theta[:] = 0
        return buffer

    before = THETA.clone()
    assert per_sample(fill)(THETA, torch.tensor([1, 2])).tolist() == [[1.0], [2.0]]
    assert torch.equal(THETA, before)


def test_the_first_row_that_fails_is_named():
    def fail(theta, noise):
        if theta[1] < 0:
            raise ZeroDivisionError("too small")
        return 1.0

    with pytest.raises(RuntimeError, match=r"Row 1, theta \[0.3.*ZeroDivisionError: too small") as caught:
        per_sample(fail)(THETA, SEEDS)
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(ValueError, match=r"row 0 has \(1,\), row 1 has \(2,\)"):
        per_sample(lambda theta, seed: np.ones(1 if seed == 5 else 2))(THETA, SEEDS)
    with pytest.raises(ValueError, match="shape"):
        decorated(THETA[0], SEEDS)
    with pytest.raises(TypeError, match="a function of one sample"):
        per_sample(3)


@pytest.mark.parametrize("package", [pickle, cloudpickle])
def test_functions_of_one_sample_can_be_pickled(package):
    again = package.loads(package.dumps(decorated))
    assert torch.equal(again(THETA, THETA), decorated(THETA, THETA))
    assert isinstance(again, RowSimulator)
    assert not isinstance(torch.add, RowSimulator)


def test_a_lambda_of_one_sample_travels_by_value():
    scale = 3.0
    again = pickle.loads(cloudpickle.dumps(per_sample(lambda theta, noise: scale * theta)))
    assert torch.equal(again(THETA, SEEDS), 3.0 * THETA)
