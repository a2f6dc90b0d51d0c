"""Twenty kills and more of ranks and of the launcher, at random moments, and the end is the same to the bit."""

import json
from pathlib import Path

import pytest
from kill_soak import KINDS, SAVE_EVERY, soak

pytestmark = [pytest.mark.soak, pytest.mark.launch]


def test_a_run_that_is_killed_again_and_again(workspace: Path) -> None:
    figures = soak(workspace, "verifiable", kills=24, seed=5)
    print(json.dumps(figures))
    assert figures["equal_to_the_bit"]
    assert figures["files_lost"] == 0
    assert figures["files_checked"] > 100
    assert figures["kills"] >= 20
    assert set(figures["kills_by_kind"]) == set(KINDS)
    assert figures["saves_cut_short"] >= 3
    # The steps since the last checkpoint, and those up to the one whose saving was cut short.
    assert figures["most_steps_lost_by_a_kill"] <= 2 * SAVE_EVERY
