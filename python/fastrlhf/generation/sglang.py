"""SGLang as a generation engine: begin_weight_update, flattened buckets, end_weight_update.

Checked against the recorded contract only (`refit/contracts/sglang.json`); never run here. Install and launch: docs/refit.md.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import Any

from torch import Tensor

from ..models import Decoder
from ..refit.contract import require_version
from ..refit.session import Transfer
from ..refit.states import RefitError
from ..refit.transports.checkpoint_engine import CheckpointEngineSender
from ..seeds import mix
from .engine import Sampling
from .foreign import BUCKET, Bucket, ForeignEngine, WholeTensors, device_key, one_worker, request_words

WIRES = ("bucket", "checkpoint-engine")
Serialise = Callable[[list[tuple[str, Tensor]]], bytes]


class SGLangEngine(ForeignEngine):
    """
    Args:
        engine: a `sglang.Engine`.
        serialise: tensors -> the bytes of a flattened bucket, as `serialiser` makes it of SGLang's own classes.
        tp: its tensor-parallel ranks: each gets a payload of its own.
        wire: "bucket", or "checkpoint-engine", which needs pyzmq and tp = 1.
    """

    def __init__(
        self, engine: Any, serialise: Serialise, model: Decoder, *, tp: int = 1, mode: str = "drain", timeout: float = 600.0,
        limit: int = BUCKET, wire: str = "bucket",
    ) -> None:  # fmt: skip
        self.engine = engine
        if wire not in WIRES or (wire != "bucket" and tp != 1):
            raise ValueError(f"wire: expected one of {WIRES}, the second for tp = 1, got {wire!r} with tp = {tp}")
        if wire == "bucket":
            target: SGLangTarget | SGLangWireTarget = SGLangTarget(engine, serialise, model, tp, limit)
        else:
            target = SGLangWireTarget(engine, model, limit, timeout)
        super().__init__(model, target, mode=mode, timeout=timeout)

    @classmethod
    def launch(
        cls, model: Decoder, tokenizer: Any, path: str, *, options: dict[str, Any], mode: str, timeout: float, any_version: bool
    ) -> SGLangEngine:
        """An `Engine` of the model at `path`, its weights to come; `options` go to its constructor."""
        one_worker(options, ("dp_size", "pp_size"), "of each tensor-parallel rank one worker is sent a handle")
        require_version("sglang", any_version=any_version)
        sglang = importlib.import_module("sglang")
        given = {"load_format": "dummy", "mem_fraction_static": 0.4, **options}
        wire = str(given.pop("wire", "bucket"))
        engine = sglang.Engine(model_path=path, **given)
        return cls(engine, serialiser(), model, tp=int(given.get("tp_size", 1)), mode=mode, timeout=timeout, wire=wire)

    def sleep(self) -> None:
        """Gives the GPU's memory back, the weights too: nothing is generated until a refit."""
        self.engine.release_memory_occupation()
        self.session.spoil("SGLang released its weights")

    def wake(self) -> None:
        self.engine.resume_memory_occupation()

    def _draw(
        self, prompts: list[list[int]], sampling: Sampling, seeds: Seq[int] | None
    ) -> list[list[tuple[list[int], list[float], str]]]:
        asked = [p for p in prompts for _ in range(sampling.n)]
        common = request_words(sampling) | {
            "max_new_tokens": sampling.max_tokens, "top_k": sampling.top_k or -1, "stop": list(sampling.stop) or None,
            "stop_token_ids": list(sampling.stop_tokens), "ignore_eos": True, "no_stop_trim": True,
        }  # fmt: skip
        each = []
        for i in range(len(asked)):
            prompt, sample = divmod(i, sampling.n)
            seed = {} if seeds is None else {"sampling_seed": mix(seeds[prompt], sample) & 0x7FFFFFFF}
            each.append(common | seed)
        outputs = self.engine.generate(input_ids=asked, sampling_params=each, return_logprob=True)
        flat = [_sample(o) for o in outputs]
        return [flat[i : i + sampling.n] for i in range(0, len(flat), sampling.n)]


def _sample(output: dict[str, Any]) -> tuple[list[int], list[float], str]:
    meta = output["meta_info"]
    logprobs = [float(entry[0]) for entry in meta["output_token_logprobs"]]
    tokens = [int(entry[1]) for entry in meta["output_token_logprobs"]]
    return tokens, logprobs, meta["finish_reason"]["type"]


def serialiser() -> Serialise:
    """Of SGLang's own bucket and pickler, with its patch that names GPUs by UUID."""
    bucket = importlib.import_module("sglang.srt.weight_sync.tensor_bucket").FlattenedTensorBucket
    pickler = importlib.import_module("sglang.srt.utils").MultiprocessingSerializer
    importlib.import_module("sglang.srt.utils.patch_torch").monkey_patch_torch_reductions()

    def serialise(tensors: list[tuple[str, Tensor]]) -> bytes:
        made = bucket(named_tensors=tensors)
        return pickler.serialize({"flattened_tensor": made.get_flattened_tensor(), "metadata": made.get_metadata()})

    return serialise


class SGLangTarget(WholeTensors):
    """Two copies: into a flattened bucket, and by SGLang into its parameters. A bucket's tensors are of one dtype, because
    SGLang packs them back to back."""

    def __init__(self, engine: Any, serialise: Serialise, model: Decoder, tp: int, limit: int) -> None:
        super().__init__(model, limit, one_dtype=True)
        self.engine, self.serialise, self.tp = engine, serialise, tp
        self._open = False

    def begin(self, epoch: int, version: int, mode: str, timeout: float) -> None:
        """Engine.generate returns when its requests have ended: whatever the mode, none is running."""

    def transfer(self, epoch: int) -> Transfer:
        # begin_weight_update here: where one worker fails at it, the others have begun
        self._open = True
        _taken("begin_weight_update", self.engine.begin_weight_update(selector="target"))
        return self._send(self._bucket, 2)

    def _bucket(self, bucket: Bucket) -> None:
        # a payload for each rank: a handle that is opened twice hangs in its destructor
        payloads = [self.serialise(bucket.tensors) for _ in range(self.tp)]
        answer = self.engine.update_weights_from_tensor(payloads, load_format="flattened_bucket", flush_cache=False)
        _taken("update_weights_from_tensor", answer)

    def commit(self, epoch: int, version: int) -> None:
        self._open = False
        _taken("end_weight_update", self.engine.end_weight_update())
        _taken("flush_cache", self.engine.flush_cache())

    def fail(self, epoch: int, reason: str) -> None:
        if self._open:
            self._open = False
            self.engine.end_weight_update()

    def close(self) -> None:
        pass


class SGLangWireTarget(WholeTensors):
    """checkpoint-engine's wire: SGLang's call runs on a thread and receives until it is told to finish. Two copies."""

    def __init__(self, engine: Any, model: Decoder, limit: int, timeout: float) -> None:
        super().__init__(model, limit)
        self.engine, self.timeout = engine, timeout
        self._sender: CheckpointEngineSender | None = None
        self._thread: threading.Thread | None = None
        self._answer: list[Any] = []  # of the attempt under way

    def begin(self, epoch: int, version: int, mode: str, timeout: float) -> None:
        device = next(self.model.parameters()).device
        largest = max(p.nbytes for p in self.model.parameters())
        key = device_key(device, prefix=True)
        address = f"ipc://@checkpoint-engine-{key}-{os.getpid()}-{epoch}.sock"
        self._sender = CheckpointEngineSender(address, max(self.limit, largest), device, timeout=timeout)

        self._answer = answer = []

        def receive() -> None:
            try:
                answer.append(self.engine.update_weights_from_ipc({key: address}, flush_cache=False))
            except Exception as error:
                answer.append((False, str(error)))

        self._thread = threading.Thread(target=receive, daemon=True)
        self._thread.start()

    def transfer(self, epoch: int) -> Transfer:
        assert self._sender is not None
        sender = self._sender
        return self._send(lambda bucket: sender.send(bucket.tensors), 2)

    def commit(self, epoch: int, version: int) -> None:
        assert self._sender is not None
        self._sender.finish()
        self._sender = None
        self._joined()
        _taken("update_weights_from_ipc", self._answer[0])
        _taken("flush_cache", self.engine.flush_cache())

    def fail(self, epoch: int, reason: str) -> None:
        if self._sender is not None:
            sender, self._sender = self._sender, None
            sender.abort(reason)
            self._joined()

    def close(self) -> None:
        pass

    def _joined(self) -> None:
        assert self._thread is not None
        self._thread.join(self.timeout)
        if self._thread.is_alive():
            raise RefitError(f"SGLang: update_weights_from_ipc: no answer within {self.timeout:g} s")


def _taken(call: str, answer: Any) -> None:
    """SGLang says false where others raise."""
    success, message = (answer.success, answer.message) if hasattr(answer, "success") else answer
    if not success:
        raise RefitError(f"SGLang: {call}: {message}")
