"""Where a rank is, told to the others; who is missing when a collective fails."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from xmcdist.parallel import watch
from xmcdist.parallel.traffic import TRAFFIC
from xmcdist.parallel.watch import CollectiveError, collective


@pytest.fixture
def store() -> Iterator[dist.HashStore]:
    """Rank 1 of 4 is this process."""
    made = dist.HashStore()
    watch.start(made, rank=1, world_size=4)
    yield made
    watch.stop()


def _says(store: dist.HashStore, rank: int, number: int, beat: int = 1, **more: object) -> None:
    line = {"n": number, "op": "all_reduce.sum", "inside": False, "t": time.time(), "beat": beat} | more
    store.set(f"beat/{rank}", json.dumps(line))


def test_a_failure_names_who_is_gone_who_is_late_and_who_never_came(
    store: dist.HashStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_GONE_AFTER_S", 0.1)
    with collective("first", 0):
        pass
    done = json.loads(store.get("beat/1"))["n"]
    _says(store, 0, number=done)
    real = time.sleep

    def meanwhile(seconds: float) -> None:
        real(seconds)
        _says(store, 2, number=1, beat=7)  # rank 2 goes on telling, rank 0 does not

    _says(store, 2, number=1)
    monkeypatch.setattr(watch.time, "sleep", meanwhile)
    with pytest.raises(CollectiveError) as caught, collective("second", 0):
        raise RuntimeError("[gloo/tcp.cc] Timed out\nin some file")
    text = str(caught.value)
    assert " second did not complete after 0 s; missing from it:\n" in text
    assert "rank 0: gone; it was last past #" in text
    assert "rank 2: alive, but past #1 all_reduce.sum since 0 s, and has not come to #" in text
    assert "rank 3: never heard of" in text
    assert "rank 1" not in text
    assert text.endswith("the backend says: [gloo/tcp.cc] Timed out")


def test_who_is_gone_is_known_while_nothing_fails(store: dist.HashStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "_GONE_AFTER_S", 0.05)
    monkeypatch.setattr(watch, "_SURELY_GONE_AFTER_S", 0.4)
    here = _told(store)["host"]
    dead = subprocess.Popen(["true"])
    dead.wait()
    for rank, host, pid in ((0, here, os.getpid()), (2, here, dead.pid), (3, "elsewhere", dead.pid)):
        _says(store, rank, number=1, host=host, pid=pid)
    assert watch.gone() == ""  # all have just spoken
    time.sleep(0.1)
    assert watch.gone().startswith("rank 2 is gone; it was last past #1 all_reduce.sum since 0 s")
    assert "rank 3" not in watch.gone()
    time.sleep(0.5)
    assert "rank 3 is gone" in watch.gone()
    assert "rank 0 is gone" in watch.gone()
    _says(store, 0, number=1, beat=2, host=here, pid=os.getpid())
    assert "rank 0" not in watch.gone()


def test_what_a_rank_reads_is_told(store: dist.HashStore) -> None:
    with watch.reading("level 1, step 7", lambda: "a file", 60):
        line = _told(store)
        assert line["reading"] == "level 1, step 7"
        assert watch._where(line).startswith("in data loading (level 1, step 7) since 0 s, on ")
    assert "reading" not in _told(store)


def test_a_fault_inside_is_told_once_and_other_errors_pass_through(store: dist.HashStore) -> None:
    watch.stop()
    with pytest.raises(CollectiveError, match=r"#\d+ inner did not complete"), collective("outer", 0):  # noqa: SIM117
        with collective("inner", 0):
            raise RuntimeError("[gloo] closed")
    for mine in (KeyError("mine"), torch.OutOfMemoryError("mine")):
        with pytest.raises(type(mine)), collective("backward", 0):
            raise mine


def test_every_call_is_counted_and_told(store: dist.HashStore) -> None:
    before = TRAFFIC.copy()
    with collective("outer", 5), collective("inner", 7):
        line = _told(store)
        assert line["op"] == "inner"
        assert line["inside"]
    with collective("outer", 5):
        with collective("inner", 7):
            pass
        assert _told(store)["op"] == "outer"
    assert not _told(store)["inside"]
    counted = TRAFFIC.since(before)
    assert (dict(counted.sent), dict(counted.calls), counted.total) == (
        {"outer": 10, "inner": 14},
        {"outer": 2, "inner": 2},
        24,
    )


def _told(store: dist.HashStore) -> dict[str, object]:
    assert watch._watch is not None
    watch._watch.tell()
    line: dict[str, object] = json.loads(store.get("beat/1"))
    return line
