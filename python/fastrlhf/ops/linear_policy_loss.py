"""A policy loss straight from hidden states, its gradients made in the forward: three products instead of four, no logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..kernels.linear_logprobs import chunked
from ..kernels.linear_logprobs.chunked import Tiles
from ..kernels.policy_loss.reference import STATS, RolloutCorrection
from . import checks, hopper_head, value_checks
from .backend import DTYPES, address, empty, extension, result_dtype, threads
from .distributed import size_and_rank
from .head_blocks import Logits, blocks, multiply_out, of_rows
from .library import on_its_device, once_differentiable
from .linear_logprobs import WORKSPACE, HeadCall, Results, head_inputs, linear_logprobs
from .logprobs import Kept, differentiate, kept_parts, softmax_options
from .policy_loss import PolicyLoss, policy_loss, settings
from .stats import LossStats

BY_TOKEN = ("ppo", "reinforce", "gpg", "cispo", "sapo")


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    kept: Kept | None = None,
    vocab_parallel: Any = None,
    workspace_bytes: int = WORKSPACE,
    weight_grad_dtype: torch.dtype = torch.float32,
    workspace_dtype: torch.dtype = torch.float32,
    kind: str = "ppo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ratio_clamp: float | None = None,
    delta: float | None = None,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
    rollout_logprobs: Tensor | None = None,
    rollout_correction: RolloutCorrection | str | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: str = "k3",
    entropy_coef: float = 0.0,
    reduction: str = "token-mean",
    denominator: float | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    group: Any = None,
    backend: str | None = None,
) -> PolicyLoss:
    """`policy_loss` of `linear_logprobs(hidden, weight, labels)`; the same numbers to rounding, in 6 N V H flops instead of 8.

    A token-level loss's gradient is known as soon as the row's log-prob is: each block of rows is multiplied out once, its
    statistics give the log-probs, these the loss's gradient, and while the block's logits are still in the workspace they
    become d logits and, by two more products, what the block adds to the gradients of hidden, weight and bias.

    Args:
        hidden: (B, T, H), packed (total, H) with `cu_seqlens`, or (T, H). weight, labels, bias, temperature, softcap,
            ignore_index, kept, vocab_parallel, weight_grad_dtype, workspace_dtype: as for `linear_logprobs`; one label a row.
        mask: the leading shape; None counts every row whose label is not ignore_index. A row where it is 0 costs nothing.
        workspace_bytes: the logits of a block of rows lie in it, at least one panel of rows. The blocks' gradients of weight
            are summed in float32, 4 V H bytes beside the result unless weight is float32 or `weight_grad_dtype` narrower.
        kind: a token-level one: ppo, reinforce (gpg), cispo, sapo. The rest: as for `policy_loss`; the entropy that
            entropy_coef weighs is the rows'.

    Returns:
        `PolicyLoss(loss, stats)`, as `policy_loss`. Its backward can be called once. torch.compile breaks the graph around it;
        with fullgraph=True use `policy_loss(linear_logprobs(...).logprobs, ...)`.

    Raises:
        TypeError, ValueError, IndexError: as the two ops; ValueError for a sequence-level kind, whose gradient needs the whole
        sequence: call `policy_loss(linear_logprobs(...).logprobs, ...)` for these.
    """
    if kind not in BY_TOKEN:
        raise ValueError(
            f"kind: expected one of {BY_TOKEN}, got {kind!r}; a sequence-level loss needs every log-prob of a sequence first: "
            "policy_loss(linear_logprobs(...).logprobs, ...)"
        )
    backend = head_inputs(
        "linear_policy_loss", hidden, weight, bias, workspace_bytes, weight_grad_dtype, workspace_dtype, backend
    )
    bias = None if bias is None else bias.contiguous()
    lead, vocab = hidden.shape[:-1], weight.shape[0]
    if labels.shape != lead:
        raise ValueError(f"labels: expected shape {tuple(lead)}, got {checks.shape_of(labels)}")
    temperature, temperatures, parallel = softmax_options(
        "hidden", hidden, lead, vocab, labels, temperature, softcap, kept, vocab_parallel
    )
    if mask is None:
        mask = labels != ignore_index
    loss_options: dict[str, Any] = {
        "kind": kind, "clip_low": clip_low, "clip_high": clip_high, "dual_clip": dual_clip, "ratio_clamp": ratio_clamp,
        "delta": delta, "tau_pos": tau_pos, "tau_neg": tau_neg, "ref_logprobs": ref_logprobs, "kl_coef": kl_coef, "kl": kl,
        "entropy_coef": entropy_coef,
    }  # fmt: skip
    over: dict[str, Any] = {
        "rollout_logprobs": rollout_logprobs, "rollout_correction": rollout_correction, "reduction": reduction,
        "denominator": denominator, "cu_seqlens": cu_seqlens, "group": group,
    }  # fmt: skip
    at = hidden.new_empty(lead, dtype=result_dtype(hidden))
    settings(at, old_logprobs, advantages, mask, entropy=at, **loss_options, **over | {"group": None})
    over["backend"] = backend
    counted = torch.where(mask != 0, labels, torch.full_like(labels, ignore_index))
    inputs = [t for t in (hidden, weight, bias) if t is not None]
    wants = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if not wants or backend == "reference":
        out = linear_logprobs(
            hidden, weight, counted, bias=bias, temperature=temperature if temperatures is None else temperatures.view(lead),
            softcap=softcap, ignore_index=ignore_index, kept=kept, vocab_parallel=parallel, entropy=True,
            workspace_bytes=workspace_bytes, backend=backend,
        )  # fmt: skip
        assert out.entropy is not None
        return policy_loss(out.logprobs, old_logprobs, advantages, mask, entropy=out.entropy, **loss_options, **over)

    kept_mask, indptr, indices = kept_parts(kept)
    start, total = (parallel.vocab_start, parallel.vocab_size) if parallel else (0, vocab)
    if value_checks.wanted(backend):
        value_checks.labels(counted, total, ignore_index)
        value_checks.temperatures(temperatures)
        value_checks.kept(indptr, indices, total)
    call = HeadCall(
        hidden.detach(), weight.detach(), None if bias is None else bias.detach(), counted, temperatures, kept_mask,
        indptr, indices, float(temperature), softcap or 0.0, ignore_index, start, total, workspace_bytes,
        weight_grad_dtype not in (torch.float32, torch.float64), workspace_dtype == torch.bfloat16,
    )  # fmt: skip
    # not as a decorator: that imports torch._dynamo, two seconds of every program's start
    in_forward = torch.compiler.disable(_in_forward) if torch.compiler.is_compiling() else _in_forward
    loss, values = in_forward(
        hidden, weight, bias, call, (old_logprobs, advantages, mask, loss_options, over), parallel.group if parallel else None,
        backend,
    )  # fmt: skip
    return PolicyLoss(loss, LossStats(values, STATS))


def _in_forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, call: HeadCall, tokens: tuple[Any, ...], group: Any, backend: str
) -> Any:
    return _InForward.apply(hidden, weight, bias, call, _Tokens(*tokens), group, backend)


class _Tokens:
    """The loss's side: what each token weighs, and the gradients of some tokens' log-probs and entropies."""

    def __init__(self, old: Tensor, advantages: Tensor, mask: Tensor, loss: dict[str, Any], over: dict[str, Any]) -> None:
        self.old, self.advantages, self.mask, self.loss, self.over = old, advantages, mask, loss, over
        self.weights, corrected = self._weights(None), self.weights_of_correction()
        token_level = advantages.shape == old.shape
        spread = advantages if token_level else self._spread(advantages)
        if corrected is not None:
            # a loss is homogeneous in its advantage: the importance weight goes there, not to KL and entropy
            ratio = torch.where(self.weights != 0, corrected / self.weights, torch.zeros_like(corrected))
            spread = spread.to(ratio.dtype) * ratio
        self.token_advantages = spread.reshape(-1)

    def _weights(self, correction: Any) -> Tensor:
        """d loss / d loss of a token, from the loss's own code: that of -logprobs, summed as the loss is."""
        with torch.enable_grad():
            at = torch.zeros_like(self.old, dtype=result_dtype(self.old)).requires_grad_()
            options = self.over | {"rollout_correction": correction}
            if correction is None:
                options["rollout_logprobs"] = None
            loss = policy_loss(at, self.old, -torch.ones_like(at), self.mask, kind="reinforce", **options).loss
            (weights,) = torch.autograd.grad(loss, at)
        return weights

    def weights_of_correction(self) -> Tensor | None:
        correction = self.over["rollout_correction"]
        return None if correction is None else self._weights(correction)

    def _spread(self, per_row: Tensor) -> Tensor:
        """(B) as one value a token."""
        cu = self.over["cu_seqlens"]
        if cu is None:
            return per_row.unsqueeze(1).expand_as(self.old) if self.old.dim() == 2 else per_row.expand_as(self.old)
        at = torch.arange(self.old.shape[0], device=cu.device)
        row = torch.searchsorted(cu.long(), at, right=True) - 1
        return per_row[row.clamp(0, per_row.shape[0] - 1)]

    def gradients(self, rows: Tensor | slice, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        """d loss / d logprobs and d loss / d entropy of these tokens."""
        lp, wants_entropy = logprobs.detach().requires_grad_(), self.loss["entropy_coef"] != 0
        H = entropy.detach().requires_grad_(wants_entropy)
        options = dict(self.loss)
        if options["ref_logprobs"] is not None:
            options["ref_logprobs"] = options["ref_logprobs"].reshape(-1)[rows]
        with torch.enable_grad():
            loss = policy_loss(
                lp, self.old.reshape(-1)[rows], self.token_advantages[rows], self.weights.reshape(-1)[rows], entropy=H,
                reduction="token-sum", backend=self.over["backend"], **options,
            ).loss  # fmt: skip
            grads = torch.autograd.grad(loss, (lp, H) if wants_entropy else (lp,))
        return grads[0], grads[1] if wants_entropy else None

    def whole(self, logprobs: Tensor, entropy: Tensor) -> PolicyLoss:
        return policy_loss(logprobs, self.old, self.advantages, self.mask, entropy=entropy, **self.loss, **self.over)


class _InForward(torch.autograd.Function):
    @staticmethod
    @on_its_device
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: HeadCall, tokens: _Tokens, group: Any, backend: str
    ) -> tuple[Tensor, Tensor]:
        wanted = ctx.needs_input_grad[:3]
        lead, dtype = hidden.shape[:-1], result_dtype(hidden)
        sums = _Sums(call, wanted, backend)
        lp, entropy = (torch.zeros(lead, dtype=dtype, device=hidden.device) for _ in range(2))
        for rows in blocks(call, backend, 1 if group is None else size_and_rank(group)[0]):
            block = of_rows(call, rows)
            if backend == "cpu" and hidden.dtype == torch.float16:  # the gradient comes in hidden's dtype
                block = block._replace(hidden=block.hidden.float())
            results, logits = multiply_out(block, group, backend)
            assert results.entropy is not None
            lp.view(-1)[rows] = results.logprobs
            entropy.view(-1)[rows] = results.entropy
            grads = tokens.gradients(rows, results.logprobs, results.entropy)
            sums.add(block, rows, results, (*grads, None), logits)
            del logits  # before the next block's are made
        loss, stats = tokens.whole(lp, entropy)
        ctx.grads, ctx.dtypes = sums.results(), [None if t is None else t.dtype for t in (hidden, weight, bias)]
        ctx.mark_non_differentiable(stats.values)
        return loss.detach(), stats.values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Any, ...]:
        if ctx.grads is None:
            raise RuntimeError("linear_policy_loss: its gradients were made once and are gone; call it again")
        grads, ctx.grads = ctx.grads, None
        if not (grad_loss.is_cpu and float(grad_loss) == 1):
            for g in grads:
                if g is not None:
                    g.mul_(grad_loss.to(g.dtype) if g.dtype == torch.float64 else grad_loss.float())
        return *(None if g is None else g.to(d) for g, d in zip(grads, ctx.dtypes, strict=True)), *[None] * 4


class _Sums:
    """The gradients of hidden, weight and bias, block by block."""

    def __init__(self, call: HeadCall, wanted: tuple[bool, ...], backend: str) -> None:
        self.call, self.backend = call, backend
        wide = result_dtype(call.hidden)
        zeros = lambda t, d: torch.zeros(t.shape, dtype=d, device=t.device)  # noqa: E731
        self.hidden = zeros(call.flat, _held(call.hidden)) if wanted[0] else None
        self.weight = zeros(call.weight, _held(call.weight) if call.narrow else wide) if wanted[1] else None
        self.bias = zeros(call.bias, wide) if wanted[2] and call.bias is not None else None

    def add(self, call: HeadCall, rows: Any, results: Results, grads: tuple[Tensor | None, ...], logits: Logits) -> None:
        hidden: Tensor | None = None
        if self.backend == "cpu":
            assert not isinstance(logits, hopper_head.Exponentials)
            if self.hidden is not None:
                hidden = empty(call.flat.shape, call.hidden.dtype, call.hidden)
            weight = self.weight if self.weight is not None else call.weight
            outputs = (address(hidden), address(self.weight), DTYPES[weight.dtype], address(self.bias))
            extension().linear_logprobs_backward(
                *call.native(), (0, *(address(t) for t in results[1:])), tuple(address(g) for g in grads), outputs, True, True,
                call.rounded, address(logits), call.workspace_bytes, threads(),
            )  # fmt: skip
        else:
            if self.hidden is not None:
                hidden = torch.zeros(call.flat.shape, dtype=torch.float32, device=call.hidden.device)
            sums = (hidden, self.weight, self.bias)
            if isinstance(logits, hopper_head.Exponentials):
                logits.add_gradients(results, grads, sums)
            else:
                assert logits is not None
                kept, vocab = logits, call.weight.shape[0]
                chunked.backward(
                    lambda tile: kept[tile.rows, tile.columns], call.clean, call.weight,
                    Tiles(call.rows, vocab, call.rows, call.tiles().width),
                    lambda x, tile: differentiate(call.of(x, tile), results, grads, tile.rows, self.backend),
                    *sums, round_to=call.round_to,
                )  # fmt: skip
        if self.hidden is not None and hidden is not None:
            self.hidden[rows] = hidden.to(self.hidden.dtype)

    def results(self) -> tuple[Tensor | None, ...]:
        call = self.call
        return (
            None if self.hidden is None else self.hidden.view(call.hidden.shape),
            None if self.weight is None else self.weight.to(_held(call.weight)),
            None if self.bias is None or call.bias is None else self.bias.to(_held(call.bias)),
        )


def _held(t: Tensor) -> torch.dtype:
    """Of a gradient until the loss's own is known: what float16 holds is too small for it before it is scaled."""
    return torch.float32 if t.dtype == torch.float16 else t.dtype
