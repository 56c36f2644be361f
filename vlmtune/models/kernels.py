"""What makes the same mathematics cheaper: activation checkpointing, Liger's kernels, torch.compile."""

from __future__ import annotations

from transformers import PreTrainedModel


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Makes every transformer block recompute its activations in the backward pass.

    transformers also makes all embeddings' outputs require gradients, which reentrant checkpointing needs. This is
    the other kind, and a frozen tower would be recomputed and differentiated for nothing.
    """
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()
