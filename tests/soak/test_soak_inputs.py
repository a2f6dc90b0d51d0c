"""Thousands of odd inputs; `tests/config` and `tests/data` try hundreds. Figures are printed as JSON."""

import contextlib
import json
import time
from collections import Counter
from pathlib import Path

import pytest
from config_workspace import Workspace
from fuzz_config import STAGES, cases, check_case, check_end, deepspeed_cases, make_world, meaning, overrides, variables
from fuzz_data import Data, check_file, data_files
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from in_process import command

from wmtp_ds.config.keys import all_keys

pytestmark = pytest.mark.soak

KEYS = sorted(all_keys())


def many(count: int) -> settings:
    # What fails is small enough as it is: to make it smaller takes longer than all the rest.
    phases = [Phase.explicit, Phase.generate]
    return settings(
        max_examples=count, deadline=None, database=None, phases=phases, suppress_health_check=list(HealthCheck)
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return make_world(tmp_path_factory.mktemp("configs"))


def tell(what: str, counts: Counter[str], began: float) -> None:
    print(json.dumps({"what": what, "cases": counts.total(), **counts, "seconds": round(time.monotonic() - began)}))


@pytest.mark.parametrize("stage", STAGES)
def test_changed_files(made: Workspace, stage: str) -> None:
    counts: Counter[str] = Counter()
    began = time.monotonic()
    with contextlib.chdir(made.root):
        before = meaning(f"stage_configs/{stage}.toml")
        text = Path(f"stage_configs/{stage}.toml").read_text()

        @many(1500)
        @given(data=st.data())
        def run(data: st.DataObject) -> None:
            case = data.draw(cases(stage, "run.toml", text))
            valid = check_case(made, "run.toml", case, before)
            counts[f"{case.verdict}: {'valid' if valid else 'refused'}"] += 1

        run()
    tell(f"configs of {stage}", counts, began)
    assert counts.total() >= 1000


def test_overrides_and_variables(made: Workspace) -> None:
    counts: Counter[str] = Counter()
    began = time.monotonic()

    @many(2000)
    @given(
        stage=st.sampled_from(STAGES),
        typed=st.lists(overrides(KEYS), max_size=3),
        environ=st.one_of(st.just({}), variables(KEYS)),
    )
    def run(stage: str, typed: list[str], environ: dict[str, str]) -> None:
        options = [part for text in typed for part in ("--override", text)]
        done = command("validate", f"stage_configs/local/{stage}.toml", *options, environ=environ)
        check_end(done)
        counts["refused" if done.code else "valid"] += 1

    with contextlib.chdir(made.root):
        run()
    tell("overrides and variables", counts, began)


def test_changed_deepspeed_files(made: Workspace) -> None:
    counts: Counter[str] = Counter()
    began = time.monotonic()
    file = "ds_configs/changed.json"

    @many(1500)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(["zero3", "zero3_cpu", "zero3_offload"]))
        case = data.draw(deepspeed_cases(file, Path(f"ds_configs/{name}.json").read_text()))
        made.path(file).write_bytes(case.content)
        done = command("validate", "stage_configs/rho1.toml", "--override", f"deepspeed.config={file}")
        check_end(done, *case.says)
        assert (done.code == 2) == (case.verdict == "refused"), f"{case.what}: {done}"
        counts["refused" if done.code else "valid"] += 1

    with contextlib.chdir(made.root):
        run()
    tell("DeepSpeed files", counts, began)


def test_data_files(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    began = time.monotonic()

    @many(3000)
    @given(data=data_files())
    def run(data: Data) -> None:
        check_file(data, tmp_path / "rows.jsonl")
        counts["refused, by line" if data.bad else "read whole"] += 1
        counts["rows"] += len(data.rows)

    run()
    rows = counts.pop("rows")
    tell("data files", counts, began)
    assert rows > 1000
