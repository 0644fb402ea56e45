"""Log-probabilities, entropy and log-sum-exp from hidden states: the head's logits are never stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels.linear_logprobs import chunked, reference
from ..kernels.linear_logprobs.chunked import Tile, Tiles
from . import checks, hopper_head, value_checks
from .backend import DTYPES, FLOATS, address, choose, empty, extension, matrix, result_dtype, threads, triton_kernels, with_rows
from .distributed import all_gather
from .library import Op, on_its_device, once_differentiable, present
from .logprobs import Call, Kept, Logprobs, combine, differentiate, fold, kept_parts, of_logits, softmax_options

WORKSPACE = 256 << 20


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    entropy: bool = False,
    lse: bool = False,
    kept: Kept | None = None,
    vocab_parallel: Any = None,
    workspace_bytes: int = WORKSPACE,
    weight_grad_dtype: torch.dtype = torch.float32,
    workspace_dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Logprobs:
    """`logprobs(hidden @ weight.T + bias, labels)` without the logits: tile by tile, each folded into its rows' statistics
    while it is in cache or registers, and made again in the backward.

    The products are summed in float32 whatever the inputs, and never rounded below it: log-probs are those of a float32 head.
    Deterministic; a row's result does not depend on the number of threads, nor on the rows beside it, but where a GPU
    multiplies through torch (kept sets, several labels a row; with backend "cuda" all but bfloat16 on Hopper): cuBLAS rounds
    by their number.

    Args:
        hidden: (..., H), float32, bfloat16, float16 or float64, last stride 1.
        weight: (V, H), last stride 1; float64 if and only if hidden is.
        labels: (...), or (..., K) for K labels a row; int32 or int64. Rows that have only ignore_index cost nothing.
        bias: (V), or None.
        temperature, softcap, ignore_index, entropy, lse: as for `logprobs`.
        kept: as for `logprobs`. As CSR, on the CPU, only the kept columns are computed: a sparse head.
        vocab_parallel: weight (and bias) are this rank's rows of the whole: as for `logprobs`. One all-gather of 16 bytes a row
            forward, nothing backward: the gradient of hidden is this rank's share, to be summed over the group where hidden was
            copied to it, as for any column-parallel layer.
        workspace_bytes: for packed operands and tiles; more only where one panel needs it, and some 1 MB a thread on the CPU.
        weight_grad_dtype: what the weight's gradient is summed in, where it is summed in parts; it arrives in weight's dtype.
            In float32 the sum takes 4 V H bytes beside the result, bfloat16 takes none.
        workspace_dtype: what the logits' gradient is rounded to before it is multiplied. bfloat16, with bfloat16 inputs, takes
            half the time of float32 there, at the price of gradients that carry the rounding of their terms (of 2^-9 each)
            beside their own. A CPU without AVX-512-BF16 multiplies float32 all the same.
        backend: "cuda", "triton", "cpu" or "reference"; None chooses.

    Returns:
        `Logprobs`, as `logprobs` returns it. Gradients flow to hidden, weight and bias, once: differentiating them is an error.

    Raises:
        TypeError, ValueError, IndexError: as `logprobs`, naming the argument.

    Source: Wijmans et al. 2024 for the idea; the definition is ``fastrlhf.kernels.linear_logprobs.reference``.
    """
    inputs = head_inputs("linear_logprobs", hidden, weight, bias, workspace_bytes, weight_grad_dtype, workspace_dtype, backend)
    lead, vocab = hidden.shape[:-1], weight.shape[0]
    temperature, temperatures, parallel = softmax_options(
        "hidden", hidden, lead, vocab, labels, temperature, softcap, kept, vocab_parallel
    )
    if inputs == "reference":
        x = reference.logits(hidden, weight, bias, reference.ignored_rows(hidden, labels, ignore_index))
        return of_logits(x, labels, temperatures, temperature, softcap, ignore_index, entropy, lse, kept, parallel)
    mask, indptr, indices = kept_parts(kept)
    start, total = (parallel.vocab_start, parallel.vocab_size) if parallel else (0, vocab)
    if value_checks.wanted(inputs):
        value_checks.labels(labels, total, ignore_index)
        value_checks.temperatures(temperatures)
        value_checks.kept(indptr, indices, total)
    if hidden.dim() > 3:
        hidden = hidden.contiguous()
    bias = None if bias is None else bias.contiguous()
    narrow = weight_grad_dtype not in (torch.float32, torch.float64)
    arguments = (
        hidden, weight, bias, labels.contiguous(), temperatures, mask, indptr, indices, float(temperature), softcap or 0.0,
        ignore_index, start, total, workspace_bytes, narrow, workspace_dtype == torch.bfloat16,
    )  # fmt: skip
    if parallel:
        out = _VocabParallel.apply(parallel.group, entropy, lse, inputs, *arguments)
    else:
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
        out = _linear_logprobs(*arguments, entropy, lse, save, inputs)
    if hidden.numel() == 0:  # no rows: an absent result and an empty one look alike
        nothing = hidden.new_empty(lead, dtype=result_dtype(hidden))
        return Logprobs(out[0].reshape(labels.shape), nothing if entropy else None, nothing if lse else None)
    return Logprobs(out[0], out[1] if entropy else None, out[2] if lse else None)


def head_inputs(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, workspace_bytes: int, weight_grad_dtype: torch.dtype,
    workspace_dtype: torch.dtype, backend: str | None,
) -> str:  # fmt: skip
    """Checks a head's inputs and returns the backend."""
    shape = checks.logits("hidden", hidden)
    checks.logits("weight", weight)
    if weight.dim() != 2 or weight.shape[1] != shape[-1]:
        raise ValueError(
            f"weight: expected shape (V, {shape[-1]}) for hidden {checks.shape_of(hidden)}, got {checks.shape_of(weight)}"
        )
    checks.same_device("weight", weight, "hidden", hidden)
    if bias is not None:
        checks.rows("bias", bias, weight.shape[0], "row of weight", weight)
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (t.dtype == torch.float64) != (hidden.dtype == torch.float64):
            raise TypeError(f"{name}: {t.dtype} with hidden {hidden.dtype}; float64 goes with float64 only")
    if isinstance(workspace_bytes, bool) or not isinstance(workspace_bytes, int) or workspace_bytes < 1:
        raise ValueError(f"workspace_bytes: expected a number of bytes >= 1, got {workspace_bytes!r}")
    if weight_grad_dtype not in FLOATS:
        raise TypeError(f"weight_grad_dtype: expected one of {[str(d) for d in FLOATS]}, got {weight_grad_dtype}")
    if workspace_dtype not in (torch.float32, hidden.dtype):
        raise TypeError(f"workspace_dtype: expected torch.float32 or hidden's dtype, {hidden.dtype}, got {workspace_dtype}")
    return choose(op, hidden, backend)


class HeadCall(NamedTuple):
    """The inputs of every kernel here, checked: hidden, weight, bias, the softmax's, the workspace."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
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
    workspace_bytes: int
    narrow: bool  # the weight's gradient may be summed in its own dtype
    rounded: bool  # the logits' gradient may be multiplied in bfloat16

    @property
    def rows(self) -> int:
        return self.hidden.numel() // self.hidden.shape[-1]

    @property
    def round_to(self) -> torch.dtype:
        return torch.bfloat16 if self.rounded else torch.float32

    @property
    def ignored(self) -> Tensor:
        """(rows, 1): rows that have only ignore_index."""
        return (self.labels.reshape(self.rows, -1) == self.ignore_index).all(-1, keepdim=True)

    @property
    def flat(self) -> Tensor:
        """hidden as (rows, H)."""
        return self.hidden.reshape(-1, self.hidden.shape[-1])

    @property
    def clean(self) -> Tensor:
        """`flat` with zeros in the rows that have only ignore_index, whatever they hold."""
        return self.flat.masked_fill(self.ignored, 0)

    def tiles(self) -> Tiles:
        return chunked.tiles(self.rows, self.weight.shape[0], self.workspace_bytes)

    def of(self, logits: Tensor, tile: Tile) -> Call:
        """The call of `logprobs` that a tile is: a shard of the vocabulary, for some of the rows."""
        labels = self.labels.reshape(self.rows, -1)[tile.rows]
        return Call(
            logits, labels, None if self.temperatures is None else self.temperatures[tile.rows],
            None if self.kept_mask is None else self.kept_mask.view(self.rows, -1)[tile.rows, tile.columns].contiguous(),
            None if self.kept_indptr is None else self.kept_indptr[tile.rows.start : tile.rows.stop + 1], self.kept_indices,
            self.temperature, self.softcap, self.ignore_index, self.vocab_start + tile.columns.start, self.vocab_total,
        )  # fmt: skip

    def whole(self) -> Call:
        """All of it, for what needs no logits."""
        nowhere = self.hidden.new_empty((self.rows, 0), dtype=result_dtype(self.hidden))
        labels = self.labels.reshape(self.rows, -1)
        rest = (self.temperature, self.softcap, self.ignore_index, self.vocab_start, self.vocab_total)
        return Call(nowhere, labels, self.temperatures, None, None, None, *rest)

    def native(self) -> tuple[Any, ...]:
        """As the extension takes them."""
        sizes = (self.rows, self.weight.shape[0], self.hidden.shape[-1], DTYPES[result_dtype(self.hidden)])
        labels = (
            self.labels.data_ptr(), DTYPES[self.labels.dtype], self.labels.numel() // self.rows if self.rows else 1,
            self.vocab_start, self.vocab_total, self.ignore_index,
        )  # fmt: skip
        count = 0 if self.kept_indices is None else self.kept_indices.shape[0]
        kept = (address(self.kept_mask), address(self.kept_indptr), address(self.kept_indices), count, self.vocab_total)
        scaling = (self.temperature, address(self.temperatures), self.softcap)
        bias = (address(self.bias), 0 if self.bias is None else DTYPES[self.bias.dtype])
        return matrix(with_rows(self.hidden)), matrix(self.weight), bias, sizes, labels, scaling, kept


class Results(NamedTuple):
    """Rows' results; None where not wanted."""

    logprobs: Tensor
    entropy: Tensor | None
    lse: Tensor | None
    max: Tensor | None
    log_sum: Tensor | None


def statistics(call: HeadCall, backend: str) -> Tensor:
    """(parts, rows, 3 + labels): max, sum, weighted sum and label logits over parts of this rank's columns."""
    width = 3 + (call.labels.numel() // call.rows if call.rows else 1)
    if backend == "cpu":
        partials = empty((1, call.rows, width), result_dtype(call.hidden), call.hidden)
        extension().linear_logprobs_forward(
            *call.native(), (0, 0, 0, 0, 0), partials.data_ptr(), 0, call.workspace_bytes, threads()
        )
        return partials
    if backend == "cuda" and hopper_head.serves(call):
        return hopper_head.statistics(call)
    if _in_triton(call, backend):
        kernels = triton_kernels("linear_logprobs")
        partials = empty((kernels.parts(call.hidden, call.weight), call.rows, width), torch.float32, call.hidden)
        kernels.forward(
            call.flat, call.weight, call.bias, call.labels.view(-1), call.temperatures, temperature=call.temperature,
            softcap=call.softcap, ignore_index=call.ignore_index, vocab_start=call.vocab_start, partials=partials,
        )  # fmt: skip
        return partials
    cut = call.tiles()
    partials = empty((cut.across, call.rows, width), torch.float32, call.hidden)
    logits = _logits(call, call.clean, backend)
    chunked.forward(logits, cut, partials, lambda x, tile, out: fold(call.of(x, tile), out, backend))
    return partials


def _in_triton(call: HeadCall, backend: str) -> bool:
    """Whether the logits are Triton's own products: one label a row, no kept set."""
    return backend == "triton" and call.labels.numel() == call.rows and call.kept_mask is None and call.kept_indptr is None


def _logits(call: HeadCall, hidden: Tensor, backend: str) -> Callable[[Tile], Tensor]:
    """Those of a tile before the soft cap, as the statistics had them."""
    if not _in_triton(call, backend):
        return lambda tile: chunked.logits(hidden, call.weight, call.bias, tile)
    ignored = call.ignored.squeeze(1)

    def of(tile: Tile) -> Tensor:
        bias = None if call.bias is None else call.bias[tile.columns]
        return triton_kernels("linear_logprobs").logits(hidden[tile.rows], call.weight[tile.columns], bias, ignored[tile.rows])

    return of


def _forward(*arguments: Any) -> tuple[Tensor | None, ...]:
    entropy, lse, save, backend = arguments[-4:]
    call = HeadCall(*arguments[:-4])
    lead, dtype = call.hidden.shape[:-1], result_dtype(call.hidden)

    def row(wanted: bool) -> Tensor | None:
        return empty(lead, dtype, call.hidden) if wanted else None

    out = Results(empty(call.labels.shape, dtype, call.hidden), row(entropy or save), row(lse), row(save), row(save))
    if backend == "cpu":
        extension().linear_logprobs_forward(
            *call.native(), tuple(address(t) for t in out), 0, 0, call.workspace_bytes, threads()
        )
    elif call.rows:
        combine(call.whole(), statistics(call, backend), out, backend)
    return out


def _fake_forward(*arguments: Any) -> tuple[Tensor | None, ...]:
    entropy, lse, save, _ = arguments[-4:]
    call = HeadCall(*arguments[:-4])
    dtype = result_dtype(call.hidden)

    def row(wanted: bool) -> Tensor | None:
        return call.hidden.new_empty(call.hidden.shape[:-1], dtype=dtype) if wanted else None

    return call.hidden.new_empty(call.labels.shape, dtype=dtype), row(entropy or save), row(lse), row(save), row(save)


def gradients(
    call: HeadCall, results: Results, grads: tuple[Tensor | None, ...], wanted: tuple[bool, ...], backend: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of hidden, weight and bias, where wanted; grads: of logprobs, entropy and lse."""
    grads_ = tuple(None if g is None else g.contiguous() for g in grads)
    if backend == "cpu":
        hidden, weight, bias = (
            empty(t.shape, d, t) if w and t is not None else None
            for t, w, d in zip(call[:3], wanted, (call.hidden.dtype, call.weight.dtype, result_dtype(call.hidden)), strict=True)
        )
        outputs = (address(hidden), address(weight), DTYPES[call.weight.dtype], address(bias))
        extension().linear_logprobs_backward(
            *call.native(), (0, *(address(t) for t in results[1:])), tuple(address(g) for g in grads_), outputs, False,
            call.narrow, call.rounded, 0, call.workspace_bytes, threads(),
        )  # fmt: skip
    else:
        on_hopper, cut = backend == "cuda" and hopper_head.serves(call), call.tiles()
        in_parts = not on_hopper and cut.height < call.rows
        wide = torch.float32 if in_parts and not call.narrow else call.weight.dtype
        hidden, weight, bias = (
            torch.zeros(t.shape, dtype=d, device=t.device) if w and t is not None else None
            for t, d, w in zip((call.flat, call.weight, call.bias), (torch.float32, wide, torch.float32), wanted, strict=True)
        )
        if on_hopper:
            hopper_head.gradients(call, results, grads_, (hidden, weight, bias))
        else:
            clean = call.clean
            chunked.backward(
                _logits(call, clean, backend), clean, call.weight, cut,
                lambda x, tile: differentiate(call.of(x, tile), results, grads_, tile.rows, backend),
                hidden, weight, bias, round_to=call.round_to,
            )  # fmt: skip
        hidden = None if hidden is None else hidden.to(call.hidden.dtype).view(call.hidden.shape)
    return (
        hidden,
        None if weight is None else weight.to(call.weight.dtype),
        None if bias is None or call.bias is None else bias.to(call.bias.dtype),
    )


def _backward_implementation(*arguments: Any) -> tuple[Tensor | None, ...]:
    *inputs, max_, log_sum, entropy, g_logprobs, g_entropy, g_lse, want_hidden, want_weight, want_bias, backend = arguments
    results = Results(max_, entropy, None, max_, log_sum)
    return gradients(HeadCall(*inputs), results, (g_logprobs, g_entropy, g_lse), (want_hidden, want_weight, want_bias), backend)


def _fake_backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    *_, want_hidden, want_weight, want_bias, _ = arguments
    wanted = (want_hidden, want_weight, want_bias)
    return tuple(t.new_empty(t.shape) if w and t is not None else None for t, w in zip(arguments[:3], wanted, strict=True))


_INPUTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor? temperatures, Tensor? kept_mask, Tensor? kept_indptr, "
    "Tensor? kept_indices, float temperature, float softcap, int ignore_index, int vocab_start, int vocab_total, "
    "int workspace_bytes, bool narrow, bool rounded"
)
_COUNT = len(HeadCall._fields)
_linear_logprobs_backward = Op(
    "linear_logprobs_backward",
    f"({_INPUTS}, Tensor max, Tensor log_sum, Tensor entropy, Tensor? grad_logprobs, Tensor? grad_entropy, Tensor? grad_lse, "
    "bool want_hidden, bool want_weight, bool want_bias, str backend) -> (Tensor, Tensor, Tensor)",
    _backward_implementation,
    _fake_backward,
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
    ctx.options, ctx.backend = inputs[8:_COUNT], inputs[-1]
    _, H, _, m, log_sum = output
    ctx.save_for_backward(*inputs[:8], present(m), present(log_sum), present(H))


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    *tensors, m, log_sum, H = ctx.saved_tensors
    rest = _COUNT - 3
    if m is None:  # no rows
        zeros = (torch.zeros_like(t) if w and t is not None else None for t, w in zip(tensors, ctx.needs_input_grad[:3]))
        return *zeros, *[None] * (rest + 4)
    g_logprobs, g_entropy, g_lse = grads[:3]
    g_entropy, g_lse = (None if g is None or g.shape != m.shape else g for g in (g_entropy, g_lse))
    out = _linear_logprobs_backward(
        *tensors, *ctx.options, m, log_sum, H, g_logprobs, g_entropy, g_lse, *ctx.needs_input_grad[:3], ctx.backend
    )
    return *(present(g) if w else None for g, w in zip(out, ctx.needs_input_grad[:3])), *[None] * (rest + 4)


_linear_logprobs = Op(
    "linear_logprobs",
    f"({_INPUTS}, bool entropy, bool lse, bool save, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _setup,
    _backward,
)


def gathered(call: HeadCall, group: Any, backend: str) -> Results:
    """The results of all ranks' columns together: one all-gather, combined in rank order."""
    lead, dtype = call.hidden.shape[:-1], result_dtype(call.hidden)
    out = Results(empty(call.labels.shape, dtype, call.hidden), *(empty(lead, dtype, call.hidden) for _ in range(4)))
    parts = statistics(call, backend)
    if parts.shape[0] > 1:
        parts = merge_parts(parts, call)
    combine(call.whole(), all_gather(parts[0], group), out, backend)
    return out


def merge_parts(parts: Tensor, call: HeadCall) -> Tensor:
    """(parts, rows, 3 + labels) of one rank's columns as one, (1, rows, 3 + labels)."""
    m, s, t, z = parts[..., :1], parts[..., 1:2], parts[..., 2:3], parts[..., 3:]
    scale = 1 / call.temperature if call.temperatures is None else (1 / call.temperatures).float()[:, None]
    M = m.amax(0)
    shift = torch.where(m == -torch.inf, torch.zeros_like(m), (m - M) * scale)
    factor = torch.where(m == -torch.inf, torch.zeros_like(m), torch.exp(shift))
    sums = torch.where(s == 0, s, s * factor), torch.where(factor == 0, torch.zeros_like(t), (t + s * shift) * factor)
    return torch.cat([M, *(x.double().sum(0).float() for x in sums), z.amax(0)], -1)[None]


class _VocabParallel(torch.autograd.Function):
    """Each rank's statistics, one all-gather, combined in rank order; the backward is local."""

    @staticmethod
    @on_its_device
    def forward(ctx: Any, group: Any, entropy: bool, lse: bool, backend: str, *inputs: Any) -> tuple[Tensor | None, ...]:
        call = HeadCall(*inputs)
        out = gathered(call, group, backend)
        ctx.save_for_backward(*call[:8], out.max, out.log_sum, out.entropy)
        ctx.options, ctx.backend = call[8:], backend
        ctx.set_materialize_grads(False)
        return out.logprobs, out.entropy if entropy else None, out.lse if lse else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        *tensors, m, log_sum, H = ctx.saved_tensors
        call = HeadCall(*tensors, *ctx.options)
        wanted = tuple(ctx.needs_input_grad[4:7])
        out = gradients(call, Results(m, H, None, m, log_sum), (grads[0], grads[1], grads[2]), wanted, ctx.backend)
        return *[None] * 4, *out, *[None] * (_COUNT - 3)
