"""Import: a model of any layout becomes a policy in ours."""

from pathlib import Path

import torch

from wmtp_ds.models.convert.architecture import check_complete
from wmtp_ds.models.convert.config_fields import config_fields
from wmtp_ds.models.convert.deliver import Delivered, Progress, deliver_folder
from wmtp_ds.models.convert.heads import Heads, add_heads
from wmtp_ds.models.convert.source import open_source
from wmtp_ds.models.convert.staging import check_destination
from wmtp_ds.models.convert.tensors import cast
from wmtp_ds.models.loading import SHARD_BYTES


def import_model(
    source: Path,
    destination: Path,
    *,
    heads: Heads = "copy",
    n_future: int | None = None,
    gguf_file: str | None = None,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    progress: Progress | None = None,
) -> Delivered:
    """Write a policy: Hugging Face's layout with extra heads, tokenizer and trunk fingerprint.

    Args:
        source: folder of ours, of Hugging Face's or of Meta's layout, or a GGUF file.
        destination: the policy's folder.
        heads: what heads 2..n of a next-token model start as: copies of its last block, or new blocks.
        n_future: n; None keeps a model's heads, and gives a next-token model 4.
        gguf_file: name of a GGUF file in ``source``.
        tokenizer: folder or file to take the tokenizer from, if not ``source``.
        dtype: of the weights; None keeps each tensor's.
        seed: of new blocks.
        shard_bytes: size of a file of weights.
        force: replace a model at ``destination``.
        progress: who is told how far it is.

    Raises:
        UserError: whatever is wrong with the source or the destination; nothing is left behind.
        RunError: if writing failed; what is done is kept, for the next attempt to go on from.
    """
    check_destination(destination, source, force=force)
    model = open_source(source, gguf_file=gguf_file, tokenizer=tokenizer)
    check_complete(model)
    add_heads(model, heads, n_future, seed)
    model.tensors = {name: cast(tensor, dtype) for name, tensor in model.tensors.items()}
    fields = config_fields(model.fields, model.heads, dtype)
    options = {"heads": heads, "seed": seed, "dtype": str(dtype), "shard_bytes": shard_bytes}
    return deliver_folder(
        model, destination, fields, shard_bytes=shard_bytes, options=options, progress=progress or Progress()
    )
