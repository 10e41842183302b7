"""What ``COMMAND --help`` prints: the choices of every group and all settings with their values.

Hydra's own way to the same text copies all it has read for every group and takes two
seconds; looking at the folder takes none.
"""

from __future__ import annotations

from pathlib import Path
from string import Template

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from xmcdist.config.compose import conf_dir, explain, register
from xmcdist.config.errors import ConfigError

__all__ = ["help_text"]


def help_text(overrides: list[str], config_name: str) -> str:
    """The help of one command, laid out by ``hydra.help`` in ``conf/hydra/run.yaml``.

    Args:
        overrides: Hydra overrides; the settings are shown with them.
        config_name: primary config.

    Raises:
        ConfigError: an override that does not fit.
    """
    register()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
            composed = compose(config_name, overrides=overrides, return_hydra_config=True)
        template = Template(composed.hydra.help.template)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error, config_name)) from None
    with open_dict(composed):
        del composed["hydra"]
    settings = OmegaConf.to_yaml(composed)
    return template.safe_substitute(APP_CONFIG_GROUPS=_groups(conf_dir()), CONFIG=settings)


def _groups(folder: Path) -> str:
    """A line a group: its name and its choices."""
    lines = []
    for group in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "hydra"):
        choices = sorted(path.stem for path in group.glob("*.yaml"))
        if choices:
            lines.append(f"{group.name}: {', '.join(choices)}\n")
    return "".join(lines)
