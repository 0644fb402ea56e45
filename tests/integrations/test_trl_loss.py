"""The fused loss says where TRL goes past it."""

from __future__ import annotations

from fastrlhf.integrations import seam
from fastrlhf.integrations.trl import fused_loss


class Trainer:
    use_liger_kernel = True

    def compute_liger_loss(self, model, inputs):
        return "liger"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.compute_liger_loss(model, inputs)


def test_a_loss_of_ligers_own_is_said():
    with seam.declines() as reasons:
        assert fused_loss(Trainer)().compute_loss(None, {}, num_items_in_batch=3) == "liger"
    assert reasons == ["use_liger_kernel, which goes past the fused loss"]
