"""``xmcdist doctor`` whose rank 1 stops, neither dead nor alive, once all have come together."""

from __future__ import annotations

import os
import signal
import sys

from xmcdist.pipelines import doctor as pipeline

_facts = pipeline.host_facts


def _then_stop(*args: object) -> object:
    facts = _facts(*args)  # type: ignore[arg-type]
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)
    return facts


pipeline.host_facts = _then_stop  # type: ignore[assignment]
sys.argv.insert(1, "doctor")

from xmcdist.__main__ import main  # noqa: E402

main()
