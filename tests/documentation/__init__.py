"""The documentation's commands, found by what they look like and run for real at a tiny size.

    commands.py   text -> the commands and Python lines that are printed in it
    checkout.py   a copy of the checkout in which a page's commands run in order, by bash
    server.py     the `python` of that copy: forks of one process that has imported everything
    tiny.py       what the server adds to a command line, and what it lays where a command looks for its input

`python -m tests.documentation` prints every command with what became of it; arguments choose the pages.
"""
