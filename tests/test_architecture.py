import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mlsbi

ROOT = Path(mlsbi.__file__).parent
FLOORS = [
    {"randomness", "priors", "data"},
    {"levels"},
    {"store"},
    {"simulation"},
    {"density"},
    {"training"},
    {"strategies"},
    {"allocation"},
    {"inference"},
    {"diagnostics"},
    {"tasks"},
    {"plots", "report", "loading", "cli"},
]
# Within a folder a file imports only from files listed before it.
ORDER = {
    "": ["randomness", "priors", "data", "levels", "loading"],
    "store": ["records", "ranges", "locking", "files", "manifest", "joining", "shards", "indexing", "catalogue",
              "repacking", "writing", "collecting", "summary", "store", "exporting"],
    "simulation": ["seeding", "adapters", "programs", "reading", "state", "sources", "fingerprint", "executors",
                   "merging", "opening", "execution", "progress", "terms", "scheduling", "running", "campaign",
                   "sets", "repeats"],
    "density": ["standardise", "configs", "columns", "splines", "linear", "autoregressive", "flows", "mixture_density",
                "embeddings", "registry", "conditional", "mixture"],
    "training": ["objective", "options", "history", "alignment", "regression", "weights", "stabilisers", "checkpoints",
                 "compiling", "statistics", "memory", "stack", "probing", "plan", "members", "kept", "descent",
                 "graphs", "loop"],
    "strategies": ["protocol", "coupling", "multilevel", "single_level", "transfer", "transfer_then_multilevel",
                   "turning", "translation", "stacking", "mixing", "emulation", "auto", "registry", "fitting"],
    "allocation": ["arrays", "problem", "limits", "water", "goals", "integers", "weighting", "solution", "advising",
                   "optimal", "comparing", "integrands", "moments", "networks", "checking", "pilot_report", "piloting",
                   "remeasuring", "adaptive"],
    "inference": ["observations", "ascent", "posteriors", "convergence", "mcmc", "ensemble", "hmc", "evidence",
                  "importance", "mcmc_posterior",
                  "likelihoods", "saving", "estimator", "npe", "nle", "loading", "truncated", "active", "surprise",
                  "budgeting", "sequential", "multifidelity_abc"],
    "diagnostics": ["arrays", "metrics", "calibration", "tarp", "two_sample", "predictive", "information",
                    "fidelity"],
    "tasks": ["task", "observations", "quadrature", "ou", "camels", "g_and_k", "toggle_switch", "ou2", "registry"],
    "plots": ["style", "bars", "simulations", "planning", "training", "calibration", "comparison", "posterior",
              "failures", "rounds"],
    "report": ["checking", "elements", "wording", "sections", "comparing", "strategies", "rounds", "html", "figures"],
    "cli": ["targets", "requests", "folders", "sequential", "running", "planning", "status", "main"],
}
TOP = ["plots", "report", "loading", "cli"]  # order on the highest floor
# Beside the package, and above all of it.
THEORY = Path(mlsbi.__file__).parents[1] / "theory_checks"
THEORY_ORDER = [
    "poincare", "brackets", "recognise", "joint", "drawing", "precision", "laws", "densities", "coordinates",
    "tangents", "jumps", "smoothness", "differentiating", "integrands", "measuring", "samples", "sobolev",
    "assumptions", "bounds", "scaling", "stabilising", "fitting", "sections", "wording", "report", "figure",
    "__main__", "generators", "stacks", "testing",
]  # fmt: skip
DRAWS_EXAMPLES = {"stacks", "testing", "conftest"}  # what may need hypothesis; reports do not


def floor_of(part: str) -> int:
    return next(index for index, names in enumerate(FLOORS) if part in names)


def imports_of(path: Path) -> list[str]:
    found = []
    tree = ast.parse(path.read_text())
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith("mlsbi.")]
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mlsbi":
            assert node.level == 0
            if node.module == "mlsbi":
                found += [f"mlsbi.{alias.name}" for alias in node.names if alias.name != "__version__"]
            else:
                found.append(node.module)
    return found


def violation(importer: list[str], imported: list[str]) -> str | None:
    """Why one module may not import another; both without the package's name."""
    here, there = importer[0], imported[0]
    if here == there:
        order = ORDER[here]
        if len(imported) > 1 and importer[-1] != "__init__" and order.index(imported[1]) >= order.index(importer[1]):
            return "is not listed before it in its folder"
        return None
    if floor_of(there) > floor_of(here):
        return "is on a higher floor"
    if floor_of(there) == floor_of(here):
        order = TOP if here in TOP else ORDER[""]
        if order.index(there) >= order.index(here):
            return "is not listed before it on its floor"
    return None


def modules() -> list[Path]:
    return sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    importer = list(path.relative_to(ROOT).with_suffix("").parts)
    for name in imports_of(path):
        imported = name.split(".")[1:]
        assert imported[0] in set.union(*FLOORS), f"{name} is on no floor"
        why = violation(importer, imported)
        assert why is None, f"{path.relative_to(ROOT)} imports {name}, which {why}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_is_listed(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    folder = parts[0] if len(parts) > 1 else ""
    assert parts[-1] == "__init__" or parts[-1] in ORDER[folder]


def test_an_upward_import_is_found():
    assert violation(["data"], ["training", "loop"]) == "is on a higher floor"
    assert violation(["training", "objective"], ["training", "loop"]) is not None
    assert violation(["training", "loop"], ["training", "objective"]) is None
    assert violation(["plots", "style"], ["cli", "main"]) is not None


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_say_what_they_are(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    if path.name != "__init__.py":
        assert any(isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" for node in tree.body)


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_the_package_imports_nothing_heavy():
    loaded = run_python("import sys, mlsbi; mlsbi.__dir__(); print([m for m in ('torch', 'numpy', 'matplotlib') "
                        "if m in sys.modules])")
    assert loaded == "[]"


def test_allocation_needs_no_torch():
    assert run_python("import sys; from mlsbi import optimal_allocation; print('torch' in sys.modules)") == "False"


def test_estimators_need_no_plots():
    assert run_python("import sys; from mlsbi import NPE; print([m for m in ('mlsbi.plots', 'pandas', 'scipy.stats') "
                      "if m in sys.modules])") == "[]"


def test_public_names_exist_and_complete():
    for name in mlsbi.__all__:
        assert getattr(mlsbi, name) is not None
        assert name in dir(mlsbi)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mlsbi.nonsense  # noqa: B018


def test_the_library_leaves_global_random_state_alone():
    seeding = ("manual_seed(", "np.random.seed(", "fork_rng(")
    for path in modules():
        for line in path.read_text().splitlines():
            if any(call in line for call in seeding) and "Generator(" not in line:
                assert path.name == "randomness.py", f"{path} touches global random state: {line}"


@pytest.mark.parametrize("path", sorted(THEORY.glob("*.py")), ids=lambda path: path.stem)
def test_theory_checks_import_down_and_say_what_they_are(path):
    tree = ast.parse(path.read_text())
    assert path.stem.startswith("test_") or ast.get_docstring(tree)
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    if path.stem.startswith("test_") or path.stem in ("__init__", "conftest"):
        return
    assert not {"hypothesis", "pytest"} & {name.split(".")[0] for name in imported} or path.stem in DRAWS_EXAMPLES
    assert any(isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__" for node in tree.body)
    for name in imported:
        if name.split(".")[0] == "theory_checks" and "." in name:
            assert THEORY_ORDER.index(name.split(".")[1]) < THEORY_ORDER.index(path.stem), f"{path.name} imports {name}"


def test_the_package_does_not_import_its_theory_checks():
    assert not [path for path in ROOT.rglob("*.py") if "theory_checks" in path.read_text()]
