r"""Fixtures that several folders of tests use."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from matplotlib.figure import Figure

# The same examples in every run, so that a change is what makes a test fail; HYPOTHESIS_PROFILE=explore draws others.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("explore", derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


@pytest.fixture
def rough_figures(monkeypatch):
    """Figures that are not laid out, three quarters of the time to draw one; tests of plots look at how they are."""
    monkeypatch.setattr("mlsbi.plots.style.Figure", lambda **options: Figure(**(options | {"layout": None})))


@pytest.fixture(scope="session")
def camels_folder(tmp_path_factory):
    """A folder in the format of the CAMELS spectra: 40 made-up universes, 39 wavenumbers. Copy it to change it."""
    folder = tmp_path_factory.mktemp("camels")
    generator = np.random.default_rng(0)
    rows, k = 40, np.geomspace(0.36, 9.9, 39)
    # A Latin hypercube, as the real suite: no parameter value occurs twice.
    unit = np.stack([(generator.permutation(rows) + 0.5) / rows for _ in range(6)], 1)
    low_edges, high_edges = np.array([0.1, 0.6, 0.25, 0.25, 0.5, 0.5]), np.array([0.5, 1.0, 4.0, 4.0, 2.0, 2.0])
    theta = np.round(low_edges + unit * (high_edges - low_edges), 5)
    low = 300 * theta[:, 1:2] ** 2 * (theta[:, 0:1] / 0.3) ** 0.5 * k**-1.8
    high = low * (1 - 0.05 * theta[:, 2:3] * k / k[-1])
    np.save(folder / "combined_data_k.npy", k)
    np.save(folder / "combined_data_pk.npy", high)
    np.save(folder / "combined_data_pk_low_fid.npy", low)
    lines = ["#Name  Omega_m sigma_8 A_SN1   A_AGN1  A_SN2   A_AGN2  seed"]
    lines += [f"  LH_{i} " + " ".join(f"{value:.5f}" for value in row) + f" {i}" for i, row in enumerate(theta)]
    (folder / "CosmoAstroSeed_Synthetic_LH.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def real_camels_folder():
    """The real CAMELS spectra, which the project does not ship; tests that need them are skipped without."""
    beside = Path(__file__).parents[2] / "shared" / "data" / "camels"
    folder = Path(os.environ.get("MLSBI_CAMELS", beside))
    if not folder.is_dir():
        pytest.skip("needs the CAMELS spectra: set MLSBI_CAMELS to their folder")
    return folder
