"""The copy engine: XXH3 by its published values, 2-D copies against torch, hashes that see what plain sums do not, shared memory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from fastrlhf import _cpu
from fastrlhf.refit.memory import run

# of the bytes (131 i + 7) mod 256, by the xxHash project's own library
XXH3 = {
    0: 0x2D06800538D394C2,
    1: 0x4C5CCA45D0F4811F,
    2: 0x29C60963CBFA4E6E,
    3: 0x6E3E2670E61106AC,
    4: 0x5C4C63133443D03F,
    8: 0xF9FD4DD0B04D78F5,
    9: 0x7C20DF9712C26EDF,
    16: 0x86ABF6BACCEA0858,
    17: 0xB58BF5DC5022D071,
    32: 0xE3712ED84C04A66E,
    33: 0xA4DEE99B093E1F73,
    64: 0x1291D2D4042330DD,
    65: 0x97C6BF83217E5EC9,
    96: 0x81296929FC063365,
    97: 0xF145A45B658AB9DD,
    128: 0x10D17F72C0CCBA41,
    129: 0x1648BDC3DB49D1A2,
    144: 0xB46DBFC6D9E31ABA,
    160: 0x655C8DC33B4B4C4A,
    240: 0xB6CFAF343FAB81E6,
    241: 0x956CAE592C67279E,
    256: 0xB15E550733C5DFAC,
    512: 0xA0E9790EB93990D7,
    1024: 0x70BD377D9574F4BB,
    1025: 0x66C4487C41E127A7,
    1088: 0xF43DC77E28A9ACBC,
    2048: 0x8B46CAA67DAB3A30,
    4097: 0x34EECAECD32195A4,
    65536: 0x04404B28125B4786,
    70000: 0xB851FCC28C3570C0,
}


@pytest.fixture(params=[isa for isa in _cpu.isas() if isa != "avx512_bf16"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


def test_hashes_are_xxh3(isa: str) -> None:
    data = (np.arange(70000) * 131 + 7).astype(np.uint8)
    for n, expected in XXH3.items():
        assert _cpu.xxh3(data.ctypes.data, n) == expected, n


def table(source: torch.Tensor, dest: torch.Tensor, blocks: list[tuple[int, int, int, int, int, int]]) -> np.ndarray:
    """Copies of (row, col, rows, cols, to row, to col) between byte matrices."""
    a, b = source.stride(0), dest.stride(0)
    return np.array(
        [[source.data_ptr() + r * a + c, dest.data_ptr() + tr * b + tc, h, w, a, b] for r, c, h, w, tr, tc in blocks], np.int64
    ).reshape(-1, 6)  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("hashes", [False, True])
def test_copies_are_torchs(isa: str, threads: int, hashes: bool) -> None:
    g = torch.Generator().manual_seed(1)
    source = torch.randint(0, 256, (700, 40_000), dtype=torch.uint8, generator=g)
    dest, expected = torch.zeros(900, 40_100, dtype=torch.uint8), torch.zeros(900, 40_100, dtype=torch.uint8)
    blocks, at = [], 0
    for h, w in [(1, 1), (3, 7), (200, 40_000), (1, 39_999), (64, 513), (0, 5), (5, 0), (400, 33_333), (100, 2)]:
        blocks.append((at % 100, 3 if w < 39_990 else 0, h, w, at, 5))
        at += h
    for r, c, h, w, tr, tc in blocks:
        expected[tr : tr + h, tc : tc + w] = source[r : r + h, c : c + w]
    copies = table(source, dest, blocks)
    out = run(copies, hashes=hashes, threads=threads)
    assert torch.equal(dest, expected)
    if hashes:
        there = copies.copy()
        there[:, [0, 1, 4, 5]] = copies[:, [1, 1, 5, 5]]
        there[:, 1] = 0
        assert np.array_equal(run(there, hashes=True, threads=3 - threads), out)


def test_a_hash_sees_a_flipped_bit_and_swapped_rows() -> None:
    a = torch.randint(0, 256, (64, 1000), dtype=torch.uint8)

    def hashed(t: torch.Tensor) -> int:
        whole = table(t, t, [(0, 0, 64, 900, 0, 0)])
        whole[:, 1] = 0
        return int(run(whole, hashes=True)[0])

    first = hashed(a)
    b = a.clone()
    b[40, 899] ^= 1
    c = a.clone()
    c[[3, 50]] = a[[50, 3]]  # a plain sum over rows would not see it
    d = a.clone()
    d[:, 900:] = 0  # outside
    assert hashed(b) != first and hashed(c) != first and hashed(d) == first


def test_a_copy_costs_less_than_half_a_microsecond() -> None:
    """Of 4 KB, the copying itself in it, between rows that stay in the cache: memory is shared with what else runs here."""
    n, rows = 20_000, 32
    source, dest = torch.zeros(rows, 4096, dtype=torch.uint8), torch.zeros(rows, 4096, dtype=torch.uint8)
    copies = table(source, dest, [(i % rows, 0, 1, 4096, i % rows, 0) for i in range(n)])
    best = float("inf")
    for _ in range(10):
        started = time.perf_counter()
        run(copies)
        best = min(best, time.perf_counter() - started)
    assert best / n < 0.5e-6, f"{best / n * 1e9:.0f} ns"


def test_bad_tables_are_refused() -> None:
    for row, message in (
        ([0, 8, 1, 1, 1, 1], "no address"),
        ([8, 0, 1, 1, 1, 1], "no address"),
        ([8, 8, -1, 1, 1, 1], "negative size"),
    ):
        bad = np.array([row], np.int64)
        with pytest.raises(ValueError, match=f"copy 0 has {'a ' if 'neg' in message else ''}{message}"):
            _cpu.run_copies(bad.ctypes.data, 1, 0, 1)


def test_an_arena_has_no_name_and_is_shared_by_its_descriptor() -> None:
    before = set(os.listdir("/dev/shm"))
    arena = _cpu.Arena(1 << 20)
    assert set(os.listdir("/dev/shm")) == before
    here = torch.frombuffer(arena, dtype=torch.uint8)
    assert not here.any()
    other = _cpu.Arena(os.dup(arena.fd), 1 << 20)
    there = torch.frombuffer(other, dtype=torch.uint8)
    here[12345] = 7
    assert there[12345] == 7 and other.address != arena.address
    del arena  # memory lives as long as a tensor of it
    here[5] = 3
    assert there[5] == 3
    with pytest.raises(ValueError, match="holds 1048576 bytes, expected 2097152"):
        _cpu.Arena(os.dup(other.fd), 2 << 20)
    with pytest.raises(ValueError, match="expected >= 1, got 0"):
        _cpu.Arena(0)
    with pytest.raises(RuntimeError, match="cannot be had"):
        _cpu.Arena(1 << 50)
