"""`--help` can be read by a person, and comes at once."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.py"))


def helped(script: str) -> str:
    """What the script prints; fails where it needed torch for that."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{script}', '--help']\n"
        f"try: runpy.run_path({str(ROOT / 'scripts' / script)!r}, run_name='__main__')\n"
        "except SystemExit as ending: assert not ending.code\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.sample(7)
@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_how_to_call_it(script: str) -> None:
    text = helped(script)
    assert f"python scripts/{script} " in text  # an example to copy
    assert "hydra.help" not in text
    assert len(text.splitlines()) < 60
    configs = ROOT / "configs"
    groups = tuple(f"{path.relative_to(configs)}: " for path in configs.rglob("*") if path.is_dir())
    ours = [line for line in text.splitlines() if not line.startswith(groups)]  # Hydra lists choices on one line
    assert max(map(len, ours)) <= 120


def test_help_of_training_names_every_choice() -> None:
    text = helped("train.py")
    for path in (ROOT / "configs").glob("*/*.yaml"):
        (line,) = (line for line in text.splitlines() if line.startswith(f"{path.parent.name}: "))
        assert path.stem in line.split(": ")[1].split(", ")
    for setting in ("trainer.max_steps=", "trainer.max_tokens=", "seed=", "backend=", "resume=true", "hydra.run.dir="):
        assert setting in text


def test_preparing_data_does_without_torch() -> None:
    """Its import would take a third of the memory of a preparation."""
    code = "import lkda.commands.prepare_data, sys; assert not {'torch', 'lightning'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
