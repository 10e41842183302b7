"""What a server takes on at most, so that no request can use it up for the others."""

from __future__ import annotations

from dataclasses import dataclass, fields

from xmcdist.config.errors import ConfigError

__all__ = ["Limits"]

_LEAST = {"max_wait_ms": 0.0, "timeout_s": 0.0, "max_body_mb": 0.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Of one worker.

    Attributes:
        max_batch: documents that the model is asked about at once.
        max_wait_ms: how long a free worker waits for more documents; 0: not at all.
        max_queue: documents that wait; a request beyond is answered 503.
        timeout_s: for reading a request, and again for answering it.
        max_body_mb: megabytes (10^6 bytes) of a request.
        max_documents: of a request.
        max_characters: of a document.
        max_k: labels a document, and label ids of a request that names some.
        max_beam: clusters kept a level.

    Raises:
        ConfigError: a value is out of its range; all faults at once.
    """

    max_batch: int = 64
    max_wait_ms: float = 0.0
    max_queue: int = 2048
    timeout_s: float = 30.0
    max_body_mb: float = 4.0
    max_documents: int = 256
    max_characters: int = 100_000
    max_k: int = 100
    max_beam: int = 200

    def __post_init__(self) -> None:
        faults = [
            f"{f.name}={getattr(self, f.name)} must be {'at least 1' if f.name not in _LEAST else 'above 0'}"
            for f in fields(self)
            if f.name != "max_wait_ms" and not (getattr(self, f.name) > 0)
        ]
        if not 0 <= self.max_wait_ms <= 1000:
            faults.append(f"max_wait_ms={self.max_wait_ms} must be between 0 and 1000")
        if self.max_queue < self.max_documents:
            faults.append(
                f"max_queue={self.max_queue} is less than max_documents={self.max_documents}: "
                "a request of that many documents would never be taken; raise max_queue"
            )
        if faults:
            raise ConfigError("\n".join(faults))

    @property
    def max_body(self) -> int:
        """Bytes."""
        return int(self.max_body_mb * 1e6)
