"""Imports go one way, and heavy packages are imported where they are used."""

import ast
import graphlib
import importlib.metadata
import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

import lkda

HOME = Path(lkda.__file__).parent
# What each package and sub-package may import of the others; "ops.*" is all of ops. A sub-package that is not listed
# counts to its package. Everything may import the modules of "base" and the version in `lkda`.
OPERATOR = {"ops.tensors", "ops.runtime", "ops.column_sums"}
MAY_IMPORT: dict[str, set[str]] = {
    "base": set(),  # the modules of lkda/ itself, such as checks.py, device.py, io.py, metrics_file.py, records.py
    "ops.tensors": set(),  # lkda/ops/checks.py, derivatives.py, precision.py, recurrence.py, sequences.py
    "ops.runtime": {"ops.tensors"},
    "ops.column_sums": {"ops.runtime"},
    "ops.gated_norm": OPERATOR,
    "ops.residual_norm": OPERATOR,
    "ops.short_conv": OPERATOR,
    "ops.softmax": OPERATOR,
    "ops.swiglu": OPERATOR,
    "ops.products": {"ops.tensors", "ops.runtime"},
    "ops.rows": {"ops.runtime"},
    "ops.cross_entropy": {"ops.tensors", "ops.runtime", "ops.products"},
    "ops.sampling": OPERATOR,
    "ops.token_linear": OPERATOR | {"ops.gated_norm", "ops.swiglu"},
    "ops.simplified.reference": {"ops.tensors"},
    "ops.simplified.cuda": OPERATOR,
    "ops.simplified.cpu": OPERATOR,
    "ops.simplified": OPERATOR
    | {"ops.short_conv", "ops.simplified.reference", "ops.simplified.cuda", "ops.simplified.cpu"},
    "ops.kda.reference": {"ops.tensors"},
    "ops.kda.cuda": OPERATOR | {"ops.short_conv", "ops.gated_norm", "ops.kda.reference"},
    "ops.kda.cpu": OPERATOR | {"ops.kda.reference"},
    "ops.kda": OPERATOR | {"ops.short_conv", "ops.kda.reference", "ops.kda.cuda", "ops.kda.cpu"},
    "ops": {"ops.*"},  # lkda/ops/__init__.py, which names what is public
    "models": {"ops.*"},
    "training": {"models", "ops.*"},
    "training.callbacks": {"training", "models"},
    "formats.common": {"models"},
    "formats": {"formats.common", "models"},
    "data": set(),
    "data.text": {"data"},
    "data.prose": {"data", "data.text"},
    "data.synthetic": {"data"},
    "bench": {"integrations", "models", "ops.*", "data.synthetic"},
    "bench.ops": {"bench", "ops.*"},
    "bench.notes": {"bench", "bench.ops", "ops.*"},
    "report.read": set(),
    "report.draw": {"report.read"},
    "report.operators": {"report.read", "report.draw"},
    "report.tradeoff": {"report.read", "report.draw", "report.operators", "report.studies"},
    "report.training": {"report.read", "report.draw", "report.operators", "report.tradeoff"},
    "report.studies": {"report.read", "report.draw"},
    "report": {"report.*"},  # readme.py and redraw.py, which call the others
    "generation": {"models", "ops.*", "data.text"},
    "layers": {"models", "ops.*"},
    "integrations": {"ops.*"},
    # One file a script: `entry_point` starts them, and `train` is also what benchmarks and studies measure.
    "commands.command_line": {"generation"},
    "commands.settings": {"commands.command_line", "models", "data.*"},
    "commands.run": {
        "commands.command_line",
        "commands.settings",
        "models",
        "training.*",
        "formats.*",
        "data.*",
        "report.read",
    },
    "commands.train": {"commands.command_line", "commands.run", "models", "training.*"},
    "commands.sweeps": {"commands.command_line", "commands.settings", "commands.run", "data", "report.draw"},
    "commands.benchmarks": {
        "commands.command_line",
        "commands.settings",
        "commands.run",
        "commands.train",
        "integrations",
        "ops.*",
        "models",
        "formats",
        "training.*",
        "bench.*",
        "report.*",
    },
    "commands.studies": {
        "commands.command_line",
        "commands.settings",
        "commands.run",
        "commands.train",
        "commands.sweeps",
        "commands.benchmarks",
        "models",
        "training.*",
        "data.*",
        "bench",
        "report.*",
    },
    "commands": {
        "commands.*",
        "integrations",
        "ops.*",
        "models",
        "generation",
        "training.*",
        "formats.*",
        "data.*",
        "bench.*",
        "report.*",
    },
    "top": {"formats.*", "models", "generation", "commands"},  # lkda/__init__.py and __main__.py
}
# Other packages, and the packages of lkda whose modules may import them at all.
ONLY_IN = {
    "hydra": {"commands"},
    "datasets": {"data"},
    "wandb": {"training", "commands"},
    "transformers": {"formats", "commands", "bench", "integrations"},
    "fla": {"commands", "bench", "bench.ops", "integrations"},
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
                    assert child.level == 0, f"{path}: relative imports hide which package they reach"
                    found.extend(f"{child.module}.{alias.name}" for alias in child.names)
            walk(child, function)

    walk(_parsed(path, path.stat().st_mtime_ns), False)
    return found


@cache
def _parsed(path: Path, changed: int) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def place(module: str) -> str | None:
    """The entry of MAY_IMPORT that a module of lkda, "ops.kda.op", counts to; None where there is none."""
    if module in ("", "__main__"):
        return "top"
    package, _, rest = module.partition(".")
    if not rest and (HOME / f"{module}.py").exists():
        return "base"
    if package == "ops" and rest and (HOME / "ops" / f"{rest}.py").exists():
        return "ops.tensors"
    while module and module not in MAY_IMPORT:
        module = module.rpartition(".")[0]
    return module or None


def module_of(path: Path) -> str:
    """ "ops.kda.op", "ops" for lkda/ops/__init__.py, "" for lkda/__init__.py."""
    return ".".join(path.relative_to(HOME).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


MODULES = {module_of(path): path for path in FILES}


def target(name: str, modules: Mapping[str, Path] = MODULES) -> str:
    """The module that "lkda.ops.kda.op.kda_attention", as `imports` gives it, is imported from."""
    module = name.removeprefix("lkda").removeprefix(".")
    return module if module in modules else module.rpartition(".")[0]


def check_no_circle(modules: Mapping[str, Path]) -> None:
    """Raises CycleError where modules import each other; imports inside functions count."""
    graph = {
        module: {target(name, modules) for name in imports(path) if name.partition(".")[0] == "lkda"} - {module}
        for module, path in modules.items()
    }
    list(graphlib.TopologicalSorter(graph).static_order())


def test_every_package_is_listed() -> None:
    assert [module for module in MODULES if place(module) is None] == []


def test_every_operator_is_listed() -> None:
    assert [
        path.parent.name for path in HOME.glob("ops/*/__init__.py") if f"ops.{path.parent.name}" not in MAY_IMPORT
    ] == []


def test_the_layers_have_no_circle() -> None:
    table = {
        here: {there for there in MAY_IMPORT if any(fits(there, allowed) for allowed in may)} - {here}
        for here, may in MAY_IMPORT.items()
    }
    list(graphlib.TopologicalSorter(table).static_order())


def test_the_modules_have_no_circle() -> None:
    check_no_circle(MODULES)


def test_a_circle_is_found(tmp_path: Path) -> None:
    modules = {"report.benchmark": tmp_path / "benchmark.py", "report.plots": tmp_path / "plots.py"}
    modules["report.plots"].write_text("from lkda.report.benchmark import Row\n")
    modules["report.benchmark"].write_text("def times(rows):\n    import lkda.report.units\n")
    check_no_circle(modules)
    modules["report.benchmark"].write_text("def times(rows):\n    from lkda.report import plots\n")
    with pytest.raises(graphlib.CycleError):
        check_no_circle(modules)


def fits(there: str, allowed: str) -> bool:
    return there == allowed or (allowed.endswith(".*") and f"{there}.".startswith(allowed[:-1]))


def amiss(here: str, name: str) -> bool:
    """Whether the modules that count to an entry of MAY_IMPORT must not import that name."""
    package = name.partition(".")[0]
    if package != "lkda":
        return (
            here.partition(".")[0] not in ONLY_IN.get(package, {here.partition(".")[0]})
            or package == "pytorch_lightning"
        )
    there = place(target(name))
    version = name in ("lkda", "lkda.__version__")
    return not version and there not in (here, "base") and not any(fits(str(there), may) for may in MAY_IMPORT[here])


@pytest.mark.parametrize("here", MAY_IMPORT)
def test_imports_go_one_way(here: str) -> None:
    paths = [path for module, path in MODULES.items() if place(module) == here]
    found = [f"{path.relative_to(HOME)}: {name}" for path in paths for name in imports(path) if amiss(here, name)]
    assert paths
    assert found == []


@pytest.mark.parametrize(
    ("here", "name"),
    [
        ("ops", "lkda.models.build"),
        ("ops.runtime", "lkda.ops.kda.op"),
        ("ops.tensors", "lkda.ops.kda_attention"),
        ("ops.kda.reference", "lkda.ops.kda.cuda.core"),
        ("data.text", "lkda.data.synthetic.datamodule"),
        ("data.synthetic", "lkda.data.text.tokenizer"),
        ("report.read", "lkda.report.draw.style"),
        ("report.operators", "lkda.report.training.table"),
        ("report.draw", "lkda.bench.files"),
        ("base", "lkda.ops.sequences"),
        ("formats.common", "lkda.formats.hf"),
        ("training", "hydra.utils.instantiate"),
        ("commands", "pytorch_lightning.Trainer"),
        ("commands.command_line", "lkda.commands.settings.config.resolve"),
        ("commands.run", "lkda.commands.train.train"),
        ("commands.train", "lkda.commands.sweeps.grid"),
        ("commands.sweeps", "lkda.commands.benchmarks.row_process"),
        ("commands.benchmarks", "lkda.commands.studies.scaling"),
        ("commands.studies", "lkda.commands.evaluate.evaluate"),
    ],
)
def test_what_goes_back_is_amiss(here: str, name: str) -> None:
    assert amiss(here, name)


@pytest.mark.parametrize(
    ("here", "name"),
    [
        ("commands", "hydra.utils.instantiate"),
        ("commands.run", "hydra.utils.instantiate"),
        ("commands.benchmarks", "lkda.commands.train.train"),
        ("commands.studies", "lkda.commands.sweeps.sweep_gpus.visible_gpus"),
        ("models", "lkda.ops.kda_attention"),
        ("ops.kda", "lkda.ops.runtime.backend.choose"),
        ("ops.runtime", "lkda.ops.runtime.jit"),
        ("data.prose", "lkda.data.text.tokenize.tokenize_splits"),
        ("bench", "lkda.__version__"),
        ("report.read", "lkda.checks.InputError"),
    ],
)
def test_what_goes_down_is_not(here: str, name: str) -> None:
    assert not amiss(here, name)


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    found = {
        path.relative_to(HOME): {name.split(".")[0] for name in imports(path, at_import_only=True)} for path in FILES
    }
    assert {path: heavy for path, names in found.items() if (heavy := names & NEVER_AT_IMPORT)} == {}


@pytest.mark.slow
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


@pytest.mark.slow
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
