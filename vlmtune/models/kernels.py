"""What makes the same mathematics cheaper: activation checkpointing, Liger's kernels, torch.compile."""

from __future__ import annotations

import importlib.util

import torch
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmtune.config.schema import RunConfig
from vlmtune.errors import RecipeError
from vlmtune.models.attention import NAMES
from vlmtune.models.vlm import VLM

_LIGER_KEEPS = {"cross_entropy": False, "fused_linear_cross_entropy": False}
"""Liger would replace the model's forward for its loss; the objective calls that kernel itself."""


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Makes every transformer block recompute its activations in the backward pass.

    transformers also makes all embeddings' outputs require gradients, which reentrant checkpointing needs. This is
    the other kind, and a frozen tower would be recomputed and differentiated for nothing.
    """
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.disable_input_require_grads()


def use_kernels(model: VLM, run: RunConfig) -> str:
    """What is said of it at the start of a run, after Liger's kernels and checkpointing are as the recipe wants."""
    liger, why = use_liger(model, run.liger)
    if run.activation_checkpointing:
        checkpoint_activations(model)
    return f"Liger's kernels: {'on' if liger else 'off'} ({why})"


def use_liger(model: VLM, choice: bool | None) -> tuple[bool, str]:
    """Whether Liger's kernels are now in the language model and its loss, and why; None lets the machine decide.

    Norms, rotary positions, SwiGLU and the loss are replaced by equal ones that keep less. Raises RecipeError when
    they are asked for and cannot run.
    """
    if choice is False:
        return False, "turned off"
    why = liger_obstacle(model.config.text_config.model_type)
    if why and choice:
        remedy = (
            "Leave run.liger out, or install the extra on a machine with a GPU: pip install 'vlmtune[liger]'."
        )
        raise RecipeError(f"Liger's kernels cannot run: {why}", "run.liger", remedy)
    if why:
        return False, why
    from liger_kernel.transformers.monkey_patch import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model=model.model.language_model, **_LIGER_KEEPS)
    model.fused_loss = True
    return True, "asked for" if choice else "installed, and the GPU runs it"


def liger_obstacle(model_type: str) -> str:
    """Why Liger's kernels cannot run a language model of this type here; empty when they can."""
    if not torch.cuda.is_available():
        return "no CUDA device: Triton compiles for GPUs"
    for package in ("triton", "liger_kernel"):
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return "" if model_type in MODEL_TYPE_TO_APPLY_LIGER_FN else f"Liger has no kernels for {model_type}"


def compile_blocks(model: VLM, backend: str = "inductor") -> int:
    """Compiles each block of the language model in place; how many there are.

    Block by block: they are alike, so one is compiled for all. Packed attention stays between two graphs: captured, it
    would be compiled anew for every row's lengths. Names and state dict do not change.
    """
    blocks = model.model.language_model.layers
    for name in NAMES.values():
        AttentionInterface.register(name, torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[name]))
    for block in blocks:
        block.compile(backend=backend, dynamic=True)
    return len(blocks)


__all__ = ["checkpoint_activations", "compile_blocks", "liger_obstacle", "use_kernels", "use_liger"]
