"""Seeds from seeds: what is drawn depends on a run's seed and on what it is drawn for, not on what was drawn before."""

from __future__ import annotations

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 over the golden ratio: steps of it visit 64-bit numbers evenly."""
_MASK = 2**64 - 1


def mix(seed: int, stream: int) -> int:
    """The seed of the stream-th thing that a seed draws: splitmix64's finalizer. In [-2^63, 2^63)."""
    z = (seed + (stream + 1) * GOLDEN) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    z ^= z >> 31
    return z - 2**64 if z >= 2**63 else z
