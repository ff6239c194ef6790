"""Write a trained model into a directory that others load: `python scripts/export.py --help`."""

import hydra
from omegaconf import DictConfig

from lkda.commands.command_line import readable_errors


@hydra.main(version_base="1.3", config_path="../configs", config_name="export")
def main(cfg: DictConfig) -> None:
    with readable_errors():
        from lkda.commands.export import export  # here, so that --help need not wait for torch

        export(cfg)


if __name__ == "__main__":
    with readable_errors():
        main()
