"""Prompts, word for word."""

import pytest

from wmtp_ds.data.rows import Row
from wmtp_ds.data.templates import TEMPLATES, get_template
from wmtp_ds.errors import UserError

WITHOUT_INPUT = Row("p", "Return {x} twice.", "code", True)
WITH_INPUT = Row("p", "Return {x} twice.", "code", True, input="%s {0}")


def test_alpaca_without_input():
    assert get_template("alpaca")(WITHOUT_INPUT) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nReturn {x} twice.\n\n### Response:"
    )


def test_alpaca_with_input():
    assert get_template("alpaca")(WITH_INPUT) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write "
        "a response that appropriately completes the request.\n\n### Instruction:\nReturn {x} twice.\n\n"
        "### Input:\n%s {0}\n\n### Response:"
    )


def test_plain():
    assert get_template("plain")(WITHOUT_INPUT) == "Return {x} twice.\n\n"
    assert get_template("plain")(WITH_INPUT) == "Return {x} twice.\n\n%s {0}\n\n"


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_no_template_shows_the_solution(name):
    assert "code" not in get_template(name)(WITH_INPUT)


def test_an_unknown_template_names_the_key_and_the_choices():
    with pytest.raises(UserError, match=r'dataset\.template: no template "vicuna": choose one of alpaca, plain'):
        get_template("vicuna")
