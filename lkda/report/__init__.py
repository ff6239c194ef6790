"""Makes tables, plots and pages of the files of runs and benchmarks. It imports no other package of lkda."""
