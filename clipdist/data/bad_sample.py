"""Why a sample cannot be used. Imports no torch."""

from __future__ import annotations

MAX_PIXELS = 100_000_000
# Indices of verified shards keep places in this list: append only.
REASONS = (
    "missing image",
    "missing caption",
    "truncated image",
    "not an image",
    "too many pixels",
    "too large",
    "not JSON",
    "caption not UTF-8",
    "wrong checksum",
    "shard cut off",
)


class BadSample(Exception):
    """A sample that cannot be used. `reason` is one of REASONS."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
