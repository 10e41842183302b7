"""An ensemble's members: what each is made of, composed and checked before any is trained."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from xmcdist.config.compose import compose_unchecked, conf_dir, to_object
from xmcdist.config.errors import ConfigError
from xmcdist.config.schema import RunConfig, TrackerConfig

__all__ = ["compose_members", "needs"]

_OF_THE_RUN = ("run_dir", "members", "ensemble", "only_members")  # not of its members


def compose_members(
    overrides: list[str], cfg: RunConfig, world_size: int = 1, composed: Any = None
) -> dict[str, RunConfig]:
    """The settings of every member of an ensemble, in the order they are trained.

    A member has the settings of the run with its own on top.  Where an experiment names the
    members, ``debug=`` and the command line win over them, as they win over the experiment
    itself; a member named on the command line has the last word.  A member that chooses an
    ``experiment`` of its own is made of that one.

    Args:
        overrides: those that ``cfg`` was composed of.
        cfg: with `members`.
        world_size: ranks of the job.
        composed: what `xmcdist.config.compose.compose_unchecked` makes of the overrides; None: made here.

    Returns:
        By name; ``run_dir`` is ``RUN/members/NAME``, the prepared data are those of the run.

    Raises:
        ConfigError: every fault of every member, by name; members that do not share data set,
            engine or cut-offs; or one that needs another which comes after it.

    Cost: half a second for a member that chooses files of conf/, else a tenth.
    """
    run, faults, out = Path(cfg.run_dir), [], {}
    of_run = [word for word in overrides if _key(word) not in _OF_THE_RUN]
    if composed is None:
        composed = compose_unchecked(overrides)
    here = [word.lstrip("+").split("=")[0] for word in overrides if _key(word) == "members" and word[0] != "~"]
    for name, own in cfg.members.items():
        named_here = "members" in here or f"members.{name}" in here
        rest = [word for word in of_run if not (_key(word) == "experiment" and _names_experiment(own))]
        stronger = [] if named_here else [*_debug_values(of_run), *rest]
        words = [*rest, *own] if named_here else [*own, *stronger]
        try:
            one = _with_values(composed, own, stronger)
            one = to_object(compose_unchecked(words) if one is None else one, world_size)
        except ConfigError as error:
            faults += [f"member {name}: {line}" for line in str(error).splitlines()]
            continue
        prepared = cfg.dataset.prepared or str(run / "prepared")
        faults += [f"member {name}: {fault}" for fault in _not_shared(cfg, one)]
        out[name] = replace(
            one,
            run_dir=str(run / "members" / name),
            members={},
            only_members=None,
            dataset=replace(one.dataset, prepared=prepared),
            tracker=replace(one.tracker, run_name=one.tracker.run_name or f"{run.name}-{name}"),
        )
    names = list(cfg.members)
    for place, name in enumerate(names):
        later = [other for other in needs(run, out[name]) if other in names[place:]] if name in out else []
        faults += [f"member {name} needs member {other}, which is not trained before it" for other in later]
    if faults:
        raise ConfigError("\n".join(faults))
    return out


def _with_values(composed: Any, own: list[str], stronger: list[str]) -> Any:
    """A composed run with a member's plain values set; None where that is not all there is to do.

    It is what Hydra would do after it has read all files again: that takes the longest, and many
    members are made in a second.

    Args:
        composed: holds what ``stronger`` sets already.
        own: of the member.
        stronger: what wins over these.
    """
    taken = [word.lstrip("+~").split("=")[0] for word in stronger]
    out = copy.deepcopy(composed)
    try:
        for override in OverridesParser.create().parse_overrides(own):
            key, folder = override.key_or_group, conf_dir() / override.key_or_group
            plain = not (override.is_add() or override.is_delete() or override.is_sweep_override() or override.package)
            if not plain or folder.is_dir() or any(other.startswith(f"{key}.") for other in taken):
                return None
            if key not in taken:
                OmegaConf.update(out, key, override.value(), merge=True)
    except (HydraException, OmegaConfBaseException):  # told by Hydra itself, in the way of all settings
        return None
    return out


def needs(run_dir: Path, member: RunConfig) -> dict[str, str]:
    """Members whose folders a member's settings name, each with that setting, ``tree.path=RUN/members/pifa``."""
    root = (run_dir / "members").absolute()
    found: dict[str, str] = {}
    for key, value in _leaves(asdict(replace(member, run_dir="", tracker=TrackerConfig()))).items():
        if isinstance(value, str) and Path(value).absolute().is_relative_to(root):
            parts = Path(value).absolute().relative_to(root).parts
            found.setdefault(parts[0] if parts else "", f"{key}={value}")
    return found


def _not_shared(cfg: RunConfig, member: RunConfig) -> list[str]:
    """What members must have in common, and this one has not."""
    faults = []
    for what, ours, theirs in (
        ("dataset", replace(cfg.dataset, prepared=None), replace(member.dataset, prepared=None)),
        ("engine.name", cfg.engine.name, member.engine.name),
        ("evaluation.ks", cfg.evaluation.ks, member.evaluation.ks),
    ):
        if ours != theirs:
            faults.append(f"{what} differs from the run's: members share data, launcher and cut-offs; set it for all")
    return faults


def _names_experiment(words: Iterable[str]) -> bool:
    return any(_key(word) == "experiment" for word in words)


def _key(word: str) -> str:
    """``members`` of ``+members.a=[...]``."""
    return word.lstrip("+~").split("=")[0].split(".")[0].split("@")[0]


def _debug_values(words: list[str]) -> list[str]:
    """What ``debug=`` sets, as overrides, to have it win over members of an experiment too."""
    chosen = [word.split("=", 1)[1] for word in words if _key(word) == "debug" and "=" in word]
    path = conf_dir() / "debug" / f"{chosen[-1]}.yaml" if chosen else None
    if path is None or not path.is_file():
        return []
    told = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(told, dict)
    choices = [d for d in told.pop("defaults", []) if isinstance(d, dict)]
    groups = [f"{key.split('/')[-1]}={value}" for choice in choices for key, value in choice.items()]
    return groups + [f"{key}={json.dumps(value)}" for key, value in _leaves(told).items()]


def _leaves(values: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of nested dictionaries' values."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        inner = _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
        found.update(inner)
    return found
