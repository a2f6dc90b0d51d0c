"""Ranks that meet and watch over each other; here each is a thread with a connection of its own."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from wmtp_ds import peers as watching
from wmtp_ds.errors import RunError, UserError
from wmtp_ds.meeting import free_port
from wmtp_ds.peers import Loss, Peer, Peers, meet

PATIENCE = 3.0


@pytest.fixture(autouse=True)
def somewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr(watching, "BEAT_SECONDS", 0.2)


def together(*works: Callable[[], Any]) -> list[Any]:
    """What each returns, or raises."""

    def caught(work: Callable[[], Any]) -> Any:
        try:
            return work()
        except UserError as error:
            return error

    with ThreadPoolExecutor(len(works)) as pool:
        return list(pool.map(caught, works))


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Peers]]:
    """Rank 0 on machine 0, ranks 1 and 2 on machine 1."""
    here = Peer.here
    monkeypatch.setattr(Peer, "here", lambda rank: Peer(rank, min(rank, 1), f"box-{min(rank, 1)}", here(rank).pid))
    found = together(*(lambda rank=rank: meet(rank, 3, PATIENCE) for rank in range(3)))
    for one in found:
        one.start()
    yield found
    for one in reversed(found):  # rank 0's answers the others
        one.stop()


def test_they_know_each_other(three):
    assert [one.own.rank for one in three] == [0, 1, 2]
    assert all(one.all_ranks == three[0].all_ranks for one in three)
    assert str(three[0].all_ranks[2]) == "rank 2 (node 1, box-1)"


def test_all_alive(three):
    began = time.monotonic()
    assert three[0].find_loss() is None
    assert three[1].find_loss() is None
    assert time.monotonic() - began < 3


def test_who_is_silent_is_named_and_the_others_hear_of_it(three):
    three[2].stop()
    loss = three[0].find_loss()
    assert loss.nodes == [1]
    assert loss.text.startswith("rank 2 (node 1, box-1): no sign of life for ")
    assert three[1].find_loss() == loss


def test_without_rank_0_nothing_is_known_of_the_others(three, monkeypatch):
    """Its process is gone, and what answered there."""

    class Gone:
        def __getattr__(self, _):
            raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(watching, "_connect", lambda *_: Gone())
    three[1]._store = Gone()
    loss = three[1].find_loss()
    assert loss.nodes == [0]
    assert loss.text.startswith("rank 0 (node 0, box-0): no sign of life for ")
    assert "rank 2" not in loss.text


def test_a_broken_connection_is_made_again(three):
    class Broken:
        def __getattr__(self, _):
            raise RuntimeError("Connection reset by peer")

    three[1]._store = Broken()
    time.sleep(1)
    assert three[1].find_loss() is None
    assert three[0].find_loss() is None


def test_the_first_to_fail_is_heard_everywhere(three):
    three[2].report_own_end("no room on the disk")
    three[1].report_own_end("lost a peer")
    expected = Loss("rank 2 (node 1, box-1) has ended: no room on the disk", [1])
    assert [one.find_loss() for one in three] == [expected] * 3


def test_rank_0_stays_until_the_others_have_heard(three):
    """The report is in its memory."""
    began = time.monotonic()
    three[0].report_own_end("oops")
    assert time.monotonic() - began > watching.BEAT_SECONDS
    assert three[1]._reported is not None
    assert three[1]._reported.text == "rank 0 (node 0, box-0) has ended: oops"


@pytest.mark.parametrize("over", [False, True])
def test_a_long_silence_ends_the_process(three, monkeypatch, capsys, over):
    """As on GPUs, where no collective says so in time; but not at the end of a run, when ranks leave."""
    ended = threading.Event()
    monkeypatch.setattr(watching, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(os, "_exit", lambda code: ended.set() if code == 1 else None)
    for one in three:
        one.patience = 1.0
    three[0].start()  # a second time changes nothing
    assert len(three[0]._threads) == 2
    if over:
        for one in three:
            one.watch_no_more()
    three[1].stop()
    three[2].watch_no_more()
    assert ended.wait(4) is not over
    said = capsys.readouterr().err
    if not over:
        assert said.count("error: ") == 1
        assert "error: rank 1 (node 1, box-1): no sign of life for " in said


def test_one_rank_of_a_machine_speaks_once(three, capsys, monkeypatch):
    waits = []
    monkeypatch.setattr(watching.time, "sleep", waits.append)
    three[0].say("gone")
    three[0].say("gone again")
    assert capsys.readouterr().err == "error: gone. Go on with --resume auto once all machines are back.\n"
    assert waits == []
    monkeypatch.setenv("LOCAL_RANK", "1")
    three[1].say("gone")
    assert waits == [watching.OTHERS_SECONDS]


# --- meeting ---


def test_a_single_rank_meets_nobody(monkeypatch):
    assert meet(0, 1, PATIENCE) is None
    monkeypatch.delenv("MASTER_ADDR")
    assert meet(0, 2, PATIENCE) is None


def test_who_does_not_come_is_named():
    began = time.monotonic()
    found = together(lambda: meet(0, 4, 1.0), lambda: meet(2, 4, 1.0))
    assert time.monotonic() - began < 10
    for error in found:
        assert isinstance(error, RunError)
        assert "ranks 1, 3 of 4 did not come to 127.0.0.1:" in str(error)
        assert "within 1 seconds (runtime.peer_timeout)" in str(error)


def test_nobody_is_there():
    with pytest.raises(RunError, match=r"rank 1 on .* could not meet the others at 127\.0\.0\.1:\d+ within 1 seconds"):
        meet(1, 2, 1.0)


def test_machines_started_for_different_numbers_are_refused_everywhere_at_once():
    began = time.monotonic()
    found = together(lambda: meet(0, 4, 60.0), lambda: meet(1, 4, 60.0), lambda: meet(1, 2, 60.0))
    assert time.monotonic() - began < 10
    host = socket.gethostname()
    for error in found:
        assert type(error) is UserError
        assert str(error).startswith(f"{host} was started for ")
        assert "--nnodes and --num_gpus must be the same on every machine" in str(error)


def test_a_rank_that_comes_twice_is_refused(monkeypatch):
    pids = iter([1, 2, 3])
    monkeypatch.setattr(Peer, "here", lambda rank: Peer(rank, 0, "box", next(pids)))
    found = together(lambda: meet(0, 3, 60.0), lambda: meet(1, 3, 60.0), lambda: meet(1, 3, 60.0))
    for error in found:
        assert type(error) is UserError
        assert "both box and box were started as rank 1: --node_rank must be another number" in str(error)
