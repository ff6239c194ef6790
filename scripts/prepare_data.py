"""Assemble the offline prose mix: `python scripts/prepare_data.py --help`."""

import hydra
from omegaconf import DictConfig

from lkda.commands.command_line import readable_errors


@hydra.main(version_base="1.3", config_path="../configs", config_name="prepare_data")
def main(cfg: DictConfig) -> None:
    with readable_errors():
        from lkda.commands.prepare_data import prepare_data

        prepare_data(cfg)


if __name__ == "__main__":
    with readable_errors():
        main()
