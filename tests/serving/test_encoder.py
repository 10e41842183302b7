"""A model with an encoder: the same bits alone and beside others."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastapi.testclient import TestClient

import xmcdist
from tests.helpers.toy import TINY_RUN, texts_and_labels, write_text_folder
from xmcdist.config.compose import compose_run
from xmcdist.parallel.launch import World
from xmcdist.pipelines.train import train
from xmcdist.serving import Limits, app
from xmcdist.serving.model import Ask, Part, ServedModel

TEXTS = [text * (1 + i % 3) for i, text in enumerate(texts_and_labels(24, 40, seed=3)[0])]


def test_an_encoder_answers_beside_others_as_alone(tmp_path: Path) -> None:
    write_text_folder(tmp_path / "data", train=120, test=20)
    place = [f"dataset.path={tmp_path / 'data'}", f"run_dir={tmp_path / 'run'}", "evaluation.linear_baseline=false"]
    train(compose_run([*TINY_RUN, *place, "matcher.steps=[1]"]), World.single())
    model = tmp_path / "run" / "model"
    predictor = xmcdist.load(str(model))
    alone = [[(a.label_id, a.score) for a in predictor.predict([text])[0]] for text in TEXTS]
    with (
        TestClient(app(model, limits=Limits(max_batch=16), threads=1, wait=True)) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        assert client.get("/info").json()["encoder"] is True
        told = pool.map(lambda text: client.post("/predict", json={"texts": [text]}).json()["predictions"][0], TEXTS)
        assert [[(a["id"], a["score"]) for a in row] for row in told] == alone
    # The encoder is handed what the setting says: one text at a time, or the whole batch.
    for exact, want in ((True, [1] * 24), (False, [24])):
        served, asked = ServedModel(model, None, 1, exact), list[int]()
        embedder = served.members[0].embedder
        inner = embedder._embedder if exact else embedder  # type: ignore[union-attr]

        def spy(texts: list[str], inner: object = inner, asked: list[int] = asked) -> object:
            asked.append(len(texts))
            return inner(texts)  # type: ignore[operator]

        if exact:
            embedder._embedder = spy  # type: ignore[union-attr]
        else:
            served.members[0].embedder = spy  # type: ignore[assignment]
        served.answer([Part(TEXTS, Ask(5))])
        assert asked == want
