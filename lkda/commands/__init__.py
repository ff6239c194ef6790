"""The commands: one function each, which takes a composed configuration, writes files and returns a result.

The functions are in files of their own names, which scripts/ and `lkda COMMAND` call through `entry_point`. What they
share is in the sub-packages. The modules of `studies`, and `sweeps.grid`, are commands of their own (`python -m`).
"""
