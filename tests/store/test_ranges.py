import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mlsbi.store.ranges import Ranges

INDICES = st.sets(st.integers(0, 30))


@given(INDICES, INDICES)
def test_ranges_are_sets(one, other):
    a, b = Ranges.of(list(one)), Ranges.of(list(other))
    assert set((a | b).indices().tolist()) == one | other
    assert set((a - b).indices().tolist()) == one - other
    assert set((a & b).indices().tolist()) == one & other
    assert (a | b) == Ranges.of(sorted(one | other))
    assert (a - b) == Ranges.of(sorted(one - other))
    everything = np.arange(40)
    assert np.flatnonzero(a.holds(everything)).tolist() == sorted(one)
    assert a.rank(everything).tolist() == [sum(i < j for i in one) for j in range(40)]
    assert len(a) == len(one)
