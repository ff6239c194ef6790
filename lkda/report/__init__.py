"""From the files of runs and benchmarks to tables, plots and pages. Imports nothing else of lkda."""
