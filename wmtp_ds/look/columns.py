"""The stage of a run, its model and some rows -> what the stage sees in every token of their solutions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from wmtp_ds.checkpoint_export import export_beside
from wmtp_ds.checkpoint_files import is_complete
from wmtp_ds.config import Resolved, load_config
from wmtp_ds.data.batches import Collator
from wmtp_ds.data.index import DataIndex, build_index
from wmtp_ds.data.rows import Row
from wmtp_ds.data.templates import get_template
from wmtp_ds.data.text_encoder import TextEncoder
from wmtp_ds.errors import UserError
from wmtp_ds.handoff import VALUE_HEAD_FILE, check_value_head, load_value_head
from wmtp_ds.look.kinds import kinds_of
from wmtp_ds.look.rewards import Rewarder
from wmtp_ds.models.fingerprint import compute_trunk_fingerprint, read_trunk_fingerprint
from wmtp_ds.models.loading import load_policy, load_tokenizer
from wmtp_ds.models.reference import ReferenceModel
from wmtp_ds.models.value_head import ValueHead
from wmtp_ds.run_summary import BEST, FINAL
from wmtp_ds.scores.fit import Wanted, reasons
from wmtp_ds.scores.manifest import read_manifest
from wmtp_ds.stages.base import Stage, StageModel, make_stage


@dataclass(frozen=True)
class Chosen:
    """A row of a data file: its number among the rows, and its line."""

    row_id: int
    line: int
    row: Row


@dataclass(frozen=True)
class Token:
    """A token of a solution.

    Attributes:
        text: what it adds to the tokens before it; empty for the end token, and for all but the first of those that
            make up one character.
        kind: one of `wmtp_ds.look.kinds.KINDS`.
        columns: its entry in each column.
        part_of: the characters that it makes up together with its neighbours; empty for a token of whole characters.
    """

    text: str
    kind: str
    columns: dict[str, float]
    part_of: str = ""


@dataclass(frozen=True)
class Solution:
    """A solution with its tokens, the end token included."""

    row: Row
    line: int
    tokens: list[Token]


@dataclass(frozen=True)
class Looker:
    """A trained stage, ready to look at rows.

    Attributes:
        resolved: the config of its run.
        stage, model, reference: as the run had them; ``reference`` is None where the stage needs none.
        collator: of the run's template and lengths.
        rewarder: what gives solutions their rewards; None: their labels do.
    """

    resolved: Resolved
    stage: Stage
    model: StageModel
    reference: ReferenceModel | None
    collator: Collator
    rewarder: Rewarder | None
    device: torch.device

    @classmethod
    def load(cls, checkpoint: Path, device: torch.device) -> "Looker":
        """From an export (``checkpoint_best``), or a run's folder.

        Raises:
            UserError: it is none, or models that it needs are gone or others than the run had.
        """
        folder = find_export(checkpoint)
        # As the run had it: variables that are set today are of other runs.
        resolved = load_config(folder / "config.toml", checks=False, environ={})
        config, training = resolved.config, resolved.config.training
        stage = make_stage(config.experiment.stage, training)
        policy_folder = folder if stage.trains_policy else Path(config.models.policy.path)
        policy = load_policy(policy_folder)
        head = None
        if training.has_value_head:
            found = load_value_head(folder / VALUE_HEAD_FILE)
            check_value_head(
                found,
                hidden_size=policy.config.hidden_size,
                type=config.value_head.type,
                activation=config.value_head.activation,
                trunk_fingerprint=read_trunk_fingerprint(policy_folder) or compute_trunk_fingerprint(policy_folder),
            )
            head = ValueHead(found.hidden_size, config.value_head.type, config.value_head.activation)
            head.load_state_dict(found.state_dict)
        reference = None
        if training.needs_reference:
            reference_folder = _reference_folder(resolved, folder)
            reference = ReferenceModel(load_policy(reference_folder, n_future_tokens=1)).eval()
            torch.nn.Module.to(reference, device)
        model = StageModel(policy, head, stage).eval()
        torch.nn.Module.to(model, device)
        own = (folder / "tokenizer.json").is_file()
        tokenizer = load_tokenizer(folder if own else config.models.policy.tokenizer_path or policy_folder)
        collator = Collator(tokenizer, get_template(config.dataset.template), config.dataset.max_length)
        return cls(resolved, stage, model, reference, collator, Rewarder.of(resolved, device), device)

    def look(self, chosen: Sequence[Chosen], on_done: Callable[[int], None] = lambda count: None) -> list[Solution]:
        """What the stage sees in these rows; each is a batch of its own, as selection within one would otherwise mix.

        Args:
            chosen: rows of a data file.
            on_done: called with how many are done since the last call.

        Raises:
            UserError: a row lacks the score that its reward is made of.
            RunError: the reward model's score is not finite.
        """
        found = []
        for one in chosen:
            row = one.row
            batch = self.collator([row], [one.row_id])
            if not batch.supervised.any():
                continue  # too long
            if self.rewarder is not None:
                batch = replace(batch, rewards=torch.tensor([self.rewarder(row, one.line)]))
            with torch.no_grad():
                moved = batch.to(self.device)
                reference_BS = None if self.reference is None else self.reference(moved)
                columns = self.stage.look(self.model, moved, reference_BS)
            first = {name: column_BS[0].float().cpu()[batch.decisions[0]] for name, column_BS in columns.items()}
            found.append(Solution(row, one.line, tokens_of(row, first, self.collator.encoder)))
            on_done(1)
        return found


def _reference_folder(resolved: Resolved, export: Path) -> Path:
    """The reference model of a run, which may have read its losses alone.

    Raises:
        UserError: nothing says which it was, or its folder holds another model now.
    """
    reference = resolved.config.models.reference
    assert reference is not None
    if reference.scores is None:
        assert reference.path is not None
        return Path(reference.path)
    named = f"path = ... under [models.reference] in {export / 'config.toml'}"
    try:
        manifest = read_manifest(Path(reference.scores))
    except UserError as error:
        if reference.path is not None:
            return Path(reference.path)
        raise UserError(
            f"{export}: the run has read its reference's losses, and these solutions may be others: {error}. Name the "
            f"reference model: {named}"
        ) from None
    folder = Path(reference.path or manifest.reference.path)
    if found := reasons(manifest, Wanted(Path(reference.scores), reference=folder, read_weights=True)):
        raise UserError(f"{export}: {found[0].message}. Name the folder that holds the reference model: {named}")
    return folder


def tokens_of(row: Row, columns: Mapping[str, torch.Tensor], encoder: TextEncoder) -> list[Token]:
    """The tokens of a solution, the end token included.

    Args:
        row: of the solution.
        columns: by name, an entry for each of its decisions, in order: float ``[decisions]``.
        encoder: that made its token ids.
    """
    end_of_text = len(row.output)
    spans = [*encoder.spans(row.output), (end_of_text, end_of_text)]
    values = {name: column.tolist() for name, column in columns.items()}
    assert all(len(column) == len(spans) for column in values.values()), "a token for each decision"
    tokens, shown = [], 0
    for place, ((begin, end), kind) in enumerate(zip(spans, kinds_of(row.output, spans), strict=True)):
        # Tokens that are bytes of one character have the place of all of it.
        shared = begin < end and (begin < shown or (place + 1 < len(spans) and spans[place + 1][0] < end))
        entries = {name: column[place] for name, column in values.items()}
        part_of = row.output[begin:end] if shared else ""
        tokens.append(Token(row.output[max(begin, shown) : end], kind, entries, part_of))
        shown = max(shown, end)
    return tokens


def find_export(checkpoint: Path) -> Path:
    """The export that a path names: itself, the best one of a run's folder, or that of a checkpoint, made once.

    Raises:
        UserError: there is none.
    """
    for folder in (checkpoint, checkpoint / BEST, checkpoint / FINAL):
        if (folder / "config.toml").is_file() and (folder / "metrics.json").is_file():
            return folder
    if is_complete(checkpoint):
        return export_beside(checkpoint)
    if not checkpoint.exists():
        raise UserError(f"{checkpoint} does not exist: give an export of a run ({BEST}), or the run's folder")
    raise UserError(
        f"{checkpoint} is no export of a run: config.toml or metrics.json is missing. Give {BEST}, a run's folder, or "
        "make one: wmtp-ds checkpoint export CHECKPOINT DEST"
    )


def choose_rows(data: Path, problems: int, solutions: int) -> list[Chosen]:
    """Rows of the first problems that have solutions of both kinds, or else of the first problems.

    Args:
        data: a data file.
        problems: how many.
        solutions: of each problem, right and wrong ones in turn.
    """
    index: DataIndex = build_index(data)
    by_problem: dict[int, tuple[list[int], list[int]]] = {}
    for place in range(len(index)):
        kinds = by_problem.setdefault(int(index.problem[place]), ([], []))
        kinds[int(not index.is_correct[place])].append(place)
    both = [kinds for kinds in by_problem.values() if all(kinds)]
    chosen = []
    for right, wrong in (both or list(by_problem.values()))[:problems]:
        turns = [place for pair in zip(right, wrong, strict=False) for place in pair]
        rest = [place for place in (*right, *wrong) if place not in turns]
        chosen += sorted((turns + rest)[:solutions])
    return [Chosen(place, int(index.line[place]), index.read_row(place)) for place in chosen]
