"""The worker: takes projects' leases, and digests what their queues hold, in order. Any number may run anywhere."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import socket
import sys
from typing import Any

from . import observe
from .graph import Graph, Superseded
from .queue import Memory, Queue
from .settings import Refusing, Settings, Unavailable, env

LOOK_SECONDS = 5.0
"""How often a worker looks for what nobody woke it for: leases that ran out, projects that have rested."""
LONGEST_REST_SECONDS = 300.0
ENDED = 10
"""A memory over which so many workers were ended is a dead letter."""
METRICS_SECONDS = 60.0
CANCEL_SECONDS = 1.0
"""How long a task may take to tidy up before it is cancelled once more."""


def say(text: str) -> None:
    """Tell on stderr what happens; never what is remembered."""
    print(f"memory: {text}", file=sys.stderr, flush=True)


def reason_of(error: BaseException) -> str:
    """Return a failure as one line, short enough to be kept."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def fault_of(error: Exception) -> str:
    """Say whose fault a failure is: "theirs" (nobody answers, for now or for this key), "its own", or "in doubt"."""
    if isinstance(error, Unavailable):
        return "in doubt" if isinstance(error, Refusing) else "theirs"
    from .drivers import DOUBTFUL, REFUSED

    return "in doubt" if isinstance(error, DOUBTFUL) else "theirs" if isinstance(error, REFUSED) else "its own"


async def end(*tasks: asyncio.Task[Any]) -> list[Any]:
    """Cancel tasks until they have ended; return their outcomes.

    Once is not enough: before Python 3.12 asyncio.wait_for, with which redis-py writes, drops a cancellation that
    comes together with its result (python/cpython#86296), and the task goes on.
    """
    while left := [task for task in tasks if not task.done()]:
        for task in left:
            task.cancel()
        await asyncio.wait(left, timeout=CANCEL_SECONDS)
    return await asyncio.gather(*tasks, return_exceptions=True)


class Worker:
    """Digests up to ``settings.workers`` projects at a time."""

    def __init__(self, settings: Settings, queue: Queue, graph: Graph) -> None:
        self.settings, self.queue, self.graph = settings, queue, graph
        self._token = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._busy: dict[str, asyncio.Task[None]] = {}
        self._asked: set[str] = set()

    async def run(self, *, until_empty: bool = False) -> None:
        """Work until cancelled, or until every queue is empty; give leases back at the end.

        Where Valkey does not answer, it is asked again with growing pauses. Raises Unavailable only at ``until_empty``.
        """
        last, silent = "0", 0
        try:
            while True:
                try:
                    look = await self._begin()
                    if (this := asyncio.current_task()) and this.cancelling():
                        raise asyncio.CancelledError  # it was dropped on the way: see ``end``
                    if until_empty and look is None and not self._busy:
                        return
                    last = await self._wait(last, look or LOOK_SECONDS)
                    silent = 0
                except Unavailable as error:
                    if until_empty:
                        raise
                    silent += 1
                    if silent == 1:
                        say(str(error))
                    await asyncio.sleep(self._pause(silent, 60))
        finally:
            for task in self._busy.values():
                task.cancel()
            await asyncio.gather(*self._busy.values(), return_exceptions=True)
            # Cancelled while Valkey's answer was under way, or before a task's first step: nobody else gives it back.
            for project in self._asked:
                with contextlib.suppress(Exception):
                    await self.queue.release(project, self._token)

    async def _wait(self, last: str, seconds: float) -> str:
        """Wait until somebody adds, a project of ours is done, or so long; return the wake-up seen last."""
        waking = asyncio.ensure_future(self.queue.woken(last, seconds))
        await asyncio.wait([waking, *self._busy.values()], return_when=asyncio.FIRST_COMPLETED)
        if not waking.done():
            await end(waking)
            return last
        return waking.result()

    async def _begin(self) -> float | None:
        """Start on projects that have something to do; return in how many seconds to look again, None if none has."""
        self._busy = {project: task for project, task in self._busy.items() if not task.done()}
        look: float | None = None
        for project in await self.queue.projects():
            if project in self._busy or not await self.queue.depth(project):
                continue
            look = look or LOOK_SECONDS
            if len(self._busy) < self.settings.workers:
                self._asked.add(project)
                if left := await self.queue.take(project, self._token, self.settings.lease):
                    self._asked.discard(project)
                    look = min(look, left)
                else:
                    self._busy[project] = asyncio.ensure_future(self._hold(project))
        return look

    async def _hold(self, project: str) -> None:
        """Digest while the lease is ours; a digest that it is lost over ends."""
        work = asyncio.ensure_future(self._digest_all(project))
        try:
            while not work.done():
                await asyncio.wait([work], timeout=self.settings.lease / 3)
                if not work.done() and not await self.queue.renew(project, self._token, self.settings.lease):
                    break
        except Unavailable as error:
            say(str(error))
        finally:
            for outcome in await end(work):
                if isinstance(outcome, Exception):
                    say(f"{project}: {type(outcome).__name__}")
            with contextlib.suppress(Exception):
                await self.queue.release(project, self._token)
                self._asked.discard(project)

    async def _digest_all(self, project: str) -> None:
        superseded = 0
        while found := await self.queue.next(project):
            entry, memory = found
            if await self.queue.count(project, entry, "ended") > ENDED:
                await self.queue.bury(project, entry, memory, f"{ENDED} workers were ended while digesting this")
                continue
            try:
                await self.graph.digest(project, memory)
            except asyncio.CancelledError:  # an orderly end is not the memory's doing
                await self.queue.count(project, entry, "ended", -1)
                raise
            except Superseded:  # forgotten, or being digested by somebody else: the next look tells
                await self.queue.count(project, entry, "ended", -1)
                superseded += 1
                if superseded > 1:
                    await self.queue.rest(project, "its memories are digested by somebody else", self.settings.backoff)
                    return
            except Exception as error:  # noqa: BLE001 -- whatever it is, the memory is kept
                await self.queue.count(project, entry, "ended", -1)
                if await self._failed(project, entry, memory, error):
                    return
            else:
                superseded = 0
                await self.queue.done(project, entry)

    async def _failed(self, project: str, entry: str, memory: Memory, error: Exception) -> bool:
        """Decide on a memory that could not be digested; return whether the project rests now."""
        reason = reason_of(error)
        tries = await self.queue.count(project, entry, "failed")
        fault = await asyncio.to_thread(fault_of, error)  # Graphiti may not be imported yet
        fatal = fault != "theirs" and tries >= self.settings.attempts
        if fatal and (fault == "its own" or await self.graph.answers()):
            await self.queue.bury(project, entry, memory, reason)
            say(f"{project}: a memory is a dead letter after {tries} tries: {type(error).__name__}")
            return False
        pause = self._pause(tries, LONGEST_REST_SECONDS)
        await self.queue.rest(project, reason, pause)
        say(f"{project}: try {tries} failed, again in {pause:.0f} s: {type(error).__name__}")
        return True

    def _pause(self, tries: int, most: float) -> float:
        """Return the pause after so many failures: doubling, with jitter so that workers do not come all at once."""
        return min(most, self.settings.backoff * 2.0 ** min(tries - 1, 20)) * random.uniform(0.75, 1)  # noqa: S311


async def metrics(queue: Queue) -> None:
    """Report all queues' states to Datadog every minute, from one worker among all, while there is a key."""
    while env("DD_API_KEY"):
        with contextlib.suppress(Unavailable):
            if await queue.ask("SET", "memory:reported", "1", "NX", "EX", int(METRICS_SECONDS) - 5):
                states: dict[str, Any] = {name: await queue.state(name) for name in await queue.projects()}
                if states and (why := await asyncio.to_thread(observe.report, states)):
                    say(f"Datadog does not take the queue's metrics: {why}")
        await asyncio.sleep(METRICS_SECONDS)
