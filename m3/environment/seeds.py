"""Seeds: functions of the run's seed and of what they are for, never of what runs beside it."""

from __future__ import annotations

import hashlib
import json


def derive_seed(seed: int, *parts: str | int) -> int:
    """31 bits of BLAKE2b over a seed and what another is for: the same on every machine; every server takes it."""
    text = json.dumps([seed, *parts]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") >> 1
