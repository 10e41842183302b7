"""``python -m xmcdist tree show``: levels and sizes, or the place of one label or cluster."""

from __future__ import annotations

import sys

from xmcdist.cli.app import run
from xmcdist.config.commands import TreeShowConfig


def main() -> None:
    """Show the label tree of ``run_dir=`` or ``model=``; ``label=`` or ``level= cluster=`` for one place."""
    if len(sys.argv) > 1 and "=" not in sys.argv[1] and not sys.argv[1].startswith("-"):
        sys.argv[1] = f"action={sys.argv[1]}"
    run("tree_show", _show)


def _show(cfg: TreeShowConfig) -> None:
    from xmcdist.pipelines.tree import show_tree

    print(show_tree(cfg))
