"""Measure the operators: `python scripts/benchmark.py --help`."""

import hydra
from omegaconf import DictConfig

from lkda.commands.command_line import readable_errors


@hydra.main(version_base="1.3", config_path="../configs", config_name="benchmark")
def main(cfg: DictConfig) -> None:
    with readable_errors():
        from lkda.commands.benchmark import benchmark

        benchmark(cfg)


if __name__ == "__main__":
    with readable_errors():
        main()
