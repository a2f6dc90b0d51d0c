"""Every stage on two ranks: 500 steps, and nothing grows."""

import json
from pathlib import Path

import pytest
from test_launch_growth import LONG, check, weigh

pytestmark = [pytest.mark.soak, pytest.mark.launch]


def test_no_stage_grows_on_two_ranks(workspace: Path) -> None:
    found = weigh(workspace, ("baseline", "critic", "verifiable", "rho1"), 2, LONG)
    for (stage, rank), held in found.items():
        early, late = (held[step] for step in LONG)
        print(json.dumps({"stage": stage, "rank": rank, "growth": round(late["rss"] / early["rss"] - 1, 4), **late}))
        check(held, LONG)
