from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from xmcdist.checkpoint.atomic import no_space_is_clear, read_json, replace_folder, write_json
from xmcdist.checkpoint.stages import StageStore
from xmcdist.config.errors import UserError
from xmcdist.parallel.launch import World


def _store(run_dir: Path, said: list[str] | None = None) -> StageStore:
    return StageStore(run_dir, World.single(), (said if said is not None else []).append)


def _writes(text: str, calls: list[str]) -> Callable[[Path], None]:
    def body(folder: Path) -> None:
        calls.append(text)
        (folder / "out.txt").write_text(text)

    return body


def test_a_finished_stage_is_skipped_and_keeps_its_time(tmp_path: Path) -> None:
    calls: list[str] = []
    first, second = _store(tmp_path), _store(tmp_path)
    first.run("a", {"x": 1}, _writes("one", calls))
    place = second.run("a", {"x": 1}, _writes("two", calls))
    assert calls == ["one"]
    assert (place / "out.txt").read_text() == "one"
    assert second.skipped == ["a"]
    assert second.seconds == first.seconds


def test_a_stage_with_other_inputs_is_made_again(tmp_path: Path) -> None:
    calls: list[str] = []
    _store(tmp_path).run("a", {"x": 1}, _writes("one", calls))
    place = _store(tmp_path).run("a", {"x": 2}, _writes("two", calls))
    assert (place / "out.txt").read_text() == "two"
    assert sorted(p.name for p in place.parent.iterdir()) == ["a"]


def test_an_interrupted_stage_is_not_taken_for_done_and_its_saved_state_is_there(tmp_path: Path) -> None:
    def dies(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _store(tmp_path).run("a", {"x": 1}, dies)
    seen: list[bool] = []
    _store(tmp_path).run("a", {"x": 1}, lambda folder: seen.append((folder / "half").exists()))
    with pytest.raises(KeyboardInterrupt):
        _store(tmp_path).run("b", {"x": 1}, dies)
    _store(tmp_path).run("b", {"x": 2}, lambda folder: seen.append((folder / "half").exists()))
    assert seen == [True, False]  # state of other inputs is not gone on from


def test_a_full_disk_names_the_place_and_leaves_the_stage_before_whole(tmp_path: Path) -> None:
    calls: list[str] = []
    store = _store(tmp_path)
    store.run("a", {}, _writes("one", calls))

    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match=r"no space left while writing .*b\.partial.*finished stages are intact"):
        store.run("b", {}, full)
    again = _store(tmp_path)
    again.run("a", {}, _writes("two", calls))
    assert calls == ["one"]


def test_a_really_full_disk(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="no space left"),
        no_space_is_clear(tmp_path / "x"),
        open("/dev/full", "wb") as f,
    ):
        f.write(b"x" * 100_000)


def test_a_run_of_another_configuration_is_refused_and_the_difference_shown(tmp_path: Path) -> None:
    store = _store(tmp_path)
    store.check({"seed": 0, "tree.nr_splits": 16})
    store.remember({"seed": 0, "tree.nr_splits": 16})
    before = (tmp_path / "config.json").read_bytes()
    store.check({"seed": 0, "tree.nr_splits": 16})
    with pytest.raises(UserError, match=r"tree\.nr_splits: there 16, asked 32"):
        store.check({"seed": 0, "tree.nr_splits": 32})
    assert (tmp_path / "config.json").read_bytes() == before


def test_killed_between_the_two_renames_of_a_commit_the_old_stage_is_back(tmp_path: Path) -> None:
    calls: list[str] = []
    place = _store(tmp_path).run("a", {"x": 1}, _writes("one", calls))
    place.rename(place.with_name("a.old"))
    _store(tmp_path).run("a", {"x": 1}, _writes("two", calls))
    assert calls == ["one"]


def test_json_is_replaced_whole_and_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    path.write_text('{"a"')
    with pytest.raises(UserError, match=r"x\.json is damaged"):
        read_json(path)


def test_replacing_a_folder_leaves_nothing_else(tmp_path: Path) -> None:
    for name in ("new", "place"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(name)
    replace_folder(tmp_path / "new", tmp_path / "place")
    assert [p.name for p in tmp_path.iterdir()] == ["place"]
    assert (tmp_path / "place" / "f").read_text() == "new"


def test_what_a_killed_run_of_more_ranks_left_unfinished_is_no_part_of_the_stage(tmp_path: Path) -> None:
    def dies(folder: Path) -> None:
        for name in ("a.part-00002.npy", "b.json.tmp", "label_embedding/part-00002/dense.npy", "state"):
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            (folder / name).touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _store(tmp_path).run("a", {"x": 1}, dies)
    place = _store(tmp_path).run("a", {"x": 1}, _writes("one", []))
    assert {str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()} == {"out.txt", "stage.json", "state"}


def test_a_run_that_may_not_write_any_more_commits_nothing(tmp_path: Path) -> None:
    robbed: list[bool] = []

    def guard() -> None:
        if robbed:
            raise UserError("robbed")

    store = StageStore(tmp_path, World.single(), lambda _: None, guard=guard)
    store.run("a", {}, _writes("one", []))
    with pytest.raises(UserError, match="robbed"):
        store.run("b", {}, lambda folder: robbed.append(True))
    assert [p.name for p in (tmp_path / "stages").iterdir() if not p.name.endswith(".partial")] == ["a"]


def test_all_of_a_stage_is_on_the_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, rename = os.fsync, os.replace

    def synced(fd: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{fd}"))
        sync(fd)

    def renamed(a: Path, b: Path) -> None:
        done.append(f"rename {b}")
        rename(a, b)

    def body(folder: Path) -> None:
        (folder / "sub").mkdir()
        for name in ("x", "sub/y"):
            (folder / name).write_text(name)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    place = _store(tmp_path).run("a", {}, body)
    before = done[: done.index(f"rename {place}")]
    partial = f"{place}.partial"
    note = before.index(f"rename {partial}/stage.json")
    assert {f"{partial}/x", f"{partial}/sub/y", f"{partial}/sub", partial} <= set(before[:note])
    assert partial in before[note:]
    assert str(place.parent) in done[done.index(f"rename {place}") :]
