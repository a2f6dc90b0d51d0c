"""DeepSpeed's JSON files: what they must and must not say, and how the TOML's values are put into them."""

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from wmtp_ds.config.context import Check, Context, why_no_file
from wmtp_ds.config.deepspeed_keys import OWNED, TOP_KEYS, ZERO_KEYS, ZERO_NUMBERS, ZERO_OBJECTS
from wmtp_ds.config.errors import did_you_mean
from wmtp_ds.config.positions import json_lines
from wmtp_ds.config.schema import ReferenceConfig, RewardConfig, RunConfig
from wmtp_ds.config.sources import excess
from wmtp_ds.files import read_bytes, twice

CONFIG = "deepspeed.config"
REFERENCE_CONFIG = "deepspeed.reference_config"

_ZERO = "zero_optimization"
# DeepSpeed's own throughput timer waits for the device twice in each micro-batch, for a line that is never printed.
_NO_TIMERS = {"throughput": {"enabled": False, "synchronized": False}}
_DEVICES = ("cpu", "nvme", "none")


class _File:
    """A DeepSpeed JSON under examination."""

    def __init__(self, context: Context, key: str, path: str, values: dict[str, Any], lines: dict[Any, int]):
        self.context, self.key, self.path, self.values, self.lines = context, key, path, values, lines

    def report(self, where: tuple[str, ...], message: str, mend: str) -> None:
        line = next((self.lines[where[:n]] for n in range(len(where), 0, -1) if where[:n] in self.lines), None)
        place = f"{self.path}:{line}" if line else self.path
        self.context.report(self.key, f"{place} {message}", mend)

    @property
    def zero(self) -> dict[str, Any] | None:
        section = self.values.get(_ZERO)
        return section if isinstance(section, dict) else None


def read_deepspeed(path: str) -> tuple[dict[str, Any], str]:
    """A DeepSpeed JSON's values, and its text.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON object; the message says why.
    """
    text = read_bytes(path, 2**20).decode("utf-8-sig")
    try:
        values = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError("it is no JSON object {...}")
    if what := excess(values):
        raise ValueError(f"it has {what}")
    return values, text


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (name := twice([name for name, _ in pairs])) is not None:  # of which json would keep the last
        raise ValueError(f'the key "{name}" stands twice in one object')
    return dict(pairs)


def _open(context: Context, key: str) -> _File | None:
    path = context.path(key)
    if path is None:
        return None
    mend = "name one of the files in ds_configs/"
    if what := why_no_file(path):
        context.report(key, f"{path} {what}", mend)
        return None
    mend = "correct it, or name one of the files in ds_configs/"
    try:
        values, text = read_deepspeed(path)
    except json.JSONDecodeError as error:
        context.report(key, f"{path}:{error.lineno} is not JSON: {error.msg} (column {error.colno})", mend)
    except OSError as error:
        context.report(key, f"{path} cannot be read: {error.strerror}", mend)
    except ValueError as error:
        context.report(key, f"{path} cannot be used: {error}", mend)
    else:
        return _File(context, key, path, values, json_lines(text))
    return None


def check_config(context: Context) -> None:
    """The JSON of the trained model."""
    file = _open(context, CONFIG)
    if file is None:
        return
    _check_all(file, "no rank may need to hold the whole model, so it is trained with stage 3")


def check_reference_config(context: Context) -> None:
    """The JSON of frozen models, reference or reward: stage 3, and nothing that trains."""
    scores = context.get("models.reward.source") == "model"
    if not (context.training and (context.training.needs_reference or (context.training.uses_rewards and scores))):
        return
    file = _open(context, REFERENCE_CONFIG)
    if file is None:
        return
    _check_all(file, "a model without an optimizer needs stage 3")
    if (file.zero or {}).get("offload_optimizer"):
        message = "offloads an optimizer, but a frozen model has none"
        file.report((_ZERO, "offload_optimizer"), message, "remove offload_optimizer")


def _check_all(file: _File, why_stage_3: str) -> None:
    """What is asked of both files."""
    for name in file.values:
        if name not in TOP_KEYS and not (name.startswith("zero") and _ZERO not in file.values):
            _report_unknown(file, (name,), TOP_KEYS)
    _check_owned(file)
    _check_leaves(file)
    _check_zero(file, why_stage_3)


def _report_unknown(file: _File, where: tuple[str, ...], known: tuple[str, ...]) -> None:
    message = f'sets "{".".join(where)}", which DeepSpeed does not know'
    file.report(where, message, did_you_mean(where[-1], known) or "remove it")


def _check_owned(file: _File) -> None:
    """Batch size, accumulation, learning rate, clipping and precision live in the TOML alone."""
    for name, owners in OWNED.items():
        if name in file.values:
            if file.key == REFERENCE_CONFIG:
                training = file.context.training
                frozen = "models.reference" if training and training.needs_reference else "models.reward"
                owners = tuple(owner.replace("models.policy", frozen) for owner in owners)
            shown = json.dumps(file.values[name])
            places = " and ".join(f"{owner} ({file.context.origin(owner)})" for owner in owners)
            message = f'sets "{name}" = {shown[:60]}, which {places} own{"s" if len(owners) == 1 else ""}'
            file.report((name,), message, f'remove "{name}" from the JSON and set {owners[0]}')
    checkpoint = file.values.get("checkpoint")
    if isinstance(checkpoint, dict) and checkpoint.get("tag_validation", "Fail") != "Fail":
        message = 'sets "tag_validation" to other than "Fail": ranks could save different steps unnoticed'
        file.report(("checkpoint", "tag_validation"), message, "remove it")


def _check_leaves(file: _File) -> None:
    for where, value in _leaves(file.values, ()):
        name = ".".join(where)
        if value == "auto":
            file.report(where, f'has "auto" for {name}, which only the Hugging Face Trainer fills in', "remove it")
        elif isinstance(value, float) and not math.isfinite(value):
            file.report(where, f"has {json.dumps(value)} for {name}, which is no number", "write a number")


def _leaves(value: Any, where: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each value that is neither object nor array, with its key; an array's items have the array's."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves(item, (*where, name))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, where)
    else:
        yield where, value


def _check_zero(file: _File, why_stage_3: str) -> None:
    zero = file.zero
    if zero is None:
        hint = did_you_mean(_ZERO, [name for name in file.values if name != _ZERO])
        found = f" ({hint.removeprefix('did you mean ').rstrip('?')} is there)" if hint else ""
        message = f'has no "{_ZERO}" section{found}' if _ZERO not in file.values else f'"{_ZERO}" is no object'
        file.report((_ZERO,), message, f'write "{_ZERO}": {{"stage": 3}}')
        return
    for name, value in zero.items():
        if name not in ZERO_KEYS:
            _report_unknown(file, (_ZERO, name), ZERO_KEYS)
        elif name not in ("stage", "offload_param", "offload_optimizer") and not _is_reported(value):
            _check_kind(file, name, value)
    for name in ("offload_param", "offload_optimizer"):
        section = zero.get(name)
        if isinstance(section, dict):
            _check_offload(file, name, section)
        elif section is not None:
            file.report((_ZERO, name), f'"{name}" is no object', f'write "{name}": {{"device": "cpu"}}')
    stage = zero.get("stage")
    if stage is None:
        file.report((_ZERO,), f'"{_ZERO}" has no stage', 'write "stage": 3')
    elif isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        file.report((_ZERO, "stage"), f"has the unknown ZeRO stage {json.dumps(stage)}", 'write "stage": 3')
    elif stage != 3:
        file.report((_ZERO, "stage"), f"has stage {stage}; {why_stage_3}", 'write "stage": 3')


def _is_reported(value: Any) -> bool:
    """Whether `_check_leaves` has said what is wrong, or nothing is given."""
    return value in (None, "auto") or (isinstance(value, float) and not math.isfinite(value))


def _check_kind(file: _File, name: str, value: Any) -> None:
    """DeepSpeed would raise on every rank, once all have started."""
    if name in ZERO_OBJECTS:
        fits, kind, example = isinstance(value, dict), "an object", "{}"
    elif name in ZERO_NUMBERS:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        fits = is_number and 0 <= value < 2**63 and value == int(value)
        kind, example = "a whole number of at least 0", "100000"
    else:
        fits, kind, example = isinstance(value, bool), "true or false", "true"
    if not fits:
        message = f"has {json.dumps(value)[:60]} for {_ZERO}.{name}, which must be {kind}"
        file.report((_ZERO, name), message, f'write "{name}": {example}')


def _check_offload(file: _File, name: str, section: dict[str, Any]) -> None:
    device = section.get("device")
    where = (_ZERO, name, "device")
    if device not in _DEVICES:
        message = f'offloads to {json.dumps(device)}; "{name}" needs a device: {", ".join(_DEVICES)}'
        file.report(where, message, did_you_mean(str(device), _DEVICES) or 'write "device": "cpu"')
    elif device == "nvme" and not section.get("nvme_path"):
        file.report(where, f'offloads to nvme, but "{name}" has no nvme_path', 'write "nvme_path": "/local_nvme"')


def offloads(values: Mapping[str, Any], *sections: str) -> bool:
    """Whether any of these sections (``offload_optimizer``, ``offload_param``) moves what it is about off the device.

    Args:
        values: a valid DeepSpeed JSON's.
        sections: names within ``zero_optimization``.
    """
    zero = values[_ZERO]
    return any((zero.get(name) or {}).get("device", "none") != "none" for name in sections)


def merge_training(config: RunConfig, values: dict[str, Any], world_size: int) -> dict[str, Any]:
    """The JSON of the trained model with what the TOML owns filled in.

    Args:
        config: the run's config.
        values: what the JSON file says.
        world_size: the number of ranks.
    """
    training = config.training
    merged = {
        "wall_clock_breakdown": False,
        "timers": _NO_TIMERS,
        **values,
        "train_batch_size": training.batch_size * training.gradient_accumulation_steps * world_size,
        "train_micro_batch_size_per_gpu": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        # Never left out: DeepSpeed would clip at 1.0 then.
        "gradient_clipping": training.max_grad_norm,
        "checkpoint": {**values.get("checkpoint", {}), "tag_validation": "Fail"},
        "steps_per_print": 2**31 - 1,  # this program prints its own line
        **_precision(config.models.policy.dtype, config.runtime.mixed_precision),
    }
    if training.optimizer == "sgd":
        merged["zero_allow_untested_optimizer"] = True  # DeepSpeed's list of tested ones has Adam's kin only
    return merged


def merge_reference(
    config: RunConfig, frozen: ReferenceConfig | RewardConfig, values: dict[str, Any]
) -> dict[str, Any]:
    """The JSON of a frozen model with what the TOML owns filled in: no optimizer."""
    return {
        "timers": _NO_TIMERS,
        **values,
        "train_micro_batch_size_per_gpu": config.training.batch_size,
        "steps_per_print": 2**31 - 1,
        **_precision(frozen.dtype, config.runtime.mixed_precision),
    }


def _precision(dtype: str, mixed_precision: bool) -> dict[str, Any]:
    """DeepSpeed keeps float32 masters wherever bf16 or fp16 is on."""
    if not mixed_precision or dtype == "float32":
        return {}
    return {"bf16" if dtype == "bfloat16" else "fp16": {"enabled": True}}


DEEPSPEED_CHECKS: tuple[Check, ...] = (check_config, check_reference_config)
