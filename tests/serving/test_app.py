"""The application in this process: answers, refusals, readiness, meters."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
from fastapi.testclient import TestClient

import xmcdist
from tests.helpers.toy import texts_and_labels
from tests.serving.conftest import LIMITS
from xmcdist.config.errors import ConfigError, UserError
from xmcdist.serving import Limits, app
from xmcdist.serving.model import Ask, Part, ServedModel

JSON = {"content-type": "application/json"}
TEXTS = texts_and_labels(8, 40, seed=5)[0]


def _ask(client: TestClient, **body: Any) -> Any:
    answer = client.post("/predict", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def _rows(predictions: Any) -> list[list[tuple[int, str, float]]]:
    return [[(a["id"], a["label"], a["score"]) for a in row] for row in predictions]


def test_answers_have_the_bits_of_the_predictor(client: TestClient, model: Path) -> None:
    predictor = xmcdist.load(str(model))
    for ask in ({}, {"k": 3.0}, {"k": 7, "beam": 1}, {"k": None, "beam": 4}):
        want = predictor.predict(TEXTS, int(ask.get("k") or 5), beam=ask.get("beam"))
        got = _ask(client, texts=TEXTS, **ask)
        assert _rows(got["predictions"]) == [[(a.label_id, a.label, a.score) for a in row] for row in want]
        assert got["model"] == "run/model"
        assert got["took_ms"] >= 0


def test_given_labels_alone_are_scored(client: TestClient, model: Path) -> None:
    ids = [3, 17, 17, 39]
    wanted = sp.csr_matrix(np.isin(np.arange(40), ids).astype(np.float32)[None])
    scores = xmcdist.load(str(model)).scores(TEXTS[:1], selected=wanted).toarray()[0]
    best = sorted({3, 17, 39}, key=lambda j: (-scores[j], j))
    got = _ask(client, texts=TEXTS[:1], labels=ids)["predictions"][0]
    assert [(a["id"], a["score"]) for a in got] == [(j, float(scores[j])) for j in best]
    assert [a["id"] for a in _ask(client, texts=TEXTS[:1], labels=ids, k=2)["predictions"][0]] == best[:2]


BAD: list[tuple[bytes, int, str, str | None]] = [
    (b"", 400, "not_json", None),
    (b"{", 400, "not_json", None),
    (b'\xff{"texts": ["a"]}', 400, "not_json", None),
    (b'{"texts": ["\xc3\x28"]}', 400, "not_json", None),
    (b'{"texts": ["\\ud800"]}', 400, "not_json", None),
    (b'{"texts": ["\xed\xa0\x80"]}', 400, "not_json", None),
    (b"[" * 40_000 + b"]" * 40_000, 400, "not_json", None),
    (b'{"texts": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001, 400, "not_json", None),
    (b"null", 422, "invalid_value", None),
    (b'["a"]', 422, "invalid_value", None),
    (b"{}", 422, "invalid_value", "texts"),
    (b'{"texts": "a"}', 422, "invalid_value", "texts"),
    (b'{"texts": []}', 422, "invalid_value", "texts"),
    (b'{"texts": ["a", 1]}', 422, "invalid_value", "texts[1]"),
    (b'{"texts": ["a", null]}', 422, "invalid_value", "texts[1]"),
    (b'{"texts": [' + b",".join([b'"a"'] * 9) + b"]}", 422, "invalid_value", "texts"),
    (b'{"texts": ["' + b"a" * 2001 + b'"]}', 422, "invalid_value", "texts[0]"),
    (b'{"texts": ["a"], "k": 0}', 422, "invalid_value", "k"),
    (b'{"texts": ["a"], "k": 101}', 422, "invalid_value", "k"),
    (b'{"texts": ["a"], "k": "5"}', 422, "invalid_value", "k"),
    (b'{"texts": ["a"], "k": true}', 422, "invalid_value", "k"),
    (b'{"texts": ["a"], "k": 1.5}', 422, "invalid_value", "k"),
    (b'{"texts": ["a"], "k": ' + b"9" * 100 + b"}", 422, "invalid_value", "k"),
    (b'{"texts": ["a"], "k": NaN}', 422, "invalid_value", "k"),
    (b'{"texts": ["a"], "k": 1e999}', 422, "invalid_value", "k"),
    (b'{"texts": ["a"], "k": ' + b"9" * 5000 + b"}", 400, "not_json", None),
    (b'{"texts": ["a"], "beam": -1}', 422, "invalid_value", "beam"),
    (b'{"texts": ["a"], "beam": 201}', 422, "invalid_value", "beam"),
    (b'{"texts": ["a"], "labels": [40]}', 422, "invalid_value", "labels[0]"),
    (b'{"texts": ["a"], "labels": [-1]}', 422, "invalid_value", "labels[0]"),
    (b'{"texts": ["a"], "labels": []}', 422, "invalid_value", "labels"),
    (b'{"texts": ["a"], "labels": ["x"]}', 422, "invalid_value", "labels[0]"),
    (b'{"texts": ["a"], "topk": 3}', 422, "unknown_field", "topk"),
    (b'{"texts": ["a"], "\\u0000": 3}', 422, "unknown_field", "\0"),
]


@pytest.mark.parametrize(("body", "status", "kind", "field"), BAD)
def test_bad_requests_are_told_what_is_wrong(
    client: TestClient, body: bytes, status: int, kind: str, field: str | None
) -> None:
    answer = client.post("/predict", content=body, headers=JSON)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error.get("field")) == (status, kind, field)
    assert len(answer.content) < 1000  # nothing of what was sent is sent back at length


def test_odd_texts_are_texts(client: TestClient) -> None:
    odd = ["", " ", "\0", "a\0b", "\ufeff", "\U0001f600", "e\u0301" * 500, "\u202e\u2028"]
    assert len(_ask(client, texts=odd)["predictions"]) == len(odd)


def test_large_bodies_are_refused_before_they_are_read(client: TestClient) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(50):
            sent += 1
            yield b" " * 10_000

    told = client.post("/predict", content=b" " * 100_001, headers=JSON)
    assert (told.status_code, told.json()["error"]["type"]) == (413, "too_large")
    huge = client.post("/predict", content=b"{}", headers={**JSON, "content-length": "9" * 30})
    assert huge.status_code == 413
    assert client.post("/predict", content=chunks(), headers=JSON).status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status", "kind"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("GET", "/predict", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
        ("TRACE", "/", 405, "method_not_allowed"),
    ],
)
def test_wrong_addresses_and_methods(client: TestClient, method: str, path: str, status: int, kind: str) -> None:
    answer = client.request(method, path)
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind)
    assert (status == 405) == ("allow" in answer.headers)


def test_a_body_must_be_declared(client: TestClient) -> None:
    answer = client.post("/predict", content=b'{"texts": ["a"]}', headers={"content-type": "text/plain"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (415, "not_json")


def test_meters_count(client: TestClient) -> None:
    def value(name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    names = {
        "xmcdist_documents_total": 3,
        'xmcdist_requests_total{path="/predict",status="200"}': 1,
        'xmcdist_requests_total{path="/predict",status="422"}': 1,
        'xmcdist_request_seconds_count{path="/predict"}': 2,
        "xmcdist_batch_documents_sum": 3,
    }
    before = {name: value(name) for name in names}
    _ask(client, texts=TEXTS[:3])
    client.post("/predict", json={})
    client.get("/made-up")
    assert {name: value(name) - before[name] for name in names} == names
    assert value("xmcdist_queue_documents") == 0
    assert value("xmcdist_requests_in_flight") == 1  # the one that asks
    assert value("xmcdist_workers_ready") == 1
    assert "made-up" not in client.get("/metrics").text


def test_info_tells_what_is_served(client: TestClient, model: Path) -> None:
    info = client.get("/info").json()
    assert (info["labels"], info["trained_on"], info["calibration"], info["encoder"]) == (40, 360, None, False)
    assert info["levels"][-1] == 40
    assert info["limits"]["max_documents"] == 8
    assert str(model.parent) not in json.dumps(info)


def test_openapi_has_the_limits(client: TestClient) -> None:
    api = client.get("/openapi.json").json()
    post = api["paths"]["/predict"]["post"]
    fields = post["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert fields["texts"]["maxItems"] == 8
    assert fields["texts"]["items"]["maxLength"] == 2000
    assert fields["labels"]["anyOf"][0]["items"]["maximum"] == 39
    assert set(post["responses"]) == {"200", "400", "408", "413", "415", "422", "500", "503", "504"}
    for status in ("400", "413", "422", "503"):
        assert post["responses"][status]["content"]["application/json"]["schema"]["$ref"].endswith("/Problem")


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_bring_all_they_need(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert not re.search(r"""(?:src|href|url)\s*[=(]\s*["']?\s*(?:https?:)?//""", answer.text)
    assert "@import" not in answer.text


def test_before_the_model_is_open_requests_wait(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opens, real = threading.Event(), ServedModel.__init__

    def slow(self: ServedModel, *args: Any) -> None:
        opens.wait(60)
        real(self, *args)

    monkeypatch.setattr(ServedModel, "__init__", slow)
    with TestClient(app(model, limits=LIMITS)) as client:
        assert client.get("/health").status_code == 200
        for path in ("/ready", "/info"):
            answer = client.get(path)
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "not_ready")
            assert answer.headers["retry-after"] == "1"
        threading.Timer(0.2, opens.set).start()
        assert len(_ask(client, texts=TEXTS)["predictions"]) == len(TEXTS)
        assert client.get("/ready").json() == {"status": "ready"}


def test_a_model_that_cannot_be_opened_is_told(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: ServedModel, *args: Any) -> None:
        raise UserError("its file is damaged")

    monkeypatch.setattr(ServedModel, "__init__", broken)
    told: list[Any] = []
    done = threading.Event()

    def opened(outcome: Any) -> None:
        told.append(outcome)
        done.set()

    with TestClient(app(model, opened=opened)) as client:
        assert done.wait(20)
        for answer in (client.get("/ready"), client.post("/predict", json={"texts": ["a"]})):
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "no_model")
    assert str(told[0]) == "its file is damaged"


def test_one_bad_document_spoils_its_own_request_alone(
    model: Path, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = ServedModel(model, None, 1, True)
    real = served.predictor.predict

    def predict(texts: list[str], k: int, beam: int | None = None) -> Any:
        if "poison" in texts:
            raise RuntimeError("secret")
        return real(texts, k, beam=beam)

    monkeypatch.setattr(served.predictor, "predict", predict)
    ask = Ask(3)
    out = served.answer([Part(TEXTS[:2], ask), Part(["poison"], ask), Part(TEXTS[2:3], ask), Part(["x"], Ask(4))])
    assert isinstance(out[1], RuntimeError)
    want = [[a.label_id for a in row] for row in real(TEXTS[:3], 3)]
    got = [[a["id"] for a in json.loads(line)] for i in (0, 2) for line in out[i]]  # type: ignore[union-attr]
    assert got == want


def test_an_error_of_our_own_is_500_and_tells_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("secret")

    with TestClient(app(model, wait=True), raise_server_exceptions=False) as client:
        monkeypatch.setattr("xmcdist.inference.predictor.answers", broken)
        first = client.post("/predict", json={"texts": ["a"]})
        monkeypatch.setattr("xmcdist.serving.messages.parse", broken)
        second = client.post("/predict", json={"texts": ["a"]})
        for answer in (first, second):
            assert (answer.status_code, answer.json()["error"]["type"]) == (500, "internal")
            assert "secret" not in answer.text
        assert 'path="/predict",status="500"} 2.0' in client.get("/metrics").text


def test_what_cannot_be_served_is_refused_at_the_start(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model folder"):
        app(tmp_path)
    with pytest.raises(ConfigError, match=r"max_k=0(.|\n)*max_queue=10"):
        Limits(max_k=0, max_queue=10)


def test_an_ensemble_answers_and_does_not_score_given_labels(model: Path) -> None:
    with TestClient(app([str(model), str(model)], ensemble="rank", wait=True)) as client:
        got = _ask(client, texts=TEXTS[:2], k=3)
        assert [a["score"] for a in got["predictions"][0]] == [3.0, 2.0, 1.0]
        assert client.get("/info").json()["ensemble"] == "rank"
        answer = client.post("/predict", json={"texts": ["a"], "labels": [1]})
        assert (answer.status_code, answer.json()["error"]["field"]) == (422, "labels")
