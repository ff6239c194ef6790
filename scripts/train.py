"""Train a language model: `python scripts/train.py --help`."""

from lkda.commands.entry_point import run_script

if __name__ == "__main__":
    run_script("train")
