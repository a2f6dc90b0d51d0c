"""Checks of model folders, without torch or transformers: config.json, headers of weights, tokenizers."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wmtp_ds.config.check_weights import check_weights, how_to_mend_model, is_micro, read_architecture
from wmtp_ds.config.context import Check, Context, why_no_file
from wmtp_ds.config.fields import PACKING_ATTENTION
from wmtp_ds.errors import UserError
from wmtp_ds.files import read_json
from wmtp_ds.models.config_file import refuse_foreign_code
from wmtp_ds.models.fingerprint import read_trunk_fingerprint
from wmtp_ds.models.tokenizer_file import vocabulary_of
from wmtp_ds.scores.fit import KEY as SCORES

_UNREADABLE = object()


@dataclass(frozen=True)
class Tokenizer:
    """What a tokenizer.json says of its vocabulary: the token of each id. ``key`` names its folder."""

    key: str
    path: Path
    tokens: dict[int, str]


def how_to_get_model(context: Context, key: str) -> str:
    """What to do for a model's folder that is not there."""
    if is_micro(context.path(key) or ""):
        return "make it: wmtp-ds model micro"
    config = "config.json (n_future_tokens)" if key == "models.policy.path" else "config.json"
    stage = context.training.stage if context.training else "STAGE"
    return (
        f"put the model there: a folder with {config}, safetensors and tokenizer; to try without it: "
        f"wmtp-ds model micro, then --config stage_configs/local/{stage}.toml"
    )


def check_policy(context: Context) -> None:
    """The policy's folder holds a model that can be trained: heads, weights, tokenizer."""
    key = "models.policy.path"
    config = read_model_config(context, key)
    if config is None:
        return
    model = read_architecture(context, key, config)
    if model:
        check_weights(context, key, model)
    _check_tokenizer_fits(context, "policy", config)
    _check_fingerprint(context, key)
    _check_length(context, config)
    _check_attention(context, key, config)


def check_reference(context: Context) -> None:
    """The reference's folder holds a model whose tokens mean the same as the policy's."""
    if not (context.training and context.training.needs_reference) or context.get(SCORES) is not None:
        return  # what is read are its losses, which `check_scores` looks at
    key = "models.reference.path"
    config = read_model_config(context, key)
    if config is None:
        return
    model = read_architecture(context, key, config, heads=1, least_blocks=1)
    if model:
        check_weights(context, key, model)
    _check_attention(context, key, config)
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
        context.report(
            key,
            message,
            "name a reward model: one ...ForSequenceClassification with one label (where config.json is that of the "
            "model it was made from, as with Starling-RM, write LlamaForSequenceClassification there)",
        )


def read_model_config(context: Context, key: str, *, reward: bool = False) -> dict[str, Any] | None:
    """A model folder's config.json, or None once it is reported what is wrong."""
    path = context.path(key)
    if path is None:
        return None
    if not os.path.isdir(path):
        what = "is a file, not a model's folder" if os.path.exists(path) else "does not exist"
        get = "put the reward model into this folder" if reward else how_to_get_model(context, key)
        context.report(key, f"{path} {what}", get)
        return None
    mend = how_to_mend_model(path)
    config = _read_json(context, key, os.path.join(path, "config.json"), mend)
    if config is _UNREADABLE:
        return None
    if not isinstance(config, dict):
        context.report(key, f"{path}/config.json holds no JSON object", mend)
        return None
    try:
        refuse_foreign_code(config, Path(path) / "config.json")
    except UserError as error:
        context.report(key, str(error), mend)
        return None
    return config


def _read_json(context: Context, key: str, path: str, mend: str) -> Any:
    """The content of a JSON file; ``_UNREADABLE`` once it is reported what is wrong."""
    if not os.path.exists(path):
        context.report(key, f"{path} is missing", mend)
        return _UNREADABLE
    if what := why_no_file(path):
        context.report(key, f"{path} {what}", mend)
        return _UNREADABLE
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        context.report(key, f"{path} cannot be read: {error}", mend)
    return _UNREADABLE


def _check_fingerprint(context: Context, key: str) -> None:
    try:
        read_trunk_fingerprint(Path(context.path(key) or ""))
    except UserError as error:
        context.report(key, str(error), "delete the file: training makes it again")


def _check_length(context: Context, config: dict[str, Any]) -> None:
    """Sequences are no longer than what the policy has seen positions for."""
    positions, length = config.get("max_position_embeddings"), context.get("dataset.max_length")
    if isinstance(positions, int) and isinstance(length, int) and length > positions:
        message = f"is {length}, but {context.path('models.policy.path')}/config.json says positions up to {positions}"
        context.warn("dataset.max_length", message, f"lower it to {positions}, or expect poor predictions beyond")


def _check_attention(context: Context, key: str, config: dict[str, Any]) -> None:
    """A model reads packed rows with an attention that keeps their solutions apart."""
    names = [config[name] for name in ("attn_implementation", "_attn_implementation") if config.get(name)]
    if context.get("data_sampling.pack_sequences") is True and any(name not in PACKING_ATTENTION for name in names):
        message = (
            f"is true, but {context.path(key)}/config.json says attn_implementation {names[0]!r}, which would let "
            "the solutions of a row see each other"
        )
        mend = f'set pack_sequences = false, or remove attn_implementation from that file ("{PACKING_ATTENTION[0]}")'
        context.report("data_sampling.pack_sequences", message, mend)


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
        content = _read_json(context, key, str(path), how_to_mend_model(folder))
        tokens = vocabulary_of(content)
        if tokens:
            return Tokenizer(key, path, tokens)
        if content is not _UNREADABLE:
            context.report(key, f"{path} holds no vocabulary", how_to_mend_model(folder))
    if silent:
        del context.problems[problems:]
    return None


def _check_tokenizer_fits(context: Context, model: str, config: dict[str, Any]) -> Tokenizer | None:
    """The model embeds every token; its tokenizer, or None once it is reported what is wrong."""
    tokenizer = read_tokenizer(context, model)
    size = config.get("vocab_size")
    if tokenizer and type(size) is int and (highest := max(tokenizer.tokens)) >= size:
        message = (
            f"{context.path(f'models.{model}.path')} embeds {size} tokens, but {tokenizer.path} has one of id "
            f"{highest}: {json.dumps(tokenizer.tokens[highest])}"
        )
        context.report(tokenizer.key, message, "name the tokenizer that belongs to the model")
    return tokenizer


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
        reference.key,
        f"its tokenizer is not the policy's: token {first} is {theirs} in {reference.path}, "
        f"but {ours} in {policy.path}",
        "use a reference model with the policy's tokenizer",
    )


MODEL_CHECKS: tuple[Check, ...] = (check_policy, check_reference, check_reward_model)
