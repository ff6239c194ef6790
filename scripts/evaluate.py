"""Measure a trained model: `python scripts/evaluate.py --help`."""

from lkda.commands.entry_point import run_script

if __name__ == "__main__":
    run_script("evaluate")
