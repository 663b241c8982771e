"""The read threads of a store: shared by all its loaders, started when there is something to read.

    loader 0   reads  -->  turns ---.
    loader 1   reads  -->  turns ----+-->  read threads      a turn reads once, and queues up again
    loader 2   reads  -->  turns ---'

A loader has as many turns as it may read units at a time. So each of many loaders is served, and none fills the queue.
A loader may be closed by garbage collection, in any thread and at any place: nobody who holds the lock waits.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from weakref import WeakKeyDictionary

from dtrain.data.load.messages import Read
from dtrain.data.read.boxes import BoxReader

WIDER_REMOTE = 4
"""Loaders of a store whose requests take long may together have so many times the threads of one loader."""


class Lane:
    """The reads of one loader.

    Parameters
    ----------
    reader : BoxReader
        Its loaders share threads.
    perform : callable
        Reads; called by several threads.
    turns : int
        The most calls at a time.
    """

    def __init__(self, reader: BoxReader, perform: Callable[[Read], None], turns: int) -> None:
        self._perform = perform
        self._turns = turns
        self._reads: SimpleQueue[Read] = SimpleQueue()
        self._parked: SimpleQueue[None] = SimpleQueue()
        """A None for each turn that waits for a read."""
        for _ in range(turns):
            self._parked.put(None)
        self._reading: set[int] = set()
        """The threads that are reading, by number."""
        self._finished: SimpleQueue[None] = SimpleQueue()
        """A None for each read that has ended since the lane was closed."""
        self._closed = threading.Event()
        self._left = False
        self._pool = _pool_of(reader, turns)

    @property
    def active(self) -> int:
        """Turns that read or queue up."""
        return self._turns - self._parked.qsize()

    def put(self, read: Read) -> None:
        """Ask for a read; reads begin in the order in which they are asked for."""
        self._reads.put(read)
        self._unpark()

    def take(self) -> Read | None:
        """Return the next read, for a thread of the caller; None if there is none, or the lane is closed."""
        try:
            return None if self._closed.is_set() else self._reads.get_nowait()
        except Empty:
            return None

    def _unpark(self) -> None:
        try:
            self._parked.get_nowait()
        except Empty:  # all turns are under way
            return
        self._pool.offer(self)

    def turn(self) -> None:
        """Read once, and queue up again; park if there is nothing to read."""
        number = threading.get_ident()
        self._reading.add(number)
        read = self.take()
        if read is not None:
            self._perform(read)
        self._reading.discard(number)
        if self._closed.is_set():
            self._finished.put(None)
        elif read is not None:
            self._pool.offer(self)
        else:
            self._parked.put(None)
            if not self._reads.empty():  # it came between `take` and parking
                self._unpark()

    def stop(self) -> None:
        """Begin no further read."""
        self._closed.set()

    def close(self) -> None:
        """Begin no further read, and wait for those under way; end the threads if no other loader uses them."""
        self.stop()
        with _LOCK:
            left, self._left = self._left, True
        if left:
            return
        while self._reading - {threading.get_ident()}:
            self._finished.get()
        self._pool.leave()


class _Pool:
    """The read threads of one store."""

    def __init__(self) -> None:
        self.lanes = 0
        self.most = 0
        """The most threads."""
        self.ended = False
        self._queue: SimpleQueue[Lane | None] = SimpleQueue()
        """Turns; None: the pool has ended."""
        self._threads: list[threading.Thread] = []

    def offer(self, lane: Lane) -> None:
        """Queue up a turn of a lane; start a thread for it if they are too few."""
        self._queue.put(lane)
        if len(self._threads) >= self.most:
            return
        with _LOCK:
            count = len(self._threads)
            if self.ended or count >= self.most or (count >= lane.active and self._queue.qsize() <= count):
                return
            thread = threading.Thread(target=self._run, name=f"dtrain-read_{count}", daemon=True)
            self._threads.append(thread)
        thread.start()

    def _run(self) -> None:
        while (lane := self._queue.get()) is not None:
            lane.turn()
        self._queue.put(None)  # for the other threads

    def leave(self) -> None:
        """Note that a lane is closed; after the last one wait for the threads to end."""
        with _LOCK:
            self.lanes -= 1
            self.ended = not self.lanes
        if self.ended:
            self._queue.put(None)
            for thread in self._threads:  # each was started by an earlier one, or by an assembler that is over
                if thread is not threading.current_thread() and thread.ident is not None:
                    thread.join()


_POOLS: WeakKeyDictionary[BoxReader, _Pool] = WeakKeyDictionary()
_LOCK = threading.RLock()
"""Of all pools; entered again where garbage collection closes a loader meanwhile."""


def _pool_of(reader: BoxReader, turns: int) -> _Pool:
    """Return the pool of a store, with one lane more; a new one if there is none or it has ended."""
    with _LOCK:
        while True:
            pool = _POOLS.setdefault(reader, _Pool())
            pool.lanes += 1
            if not pool.ended:
                break
            del _POOLS[reader]
        pool.most = max(pool.most, turns * WIDER_REMOTE if reader.samples.store.read_ahead else turns)
        return pool
