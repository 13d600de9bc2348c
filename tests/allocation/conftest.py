r"""Makes `stacks`, which the tests of this folder import, importable, and trains the pilot's networks briefly."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))


@pytest.fixture
def brief(monkeypatch):
    """Where it does not matter how well networks are trained."""
    from stacks import BRIEF

    monkeypatch.setattr("mlsbi.allocation.networks._TRAINING", BRIEF)
