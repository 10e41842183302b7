"""``python -m xmcdist report RUN``: make the report of a run folder again."""

from __future__ import annotations

import sys

USAGE = """usage: python -m xmcdist report RUN

Makes RUN/report.html from the files of the run folder, also while a run is under way or after it was stopped:
measures, training curves, label tree, confusions, sample documents, time and memory, settings, on one page that
needs no network. `train` makes it at its end."""


def main() -> None:
    """Make the page and say where it is."""
    words = [word.removeprefix("run_dir=") for word in sys.argv[1:]]
    if any(word in ("-h", "--help") for word in words):
        print(USAGE)
        return
    if len(words) != 1 or words[0].startswith("-"):
        sys.exit(f"xmcdist: error: report takes one run folder\n\n{USAGE}")
    from pathlib import Path

    from xmcdist.config.errors import UserError
    from xmcdist.pipelines.report import write_report

    try:
        path, left_out = write_report(Path(words[0]))
    except UserError as error:
        print(f"xmcdist: error: {error}", file=sys.stderr)
        sys.exit(2)
    for note in left_out:
        print(f"note: without {note}", file=sys.stderr)
    print(path)
