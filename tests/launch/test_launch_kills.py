"""Through the launcher: a full disk on one rank, and kill -9, the short version of what tests/soak does at length."""

from pathlib import Path

import pytest
from kill_soak import PATIENCE, SAVE_EVERY, Soak
from preloaded import Started

from wmtp_ds.checkpoint_files import complete_checkpoints, leftovers, step_name, verify_manifest

pytestmark = pytest.mark.launch


class ForkedSoak(Soak):
    """DeepSpeed's launcher and its ranks, which need not import anything."""

    def spawn(self, command: list[str], environment: dict[str, str], log: Path) -> Started:
        return Started(command, self.root, environment, log, log)


def test_a_full_disk_and_kills_change_nothing_in_the_end(workspace: Path) -> None:
    run = ForkedSoak(workspace, "baseline", steps=21, seed=3)
    run.finish("peaceful")
    folder = run.folder("killed")

    # Rank 1 cannot write its shards at step 6: every rank stops, and rank 1's words are said once.
    process, log = run.start("killed", {"rank": 1, "save": 2, "limit": 20_000})
    ranks = run.ranks(process)
    assert process.wait(PATIENCE) == 1, log.read_text()
    run.see_off(ranks, log)
    said = log.read_text()
    assert said.count("error: checkpoint") == 1, said
    assert f"{folder / 'step_00000006'} could not be written: rank 1: " in said
    assert "rank 0: " not in said
    assert "go on with --resume auto" in said
    assert "Traceback" not in said
    assert [path.name for path in complete_checkpoints(folder)] == ["step_00000003"]
    assert verify_manifest(folder / "step_00000003") is None
    assert leftovers(folder) == []

    for kind in ("rank", "launcher"):
        run.kill_once(kind)
    run.kill_once("while saving", {"rank": 1, "save": 1, "moment": 6})
    assert run.figures.kills == {"rank": 1, "launcher": 1, "while saving": 1}
    newest = complete_checkpoints(folder)[-1]
    (partial,) = leftovers(folder)
    # The launcher's end was a reason to save, at whichever step that was.
    assert partial.name == f".partial-{step_name((int(newest.name[-8:]) // SAVE_EVERY + 1) * SAVE_EVERY)}"
    cut_short = folder / partial.name.removeprefix(".partial-")
    said = run.finish("killed")
    assert f"checkpoint {cut_short} is incomplete: its saving was cut short; it is not used" in said
    assert f"resumed from {newest} at step {int(newest.name[-8:])} of 21" in said
    run.compare()
    assert run.figures.files_lost == 0
    assert max(run.figures.steps_lost) <= 6
