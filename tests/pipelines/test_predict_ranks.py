"""predict and evaluate on 1, 2 and 3 processes, with documents or labels shared out: one answer."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.launch import launch, start
from tests.helpers.ranks import on_ranks
from tests.helpers.toy import TINY_RUN, texts_and_labels, write_text_folder
from xmcdist.config.commands import EvaluateConfig, PredictConfig
from xmcdist.config.errors import UserError
from xmcdist.config.schema import DatasetConfig
from xmcdist.parallel.launch import World

BATCH = 7  # 61 documents: nine blocks, the last of five


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a model of encoder and rankers, documents to predict, and one process's answers."""
    folder = tmp_path_factory.mktemp("predict")
    data = write_text_folder(folder / "data", train=120, test=61, labels=41)
    launch(1, "train", f"dataset.path={data}", f"run_dir={folder / 'run'}", *TINY_RUN, log=folder / "train.log")
    texts, _ = texts_and_labels(61, 41, seed=5)
    texts[11] = ""
    (folder / "in.txt").write_text("".join(t + "\n" for t in texts))
    with gzip.open(folder / "in.jsonl.gz", "wt") as f:
        f.writelines(json.dumps({"text": t}) + "\n" for t in texts)
    launch(1, *_predict(folder, "one.jsonl"), log=folder / "one.log")
    launch(1, *_evaluate(folder, "one.json"), log=folder / "one.eval.log")
    return folder


def _predict(folder: Path, output: str, *more: str) -> list[str]:
    model = folder / "run" / "model"
    return ["predict", f"model={model}", f"input={folder}/in.txt", f"output={folder / output}", f"batch={BATCH}", *more]


def _evaluate(folder: Path, output: str, *more: str) -> list[str]:
    model, data = folder / "run" / "model", folder / "data"
    return ["evaluate", f"model={model}", f"dataset.path={data}", f"output={folder / output}", f"batch={BATCH}", *more]


def _world(rank: int, world_size: int) -> World:
    return World(rank, world_size, rank, world_size, "cpu")


def _same_metrics(got: Path, want: Path) -> None:
    a, b = (json.loads(p.read_text())["metrics"] for p in (got, want))
    assert a.keys() == b.keys()
    for key, value in b.items():  # means are sums of float64 over ranks; hits are counted
        assert a[key] == (value if "P@" in key and "PSP" not in key else pytest.approx(value, rel=1e-12)), key


@pytest.mark.distributed
@pytest.mark.parametrize(("processes", "parallel"), [(2, "labels"), (3, "documents")])
def test_launched_predictions_are_byte_identical(trained: Path, processes: int, parallel: str) -> None:
    name = f"{processes}-{parallel}"
    launch(processes, *_predict(trained, f"{name}.jsonl", f"parallel={parallel}"), log=trained / f"{name}.log")
    want = (trained / "one.jsonl").read_bytes()
    assert want.count(b"\n") == 61
    assert (trained / f"{name}.jsonl").read_bytes() == want
    assert (trained / f"{name}.log").read_text().count("61 documents ->") == 1
    assert not list(trained.glob("*.tmp"))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("processes", "parallel"), [(3, "documents"), pytest.param(2, "labels", marks=pytest.mark.matrix)]
)
def test_launched_evaluation_measures_the_same(trained: Path, processes: int, parallel: str) -> None:
    name = f"{processes}-{parallel}.eval"
    launch(processes, *_evaluate(trained, f"{name}.json", f"parallel={parallel}"), log=trained / f"{name}.log")
    _same_metrics(trained / f"{name}.json", trained / "one.json")
    assert (trained / f"{name}.log").read_text().count("P@1") == 1


@on_ranks(3)
def test_predictions_do_not_depend_on_ranks_blocks_or_form(trained: Path, rank: int, world_size: int) -> None:
    from xmcdist.pipelines.predict import predict_file

    want = (trained / "one.jsonl").read_bytes()
    for parallel in ("documents", "labels"):
        for source in ("in.txt", "in.jsonl.gz"):
            output = trained / f"ranks-{world_size}-{parallel}-{source}"
            cfg = PredictConfig(
                model=str(trained / "run" / "model"),
                input=str(trained / source),
                output=str(output),
                batch=BATCH,
                parallel=parallel,
            )
            assert predict_file(cfg, _world(rank, world_size)) == 61
            assert output.read_bytes() == want
    empty = trained / f"empty-{world_size}.txt"
    empty.touch()
    cfg.input, cfg.output = str(empty), str(empty) + ".out"
    assert predict_file(cfg, _world(rank, world_size)) == 0
    assert Path(cfg.output).read_bytes() == b""


@on_ranks(3)
def test_metrics_do_not_depend_on_ranks(trained: Path, rank: int, world_size: int) -> None:
    from xmcdist.pipelines.evaluation import evaluate_model

    for parallel in ("documents", "labels"):
        output = trained / f"ranks-{world_size}-{parallel}.json"
        cfg = EvaluateConfig(
            model=str(trained / "run" / "model"),
            output=str(output),
            dataset=DatasetConfig(path=str(trained / "data"), prepared=str(trained / "run" / "prepared")),
            batch=16,  # four blocks: in the second turn two ranks have none
            parallel=parallel,
        )
        evaluate_model(cfg, _world(rank, world_size))
        if rank == 0:
            _same_metrics(output, trained / "one.json")


@on_ranks(2)
def test_the_error_of_one_rank_is_that_of_all_and_nothing_is_written(trained: Path, rank: int, world_size: int) -> None:
    from xmcdist.pipelines.predict import predict_file

    bad = trained / "bad.jsonl"
    if rank == 0:
        bad.write_text("".join('{"text": "w1"}\n' if i != 9 else '{"txt": "w1"}\n' for i in range(30)))
    world = _world(rank, world_size)
    world.barrier()
    cfg = PredictConfig(
        model=str(trained / "run" / "model"),
        input=str(bad),
        output=str(trained / "bad" / "out.jsonl"),
        batch=BATCH,
        parallel="labels",
    )
    with pytest.raises(UserError, match=r"bad\.jsonl, line 10: no 'text'; there is: txt"):
        predict_file(cfg, world)  # line 10 is in the block of rank 1
    world.barrier()
    assert not list((trained / "bad").iterdir())
    cfg.parallel = "lables"
    with pytest.raises(UserError, match="parallel=lables is none of documents, labels"):
        predict_file(cfg, world)


@pytest.mark.distributed
def test_a_launched_mistake_is_told_once(trained: Path) -> None:
    lines = (trained / "in.txt").read_bytes().splitlines(keepends=True)
    lines[BATCH + 1] = b"caf\xe9\n"  # in the block of rank 1
    (trained / "latin.txt").write_bytes(b"".join(lines))
    args = _predict(trained, "latin.jsonl", f"input={trained / 'latin.txt'}")
    job = start(2, *args, log=trained / "latin.log")
    assert job.wait(120) != 0
    text = (trained / "latin.log").read_text()
    assert text.count(f"latin.txt, line {BATCH + 2}: byte 0xe9") == 1, text
    assert not list(trained.glob("latin.jsonl*"))


@on_ranks(2)
def test_with_labels_shared_out_a_rank_holds_its_part_alone(trained: Path, rank: int, world_size: int) -> None:
    from xmcdist.inference.predictor import Predictor
    from xmcdist.parallel.collectives import all_reduce_array, gather_objects
    from xmcdist.rankers.model import LinearTree

    whole = LinearTree.load(trained / "run" / "model" / "rankers")
    part = Predictor.load(trained / "run" / "model", part=(rank, world_size)).rankers
    for a, b in zip(part.levels, whole.levels, strict=True):
        assert all_reduce_array(np.array([a.num_nodes, a.nnz])).tolist() == [b.num_nodes, b.nnz]
        assert max(gather_objects(a.num_nodes)) < b.num_nodes
