"""The server against its own OpenAPI description: made-up requests, right ones and wrong ones, over HTTP."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from tests.serving.conftest import LIMITS
from xmcdist.serving import app

_SETTINGS = settings(
    derandomize=True,  # the same requests every time
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
_PATHS = {"/predict": "POST", "/health": "GET", "/ready": "GET", "/info": "GET", "/metrics": "GET"}


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    """The application behind uvicorn, in a thread."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app(model, limits=LIMITS, wait=True), log_config=None, lifespan="on")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        address = f"http://127.0.0.1:{bound.getsockname()[1]}"
        for _ in range(600):
            if server.started or not thread.is_alive():
                break
            thread.join(0.1)
        yield address
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def schema(url: str) -> Any:
    return schemathesis.openapi.from_dict(httpx.get(f"{url}/openapi.json").json())


@pytest.mark.parametrize("path", _PATHS)
def test_right_requests_are_answered_as_described(schema: Any, url: str, path: str) -> None:
    _try_out(schema, url, path, GenerationMode.POSITIVE, 60 if path == "/predict" else 5)


def test_wrong_requests_are_refused_as_described(schema: Any, url: str) -> None:
    """No 500 whatever is sent, and an error of the form that is told."""
    seen = _try_out(schema, url, "/predict", GenerationMode.NEGATIVE, 120)
    assert 500 not in seen
    assert {400, 422} <= seen


def test_every_address_that_answers_is_described(schema: Any) -> None:
    assert {path: next(iter(schema[path])).upper() for path in schema} == _PATHS


def _try_out(schema: Any, url: str, path: str, mode: GenerationMode, examples: int) -> set[int]:
    """All of schemathesis's checks on made-up requests; the statuses that came."""
    seen: set[int] = set()
    with requests.Session() as session:

        @given(case=schema[path][_PATHS[path]].as_strategy(generation_mode=mode))
        @settings(_SETTINGS, max_examples=examples)
        def run(case: Any) -> None:
            seen.add(case.call_and_validate(base_url=url, session=session).status_code)

        run()
    assert 500 not in seen
    return seen
