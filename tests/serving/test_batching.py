"""The queue before the model: when a batch begins, what it takes, and who is let go."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

import pytest

from xmcdist.serving.batching import Batcher
from xmcdist.serving.faults import Fault
from xmcdist.serving.limits import Limits
from xmcdist.serving.metrics import Metrics
from xmcdist.serving.model import Ask, Part

ASK = Ask(5)


class _Model:
    """Answers each text with itself, when it is let; keeps what it was asked."""

    def __init__(self, *, free: bool = True) -> None:
        self.batches: list[list[str]] = []
        self.gate, self.busy = threading.Event(), threading.Event()
        if free:
            self.gate.set()

    def answer(self, parts: Sequence[Part]) -> list[list[str] | Exception]:
        self.batches.append([text for part in parts for text in part.texts])
        self.busy.set()
        assert self.gate.wait(20)
        return [ValueError("bad") if "bad" in part.texts else list(part.texts) for part in parts]

    async def is_busy(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.busy.wait, 20)


@asynccontextmanager
async def _batcher(model: _Model, metrics: Metrics | None = None, **limits: float) -> AsyncIterator[Batcher]:
    limit = Limits(**{"max_documents": 8, "max_batch": 4, "max_queue": 10, **limits})  # type: ignore[arg-type]
    with ThreadPoolExecutor(1) as thread:
        batcher = Batcher(model.answer, thread, limit, metrics or Metrics())
        batcher.start()
        try:
            yield batcher
        finally:
            model.gate.set()
            await batcher.close()


def _texts(name: str, count: int) -> list[str]:
    return [f"{name}{i}" for i in range(count)]


def test_an_idle_model_begins_at_once_and_a_busy_one_gathers() -> None:
    async def run() -> None:
        model = _Model(free=False)
        async with _batcher(model) as batcher:
            jobs = [batcher.submit(["a"], ASK)]
            await model.is_busy()
            jobs += [batcher.submit([text], ASK) for text in "bcdef"]
            model.gate.set()
            assert [await job.done for job in jobs] == [[text] for text in "abcdef"]
        assert model.batches == [["a"], ["b", "c", "d", "e"], ["f"]]

    asyncio.run(run())


def test_a_long_request_gives_way_and_comes_back_in_order() -> None:
    async def run() -> None:
        model = _Model(free=False)
        async with _batcher(model) as batcher:
            first = batcher.submit(["first"], ASK)
            await model.is_busy()
            long, short = batcher.submit(_texts("long", 7), ASK), batcher.submit(["short"], ASK)
            model.gate.set()
            assert await long.done == _texts("long", 7)
            assert await short.done == ["short"]
            assert await first.done == ["first"]
        assert model.batches == [["first"], _texts("long", 4), ["short", "long4", "long5", "long6"]]

    asyncio.run(run())


def test_a_free_model_may_be_told_to_wait_for_more() -> None:
    async def run() -> None:
        model = _Model()
        async with _batcher(model, max_wait_ms=1000, max_batch=3) as batcher:
            jobs = []
            for text in "abc":
                jobs.append(batcher.submit([text], ASK))
                await asyncio.sleep(0.01)
            await asyncio.gather(*(job.done for job in jobs))
            alone = batcher.submit(["d"], ASK)
            assert await alone.done == ["d"]
        assert model.batches == [["a", "b", "c"], ["d"]]

    asyncio.run(run())


def test_a_full_queue_refuses_and_has_room_again() -> None:
    async def run() -> None:
        model = _Model(free=False)
        async with _batcher(model) as batcher:
            running = batcher.submit(["a"], ASK)
            await model.is_busy()
            waiting = [batcher.submit(_texts("b", 8), ASK), batcher.submit(_texts("c", 2), ASK)]
            with pytest.raises(Fault, match="10 documents are waiting") as refused:
                batcher.submit(["d"], ASK)
            assert (refused.value.status, refused.value.headers) == (503, {"Retry-After": "1"})
            batcher.drop(waiting[0])
            late = batcher.submit(_texts("e", 8), ASK)
            model.gate.set()
            assert await late.done == _texts("e", 8)
            assert await running.done == ["a"]
        assert not any(text.startswith("b") for batch in model.batches for text in batch)

    asyncio.run(run())


def test_a_request_nobody_waits_for_is_not_finished() -> None:
    async def run() -> None:
        model, metrics = _Model(free=False), Metrics()
        async with _batcher(model, metrics) as batcher:
            job = batcher.submit(_texts("gone", 8), ASK)  # its first four are with the model
            await model.is_busy()
            batcher.drop(job)
            model.gate.set()
            assert await batcher.submit(["stays"], ASK).done == ["stays"]
            assert job.done.cancelled()
        assert model.batches == [_texts("gone", 4), ["stays"]]
        assert b"xmcdist_queue_documents 0.0" in metrics.text()

    asyncio.run(run())


def test_a_part_that_fails_ends_its_request() -> None:
    async def run() -> None:
        model = _Model()
        async with _batcher(model) as batcher:
            bad = batcher.submit(["bad", *_texts("rest", 7)], ASK)
            with pytest.raises(Fault) as told:
                await bad.done
            assert told.value.status == 500
            assert await batcher.submit(["good"], ASK).done == ["good"]
        assert model.batches == [["bad", "rest0", "rest1", "rest2"], ["good"]]

    asyncio.run(run())
