"""Every stage on two ranks: 500 steps, and nothing grows."""

import json
from pathlib import Path

import pytest
from test_launch_growth import STEPS, check, weigh

pytestmark = [pytest.mark.soak, pytest.mark.launch]


def test_no_stage_grows_on_two_ranks(workspace: Path) -> None:
    found = weigh(workspace, ("baseline", "critic", "verifiable", "rho1"), 2)
    for (stage, rank), held in found.items():
        growth = held[STEPS]["rss"] / held[100]["rss"] - 1
        print(json.dumps({"stage": stage, "rank": rank, "growth": round(growth, 4), **held[STEPS]}))
        check(held)
