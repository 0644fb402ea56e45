"""One definition of an op for eager mode and for torch.compile.

`Op` registers schema, implementation, fake and autograd with torch.library, which is what torch.compile sees. In
eager mode it calls the implementation itself, through an autograd.Function only where a gradient will be wanted: the
dispatcher's way costs tens of microseconds a call, which is what small ops live or die by.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LIBRARY = torch.library.Library("fastrlhf", "DEF")
_PLAIN = (Tensor, torch.nn.Parameter)


def _present(x: Any, like: Tensor) -> Any:
    """torch.library has no optional results: an absent one is an empty tensor."""
    if isinstance(x, tuple):
        return tuple(like.new_empty(0) if t is None else t for t in x)
    return x


def present(t: Tensor | None) -> Tensor | None:
    """What an implementation returned: None where it was absent, in either mode."""
    return None if t is None or (t.dim() == 1 and t.shape[0] == 0) else t


def on_its_device(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Launches go to the current device: it is made that of the first tensor among the arguments."""

    @functools.wraps(implementation)
    def run(*args: Any) -> Any:
        first = args[0] if isinstance(args[0], Tensor) else next(a for a in args if isinstance(a, Tensor))
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return implementation(*args)
        return implementation(*args)

    return run


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward whose gradients have none: differentiating them is an error, also where torch's decorator of the name would
    take them for constants, which is wherever the upstream gradient is one."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            out = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return out
        each = out if isinstance(out, tuple) else (out,)
        fail: Any = torch._C._functions.DelayedError(b"fastrlhf: this op has no second derivative", len(each))
        return fail(*(None if g is None else g.detach().requires_grad_() for g in each))

    return run


class Op:
    """`implementation(*args)` with its `fake`, and `setup(ctx, inputs, output)` and `backward(ctx, *grads)` if it has a
    gradient. The first argument is a tensor; absent results are None."""

    def __init__(
        self,
        name: str,
        schema: str,
        implementation: Callable[..., Any],
        fake: Callable[..., Any],
        setup: Callable[..., None] | None = None,
        backward: Callable[..., Any] | None = None,
    ) -> None:
        implementation = on_its_device(implementation)
        LIBRARY.define(name + schema)
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, lambda *args: _present(implementation(*args), args[0]), key)
        torch.library.register_fake(f"fastrlhf::{name}", lambda *args: _present(fake(*args), args[0]), lib=LIBRARY)
        self.implementation = implementation
        self.function: type[torch.autograd.Function] | None = None
        if setup is not None and backward is not None:
            torch.library.register_autograd(f"fastrlhf::{name}", backward, setup_context=setup, lib=LIBRARY)
            self.function = type(
                name,
                (torch.autograd.Function,),
                {
                    "forward": staticmethod(implementation),
                    "setup_context": staticmethod(setup),
                    "backward": staticmethod(once_differentiable(backward)),
                },
            )
        self.packet = getattr(torch.ops.fastrlhf, name).default

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or type(args[0]) not in _PLAIN:
            if self.function is None:  # no gradient: none may be asked for
                return self.packet(*(a.detach() if isinstance(a, Tensor) else a for a in args))
            return self.packet(*args)
        if self.function is not None and torch.is_grad_enabled():
            for a in args:
                if isinstance(a, Tensor) and a.requires_grad:
                    return self.function.apply(*args)
        return self.implementation(*args)
