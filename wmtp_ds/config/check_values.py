"""Checks between values: what the type of a single key cannot say. No file is read."""

import itertools
import math
import re
from urllib.parse import urlsplit

from wmtp_ds.config.context import Check, Context
from wmtp_ds.config.errors import did_you_mean
from wmtp_ds.masking import mask_urls

_STORES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")
_ROUNDING = 1e-9


def check_critic_is_named(context: Context) -> None:
    """A stage that needs a critic says which."""
    key = "experiment.critic_checkpoint"
    training = context.training
    if training and training.needs_critic and not context.is_set(key):
        message = f"is required by stage {training.stage}: the critic's checkpoint, a path or an MLflow URI"
        mend = (
            'write critic_checkpoint = "checkpoints/critic-7b/checkpoint_best" under [experiment], or give '
            "--critic-checkpoint when training"
        )
        context.report(key, message, mend)


def check_batch(context: Context) -> None:
    """One batch must not be more than one epoch."""
    batch, samples = context.get("training.batch_size"), context.get("data_sampling.n_samples")
    if batch is not None and samples is not None and batch > samples:
        where = context.origin("data_sampling.n_samples")
        message = f"is {batch}, more than data_sampling.n_samples = {samples} ({where})"
        context.report("training.batch_size", message, f"lower it to at most {samples}, or raise n_samples")


def check_packing(context: Context) -> None:
    """Packing has something to pack, and keeps losses as they are."""
    key = "data_sampling.pack_sequences"
    if context.get(key) is not True:
        return
    if context.get("training.batch_size") == 1:
        message = f"has no effect where training.batch_size is 1 ({context.origin('training.batch_size')})"
        context.warn(key, message, "raise batch_size: micro-batches of that many solutions share fewer, fuller rows")
    if context.get("training.selection_scope") == "batch" and context.get("training.weighting") == "topk":
        message = 'puts other solutions into a micro-batch, in which rho1 selects (training.selection_scope = "batch")'
        context.warn(key, message, 'set selection_scope = "sequence" for losses that do not depend on packing')


def check_bounds(context: Context) -> None:
    """Lower bounds lie below upper ones."""
    for low, high in (
        ("training.weight_clip_min", "training.weight_clip_max"),
        ("early_stopping.variance_min", "early_stopping.variance_max"),
    ):
        lower, upper = context.get(low), context.get(high)
        if lower is not None and upper is not None and lower > upper:
            message = f"is {lower}, above {high} = {upper} ({context.origin(high)})"
            context.report(low, message, "exchange the two, or correct one of them")
    for key in ("data_sampling.difficulty_range", *_bins(context)):
        ends = context.get(key)
        if ends and ends[0] > ends[1]:
            context.report(key, f"ends at {ends[1]}, before it begins at {ends[0]}", f"write {ends[::-1]}")


def check_bins(context: Context) -> None:
    """Each difficulty lies in one bin at most."""
    bins = {key: context.get(key) for key in _bins(context)}
    ordered = sorted((ends[0], ends[1], key) for key, ends in bins.items() if ends and ends[0] <= ends[1])
    for (_, end, first), (begin, _, second) in itertools.pairwise(ordered):
        if begin <= end:
            message = f"shares difficulty {begin} with {first} = {bins[first]}"
            context.report(second, message, "give each difficulty to one bin only")


def _bins(context: Context) -> list[str]:
    bins = context.get("data_sampling.difficulty_bins")
    # A name that no dotted key can spell is reported by check_bin_names, and left alone here.
    return [f"data_sampling.difficulty_bins.{name}" for name in bins or {} if _is_name(name)]


def check_bin_names(context: Context) -> None:
    """Names of bins can be typed in a dotted key."""
    bins = context.get("data_sampling.difficulty_bins")
    for name in bins or {}:
        if not _is_name(name):
            context.report(
                "data_sampling.difficulty_bins",
                f"{name!r} is not a usable name for a bin",
                "use letters, digits, '_' and '-' only",
            )


def _is_name(name: str) -> bool:
    return re.fullmatch(r"[A-Za-z0-9_-]+", name) is not None


def check_curriculum(context: Context) -> None:
    """The phases cover the run without a gap, and each draws something."""
    key = "data_sampling.curriculum_schedule"
    schedule = context.get(key)
    if schedule is None:
        return
    if not schedule:
        if context.get("data_sampling.curriculum_learning"):
            mend = "add a phase [[data_sampling.curriculum_schedule]], or set curriculum_learning = false"
            context.report(key, "is empty, but data_sampling.curriculum_learning is true", mend)
        return
    if _phases_run_forwards(context, len(schedule)):
        _check_cover(context, [tuple(phase["epoch_range"]) for phase in schedule])
    for index, phase in enumerate(schedule):
        _check_weights(context, f"{key}[{index}].difficulty_weights", phase["difficulty_weights"])


def _phases_run_forwards(context: Context, count: int) -> bool:
    right = True
    for index in range(count):
        key = f"data_sampling.curriculum_schedule[{index}].epoch_range"
        begin, end = context.get(key)
        if begin >= end:
            message = f"is [{begin}, {end}]: it must end after it begins"
            context.report(key, message, "write [begin, end] in fractions of the run, as in [0.0, 0.3]")
            right = False
    return right


def _check_cover(context: Context, ranges: list[tuple[float, float]]) -> None:
    key = "data_sampling.curriculum_schedule"
    ordered = sorted(range(len(ranges)), key=lambda index: ranges[index])
    covered, before = 0.0, ""
    for index in ordered:
        begin, end = ranges[index]
        here = f"{key}[{index}].epoch_range"
        if begin > covered + _ROUNDING:
            after = f"{before} ends at {covered}" if before else "the run starts at 0.0"
            message = f"begins at {begin}, but {after}: no phase covers [{covered}, {begin}]"
            context.report(here, message, f"begin it at {covered}, or add a phase in between")
        elif begin < covered - _ROUNDING and before:
            message = f"[{begin}, {end}] overlaps {before}; where they do, the earlier one wins"
            context.warn(here, message, f"begin it at {covered} if that was not meant")
        if end > covered:
            covered, before = end, here
    if covered < 1 - _ROUNDING:
        message = f"ends at {covered}: no phase covers [{covered}, 1.0]"
        context.report(before, message, "let the last phase end at 1.0")


def _check_weights(context: Context, key: str, weights: dict[str, float]) -> None:
    bins = context.get("data_sampling.difficulty_bins")
    if bins is not None:
        for name in weights:
            if name not in bins:
                mend = did_you_mean(name, bins) or f"the bins are {', '.join(bins)}"
                context.report(key, f"names the bin {name!r}, which data_sampling.difficulty_bins has not", mend)
    total = math.fsum(weights.values())
    if total <= 0:
        context.report(key, "all weights are 0: the phase would draw nothing", "give one bin a weight above 0")
    elif not math.isclose(total, 1, abs_tol=1e-6):
        shares = ", ".join(f"{name} = {weight / total:.4g}" for name, weight in weights.items())
        context.warn(key, f"sum to {total:.6g}, not to 1; they are normalised: {shares}", "write these shares")


def check_reward(context: Context) -> None:
    """A reward model has a path, and a path has a use."""
    source = context.get("models.reward.source")
    if source == "model" and not context.is_set("models.reward.path"):
        where = context.origin("models.reward.source")
        message = f'is required where models.reward.source = "model" ({where})'
        context.report("models.reward.path", message, "write path = ... under [models.reward]")
    elif source in ("is_correct", "scores") and context.is_set("models.reward.path"):
        message = f'is set, but models.reward.source = "{source}" reads no reward model'
        context.report("models.reward.path", message, 'set source = "model", or remove the path')


def check_reference_is_named(context: Context) -> None:
    """A stage that compares with a reference has its model, or what that has to say."""
    key, scores = "models.reference.path", "models.reference.scores"
    training = context.training
    if not (training and training.needs_reference) or context.is_set(key) or context.is_set(scores):
        return
    message = f"is required by stage {training.stage}: the reference model's folder"
    mend = (
        'write path = "storage/models/micro-reference" under [models.reference], or name its losses of the data in '
        "scores (wmtp-ds data score)"
    )
    context.report(key, message, mend)


def check_precision(context: Context) -> None:
    """float16 needs a GPU, and a dtype that is not used should be known."""
    for model in ("policy", "reference", "reward"):
        key = f"models.{model}.dtype"
        dtype = context.get(key)
        if dtype is None or (model == "reward" and context.get("models.reward.source") != "model"):
            continue
        if model == "reference" and context.get("models.reference.scores") is not None:
            continue  # it computes nothing
        if dtype == "float16" and context.get("runtime.device") == "cpu":
            message = f"float16 does not train on a CPU (runtime.device, {context.origin('runtime.device')})"
            context.report(key, message, 'use "bfloat16" or "float32"')
        elif model == "policy" and dtype != "float32" and context.get("runtime.mixed_precision") is False:
            message = f"{dtype} is not used: runtime.mixed_precision = false computes in float32 throughout"
            context.warn(key, message, "set mixed_precision = true, or the dtype to float32")


def check_monitor(context: Context) -> None:
    """Early stopping watches a loss that the stage has."""
    key = "early_stopping.monitor"
    if context.training and context.get(key) == "value_loss" and not context.training.has_value_head:
        message = f"stage {context.training.stage} has no value head, so no value_loss"
        context.report(key, message, 'use "loss"')


def check_stability(context: Context) -> None:
    """What counts as a spike is above the median, and a rollback has something to go back to."""
    key = "stability.spike_factor"
    factor = context.get(key)
    if factor is None:
        return
    if 0 < factor <= 1:
        message = f"is {factor}: every loss above the median, or every loss, would be a spike"
        context.report(key, message, "give a factor above 1, as in 3.0, or 0.0 for off")
    if context.get("stability.on_spike") == "rollback":
        every = "checkpoint.save_checkpoint_every"
        if factor == 0:
            where = context.origin("stability.on_spike")
            message = f'is 0.0, so nothing is a spike, and stability.on_spike = "rollback" ({where}) has no effect'
            context.warn(key, message, "give a factor above 1, as in 3.0")
        elif context.get(every) == 0:
            message = 'is 0, so stability.on_spike = "rollback" has no checkpoint to go back to'
            context.warn(every, message, "give the epochs between two checkpoints")


def check_tracking(context: Context) -> None:
    """The tracking URI is one that MLflow will open."""
    key = "mlflow.tracking_uri"
    uri = context.get(key)
    if not uri:
        return
    try:
        scheme = urlsplit(uri).scheme.partition("+")[0]
    except ValueError as error:
        context.report(key, f"{mask_urls(uri)} is not a URI: {error}", 'use "sqlite:///mlflow.db", or "" for off')
        return
    if scheme in _STORES or uri == "databricks":
        return
    if scheme in ("", "file"):
        if context.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() == "true":
            return
        message = f"{uri} is a plain folder, which MLflow no longer opens as a store"
        mend = 'use "sqlite:///mlflow.db", a server\'s http:// address, or "" for no tracking'
    else:
        message = f"MLflow knows no store {scheme}://"
        mend = did_you_mean(scheme, _STORES) or f"use one of {', '.join(_STORES)}"
    context.report(key, message, mend)


VALUE_CHECKS: tuple[Check, ...] = (
    check_critic_is_named,
    check_batch,
    check_packing,
    check_bounds,
    check_bins,
    check_bin_names,
    check_curriculum,
    check_reward,
    check_reference_is_named,
    check_precision,
    check_monitor,
    check_stability,
    check_tracking,
)
