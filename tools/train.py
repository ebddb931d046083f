"""Trains a network: ``python tools/train.py [SETTING=VALUE ...]``; --help shows the settings."""

import os
import sys
from pathlib import Path

if not __package__:  # started as a file of a checkout: the checkout is what is meant
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from danet.interpreter import require_packages

    require_packages(__file__)

from omegaconf import DictConfig, OmegaConf

from danet import cli
from danet.config.validate import check
from danet.distributed import launcher, signals


def run(config: DictConfig) -> None:
    """Check the config, then train; with ``run.processes`` in that many processes."""
    if config.dry_run and OmegaConf.is_missing(config.data, "root"):
        config.data.root = "."  # a plan reads no data
    if config.run.name is None:  # read and written back, an escaped ${ would be resolved
        config.run.name = cli.choice()
    checked = check(config, cli.added_keys(), needs_data=not config.dry_run)
    if checked.run.processes and "WORLD_SIZE" not in os.environ and not checked.dry_run:
        launcher.start(checked.run.processes, [__file__, *cli.flags(), *cli.overrides()])
        return
    # Late, since it brings in torch: a misspelt setting is reported within a second.
    from danet.engine.run import train

    train(checked, cli.overrides())


def main() -> None:
    """Run the command ``danet-train``."""
    signals.follow_parent()
    cli.run(run, "train")


if __name__ == "__main__":
    main()
