import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlsbi import tasks

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("index", range(len(BLOCKS)))
def test_every_python_block_runs_as_printed(index, tmp_path):
    done = subprocess.run([sys.executable, "-c", BLOCKS[index]], cwd=tmp_path, capture_output=True, text=True,
                          check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    if index == 0:
        assert "euler" in done.stdout
        assert (tmp_path / "runs/example/posterior.png").stat().st_size > 10_000
        assert (tmp_path / "runs/example/npe/model.json").is_file()


def test_the_example_is_the_public_contract():
    for name in ("Level(", "LevelStack(", "pilot(", "optimal_allocation(", "simulate(", "NPE(", ".posterior(",
                 ".sample(", ".save(", "mlsbi.load("):
        assert name in BLOCKS[0]


def test_every_task_is_in_the_table():
    for name in tasks.names():
        assert re.search(rf"^\| `{name}`", README, flags=re.MULTILINE)


def test_pictures_exist():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file()


def test_make_targets_named_in_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make (\w+)", README)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
