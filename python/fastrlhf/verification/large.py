"""Logits of more than 2^31 elements, where 32-bit offsets wrap around."""

from __future__ import annotations

from pathlib import Path

import torch

from .. import ops
from .checking import Result

VOCAB = 262_147
ROWS = 2**31 // VOCAB + 2


def available_bytes(device: str) -> int:
    """Free memory; 0 where it cannot be known."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def check_large(device: str, backend: str | None) -> Result | None:
    """The last rows against the same rows alone; None where memory does not allow it."""
    bytes_needed = ROWS * VOCAB * 2
    if available_bytes(device) < 2 * bytes_needed:
        return None
    name = f"{ROWS} x {VOCAB} bfloat16 logits, {ROWS * VOCAB - 2**31} over 2^31"
    logits = torch.zeros(ROWS, VOCAB, dtype=torch.bfloat16, device=device)
    tail = (torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(0)) * 3).bfloat16().to(device)
    logits[-3:] = tail
    labels = torch.full((ROWS,), VOCAB - 1, device=device)
    labels[: ROWS - 3 - 8] = -100
    try:
        out = ops.logprobs(logits, labels, entropy=True, backend=backend)
        alone = ops.logprobs(tail, labels[-3:], entropy=True, backend=backend)
    except Exception as error:
        return Result("op", "logprobs", name, False, note=f"raised {type(error).__name__}: {error}")
    assert out.entropy is not None and alone.entropy is not None
    uniform = -torch.log(torch.tensor(float(VOCAB), dtype=torch.float64))
    flat = (out.logprobs[-11:-3].double().cpu() - uniform).abs().max()
    same = torch.equal(out.logprobs[-3:], alone.logprobs) and torch.equal(out.entropy[-3:], alone.entropy)
    passed = same and float(flat) < 1e-5
    return Result(
        "op", "logprobs", name, passed, float(flat), 1e-5, "" if same else "the last rows differ from the same rows alone"
    )
