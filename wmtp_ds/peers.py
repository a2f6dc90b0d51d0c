"""The other ranks of a run, on this machine and on others: who has come, who lives, and what ended the first to go.

Collectives say that some other rank is gone, not which, or they wait. So ranks meet before the process group forms,
and from then on each gives signs of life, in the store in which the process group forms, too: rank 0's, at
``MASTER_ADDR:MASTER_PORT``.
"""

import atexit
import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, ClassVar

import click
from torch.distributed import TCPStore

from wmtp_ds.errors import RunError, UserError

BEAT_SECONDS = 2.0
# How long the run's own end may take once it is overdue, before the process is ended without it.
GRACE_SECONDS = 15.0
# How long the other ranks of a machine leave it to its first one to say what has happened.
OTHERS_SECONDS = 10.0
_POLL_SECONDS = 0.2
_REPORT = "wmtp/report"
_GO_ON = "Go on with --resume auto once all machines are back."


@dataclass(frozen=True)
class Peer:
    """A rank: its number, its machine's number and name, and its process there."""

    rank: int
    node: int
    host: str
    pid: int

    @classmethod
    def here(cls, rank: int) -> "Peer":
        """This process."""
        node = os.environ.get("CROSS_RANK", os.environ.get("GROUP_RANK", "0"))  # DeepSpeed's word, and torchrun's
        return cls(rank, int(node), socket.gethostname(), os.getpid())

    def __str__(self) -> str:
        return f"rank {self.rank} (node {self.node}, {self.host})"


@dataclass(frozen=True)
class Loss:
    """What is known of ranks that have gone.

    Attributes:
        text: a sentence without its point.
        nodes: the machines that they were on.
    """

    text: str
    nodes: list[int]


class Peers:
    """Signs of life, given and taken by two threads: asking a machine that is silent can take forever.

    Args:
        store: a connection of its own.
        own: this process.
        all_ranks: by rank.
        patience: seconds of silence after which a rank is lost.
    """

    current: ClassVar["Peers | None"] = None  # this process's

    server: TCPStore | None = None  # what answers on rank 0 lives as long as this does

    def __init__(self, store: TCPStore, own: Peer, all_ranks: list[Peer], patience: float):
        self.own, self.all_ranks, self.patience = own, all_ranks, patience
        self._store = store
        self._reported: Loss | None = None
        # When each rank's beat was last seen to move, by this machine's clock; rank 0's is the store's own answer.
        self._moved = dict.fromkeys(range(len(all_ranks)), time.monotonic())
        self._beats: list[bytes] = []
        self._watching = False
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._speaking, self._has_spoken = threading.Lock(), False

    def start(self) -> None:
        """Begin to give signs of life, and to look for those of others; or to look again."""
        self._watching = True
        if self._threads:
            return
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch)]
        for thread in self._threads:
            thread.start()
        # A thread that comes back from C++ while the interpreter is taken down would abort the process.
        atexit.register(self.stop)

    def watch_no_more(self) -> None:
        """The run is at its end: ranks may leave."""
        self._watching = False

    def stop(self) -> None:
        """Give no more signs of life."""
        self._watching = False
        self._over.set()
        for thread in self._threads:
            thread.join(BEAT_SECONDS)

    def _beat(self) -> None:
        keys = [f"wmtp/beat/{peer.rank}" for peer in self.all_ranks]
        while not self._over.wait(BEAT_SECONDS):
            try:
                self._store.add(keys[self.own.rank], 1)
                self._note(self._store.multi_get(keys))
                if self._reported is None and self._store.check([_REPORT]):
                    self._reported = Loss(**json.loads(self._store.get(_REPORT)))
            except RuntimeError:
                with contextlib.suppress(RuntimeError):
                    if self._watching:
                        self._store = _connect(False, self.patience)

    def _note(self, beats: list[bytes]) -> None:
        now = time.monotonic()
        self._moved[0] = now
        for rank, beat in enumerate(beats):
            if not self._beats or beat != self._beats[rank]:
                self._moved[rank] = now
        self._beats = beats

    def _watch(self) -> None:
        """End the process when a rank has been silent for too long and no collective has said so.

        Those on GPUs end the process themselves, later, and say nothing that a user could understand.
        """
        while not self._over.wait(BEAT_SECONDS):
            since = time.monotonic() - self.patience - GRACE_SECONDS
            if self._watching and (silent := self._silent_since(since)):
                self.say(self._loss_of(silent).text)
                os._exit(RunError.exit_code)

    def _silent_since(self, moment: float) -> list[Peer]:
        """Who has given no sign of life since then; if rank 0 is silent, of the others nothing is known."""
        if self._moved[0] < moment and self.own.rank != 0:
            return [self.all_ranks[0]]
        others = (peer for peer in self.all_ranks if peer != self.own)
        return [peer for peer in others if self._moved[peer.rank] < moment]

    def _loss_of(self, silent: list[Peer]) -> Loss:
        seconds = time.monotonic() - min(self._moved[peer.rank] for peer in silent)
        text = f"{', '.join(map(str, silent))}: no sign of life for {seconds:.0f} seconds"
        return Loss(text, sorted({peer.node for peer in silent}))

    def find_loss(self) -> Loss | None:
        """Who is gone, and why if that is known; None if all ranks live. Takes some seconds."""
        began = time.monotonic()
        while time.monotonic() < began + 4 * BEAT_SECONDS:
            if self._reported is not None:
                return self._reported
            time.sleep(_POLL_SECONDS)
        # A beat that came before is noted up to one later.
        silent = self._silent_since(began + 1.5 * BEAT_SECONDS)
        if not silent:
            return None
        loss = self._loss_of(silent)
        self._report(loss)
        return loss

    def report_own_end(self, words: str) -> None:
        """Tell the other machines what ends this rank, unless another has been the first. Takes some seconds."""
        self._report(Loss(f"{self.own} has ended: {words}", [self.own.node]))
        if self.own.rank == 0 and any(peer.node != self.own.node for peer in self.all_ranks):
            time.sleep(1.5 * BEAT_SECONDS)  # the report goes with this process

    def _report(self, loss: Loss) -> None:
        sender = threading.Thread(target=self._send, args=(json.dumps(asdict(loss)),), daemon=True)
        sender.start()
        sender.join(BEAT_SECONDS)

    def _send(self, report: str) -> None:
        with contextlib.suppress(RuntimeError):
            self._store.compare_set(_REPORT, "", report)

    def say(self, text: str) -> None:
        """Say once, by one rank of this machine, what has ended the run; then the launcher ends the others."""
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(OTHERS_SECONDS)
        with self._speaking:
            if not self._has_spoken:
                click.echo(f"error: {text}. {_GO_ON}", err=True)
            self._has_spoken = True


def meet(rank: int, world_size: int, patience: float) -> Peers | None:
    """Wait for every rank, where they are told to meet; None for a single one.

    Args:
        rank: this process's.
        world_size: the number of ranks.
        patience: seconds to wait, and of silence later on.

    Raises:
        RunError: if somebody does not come in time, naming who.
        UserError: if machines were started for different numbers of ranks, or for the same ranks.
    """
    if world_size == 1 or "MASTER_ADDR" not in os.environ:
        return None
    own = Peer.here(rank)
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store = _connect(rank == 0, patience)
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"rank {rank} on {own.host} could not meet the others at {place} within {patience:g} seconds "
            f"(runtime.peer_timeout): {str(error).splitlines()[0]}. Is the run started on the first machine, is that "
            "its address, and does no firewall stand between?"
        ) from error
    _refuse_if_another(store, own, world_size)
    store.set(f"wmtp/here/{rank}", json.dumps(asdict(own)))
    keys = [f"wmtp/here/{number}" for number in range(world_size)]
    deadline = time.monotonic() + patience
    while not store.check(keys):
        if store.check(["wmtp/refused"]):
            raise UserError(store.get("wmtp/refused").decode())
        if time.monotonic() > deadline:
            missing = [number for number, key in enumerate(keys) if not store.check([key])]
            raise RunError(
                f"ranks {', '.join(map(str, missing))} of {world_size} did not come to {place} within {patience:g} "
                "seconds (runtime.peer_timeout). Was the run started on every machine? Their output says more."
            )
        time.sleep(_POLL_SECONDS)
    all_ranks = [Peer(**json.loads(value)) for value in store.multi_get(keys)]
    # Counts begin before anybody reads them: to read what is not there means to wait.
    for number in range(world_size):
        store.add(f"wmtp/beat/{number}", 0)
    peers = Peers(_connect(False, patience), own, all_ranks, patience)
    peers.server = store
    return peers


def _connect(is_master: bool, seconds: float) -> TCPStore:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    timeout = timedelta(seconds=seconds)
    return TCPStore(address, port, None, is_master, timeout, wait_for_workers=False, multi_tenant=True)


def _refuse_if_another(store: Any, own: Peer, world_size: int) -> None:
    """Say at once, on all machines, that they were started for different runs: or all would wait for what never comes.

    Raises:
        UserError: if this is so.
    """
    mine = json.dumps([world_size, own.host])
    first, host = json.loads(store.compare_set("wmtp/shape", "", mine))
    claim = json.loads(store.compare_set(f"wmtp/claim/{own.rank}", "", json.dumps([own.host, own.pid])))
    if first != world_size:
        problem = (
            f"{host} was started for {first} ranks in all, {own.host} for {world_size}: --nnodes and --num_gpus must "
            "be the same on every machine."
        )
    elif claim != [own.host, own.pid]:
        problem = (
            f"both {claim[0]} and {own.host} were started as rank {own.rank}: --node_rank must be another number, "
            "from 0, on every machine."
        )
    else:
        return
    store.set("wmtp/refused", problem)
    time.sleep(10 * _POLL_SECONDS)  # if the store is this rank's, the others must hear of it first
    raise UserError(problem)
