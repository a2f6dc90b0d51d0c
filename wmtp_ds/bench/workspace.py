"""All that a run reads, made up: model configs, a tokenizer, data, and the stage's own config with these put in.

Rows look like code solutions in what matters to the time of a step: three of four fill the sequence, and one is shorter
(three fifths of it) and padded; a quarter of a row's tokens are prompt, the rest is the supervised solution with its
end token. On average a tenth of a batch is padding, 22.5 % are prompts and 67.5 % solutions; the measured
steps' shares are reported. Every other row is correct. Words are drawn uniformly, and one word is one token.
"""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wmtp_ds.bench.settings import CONFIG_FILE, StepSettings
from wmtp_ds.bench.sizes import REFERENCES, SIZES, Shape
from wmtp_ds.config import Resolved, load_config
from wmtp_ds.config.errors import did_you_mean
from wmtp_ds.config.training import stage_names, training_class
from wmtp_ds.data.rows import Row
from wmtp_ds.data.templates import get_template
from wmtp_ds.errors import UserError
from wmtp_ds.models.fingerprint import FILE_NAME as FINGERPRINT_FILE

ROWS = 512
SHORT, SHORT_EVERY, PROMPT = 0.6, 4, 0.25
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
# Folders of a checkout that configs lie in.
_CONFIG_FOLDERS = ("stage_configs", "ds_configs")


def config_root() -> Path:
    """Where the stages' configs lie: the current directory if it has them, else the checkout that this code is from.

    Raises:
        UserError: if neither has them.
    """
    for root in (Path.cwd(), Path(__file__).resolve().parents[2]):
        if all((root / name).is_dir() for name in _CONFIG_FOLDERS):
            return root
    raise UserError("there are no stage_configs/ and ds_configs/ here: run this in a checkout of the project.")


def resolve(settings: StepSettings, folder: Path, chosen: Sequence[str], overrides: Sequence[str]) -> Resolved:
    """The stage's production config with a measurement's models and data put in.

    Args:
        settings: the measurement.
        folder: where models and data are going to lie.
        chosen: ``key=value`` of what was given as options; they win over ``overrides``.
        overrides: ``key=value`` as typed.

    Raises:
        UserError: every problem of the config, or of an override.
    """
    stage, device = settings.stage, settings.device
    if stage not in stage_names():
        hint = did_you_mean(stage, stage_names()) or f"there are: {', '.join(stage_names())}."
        raise UserError(f"--stage {stage}: there is no such stage; {hint}")
    root, needs_reference = config_root(), training_class(stage).needs_reference
    deepspeed = root / "ds_configs" / ("zero3.json" if device == "cuda" else "zero3_cpu.json")
    defaults = [f"deepspeed.config={json.dumps(str(deepspeed))}"]
    if needs_reference:
        defaults.append(f"deepspeed.reference_config={json.dumps(str(root / 'ds_configs' / 'zero3_reference.json'))}")
    scores = 2 * settings.warmup + 3 * settings.steps if settings.compare_scores else 0
    ours: dict[str, object] = {
        "experiment.name": f"bench-{stage}",
        "models.policy.path": str(folder / "policy"),
        "dataset.train": str(folder / "train.jsonl"),
        "dataset.validation": str(folder / "validation.jsonl"),
        "dataset.max_length": settings.sequence_length,
        "dataset.cache_dir": str(folder / "tokens"),
        "data_sampling.n_samples": ROWS // 2,  # as many are correct
        "training.n_epochs": 1_000_000.0,
        # One between the two passes, and one more than are taken: the last step of a run is followed by other things.
        "training.max_steps": settings.warmup + 2 * settings.steps + 2 + scores,
        "checkpoint.save_dir": str(folder / "run"),
        "runtime.device": device,
        "mlflow.tracking_uri": "",
    }
    if settings.only_scores:
        ours["models.reference.scores"] = str(folder / "scores")
    if needs_reference:
        ours["models.reference.path"] = str(folder / "reference")
        # The reference computes in the policy's dtype.
        dtypes = [text.replace("policy", "reference", 1) for text in chosen if text.startswith("models.policy.dtype=")]
        chosen = [*chosen, *dtypes]
    fixed = [f"{key}={json.dumps(value)}" for key, value in ours.items()]
    # Their files are made only after the config is known to be right.
    config = root / "stage_configs" / f"{stage}.toml"
    return load_config(config, [*defaults, *overrides, *chosen, *fixed], checks=False, environ={})


def write_workspace(folder: Path, resolved: Resolved, settings: StepSettings) -> None:
    """Write settings, config, models (without weights), tokenizer and data."""
    settings.write(folder)
    size, max_length = settings.size, settings.sequence_length
    (folder / CONFIG_FILE).write_text(resolved.toml())
    policy = SIZES[size]
    _write_model(folder / "policy", policy.fields(max_length=max_length, attention=settings.attention))
    if resolved.config.models.reference is not None:
        reference = REFERENCES[size].fields(max_length=max_length, attention=settings.attention)
        _write_model(folder / "reference", reference)
    tokenizer = _make_tokenizer(policy)
    tokenizer.save_pretrained(folder / "policy")
    # Words of the template count as tokens, too.
    template = get_template(resolved.config.dataset.template)
    empty = template(Row(problem_id="", instruction="", output="", is_correct=True))
    frame = len(tokenizer(empty, add_special_tokens=False)["input_ids"])
    rng = random.Random(0)
    _write_rows(folder / "train.jsonl", ROWS, policy.vocab_size, max_length, frame, rng)
    _write_rows(folder / "validation.jsonl", 4, policy.vocab_size, max_length, frame, rng)


def _write_model(folder: Path, fields: dict[str, object]) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=1) + "\n")
    # There are no weights to take one of, and nothing is compared with it.
    (folder / FINGERPRINT_FILE).write_text(json.dumps({"sha256": "0" * 64}) + "\n")


def _make_tokenizer(shape: Shape) -> Any:
    """One token a word, so that lengths come out as planned."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL_TOKENS.values(), *(_word(i) for i in range(shape.vocab_size - len(SPECIAL_TOKENS)))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL_TOKENS["unk_token"]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL_TOKENS)


def _word(number: int) -> str:
    return f"w{number}"


def _write_rows(file: Path, count: int, vocabulary: int, max_length: int, frame: int, rng: random.Random) -> None:
    def words(number: int) -> str:
        return " ".join(_word(rng.randrange(vocabulary - len(SPECIAL_TOKENS))) for _ in range(max(1, number)))

    with file.open("w") as stream:
        for number in range(count):
            # Correct and incorrect rows are short alike: pairs of one of each.
            length = round(max_length * (SHORT if number // 2 % SHORT_EVERY == SHORT_EVERY - 1 else 1.0))
            prompt = max(frame + 1, round(length * PROMPT))
            row = {
                "problem_id": f"p{number // 2}",
                "instruction": words(prompt - frame - 1),  # the beginning's token is of the prompt
                "output": words(length - prompt - 1),  # so is the end's of the solution
                "is_correct": number % 2 == 0,
                "difficulty": 1 + number // 2 % 11,
            }
            stream.write(json.dumps(row) + "\n")
