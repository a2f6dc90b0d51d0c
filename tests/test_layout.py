"""The layout that other programs rely on: names that are not ours, imports that stay where they belong, pins."""

import ast
import importlib.machinery
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "wmtp_ds"
KERNELS = REPOSITORY / "kernels" / "wmtp_kernels"
BENCHMARKS = REPOSITORY / "kernels" / "benchmarks"


def python(code: str, cwd: Path = REPOSITORY) -> object:
    """What a program prints as JSON that runs with ``cwd`` on its path, as ``python -c`` does."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def imports(file: Path) -> set[str]:
    """Names of the modules that a file imports anywhere in it, also by ``importlib``."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            found |= {ast.literal_eval(part) for part in node.args[:1] if isinstance(part, ast.Constant)}
    return found


def importers(package: str, folder: Path) -> set[str]:
    return {
        str(file.relative_to(REPOSITORY))
        for file in folder.rglob("*.py")
        if any(name == package or name.startswith(f"{package}.") for name in imports(file))
    }


# --- `kernels` is Hugging Face's name ---

FIND = """
import importlib.util, json
spec = importlib.util.find_spec("kernels")
print(json.dumps(None if spec is None else [spec.origin, list(spec.submodule_search_locations or [])]))
"""


@pytest.mark.parametrize("cwd", [REPOSITORY, REPOSITORY / "tests", REPOSITORY / "bin"])
def test_find_spec_kernels_is_not_ours(cwd):
    found = python(FIND, cwd)
    if found is None:
        return
    origin, locations = found
    if origin is None:  # a folder alone, which Python calls a namespace: whatever is installed comes before it
        assert not any((Path(location) / "__init__.py").exists() for location in locations)
    else:
        assert not Path(origin).is_relative_to(REPOSITORY), "a package of ours would shadow the library"


def test_there_is_no_package_named_kernels():
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()
    assert not list(REPOSITORY.glob("kernels.*"))
    assert not (REPOSITORY / "kernels" / "kernels").exists()


def test_transformers_is_not_misled_and_llama_imports_from_the_repository():
    code = """
import json
from transformers.utils.import_utils import is_kernels_available
from transformers import LlamaForCausalLM
import importlib.metadata
try:
    installed = bool(importlib.metadata.version("kernels"))
except importlib.metadata.PackageNotFoundError:
    installed = False
print(json.dumps([bool(is_kernels_available()), installed, LlamaForCausalLM.__module__]))
"""
    available, installed, module = python(code)
    assert available == installed, "transformers takes our folder for the library"
    assert module == "transformers.models.llama.modeling_llama"


# --- what imports what ---


def test_the_kernels_need_torch_alone():
    code = """
import json, sys
import wmtp_kernels, pkgutil, importlib
for module in pkgutil.walk_packages(wmtp_kernels.__path__, "wmtp_kernels."):
    importlib.import_module(module.name)
unwanted = {"wmtp_ds", "transformers", "deepspeed", "mlflow", "click"} & {name.split(".")[0] for name in sys.modules}
print(json.dumps([sorted(unwanted), wmtp_kernels.__file__]))
"""
    unwanted, file = python(code)
    assert unwanted == []
    assert Path(file).parent == KERNELS
    allowed = {"torch", "triton", "wmtp_kernels"} | set(sys.stdlib_module_names)
    for source in KERNELS.rglob("*.py"):
        assert {name.split(".")[0] for name in imports(source)} <= allowed, source


def test_engine_is_the_only_file_that_imports_deepspeed():
    assert importers("deepspeed", PACKAGE) == {"wmtp_ds/engine.py"}
    assert importers("deepspeed", REPOSITORY / "bin") == importers("deepspeed", REPOSITORY / "experiments") == set()


def test_ranks_do_not_wait_for_mlflow():
    """DeepSpeed's autotuner would import it in every rank; only rank 0 uses it, and in a thread of its own."""
    code = (
        "import sys; from wmtp_ds import engine; import wmtp_ds.train; engine._import_deepspeed(); "
        "assert 'mlflow' not in sys.modules; import mlflow; print(mlflow.__name__)"
    )
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip().splitlines()[-1:] == ["mlflow"], done.stderr


@pytest.mark.parametrize(
    ("package", "folders"),
    [
        (("torch", "transformers", "mlflow"), ("config", "cli")),
        (("transformers", "mlflow"), ("weighting",)),
        (("mlflow",), ("models", "stages", "data")),
        (("wmtp_ds.stages", "wmtp_ds.engine", "wmtp_ds.train"), ("config", "data", "models", "weighting")),
        (("wmtp_ds.cli",), ("config", "data", "models", "weighting", "stages")),
    ],
)
def test_data_flows_one_way(package, folders):
    """config → data → model → stage → engine: nothing imports, at the top of a file, what comes after it."""
    for folder in folders:
        for file in (PACKAGE / folder).rglob("*.py"):
            top = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
            names = {alias.name for node in top if isinstance(node, ast.Import) for alias in node.names}
            names |= {str(node.module) for node in top if isinstance(node, ast.ImportFrom)}
            for name in names:
                assert not any(name == one or name.startswith(f"{one}.") for one in package), f"{file} imports {name}"


def test_no_file_in_bin_is_named_like_a_module():
    """``bin/`` is ``sys.path[0]`` of every rank that the launcher starts there."""
    names = {path.stem for path in (REPOSITORY / "bin").iterdir() if path.name != "__pycache__"}
    assert "train_stage" in names
    elsewhere = [entry for entry in sys.path if entry and Path(entry).resolve() != REPOSITORY / "bin"]
    for name in names:
        assert name not in sys.stdlib_module_names
        assert importlib.machinery.PathFinder.find_spec(name, elsewhere) is None, f"bin/{name} shadows a module"


def test_the_script_is_thin():
    assert len(ast.parse((REPOSITORY / "bin/train_stage.py").read_text()).body) == 3  # docstring, import, main
    assert imports(REPOSITORY / "bin/train_stage.py") == {"wmtp_ds.rank", "wmtp_ds.rank.main"}


def test_there_is_no_utils():
    names = {path.stem for path in REPOSITORY.rglob("*.py") if not {".venv", "build"} & set(path.parts)}
    assert not {"utils", "util", "helpers", "misc", "common"} & names


def test_every_package_is_installed():
    """setuptools is told each package by name: one that is forgotten is missing from a wheel."""
    setuptools = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]
    listed = set(setuptools["packages"])
    # Its folder is not called what it is installed as: any package might be called `benchmarks`.
    assert setuptools["package-dir"]["wmtp_kernel_benchmarks"] == str(BENCHMARKS.relative_to(REPOSITORY))
    found = {"wmtp_kernel_benchmarks"}
    found |= {".".join(file.parent.relative_to(REPOSITORY).parts) for file in PACKAGE.rglob("__init__.py")}
    found |= {".".join(file.parent.relative_to(KERNELS.parent).parts) for file in KERNELS.rglob("__init__.py")}
    assert listed == found
    assert [file for file in BENCHMARKS.rglob("*.py") if file.parent != BENCHMARKS] == []
    for file in [*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py"), *BENCHMARKS.rglob("*.py")]:
        assert (file.parent / "__init__.py").exists(), f"{file} lies in no package"


# --- pins ---


@pytest.fixture(scope="module")
def pins() -> dict[str, Version]:
    """Name -> exact version of constraints.txt."""
    found: dict[str, Version] = {}
    for line in (REPOSITORY / "constraints.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9A-Za-z.+!]+)", line)
            assert match, f"{line!r} pins nothing"
            name = canonicalize_name(match[1])
            assert name not in found, f"{name} is pinned twice"
            found[name] = Version(match[2])
    return found


@pytest.fixture(scope="module")
def requirements() -> list[Requirement]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extra = [line for lines in project["optional-dependencies"].values() for line in lines]
    return [Requirement(line) for line in project["dependencies"] + extra]


def test_the_versions_that_work_together_are_pinned(pins):
    assert (str(pins["torch"]), str(pins["deepspeed"])) == ("2.13.0", "0.19.8")
    assert pins["transformers"].release[:2] == (5, 23)
    assert pins["mlflow"].release[:2] == pins["mlflow-skinny"].release[:2] == (3, 17)
    assert pins["torch"].local is None, "a build for the CPU would be all that a GPU machine can get"


def test_every_dependency_is_pinned_to_a_version_that_it_allows(pins, requirements):
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        assert name in pins, f"constraints.txt does not pin {name}"
        assert requirement.specifier.contains(pins[name], prereleases=True), requirement


def test_what_the_code_imports_is_a_dependency(requirements):
    """A dependency, or what one of them requires itself (mlflow brings scikit-learn, pydantic annotated-types)."""
    declared = {canonicalize_name(requirement.name) for requirement in requirements}
    installed = {canonicalize_name(found.name) for found in importlib.metadata.distributions()}
    brought = {
        canonicalize_name(Requirement(line).name)
        for name in declared & installed
        for line in importlib.metadata.requires(name) or []
        if "extra ==" not in line
    }
    distributions = importlib.metadata.packages_distributions()
    ours = {"wmtp_ds", "wmtp_kernels", "wmtp_kernel_benchmarks"}
    for folder in (PACKAGE, KERNELS, BENCHMARKS, REPOSITORY / "bin"):
        for file in folder.rglob("*.py"):
            for top in {name.split(".")[0] for name in imports(file)} - ours:
                if top not in sys.stdlib_module_names and top != "triton":
                    # What only benchmarks compare with need not be installed; it is called what it is imported as.
                    owners = {canonicalize_name(name) for name in distributions.get(top, [top])}
                    assert owners & (declared | brought), f"{file} imports {top}"


def test_python_is_new_enough_everywhere(requirements):
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert project["project"]["requires-python"] == ">=3.11"
    assert project["tool"]["mypy"]["python_version"] == "3.11"
