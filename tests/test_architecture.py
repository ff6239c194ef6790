"""Imports go one way, and heavy packages are imported where they are used."""

import ast
import importlib.metadata
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lkda

HOME = Path(lkda.__file__).parent
# What each room may import of the others. `data` and `report` stand alone; `commands` may import all.
MAY_IMPORT: dict[str, set[str]] = {
    "ops": set(),
    "models": {"ops"},
    "training": {"models", "ops"},
    "formats": {"models", "ops"},
    "bench": {"models", "ops"},
    "data": set(),
    "report": set(),
    "commands": {"ops", "models", "training", "formats", "bench", "data", "report"},
}
EVERYWHERE = "everywhere"
# Packages and the rooms whose modules may import them at all.
ONLY_IN = {
    "hydra": {"commands"},
    "datasets": {"data"},
    "wandb": {"training"},
    "transformers": {"formats"},
    "lm_eval": {"commands"},
}
# Packages that must not load with the package that uses them.
NEVER_AT_IMPORT = {"wandb", "datasets", "transformers", "gguf", "lm_eval"}

FILES = sorted(HOME.rglob("*.py"))


def imports(path: Path, *, at_import_only: bool = False) -> list[str]:
    """The absolute names that a file imports; those inside functions only on demand, type-checking blocks never."""
    found: list[str] = []

    def walk(node: ast.AST, inside_function: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            function = inside_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if not (at_import_only and inside_function):
                if isinstance(child, ast.Import):
                    found.extend(alias.name for alias in child.names)
                elif isinstance(child, ast.ImportFrom):
                    assert child.level == 0, f"{path}: relative imports hide which room they reach"
                    found.extend(f"{child.module}.{alias.name}" for alias in child.names)
            walk(child, function)

    walk(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


def room(path: Path) -> str:
    parts = path.relative_to(HOME).parts
    return parts[0] if len(parts) > 1 else EVERYWHERE


def test_every_room_is_listed() -> None:
    rooms = {path.name for path in HOME.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert rooms <= set(MAY_IMPORT)


def amiss(here: str, name: str) -> bool:
    """Whether a module of this room must not import that name."""
    package, _, rest = name.partition(".")
    there = rest.partition(".")[0]
    backwards = package == "lkda" and there in MAY_IMPORT and there != here and there not in MAY_IMPORT[here]
    return backwards or here not in ONLY_IN.get(package, {here}) or package == "pytorch_lightning"


@pytest.mark.parametrize("here", MAY_IMPORT)
def test_imports_go_one_way(here: str) -> None:
    paths = [path for path in FILES if room(path) == here]
    found = [f"{path.relative_to(HOME)}: {name}" for path in paths for name in imports(path) if amiss(here, name)]
    assert paths
    assert found == []


def test_what_goes_back_is_amiss() -> None:
    assert amiss("ops", "lkda.models.build")
    assert amiss("report", "lkda.bench.files")
    assert amiss("training", "hydra.utils.instantiate")
    assert amiss("commands", "pytorch_lightning.Trainer")
    assert not amiss("commands", "hydra.utils.instantiate")
    assert not amiss("models", "lkda.ops.runtime.backend")
    assert not amiss("ops", "lkda.ops.runtime.jit")


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    found = {
        path.relative_to(HOME): {name.split(".")[0] for name in imports(path, at_import_only=True)} for path in FILES
    }
    assert {path: heavy for path, names in found.items() if (heavy := names & NEVER_AT_IMPORT)} == {}


def test_the_ops_need_torch_alone() -> None:
    """A machine with nothing but torch can import them: everything else is hidden from the import."""
    absent = [
        "hydra",
        "omegaconf",
        "lightning",
        "datasets",
        "tokenizers",
        "safetensors",
        "wandb",
        "rich",
        "torchmetrics",
    ]
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import lkda, lkda.ops; print(lkda.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_version_is_said_once() -> None:
    pyproject = tomllib.loads((HOME.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert pyproject["project"]["version"] == lkda.__version__ == importlib.metadata.version("lkda")


def test_kernel_tests_need_no_more_than_torch(tmp_path: Path) -> None:
    """`pytest -m gpu` on a machine where the rest is not installed: its tests are found, and skipped without a GPU."""
    missing = ("hydra", "omegaconf", "datasets", "wandb", "tokenizers", "lightning", "transformers")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {missing!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:hydra_pytest", "--collect-only"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=HOME.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-500:]
    found = {line.partition("::")[0] for line in done.stdout.splitlines() if "::" in line}
    assert {
        "tests/ops/kda/test_cuda.py",
        "tests/ops/simplified/test_cuda.py",
        "tests/models/test_models_cuda.py",
    } <= found
