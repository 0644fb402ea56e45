"""Per-token log-probabilities, entropy and log-sum-exp from logits, in one read."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.logprobs import reference
from . import checks, value_checks
from .backend import (
    DTYPES,
    address,
    choose,
    disjoint_rows,
    empty,
    lane,
    matrix,
    native,
    result_dtype,
    triton_kernels,
    with_rows,
)
from .distributed import all_gather, size_and_rank
from .library import Op, on_its_device, present

INTEGERS = (torch.int32, torch.int64)
Kept = Tensor | tuple[Tensor, Tensor]


class Logprobs(NamedTuple):
    """Results of `logprobs`; None where not asked for."""

    logprobs: Tensor
    entropy: Tensor | None
    lse: Tensor | None


class VocabParallel(NamedTuple):
    """This rank's contiguous columns [vocab_start, vocab_end) of a vocabulary of vocab_size, cut over `group`."""

    group: Any
    vocab_start: int
    vocab_end: int
    vocab_size: int


def logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    lse: bool = False,
    kept: Kept | None = None,
    vocab_parallel: Any = None,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Logprobs:
    """Log-probabilities of labels under softmax(softcap(logits) / temperature), in one pass over the logits.

    With x = softcap·tanh(logits/softcap) if there is a soft cap, m = max x, s = Σ e^((x-m)/T)::

        logprobs = (x_y - m)/T - log s        entropy = log s - Σ ((x-m)/T) e^((x-m)/T) / s        lse = m/T + log s

    Statistics are float32 whatever the logits' dtype, differences are taken before scaling, and x = -inf contributes
    nothing: a common offset of the logits costs no precision. Deterministic, and a row's result does not depend on the
    rows beside it.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64, last stride 1; rows may lie anywhere, so that
            ``logits[:, :-1]`` is read in place.
        labels: (...), or (..., K) for K labels a row in the same read; int32 or int64.
        temperature: in [1e-20, 1e20]; a number, or (...) one for each row. No gradient flows to it.
        softcap: > 0, or None.
        ignore_index: rows with this label give logprob 0, entropy 0, gradient 0, and are not read.
        entropy, lse: whether to return them too; both are differentiable.
        kept: the sampling mask, as bool (..., V) or CSR ``(indptr (N+1), indices)``, int64: the softmax runs over the
            kept columns and the labels.
        vocab_parallel: the logits are this rank's shard of the vocabulary; a process group (equal shards in rank
            order) or a `VocabParallel`. Labels and CSR indices are global, a bool kept mask is the shard's. One
            all-gather of 16 bytes a row forward, nothing backward; all ranks get the same bits.
        inplace_backward: the gradient overwrites the logits, which are destroyed. Ignored under torch.compile.
        backend: "cuda", "triton", "cpu" or "reference"; None chooses.

    Returns:
        `Logprobs`: logprobs of labels' shape, entropy and lse (...), float32 (float64 for float64 logits). A label
        whose logit is -inf gives -inf; a row of only -inf, +inf or NaN in a row give NaN.

    Raises:
        TypeError, ValueError: an argument's type, dtype, shape or device. IndexError: a label outside [0, V) that is
        not ignore_index, with its position (on a GPU with FASTRLHF_CHECK=1; without, such a label gives -inf).

    Source: online softmax, Milakov & Gimelshein 2018; the definition is ``fastrlhf.kernels.logprobs.reference``.
    """
    shape = checks.logits("logits", logits)
    lead, vocab = shape[:-1], shape[-1]
    temperature, temperatures, parallel = softmax_options(
        "logits", logits, lead, vocab, labels, temperature, softcap, kept, vocab_parallel
    )
    backend = choose("logprobs", logits, backend)
    if backend == "reference":
        return of_logits(logits, labels, temperatures, temperature, softcap, ignore_index, entropy, lse, kept, parallel)
    mask, indptr, indices = kept_parts(kept)
    start, total = (parallel.vocab_start, parallel.vocab_size) if parallel else (0, vocab)
    if inplace_backward and not disjoint_rows(logits):
        raise ValueError(f"inplace_backward: rows of logits share memory (strides {logits.stride()})")
    if value_checks.wanted(backend):
        value_checks.labels(labels, total, ignore_index)
        value_checks.temperatures(temperatures)
        value_checks.kept(indptr, indices, total)
    shared = (
        logits, labels if labels.is_contiguous() else labels.contiguous(), temperatures,
        mask, indptr, indices, float(temperature), softcap or 0.0,
        ignore_index, start, total,
    )  # fmt: skip
    if parallel:
        out = _VocabParallelLogprobs.apply(parallel.group, entropy, lse, inplace_backward, backend, *shared)
    else:
        save = torch.is_grad_enabled() and logits.requires_grad
        out = _logprobs(*shared, entropy, lse, save, inplace_backward, backend)
    if logits.numel() == 0:  # no rows: an absent result and an empty one look alike
        nothing = logits.sum(-1, dtype=result_dtype(logits))
        return Logprobs(out[0].reshape(labels.shape), nothing if entropy else None, nothing if lse else None)
    return Logprobs(out[0], out[1] if entropy else None, out[2] if lse else None)


def softmax_options(
    name: str, t: Tensor, lead: torch.Size, vocab: int, labels: Tensor, temperature: float | Tensor, softcap: float | None,
    kept: Kept | None, vocab_parallel: Any,
) -> tuple[float, Tensor | None, VocabParallel | None]:  # fmt: skip
    """Checks what a softmax over (*lead, vocab) logits takes, `t` being what they come from; returns the temperature as a
    number and a tensor, one of which counts, and this rank's columns."""
    checks.tensor("labels", labels, INTEGERS)
    if labels.shape != lead and not (labels.dim() == len(lead) + 1 and labels.shape[:-1] == lead and labels.shape[-1] > 0):
        raise ValueError(
            f"labels: expected shape {tuple(lead)} or {tuple(lead)} + (K,) for {name} {checks.shape_of(t)}, "
            f"got {checks.shape_of(labels)}"
        )
    if not (labels.is_cpu and t.is_cpu):
        checks.same_device("labels", labels, name, t)
    temperatures = None
    if isinstance(temperature, Tensor):
        checks.tensor("temperature", temperature)
        if temperature.shape != lead:
            raise ValueError(f"temperature: expected shape {tuple(lead)}, one for each row, got {checks.shape_of(temperature)}")
        checks.same_device("temperature", temperature, name, t)
        temperatures, temperature = temperature.detach().double().reshape(-1).contiguous(), 1.0
    elif temperature != 1.0:
        checks.temperature(temperature)
    if softcap is not None:
        checks.positive_or_none("softcap", softcap)
    if kept is not None:
        _check_kept(kept, name, t, lead, vocab)
    return temperature, temperatures, None if vocab_parallel is None else vocab_parallel_columns(vocab_parallel, vocab)


def kept_parts(kept: Kept | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """A kept set as mask, indptr, indices."""
    if kept is None:
        return None, None, None
    if isinstance(kept, Tensor):
        return kept.contiguous(), None, None
    return None, kept[0].long().contiguous(), kept[1].long().contiguous()


def _check_kept(kept: Any, name: str, t: Tensor, lead: torch.Size, vocab: int) -> None:
    if isinstance(kept, Tensor):
        checks.tensor("kept", kept, (torch.bool,))
        if kept.shape != (*lead, vocab):
            raise ValueError(f"kept: expected shape {(*lead, vocab)}, got {checks.shape_of(kept)}")
        checks.same_device("kept", kept, name, t)
        return
    if not (isinstance(kept, tuple) and len(kept) == 2):
        raise TypeError(f"kept: expected a bool tensor or (indptr, indices), got {type(kept).__name__}")
    for part, x in zip(("kept indptr", "kept indices"), kept, strict=True):
        checks.tensor(part, x, INTEGERS)
        checks.same_device(part, x, name, t)
        if x.dim() != 1:
            raise ValueError(f"{part}: expected one dimension, got {checks.shape_of(x)}")
    rows = math.prod(lead)
    if kept[0].shape[0] != rows + 1:
        raise ValueError(f"kept indptr: expected {rows + 1} entries for {rows} rows, got {kept[0].shape[0]}")


def vocab_parallel_columns(given: Any, columns: int) -> VocabParallel:
    """Which columns of the vocabulary a tensor with so many holds: as given, or an equal share of the group's."""
    if isinstance(given, VocabParallel):
        if given.vocab_end - given.vocab_start != columns or not 0 <= given.vocab_start <= given.vocab_end <= given.vocab_size:
            raise ValueError(f"vocab_parallel: {given[1:]} does not fit {columns} columns")
        return given
    world, rank = size_and_rank(given)
    return VocabParallel(given, rank * columns, (rank + 1) * columns, world * columns)


class Call(NamedTuple):
    """The inputs of every kernel here, checked."""

    logits: Tensor
    labels: Tensor
    temperatures: Tensor | None
    kept_mask: Tensor | None
    kept_indptr: Tensor | None
    kept_indices: Tensor | None
    temperature: float
    softcap: float
    ignore_index: int
    vocab_start: int
    vocab_total: int

    @property
    def rows(self) -> int:
        return math.prod(self.logits.shape[:-1])

    def native(self) -> tuple[Any, ...]:
        """As the extensions take them."""
        vocab = self.logits.shape[-1]
        rows = self.rows
        labels = (
            self.labels.data_ptr(), DTYPES[self.labels.dtype], self.labels.numel() // rows if rows else 1, self.vocab_start,
            self.vocab_total, self.ignore_index,
        )  # fmt: skip
        kept = (0, 0, 0, 0, self.vocab_total)
        if self.kept_mask is not None or self.kept_indptr is not None:
            count = 0 if self.kept_indices is None else self.kept_indices.shape[0]
            kept = (address(self.kept_mask), address(self.kept_indptr), address(self.kept_indices), count, self.vocab_total)
        scaling = (self.temperature, address(self.temperatures), self.softcap)
        return matrix(with_rows(self.logits)), rows, vocab, labels, scaling, kept

    def triton(self) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
        """As the Triton kernels take them."""
        options = {name: getattr(self, name) for name in ("temperature", "softcap", "ignore_index", "vocab_start")}
        return (with_rows(self.logits), *self[1:6]), options


def native_arguments(logits: Tensor, labels: Tensor, temperature: float, ignore_index: int) -> tuple[Any, ...]:
    """Of plain logits and one label a row, as the extensions take them."""
    vocab = logits.shape[-1]
    return Call(logits, labels, None, None, None, None, float(temperature), 0.0, ignore_index, 0, vocab).native()


def _forward(
    logits: Tensor, labels: Tensor, temperatures: Tensor | None, kept_mask: Tensor | None, kept_indptr: Tensor | None,
    kept_indices: Tensor | None, temperature: float, softcap: float, ignore_index: int, vocab_start: int,
    vocab_total: int, entropy: bool, lse: bool, save: bool, inplace_backward: bool, backend: str,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    call = Call(
        logits, labels, temperatures, kept_mask, kept_indptr, kept_indices, temperature, softcap, ignore_index, vocab_start,
        vocab_total,
    )  # fmt: skip
    dtype = result_dtype(logits)
    out = empty(labels.shape, dtype, logits)
    like = out if out.dim() < logits.dim() else empty(logits.shape[:-1], dtype, logits)
    H = torch.empty_like(like) if entropy else None
    z = torch.empty_like(like) if lse else None
    m, log_sum = (torch.empty_like(like), torch.empty_like(like)) if save else (None, None)
    if backend == "triton":
        inputs, options = call.triton()
        triton_kernels("logprobs").forward(
            *inputs, **options, logprobs=out, entropy=H, lse=z, max=m, log_sum=log_sum, partials=None
        )
    else:
        results = (out.data_ptr(), address(H), address(z), address(m), address(log_sum))
        native(backend).logprobs_forward(*call.native(), results, 0, lane(backend, logits))
    return out, H, z, m, log_sum


def _fake_forward(logits: Tensor, labels: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    entropy, lse, save = rest[-5:-2]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32

    def row(wanted: bool) -> Tensor | None:
        return logits.new_empty(logits.shape[:-1], dtype=dtype) if wanted else None

    return logits.new_empty(labels.shape, dtype=dtype), row(entropy), row(lse), row(save), row(save)


def _backward_implementation(
    logits: Tensor, labels: Tensor, temperatures: Tensor | None, kept_mask: Tensor | None, kept_indptr: Tensor | None,
    kept_indices: Tensor | None, temperature: float, softcap: float, ignore_index: int, vocab_start: int,
    vocab_total: int, max_: Tensor, log_sum: Tensor, entropy: Tensor | None, grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None, grad_lse: Tensor | None, backend: str, inplace: bool = False,
) -> Tensor:  # fmt: skip
    call = Call(
        logits, labels, temperatures, kept_mask, kept_indptr, kept_indices, temperature, softcap, ignore_index, vocab_start,
        vocab_total,
    )  # fmt: skip
    x = with_rows(logits)
    # a block of the GPU clears a row before it writes the columns of a CSR set
    direct = inplace and (backend == "cpu" or kept_indptr is None)
    grad = x if direct else empty(x.shape, x.dtype, x)
    grads = [None if g is None else g.contiguous() for g in (grad_logprobs, grad_entropy, grad_lse)]
    if backend == "triton":
        inputs, options = call.triton()
        triton_kernels("logprobs").backward(
            *inputs, **options, max=max_, log_sum=log_sum, entropy=entropy, grad_logprobs=grads[0], grad_entropy=grads[1],
            grad_lse=grads[2], grad=grad,
        )  # fmt: skip
    else:
        native(backend).logprobs_backward(
            *call.native(), (0, address(entropy), 0, max_.data_ptr(), log_sum.data_ptr()),
            address(grads[0]), address(grads[1]), address(grads[2]), matrix(grad), lane(backend, logits),
        )  # fmt: skip
    if inplace:
        if not direct:
            x.copy_(grad)
            grad = x
        torch.autograd.graph.increment_version(logits)
    return grad.detach().view(logits.shape)


_INPUTS = (
    "Tensor logits, Tensor labels, Tensor? temperatures, Tensor? kept_mask, Tensor? kept_indptr, Tensor? kept_indices, "
    "float temperature, float softcap, int ignore_index, int vocab_start, int vocab_total"
)
_logprobs_backward = Op(
    "logprobs_backward",
    f"({_INPUTS}, Tensor max, Tensor log_sum, Tensor? entropy, Tensor? grad_logprobs, Tensor? grad_entropy, "
    "Tensor? grad_lse, str backend) -> Tensor",
    _backward_implementation,
    lambda logits, *rest: torch.empty(logits.shape, dtype=logits.dtype, device=logits.device),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    tensors, ctx.options = inputs[:6], inputs[6:11]
    ctx.inplace, ctx.backend = inputs[-2:]
    _, H, _, m, log_sum = output
    ctx.save_for_backward(*tensors, present(m), present(log_sum), present(H))


def _backward(ctx: Any, g_logprobs: Tensor | None, g_entropy: Tensor | None, g_lse: Tensor | None, *_: Any) -> tuple[Any, ...]:
    *tensors, m, log_sum, H = ctx.saved_tensors
    if m is None:  # no rows
        return torch.zeros_like(tensors[0]), *[None] * 15
    g_entropy, g_lse = (None if g is None or g.shape != m.shape else g for g in (g_entropy, g_lse))
    if H is None:
        g_entropy = None
    arguments: tuple[Any, ...] = (*tensors, *ctx.options, m, log_sum, H, g_logprobs, g_entropy, g_lse, ctx.backend)
    if ctx.inplace and not torch.compiler.is_compiling() and type(tensors[0]) is Tensor:
        arguments = (*arguments, True)
        grad = _backward_implementation(*arguments)
    else:
        grad = _logprobs_backward(*arguments)
    return grad, *[None] * 15


_logprobs = Op(
    "logprobs",
    f"({_INPUTS}, bool entropy, bool lse, bool save, bool inplace_backward, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _setup,
    _backward,
)


def fold(call: Call, partials: Tensor, backend: str) -> None:
    """partials (rows, 3 + labels): the max, sum, weighted sum and label logits of the columns that are here."""
    if backend == "triton":
        inputs, options = call.triton()
        nothing = dict.fromkeys(("logprobs", "entropy", "lse", "max", "log_sum"))
        triton_kernels("logprobs").forward(*inputs, **options, **nothing, partials=partials)
    else:
        native(backend).logprobs_forward(*call.native(), (0, 0, 0, 0, 0), partials.data_ptr(), lane(backend, call.logits))


def combine(call: Call, parts: Tensor, results: tuple[Tensor | None, ...], backend: str) -> None:
    """results (logprobs, entropy, lse, max, log_sum) of (parts, rows, 3 + labels) statistics, merged in their order."""
    if backend == "triton":
        names = ("logprobs", "entropy", "lse", "max", "log_sum")
        triton_kernels("logprobs").combine(
            call.labels, call.temperatures, parts, temperature=call.temperature, ignore_index=call.ignore_index,
            **dict(zip(names, results, strict=True)),
        )  # fmt: skip
    else:
        native(backend).logprobs_combine(
            *call.native()[:5], tuple(address(t) for t in results), parts.data_ptr(), parts.shape[0], lane(backend, call.logits)
        )


def differentiate(
    call: Call, results: tuple[Tensor | None, ...], grads: tuple[Tensor | None, ...], rows: slice, backend: str
) -> None:
    """call.logits (rows, V) become their gradient; results, and the grads of logprobs, entropy and lse, are of all rows."""

    def part(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.reshape(-1, t.numel() // total)[rows]

    total = math.prod(results[3].shape) if results[3] is not None else 0
    _, H, _, m, log_sum = results
    assert m is not None and log_sum is not None
    inputs: tuple[Any, ...] = (*call, part(m), part(log_sum), part(H), *(part(g) for g in grads), backend, True)
    _backward_implementation(*inputs)


class _VocabParallelLogprobs(torch.autograd.Function):
    """Each rank's (m, s, t, x_y) a row, one all-gather, combined in rank order; the backward is local."""

    @staticmethod
    @on_its_device
    def forward(
        ctx: Any,
        group: Any,
        entropy: bool,
        lse: bool,
        inplace: bool,
        backend: str,
        logits: Tensor,
        labels: Tensor,
        *options: Any,
    ) -> tuple[Tensor | None, ...]:
        call = Call(logits, labels, *options)
        dtype, lead = result_dtype(logits), logits.shape[:-1]
        partials = empty((call.rows, 3 + (labels.numel() // call.rows if call.rows else 1)), dtype, logits)
        out = empty(labels.shape, dtype, logits)
        H, z, m, log_sum = (empty(lead, dtype, logits) for _ in range(4))
        fold(call, partials, backend)
        combine(call, all_gather(partials, group), (out, H, z, m, log_sum), backend)
        ctx.save_for_backward(logits, labels, *options[:4], m, log_sum, H)
        ctx.options, ctx.inplace, ctx.backend = options[4:], inplace, backend
        ctx.set_materialize_grads(False)
        return out, H if entropy else None, z if lse else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        *tensors, m, log_sum, H = ctx.saved_tensors
        arguments: tuple[Any, ...] = (*tensors, *ctx.options, m, log_sum, H, *grads, ctx.backend, ctx.inplace)
        grad = _backward_implementation(*arguments)
        return *[None] * 5, grad, *[None] * 10


def of_logits(
    logits: Tensor, labels: Tensor, temperatures: Tensor | None, temperature: float, softcap: float | None,
    ignore_index: int, entropy: bool, lse: bool, kept: Kept | None, parallel: VocabParallel | None,
) -> Logprobs:  # fmt: skip
    """`logprobs` by its definition."""
    vocab, lead = logits.shape[-1], logits.shape[:-1]
    total = parallel.vocab_size if parallel else vocab
    if not torch.compiler.is_compiling():
        value_checks.labels(labels, total, ignore_index)
        value_checks.temperatures(temperatures)
    x = logits.reshape(-1, vocab)
    y = labels.reshape(x.shape[0], labels.shape[-1] if labels.dim() == logits.dim() else 1)
    m, s, t, z, counted, scale = reference.statistics(
        x, y, temperature=temperature if temperatures is None else temperatures, softcap=softcap,
        ignore_index=ignore_index, kept=kept, start=parallel.vocab_start if parallel else 0, partial=parallel is not None,
    )  # fmt: skip
    if parallel:
        # the other ranks' share enters as a constant: the gradient of this rank's columns is exact
        parts = all_gather(torch.cat([m, s, t, z], -1).detach(), parallel.group)  # (ranks, N, 3 + K)
        M = parts[:, :, :1].amax(0)

        def to_common(m_: Tensor, s_: Tensor, t_: Tensor) -> tuple[Tensor, Tensor]:
            shift = (m_ - M) * scale
            factor = torch.exp(shift)
            empty = factor == 0
            return s_ * factor, torch.where(
                empty, torch.zeros_like(t_), (t_ + s_ * torch.where(empty, torch.zeros_like(shift), shift)) * factor
            )

        all_s, all_t = _sum_parts(parts, to_common)
        own_s, own_t = to_common(m, s, t)
        s, t = all_s + (own_s - own_s.detach()), all_t + (own_t - own_t.detach())  # the same bits on every rank
        Z = parts[:, :, 3:].amax(0)
        z = torch.where(z > -torch.inf, z, Z)
        m = M
    out, H, lse_ = reference.results(m, s, t, z, counted, scale)
    return Logprobs(out.reshape(labels.shape), H.reshape(lead) if entropy else None, lse_.reshape(lead) if lse else None)


def _sum_parts(parts: Tensor, to_common: Any) -> tuple[Tensor, Tensor]:
    pairs = [to_common(p[:, :1], p[:, 1:2], p[:, 2:3]) for p in parts]
    return torch.stack([s for s, _ in pairs]).sum(0), torch.stack([t for _, t in pairs]).sum(0)
