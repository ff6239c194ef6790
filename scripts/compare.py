"""Compare runs: `python scripts/compare.py --help`."""

from lkda.commands.entry_point import run_script

if __name__ == "__main__":
    run_script("compare")
