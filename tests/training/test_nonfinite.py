"""A step whose loss or gradient is not finite leaves no trace in any engine, on any number of ranks."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.ranks import on_ranks
from tests.helpers.toy import TINY_RUN, write_text_folder
from tests.training import problem
from tests.training.problem import LEVEL, Hooks, Setting
from xmcdist.config.compose import compose_run
from xmcdist.data.batches import GlobalBatches
from xmcdist.parallel.launch import World
from xmcdist.pipelines.train import train
from xmcdist.sparse.store import open_csr
from xmcdist.training import loop
from xmcdist.training.loop import DivergedError, train_level
from xmcdist.training.nonfinite import Skips

SETTING = Setting(micro_batch=3, steps=7, clip=4.5, scoring="dense")
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 5e-6, 2e-5
AT = 2  # the step at which the head's gradient is spoilt


def _bad_document() -> tuple[int, int]:
    """A document of the batch at step 1, and a word that it alone has."""
    words = problem.tokens()
    rows = [set(words.batch([i])[0][0].tolist()) for i in range(problem.DOCS)]
    for document in GlobalBatches(words.lengths, 8, problem.SEED).batch(1).tolist():
        alone = rows[document].difference(*(r for i, r in enumerate(rows) if i != document))
        if alone:
            return document, min(alone)
    raise AssertionError("no document has a word of its own")


def _steps_with(document: int) -> frozenset[int]:
    batches = GlobalBatches(problem.tokens().lengths, 8, problem.SEED)
    return frozenset(step for step in range(SETTING.steps) if document in batches.batch(step))


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What fp64 gets that leaves out the same steps; a file's name."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    left_out = _steps_with(_bad_document()[0])
    assert len(left_out) == 2
    path = tmp_path_factory.mktemp("reference") / "all.pkl"
    path.write_bytes(pickle.dumps((problem.reference(SETTING, left_out), problem.reference(SETTING, frozenset({AT})))))
    torch.set_num_threads(threads)
    return str(path)


def _worst(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.detach().double() - want.double()).abs().max()) if got.numel() else 0.0


def _equals(result: Any, head: Any, want: Any, spoilt: int | None, what: str) -> None:
    assert np.allclose(result.losses, want.losses, atol=LOSS_TOLERANCE, rtol=0, equal_nan=True), what
    for name, p in result.encoder.state_dict().items():
        got, wanted = p.clone(), want.encoder[name].clone()
        if name.endswith("word_embeddings.weight") and spoilt is not None:
            assert bool(got[spoilt].isnan().any())
            got[spoilt] = wanted[spoilt] = 0
        assert _worst(got, wanted) < WEIGHT_TOLERANCE, (what, name)
    rows = slice(head.shard.start, head.shard.stop)
    assert _worst(head.weight, want.weight[rows]) < WEIGHT_TOLERANCE, what
    assert _worst(head.bias, want.bias[rows]) < WEIGHT_TOLERANCE, what


@on_ranks(2, timeout_s=300)
def test_steps_that_are_left_out_leave_no_trace(rank: int, world_size: int, references: str) -> None:
    _leave_no_trace(rank, world_size, references, ("ddp", "fsdp2", "zero2"))


@on_ranks(1, 3, timeout_s=300)
def test_steps_that_are_left_out_leave_no_trace_elsewhere(rank: int, world_size: int, references: str) -> None:
    _leave_no_trace(rank, world_size, references, ("ddp",))


@pytest.mark.matrix
@on_ranks(1, 3, 4, timeout_s=600)
def test_steps_that_are_left_out_leave_no_trace_in_any_engine(rank: int, world_size: int, references: str) -> None:
    _leave_no_trace(rank, world_size, references, ("fsdp2", "zero1", "zero2", "zero3"))


def _leave_no_trace(rank: int, world_size: int, references: str, names: tuple[str, ...]) -> None:
    by_document, by_gradient = pickle.loads(Path(references).read_bytes())
    document, word = _bad_document()
    for name in names:
        engine = problem.engine(SETTING, rank, world_size, name=name)
        encoder, head, hooks = problem.encoder(SETTING), problem.head(rank, world_size), Hooks()
        with torch.no_grad():
            encoder.model.get_input_embeddings().weight[word, 3] = math.nan
        result = train_level(engine, encoder, head, problem.task(replace(SETTING, save_every=6)), hooks)
        _equals(result, head, by_document, word, f"{name}, a bad document")
        assert [found.step for found, _ in hooks.skipped] == sorted(_steps_with(document)), name
        for found, last in hooks.skipped:
            assert not last
            assert (found.level, math.isnan(found.loss), len(found.ranks)) == (LEVEL, True, world_size)
            (reader,) = (r for r in found.ranks if document in r["documents"])
            assert reader["bad_vectors"] == [document]
            assert sum(len(r["bad_vectors"]) for r in found.ranks) == 1
            ids = GlobalBatches(problem.tokens().lengths, 8, problem.SEED).batch(found.step)
            assert sorted(d for r in found.ranks for d in r["documents"]) == sorted(ids.tolist())
        assert hooks.rows[-1]["skipped_steps"] == 2
        assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in hooks.rows)
        ((_, saved),) = hooks.saved
        before = [step for step in _steps_with(document) if step < 6]
        assert saved["extra"]["skipped"] == len(before) > 0
        assert saved["extra"]["skipped_in_a_row"] == before.count(5)

        # The loss is finite, and so is the encoder's gradient: of DeepSpeed's own checks none would see it.
        engine = problem.engine(SETTING, rank, world_size, name=name)
        encoder, head, hooks = problem.encoder(SETTING), problem.head(rank, world_size), _Spoiler()
        if rank == world_size - 1:
            head.bias.register_hook(lambda g, hooks=hooks: g * math.inf if hooks.step == AT else g)
        result = train_level(engine, encoder, head, problem.task(SETTING), hooks)
        assert math.isfinite(result.losses[AT])
        result.losses[AT] = math.nan  # what the reference says of a step that it leaves out
        _equals(result, head, by_gradient, None, f"{name}, a bad gradient")
        ((found, _),) = hooks.skipped
        assert found.step == AT
        assert [r["gradient"] for r in found.ranks] == [True] * (world_size - 1) + [False]
        assert all(r["loss"] and not r["bad_vectors"] for r in found.ranks)
        assert found.encoder_gradient
        start, stop = found.ranks[-1]["rows"]
        assert found.parts() == [f"rank {world_size - 1}, rows {start} to {stop}: gradient of the head"]


class _Spoiler(Hooks):
    """Knows the step that is being taken."""

    step = 0

    def log(self, values: dict[str, Any]) -> None:
        super().log(values)
        self.step = values["step"]


@on_ranks(2)
def test_what_goes_on_stops_all_ranks_and_moves_nothing(rank: int, world_size: int) -> None:
    for allowed, steps in ((10, 3), (1, 2), (0, 1)):
        hooks = Hooks()
        encoder, head = problem.encoder(SETTING), problem.head(rank, world_size)
        if rank == world_size - 1:  # known to one rank alone
            with torch.no_grad():
                head.bias.fill_(math.nan)
        before = [p.clone() for p in encoder.parameters()]
        rows = head.weight.detach().clone()
        task = problem.task(SETTING)
        task = replace(task, optimizer=replace(task.optimizer, max_skipped_steps=allowed))
        with pytest.raises(DivergedError) as caught:
            train_level(problem.engine(SETTING, rank, world_size), encoder, head, task, hooks)
        text = str(caught.value)
        assert text.startswith(f"level {LEVEL}, step {steps - 1}: the loss is nan and its gradient's norm nan; "), text
        assert "rank 1, rows 6 to 11: loss; rank 1, rows 6 to 11: gradient of the head; gradient of the encoder" in text
        why = "one after the other" if allowed == 10 else "of this level could not be taken (optimizer.max_skipped"
        assert f"{steps} steps {why}" in text
        assert "are in some file. Lower optimizer.lr or optimizer.head_lr, or set engine.precision=fp32" in text
        assert [last for _, last in hooks.skipped] == [False] * (steps - 1) + [True]
        assert hooks.rows == []  # there is no loss to tell
        assert all(torch.equal(a, b) for a, b in zip(before, encoder.parameters(), strict=True))
        assert torch.equal(rows, head.weight)


def test_a_sound_step_ends_a_row_and_the_count_goes_on() -> None:
    skips = Skips(total=2, in_a_row=2)  # as from a checkpoint
    skips.taken()
    assert [skips.left_out(allowed=4), skips.left_out(allowed=4)] == ["", ""]
    assert skips.left_out(allowed=4) == "5 steps of this level could not be taken (optimizer.max_skipped_steps=4)"


def test_the_documents_of_the_step_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, run = write_text_folder(tmp_path / "data"), tmp_path / "run"
    real = loop._loss
    monkeypatch.setattr(loop, "_loss", lambda *args: real(*args) * math.nan)
    overrides = [*TINY_RUN, "evaluation.linear_baseline=false", f"dataset.path={data}", f"run_dir={run}"]
    with pytest.raises(DivergedError) as caught:
        train(compose_run(overrides), World.single())
    places = sorted((run / "nonfinite").iterdir())
    assert [p.name for p in places] == [f"level-1-step-{i}.jsonl" for i in range(3)]
    assert f"The documents of this step are in {places[2]}" in str(caught.value)
    step, *rows = [json.loads(line) for line in places[1].read_text().splitlines()]
    assert (step["level"], step["step"], step["loss"], step["gradient_norm"]) == (1, 1, "nan", "nan")
    assert step["not_finite"][0].startswith("rank 0, rows 0 to ")
    assert len(rows) == 12
    texts = (data / "X.trn.txt").read_text().splitlines()
    Y = open_csr(run / "prepared" / "Y.trn")
    for row in rows:
        assert row["text"] == texts[row["document"]]
        assert row["labels"] == Y[row["document"]].indices.tolist()
        assert row["label_texts"] == [f"label {i} : w{2 * i} w{2 * i + 1}" for i in row["labels"]]
        assert (row["rank"], row["vector_is_finite"]) == (0, True)
    assert "level 1, step 1: left out, its loss is nan" in (run / "run.log").read_text()
