"""What is imported or exported: a model of any layout, as if it lay in ours."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wmtp_ds.models.convert.tensors import LazyTensor
from wmtp_ds.models.convert.tokenizer import TokenizerSource
from wmtp_ds.models.layouts import Layout, tell_layout


@dataclass
class Source:
    """A model that is yet to be read.

    Attributes:
        path: folder or file, for messages.
        layout: "mtp" is ours: Hugging Face's with ``n_future_tokens`` in config.json.
        fields: what config.json of our layout would say; ``n_future_tokens`` where there are heads to speak of.
        tensors: by the names of our layout, as stored: neither complete nor in the right shapes until checked.
        tokenizer: where its tokenizer is.
        files: all that is read; a change of any of them makes it another model.
    """

    path: Path
    layout: Layout
    fields: dict[str, Any]
    tensors: dict[str, LazyTensor]
    tokenizer: TokenizerSource
    files: list[Path] = field(default_factory=list)

    @property
    def heads(self) -> int:
        """The number of heads, n; 1 for a next-token model."""
        return int(self.fields.get("n_future_tokens") or 1)


def open_source(path: Path, *, gguf_file: str | None = None, tokenizer: Path | None = None) -> Source:
    """Open a model of any layout; headers and configs are read, weights are not (but for GGUF).

    Args:
        path: folder of ours, of Hugging Face's or of Meta's layout, or a GGUF file.
        gguf_file: name of a GGUF file in the folder.
        tokenizer: folder or file to take the tokenizer from; None looks where the layout has it.

    Raises:
        UserError: if there is no model, or what there is is damaged or of an architecture that is none of ours.
    """
    layout, path = tell_layout(path, gguf_file)
    if layout == "meta":
        from wmtp_ds.models.convert.meta import open_release

        return open_release(path, tokenizer)
    if layout == "gguf":
        from wmtp_ds.models.convert.gguf import open_gguf

        return open_gguf(path, tokenizer)
    from wmtp_ds.models.convert.huggingface import open_folder

    return open_folder(path, tokenizer)
