"""``python -m xmcdist <command> key=value ...``: finds the command, nothing more."""

from __future__ import annotations

import difflib
import importlib
import sys

COMMANDS = {
    "prepare": "read a data set once into its memory-mapped form",
    "plan": "sizes, memory, traffic and time of a run before it is started",
    "train": "train a classifier; the same command goes on after an interruption",
    "predict": "labels for the lines of a file",
    "evaluate": "P@k, nDCG@k, R@k, PSP@k of a model on a test split",
    "giant": "embeddings of a text graph's nodes, by an encoder that learns to name their neighbours",
    "serve": "answers over HTTP, with a page to try it",
    "calibrate": "probabilities beside a model's scores, fitted on held-out documents",
    "import-pecos": "convert a PECOS XR-Linear model",
    "tree": "look at the label tree of a run",
    "report": "make report.html of a run folder again",
    "board": "curves of a run in a dashboard on this computer",
    "doctor": "is this machine, or this job on all its ranks, fit to train?",
    "env": "versions and devices, to paste into a bug report",
}
USAGE = "usage: python -m xmcdist COMMAND [key=value ...]\n\n" + "\n".join(
    f"  {name:13s} {what}" for name, what in COMMANDS.items()
)


def main() -> None:
    """Run one command; ``COMMAND --help`` tells its settings."""
    command = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if command in ("-h", "--help", "help"):
        print(USAGE + "\n\nCOMMAND --help lists its settings.")
        return
    if command == "--version":
        import xmcdist

        print(xmcdist.__version__)
        return
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        sys.exit(f"xmcdist: no command {command!r}{hint}\n\n{USAGE}")
    sys.argv = [f"xmcdist {command}", *sys.argv[2:]]
    importlib.import_module(f"xmcdist.cli.{command.replace('-', '_')}").main()


if __name__ == "__main__":
    main()
