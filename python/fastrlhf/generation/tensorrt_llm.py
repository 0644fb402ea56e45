"""TensorRT-LLM's PyTorch backend as a generation engine, through its LLM API and a worker extension of ours.

Checked against the recorded contract only (`refit/contracts/tensorrt-llm.json`), which itself was read from sources and not
from a release; never run here. Install and launch: docs/refit.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence as Seq
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from ..models import Decoder
from ..refit.contract import require_version
from ..refit.session import Transfer
from ..refit.states import RefitError
from .engine import Sampling
from .foreign import BUCKET, Bucket, Calls, ForeignEngine, WholeTensors, device_key, one_worker, request_words, require_drain

SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "context_parallel_size")
EXTENSION = "fastrlhf.generation.tensorrt_llm_worker.Extension"


class TensorRTLLMEngine(ForeignEngine):
    """
    Args:
        llm: a `tensorrt_llm.LLM` made with orchestrator_type="ray" and ray_worker_extension_cls=EXTENSION.
        parameters: `tensorrt_llm.SamplingParams`.
    """

    weights_memory = "model"

    def __init__(
        self, llm: Any, parameters: Any, model: Decoder, *, mode: str = "drain", timeout: float = 600.0, limit: int = BUCKET,
    ) -> None:  # fmt: skip
        self.llm, self._parameters = llm, parameters
        target = TensorRTLLMTarget(llm, model, limit)
        super().__init__(model, target, mode=mode, timeout=timeout)
        one_worker({SIZES[0]: target.workers(timeout)}, SIZES)

    @classmethod
    def launch(
        cls, model: Decoder, tokenizer: Any, path: str, *, options: dict[str, Any], mode: str, timeout: float, any_version: bool
    ) -> TensorRTLLMEngine:
        """An `LLM` of the model at `path`, its weights to come; `options` go to its constructor."""
        require_drain(mode)
        one_worker(options, SIZES)
        require_version("tensorrt-llm", any_version=any_version)
        trt = importlib.import_module("tensorrt_llm")
        given = {"load_format": "dummy", **options}
        llm = trt.LLM(model=path, orchestrator_type="ray", ray_worker_extension_cls=EXTENSION, **given)
        return cls(llm, trt.SamplingParams, model, mode=mode, timeout=timeout)

    def sleep(self, tags: Seq[str] = ("kv_cache", "model")) -> None:
        """Gives memory back by TensorRT-LLM's tags. With "model" nothing is generated until a refit, whatever restore mode the
        engine was made with: that is not known here."""
        self.llm._collective_rpc("sleep", args=(list(tags),))
        self._asleep |= set(tags)
        if "model" in tags:
            self.session.spoil("TensorRT-LLM slept and dropped its weights")

    def wake(self, tags: Seq[str] = ("kv_cache", "model")) -> None:
        """ "model" for a refit, "kv_cache" when the trainer needs no more memory of its own."""
        self.llm._collective_rpc("wakeup", args=(list(tags),))
        self._woken(tags)

    def _draw(
        self, prompts: list[list[int]], sampling: Sampling, seeds: Seq[int] | None
    ) -> list[list[tuple[list[int], list[float], str]]]:
        common = request_words(sampling) | {
            "n": sampling.n, "max_tokens": sampling.max_tokens, "top_k": sampling.top_k or None,
            "stop": list(sampling.stop) or None,
            "stop_token_ids": list(sampling.stop_tokens), "ignore_eos": True, "logprobs": 0, "include_stop_str_in_output": True,
        }  # fmt: skip
        each = [self._parameters(**common, seed=None if seeds is None else seeds[i] & 0x7FFFFFFF) for i in range(len(prompts))]
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], each, use_tqdm=False)
        return [[_sample(o) for o in request.outputs] for request in outputs]


def _sample(output: Any) -> tuple[list[int], list[float], str]:
    tokens = list(output.token_ids)
    logprobs = [float(at[t].logprob if isinstance(at, dict) else at) for t, at in zip(tokens, output.logprobs, strict=True)]
    return tokens, logprobs, output.finish_reason


class TensorRTLLMTarget(WholeTensors):
    """pre-reload, one update for each bucket, one final None. The engine opens the trainer's own tensors and copies their
    slices: one copy, none of ours, where no adapters have to be merged."""

    def __init__(self, llm: Any, model: Decoder, limit: int) -> None:
        super().__init__(Calls("TensorRT-LLM", llm), model, limit)
        self._held: list[Tensor] = []  # what the engine has open must live until it is done

    def workers(self, timeout: float) -> int:
        self.calls.phase(timeout)
        return len(self._call("fastrlhf_ready"))

    def transfer(self, epoch: int) -> Transfer:
        # its pre-reload not in begin: where it fails, some layers have changed
        self.calls.phase(self.timeout)
        self._call("fastrlhf_begin", epoch)
        return self._send(self._bucket, 1)

    def _bucket(self, bucket: Bucket) -> None:
        key = device_key(next(self.model.parameters()).device, prefix=False)
        self._held += [t for _, t in bucket.tensors]
        self._call("fastrlhf_update", self.epoch, {key: [(n, reduce_tensor(t)) for n, t in bucket.tensors]})

    def commit(self, epoch: int, version: int) -> None:
        self.calls.phase(self.timeout)
        self._call("fastrlhf_commit", epoch)
        self._held = []

    def fail(self, epoch: int, reason: str) -> None:
        self.calls.phase(self.timeout)
        self._call("fastrlhf_fail", epoch)
        self._held = []

    def close(self) -> None:
        pass

    def _call(self, method: str, *args: Any) -> list[Any]:
        answers = self.calls("_collective_rpc", method, args=args)
        if wrong := [a for a in answers if a is not True]:
            raise RefitError(f"TensorRT-LLM: {method}: {wrong[0]}")
        return answers
