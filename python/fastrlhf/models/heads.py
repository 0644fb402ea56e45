"""What stands on the decoder's hidden states: log-probabilities of tokens, and scalars for values and rewards."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..parallel.collectives import copy_to_shards
from .decoder import Context, Decoder


class TokenLogprobs(NamedTuple):
    """`logprobs` float32 (n); `entropy` float32 (n), None where not asked. nats."""

    logprobs: Tensor
    entropy: Tensor | None


def token_logprobs(
    model: Decoder, hidden: Tensor, labels: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> TokenLogprobs:
    """log softmax(logits(hidden) / temperature)[label] for hidden (n, H) and labels (n); differentiable. The logits are never
    stored: `ops.linear_logprobs`.

    Give only the positions that are wanted: the others are then never multiplied.
    """
    head, tp = model.head, model.groups.tp
    parallel = None
    if tp.size > 1:
        parallel = ops.VocabParallel(tp.group, head.first, head.first + head.rows, model.config.vocab_size)
    out = ops.linear_logprobs(
        copy_to_shards(hidden, tp), head.weight, labels, temperature=temperature, entropy=entropy, vocab_parallel=parallel
    )
    return TokenLogprobs(out.logprobs, out.entropy)


class ScalarModel(nn.Module):
    """A decoder with one number a token: values for a critic, rewards (at the last token) for a reward model.

    The head is float32 whatever the decoder's dtype. `mean` and `std` standardise what a reward model says,
    (r - mean) / std, when it is asked with `standardized`.
    """

    def __init__(self, decoder: Decoder, *, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        self.decoder = decoder
        zeros = torch.zeros(1, decoder.config.hidden_size, device=decoder.device, dtype=torch.float32)
        if decoder.groups.pp.last:
            self.score = nn.Parameter(zeros)
        else:  # the head is with the last stage; here it has a shape and learns nothing
            self.register_buffer("score", zeros, persistent=False)
        self.mean, self.std = mean, std

    @torch.no_grad()
    def initialize_head(self, seed: int) -> ScalarModel:
        """Small enough to start near 0: normal with deviation 1 / (hidden + 1)."""
        generator = torch.Generator().manual_seed(seed)
        hidden = self.score.shape[1]
        self.score.copy_(torch.randn(1, hidden, generator=generator) / (hidden + 1))
        return self

    def forward(self, tokens: Tensor, context: Context) -> Tensor:
        """float32 (total)."""
        return self.of_hidden(self.decoder(tokens, context))

    def of_hidden(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self.score).squeeze(-1)

    def standardized(self, rewards: Tensor) -> Tensor:
        return (rewards - self.mean) / self.std
