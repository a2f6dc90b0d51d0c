"""``wmtp-ds train``: the friendlier front of ``deepspeed bin/train_stage.py``."""

from typing import Any

import click

from wmtp_ds.launch import Request, launch, train_options


@click.command(epilog="Example: wmtp-ds train --stage rho1 --config stage_configs/local/rho1.toml --num_gpus 2")
@train_options
def train(**typed: Any) -> int:
    """Train a stage through the DeepSpeed launcher, on a free port."""
    return launch(Request(**typed))
