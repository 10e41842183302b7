"""The FastAPI application: addresses, readiness, limits of a request."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

import xmcdist
from xmcdist.serving import messages
from xmcdist.serving.batching import Batcher, Job
from xmcdist.serving.faults import Fault, fault_response, http_fault, unforeseen
from xmcdist.serving.folders import count_labels, name_of
from xmcdist.serving.limits import Limits
from xmcdist.serving.metrics import Metrics
from xmcdist.serving.model import DEFAULT_K, Ask, ServedModel
from xmcdist.serving.watch import Watch

__all__ = ["app"]

_log = logging.getLogger("xmcdist.serving")
_PAGES = Path(__file__).parent / "pages"
# The pages bring all they need: a browser may fetch nothing from anywhere else.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
_GONE = 499  # nginx's number for a client that left; nobody receives it


class _Service:
    """What the addresses share."""

    def __init__(self, model: Any, ensemble: str | None, limits: Limits, threads: int | None, exact: bool) -> None:
        self.limits, self.name, self.metrics = limits, name_of(model), Metrics()
        self.asked = messages.asked_type(limits, count_labels(model))
        self.model: ServedModel | None = None
        self.failure: BaseException | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        self._open: Callable[[], ServedModel] = lambda: ServedModel(model, ensemble, threads, exact)
        self.batcher = Batcher(self._answer, self._thread, limits, self.metrics)

    def _answer(self, parts: Sequence[Any]) -> list[list[str] | Exception]:
        assert self.model is not None
        return self.model.answer(parts)

    async def open(self) -> None:
        """Open the model and warm it; requests that came meanwhile are then answered.

        Raises:
            Exception: whatever opening raises, kept in ``failure`` as well.
        """
        try:
            self.model = await asyncio.get_running_loop().run_in_executor(self._thread, self._open)
        except Exception as error:
            self.failure = error
            raise
        self.metrics.ready.set(1)
        self.batcher.start()

    async def close(self) -> None:
        await self.batcher.close()
        self.metrics.ready.set(0)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def ready(self) -> ServedModel:
        """The open model.

        Raises:
            Fault: 503: not yet, or never.
        """
        if self.model is not None:
            return self.model
        if self.failure is not None:
            raise Fault(503, "no_model", "the model could not be opened; the server's log tells why")
        message = "the model is being opened and its loops compiled; try again shortly"
        raise Fault(503, "not_ready", message, headers={"Retry-After": "1"})

    async def predict(self, request: Request) -> Response:
        """``POST /predict``."""
        limits = self.limits
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if kind != "application/json":
            told = "send the body as JSON, with the header Content-Type: application/json"
            raise Fault(415, "not_json", told + (f", not {kind[:100]!r}" if kind else ""))
        try:
            async with asyncio.timeout(limits.timeout_s):
                body = await _read(request, limits.max_body)
        except TimeoutError:
            raise Fault(
                408, "timeout", f"the request did not arrive whole in {limits.timeout_s:g} s", headers=_CLOSE
            ) from None
        began = time.perf_counter()
        asked = messages.parse(body, self.asked)
        if self.failure is not None:
            self.ready()
        if asked.labels is not None and self.model is not None and not self.model.scores_labels:
            raise Fault(422, "unsupported", "labels: an ensemble does not score given labels", field="labels")
        labels = None if asked.labels is None else tuple(asked.labels)
        k = asked.k or (len(labels) if labels else DEFAULT_K)
        job = self.batcher.submit(asked.texts, Ask(k, asked.beam, labels))
        rows = await self._wait(job, request)
        took = (time.perf_counter() - began) * 1000
        tail = f'],"model":{json.dumps(self.name)},"took_ms":{took:.3f}}}'
        content = '{"predictions":[' + ",".join(rows) + tail
        return Response(content.encode(), media_type="application/json")

    async def _wait(self, job: Job, request: Request) -> list[str]:
        """The answer; a request whose client has left or whose time is over is taken out of the queue."""
        gone = asyncio.create_task(_until_gone(request))
        try:
            either: set[asyncio.Future[Any]] = {job.done, gone}
            await asyncio.wait(either, timeout=self.limits.timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if job.done.done():
                return job.done.result()
        finally:
            if not job.done.done():
                self.batcher.drop(job)
            left = gone.done() and not gone.cancelled() and gone.exception() is None
            gone.cancel()
        if left:
            raise Fault(_GONE, "client_left", "the client left")
        raise Fault(504, "timeout", f"no answer in {self.limits.timeout_s:g} s; ask for fewer texts, or later")


_CLOSE = {"Connection": "close"}


async def _read(request: Request, most: int) -> bytes:
    """The body, of which no more than ``most`` bytes are ever held."""
    told = request.headers.get("content-length", "")
    size, chunks = 0, []
    too_large = Fault(413, "too_large", f"a request may have {most} bytes; ask for fewer texts at once", headers=_CLOSE)
    if told.isdigit() and (len(told) > 18 or int(told) > most):
        raise too_large
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > most:
                raise too_large
            chunks.append(chunk)
    except ClientDisconnect:
        raise Fault(_GONE, "client_left", "the client left") from None
    return b"".join(chunks)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def app(
    model: Any,
    *,
    ensemble: str | None = None,
    limits: Limits | None = None,
    threads: int | None = None,
    exact: bool = True,
    wait: bool = False,
    opened: Callable[[ServedModel | BaseException], None] | None = None,
) -> FastAPI:
    """An application that answers for a model; give it to any ASGI server.

    ``uvicorn --factory mine:make`` with ``def make(): return xmcdist.serving.app("RUN/model")``.
    The model is opened when the server starts, in the background: ``/ready`` answers 503 until
    then and requests wait.  With several processes set ``PROMETHEUS_MULTIPROC_DIR`` to an empty
    folder for metrics that are added up.

    Args:
        model: a model folder, or a list of folders that answer as an ensemble.
        ensemble: how several models answer as one; default ``average``.
        limits: default those of `Limits`.
        threads: for prediction; default all cores.
        exact: let an encoder read one document at a time, so that an answer does not depend,
            in its last bits, on who else asks; False may be quicker.
        wait: open the model before the server takes the first connection.
        opened: told of the open model, or of what kept it from opening.

    Raises:
        UserError: there is no model folder.  What is found later, such as a damaged file, is
            told by ``/ready`` and the log.
    """
    service = _Service(model, ensemble, limits or Limits(), threads, exact)

    async def open_and_tell() -> None:
        try:
            await service.open()
        except Exception as error:
            if opened is None:
                _log.error("the model could not be opened: %s", error)
            else:
                opened(error)
            if wait:
                raise
        else:
            if opened is not None and service.model is not None:
                opened(service.model)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        opening = asyncio.create_task(open_and_tell())
        if wait:
            await opening
        yield
        opening.cancel()
        await service.close()

    api = FastAPI(
        title="xmcdist",
        version=xmcdist.__version__,
        description="Labels for texts, by a model of extreme multi-label classification.",
        docs_url=None,  # FastAPI's own pages fetch their programs from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        exception_handlers={Fault: fault_response, HTTPException: http_fault, Exception: unforeseen},
    )
    api.add_middleware(Watch, metrics=service.metrics)
    _add_predict(api, service)
    _add_looks(api, service)
    return api


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    told = {
        400: "The body is no JSON",
        408: "The body did not arrive in time",
        413: "The body is too large",
        415: "The body is not declared as JSON",
        422: "A field is wrong; the error names it",
        500: "An error of the server's own",
        503: "Not ready yet, or too much is waiting; see Retry-After",
        504: "No answer in time",
    }
    return {status: {"model": messages.Problem, "description": told[status]} for status in statuses}


def _add_predict(api: FastAPI, service: _Service) -> None:
    schema = service.asked.model_json_schema()
    example = {"texts": ["terminal program that shows the weather forecast"], "k": 5}
    body = {"required": True, "content": {"application/json": {"schema": schema, "example": example}}}

    @api.post(
        "/predict",
        response_model=messages.Answer,
        responses=_problems(400, 408, 413, 415, 422, 500, 503, 504),
        openapi_extra={"requestBody": body},
        summary="Labels for texts",
    )
    async def predict(request: Request) -> Response:
        return await service.predict(request)


def _add_looks(api: FastAPI, service: _Service) -> None:
    """What is only read."""

    @api.get("/health", response_model=messages.Health, summary="The process is alive")
    async def health() -> Response:
        return _json({"status": "alive"})

    @api.get("/ready", response_model=messages.Ready, responses=_problems(503), summary="The model answers")
    async def ready() -> Response:
        service.ready()
        return _json({"status": "ready"})

    @api.get("/info", response_model=messages.Info, responses=_problems(503), summary="What is served")
    async def info() -> Response:
        limits = {name: getattr(service.limits, name) for name in service.limits.__slots__}
        return _json({**service.ready().info(), "limits": limits})

    text = {"content": {"text/plain": {"schema": {"type": "string"}}}}

    @api.get("/metrics", response_class=Response, responses={200: text}, summary="Prometheus metrics")
    async def metrics() -> Response:
        loop = asyncio.get_running_loop()
        return Response(await loop.run_in_executor(None, service.metrics.text), media_type="text/plain; version=0.0.4")

    for path, name in (("/", "try.html"), ("/docs", "docs.html")):
        page = (_PAGES / name).read_bytes()
        api.add_api_route(path, _page(page), include_in_schema=False)


def _page(content: bytes) -> Callable[[], Any]:
    async def show() -> Response:
        return Response(content, media_type="text/html", headers={"Content-Security-Policy": _POLICY})

    return show


def _json(value: dict[str, Any]) -> Response:
    return Response(json.dumps(value).encode(), media_type="application/json")
