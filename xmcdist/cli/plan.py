"""``python -m xmcdist plan``: sizes, memory, traffic and time of a run before it is started."""

from __future__ import annotations

import sys
from dataclasses import fields

from xmcdist.config.commands import PlanConfig
from xmcdist.config.compose import compose_run
from xmcdist.config.errors import UserError

_OWN = {f.name for f in fields(PlanConfig)}
_USAGE = """usage: python -m xmcdist plan [settings of train ...] [gpu=h100] [gpus=8] [nodes=1] [counts=NAME] [--json]

Says what a run of these settings will take, without starting it: tree, memory a rank, steps, traffic, time, and
what would not fit, with the setting to change.  The data are counted where they are at hand; elsewhere
counts=NAME takes published counts, and counts.documents= counts.labels= ... any others.
Of an ensemble every member is planned as if it were alone; stages that members share are counted in each.
--json prints all figures as JSON; output=FILE writes them.

"""


def main() -> None:
    """Plan with the overrides of ``sys.argv``."""
    given = sys.argv[1:]
    try:
        if {"-h", "--help"} & set(given):
            from xmcdist.config.help import help_text

            print(_USAGE + help_text([], "plan"))
            return
        unknown = [a for a in given if a.startswith("-") and a != "--json"]
        if unknown:
            raise UserError(f"plan knows no option {unknown[0]}; there are --json and --help")
        own = [a for a in given if a.lstrip("+~").split("=")[0].split(".")[0] in _OWN]
        cfg: PlanConfig = compose_run(own, config_name="plan")
        settings = [a for a in given if a not in own and a != "--json"]
        if cfg.counts.documents is not None and not any(a.startswith("dataset.path=") for a in settings):
            settings.append("dataset.path=none")  # no data are looked at
        run = compose_run(settings, world_size=cfg.gpus * cfg.nodes)
        from xmcdist.pipelines.plan import plan, plan_members

        if run.members:
            from xmcdist.config.members import compose_members

            members = compose_members(settings, run, cfg.gpus * cfg.nodes)
            plan_members(members, cfg, as_json="--json" in given)
        else:
            plan(run, cfg, as_json="--json" in given)
    except UserError as error:
        print(f"xmcdist: error: {error}", file=sys.stderr)
        sys.exit(2)
