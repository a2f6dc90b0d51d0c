"""What ranks run in a test of exports: parts of one that cannot be written, on one rank or the other."""

import errno
import json
import os
import sys
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn

import wmtp_ds.export
import wmtp_ds.models.loading
from wmtp_ds import distributed
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.export import Exporter


class Gathering:
    """As ZeRO-3's: every rank must take part in each parameter."""

    def __init__(self) -> None:
        self.is_main = distributed.is_main()

    @contextmanager
    def gathered(self, parameter, modify=False):
        distributed.barrier()
        yield

    def shape(self, parameter):
        return tuple(parameter.shape)


def no_space(kind: type[Exception], before=lambda *_, **__: None):
    def fail(*arguments: object, **keywords: object) -> None:
        before(*arguments, **keywords)
        if kind is OSError:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise kind("No space left on device (os error 28)")

    return fail


def full_value(parameter):
    distributed.barrier()
    return parameter.detach()


dist.init_process_group("gloo", timeout=timedelta(seconds=20))
root = Path(sys.argv[1])
policy = nn.Sequential(*(nn.Linear(8, 8, dtype=torch.float32) for _ in range(4)))
policy.config = SimpleNamespace(hidden_size=8)
module = SimpleNamespace(stage=SimpleNamespace(trains_policy=True), policy=policy, value_head=nn.Linear(8, 1))
engine = SimpleNamespace(module=module, sharding=Gathering(), full_value=full_value)
resolved = SimpleNamespace(
    toml=lambda: "",
    config=SimpleNamespace(
        checkpoint=SimpleNamespace(save_dir=root),
        models=SimpleNamespace(policy=SimpleNamespace(dtype="float32")),
        value_head=SimpleNamespace(type="linear", activation="sigmoid"),
    ),
)
tokenizer = SimpleNamespace(save_pretrained=lambda _: None)
exporter = Exporter(engine, resolved, tokenizer, "0" * 64)
wmtp_ds.export.write_config = lambda *_: None
wmtp_ds.export.store_trunk_fingerprint = lambda _: "0" * 64
wmtp_ds.export.save_value_head = lambda file, *_, **__: Path(file).write_text("head")
wmtp_ds.export.save_weights = partial(wmtp_ds.export.save_weights, shard_bytes=300)
exporter.write("checkpoint_best", {"step": 1})

FAULTS = {
    # name -> where, what, on which rank
    "weights": (wmtp_ds.models.loading, "save_file", SafetensorError, 0),
    "tokenizer": (tokenizer, "save_pretrained", Exception, 0),
    "config": (wmtp_ds.export, "write_config", OSError, 0),
    "fingerprint": (wmtp_ds.export, "store_trunk_fingerprint", UserError, 0),
    "head": (wmtp_ds.export, "save_value_head", SafetensorError, 0),
    "folder": (wmtp_ds.export, "replace_folder", OSError, 0),
    "elsewhere": (wmtp_ds.export, "save_weights", OSError, 1),
}
said = {}
for name, (place, attribute, kind, rank) in FAULTS.items():
    before = getattr(place, attribute)
    if distributed.rank() == rank:
        # On another rank after all is gathered: it writes nothing itself.
        setattr(place, attribute, no_space(kind, before) if rank else no_space(kind))
    try:
        exporter.write("checkpoint_best", {"step": 2})
    except RunError as error:
        distributed.barrier()
        said[name] = [str(error), error.everywhere, sorted(path.name for path in root.iterdir())]
        distributed.barrier()
    setattr(place, attribute, before)
said["step"] = json.loads((root / "checkpoint_best/metrics.json").read_text())["step"]
exporter.write("checkpoint_best", {"step": 3})
said["shards"] = len(list((root / "checkpoint_best").glob("*.safetensors")))
(root / f"said-{distributed.rank()}.json").write_text(json.dumps(said))
dist.destroy_process_group()
