"""Programs in answers: fenced, bare, and where a completion ends."""

import pytest

from wmtp_ds.evaluate.answers import completed, cut_completion, is_over, program_of, same_text


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("def f():\n    return 1\n", "def f():\n    return 1\n"),
        ("Here it is:\n```python\ndef f():\n    return 1\n```\nIt returns 1.", "def f():\n    return 1"),
        ("```py\nx = 1\n```", "x = 1"),
        ("```\nx = 1\n```", "x = 1"),
        ("``` Python3 \nx = 1\n```", "x = 1"),
        ("```bash\npip install x\n```\n```python\nx = 2\n```", "x = 2"),
        ("```bash\nls\n```", "```bash\nls\n```"),
        ("```python\ndef f():\n    return 1", "def f():\n    return 1"),  # cut off
        ("", ""),
        ("```python\na = 1\n```\n```python\nb = 2\n```", "a = 1"),
    ],
)
def test_the_program_in_an_answer(answer: str, program: str) -> None:
    assert program_of(answer) == program


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("    return 1\n", "    return 1\n"),
        ("    return 1\n\ndef g():\n    pass", "    return 1\n"),
        ("    return 1\nclass A: pass", "    return 1"),
        ("    return 1\nif __name__ == '__main__':\n    f()", "    return 1"),
        ("    return 1\nprint(f())", "    return 1"),
        ("    return 1\n# a comment", "    return 1"),
        ("    # a comment inside\n    return 1", "    # a comment inside\n    return 1"),
        ("    x = 1\n    if x:\n        return x", "    x = 1\n    if x:\n        return x"),
        ("    return 1\n@decorated", "    return 1"),
        ("    return 1\n```\nDone.", "    return 1"),
        ("    return 1\nimportant = 2", "    return 1\nimportant = 2"),
    ],
)
def test_where_a_completion_ends(answer: str, kept: str) -> None:
    assert cut_completion(answer) == kept
    assert is_over(answer) == (kept != answer)
    assert completed("def f():\n", answer) == "def f():\n" + kept


def test_the_same_text() -> None:
    assert same_text("def f():  \n    return 1\n\n", "\ndef f():\n    return 1")
    assert not same_text("def f():\n    return 1", "def f():\n   return 1")
    assert not same_text("def f():\n    return 1", "def f():\n\n    return 1")
