"""Requests that come at the same time are put to the model together.

A free worker begins at once with what there is; while it is busy, documents gather, and
the next batch takes them all, up to a limit.  So an idle server adds no wait, and a busy
one batches by itself.  The model runs in one thread beside the event loop.

A request of many documents gives way after each batch, so short ones do not wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

from xmcdist.serving.faults import Fault
from xmcdist.serving.limits import Limits
from xmcdist.serving.metrics import Metrics
from xmcdist.serving.model import Ask, Part

__all__ = ["Batcher", "Job"]

_log = logging.getLogger("xmcdist.serving")

Answerer = Callable[[Sequence[Part]], list[list[str] | Exception]]


@dataclass(eq=False, slots=True)
class Job:
    """One request on its way."""

    texts: list[str]
    ask: Ask
    done: asyncio.Future[list[str]]  # a JSON array for each text
    taken: int = 0  # texts that a batch has taken
    answers: list[str] = field(default_factory=list)


class _Slice(NamedTuple):
    """What a batch takes of a job."""

    job: Job
    part: Part


class Batcher:
    """The queue before one model.

    Args:
        answer: of `ServedModel`; called in ``thread`` alone.
        thread: the one thread that the model was opened in.
        limits: batch, wait and queue.
        metrics: counts batches and what waits.
    """

    def __init__(self, answer: Answerer, thread: ThreadPoolExecutor, limits: Limits, metrics: Metrics) -> None:
        self._answer, self._thread, self._limits, self._metrics = answer, thread, limits, metrics
        self._jobs: deque[Job] = deque()
        self._waiting = 0  # documents
        self._came = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to take documents; before, they wait."""
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop once what is being answered is answered; the server has by then let all requests end."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for job in self._jobs:
            job.done.cancel()

    def submit(self, texts: list[str], ask: Ask) -> Job:
        """Put a request in the queue.

        Raises:
            Fault: 503 when too many documents wait.
        """
        if self._waiting + len(texts) > self._limits.max_queue:
            raise Fault(
                503,
                "busy",
                f"{self._waiting} documents are waiting, at most {self._limits.max_queue} may; try again shortly",
                headers={"Retry-After": "1"},
            )
        job = Job(texts, ask, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        self._count(len(texts))
        self._came.set()
        return job

    def drop(self, job: Job) -> None:
        """Nobody waits for this request any more: what of it has not begun never will."""
        self._count(job.taken - len(job.texts))
        job.taken = len(job.texts)
        job.done.cancel()

    def _count(self, more: int) -> None:
        self._waiting += more
        self._metrics.queue.set(self._waiting)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._came.wait()
            if self._limits.max_wait_ms and self._waiting < self._limits.max_batch:
                await self._gather(loop.time() + self._limits.max_wait_ms / 1000)
            batch = self._take()
            if not self._jobs:
                self._came.clear()
            if batch:
                began = time.perf_counter()
                answers = await loop.run_in_executor(self._thread, self._answer, [part for _, part in batch])
                self._metrics.batch_seconds.observe(time.perf_counter() - began)
                self._hand_out(batch, answers)

    async def _gather(self, until: float) -> None:
        """Wait for a full batch, not longer than told."""
        loop = asyncio.get_running_loop()
        while self._waiting < self._limits.max_batch and (left := until - loop.time()) > 0:
            self._came.clear()
            try:
                await asyncio.wait_for(self._came.wait(), left)
            except TimeoutError:
                break
        self._came.set()

    def _take(self) -> list[_Slice]:
        """The next batch, first come first; what does not fit of a job goes behind the others."""
        batch, later, room = list[_Slice](), list[Job](), self._limits.max_batch
        while room and self._jobs:
            job = self._jobs.popleft()
            texts = job.texts[job.taken : job.taken + room]
            if not texts:  # it was dropped
                continue
            batch.append(_Slice(job, Part(texts, job.ask)))
            job.taken += len(texts)
            room -= len(texts)
            if job.taken < len(job.texts):
                later.append(job)
        self._jobs.extend(later)
        taken = self._limits.max_batch - room
        self._count(-taken)
        if taken:
            self._metrics.batch.observe(taken)
        return batch

    def _hand_out(self, batch: list[_Slice], answers: list[list[str] | Exception]) -> None:
        for (job, part), answer in zip(batch, answers, strict=True):
            if isinstance(answer, Exception):
                _log.error("a request could not be answered", exc_info=answer)
                if not job.done.done():
                    job.done.set_exception(
                        Fault(500, "internal", "the model could not answer these texts; the server's log tells why")
                    )
                    self.drop(job)
                continue
            self._metrics.documents.inc(len(part.texts))
            job.answers += answer
            if len(job.answers) == len(job.texts) and not job.done.done():
                job.done.set_result(job.answers)
