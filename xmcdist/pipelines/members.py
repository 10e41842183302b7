"""An ensemble as one experiment: each member a run of its own, then all of them together.

``RUN/members/NAME`` is an ordinary run folder, so a member is resumed, reported and used like
any run.  All read ``RUN/prepared``, and a stage that one member has done (features, tree,
tokens, ...) is taken over by the next that would make it of the same inputs.  The ensemble is
measured on the scores that members keep of the test documents, block by block, without any
model in memory.  ``RUN/model`` holds all members' models, as hard links.
"""

from __future__ import annotations

import gc
import json
import shlex
import shutil
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xmcdist.checkpoint.atomic import link_tree, no_space_is_clear, read_json, replace_folder, write_json
from xmcdist.checkpoint.checksums import files_to_disk, folder_damage, seal_folder
from xmcdist.checkpoint.run_lock import RunLock, held
from xmcdist.checkpoint.stages import fingerprint
from xmcdist.config.errors import UserError
from xmcdist.config.members import needs
from xmcdist.config.schema import RunConfig
from xmcdist.data.dataset import PreparedDataset
from xmcdist.evaluation.table import format_table
from xmcdist.inference.ensemble import combine
from xmcdist.inference.ensemble_folder import EnsembleFolder
from xmcdist.observability.environment import versions
from xmcdist.observability.log import RunLog
from xmcdist.observability.origin import command_line, git_commit, hardware
from xmcdist.parallel import watch
from xmcdist.parallel.collectives import broadcast_object
from xmcdist.parallel.launch import World, slurm_job
from xmcdist.pipelines.evaluation import TABLE_KEYS, label_frequency, measure
from xmcdist.pipelines.kept_scores import open_scores, scores_of
from xmcdist.pipelines.prepare import prepared_folder
from xmcdist.pipelines.run import shaping_settings
from xmcdist.pipelines.together import errors_together
from xmcdist.pipelines.train import train
from xmcdist.training import preemption

__all__ = ["train_members"]

_OTHER = ".other"  # members that were trained with other settings


def train_members(cfg: RunConfig, members: dict[str, RunConfig], world: World) -> dict[str, Any]:
    """Train every member that is not finished, one after the other, and join them; collective.

    With ``cfg.only_members`` these alone are trained, and the ensemble is made when all members
    are finished; ``[]`` trains none and makes it of those that are.  With ``cfg.until`` every
    member goes as far, those that need another's result wait, and there is no ensemble.

    Args:
        cfg: the experiment.
        members: their settings, from `xmcdist.config.compose.compose_members`, in the order of training.
        world: the job.

    Returns:
        What ``RUN/results.json`` holds: ``metrics`` of the ensemble (percent), ``members`` with
        the metrics, seconds and folder of each, ``missing`` names, ``complete``.  Empty when no
        ensemble was made.

    Raises:
        UserError: as `train`; a member needs another that is not finished; or none is finished.
        Preempted: a signal asked one of the ranks to end; the same settings go on.
    """
    run_dir = Path(cfg.run_dir)
    with errors_together():
        if world.is_main:
            _claim(run_dir, alone=cfg.only_members is None)
    log = RunLog(run_dir, world)
    preemption.begin(run_dir, log.say, watch.gone)
    wanted = list(members) if cfg.only_members is None else [name for name in members if name in cfg.only_members]
    for place, name in enumerate(wanted, start=1):
        member = members[name]
        with errors_together():
            if world.is_main:
                _make_room(run_dir, name, member, log)
        if _state({name: member}, world)[name] is None:
            log.say(f"member {name}: finished before, skipped")
            continue
        waits_for = [other for other in needs(run_dir, member) if other in members]
        if cfg.until is not None and any(_state({o: members[o] for o in waits_for}, world).values()):
            log.say(f"member {name}: left for later, as until={cfg.until} does not finish {', '.join(waits_for)}")
            continue
        with errors_together():
            if world.is_main:
                _check_needs(run_dir, name, members)
        log.say(f"==== member {place} of {len(wanted)}: {name}, in {member.run_dir} ====")
        train(member, world, member_of=run_dir)
        _free_memory()
    if cfg.until is not None:
        log.say(f"until={cfg.until}: each member has come so far; the same command without it goes on")
        return {}
    left = [name for name, why in _state(members, world).items() if why is not None]
    if left and cfg.only_members:
        log.say(
            f"trained: {', '.join(wanted)}; not finished: {', '.join(left)}. The ensemble is made when all are, or of "
            f"those that are by `{_command('[]')}`"
        )
        return {}
    return _join(cfg, members, world, log)


def _claim(run_dir: Path, alone: bool) -> None:
    if (run_dir / "stages").is_dir():
        raise UserError(f"run_dir={run_dir} holds a run of one model: choose another run_dir=... for the ensemble")
    try:
        (run_dir / "members").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir={run_dir} cannot be written ({error}): choose another") from error
    if alone:  # else it may be that of another job, whose batch script has not seen it yet
        preemption.clear_mark(run_dir)


def _state(members: dict[str, RunConfig], world: World) -> dict[str, str | None]:
    """What each member lacks, None for a finished one, as rank 0 sees it; collective."""
    found: dict[str, str | None] = {}
    with errors_together():
        if world.is_main:
            found = {name: _unfinished(member) for name, member in members.items()}
    told: dict[str, str | None] = broadcast_object(found)
    return told


def _unfinished(member: RunConfig) -> str | None:
    """What a member lacks to be part of the ensemble; None: nothing."""
    folder = Path(member.run_dir)
    if not (folder / "results.json").is_file():
        return "not begun" if not (folder / "config.json").is_file() else "begun, and not finished"
    if read_json(folder / "results.json").get("config_hash") != fingerprint(shaping_settings(member)):
        return "trained with other settings"
    if not (folder / "model" / "config.json").is_file():
        return f"without {folder / 'model'}"
    verify = member.checkpoint.verify
    damage = None if verify == "off" else folder_damage(folder / "model", contents=verify == "full")
    if damage is not None:
        return f"damaged: {damage}"
    data = prepared_folder(member)
    if data.is_dir() and PreparedDataset.open(data).has_test:
        kept = open_scores(folder)
        if kept is None or kept[0].shape[1] != max(member.evaluation.ks):
            return "without scores of the test documents"
    return None


def _check_needs(run_dir: Path, name: str, members: dict[str, RunConfig]) -> None:
    for other, setting in needs(run_dir, members[name]).items():
        if other not in members:
            raise UserError(f"member {name} needs member {other} ({setting}), and there is none of that name")
        why = _unfinished(members[other])
        if why is not None:
            raise UserError(
                f"member {name} needs member {other} ({setting}), which is {why}: train it first, by "
                f"`{_command(f'[{other}]')}`"
            )


def _make_room(run_dir: Path, name: str, member: RunConfig, log: RunLog) -> None:
    """Put a member with other settings aside, and one with these settings that was put aside back; on one rank."""
    folder, aside = Path(member.run_dir), run_dir / "members" / _OTHER
    now = json.loads(json.dumps(shaping_settings(member), default=str))
    there = read_json(folder / "config.json") if (folder / "config.json").is_file() else now
    # A setting that one of the two does not know is of another version: `train` refuses to go on with it.
    if any(there[key] != now[key] for key in there.keys() & now.keys()):
        lock = RunLock(folder, log.say, slurm_job())
        lock.take()  # nobody is at it
        lock.release()
        before = aside / f"{name}-{fingerprint(there)}"
        aside.mkdir(exist_ok=True)
        shutil.rmtree(before, ignore_errors=True)
        folder.replace(before)
        log.say(f"member {name}: its settings changed; as it was it is kept in {before}")
    if not folder.exists() and (aside / f"{name}-{fingerprint(now)}").is_dir():
        (aside / f"{name}-{fingerprint(now)}").replace(folder)
        log.say(f"member {name}: was trained with these settings before, taken from {aside}")


def _free_memory() -> None:
    """What a member's training holds is not waited for until the next one needs it."""
    gc.collect()
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _join(cfg: RunConfig, members: dict[str, RunConfig], world: World, log: RunLog) -> dict[str, Any]:
    """Measure the ensemble of the finished members, and write its model folder and results; collective."""
    run_dir, started = Path(cfg.run_dir), time.perf_counter()
    preemption.agree("ensemble")
    with ExitStack() as stack:
        try:
            stack.enter_context(held(run_dir, world, log.say, slurm_job()))
        except UserError as error:
            if not cfg.only_members:
                raise
            log.say(f"the ensemble is left to another job: {error}")
            return {}
        why = _state(members, world)
        present = [name for name in members if why[name] is None]
        missing = [name for name in members if why[name] is not None]
        if not present:
            told = "; ".join(f"{name}: {why[name]}" for name in missing)
            raise UserError(f"{run_dir}: no member is finished ({told}); they are trained by `{_command(None)}`")
        for name in missing:
            log.warn(f"member {name} is missing from the ensemble: {why[name]}; `{_command(f'[{name}]')}` trains it")
        metrics = _measure(cfg, {name: members[name] for name in present}, world)
        with errors_together(), no_space_is_clear(run_dir / "model"):
            if world.is_main:
                _write_model(cfg, members, present, missing)
        results = _results(cfg, members, present, missing, metrics, world, time.perf_counter() - started)
        if world.is_main:
            write_json(run_dir / "results.json", results)
            rows = {name: told["metrics"] for name, told in results["members"].items()}
            if metrics:
                print(format_table({**rows, f"ensemble ({cfg.ensemble})": metrics}, TABLE_KEYS), flush=True)
        of = f"{len(present)} of {len(members)} members" if missing else f"{len(members)} members"
        log.say(f"{'INCOMPLETE ' if missing else ''}ensemble of {of} in {run_dir / 'model'}")
        world.barrier()
    return results


def _measure(cfg: RunConfig, members: dict[str, RunConfig], world: World) -> dict[str, float]:
    """Metrics of the ensemble on the test documents; empty where there are none; collective."""
    with errors_together():
        data = PreparedDataset.open(prepared_folder(next(iter(members.values()))))
        kept = [open_scores(Path(member.run_dir)) for member in members.values()] if data.has_test else []
        if any(one is None or one[0].shape[0] != data.num_docs("tst") for one in kept):
            raise UserError(f"{cfg.run_dir}: a member's test_scores are not of these test documents: delete its folder")
    if not data.has_test:
        return {}
    k, labels = max(cfg.evaluation.ks), data.num_labels
    Y = data.Y("trn")
    return measure(
        lambda start, stop: combine(
            [scores_of(one, start, stop, labels) for one in kept if one is not None],
            cfg.ensemble,
            k,
            depth=min(k, labels),
        ),
        data.Y("tst"),
        label_frequency(Y),
        Y.shape[0],
        cfg.evaluation,
        (cfg.dataset.propensity_a, cfg.dataset.propensity_b),
        world,
    )


def _write_model(cfg: RunConfig, members: dict[str, RunConfig], present: list[str], missing: list[str]) -> None:
    """``RUN/model``: the members' models, linked, so that the folder can be copied by itself."""
    model = Path(cfg.run_dir) / "model"
    beside = model.with_name("model.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    (beside / "members").mkdir(parents=True)
    for name in present:
        link_tree(Path(members[name].run_dir) / "model", beside / "members" / name)
    EnsembleFolder.write(beside, cfg.ensemble, {name: f"members/{name}" for name in present}, missing)
    seal_folder(beside)
    files_to_disk(beside)
    replace_folder(beside, model)


def _results(
    cfg: RunConfig,
    members: dict[str, RunConfig],
    present: list[str],
    missing: list[str],
    metrics: dict[str, float],
    world: World,
    seconds: float,
) -> dict[str, Any]:
    told = {name: read_json(Path(members[name].run_dir) / "results.json") for name in present}
    spent = {name: round(sum(own["seconds"].values()), 3) for name, own in told.items()}
    return {
        "metrics": metrics,
        "ensemble": cfg.ensemble,
        "members": {
            name: {"metrics": own["metrics"], "seconds": spent[name], "folder": f"members/{name}"}
            for name, own in told.items()
        },
        "missing": missing,
        "complete": not missing,
        "seconds": {**spent, "ensemble": round(seconds, 3)},
        "world_size": world.world_size,
        "versions": versions(),
        "command": command_line(),
        "commit": git_commit() if world.is_main else None,
        "hardware": hardware(),
        "config": asdict(cfg),
    }


def _command(only: str | None) -> str:
    """The command that started this process, with other members chosen; None: all."""
    words = [word for word in shlex.split(command_line()) if not word.startswith("only_members=")]
    return shlex.join([*words, *([] if only is None else [f"only_members={only}"])])
