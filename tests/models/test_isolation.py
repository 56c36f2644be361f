"""The start-up proof lets every right attention pass and catches each kind of leak."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tests.tiny import tiny_model
from vlmtune.errors import TrainingError
from vlmtune.models.attention import NAMES, obstacle, use_attention
from vlmtune.models.isolation import prove_isolation
from vlmtune.models.vlm import VLM

CPU = torch.device("cpu")


@pytest.mark.parametrize("language", ["llama", "qwen2"])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("choice", ["sdpa", "eager"])
def test_attention_of_ours_passes(choice: str, half: bool, language: str) -> None:
    model, _ = tiny_model(language=language)
    use_attention(model, choice)
    assert prove_isolation(model, CPU, half) == 0


def register(model: VLM, attend: Callable[..., Any]) -> None:
    AttentionInterface.register("leaking_test", attend)
    AttentionMaskInterface.register("leaking_test", lambda **_: None)
    model.set_attn_implementation({"text_config": "leaking_test"})


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    yield
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop("leaking_test", None)


def whole_row(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any) -> Any:
    """Causal over the row: later samples see earlier ones. What stock attention does without positions."""
    rest.pop("cu_seqlens"), rest.pop("max_seqlen")
    return sdpa_attention_forward(module, query, key, value, None, **rest)


def next_token_too(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any) -> Any:
    """Each sample also sees the first token of the next."""
    ends = rest.pop("cu_seqlens").tolist()
    rest.pop("max_seqlen")
    total = query.shape[2]
    allowed = torch.zeros(1, 1, total, total, dtype=torch.bool)
    for start, end in pairwise(ends):
        allowed[..., start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
        if end < total:
            allowed[..., end - 1, end] = True
    return sdpa_attention_forward(module, query, key, value, allowed, **rest)


def only_in_rows(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any) -> Any:
    """Each token sees itself alone, in rows of several samples only."""
    ends = rest.pop("cu_seqlens")
    rest.pop("max_seqlen")
    if len(ends) == 2:
        return sdpa_attention_forward(module, query, key, value, None, **rest)
    diagonal = torch.eye(query.shape[2], dtype=torch.bool)[None, None]
    return sdpa_attention_forward(module, query, key, value, diagonal, **rest)


@pytest.mark.parametrize(
    ("attend", "said"),
    [
        (whole_row, r"sample 1 changes sample 2 of its row by"),
        (next_token_too, r"sample 2 changes sample 1 of its row by"),
        (only_in_rows, r"sample 1 of a row differs by .* from the same sample alone"),
    ],
)
@pytest.mark.parametrize("half", [False, True])
def test_a_leak_is_refused_with_a_remedy(attend: Callable[..., Any], said: str, half: bool) -> None:
    model, _ = tiny_model()
    with torch.no_grad():  # the size of attention's part in a trained model, not in a fresh one
        for layer in model.model.language_model.layers:
            layer.self_attn.o_proj.weight.mul_(20)
    register(model, attend)
    with pytest.raises(TrainingError, match=f"not isolated: {said}") as caught:
        prove_isolation(model, CPU, half)
    assert "Choose model.attention=sdpa" in str(caught.value)


def test_a_leak_in_a_fresh_model_is_caught_too() -> None:
    """Small weights make small leaks: rounding must be told apart from them."""
    model, _ = tiny_model()
    register(model, whole_row)
    with pytest.raises(TrainingError, match="sample 1 changes sample 2"):
        prove_isolation(model, CPU, half=False)


def test_nothing_of_the_model_or_the_random_state_changes() -> None:
    model, _ = tiny_model()
    use_attention(model, "sdpa")
    model.train()
    model.model.vision_tower.eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    layers, modes = model.model.language_model.layers, [module.training for module in model.modules()]
    state = torch.get_rng_state()
    prove_isolation(model, CPU, half=False)
    assert torch.equal(state, torch.get_rng_state())
    assert model.model.language_model.layers is layers
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(weight.grad is not None for weight in model.parameters())


def test_it_puts_everything_back_when_it_fails() -> None:
    model, _ = tiny_model()
    register(model, whole_row)
    layers = model.train().model.language_model.layers
    with pytest.raises(TrainingError):
        prove_isolation(model, CPU, half=False)
    assert model.training and model.model.language_model.layers is layers and len(layers) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("choice", [name for name in NAMES if name != "eager"])
def test_every_attention_that_runs_here_passes_on_the_gpu(choice: str) -> None:
    if why := obstacle(choice):
        pytest.skip(why)
    model, _ = tiny_model()
    use_attention(model, choice)
    prove_isolation(model, torch.device("cuda"), half=True)
    assert model.device.type == "cpu", "the weights are back where they were"
