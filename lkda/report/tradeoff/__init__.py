"""Which mixer to choose: accuracy, speed and memory side by side, from runs and benchmarks."""
