"""Write a trained model into a directory that other programs can load: `python scripts/export.py --help`."""

from lkda.commands.entry_point import run_script

if __name__ == "__main__":
    run_script("export")
