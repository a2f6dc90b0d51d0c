"""Checks of model folders, without torch or transformers: config.json, headers of weights, tokenizers."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmtp_ds.config.context import Check, Context
from wmtp_ds.errors import UserError
from wmtp_ds.models.fingerprint import stored_tensors

_UNREADABLE = object()
_MICRO = "storage/models/micro-"


@dataclass(frozen=True)
class Tokenizer:
    """What a tokenizer.json says of its vocabulary: the token of each id."""

    path: Path
    tokens: dict[int, str]


def how_to_get_model(path: str) -> str:
    """The command that makes or imports a model folder."""
    if os.path.normpath(path).startswith(_MICRO):
        return "make it: wmtp-ds model micro"
    return f"import it: wmtp-ds model import SOURCE {path}"


def check_policy(context: Context) -> None:
    """The policy's folder holds a model that can be trained: heads, weights, tokenizer."""
    key = "models.policy.path"
    config = read_model_config(context, key)
    if config is None:
        return
    shape = _check_shape(context, key, config)
    if shape:
        _check_weights(context, key, config, *shape)
    _check_tokenizer_fits(context, "policy", config)
    _check_length(context, config)


def check_reference(context: Context) -> None:
    """The reference's folder holds a model whose tokens mean the same as the policy's."""
    if not (context.training and context.training.needs_reference):
        return
    key = "models.reference.path"
    config = read_model_config(context, key)
    if config is None:
        return
    _tensors(context, key)
    mine = _check_tokenizer_fits(context, "reference", config)
    policy = read_tokenizer(context, "policy", silent=True)  # check_policy says what is wrong with it
    if mine and policy:
        _compare_tokenizers(context, mine, policy)


def check_reward_model(context: Context) -> None:
    """The reward model's folder holds a sequence classifier."""
    if context.get("models.reward.source") != "model":
        return
    key = "models.reward.path"
    config = read_model_config(context, key, reward=True)
    names = config.get("architectures") if config else None
    if isinstance(names, list) and not any("SequenceClassification" in str(name) for name in names):
        message = f"{context.path(key)} is a {', '.join(map(str, names))}, not a sequence-classification model"
        context.report(key, message, "name a reward model: one ...ForSequenceClassification with one label")


def read_model_config(context: Context, key: str, *, reward: bool = False) -> dict[str, Any] | None:
    """A model folder's config.json, or None once it is reported what is wrong."""
    path = context.path(key)
    if path is None:
        return None
    mend = how_to_get_model(path) if not reward else "download the reward model into this folder"
    if not os.path.isdir(path):
        what = "is a file, not a model's folder" if os.path.exists(path) else "does not exist"
        context.report(key, f"{path} {what}", mend)
        return None
    config = _read_json(context, key, os.path.join(path, "config.json"), mend)
    if config is _UNREADABLE:
        return None
    if not isinstance(config, dict):
        context.report(key, f"{path}/config.json holds no JSON object", mend)
        return None
    return config


def _read_json(context: Context, key: str, path: str, mend: str) -> Any:
    """The content of a JSON file; ``_UNREADABLE`` once it is reported what is wrong."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    except FileNotFoundError:
        context.report(key, f"{path} is missing", mend)
    except (OSError, ValueError, RecursionError) as error:
        context.report(key, f"{path} cannot be read: {error}", mend)
    return _UNREADABLE


def _check_shape(context: Context, key: str, config: dict[str, Any]) -> tuple[int, int] | None:
    """(blocks, heads) of the policy."""
    file = f"{context.path(key)}/config.json"
    kind = config.get("model_type")
    if kind != "llama":
        context.report(key, f'{file} says model_type = {json.dumps(kind)}; policies are "llama"', "use a Llama model")
        return None
    heads, blocks = config.get("n_future_tokens"), config.get("num_hidden_layers")
    if heads is None:
        mend = 'add "n_future_tokens": 1 to train it as a plain next-token model, or import it again'
        context.report(key, f"{file} does not say n_future_tokens, the number of heads", mend)
        return None
    for name, value, least in (("n_future_tokens", heads, 1), ("num_hidden_layers", blocks, 2)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            message = f"{file} says {name} = {json.dumps(value)}; it must be a whole number of at least {least}"
            context.report(key, message, how_to_get_model(context.path(key) or ""))
            return None
    return int(blocks or 0), int(heads)


def _check_length(context: Context, config: dict[str, Any]) -> None:
    """Sequences are no longer than what the policy has seen positions for."""
    positions, length = config.get("max_position_embeddings"), context.get("dataset.max_length")
    if isinstance(positions, int) and isinstance(length, int) and length > positions:
        message = f"is {length}, but {context.path('models.policy.path')}/config.json says positions up to {positions}"
        context.warn("dataset.max_length", message, f"lower it to {positions}, or expect poor predictions beyond")


def _tensors(context: Context, key: str) -> dict[str, tuple[int, ...]] | None:
    """Name and shape of every tensor in a model folder."""
    path = context.path(key) or ""
    try:
        return {name: tensor.shape for name, tensor in stored_tensors(Path(path)).items()}
    except UserError as error:
        context.report(key, str(error), how_to_get_model(path))
        return None


def _check_weights(context: Context, key: str, config: dict[str, Any], blocks: int, heads: int) -> None:
    """The weights hold as many blocks and heads as config.json says, and its embeddings."""
    shapes = _tensors(context, key)
    if shapes is None:
        return
    path = context.path(key) or ""
    found = {tuple(name.split(".")[:3]) for name in shapes}
    for what, wanted in (
        ("block", [("model", "layers", str(index)) for index in range(blocks)]),
        ("head", [("mtp_heads", str(index)) for index in range(heads - 1)]),
    ):
        missing = [name for name in wanted if not any(known[: len(name)] == name for known in found)]
        if missing:
            total = f"num_hidden_layers = {blocks}" if what == "block" else f"n_future_tokens = {heads}"
            message = f"{path} has no weights of {what} {'.'.join(missing[0])}, though config.json says {total}"
            context.report(key, message, how_to_get_model(path))
    expected = (config.get("vocab_size"), config.get("hidden_size"))
    embeddings = shapes.get("model.embed_tokens.weight")
    if embeddings != expected:
        held = f"of shape {list(embeddings)}" if embeddings else "missing"
        message = f"{path}: model.embed_tokens.weight is {held}; config.json says {list(expected)}"
        context.report(key, message, how_to_get_model(path))


def read_tokenizer(context: Context, model: str, *, silent: bool = False) -> Tokenizer | None:
    """The vocabulary of a model's tokenizer, or None once it is reported what is wrong (unless ``silent``)."""
    key = f"models.{model}.tokenizer_path"
    if context.path(key) is None:
        key = f"models.{model}.path"
    folder = context.path(key)
    if folder is None:
        return None
    path = Path(folder) / "tokenizer.json"
    problems = len(context.problems)
    if key.endswith("tokenizer_path") and not os.path.isdir(folder):
        context.report(key, f"{folder} does not exist", "name a folder with a tokenizer.json, or remove the key")
    else:
        content = _read_json(context, key, str(path), how_to_get_model(folder))
        tokens = _vocabulary(content)
        if tokens:
            return Tokenizer(path, tokens)
        if content is not _UNREADABLE:
            context.report(key, f"{path} holds no vocabulary", how_to_get_model(folder))
    if silent:
        del context.problems[problems:]
    return None


def _vocabulary(content: Any) -> dict[int, str]:
    """The token of each id in a tokenizer.json; empty if it has none."""
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [token, score] in the order of the ids
            tokens = {index: str(entry[0]) for index, entry in enumerate(vocabulary)}
        else:
            tokens = {int(index): str(token) for token, index in vocabulary.items()}
        for entry in content.get("added_tokens") or ():
            tokens[int(entry["id"])] = str(entry["content"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        return {}
    return tokens


def _check_tokenizer_fits(context: Context, model: str, config: dict[str, Any]) -> Tokenizer | None:
    key = f"models.{model}.path"
    tokenizer = read_tokenizer(context, model)
    size = config.get("vocab_size")
    if isinstance(size, bool) or not isinstance(size, int):
        message = f"{context.path(key)}/config.json says vocab_size = {json.dumps(size)}, which is no number"
        context.report(key, message, how_to_get_model(context.path(key) or ""))
    elif tokenizer:
        _check_vocabulary(context, key, size, tokenizer)
    return tokenizer


def _check_vocabulary(context: Context, key: str, size: int, tokenizer: Tokenizer) -> None:
    highest = max(tokenizer.tokens)
    if highest >= size:
        message = (
            f"{context.path(key)} embeds {size} tokens, but {tokenizer.path} has one of id {highest}: "
            f"{json.dumps(tokenizer.tokens[highest])}"
        )
        context.report(key, message, "name the tokenizer that belongs to the model")


def _compare_tokenizers(context: Context, reference: Tokenizer, policy: Tokenizer) -> None:
    if reference.tokens == policy.tokens:
        return
    ids = sorted(reference.tokens.keys() | policy.tokens.keys())
    first = next(index for index in ids if reference.tokens.get(index) != policy.tokens.get(index))
    theirs, ours = (
        json.dumps(tokenizer.tokens[first], ensure_ascii=False) if first in tokenizer.tokens else "nothing"
        for tokenizer in (reference, policy)
    )
    context.report(
        "models.reference.path",
        f"its tokenizer is not the policy's: token {first} is {theirs} in {reference.path}, "
        f"but {ours} in {policy.path}",
        "use a reference model with the policy's tokenizer",
    )


MODEL_CHECKS: tuple[Check, ...] = (check_policy, check_reference, check_reward_model)
