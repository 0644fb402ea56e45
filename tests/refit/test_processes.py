"""Two processes: who is killed when, what the other one does then, and that nothing torn is ever read."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fastrlhf import _cpu
from fastrlhf.generation import EmbeddedEngine, EmbeddedProcessEngine, Sampling
from fastrlhf.models import add_lora
from fastrlhf.models.checkpoint import named_weights
from fastrlhf.refit import PeerLost, Poisoned, RefitError, StaleEpoch, State
from fastrlhf.refit.catalogue import PlanError, to_message
from fastrlhf.refit.host import answered
from fastrlhf.refit.transports import posix_shm
from fastrlhf.refit.wire import Channel

from . import processes as P

PHASES = ("begin", "draining", "transfer", "middle", "commit", "done")


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = set(os.listdir("/dev/shm"))
    yield
    assert set(os.listdir("/dev/shm")) <= before


def until(what: object, seconds: float) -> float:
    started = time.monotonic()
    while not what():  # type: ignore[operator]
        assert time.monotonic() - started < seconds, "not in time"
        time.sleep(0.005)
    return time.monotonic() - started


@pytest.mark.parametrize("slots", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_trainer_killed_at_any_phase(slots: int, tmp_path: Path) -> None:
    """The engine notices within a second; it serves whole weights or none; another trainer's refit succeeds."""
    expected = {seed: P.fresh(seed) for seed in range(2)}
    with P.engine(tmp_path / "s", slots) as engine:
        assert engine.generate() == "Poisoned"
        assert P.session_at(engine.connect(), 0).refit(0).version == 0
        assert engine.generate() == expected[0]
        for i, dies in enumerate(p for p in PHASES if slots == 1 or p != "draining"):  # nobody reads the second slot
            before = engine.state()["version"]
            waits = dies == "draining" and slots == 1  # somebody reads the only slot for so long that a refit has to wait
            if waits:
                enough = threading.Event()

                def read(enough: threading.Event = enough) -> None:
                    while not enough.is_set():
                        engine.generate(240)

                reader = threading.Thread(target=read)
                reader.start()
            started = P.trainer(engine.path, 1, 100 + i, "never" if waits else dies)
            if waits:
                until(lambda: engine.state()["state"] == "draining", 60)
                enough.set()
                started.send_signal(signal.SIGKILL)
            assert started.wait(60) == -signal.SIGKILL
            killed = time.monotonic()
            wanted = "poisoned" if slots == 1 and dies in ("transfer", "middle", "commit") else "serving"
            until(lambda wanted=wanted: engine.state()["state"] == wanted, 1)
            assert time.monotonic() - killed < 1
            after = engine.state()
            if waits:
                reader.join()
            if wanted == "poisoned":
                assert "is gone" in after["reason"] and engine.generate() == "Poisoned"
            else:
                assert after["version"] == (100 + i if dies == "done" else before)
                assert engine.generate() == expected[dies == "done"]
            good = P.session_at(engine.connect(), 0)
            assert good.refit(200 + i).version == 200 + i
            assert engine.generate() == expected[0]
            good.target.close()


def test_a_trainer_killed_while_a_fork_of_it_lives(tmp_path: Path) -> None:
    with P.engine(tmp_path / "s", 1) as engine:
        P.session_at(engine.connect(), 0).refit(0)
        assert P.trainer(engine.path, 1, 1, "commit", forks=True).wait(60) == -signal.SIGKILL
        until(lambda: engine.state()["state"] == "poisoned", 1)
        assert P.session_at(engine.connect(), 1).refit(2).version == 2


@pytest.mark.parametrize(
    ("slots", "phases"),
    [(1, ("transfer", "done")), pytest.param(2, ("begin", "transfer", "commit", "done"), marks=pytest.mark.slow)],
)
def test_an_engine_killed_at_any_phase(slots: int, phases: tuple[str, ...]) -> None:
    """The trainer notices within a second, and its next refit starts another engine."""
    model = P.decoder(4)
    expected = P.fresh(4)
    dies, killed = "", 0.0

    def phase(name: str) -> None:
        nonlocal killed
        if name == dies:
            assert engine.pid is not None
            os.kill(engine.pid, signal.SIGKILL)
            killed = time.monotonic()

    with EmbeddedProcessEngine(model, slots=slots, verify=True, phase=phase) as engine:
        engine.update_weights(None, 0)
        for i, dies in enumerate(phases):
            if dies == "done":
                engine.update_weights(None, 9)
            else:
                with pytest.raises(PeerLost, match="is gone"):
                    engine.update_weights(None, 9)
            assert time.monotonic() - killed < 1
            with pytest.raises((Poisoned, PeerLost)):
                engine.generate(P.PROMPTS, P.SAMPLING, seeds=P.SEEDS)
            assert time.monotonic() - killed < 1.5 and engine.session is not None and engine.session.state is State.POISONED
            dies = ""
            assert engine.update_weights(None, 10 + i).version == 10 + i
            assert P.tokens(engine.generate(P.PROMPTS, P.SAMPLING, seeds=P.SEEDS)) == expected


def test_an_engine_that_stops_answering_is_given_up_in_time() -> None:
    with EmbeddedProcessEngine(P.decoder(0), timeout=0.5) as engine:
        engine.update_weights(None, 0)
        assert engine.pid is not None and engine.session is not None
        os.kill(engine.pid, signal.SIGSTOP)
        target = engine.session.target
        assert isinstance(target, posix_shm.PosixShm)
        target.timeout = 0.2
        with pytest.raises(PeerLost, match="no answer within"):
            engine.update_weights(None, 1)
        os.kill(engine.pid, signal.SIGKILL)
        assert engine.update_weights(None, 2).version == 2


def test_the_engine_ends_with_its_trainer() -> None:
    engine = EmbeddedProcessEngine(P.decoder(0))
    engine.update_weights(None, 0)
    process = engine._process
    assert process is not None and engine.session is not None
    engine.session.target.close()  # what the kernel does for a trainer that is killed
    assert process.wait(1) == 0
    engine.close()


def mapped() -> int:
    """Bytes of shared memory of refits in this process."""
    lines = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if "fastrlhf-refit" in line
    ]
    return sum(int(end, 16) - int(begin, 16) for begin, end in lines)


def test_the_memory_of_an_engine_that_is_gone_is_let_go_of() -> None:
    engine = EmbeddedProcessEngine(P.decoder(0))
    before = mapped()
    engine.update_weights(None, 0)
    assert mapped() > before
    engine.close()
    assert mapped() == before
    engine.update_weights(None, 1)
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(PeerLost):
        engine.generate(P.PROMPTS, P.SAMPLING, seeds=P.SEEDS)
    assert mapped() == before
    engine.update_weights(None, 2)
    os.kill(engine.pid, signal.SIGKILL)
    assert engine.session is not None
    with pytest.raises(PeerLost):
        engine.session.refit(3)
    assert mapped() == before
    engine.close()


@pytest.mark.parametrize("slots", [1, 2])
def test_what_a_refit_does_to_running_requests(slots: int) -> None:
    model = P.decoder(0)
    with EmbeddedProcessEngine(model, slots=slots) as engine:
        engine.update_weights(None, 0)
        assert engine.session is not None
        for old, mode in enumerate(("drain", "abort", "keep")):
            engine.session.mode = mode
            stream = engine.stream(P.PROMPTS * 8, Sampling(n=4, max_tokens=240), seeds=range(24))
            done = []
            reader = threading.Thread(target=lambda stream=stream, done=done: done.extend(f.completion for f in stream))
            reader.start()
            time.sleep(0.15)  # a fifth of what it takes where nothing else runs
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.05)
            engine.update_weights(None, old + 1)
            reader.join()
            assert len(done) == 96
            for c in done:
                assert sum(n for _, n in c.weight_spans) == len(c.tokens) == len(c.logprobs)
            versions = {tuple(v for v, _ in c.weight_spans) for c in done}
            reasons = {c.finish_reason for c in done}
            if mode == "drain":
                assert versions == {(old,)} and reasons == {"length"}
            elif mode == "abort":
                assert "abort" in reasons and versions <= {(old,), ()}
            else:
                assert (old, old + 1) in versions and reasons == {"length"}
            own = EmbeddedEngine(model)
            own.update_weights(None, old + 1)
            assert engine.generate(P.PROMPTS, P.SAMPLING, seeds=P.SEEDS) == own.generate(P.PROMPTS, P.SAMPLING, seeds=P.SEEDS)


def test_every_byte_is_checked_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = P.decoder(0)
    with EmbeddedProcessEngine(model, verify=True) as engine:
        engine.update_weights(None, 0)
        before = P.tokens(engine.generate(P.PROMPTS, P.SAMPLING, seeds=P.SEEDS))
        ran = posix_shm.run

        def flipping(table: object, **more: object) -> object:
            out = ran(table, **more)  # type: ignore[arg-type]
            torch.frombuffer(engine.session.target._engines[0]._arena, dtype=torch.uint8)[-2000:] ^= 1  # type: ignore[union-attr]
            return out

        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1)
        monkeypatch.setattr(posix_shm, "run", flipping)
        with pytest.raises(RefitError, match="what arrived is not what rank 0 sent"):
            engine.update_weights(None, 1)
        monkeypatch.undo()
        assert engine.version == 0 and P.tokens(engine.generate(P.PROMPTS, P.SAMPLING, seeds=P.SEEDS)) == before
        engine.update_weights(None, 2)
        target = engine.session.target  # type: ignore[union-attr]
        named = dict(model.named_parameters())
        for name, value in target.checksums()[0].items():  # type: ignore[attr-defined]
            assert value == _cpu.xxh3(named[name].data_ptr(), named[name].nbytes), name


def test_two_trainer_ranks_write_their_shares_and_none_can_commit_alone(tmp_path: Path) -> None:
    """As if tp were 2 in the trainer: catalogues of halves by rows."""
    whole = P.decoder(5)
    halves = P.catalogue_of(whole).rows_sharded(2)
    parameters = P.parameters_of(whole)

    def share(rank: int) -> dict[str, torch.Tensor]:
        out = {}
        for name, t in parameters.items():
            n = -(-t.shape[0] // 2)
            out[name] = t.detach()[rank * n : (rank + 1) * n].clone()
        return out

    with P.engine(tmp_path / "s", 2) as engine:
        ranks = [posix_shm.PosixShm([engine.connect()], halves, share(r), rank=r, verify=True, threads=1) for r in (0, 1)]
        ranks[0].begin(1, 3, "drain", 5)
        ranks[1].begin(1, 3, "drain", 5)
        moved = ranks[0].transfer(1)
        first = threading.Thread(target=ranks[0].commit, args=(1, 3))  # waits for the other's part
        first.start()
        time.sleep(0.2)
        assert first.is_alive() and engine.state()["state"] == "refitting"
        moved_too = ranks[1].transfer(1)
        ranks[1].commit(1, 3)  # waits for the first's
        first.join()
        assert engine.state()["version"] == 3 and moved.nbytes + moved_too.nbytes == sum(t.nbytes for t in parameters.values())
        assert engine.generate() == P.fresh(5)
        with pytest.raises(StaleEpoch):
            ranks[1].transfer(1)
        ranks[0].begin(2, 4, "drain", 0.5)
        ranks[0].transfer(2)
        with pytest.raises(RefitError, match=r"rank\(s\) \[1\] have not written their part within 0.5 s"):
            ranks[0].commit(2, 4)
        with pytest.raises(RefitError, match="no attempt after 1 began"):
            ranks[1].begin(2, 4, "drain", 0.1)  # too late
        assert engine.state()["state"] == "serving" and engine.generate() == P.fresh(5)


def test_an_attempt_is_its_own_trainers(tmp_path: Path) -> None:
    """Another connection can neither end it nor begin one while its writer has not said that it is done."""
    with P.engine(tmp_path / "s", 2) as engine:
        one, two = (P.session_at(engine.connect(), seed).target for seed in (5, 6))
        one.begin(1, 3, "drain", 5)
        with pytest.raises(RefitError, match="attempt 1 is under way"):
            two.begin(2, 4, "drain", 5)
        two.fail(1, "not its own")
        two.fail(2, "never begun")
        assert engine.state()["state"] == "refitting"
        one.transfer(1)
        one.commit(1, 3)
        one.begin(2, 4, "drain", 0.3)
        time.sleep(0.6)  # given up by the engine; it may be copying still
        with pytest.raises(RefitError, match="has not said that it is done"):
            two.begin(3, 4, "drain", 5)
        one.fail(2, "too slow")
        two.begin(3, 4, "drain", 5)
        two.transfer(3)
        two.commit(3, 4)
        assert engine.generate() == P.fresh(6)


def test_an_interrupted_question_closes_the_channel() -> None:
    """Its answer would be taken for that to the next one."""
    ours, _theirs = socket.socketpair()
    channel = Channel(ours, "engine")
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        channel.ask({"kind": "commit"}, 5)
    assert not channel.alive
    with pytest.raises(PeerLost):
        channel.ask({"kind": "fail"}, 5)


def test_one_stream_at_a_time() -> None:
    with EmbeddedProcessEngine(P.decoder(0)) as engine:
        engine.update_weights(None, 0)
        first = engine.stream(P.PROMPTS, P.SAMPLING, seeds=P.SEEDS)
        next(first)
        with pytest.raises(RuntimeError, match="a stream is under way"):
            next(engine.stream(P.PROMPTS, P.SAMPLING, seeds=P.SEEDS))
        first.close()
        assert len(engine.generate(P.PROMPTS, P.SAMPLING, seeds=P.SEEDS)) == 3


def test_sides_that_do_not_agree_refuse_each_other(tmp_path: Path) -> None:
    with P.engine(tmp_path / "s", 1) as engine:
        channel = engine.connect()
        with pytest.raises(RefitError, match="plan: none has been agreed on"):
            answered(channel.ask({"kind": "begin", "epoch": 1, "version": 1, "mode": "drain", "timeout": 1}, 5))
        source = to_message(P.catalogue_of(P.decoder(0)))
        with pytest.raises(PlanError, match="plan: the trainer's has the digest 0000"):
            answered(channel.ask({"kind": "plan", "source": source, "digest": "0" * 64, "ignore": []}, 5))
        with pytest.raises(RefitError, match="'guess' is not a message"):
            answered(channel.ask({"kind": "guess"}, 5))
        assert engine.state()["state"] == "empty"


def test_adapters_are_merged_in() -> None:
    model = P.decoder(0)
    for p in add_lora(model, rank=4, seed=1):
        torch.nn.init.normal_(p, std=0.2)
    merged = P.decoder(1)
    engine = EmbeddedEngine(merged)
    engine.update_weights(named_weights(model), 3)
    with EmbeddedProcessEngine(model) as other:
        other.update_weights(None, 3)
        assert other.generate(P.PROMPTS, P.SAMPLING, seeds=P.SEEDS) == engine.generate(P.PROMPTS, P.SAMPLING, seeds=P.SEEDS)


def stress(seconds: float, slots: int, few: int = 0) -> tuple[int, int]:
    """(refits, sequences), at least `few` of each: weights change as fast as they can while sequences are drawn; each is compared."""
    kinds = 6
    expected = [P.fresh(seed) for seed in range(kinds)]
    weights = [dict(P.decoder(seed).named_parameters()) for seed in range(kinds)]
    model = P.decoder(0)
    refits, sequences, errors = 0, 0, []
    ended = threading.Event()

    def writer() -> None:
        nonlocal refits
        try:
            while not ended.is_set():
                with torch.no_grad():
                    for name, p in model.named_parameters():
                        p.copy_(weights[(refits + 1) % kinds][name])
                engine.update_weights(None, refits + 1)
                refits += 1
        except Exception as error:
            errors.append(error)

    with EmbeddedProcessEngine(model, slots=slots) as engine:
        engine.update_weights(None, 0)
        thread = threading.Thread(target=writer)
        thread.start()
        end = time.monotonic() + seconds
        try:
            while (time.monotonic() < end or min(refits, sequences) < few) and not errors:
                out = engine.generate(P.PROMPTS, P.SAMPLING, seeds=P.SEEDS)
                versions = {c.weight_version for group in out for c in group}
                assert len(versions) == 1
                assert P.tokens(out) == expected[versions.pop() % kinds]
                sequences += sum(map(len, out))
        finally:
            ended.set()
            thread.join()
    assert not errors, errors
    return refits, sequences


@pytest.mark.parametrize("slots", [1, 2])
def test_nothing_torn_is_read(slots: int) -> None:
    refits, sequences = stress(1.5, slots, few=11)
    assert refits > 10 and sequences > 10


@pytest.mark.slow
def test_nothing_torn_is_read_in_a_minute(record_property: Callable[[str, str], None]) -> None:
    refits, sequences = stress(60, 2)
    record_property("figure", f"{refits} refits, {sequences} sequences, none torn")
    assert refits > 50 and sequences > 50  # how many depends on what else the machine does
