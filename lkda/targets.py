"""What stands for a target where nothing is predicted."""

# The default `ignore_index` of torch's losses.
IGNORE_INDEX = -100
