"""The worker: leases projects and ingests their queues in order. Any number of workers may run."""

import asyncio
import contextlib
import os
import random
import secrets
import socket
import sys
from typing import Any

from lib.common.datadog import Datadog
from lib.memory.graph import Graph, Superseded
from lib.memory.queue import Memory, Queue
from lib.memory.settings import Lost, Rejected, Settings, Unavailable

POLL_SECONDS = 0.5
"""How often a worker looks for new memories and for projects that became free."""
MAX_PAUSE_SECONDS = 300.0
MAX_RECONNECT_SECONDS = 60.0
MAX_DEATHS = 10
"""A memory over which more workers have died becomes a dead letter."""
MAX_CRASHES = 2
"""A memory over which FalkorDB has crashed so often becomes a dead letter."""
METRICS_SECONDS = 60
CANCEL_SECONDS = 1.0


def log(message: str) -> None:
    """Print to stderr; a message never contains the text of a memory."""
    print(
        f"memory: {message}",
        file=sys.stderr,
        flush=True,
    )


def cause_of(error: Exception) -> str:
    """Return what a failure is due to: "outage" of a service, the "memory" itself, or "unknown"."""
    if isinstance(error, Unavailable):
        return "unknown" if isinstance(error, Rejected) else "outage"
    from lib.memory.drivers import AMBIGUOUS, OUTAGES

    if isinstance(error, OUTAGES):
        return "outage"
    return "unknown" if isinstance(error, AMBIGUOUS) else "memory"


async def cancel(*tasks: asyncio.Task[Any]) -> list[Any]:
    """Cancel tasks until they have ended and return their outcomes.

    Once is not enough: before Python 3.12, asyncio.wait_for, which redis-py uses, drops a
    cancellation that arrives together with its result:
    https://github.com/python/cpython/issues/86296
    """
    while running := [task for task in tasks if not task.done()]:
        for task in running:
            task.cancel()
        await asyncio.wait(running, timeout=CANCEL_SECONDS)
    return await asyncio.gather(*tasks, return_exceptions=True)


class Worker:
    """Ingests up to ``settings.workers`` projects at a time."""

    def __init__(self, settings: Settings, queue: Queue, graph: Graph) -> None:
        self.settings = settings
        self.queue = queue
        self.graph = graph
        self._name = f"{socket.gethostname()}:{secrets.token_hex(4)}"
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def run(self, *, until_empty: bool = False) -> None:
        """Work until cancelled, or until all queues are empty; then release all leases.

        While Valkey does not answer, connects again with growing pauses; with ``until_empty``,
        raises Unavailable instead.
        """
        failures = 0
        try:
            while True:
                seconds = POLL_SECONDS
                try:
                    pending = await self._start_tasks()
                    failures = 0
                except Exception as error:  # a worker ends only when it is told to
                    if until_empty:
                        raise
                    pending = True
                    failures += 1
                    if failures == 1:
                        log(str(error) or type(error).__name__)
                    seconds = self._backoff(failures, MAX_RECONNECT_SECONDS)
                task = asyncio.current_task()
                if task and task.cancelling():
                    raise asyncio.CancelledError  # it was dropped, see ``cancel``
                if until_empty and not pending:
                    return
                await asyncio.sleep(seconds)
        finally:
            await cancel(*self._tasks.values())

    async def _start_tasks(self) -> bool:
        """Start tasks for projects with memories; return False when all queues are empty."""
        self._tasks = {name: task for name, task in self._tasks.items() if not task.done()}
        pending = bool(self._tasks)
        for project in await self.queue.projects():
            if project in self._tasks or not await self.queue.length(project):
                continue
            pending = True
            if len(self._tasks) < self.settings.workers:
                lease = await self.queue.acquire(project, self._name, self.settings.lease)
                if lease:
                    self._tasks[project] = asyncio.ensure_future(self._hold(project, lease))
        return pending

    async def _hold(self, project: str, lease: Any) -> None:
        """Ingest and renew the lease; stop when it is lost."""
        work = asyncio.ensure_future(self._ingest_all(project))
        try:
            while not work.done():
                await asyncio.wait([work], timeout=self.settings.lease / 3)
                if not work.done() and not await self.queue.renew(lease):
                    break
        except Unavailable as error:
            log(str(error))
        finally:
            for outcome in await cancel(work):
                if isinstance(outcome, Exception):
                    log(f"{project}: {type(outcome).__name__}")
            with contextlib.suppress(Exception):
                await lease.release()

    async def _ingest_all(self, project: str) -> None:
        """Ingest the memories of a project, oldest first, until it is empty or paused."""
        while entries := await self.queue.entries(project, count=1):
            entry, fields = entries[0]
            memory = Memory.of(fields)
            if await self.queue.count(project, entry, "died") > MAX_DEATHS:
                reason = f"{MAX_DEATHS} workers died while they ingested this"
                await self.queue.bury(project, entry, memory, reason)
                continue
            failure = None
            try:
                await self.graph.ingest(project, memory)
            except Exception as error:  # noqa: BLE001 -- whatever it is, the memory is kept
                failure = error
            finally:
                # The worker has not died, even if it is cancelled.
                await self.queue.count(project, entry, "died", -1)
            if failure is None:
                await self.queue.remove(project, entry, memory.id)
            elif await self._handle_failure(project, entry, memory, failure):
                return

    async def _handle_failure(
        self, project: str, entry: str, memory: Memory, error: Exception
    ) -> bool:
        """Make the memory a dead letter or pause the project; return whether it is paused."""
        if isinstance(error, Superseded):
            # Forgotten meanwhile, or another worker ingests it.
            reason = "another worker ingests this project"
            await self.queue.pause(project, reason, self.settings.backoff)
            return True
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
        tries = await self.queue.count(project, entry, "failed")
        cause = await asyncio.to_thread(cause_of, error)  # may import Graphiti
        give_up = cause != "outage" and tries >= self.settings.attempts
        crashes = int(isinstance(error, Lost)) and await self.queue.count(project, entry, "crashed")
        give_up = give_up and (cause == "memory" or await self.graph.is_healthy())
        if give_up or crashes >= MAX_CRASHES:
            await self.queue.bury(project, entry, memory, reason)
            log(f"{project}: dead letter after {tries} tries: {type(error).__name__}")
            return False
        seconds = self._backoff(tries, MAX_PAUSE_SECONDS)
        await self.queue.pause(project, reason, seconds)
        log(f"{project}: try {tries} failed: {type(error).__name__}; retry in {seconds:.0f} s")
        return True

    def _backoff(self, failures: int, limit: float) -> float:
        """Return exponential backoff in seconds, with jitter."""
        seconds = self.settings.backoff * 2.0 ** min(failures - 1, 20)
        return min(limit, seconds) * random.uniform(0.75, 1)  # noqa: S311


async def send_metrics(queue: Queue) -> None:
    """Send the state of all queues to Datadog every minute, from one worker among all."""
    datadog = Datadog.read(os.environ, "DD_")
    while datadog.api_key:
        with contextlib.suppress(Unavailable):
            expiry = METRICS_SECONDS - 5
            if await queue.command("SET", "memory:reported", "1", "NX", "EX", expiry):
                failure = await asyncio.to_thread(datadog.send, await _gauges(queue))
                if failure:
                    log(f"Datadog did not accept the metrics of the queue: {failure}")
        await asyncio.sleep(METRICS_SECONDS)


async def _gauges(queue: Queue) -> list[tuple[str, float, list[str]]]:
    gauges = []
    for project in await queue.projects():
        state = await queue.state(project)
        for name, field in (("depth", "waiting"), ("age", "oldest_seconds"), ("dead", "dead")):
            value = float(state[field])
            gauges.append((f"opencode.memory.queue.{name}", value, [f"project:{project}"]))
    return gauges
