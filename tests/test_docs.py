"""The documentation says what is so: links, commands and keys exist, tables and code are the program's."""

import ast
import math
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Literal, get_args, get_origin

import click
import pytest
from doc_pages import (
    DOCS,
    PAGES,
    README,
    REPOSITORY,
    Command,
    commands,
    fenced,
    headings,
    inline_code,
    name_of,
    prose,
)
from doc_pages import tables as tables_of
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from wmtp_ds.cli.main import COMMANDS, cli
from wmtp_ds.config import load_config
from wmtp_ds.config.schema import RunConfig
from wmtp_ds.config.training import TrainingConfig, stage_names, training_class

STAGES = ("baseline", "critic", "verifiable", "rho1")
ids = pytest.mark.parametrize("page", PAGES, ids=name_of)


# --- links ---


def links(page: Path) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in link]


@ids
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in links(page):
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{name_of(page)}: {link}"
        if anchor:
            assert anchor in headings(target), f"{name_of(page)}: {link}"


def test_every_page_is_reached_from_the_readme() -> None:
    seen, waiting = set(), [README]
    while waiting:
        page = waiting.pop()
        seen.add(page)
        targets = {(page.parent / link.partition("#")[0]).resolve() for link in links(page)}
        waiting += [target for target in targets if target.suffix == ".md" and target not in seen]
    assert {name_of(page) for page in DOCS.rglob("*.md")} <= {name_of(page) for page in seen}


# --- commands ---


def parse(command: Command) -> None:
    """Walk to the subcommand, and give it the words as click does; fails where it would say "wrong usage"."""
    words = [word for word in shlex.split(command.text) if word not in ("…", "|")]
    words = words[2:] if words[0] == "python" else words
    if words[0] == "deepspeed":
        from wmtp_ds.rank import main as found

        context, words = click.Context(found), words[2:]
    else:
        context, found, words = click.Context(cli), cli, words[1:]
    while isinstance(found, click.Group) and words:
        inner = [found.get_command(context, word) for word in words[0].split("|")]
        assert None not in inner, f"{command.page}: {command.text}: there is no {words[0]}"
        found, words = inner[0], words[1:]
    context = click.Context(found, info_name=command.text)
    given, rest, _ = found.make_parser(context).parse_args(list(words))
    assert rest == [], f"{command.page}: {command.text}: too many arguments: {rest}"
    for parameter in found.params:
        value = given.get(parameter.name)
        missing = value is None or value == () or (isinstance(value, tuple) and None in value)
        if command.fenced and parameter.required and not isinstance(found, click.Group):
            assert not missing, f"{command.page}: {command.text}: {parameter.name} is missing"
        if isinstance(value, str) and isinstance(parameter.type, click.Choice):
            assert value in parameter.type.choices, f"{command.page}: {command.text}: {value}"


@ids
def test_every_command_exists_with_its_options(page: Path) -> None:
    for command in commands(page):
        if re.search(r" \| [a-z]+ \| ", command.text):  # the list of all commands
            assert set(command.text.removeprefix("wmtp-ds ").split(" | ")) == set(COMMANDS)
            continue
        try:
            parse(command)
        except click.UsageError as error:
            pytest.fail(f"{command.page}: {command.text}: {error.format_message()}")


def test_commands_are_found() -> None:
    """So that the test above does not pass because it reads nothing."""
    shown = [command for page in PAGES for command in commands(page)]
    assert len(shown) > 100
    assert {command.text.split()[1] for command in shown if command.text.startswith("wmtp-ds ")} >= set(COMMANDS)
    for wrong in ("wmtp-ds wieghts x", "wmtp-ds plan a.toml --numgpus 4", "wmtp-ds validate a.toml b.toml extra --x"):
        with pytest.raises((AssertionError, click.UsageError)):
            parse(Command("", wrong, True))


@ids
def test_files_that_commands_name_are_there(page: Path) -> None:
    for command in commands(page):
        for path in re.findall(r"(?:stage_configs|ds_configs|docs/examples|bin)/[\w./-]+\.\w+", command.text):
            assert (REPOSITORY / path).exists(), f"{command.page}: {command.text}"


@ids
def test_files_of_the_repository_that_are_named_are_there(page: Path) -> None:
    if page == DOCS / "comparison.md":
        return  # which names files of other repositories
    places = r"(?<![\w/.-])(?:tests|wmtp_ds|kernels|experiments|docs|stage_configs|ds_configs|bin)/[\w./-]*\w"
    for path in re.findall(places, page.read_text()):
        own = path == "wmtp_ds/stages/focal.py"  # the reader's
        assert own or (REPOSITORY / path).exists(), f"{name_of(page)}: {path}"


def test_targets_of_make_are_there_once() -> None:
    """Of two rules for one target make takes the last."""
    rules = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    lines = [line for page in PAGES for text in fenced(page) for line in text.splitlines()]
    typed = [*lines, *(code for page in PAGES for code in inline_code(page))]
    shown = {line.split()[1] for line in typed if re.match(r"make [a-z-]", line)}
    assert {"demo", "install", "test"} <= shown
    for target in shown:
        assert rules.count(target) == 1, f"make {target}: {rules.count(target)} rules"


# --- keys of the configuration ---


@cache
def known_keys() -> set[str]:
    def walk(model: type[BaseModel], prefix: str) -> None:
        for name, field in model.model_fields.items():
            keys.add(prefix + name)
            for kind in (field.annotation, *get_args(field.annotation)):
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    walk(kind, f"{prefix}{name}.")

    keys: set[str] = set()
    walk(RunConfig, "")
    for stage in stage_names():
        keys |= {f"training.{name}" for name in training_class(stage).model_fields}
    return keys


@ids
def test_every_key_that_is_named_exists(page: Path) -> None:
    table = "|".join(RunConfig.model_fields)
    overrides = re.findall(r"--override '?([\w.]+)", page.read_text())
    for code in [*inline_code(page), *overrides]:
        named = re.match(rf"((?:{table})\.[a-z_]+(?:\.[a-z_]+)*)(?:\[\d\].*| = .*|=.*)?$", code)
        if named and named[1] != "mlflow.db":
            assert named[1] in known_keys(), f"{name_of(page)}: {code}"


def shown(field: FieldInfo) -> str:
    """A default as the pages write it."""

    def toml(value: object) -> str:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, tuple):
            return f"[{', '.join(map(toml, value))}]"
        return f'"{value}"' if isinstance(value, str) else str(value)

    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "as said"
    return "none" if field.default is None else f"`{toml(field.default)}`"


@pytest.mark.parametrize("stage", STAGES)
def test_a_stages_page_has_its_keys(stage: str) -> None:
    """All of them, its own first, with the default and the words of the schema."""
    fields = training_class(stage).model_fields
    own = [name for name in fields if name not in TrainingConfig.model_fields]
    expected = []
    for name in [*own, *TrainingConfig.model_fields]:
        field = fields[name]
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        ending = ": " + ", ".join(f'`"{choice}"`' for choice in choices) if choices else ""
        expected.append([f"`{name}`", shown(field), f"{field.description}{ending}"])
    [table] = tables_of(DOCS / f"stages/{stage}.md", "key", "default", "meaning")
    assert table == expected


def test_every_stage_has_a_page() -> None:
    overview = (DOCS / "stages.md").read_text()
    for stage in STAGES:
        assert f"(stages/{stage}.md)" in overview
        page = (DOCS / f"stages/{stage}.md").read_text()
        for heading in (
            "## Formula",
            "## Keys of `[training]`",
            "## What to watch",
            "## When it goes wrong",
            "**When.**",
        ):
            assert heading in page, f"{stage}: {heading}"


def test_what_the_page_of_verifiable_reckons() -> None:
    """Bounds of its weights with the default temperature, and the temperatures at which the clips begin to count."""
    text = (DOCS / "stages/verifiable.md").read_text()
    assert f"that is {math.exp(-1 / 0.9):.2f} to {math.exp(1 / 0.9):.2f}" in text
    assert f"1/ln 5 = {1 / math.log(5):.2f}" in text
    assert f"1/ln 10 = {1 / math.log(10):.2f}" in text
    production = load_config(REPOSITORY / "stage_configs/verifiable.toml", checks=False).config.training
    assert (production.beta, production.weight_clip_min, production.weight_clip_max) == (0.9, 0.1, 5.0)  # type: ignore[attr-defined]


# --- a fifth weighting ---


def classes(text: str) -> list[str]:
    return [ast.unparse(node) for node in ast.parse(text).body if isinstance(node, ast.ClassDef)]


def test_the_fifth_weighting_is_the_one_that_is_trained() -> None:
    """Two of the page's blocks are the classes of tests/launch/fifth_stage.py, which tests/launch trains."""
    blocks = fenced(DOCS / "fifth_weighting.md", "python")
    trained = (REPOSITORY / "tests/launch/fifth_stage.py").read_text()
    assert classes("\n".join(blocks[:2])) == classes(trained)
    assert len(classes(trained)) == 2
