"""The definition of `sample`: sort, cut, draw by inverse transform from a counter-based generator."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF


def philox_uniform(seed: int, counter: int) -> float:
    """Philox 4x32-10 (Salmon et al. 2011): the first 53 bits of block `counter` under key `seed`, as a float in [0, 1)."""
    key = [seed & _MASK32, (seed >> 32) & _MASK32]
    c = [counter & _MASK32, (counter >> 32) & _MASK32, 0, 0]
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ key[0], p1 & _MASK32, (p0 >> 32) ^ c[3] ^ key[1], p0 & _MASK32]
        key = [(key[0] + 0x9E3779B9) & _MASK32, (key[1] + 0xBB67AE85) & _MASK32]
    return (((c[0] << 32) | c[1]) >> 11) * 2.0**-53


def sample_row(
    logits: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float, seed: int, counter: int
) -> tuple[int, float, Tensor]:
    """The token, its log-probability among the kept ones, and which are kept, of one row of logits (V).

    Cuts, in this order: the top_k highest; of those the fewest, from the highest, whose probability reaches top_p; of
    those the ones with at least min_p times the highest probability. Ties with the last one kept are kept.
    """
    x = logits.double()
    if temperature == 0:
        return int(x.argmax()), 0.0, x == x.max()
    p = torch.softmax((x - x.max()) / temperature, -1)
    keep = x > -torch.inf
    if 0 < top_k < x.numel():
        keep = keep & (x >= x.topk(top_k).values[-1])
    if top_p < 1:
        order = x.masked_fill(~keep, -torch.inf).argsort(descending=True)
        mass = p[order].where(keep[order], 0).cumsum(-1)
        last = int((mass < top_p * mass[-1]).sum())
        keep = keep & (x >= x[order[min(last, x.numel() - 1)]])
    if min_p > 0:
        keep = keep & (x >= x.max() + torch.log(torch.tensor(min_p, dtype=x.dtype)) * temperature)
    p = p.where(keep, 0)
    p = p / p.sum()
    token = int((p.cumsum(-1) <= philox_uniform(seed, counter)).sum())
    token = min(token, int(keep.nonzero()[-1]))
    return token, float(p[token].log()), keep
