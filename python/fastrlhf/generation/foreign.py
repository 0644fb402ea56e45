"""What the adapters of installed engines share: whole tensors in buckets, a manifest of them, and requests in their words."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..models import Decoder
from ..models.checkpoint import named_weights
from ..refit.memory import ALIGN
from ..refit.session import Refit, Session, Target, Transfer
from ..refit.states import PeerLost, RefitError
from .engine import Completion, Finished, GenerationStats, Sampling

BUCKET = 512 << 20


@dataclass
class Bucket:
    tensors: list[tuple[str, Tensor]] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for _, t in self.tensors)


def module_of(name: str) -> str:
    """What engines should be given together: a layer, or a tensor outside of all layers."""
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: i + 1])
    return name


def buckets(weights: Iterable[tuple[str, Tensor]], limit: int, *, one_dtype: bool = False) -> Iterator[Bucket]:
    """Weights in buckets of at most `limit` bytes, layers not torn apart where they fit. A tensor larger than that is alone.

    Args:
        one_dtype: a bucket's tensors are all of one dtype, for engines that pack back to back.
    """
    held, group, module = Bucket(), Bucket(), ""

    def fits(b: Bucket, more: int) -> bool:
        return b.nbytes + more + ALIGN * (len(b.tensors) + 1) <= limit or not b.tensors

    def alike(b: Bucket, tensor: Tensor) -> bool:
        return not one_dtype or not b.tensors or b.tensors[0][1].dtype == tensor.dtype

    for name, tensor in weights:
        if module_of(name) != module:
            held, group, module = Bucket(held.tensors + group.tensors), Bucket(), module_of(name)
        if not fits(group, tensor.nbytes) or not alike(group, tensor):  # a torn module
            held, group = Bucket(held.tensors + group.tensors), Bucket()
        group.tensors.append((name, tensor))
        padding = ALIGN * len(group.tensors)
        if held.tensors and not (fits(held, group.nbytes + padding) and alike(held, tensor)):
            yield held
            held = Bucket()
    held.tensors += group.tensors
    if held.tensors:
        yield held


class Manifest:
    """Which tensors a refit has to bring, with shapes and dtypes: those of the first, since a model does not change.

    Raises:
        RefitError: from `seen` or `complete`: one that is not known, came twice, changed, or did not come.
    """

    def __init__(self) -> None:
        self.expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self._seen: set[str] = set()
        self._first = True

    def begin(self) -> None:
        self._seen = set()

    def seen(self, name: str, tensor: Tensor) -> None:
        kind = (tuple(tensor.shape), tensor.dtype)
        if name in self._seen:
            raise RefitError(f"{name}: came twice")
        if self._first:
            self.expected[name] = kind
        elif name not in self.expected:
            raise RefitError(f"{name}: was not among the {len(self.expected)} tensors of the first refit")
        elif self.expected[name] != kind:
            raise RefitError(f"{name}: was {self.expected[name]} and is {kind}")
        self._seen.add(name)

    def complete(self) -> None:
        if missing := sorted(self.expected.keys() - self._seen):
            raise RefitError(f"{missing[0]}: did not come ({len(missing)} in all)")
        if not self._seen:
            raise RefitError("weights: none came")
        self._first = False


class Staging:
    """A buffer on the trainer's device, which an engine maps once and has read when it answers. Tensors begin at multiples of
    512 bytes: every dtype's size and every engine's demand divides that."""

    def __init__(self, limit: int, device: torch.device) -> None:
        self.buffer = torch.empty(-(-limit // ALIGN) * ALIGN, dtype=torch.uint8, device=device)

    def pack(self, bucket: Bucket) -> list[int]:
        """Where each tensor begins in the buffer."""
        at, out = 0, []
        for name, t in bucket.tensors:
            if at + t.nbytes > len(self.buffer):
                raise RefitError(f"{name}: {t.nbytes} bytes do not fit the staging buffer of {len(self.buffer)}")
            self.buffer[at : at + t.nbytes].view(t.dtype).view(t.shape).copy_(t)
            out.append(at)
            at += -(-t.nbytes // ALIGN) * ALIGN
        if self.buffer.is_cuda:
            torch.cuda.current_stream(self.buffer.device).synchronize()  # the other process has no stream of ours to wait on
        return out


class Calls:
    """Calls into an engine by name, each on a thread, because none of them takes a timeout. One that does not answer in time
    cannot be stopped: until it returns nothing else is asked of the engine.

    Raises:
        PeerLost: from `start`, `wait` and a call: no answer by the end of the phase, or the call before has not returned.
    """

    def __init__(self, name: str, engine: Any) -> None:
        self.name, self.engine = name, engine
        self._call, self._answer = "", Future[Any]()
        self._answer.set_result(None)
        self.phase(0.0)

    def phase(self, seconds: float) -> None:
        """Whatever is asked from here on is to be answered within `seconds` of now, all together."""
        self._seconds, self._end = seconds, time.monotonic() + seconds

    def start(self, call: str, *args: Any, **kwargs: Any) -> None:
        if not self._answer.done():
            raise PeerLost(f"{self.name}: {self._call} has not returned yet")
        self._call, self._answer = call, Future()
        function, answer = getattr(self.engine, call), self._answer

        def run() -> None:
            try:
                answer.set_result(function(*args, **kwargs))
            except BaseException as error:
                answer.set_exception(error)

        threading.Thread(target=run, daemon=True).start()

    def wait(self) -> Future[Any]:
        """Of the call that was started last, answered or failed."""
        if not futures.wait([self._answer], max(0.0, self._end - time.monotonic())).done:
            raise PeerLost(f"{self.name}: {self._call}: no answer within {self._seconds:g} s")
        return self._answer

    def __call__(self, call: str, *args: Any, **kwargs: Any) -> Any:
        self.start(call, *args, **kwargs)
        return self.wait().result()


class ForeignEngine:
    """An `Engine` whose weights come as whole tensors by Hugging Face names. A refit waits for other threads' requests."""

    weights_memory = "weights"  # as the engine names what may be asleep

    def __init__(self, model: Decoder, target: Target, *, mode: str, timeout: float) -> None:
        require_drain(mode)
        self.model, self.stats = model, GenerationStats()
        self.session = Session(target, mode=mode, timeout=timeout)
        self._idle = threading.Lock()
        self._asleep: set[str] = set()

    @property
    def version(self) -> int:
        return self.session.version

    def update_weights(self, weights: Iterable[tuple[str, Tensor]] | None, version: int) -> Refit:
        if weights is not None:
            raise ValueError("weights: expected None, they are those of the model that the engine was made for")
        if self.weights_memory in self._asleep:
            raise RefitError(f"refit: {self.weights_memory} is asleep: wake it first; the rest may be woken after the refit")
        if not self._idle.acquire(timeout=self.session.timeout):
            raise RefitError(f"refit: requests are still running after {self.session.timeout:g} s; nothing was written")
        try:
            return self.session.refit(version)
        finally:
            self._idle.release()

    def generate(
        self, prompts: Seq[Seq[int]], sampling: Sampling, *, seeds: Seq[int] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:  # fmt: skip
        if seeds is not None and len(seeds) != len(prompts):
            raise ValueError(f"seeds: expected {len(prompts)}, one for each prompt, got {len(seeds)}")
        with self._idle:
            version = self.session.require_serving()
            if self._asleep:
                raise RefitError(f"engine: {', '.join(sorted(self._asleep))} asleep: wake it first")
            drawn = self._draw([list(p) for p in prompts], sampling, seeds)
        out = [
            [
                Completion(tokens, logprobs, reason, version, ((version, len(tokens)),) if tokens else ())
                for tokens, logprobs, reason in group
            ]
            for group in drawn
        ]
        self.stats = GenerationStats(
            prompt_tokens=sum(map(len, prompts)), completion_tokens=sum(len(c.tokens) for g in out for c in g)
        )
        if progress is not None:
            progress(sum(map(len, out)))
        return out

    def stream(self, prompts: Seq[Seq[int]], sampling: Sampling, *, seeds: Seq[int] | None = None) -> Iterator[Finished]:
        for p, group in enumerate(self.generate(prompts, sampling, seeds=seeds)):
            for s, completion in enumerate(group):
                yield Finished(p, s, completion)

    def close(self) -> None:
        self.session.target.close()

    def _woken(self, tags: Seq[str] | None) -> None:
        self._asleep = set() if tags is None else self._asleep - set(tags)

    def _draw(
        self, prompts: list[list[int]], sampling: Sampling, seeds: Seq[int] | None
    ) -> list[list[tuple[list[int], list[float], str]]]:
        """(tokens, log-probs, finish reason) of each sample of each prompt."""
        raise NotImplementedError


class WholeTensors:
    """The part of a `Target` that all of them have: the model's tensors, checked against the manifest, in buckets."""

    atomic = False  # all of them write what they serve

    def __init__(self, calls: Calls, model: Decoder, limit: int, *, one_dtype: bool = False) -> None:
        self.calls, self.model, self.limit, self.one_dtype = calls, model, limit, one_dtype
        self.manifest = Manifest()
        self.epoch, self.timeout = 0, 0.0

    def begin(self, epoch: int, version: int, mode: str, timeout: float) -> None:
        """No request is running: the engine has seen to that."""
        self.epoch, self.timeout = epoch, timeout
        self.calls.phase(timeout)

    def _buckets(self) -> Iterator[Bucket]:
        self.manifest.begin()
        for bucket in buckets(((n, t.detach()) for n, t in named_weights(self.model)), self.limit, one_dtype=self.one_dtype):
            for name, tensor in bucket.tensors:
                self.manifest.seen(name, tensor)
            yield bucket
        self.manifest.complete()

    def _send(self, send: Callable[[Bucket], None], copies: int) -> Transfer:
        total = 0
        for bucket in self._buckets():
            send(bucket)
            total += bucket.nbytes
        return Transfer(total, copies)


def device_key(device: torch.device, *, prefix: bool) -> str:
    """A GPU's UUID, with or without the `GPU-` that some libraries write; "cpu" for the CPU."""
    if device.type != "cuda":
        return device.type
    bare = str(torch.cuda.get_device_properties(device).uuid).removeprefix("GPU-")
    return "GPU-" + bare if prefix else bare


def require_drain(mode: str) -> None:
    """ValueError for another mode: `generate` returns when its requests have ended, so there are none to abort or to keep."""
    if mode != "drain":
        raise ValueError(f"mode: expected 'drain', this engine's requests have ended when generate returns; got {mode!r}")


def one_worker(options: Mapping[str, Any], sizes: Seq[str], why: str = "a worker on another GPU has no handle") -> None:
    """ValueError where an engine would have workers that the weights cannot reach."""
    for name in sizes:
        if (size := options.get(name, 1)) != 1:
            raise ValueError(f"{name}: expected 1, {why}; got {size}")


def request_words(sampling: Sampling) -> dict[str, Any]:
    """What engines name alike."""
    return {"temperature": sampling.temperature, "top_p": sampling.top_p, "min_p": sampling.min_p}
