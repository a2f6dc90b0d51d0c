"""What the source never does, and that every dependency is pinned."""

import ast
import re
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = [
    file
    for folder in ("wmtp_ds", "kernels", "bin", "experiments")
    for file in sorted((REPOSITORY / folder).rglob("*.py"))
]
# Run in the sandbox, to run solutions; nothing else of the program imports them.
IN_THE_SANDBOX = ("harness", "harness_calls", "harness_lock", "harness_values")
COMPILES = ("mutate",)  # to see whether a program is one; it does not run it
CALCULATES = ("problem_parsing",)  # expressions of digits and operators that it has made itself
# Pickles are written by hand there, and pickle's error is caught.
PICKLE = ("value_head_file.py", "torch_files.py", "shards.py")


def calls(file: Path) -> Iterator[tuple[str, ast.Call]]:
    """Each call of a file, with the last part of what is called and what it is called on: ``torch.load``."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def given(call: ast.Call, name: str) -> object:
    value = next((keyword.value for keyword in call.keywords if keyword.arg == name), None)
    return value.value if isinstance(value, ast.Constant) else value


def test_the_search_finds_something() -> None:
    found = {name for file in SOURCES for name, _ in calls(file)}
    assert {"torch.load", "np.load", "AutoTokenizer.from_pretrained"} <= found
    assert len(SOURCES) > 100


def test_code_of_others_is_never_trusted() -> None:
    loads = 0
    for file in SOURCES:
        for line in file.read_text().splitlines():
            if "trust_remote_code" in line.replace('"trust_remote_code" in str(error)', ""):
                assert re.search(r"trust_remote_code=False\b", line), f"{file}: {line}"
        for name, call in calls(file):
            owner, _, method = name.rpartition(".")
            if method in ("from_pretrained", "from_config"):
                loads += 1
                assert given(call, "trust_remote_code") is False, f"{file}:{call.lineno}"
                assert method == "from_config" or given(call, "local_files_only") is True, f"{file}:{call.lineno}"
            assert owner not in ("pipeline", "hub"), f"{file}:{call.lineno}"
    assert loads >= 5


def test_nothing_is_unpickled() -> None:
    for file in SOURCES:
        for name, call in calls(file):
            where = f"{file}:{call.lineno}: {name}"
            if name == "torch.load":
                assert given(call, "weights_only") is True, where
            if name.endswith("np.load"):
                assert given(call, "allow_pickle") in (None, False), where
            assert not re.search(
                r"\b(c?[pP]ickle|dill|cloudpickle|joblib|shelve|marshal|yaml)\.(loads?|open|Unpickler)$", name
            ), where
            if name in ("eval", "exec", "compile", "__import__"):
                more = {"compile": COMPILES, "eval": CALCULATES}.get(name, ())
                assert file.stem in (*IN_THE_SANDBOX, *more), where
        imported = {
            alias.name
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        assert not imported & {"dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}, file
        assert "pickle" not in imported or file.name in PICKLE, file


# --- dependencies ---


def pinned() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    found = [line for line in lines if line and not line.startswith("#")]
    for line in found:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[\w.!+]+( ;.*)?", line), f"constraints.txt does not pin: {line}"
    return {canonicalize_name(line.split("==")[0]): line.split("==")[1].split(" ;")[0] for line in found}


def wanted() -> list[Requirement]:
    """What pyproject.toml names, with its extras."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *(text for extra in project["optional-dependencies"].values() for text in extra)]
    return [Requirement(text) for text in texts]


def test_every_dependency_is_pinned() -> None:
    """Those of pyproject.toml, and transitively all of theirs that are installed here."""
    pins = pinned()
    queue = [(requirement, "pyproject.toml", "") for requirement in wanted()]
    seen: set[tuple[str, str]] = set()
    lacking = []
    while queue:
        requirement, by, extra = queue.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            if by == "pyproject.toml":  # an extra that is not installed here has its pin all the same
                assert name in pins, f"{name} of pyproject.toml has no pin"
            continue
        if name not in pins:
            lacking.append(f"{name} (of {by})")
            continue
        for own in ("", *requirement.extras):
            if (name, own) not in seen:
                seen.add((name, own))
                queue += [(Requirement(text), name, own) for text in distribution.requires or ()]
    assert not lacking, f"constraints.txt lacks {', '.join(sorted(set(lacking)))}"
    assert len(seen) > 80


def test_what_is_installed_fits_what_is_pinned_and_asked_for() -> None:
    pins = pinned()
    for requirement in wanted():
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} is pinned to {version}"
