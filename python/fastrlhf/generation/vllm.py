"""vLLM as a generation engine: its weight-transfer engine of ours, in its four phases.

Checked against the recorded contract only (`refit/contracts/vllm.json`); never run here. Install and launch: docs/refit.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence as Seq
from contextlib import suppress
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from ..models import Decoder
from ..refit.contract import require_version
from ..refit.session import Transfer
from ..refit.states import PeerLost, RefitError
from .engine import Sampling
from .foreign import (
    BUCKET,
    Bucket,
    Calls,
    ForeignEngine,
    Staging,
    WholeTensors,
    device_key,
    one_worker,
    request_words,
    require_drain,
)

NAME = "fastrlhf"  # of the weight-transfer engine that `vllm_worker` registers in vLLM's processes
SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


class VLLMEngine(ForeignEngine):
    """
    Args:
        llm: a `vllm.LLM` made with weight_transfer_config={"backend": "fastrlhf"} and logprobs_mode="processed_logprobs".
        parameters: `vllm.SamplingParams`.
    """

    def __init__(
        self, llm: Any, parameters: Any, model: Decoder, *, mode: str = "drain", timeout: float = 600.0, limit: int = BUCKET,
    ) -> None:  # fmt: skip
        parallel = llm.llm_engine.vllm_config.parallel_config
        one_worker({name: getattr(parallel, name) for name in SIZES}, SIZES)
        self.llm, self._parameters = llm, parameters
        super().__init__(model, VLLMTarget(llm, model, limit), mode=mode, timeout=timeout)

    @classmethod
    def launch(
        cls, model: Decoder, tokenizer: Any, path: str, *, options: dict[str, Any], mode: str, timeout: float, any_version: bool
    ) -> VLLMEngine:
        """An `LLM` of the model at `path`, its weights to come; `options` go to its constructor."""
        require_drain(mode)
        one_worker(options, SIZES)
        require_version("vllm", any_version=any_version)
        vllm = importlib.import_module("vllm")
        config = importlib.import_module("vllm.config.weight_transfer").WeightTransferConfig
        given = {"load_format": "dummy", "gpu_memory_utilization": 0.4, **options}
        llm = vllm.LLM(
            model=path, weight_transfer_config=config(backend=NAME), logprobs_mode="processed_logprobs", **given
        )  # fmt: skip
        return cls(llm, vllm.SamplingParams, model, mode=mode, timeout=timeout)

    def sleep(self, level: int = 1) -> None:
        """Gives the GPU's memory back. Level 2 drops the weights: nothing is generated until a refit."""
        self.llm.sleep(level=level)
        self._asleep = {"weights", "kv_cache"}
        if level >= 2:
            self.session.spoil("vLLM slept at level 2, which drops the weights")

    def wake(self, tags: Seq[str] | None = None) -> None:
        """Takes memory again, all or by tag: "weights" for a refit, "kv_cache" when the trainer has given up its own."""
        self.llm.wake_up(None if tags is None else list(tags))
        self._woken(tags)

    def _draw(
        self, prompts: list[list[int]], sampling: Sampling, seeds: Seq[int] | None
    ) -> list[list[tuple[list[int], list[float], str]]]:
        common = request_words(sampling) | {
            "n": sampling.n, "max_tokens": sampling.max_tokens, "top_k": sampling.top_k, "stop": list(sampling.stop) or None,
            "stop_token_ids": list(sampling.stop_tokens), "ignore_eos": True, "logprobs": 0, "include_stop_str_in_output": True,
            "detokenize": bool(sampling.stop),
        }  # fmt: skip
        each = [self._parameters(**common, seed=None if seeds is None else seeds[i]) for i in range(len(prompts))]
        outputs = self.llm.generate([{"prompt_token_ids": p} for p in prompts], each, use_tqdm=False)
        return [[_sample(o) for o in request.outputs] for request in outputs]


def _sample(output: Any) -> tuple[list[int], list[float], str]:
    tokens = list(output.token_ids)
    logprobs = [float(at[token].logprob) for token, at in zip(tokens, output.logprobs, strict=True)]
    return tokens, logprobs, output.finish_reason


def exported(buffer: Tensor) -> list[Any]:
    """A buffer of bytes as vLLM's messages can carry it: of torch's handle all but classes, dtype and device."""
    _, (_, size, stride, offset, _, _, _, *rest) = reduce_tensor(buffer)
    return [list(size), list(stride), offset, *rest]


class VLLMTarget(WholeTensors):
    """start, one update for each bucket, finish, and the prefix cache reset.

    Three copies: into a staging buffer that the worker mapped at the first refit, out of it, and by vLLM's loader.
    """

    def __init__(self, llm: Any, model: Decoder, limit: int) -> None:
        super().__init__(Calls("vLLM", llm), model, limit)
        self._staging: Staging | None = None
        self._open = False

    def begin(self, epoch: int, version: int, mode: str, timeout: float) -> None:
        super().begin(epoch, version, mode, timeout)
        if self._staging is None:
            weight = next(self.model.parameters())
            largest = max(p.numel() * p.element_size() for p in self.model.parameters())
            staging = Staging(max(self.limit, largest), weight.device)
            handles = {device_key(weight.device, prefix=False): exported(staging.buffer)}
            info = {"handles": handles, "nbytes": staging.buffer.nbytes}
            self.calls("init_weight_transfer_engine", {"init_info": info})
            self._staging = staging

    def transfer(self, epoch: int) -> Transfer:
        # not in begin: it makes the layers ready to be loaded, and where that fails some of them are
        self.calls.phase(self.timeout)
        if self._open:  # a call that did not answer in time may have ended the session since
            with suppress(Exception):
                self._end()
        self._open = True
        self.calls("start_weight_update")
        return self._send(self._bucket, 3)

    def _bucket(self, bucket: Bucket) -> None:
        assert self._staging is not None
        info = {
            "epoch": self.epoch, "names": [n for n, _ in bucket.tensors],
            "dtype_names": [str(t.dtype).removeprefix("torch.") for _, t in bucket.tensors],
            "shapes": [list(t.shape) for _, t in bucket.tensors], "offsets": self._staging.pack(bucket),
        }  # fmt: skip
        try:
            self.calls("update_weights", {"update_info": info})  # returns when the worker has taken it
        except PeerLost:
            raise
        except Exception:
            self._open = False  # vLLM has ended the session
            raise

    def commit(self, epoch: int, version: int) -> None:
        self.calls.phase(self.timeout)
        self._end(weight_version=str(version))
        if self.calls("reset_prefix_cache") is False:
            raise RefitError("vLLM: the prefix cache was not reset: requests are running; it holds keys of the old weights")

    def fail(self, epoch: int, reason: str) -> None:
        """Ends the session, which has no call of its own for that; what the engine holds is a mixture and never served."""
        self.calls.phase(self.timeout)
        if self._open:
            self._end()

    def close(self) -> None:
        if self._staging is not None:
            self.calls.phase(self.timeout)
            self.calls("shutdown_weight_transfer_engine")

    def _end(self, **version: str) -> None:
        self.calls("finish_weight_update", **version)
        self._open = False
