"""Export: a model of any layout becomes what other tools load."""

from pathlib import Path
from typing import Literal

from wmtp_ds.errors import UserError
from wmtp_ds.models.convert.architecture import check_complete
from wmtp_ds.models.convert.config_fields import config_fields
from wmtp_ds.models.convert.deliver import Delivered, Progress, deliver_folder
from wmtp_ds.models.convert.meta import RELEASE
from wmtp_ds.models.convert.meta_export import deliver_release
from wmtp_ds.models.convert.source import open_source
from wmtp_ds.models.convert.staging import check_destination
from wmtp_ds.models.loading import SHARD_BYTES

Format = Literal["hf", "mtp", "meta"]


def export_model(
    source: Path,
    destination: Path,
    *,
    format: Format = "hf",
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    force: bool = False,
    progress: Progress | None = None,
) -> Delivered:
    """Write a model for other tools; the values of its weights stay what they are, to the bit.

    Args:
        source: folder of any layout, such as a run's ``checkpoint_best``.
        destination: the new folder.
        format: "hf", the next-token model alone, a plain ``LlamaForCausalLM``; "mtp", all heads in our layout; "meta",
            all heads in Meta's.
        tokenizer: folder or file to take the tokenizer from, if not ``source``.
        shard_bytes: size of a file of weights ("meta" writes one file, or as many as it was imported from).
        force: replace a model at ``destination``.
        progress: who is told how far it is.

    Raises:
        UserError, RunError: as ``import_model``.
    """
    progress = progress or Progress()
    check_destination(destination, source, force=force)
    model = open_source(source, tokenizer=tokenizer)
    check_complete(model)
    if format == "meta":
        return deliver_release(model, destination, progress=progress)
    if format == "mtp" and "n_future_tokens" not in model.fields:
        raise UserError(f"{source} has one head and no n_future_tokens. To give it heads: wmtp-ds model import.")
    fields = config_fields(model.fields, None if format == "hf" else model.heads, None)
    if format == "hf":
        fields.pop(RELEASE, None)
        model.tensors = {name: value for name, value in model.tensors.items() if not name.startswith("mtp_heads.")}
    return deliver_folder(
        model, destination, fields, shard_bytes=shard_bytes, options={"format": format}, progress=progress
    )
