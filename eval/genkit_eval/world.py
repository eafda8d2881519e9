"""What several processes on one run know of each other: who does which share, who is still there, how it ended.

Images and features are exchanged through the folder that all processes share. What goes over the network is one small record of
each process, in the launcher's key-value store: how far it is, and that it is alive. There are no collectives that could hang,
and no process group, in which a metric on one process would wait for the others.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from genkit_eval.errors import InputError

#: Seconds of silence after which a process counts as dead; the environment variable sets another number.
TIMEOUT, TIMEOUT_VARIABLE = 300.0, "GENKIT_DIST_TIMEOUT"
#: Seconds between two looks at the records, and how long a process waits at the end for the others to have read its last one.
INTERVAL, LINGER = 0.2, 60.0
KEPT = "what is finished is kept, the same command goes on from there"


@dataclass(frozen=True)
class Place:
    """Rank among how many processes, where their store is, whether this process opens it, and the silence after which one is
    given up."""

    rank: int
    size: int
    host: str
    port: int
    opens: bool
    timeout: float = TIMEOUT

    @classmethod
    def from_environment(cls) -> Place | None:
        """As torchrun and accelerate say it; None for a process alone. InputError for variables that make no sense."""
        known = os.environ
        if "RANK" not in known or known.get("WORLD_SIZE", "1") == "1":
            return None
        try:
            rank, size, port = (int(known[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
            opens = rank == 0 and known.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            place = cls(rank, size, known["MASTER_ADDR"], port, opens, float(known.get(TIMEOUT_VARIABLE, TIMEOUT)))
        except (KeyError, ValueError) as error:
            raise InputError(
                "environment", f"{error}; RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as torchrun and accelerate set them work"
            ) from None
        if not place.timeout > 0:
            raise InputError(TIMEOUT_VARIABLE, f"got {place.timeout:g}; seconds above 0 work, {TIMEOUT:g} is the default")
        return place

    def connect(self) -> Any:
        """The store. Raises RuntimeError when it cannot be reached in time."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, though torch does not list it

        patience = timedelta(seconds=self.timeout)
        return TCPStore(self.host, self.port, None, self.opens, patience, wait_for_workers=False, multi_tenant=True)


class World:
    """One process alone; the methods are what several need. All of them must call ``follow`` and ``gather`` in the same order."""

    rank, size = 0, 1
    lost = ""  #: Why there is no first process any more, as far as this one can tell.
    _images = 0

    @property
    def images(self) -> int:
        """How many images are there over all processes, as last heard."""
        return self._images

    @property
    def first(self) -> bool:
        """Whether this is the process that scores and writes."""
        return self.rank == 0

    def mine(self, index: int) -> bool:
        """Whether block ``index`` is in this process's share."""
        return index % self.size == self.rank

    def advance(self, images: int) -> None:
        """Say that ``images`` more are there, and see how the others are."""
        self._images += images

    def check(self) -> None:
        """Raises InputError naming a process that failed or fell silent; SystemExit where the first process has ended."""

    def follow(self) -> None:
        """The first process goes ahead; the others wait until it has come here."""

    def gather(self, look: Callable[[], object] = lambda: None, refusal: str = "") -> str:
        """The first process waits until all have come here, calling ``look`` now and then; the others go on.

        ``refusal`` is why this process has not done its share; the first process gets that of any of them.
        """
        return refusal

    @contextmanager
    def ahead(self) -> Iterator[None]:
        """The first process does what is inside before the others do, so that what is fetched is fetched once."""
        if not self.first:
            self.follow()
        yield
        if self.first:
            self.follow()

    def end(self, code: int, reason: str) -> int:
        """The exit code of the first process, which the others wait for; ``reason`` is why this one failed."""
        return code


@dataclass
class Record:
    """What a process says of itself: ``step`` counts calls of follow and gather, ``images`` those that are there, ``code`` is its
    exit code once it has ended and ``reason`` why, ``refused`` why it has not done its share, by step, ``left`` that
    it has read how the first one ended.

    A store may outlive a restart: ``identity`` is new in each process, and a record counts only if it ``knows`` its reader's.
    """

    identity: str = field(default_factory=lambda: uuid.uuid4().hex)
    knows: dict[str, str] = field(default_factory=dict)
    beat: int = 0
    step: int = 0
    images: int = 0
    code: int | None = None
    reason: str = ""
    refused: dict[str, str] = field(default_factory=dict)
    left: bool = False


class Together(World):
    """One of several processes. The first looks at the records of all, the others at the one of the first.

    A thread of its own talks to the store: a process that computes for an hour is heard, and a store that does not answer stops
    no more than that thread.
    """

    def __init__(self, place: Place, interval: float = INTERVAL) -> None:
        import torch.distributed  # noqa: F401  # here, as a thread must not import what the main thread is importing too

        self.place, self.rank, self.size, self.interval = place, place.rank, place.size, interval
        self.own = Record()
        self.others: dict[int, Record] = {}
        # Silence is counted in rounds of this process, so that one that was suspended itself does not blame the others.
        self.silence = dict.fromkeys(range(1, place.size) if self.first else [0], 0.0)
        self._heard = dict[int, Record]()
        self._answered = time.monotonic()
        self._lock, self._wake, self._round, self._stop = threading.Lock(), threading.Event(), threading.Event(), False
        self._thread = threading.Thread(target=self._talk, name="records", daemon=True)
        self._thread.start()

    def _talk(self) -> None:
        try:
            store = self.place.connect()
            while not self._stop:
                self._wake.clear()
                self._exchange(store)
                self._answered = time.monotonic()
                self._round.set()
                self._wake.wait(self.interval)
        except Exception as error:  # whatever it is, the main thread has to hear of it
            self.lost = self.lost or str(error).split("\n")[0].split(" Exception raised")[0][:200] or type(error).__name__

    def _exchange(self, store: Any) -> None:
        with self._lock:
            self.own.beat += 1
            text = json.dumps(vars(self.own))
        store.set(f"genkit/{self.rank}", text)
        for rank in self.silence:
            key = f"genkit/{rank}"
            self.silence[rank] += self.interval
            if store.check([key]):
                self._hear(rank, Record(**json.loads(store.get(key))))

    def _hear(self, rank: int, record: Record) -> None:
        with self._lock:
            self.own.knows[str(rank)] = record.identity
        if record.knows.get(str(self.rank)) == self.own.identity:
            if record != self._heard.get(rank):
                self.silence[rank] = 0.0
            self.others[rank] = record
        self._heard[rank] = record

    def _say(self, **values: Any) -> None:
        with self._lock:
            vars(self.own).update(values)
        self._wake.set()

    @property
    def images(self) -> int:
        """See World."""
        return self.own.images + sum(record.images for record in list(self.others.values()))

    def advance(self, images: int) -> None:
        """See World."""
        self._say(images=self.own.images + images)
        self.check()

    @property
    def silent(self) -> list[int]:
        """Processes that were not heard of for too long."""
        return [rank for rank, seconds in self.silence.items() if seconds > self.place.timeout]

    def check(self) -> None:
        """See World."""
        for rank, record in sorted(self.others.items()):
            if record.code is not None and not self.first:
                raise SystemExit(record.code)
            if record.code:
                raise InputError(f"rank {rank}", record.reason or f"ended with exit code {record.code}", record.code)
        self._check_store()
        if silent := self.silent:
            self.lost = "silent" if not self.first else ""
            names = f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))}"
            since = f"{self.place.timeout:g} s" if set(silent) <= set(self.others) else f"the start, {self.place.timeout:g} s ago"
            raise InputError(names, f"no sign of life since {since} ({TIMEOUT_VARIABLE} sets another limit); {KEPT}")

    def _check_store(self) -> None:
        if not self.lost and time.monotonic() - self._answered > self.place.timeout:
            # A clock says little after this process was suspended itself: one more chance.
            self._round.clear()
            if not self._round.wait(max(1.0, 5 * self.interval)):
                self.lost = f"no answer for {self.place.timeout:g} s"
        if self.lost:
            store = f"the processes' store at {self.place.host}:{self.place.port}"
            raise InputError("rank 0", f"it or its launcher is gone: rank {self.rank} cannot reach {store} ({self.lost}); {KEPT}")

    def _wait(self, there: Callable[[], bool], look: Callable[[], object] = lambda: None) -> None:
        while not there():
            self.check()
            look()
            time.sleep(self.interval / 2)
        look()

    def _came(self, rank: int) -> bool:
        return rank in self.others and self.others[rank].step >= self.own.step

    def follow(self) -> None:
        """See World."""
        self._say(step=self.own.step + 1)
        if not self.first:
            self._wait(lambda: self._came(0))

    def gather(self, look: Callable[[], object] = lambda: None, refusal: str = "") -> str:
        """See World."""
        step = self.own.step + 1
        self._say(step=step, refused={**self.own.refused, str(step): refusal} if refusal else self.own.refused)
        if self.first:
            self._wait(lambda: all(self._came(rank) for rank in self.silence), look)
        told = (record.refused.get(str(step), "") for _, record in sorted(self.others.items()))
        return refusal or next(filter(None, told), "")

    def end(self, code: int, reason: str) -> int:
        """See World. Raises InputError where the first process died before it could say how it ended."""
        self._say(code=code, reason=reason)
        try:
            if self.first:
                self._linger(lambda: all(r in self.silent or (r in self.others and self.others[r].left) for r in self.silence))
            elif not self.lost:
                with suppress(SystemExit):
                    self._wait(lambda: False)
                code = self.others[0].code or 0
                self._say(left=True)
                beat = self.own.beat
                self._linger(lambda: self.own.beat > beat + 1)
            return code
        finally:
            self._stop = True
            self._wake.set()
            # It ends at once, unless it waits for a store that does not answer: that must not keep the process.
            self._thread.join(5.0)

    def _linger(self, done: Callable[[], bool]) -> None:
        until = time.monotonic() + LINGER
        while not done() and not self.lost and time.monotonic() < until:
            time.sleep(self.interval / 2)
