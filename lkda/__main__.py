"""`python -m lkda` is the console command `lkda`."""

from lkda.commands.entry_point import main

if __name__ == "__main__":
    main()
