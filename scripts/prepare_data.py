"""Download and tokenize a mix of public texts, or tokenize your own files: `python scripts/prepare_data.py --help`."""

from lkda.commands.entry_point import run_script

if __name__ == "__main__":
    run_script("prepare-data")
