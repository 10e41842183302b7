"""Requests that wait too long, arrive too slowly, find no room, or whose client leaves; without a socket."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from xmcdist.serving import Limits, app
from xmcdist.serving.model import ServedModel

HEADERS = [(b"content-type", b"application/json")]


class _Client:
    """Speaks ASGI to one application, by hand."""

    def __init__(self, api: Any) -> None:
        self._api = api
        self.left = asyncio.Event()

    async def ask(self, body: bytes, *, whole: bool = True, path: str = "/predict") -> tuple[int, dict[str, str], Any]:
        parts = [{"type": "http.request", "body": body, "more_body": not whole}]
        told: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if parts:
                return parts.pop()
            await self.left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            told.append(message)

        method = "POST" if path == "/predict" else "GET"
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
        await self._api({**scope, "headers": HEADERS, "asgi": {"version": "3.0"}}, receive, send)
        content = told[1]["body"].decode()
        headers = {name.decode(): value.decode() for name, value in told[0]["headers"]}
        return told[0]["status"], headers, json.loads(content) if path == "/predict" else content


Talk = Callable[[Callable[[], _Client], threading.Event, threading.Event], Awaitable[None]]


@pytest.fixture
def talk(model: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Talk, Limits], None]:
    """Run a conversation with a model that answers once ``free`` is set; ``busy`` tells that it is asked."""
    busy, free, real = threading.Event(), threading.Event(), ServedModel.answer

    def answer(self: ServedModel, parts: Any) -> Any:
        busy.set()
        assert free.wait(20)
        return real(self, parts)

    monkeypatch.setattr(ServedModel, "answer", answer)

    def run(talk: Talk, limits: Limits) -> None:
        async def main() -> None:
            api = app(model, limits=limits, wait=True)
            async with api.router.lifespan_context(api):
                try:
                    await talk(lambda: _Client(api), busy, free)
                finally:
                    free.set()

        asyncio.run(main())

    return run


async def _set(event: threading.Event) -> None:
    assert await asyncio.get_running_loop().run_in_executor(None, event.wait, 20)


def test_no_answer_in_time_is_504_and_the_next_is_answered(talk: Any) -> None:
    async def main(new: Callable[[], _Client], busy: threading.Event, free: threading.Event) -> None:
        status, _, told = await new().ask(b'{"texts": ["a"]}')
        assert (status, told["error"]["type"]) == (504, "timeout")
        free.set()
        assert (await new().ask(b'{"texts": ["a"]}'))[0] == 200

    talk(main, Limits(timeout_s=0.3))


def test_a_body_that_does_not_arrive_is_408(talk: Any) -> None:
    async def main(new: Callable[[], _Client], busy: threading.Event, free: threading.Event) -> None:
        status, headers, told = await new().ask(b'{"texts"', whole=False)
        assert (status, told["error"]["type"], headers["connection"]) == (408, "timeout", "close")

    talk(main, Limits(timeout_s=0.2))


def test_a_full_queue_is_503_with_retry_after(talk: Any) -> None:
    async def main(new: Callable[[], _Client], busy: threading.Event, free: threading.Event) -> None:
        first = asyncio.create_task(new().ask(b'{"texts": ["a"]}'))
        await _set(busy)
        second = asyncio.create_task(new().ask(b'{"texts": ["b", "c"]}'))
        while "xmcdist_queue_documents 2.0" not in (await new().ask(b"", path="/metrics"))[2]:
            await asyncio.sleep(0.01)
        status, headers, told = await new().ask(b'{"texts": ["d"]}')
        assert (status, told["error"]["type"], headers["retry-after"]) == (503, "busy", "1")
        free.set()
        assert [(await task)[0] for task in (first, second)] == [200, 200]

    talk(main, Limits(max_queue=2, max_documents=2))


def test_a_client_that_leaves_frees_its_place(talk: Any) -> None:
    async def main(new: Callable[[], _Client], busy: threading.Event, free: threading.Event) -> None:
        first = asyncio.create_task(new().ask(b'{"texts": ["a"]}'))
        await _set(busy)
        leaves = new()
        second = asyncio.create_task(leaves.ask(b'{"texts": ["b", "c"]}'))
        while "xmcdist_queue_documents 2.0" not in (await new().ask(b"", path="/metrics"))[2]:
            await asyncio.sleep(0.01)
        leaves.left.set()
        assert (await second)[0] == 499
        meters = (await new().ask(b"", path="/metrics"))[2]
        assert "xmcdist_queue_documents 0.0" in meters
        assert re.search(r'requests_total\{path="/predict",status="499"\} 1\.0', meters)
        free.set()
        assert (await first)[0] == 200

    talk(main, Limits(max_queue=2, max_documents=2))
