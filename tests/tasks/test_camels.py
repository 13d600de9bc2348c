import math
import shutil

import numpy as np
import pytest
import torch

from mlsbi import tasks
from mlsbi.tasks.camels import read


@pytest.fixture
def folder(camels_folder, tmp_path):
    """A copy to break."""
    return shutil.copytree(camels_folder, tmp_path / "camels")


def catalogue_rows(catalogue, theta):
    """Catalogue row of each theta; values are those of a Latin hypercube, so that there is one."""
    distance = np.abs(theta[:, None, :].double().numpy() - catalogue.theta[None]).max(-1)
    assert (distance.min(1) < 1e-6).all()  # float32 rounding
    return distance.argmin(1)


def noise_of(catalogue, rows, x, power):
    clean = power[rows]
    return (x.double().numpy() / catalogue.k - clean) / (0.2 * (0.05 + clean))


@pytest.mark.parametrize("split", ["clean", "leaky"])
def test_split_sizes(camels_folder, split):
    catalogue = read(camels_folder, ["sigma_8"])
    task = tasks.get("camels", data=camels_folder, split=split)
    assert task.budgets == (((23, 1),) if split == "clean" else ((39, 1),))
    data = task.simulate(task.budgets[0], 0)
    low, pairs = (set(catalogue_rows(catalogue, level.theta)) for level in data)
    test = set(catalogue_rows(catalogue, task.test(None, 0)[0]))
    assert len(test) == task.test_rows == (16 if split == "clean" else 39)
    if split == "clean":
        assert len(low | pairs | test) == len(low) + len(pairs) + len(test) == 40
    else:
        assert pairs == {0}
        assert low == test == set(range(1, 40))  # it leaks, as published


def test_seeds_are_splits_and_noise_draws(camels_folder):
    task, catalogue = tasks.get("camels", data=camels_folder), read(camels_folder, ["sigma_8"])
    splits = [set(catalogue_rows(catalogue, task.test(None, seed)[0])) for seed in range(4)]
    assert len({frozenset(split) for split in splits}) == 4
    shared = sorted(splits[0] & splits[1])[0]
    value = torch.tensor(catalogue.theta[shared], dtype=torch.float32)
    one, other = (x[(theta == value).all(1)] for theta, x in (task.test(None, seed) for seed in (0, 1)))
    assert len(one) == len(other) == 1
    assert not torch.equal(one, other)


def test_no_test_row_is_ever_a_training_row(camels_folder):
    task, catalogue = tasks.get("camels", data=camels_folder), read(camels_folder, ["sigma_8"])
    test = set(catalogue_rows(catalogue, task.test(None, 7)[0]))
    for n in [(23, 1), (1, 23), (12, 12), (3, 4)]:
        for level in task.simulate(n, 7):
            assert not test & set(catalogue_rows(catalogue, level.theta))


def test_matched_noise_is_one_draw_a_row(camels_folder):
    catalogue = read(camels_folder, ["Omega_m", "sigma_8"])
    task = tasks.get("camels", data=camels_folder, parameters=("Omega_m", "sigma_8"))
    pairs = task.simulate((2, 22), 0).levels[1]
    rows = catalogue_rows(catalogue, pairs.theta)
    fine, coarse = (noise_of(catalogue, rows, x, power)
                    for x, power in ((pairs.fine, catalogue.high), (pairs.coarse, catalogue.low)))
    assert np.abs(fine - coarse).max() < 1e-4  # x is float32: 1e-7 over the noise's 0.2, and some room
    n = fine.size
    assert abs(fine.mean()) < 4 / math.sqrt(n)  # 4 standard errors of a standard normal's mean and sd
    assert abs(fine.std() - 1) < 4 / math.sqrt(2 * n)


def test_unmatched_noise_is_two_draws(camels_folder):
    catalogue = read(camels_folder, ["sigma_8"])
    pairs = tasks.get("camels", data=camels_folder, noise="unmatched").simulate((2, 22), 0).levels[1]
    rows = catalogue_rows(catalogue, pairs.theta)
    fine, coarse = (noise_of(catalogue, rows, x, power)
                    for x, power in ((pairs.fine, catalogue.high), (pairs.coarse, catalogue.low)))
    assert abs((fine * coarse).mean()) < 4 / math.sqrt(fine.size)
    assert abs(coarse.std() - 1) < 4 / math.sqrt(2 * fine.size)


def test_a_row_has_the_same_noise_for_any_n(camels_folder):
    # From the two ends of the training rows, a row may be a pair for one n and a low row for another.
    task = tasks.get("camels", data=camels_folder)
    pairs, low = task.simulate((1, 20), 0).levels[1], task.simulate((20, 1), 0).levels[0]
    same = (pairs.theta[:, None] == low.theta[None]).all(-1)
    assert same.sum() == 16
    fine, other = same.nonzero(as_tuple=True)
    assert torch.equal(pairs.coarse[fine], low.fine[other])


def test_parameters_are_the_columns_named(camels_folder):
    both = tasks.get("camels", data=camels_folder, parameters=("Omega_m", "sigma_8"))
    swapped = tasks.get("camels", data=camels_folder, parameters=("sigma_8", "Omega_m"))
    one = tasks.get("camels", data=str(camels_folder))
    theta = both.test(None, 0)[0]
    assert torch.equal(theta.flip(1), swapped.test(None, 0)[0])
    assert torch.equal(theta[:, 1:], one.test(None, 0)[0])
    assert both.prior.names == ("Omega_m", "sigma_8")
    assert one.prior.log_prob(torch.tensor([0.8])).item() == pytest.approx(0.916, abs=5e-4)  # -log 0.4
    line = (camels_folder / "CosmoAstroSeed_Synthetic_LH.txt").read_text().splitlines()[1].split()
    assert read(camels_folder, ["sigma_8"]).theta[0, 0] == float(line[2])


def test_too_many_rows_are_refused(camels_folder):
    task = tasks.get("camels", data=camels_folder)
    with pytest.raises(ValueError, match="at most 24 training rows.*got 24 \\+ 1"):
        task.simulate((24, 1), 0)
    with pytest.raises(ValueError, match="between 1 and 16 test rows; got 17"):
        task.test(17, 0)
    leaky = tasks.get("camels", data=camels_folder, split="leaky")
    with pytest.raises(ValueError, match=r"at most \(39, 1\) rows"):
        leaky.simulate((39, 2), 0)


def test_absent_data_says_where_to_get_them(folder, monkeypatch):
    monkeypatch.delenv("MLSBI_CAMELS", raising=False)
    everything = "camels.readthedocs.io.*combined_data_k.npy.*combined_data_pk_low_fid.npy.*--data.*MLSBI_CAMELS"
    with pytest.raises(FileNotFoundError, match=everything):
        tasks.get("camels")
    with pytest.raises(FileNotFoundError, match="none at .*nowhere.*" + everything):
        tasks.get("camels", data=folder / "nowhere")
    monkeypatch.setenv("MLSBI_CAMELS", str(folder))
    assert tasks.get("camels").test_rows == 16
    (folder / "combined_data_pk_low_fid.npy").unlink()
    with pytest.raises(FileNotFoundError, match="There is no .*combined_data_pk_low_fid.npy"):
        tasks.get("camels")


def test_wrong_files_are_named(folder):
    high = np.load(folder / "combined_data_pk.npy")

    def broken(name, array, match):
        good = np.load(folder / name)
        np.save(folder / name, array)
        with pytest.raises(ValueError, match=match):
            tasks.get("camels", data=folder)
        np.save(folder / name, good)

    broken("combined_data_pk.npy", high[0], r"combined_data_pk.npy of shape \(rows, wavenumbers\); got \(39,\)")
    broken("combined_data_pk.npy", high[:, :38], r"combined_data_pk.npy of shape \(rows, 39\).*got \(40, 38\)")
    broken("combined_data_pk_low_fid.npy", high[:30], r"low_fid.npy of shape \(40, 39\).*got \(30, 39\)")
    broken("combined_data_pk.npy", np.where(high == high[3, 3], np.nan, high), "pk.npy to hold finite, positive")
    broken("combined_data_k.npy", -np.load(folder / "combined_data_k.npy"), "k.npy to hold finite, positive")
    broken("combined_data_k.npy", np.array([{"a": 1}]), "allow_pickle=False")


def test_wrong_parameter_files_are_named(folder):
    path = folder / "CosmoAstroSeed_Synthetic_LH.txt"
    text = path.read_text()

    def broken(changed, match):
        path.write_text(changed)
        with pytest.raises(ValueError, match=match):
            tasks.get("camels", data=folder)
        path.write_text(text)

    broken(text.replace("sigma_8", "s8"), "names the columns.*sigma_8")
    broken("\n".join(text.splitlines()[:-1]), "Expected 40 rows in .*CosmoAstroSeed.*got 39")
    broken("", "names the columns")
    broken("\n".join([*text.splitlines()[:-1], "LH_39 0.3 word"]), "Expected 8 columns.*numbers")
    broken("\n".join([*text.splitlines()[:-1], "LH_39 0.3 8.0 1 1 1 1 39"]), "sigma_8 between 0.6 and 1.0")
    broken("\n".join([*text.splitlines()[:-1], "LH_39 0.3 nan 1 1 1 1 39"]), "sigma_8 between 0.6 and 1.0")
    path.with_name("CosmoAstroSeed_other.txt").write_text(text)
    with pytest.raises(FileNotFoundError, match="Expected one file"):
        tasks.get("camels", data=folder)


@pytest.mark.parametrize(("options", "match"), [
    ({"parameters": ("h",)}, "parameters out of"),
    ({"parameters": ()}, "parameters out of"),
    ({"parameters": ("sigma_8", "sigma_8")}, "each once"),
    ({"split": "random"}, "split='clean'"),
    ({"noise": True}, "noise='matched'"),
])
def test_wrong_options_are_named(camels_folder, options, match):
    with pytest.raises(ValueError, match=match):
        tasks.get("camels", data=camels_folder, **options)


def test_real_data(real_camels_folder):
    task = tasks.get("camels", data=real_camels_folder)
    assert task.budgets == ((580, 20),)
    assert task.simulate((580, 20), 0).n == (580, 20)
    assert task.test(None, 0)[1].shape == (400, 39)
    leaky = tasks.get("camels", data=real_camels_folder, split="leaky")
    assert leaky.simulate(leaky.budgets[0], 0).n == (980, 20)
    catalogue = read(real_camels_folder, ["Omega_m", "sigma_8"])
    correlation = [np.corrcoef(catalogue.low[:, i], catalogue.high[:, i])[0, 1] for i in (0, -1)]
    assert correlation == pytest.approx([0.9999, 0.93], abs=0.01)  # rows are aligned
    assert abs(np.corrcoef(catalogue.low[:, 0], np.roll(catalogue.high[:, 0], 1))[0, 1]) < 0.2
    # The published noisy array has the noise that this task draws: mean 0 and sd 1, to 4 standard errors.
    published = real_camels_folder / "x_high.npy"
    if published.is_file():
        x = torch.from_numpy(np.load(published))
        noise = noise_of(catalogue, np.arange(1000), x, catalogue.high)
        assert abs(noise.mean()) < 4 / math.sqrt(noise.size)
        assert abs(noise.std() - 1) < 4 / math.sqrt(2 * noise.size)
