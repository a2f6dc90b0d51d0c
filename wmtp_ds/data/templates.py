"""How a row's problem becomes the prompt: the text in front of the solution."""

from collections.abc import Callable

from wmtp_ds.data.rows import Row
from wmtp_ds.errors import UserError

Template = Callable[[Row], str]

# Word for word as in Stanford Alpaca (https://github.com/tatsu-lab/stanford_alpaca, train.py): models that
# were tuned on it know exactly this text, with no line end after "### Response:".
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def alpaca(row: Row) -> str:
    """The Stanford Alpaca prompt, with the "Input" section only where the row has an input."""
    if row.input:
        return _ALPACA_WITH_INPUT.format(instruction=row.instruction, input=row.input)
    return _ALPACA_WITHOUT_INPUT.format(instruction=row.instruction)


def plain(row: Row) -> str:
    """The instruction, then the input if there is one, each followed by an empty line."""
    return "".join(f"{part}\n\n" for part in (row.instruction, row.input) if part)


TEMPLATES: dict[str, Template] = {"alpaca": alpaca, "plain": plain}


def get_template(name: str) -> Template:
    """The template of that name.

    Raises:
        UserError: there is none.
    """
    if name not in TEMPLATES:
        raise UserError(f'dataset.template: no template "{name}": choose one of {", ".join(sorted(TEMPLATES))}')
    return TEMPLATES[name]
