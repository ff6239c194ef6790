"""Measure a trained model: `python scripts/evaluate.py --help`."""

import hydra
from omegaconf import DictConfig

from lkda.commands.command_line import readable_errors


@hydra.main(version_base="1.3", config_path="../configs", config_name="evaluate")
def main(cfg: DictConfig) -> None:
    with readable_errors():
        from lkda.commands.evaluate import evaluate  # here, so that --help need not wait for torch

        evaluate(cfg)


if __name__ == "__main__":
    with readable_errors():
        main()
