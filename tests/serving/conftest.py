"""One small trained model for all tests of serving, and its application in this process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from tests.helpers.toy import write_text_folder
from xmcdist.config.compose import compose_run
from xmcdist.parallel.launch import World
from xmcdist.pipelines.train import train
from xmcdist.serving import Limits, app


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    write_text_folder(folder / "data")
    overrides = [f"dataset.path={folder / 'data'}", f"run_dir={folder / 'run'}", "encoder=none", "tree.max_leaf_size=5"]
    train(compose_run([*overrides, "evaluation.linear_baseline=false"]), World.single())
    return folder / "run" / "model"


LIMITS = Limits(max_body_mb=0.1, max_documents=8, max_characters=2000, max_queue=64, timeout_s=20)


@pytest.fixture(scope="session")
def client(model: Path) -> Iterator[TestClient]:
    """An application whose model is open."""
    with TestClient(app(model, limits=LIMITS, wait=True), raise_server_exceptions=False) as client:
        yield client
