"""What a rank keeps, by the published arithmetic: 2 + 2 + 12 bytes a weight in mixed precision (arXiv 1910.02054)."""

from __future__ import annotations

import pytest

from vlmtune.planning.skeleton import Weight
from vlmtune.planning.strategies import STRATEGIES, Held, Setting

N = 8_000_000
TRAINED = Weight("model.language_model.layers.0.w", "language", N, 2 * N, 2, True, "layers.0.")
FROZEN = Weight("model.vision_tower.w", "vision", N, 2 * N, 2, False, "")
WIDE = Weight("model.language_model.w", "language", N, 4 * N, 4, True, "")

RAJBHANDARI = {
    # parameters, gradients, optimizer and masters on the device; on the host
    "zero1": (2 * N, 2 * N, 12 * N // 8, 0),
    "zero2": (2 * N, 4 * N // 8, 12 * N // 8, 0),  # micro-batches add up in float32
    "zero3": (2 * N // 8, 4 * N // 8, 12 * N // 8, 0),
    "zero3_offload": (2 * N // 8, 0, 0, 16 * N // 8),
    "ddp": (2 * N, 2 * N, 4 * N + 4, 0),  # torch keeps the weight's own type
    "fsdp2": (2 * N // 8, 2 * N // 8, (4 * N + 4 + 7) // 8, 0),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_trained_weight_takes_what_the_papers_say(name: str) -> None:
    setting = Setting(STRATEGIES[name], 8, half=True)
    assert setting.held(TRAINED) == Held(*RAJBHANDARI[name])
    kept = 2 * N // 8 if STRATEGIES[name].stage == 3 else 2 * N
    assert setting.held(FROZEN) == Held(kept)


def test_zero_in_bfloat16_holds_float32_weights_as_masters_only() -> None:
    assert Setting(STRATEGIES["zero2"], 1, half=True).held(WIDE) == Held(2 * N, 4 * N, 12 * N)
    assert Setting(STRATEGIES["zero2"], 1, half=False).held(WIDE) == Held(4 * N, 4 * N, 12 * N)
    assert Setting(STRATEGIES["ddp"], 1, half=True).held(WIDE) == Held(4 * N, 4 * N, 8 * N + 4)


def test_buffers_are_those_of_each_library() -> None:
    weights = [TRAINED, FROZEN]
    assert Setting(STRATEGIES["ddp"], 1, half=True).buffers(weights) == 0
    assert Setting(STRATEGIES["ddp"], 8, half=True).buffers(weights) == 2 * N  # the gradients once more
    assert Setting(STRATEGIES["zero2"], 8, half=True).buffers(weights) == 10**9
    assert Setting(STRATEGIES["zero3"], 8, half=True).buffers(weights) == 10**9 + 4 * N  # all of it is live
    # Root: the tower. Blocks: one, counted twice. Its gradient: bfloat16, and float32 to be summed.
    assert Setting(STRATEGIES["fsdp2"], 8, half=True).buffers(weights) == 2 * N + 4 * N + 6 * N


def test_traffic_grows_with_what_is_shared_out() -> None:
    def sent(name: str, micro_batches: float) -> float:
        return Setting(STRATEGIES[name], 8, half=True).traffic([TRAINED, FROZEN], micro_batches)[0]

    ring = 7 / 8
    assert sent("ddp", 4) == sent("zero1", 4) == ring * 4 * N
    assert sent("zero2", 4) == ring * (4 * 2 * N + 2 * N)
    assert sent("zero3", 4) == ring * (4 * 2 * N + 4 * 2 * 4 * N)
    assert Setting(STRATEGIES["zero3_offload"], 8, half=True).traffic([TRAINED], 1)[1] == 4 * N / 8
