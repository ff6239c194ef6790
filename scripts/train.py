"""Train a language model: `python scripts/train.py --help`."""

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lkda.commands.command_line import readable_errors


@hydra.main(version_base="1.3", config_path="../configs", config_name="train")
def main(cfg: DictConfig) -> None:
    with readable_errors():
        from lkda.commands.train import train  # here, so that --help need not wait for torch

        train(cfg, HydraConfig.get().runtime.output_dir)


if __name__ == "__main__":
    with readable_errors():
        main()
