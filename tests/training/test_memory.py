import re

import pytest
import torch
from trainings import MIXTURE, make_members, message_of, train

from mlsbi.training import memory
from mlsbi.training.descent import Objective
from mlsbi.training.options import TrainingOptions
from mlsbi.training.stack import Stack

FULL = TrainingOptions(epochs=2, batch_size=None)


@pytest.fixture
def small_device(monkeypatch):
    """Makes a device on which only so many rows of all networks fit; a tenth of the memory does without gradients."""

    def make(most):
        def limit(name, rows_of):
            whole = getattr(Stack, name)

            def limited(self, *given):
                if rows_of(*given) > (most if torch.is_grad_enabled() else 10 * most):
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")
                return whole(self, *given)

            monkeypatch.setattr(Stack, name, limited)

        limit("together", lambda flat, input, condition, keep: input.shape[0] * input.shape[1])
        limit("as_is", lambda member, input, condition, keep: input.shape[1])

    return make


def told(message):
    """Rows asked for, networks, and the batch that an error advises."""
    found = re.fullmatch(r"The device ran out of memory with (\d+) rows of (\d+) networks? in a step; (\d+) rows fit\. "
                         r"Set batch_size=(\d+)\.", message)
    assert found, message
    asked, members, fit, advised = map(int, found.groups())
    assert fit == advised
    return asked, members, advised


@pytest.mark.parametrize(("n", "most"), [
    ((1000,), 700), ((1000,), 300), ((1000, 200), 1100), ((1000, 200), 700), ((1000, 200), 450),
    ((1000, 1000), 1100), ((600, 500, 400), 1200),
])
@pytest.mark.parametrize("objective", [Objective(), Objective(rescale=True)], ids=["at once", "by halves"])
@pytest.mark.parametrize("together", [True, False])
def test_the_batch_that_an_error_advises_fits(small_device, n, most, objective, together):
    members = 3 if together else 1
    options = TrainingOptions(epochs=2, batch_size=None, together=together)
    small_device(most * members)

    def call(size):
        named = {name: getattr(options, name) for name in options.__dataclass_fields__} | {"batch_size": size}
        return train(make_members(members, MIXTURE, n=n, fraction=0), objective, TrainingOptions(**named))

    try:
        call(None)
    except Exception as error:
        asked, count, advised = told(str(error))
    else:
        assert objective.rescale  # half by half, each fits
        return
    assert asked == sum(n)
    assert count == members
    assert 1 <= advised < asked
    call(advised)


def test_the_cause_is_kept(small_device):
    small_device(100)
    with pytest.raises(Exception, match="ran out of memory") as caught:
        train(make_members(1, MIXTURE, n=(1000,), fraction=0), options=FULL)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_a_network_too_large_for_any_row(small_device):
    small_device(0)
    assert "the network is too large" in message_of(
        lambda: train(make_members(1, MIXTURE, fraction=0), options=FULL))


def test_rows_held_out_need_not_fit_at_once(small_device):
    """A smaller batch is no help where what does not fit are the rows that are scored."""
    small_device(200)
    history, = train(make_members(1, MIXTURE, n=(8000,), fraction=0.4),
                     options=TrainingOptions(epochs=2, batch_size=100))
    assert len(history.epochs) == 2


class Recorded:
    """A C library that takes down what it is asked for."""

    def __init__(self):
        self.options, self.trimmed = [], 0

    def mallopt(self, option, value):
        self.options.append((option, value))

    def malloc_trim(self, keep):
        self.trimmed += 1


def test_memory_is_kept_for_the_time_of_a_training(monkeypatch):
    library = Recorded()
    monkeypatch.setattr(memory, "_glibc", lambda: library)

    def fail():
        with memory.kept_memory():
            assert dict(library.options)[-1] == 256 << 20
            assert not library.trimmed
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert library.trimmed == 1
    assert dict(library.options)[-1] < 256 << 20  # the last of each option holds
    assert set(dict(library.options)) == {-1, -2, -3}


def test_other_c_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("musl", "1.2"))
    memory._glibc.cache_clear()
    try:
        with memory.kept_memory():
            assert memory._glibc() is None
    finally:
        memory._glibc.cache_clear()


def test_trainings_within_trainings_keep_their_results():
    with memory.kept_memory():
        one, = train(make_members(1, MIXTURE), options=FULL)
    other, = train(make_members(1, MIXTURE), options=FULL)
    assert one.epochs == other.epochs
