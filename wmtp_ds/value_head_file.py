"""The file that a value head is kept in: ``value_head.safetensors``, or a ``.pt`` from elsewhere.

Nothing is unpickled: a ``.pt`` is read with ``weights_only``, so code in it never runs. torch is imported on
use: :func:`read_value_head_metadata` needs none.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wmtp_ds.errors import UserError
from wmtp_ds.files import open_file, replace_file

if TYPE_CHECKING:
    import torch

VALUE_HEAD_FILE = "value_head.safetensors"
PT_KEY = "value_head_state_dict"

# A safetensors header larger than this (bytes) describes no value head.
_LONGEST_HEADER = 1_000_000

HEADS: dict[str, tuple[str, ...]] = {
    "linear": ("norm.weight", "output.weight", "output.bias"),
    "mlp": ("norm.weight", "hidden.weight", "hidden.bias", "output.weight", "output.bias"),
}


@dataclass(frozen=True)
class ValueHeadFile:
    """A value head as read from a file; what the file does not say is None."""

    state_dict: dict[str, torch.Tensor]  # float32, on the CPU
    hidden_size: int
    type: str
    activation: str | None
    trunk_fingerprint: str | None
    path: Path


def save_value_head(
    path: Path,
    state_dict: Mapping[str, torch.Tensor],
    *,
    hidden_size: int,
    type: str,
    activation: str,
    trunk_fingerprint: str,
) -> None:
    """Write a value head as safetensors, in float32, with what it fits in the file's metadata; atomically."""
    import torch
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in state_dict.items()}
    _check_tensors(path, tensors, type, hidden_size)
    metadata = {
        "format": "pt",
        "hidden_size": str(hidden_size),
        "type": type,
        "activation": activation,
        "trunk_fingerprint": trunk_fingerprint,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, metadata=metadata)
    replace_file(temporary, path)


def read_value_head_metadata(path: Path) -> dict[str, str]:
    """Read what a safetensors file says of itself, from its header alone (no torch).

    Keys, as far as the file has them: ``hidden_size``, ``type``, ``activation``, ``trunk_fingerprint``.
    Raises UserError for a file that is no safetensors file.
    """
    try:
        with open_file(path) as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _LONGEST_HEADER:
                raise ValueError("the length of its header makes no sense")
            header = json.loads(file.read(length))
        metadata = header.get("__metadata__", {})
        return {str(key): str(value) for key, value in metadata.items()}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(_unreadable(path, error)) from None


def load_value_head(path: Path) -> ValueHeadFile:
    """Read ``value_head.safetensors``, or a ``.pt`` with ``value_head_state_dict``. Runs no code from it.

    A ``.pt`` may carry ``hidden_size``, ``type``, ``activation`` and ``trunk_fingerprint`` beside the
    weights; sizes and type follow from the weights otherwise.

    Raises
    ------
    UserError
        The file is damaged, holds code, lacks weights, has weights of the wrong shape or that are not finite.
    """
    if path.suffix == ".pt":
        tensors, said = _read_pt(path)
    else:
        tensors, said = _read_safetensors(path)
    head_type = said.get("type") or ("mlp" if "hidden.weight" in tensors else "linear")
    size = said.get("hidden_size")
    if size is None:
        norm = tensors.get("norm.weight")
        size = str(norm.numel()) if norm is not None else "0"
    if not size.isdecimal() or len(size) > 9:
        raise UserError(f"{path} says hidden_size = '{size}', which is no whole number.\n  Mend: export it again.")
    _check_tensors(path, tensors, head_type, int(size))
    return ValueHeadFile(
        state_dict=tensors,
        hidden_size=int(size),
        type=head_type,
        activation=said.get("activation"),
        trunk_fingerprint=said.get("trunk_fingerprint"),
        path=path,
    )


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    said = read_value_head_metadata(path)
    try:
        tensors = load_file(path, device="cpu")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UserError(_unreadable(path, error)) from None
    return {name: tensor.to(torch.float32) for name, tensor in tensors.items()}, said


def _read_pt(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    import torch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} is refused: it holds more than weights (or is damaged), and code in a file is never run.\n"
            f"  Mend: save only torch.save({{'{PT_KEY}': head.state_dict()}}, ...), or give a {VALUE_HEAD_FILE}."
        ) from None
    except Exception as error:  # torch.load raises what it likes for damaged files
        raise UserError(_unreadable(path, error)) from None
    weights = content.get(PT_KEY) if isinstance(content, dict) else None
    if not isinstance(weights, Mapping):
        keys = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} holds no '{PT_KEY}' (it holds: {keys}).\n  Mend: give a critic's {VALUE_HEAD_FILE}.")
    other = [str(name) for name, tensor in weights.items() if not isinstance(tensor, torch.Tensor)]
    if other:
        raise UserError(f"'{PT_KEY}' in {path} holds entries that are no tensors: {', '.join(other[:8])}.")
    names = ("hidden_size", "type", "activation", "trunk_fingerprint")
    said = {name: str(content[name]) for name in names if content.get(name) is not None}
    return {str(name): tensor.to(torch.float32) for name, tensor in weights.items()}, said


def _unreadable(path: Path, error: Exception) -> str:
    text = " ".join(str(error).split())[:200]
    return f"{path} cannot be read as a value head: {text}.\n  Mend: export the critic again, or copy the file anew."


def _check_tensors(path: Path, tensors: Mapping[str, torch.Tensor], head_type: str, hidden_size: int) -> None:
    import torch

    if head_type not in HEADS:
        raise UserError(f"{path} holds a value head of type '{head_type}'; there are: {', '.join(HEADS)}.")
    expected, found = set(HEADS[head_type]), set(tensors)
    if expected != found:
        raise UserError(
            f"{path} does not hold a '{head_type}' value head: missing {_listed(expected - found)}, unexpected "
            f"{_listed(found - expected)}.\n  Mend: give a file that the critic stage exported."
        )
    shapes = {
        "norm.weight": (hidden_size,),
        "hidden.weight": (hidden_size, hidden_size),
        "hidden.bias": (hidden_size,),
        "output.weight": (1, hidden_size),
        "output.bias": (1,),
    }
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(
                f"{name} in {path} has shape {list(tensor.shape)}, which is not {list(shapes[name])} as hidden size "
                f"{hidden_size} asks for.\n  Mend: export the critic again."
            )
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{name} in {path} holds values that are not finite: that critic's training had diverged.\n"
                "  Mend: train the critic again, with a lower learning rate."
            )


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)[:8]) or "nothing"


def check_value_head(
    head: ValueHeadFile,
    *,
    hidden_size: int,
    type: str,
    activation: str,
    trunk_fingerprint: str | None,
) -> list[str]:
    """Check that a value head fits the policy and config that are given; what it does not say is not checked.

    Returns
    -------
    list[str]
        Warnings: what could not be checked because the file does not say it.

    Raises
    ------
    UserError
        Naming both sides of every mismatch, and the mend.
    """
    wrong = []
    if head.hidden_size != hidden_size:
        wrong.append(
            f"it was trained on a hidden size of {head.hidden_size}, the policy's is {hidden_size}; train a critic "
            "on this policy"
        )
    elif head.trunk_fingerprint and trunk_fingerprint and head.trunk_fingerprint != trunk_fingerprint:
        wrong.append(
            f"it was trained on another trunk (fingerprint {head.trunk_fingerprint[:12]}; the policy's is "
            f"{trunk_fingerprint[:12]}); use the models.policy.path that the critic was trained with, or train a "
            "critic on this policy"
        )
    if head.type != type:
        wrong.append(f"its type is '{head.type}', value_head.type is '{type}'; set value_head.type = \"{head.type}\"")
    if head.activation and head.activation != activation:
        wrong.append(
            f"its activation is '{head.activation}', value_head.activation is '{activation}'; set "
            f'value_head.activation = "{head.activation}"'
        )
    if wrong:
        raise UserError(f"the critic {head.path} does not fit:" + "".join(f"\n  - {reason}" for reason in wrong))
    warnings = []
    if not head.activation:
        warnings.append(f"{head.path} does not say its activation: '{activation}' is taken")
    if not head.trunk_fingerprint or not trunk_fingerprint:
        side = head.path if not head.trunk_fingerprint else "the policy"
        warnings.append(f"{side} has no trunk fingerprint: nobody can tell whether critic and policy belong together")
    return warnings
