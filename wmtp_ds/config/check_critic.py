"""Checks of the critic's checkpoint: that it is there, and that its value head fits the policy."""

import json
import os
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmtp_ds.config.context import Check, Context
from wmtp_ds.errors import UserError
from wmtp_ds.files import open_file, read_json
from wmtp_ds.handoff import BEST_FOLDER, VALUE_HEAD_FILE, CriticUri, locate_critic, parse_critic_uri
from wmtp_ds.models.fingerprint import read_trunk_fingerprint

KEY = "experiment.critic_checkpoint"

_HEADER_LIMIT = 100 * 2**20  # safetensors' own


@dataclass(frozen=True)
class Head:
    """What the header of a value head's file says, read without torch."""

    path: str
    metadata: dict[str, str]
    shapes: dict[str, list[int]]


def check_critic(context: Context, *, online: bool = False) -> None:
    """The critic's checkpoint exists and fits the policy; a URI's form alone, unless ``online``."""
    if not (context.training and context.training.needs_critic):
        return
    text = context.get(KEY)
    if not isinstance(text, str):
        return
    try:
        uri = parse_critic_uri(text)
    except UserError as error:
        _report(context, error)
        return
    if uri.kind == "path":
        file = _locate(context, os.path.expanduser(uri.path))
        if file:
            _check_head(context, file)
    elif _check_store(context, uri) and online:
        _check_online(context, text)


def check_critic_online(context: Context) -> None:
    """As `check_critic`, asking MLflow whether a URI's artifact exists."""
    check_critic(context, online=True)


def _report(context: Context, error: UserError) -> None:
    """Pass on what the handoff says, whose messages end in a remedy."""
    message, _, mend = str(error).partition("\n  Mend: ")
    context.report(KEY, message, mend or _how_to_train(context))


def _check_store(context: Context, uri: CriticUri) -> bool:
    """Tracking is set up in a way that can have the artifact."""
    tracking = context.get("mlflow.tracking_uri")
    where = context.origin("mlflow.tracking_uri")
    if tracking == "":
        message = f'{uri.text} cannot be looked up: mlflow.tracking_uri is "" ({where})'
        context.report(KEY, message, "set mlflow.tracking_uri, or give the critic as a folder")
        return False
    if uri.kind == "mlflow-artifacts" and tracking and not tracking.startswith(("http://", "https://")):
        message = f"{uri.text} needs a tracking server, but mlflow.tracking_uri is none ({where})"
        context.report(KEY, message, "set mlflow.tracking_uri to the server's http:// address, or use runs:/")
        return False
    return tracking is not None


def _check_online(context: Context, uri: str) -> None:
    with tempfile.TemporaryDirectory(prefix="wmtp-critic-") as folder:
        try:
            file = locate_critic(uri, tracking_uri=context.get("mlflow.tracking_uri"), cache_dir=Path(folder))
        except UserError as error:
            _report(context, error)
        else:
            _check_head(context, str(file), shown=uri)


def _how_to_train(context: Context) -> str:
    beside = os.path.join(os.path.dirname(context.file), "critic.toml")
    is_default = os.path.normpath(beside) == os.path.join("stage_configs", "critic.toml")
    config = f" --config {beside}" if os.path.isfile(beside) and not is_default else ""
    return f"train one: deepspeed bin/train_stage.py --stage critic{config}"


def _locate(context: Context, path: str) -> str | None:
    """The file that holds the value head, as `locate_critic` finds it, but with the command that makes it."""
    if os.path.isdir(path):
        candidates = [os.path.join(path, *below, VALUE_HEAD_FILE) for below in ((), (BEST_FOLDER,))]
        found = next((file for file in candidates if os.path.isfile(file)), None)
        if found is None:
            message = f"{path} holds no {VALUE_HEAD_FILE}, nor does a {BEST_FOLDER}/ in it"
            context.report(KEY, message, _how_to_train(context))
        return found
    if not os.path.exists(path):
        context.report(KEY, f"{path} does not exist", _how_to_train(context))
    elif not path.endswith((".safetensors", ".pt")):
        message = f"{path} is neither a folder nor {VALUE_HEAD_FILE} nor a .pt"
        context.report(KEY, message, "give the folder of an export")
    elif os.path.getsize(path) == 0:
        context.report(KEY, f"{path} is empty", _how_to_train(context))
    else:
        return path
    return None


def read_head(path: str) -> Head:
    """The header of a safetensors file: 8 bytes of length, little endian, then JSON.

    Raises:
        ValueError: the file is none; the message says why.
        OSError: the file cannot be read.
    """
    size = os.path.getsize(path)
    with open_file(path) as file:
        start = file.read(8)
        if len(start) < 8:
            raise ValueError("it is shorter than a safetensors header")
        (length,) = struct.unpack("<Q", start)
        if length > min(size - 8, _HEADER_LIMIT):
            raise ValueError("its header is longer than the file")
        try:
            header: Any = json.loads(file.read(length))
        except RecursionError:
            raise ValueError("its header is nested too deeply") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise ValueError("its metadata are no JSON object")
    try:
        shapes = {name: list(entry["shape"]) for name, entry in header.items()}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"it should have {8 + length + end} bytes, not {size}")
    except (KeyError, TypeError, IndexError):
        raise ValueError("its header describes no tensors") from None
    return Head(path, dict(metadata), shapes)


def _check_head(context: Context, path: str, shown: str | None = None) -> None:
    """Compare a value head with the policy and with ``value_head``, as far as each is known."""
    if path.endswith(".pt"):
        return  # only torch can read it
    name = shown or path
    try:
        head = read_head(path)
    except (OSError, ValueError) as error:
        context.report(KEY, f"{name} cannot be read: {error}", _how_to_train(context))
        return
    if "output.weight" not in head.shapes:
        context.report(KEY, f"{name} holds no value head: it has no output.weight", _how_to_train(context))
        return
    for field in ("type", "activation"):
        wanted, stored = context.get(f"value_head.{field}"), head.metadata.get(field)
        if wanted and stored and wanted != stored:
            where = context.origin(f"value_head.{field}")
            message = f'{name} has {field} "{stored}", but value_head.{field} is "{wanted}" ({where})'
            context.report(KEY, message, f'set value_head.{field} = "{stored}", or use another critic')
    _check_hidden_size(context, head, name)
    _check_trunk(context, head, name)


def _check_hidden_size(context: Context, head: Head, name: str) -> None:
    policy = context.path("models.policy.path")
    try:
        wanted = read_json(os.path.join(policy or "", "config.json"))["hidden_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # check_policy has said what is wrong
    stored = head.shapes["output.weight"][-1:]
    if stored != [wanted]:
        message = f"{name} has hidden size {stored[0] if stored else 0}, the policy {policy} has {wanted}"
        context.report(KEY, message, "use a critic that was trained on this policy")


def _check_trunk(context: Context, head: Head, name: str) -> None:
    policy = context.path("models.policy.path")
    if policy is None or not os.path.isdir(policy):
        return
    mend = "use a critic that was trained on this policy"
    try:
        trunk = read_trunk_fingerprint(Path(policy))
    except UserError:
        return  # check_policy has said what is wrong
    stored = head.metadata.get("trunk_fingerprint")
    if trunk is None:
        message = f"{policy} has no trunk_fingerprint.json: nobody can tell whether the critic fits its trunk"
        context.warn("models.policy.path", message, "training computes it before it starts")
    elif not stored:
        context.warn(KEY, f"{name} does not say which trunk it was trained on", mend)
    elif stored != trunk:
        context.report(KEY, f"{name} was trained on trunk {stored}, the policy {policy} has trunk {trunk}", mend)


CRITIC_CHECKS: tuple[Check, ...] = (check_critic,)
CRITIC_CHECKS_ONLINE: tuple[Check, ...] = (check_critic_online,)
