"""From words on a command line to one checked `RunConfig`.

Hydra composes ``conf/``; the schemas type it; `check_run` says what must hold between
settings.  A misspelt key or choice is answered with the nearest valid name, and all
faults are told at once, before any data is read.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from xmcdist.config import commands, schema
from xmcdist.config.checks import check_giant, check_run
from xmcdist.config.errors import ConfigError

__all__ = ["compose_run", "compose_unchecked", "conf_dir", "explain", "find_folder", "register", "to_object"]

C = TypeVar("C")

_GROUPS = {f.name: type(getattr(schema.RunConfig(), f.name)) for f in fields(schema.RunConfig)}


def find_folder(name: str, packaged: str) -> Path:
    """A folder of the project: in the checkout first, else inside the installed package."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package.parent / name, package / packaged):
        if folder.is_dir() and (folder.parent / "pyproject.toml").exists() == (folder.name == name):
            return folder
    raise ConfigError(f"{name}/ is neither beside the package at {package.parent} nor in it as {packaged}/: reinstall")


def conf_dir() -> Path:
    """The conf/ tree: ``$XMCDIST_CONF``, else the checkout's, else the installed package's."""
    given = os.environ.get("XMCDIST_CONF")
    if given:
        if not Path(given, "train.yaml").is_file():
            raise ConfigError(f"XMCDIST_CONF={given} holds no train.yaml")
        return Path(given).resolve()
    return find_folder("conf", "_conf")


def _shipped(name: str) -> str:
    """Folder of a data set that travels with the project."""
    return str(find_folder("data", "_data") / name)


def _stem(path: str) -> str:
    """Last part of a path without extension: the name a run gets when none is given."""
    name = Path(str(path)).name
    return re.split(r"\.(?:jsonl|csv|parquet|txt)", name)[0] or "dataset"


@functools.cache
def register() -> None:
    """Put the schemas where the yaml files' defaults lists find them; harmless to repeat."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=schema.RunConfig)
    store.store(name="predict_schema", node=commands.PredictConfig)
    store.store(name="evaluate_schema", node=commands.EvaluateConfig)
    store.store(name="serve_schema", node=commands.ServeConfig)
    store.store(name="calibrate_schema", node=commands.CalibrateConfig)
    store.store(name="import_pecos_schema", node=commands.ImportPecosConfig)
    store.store(name="doctor_schema", node=commands.DoctorConfig)
    store.store(name="plan_schema", node=commands.PlanConfig)
    store.store(name="giant_schema", node=commands.GiantConfig)
    store.store(name="giant_classify_schema", node=commands.GiantClassifyConfig)
    store.store(group="schema", name="counts", node=commands.CountsConfig)
    store.store(name="tree_schema", node=commands.TreeShowConfig)
    for name, node in _GROUPS.items():
        if is_dataclass(node):
            store.store(group="schema", name=name, node=node)  # not group=name: schemas are no choices
    OmegaConf.register_new_resolver("shipped", _shipped, replace=True)
    OmegaConf.register_new_resolver("stem", _stem, replace=True)


def compose_run(overrides: list[str], *, config_name: str = "train", world_size: int = 1) -> Any:
    """Compose, type and check one configuration.

    Args:
        overrides: Hydra overrides, ``["encoder=none", "seed=1"]``.
        config_name: primary config: train, predict, evaluate, calibrate, import_pecos or tree_show.
        world_size: ranks of the job, for the checks of batches.

    Raises:
        ConfigError: with every fault found and, for a misspelt name, the nearest valid one.
    """
    composed = compose_unchecked(overrides, config_name)
    try:
        cfg = to_object(composed, world_size)
    except (OmegaConfBaseException, ValueError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(explain(error, config_name)) from None
    if isinstance(cfg, schema.RunConfig) and cfg.members:
        from xmcdist.config.members import compose_members

        compose_members(overrides, cfg, world_size, composed)
    return cfg


def compose_unchecked(overrides: list[str], config_name: str = "train") -> Any:
    """What Hydra makes of the overrides, neither typed nor checked; also inside a command.

    Raises:
        ConfigError: Hydra refuses them.
    """
    register()
    hydra = GlobalHydra.instance()
    before, hydra.hydra = hydra.hydra, None  # inside a command there is one, which is needed afterwards
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            return compose(config_name, overrides=overrides)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(explain(error, config_name)) from None
    finally:
        GlobalHydra.instance().hydra = before


def to_object(composed: Any, world_size: int = 1) -> Any:
    """The typed object of a composed config, checked; `RunConfig` for train and prepare."""
    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError("not set: " + ", ".join(f"{m} (give {m}=...)" for m in missing))
    cfg: Any = OmegaConf.to_object(composed)
    added = sorted(_keys(OmegaConf.to_container(composed, resolve=True)) - _keys(asdict(cfg)))
    if added:
        raise ConfigError(
            "; ".join(f"unknown setting {name!r}{_nearest(name, sorted(_keys(asdict(cfg))))}" for name in added)
        )
    if isinstance(cfg, schema.RunConfig):
        faults = check_run(cfg, world_size)
        faults += check_giant(cfg) if isinstance(cfg, commands.GiantConfig) else []
        if faults:
            raise ConfigError("\n".join(faults))
    return cfg


def explain(error: Exception, config_name: str) -> str:
    """Hydra's message in one line or two, with the nearest valid name."""
    text = str(error.__cause__ or error).strip()
    if "Key 'graph' not in 'RunConfig'" in str(error):
        return "these settings are of a graph: start `python -m xmcdist giant` with them, not train"
    key = re.search(r"Key '([^']+)' is not in struct|Key '([^']+)' not in '\w+'", str(error) + "\n" + text)
    override = re.search(r"Could not override '([^']+)'", str(error))
    if override and key:
        wrong = override.group(1)
        if wrong.split(".")[0] == "members":
            return (
                f"{wrong}=...: a member is added by +members.NAME='[\"group.key=value\"]', taken away by ~members.NAME"
            )
        return f"unknown setting {wrong!r}{_nearest(wrong, _all_keys(config_name))}"
    unset = re.search(r"Missing mandatory value: ([\w.]+)", str(error))
    if unset:
        return f"not set: {unset.group(1)} (give {unset.group(1)}=...)"
    choice = re.search(r"Could not find '([^']+)/([^'/]+)'", str(error))
    if choice:
        group, name = choice.groups()
        options = sorted(p.stem for p in (conf_dir() / group).glob("*.yaml"))
        hint = _nearest(name, options)
        return f"unknown choice {group}={name}{hint}; there are: {', '.join(options) or 'none'}"
    group = re.search(r"Could not override '([^'@]+)(?:@[^']*)?'\.\s*No match in the defaults list", str(error))
    if group:
        return f"unknown setting {group.group(1)!r}{_nearest(group.group(1), _all_keys(config_name))}"
    first = [line.strip() for line in (str(error) + "\n" + text).splitlines() if line.strip()]
    return " ".join(dict.fromkeys(first))


def _all_keys(config_name: str) -> list[str]:
    roots: dict[str, Any] = {
        "train": schema.RunConfig,
        "predict": commands.PredictConfig,
        "evaluate": commands.EvaluateConfig,
        "serve": commands.ServeConfig,
        "calibrate": commands.CalibrateConfig,
        "import_pecos": commands.ImportPecosConfig,
        "doctor": commands.DoctorConfig,
        "plan": commands.PlanConfig,
        "giant": commands.GiantConfig,
        "giant_classify": commands.GiantClassifyConfig,
        "tree_show": commands.TreeShowConfig,
    }

    return sorted(_keys(asdict(roots[config_name]())))


def _keys(values: Any, prefix: str = "") -> set[str]:
    """Dotted names of all settings in nested dictionaries."""
    found: set[str] = set()
    for name, value in values.items():
        found.add(f"{prefix}{name}")
        if isinstance(value, dict):
            found |= _keys(value, f"{prefix}{name}.")
    return found


def _nearest(name: str, options: list[str]) -> str:
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.5)
    if not close:  # a right leaf in the wrong group: lr=... for optimizer.lr
        close = [o for o in options if o.split(".")[-1] == name.split(".")[-1]][:1]
    return f"; did you mean {close[0]!r}?" if close else ""
