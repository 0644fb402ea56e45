"""SGLang as a generation engine: begin_weight_update, flattened buckets, end_weight_update.

Checked against the recorded contract only (`refit/contracts/sglang.json`); never run here. Install and launch: docs/refit.md.
"""

from __future__ import annotations

import importlib
import os
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
from .foreign import BUCKET, Bucket, Calls, ForeignEngine, WholeTensors, device_key, one_worker, request_words, require_drain

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
            target = SGLangWireTarget(engine, model, limit)
        super().__init__(model, target, mode=mode, timeout=timeout)

    @classmethod
    def launch(
        cls, model: Decoder, tokenizer: Any, path: str, *, options: dict[str, Any], mode: str, timeout: float, any_version: bool
    ) -> SGLangEngine:
        """An `Engine` of the model at `path`, its weights to come; `options` go to its constructor."""
        require_drain(mode)
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
        self._asleep = {"weights", "kv_cache", "cuda_graph"}
        self.session.spoil("SGLang released its weights")

    def wake(self, tags: Seq[str] | None = None) -> None:
        """Takes memory again, all or by tag: "weights" for a refit, the others when the trainer has given up its own."""
        self.engine.resume_memory_occupation(None if tags is None else list(tags))
        self._woken(tags)

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
        super().__init__(Calls("SGLang", engine), model, limit, one_dtype=True)
        self.serialise, self.tp = serialise, tp
        self._open = False

    def transfer(self, epoch: int) -> Transfer:
        # begin_weight_update here: where one worker fails at it, the others have begun
        self.calls.phase(self.timeout)
        if self._open:  # left by a call that did not answer in time; false where SGLang has ended it since
            self.calls("end_weight_update")
        self._open = True
        self._taken("begin_weight_update", selector="target")
        return self._send(self._bucket, 2)

    def _bucket(self, bucket: Bucket) -> None:
        # a payload for each rank: a handle that is opened twice hangs in its destructor
        payloads = [self.serialise(bucket.tensors) for _ in range(self.tp)]
        self._taken("update_weights_from_tensor", payloads, load_format="flattened_bucket", flush_cache=False)

    def commit(self, epoch: int, version: int) -> None:
        self.calls.phase(self.timeout)
        self._taken("end_weight_update")
        self._open = False
        self._taken("flush_cache")

    def fail(self, epoch: int, reason: str) -> None:
        self.calls.phase(self.timeout)
        if self._open:
            self.calls("end_weight_update")
            self._open = False

    def close(self) -> None:
        pass

    def _taken(self, call: str, *args: Any, **kwargs: Any) -> None:
        taken(call, self.calls(call, *args, **kwargs))


class SGLangWireTarget(WholeTensors):
    """checkpoint-engine's wire: SGLang's call receives on its thread until it is told to finish. Two copies."""

    def __init__(self, engine: Any, model: Decoder, limit: int) -> None:
        super().__init__(Calls("SGLang", engine), model, limit)
        self._sender: CheckpointEngineSender | None = None

    def begin(self, epoch: int, version: int, mode: str, timeout: float) -> None:
        super().begin(epoch, version, mode, timeout)
        device = next(self.model.parameters()).device
        largest = max(p.nbytes for p in self.model.parameters())
        key = device_key(device, prefix=True)
        address = f"ipc://@checkpoint-engine-{key}-{os.getpid()}-{epoch}.sock"
        self._sender = CheckpointEngineSender(address, max(self.limit, largest), device, timeout=timeout)
        self.calls.start("update_weights_from_ipc", {key: address}, flush_cache=False)

    def transfer(self, epoch: int) -> Transfer:
        assert self._sender is not None
        sender = self._sender
        return self._send(lambda bucket: sender.send(bucket.tensors), 2)

    def commit(self, epoch: int, version: int) -> None:
        assert self._sender is not None
        self.calls.phase(self.timeout)
        self._sender.finish()
        self._sender = None
        taken("update_weights_from_ipc", self.calls.wait().result())
        taken("flush_cache", self.calls("flush_cache"))

    def fail(self, epoch: int, reason: str) -> None:
        self.calls.phase(self.timeout)
        if self._sender is not None:
            sender, self._sender = self._sender, None
            sender.abort(reason)
            self.calls.wait()

    def close(self) -> None:
        pass


def taken(call: str, answer: Any) -> None:
    """SGLang says false where others raise."""
    success, message = (answer.success, answer.message) if hasattr(answer, "success") else answer
    if not success:
        raise RefitError(f"SGLang: {call}: {message}")
