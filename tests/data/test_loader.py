from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pickle
import signal
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import tiny_images, tiny_model
from vlmtune.config.mix import Mix
from vlmtune.config.schema import ChatStreamConfig, HeldOutConfig
from vlmtune.data.loader import ChatData, step_loader
from vlmtune.errors import DataError
from vlmtune.models.vision import token_counter
from vlmtune.types import IGNORE, ChatBatch

NO_HELD_OUT = HeldOutConfig(fraction=0.0)


@cache
def model_parts():
    model, processor = tiny_model()
    return processor, token_counter(model.config)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Two sources: `talk` (21 samples of 0 to 2 images, rows 4 and 9 bad) and `short` (5 samples)."""
    folder = tmp_path_factory.mktemp("data")
    names = tiny_images(folder / "images", 8)
    whole = (folder / "images" / names[7]).read_bytes()
    (folder / "images" / "torn.png").write_bytes(whole[: len(whole) // 2])
    (folder / "talk.json").write_text(json.dumps([_talk(row, names) for row in range(21)]))
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"hi {row}"},
                {"role": "assistant", "content": f"yes {row}"},
            ]
        }
        for row in range(5)
    ]
    (folder / "short.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def _talk(row: int, names: list[str]) -> dict:
    """Row 4 names an image that is not there; that of row 9 is cut off, which its header does not show."""
    images = [names[row % 7], names[(row + 1) % 7]][: row % 3]
    if row in (4, 9):
        images = ["gone.png" if row == 4 else "torn.png"]
    turns = []
    for question in range(1 + row % 4):
        marks = "<image>\n" * len(images) if question == 0 else ""
        turns += [
            {"from": "human", "value": f"{marks}Question {question} of {row}?"},
            {"from": "gpt", "value": f"answer {question} " + "no " * row},
        ]
    return {"id": str(row), "image": images, "conversations": turns} if images else {"conversations": turns}


MIX = {
    "sources": [
        {"name": "talk", "format": "llava_json", "path": "talk.json", "images": "images"},
        {"name": "short", "format": "chat_jsonl", "path": "short.jsonl", "weight": 2.0},
    ]
}


def chat_data(base: Path, held_out: HeldOutConfig = NO_HELD_OUT, seed: int = 0, **config) -> ChatData:
    settings = {"mix": "m", "batch_size": 6, "micro_tokens": 500, "max_length": 500, "workers": 0} | config
    stream = ChatStreamConfig.model_validate(settings)
    return ChatData(stream, Mix.model_validate(MIX), base, *model_parts(), held_out, seed, base / "cache")


def same(one: list[ChatBatch], other: list[ChatBatch]) -> bool:
    """Equal bit for bit."""
    return pickle.dumps([_plain(batch) for batch in one]) == pickle.dumps([_plain(batch) for batch in other])


def _plain(batch: ChatBatch) -> list:
    values = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    return [value.numpy().tobytes() if isinstance(value, torch.Tensor) else str(value) for value in values]


def keys(batches: list[ChatBatch]) -> list[str]:
    return sorted(key for batch in batches for key in batch.keys)


def learned(batches: list[ChatBatch]) -> int:
    return sum(int((batch.labels != IGNORE).sum()) for batch in batches)


AUGMENTED = {"augment": {"shift": 3, "flip_horizontal": True}, "transforms": [{"type": "shuffle_turns"}]}


def test_an_epoch_has_every_sample_as_often_as_the_mix_says(base):
    data = chat_data(base)
    assert (data.samples, data.order.epoch_size, data.steps_per_epoch) == (26, 31, 6)
    seen = [key for step in range(6) for key in keys(data.step(step, 0, 1))]
    expected = [f"talk#{row}" for row in range(21)] + [f"short#{row}" for row in range(5)] * 2
    assert sorted(seen) == sorted(expected)
    assert [len(keys(data.step(step, 0, 1))) for step in range(7)] == [6, 6, 6, 6, 6, 1, 6]


def test_steps_do_not_depend_on_the_order_they_are_asked_in(base):
    """PITFALLS 21: resuming at step k replays nothing."""
    data = chat_data(base, **AUGMENTED)
    ahead = [data.step(step, 0, 1) for step in range(8)]
    fresh = chat_data(base, **AUGMENTED)
    assert all(same(fresh.step(step, 0, 1), ahead[step]) for step in (7, 2, 5, 0))


@pytest.mark.parametrize("world", [1, 2])
def test_the_heaviest_micro_batches_are_those_of_the_epoch(base, world):
    """PITFALLS 25: what will not fit is met before the first step."""
    data = chat_data(base)
    for rank in range(world):
        tokens, images = data.stream(rank, world).heaviest()
        micros = [each for step in range(data.steps_per_epoch) for each in data.step(step, rank, world)]
        assert images.images == max(micro.images for micro in micros) > 0
        assert tokens.input_ids.numel() >= 0.9 * max(micro.input_ids.numel() for micro in micros)


def test_workers_change_nothing(base):
    data = chat_data(base, **AUGMENTED)
    before = torch.random.get_rng_state()
    alone = list(step_loader(data, 0, 1, 3, 9, workers=0))
    together = list(step_loader(data, 0, 1, 3, 9, workers=2))
    assert len(alone) == len(together) == 6
    assert all(same(one, other) for one, other in zip(alone, together, strict=True))
    assert torch.equal(torch.random.get_rng_state(), before), "a resumed run would draw other numbers"


@settings(max_examples=15, deadline=None)
@given(
    step=st.integers(0, 12),
    world=st.integers(1, 7),
    budget=st.integers(500, 900),
    packing=st.sampled_from(["isolated", "none"]),
)
def test_world_and_packing_change_only_who_computes_what(base, step, world, budget, packing):
    data = chat_data(base, packing=packing, micro_tokens=budget)
    alone = data.step(step, 0, 1)
    ranks = [data.step(step, rank, world) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    spread = [batch for rank in ranks for batch in rank]
    assert keys(spread) == keys(alone) == keys(chat_data(base).step(step, 0, 1))
    assert learned(spread) == learned(alone)
    assert sorted(bad for batch in spread for bad in batch.bad) == sorted(
        bad for batch in alone for bad in batch.bad
    )
    for batch in spread:
        assert batch.input_ids.numel() <= budget
        pixels = batch.images
        assert int((batch.input_ids == data._encoder.renderer.image_token_id).sum()) == 16 * pixels


def test_seed_and_epoch_change_the_order_and_the_draws(base):
    data, other = chat_data(base, **AUGMENTED), chat_data(base, seed=1, **AUGMENTED)
    assert data.order.epoch(0).tolist() != data.order.epoch(1).tolist()
    assert data.order.epoch(0).tolist() != other.order.epoch(0).tolist()
    source, row = data.find("talk#2")
    first = data.encode(source, row, np.random.default_rng(1))
    assert torch.equal(first.pixel_values, data.encode(source, row, np.random.default_rng(1)).pixel_values)
    assert not torch.equal(
        first.pixel_values, data.encode(source, row, np.random.default_rng(2)).pixel_values
    )


def test_bad_samples_keep_their_slot_and_are_named(base):
    """PITFALLS 20: nothing stops, nothing is swapped, the reason travels with the batch."""
    data = chat_data(base, batch_size=31)
    batches = data.step(0, 0, 1)
    reasons = dict(bad for batch in batches for bad in batch.bad)
    assert set(reasons) == {"talk#4", "talk#9"}
    assert "gone.png: the image is missing" in reasons["talk#4"]
    assert "torn.png: the image cannot be read" in reasons["talk#9"]
    assert [key for key, _ in data.known_bad()] == ["talk#4"], "what headers show is known before step 0"
    assert {"talk#4", "talk#9"} <= set(keys(batches))
    source, row = data.find("talk#9")
    slot = data.encode(source, row, None)
    assert (slot.input_ids.tolist(), slot.labels.tolist()) == (
        [model_parts()[0].tokenizer.pad_token_id],
        [IGNORE],
    )


def test_overlong_is_dropped_or_shortened_or_refused(base):
    long = max(chat_data(base).indices[0].lengths)
    config = {"max_length": 160, "micro_tokens": 160}
    over = {f"talk#{row}" for row in np.flatnonzero(chat_data(base).indices[0].lengths > 160)}
    assert over
    assert long > 160

    dropped = chat_data(base, overlong="drop", batch_size=100, **config)
    assert not over & set(keys(dropped.step(0, 0, 1)))
    assert dropped.order.epoch_size == 31 - len(over)
    assert f"{len(over)} over 160 tokens left out" in dropped.summary()

    shortened = chat_data(base, overlong="shorten", batch_size=100, **config)
    batches = shortened.step(0, 0, 1)
    assert all(int(batch.cu_seqlens.diff().max()) <= 160 for batch in batches)
    kept = over & set(keys(batches))
    assert kept, "those whose first pair fits"
    assert f"{len(kept)} over 160 tokens shortened" in shortened.summary()
    assert not {key for batch in batches for key, _ in batch.bad} & over
    for key in kept:
        source, row = shortened.find(key)
        assert len(shortened.encode(source, row, None).input_ids) == shortened._parts[source].planned[row]

    with pytest.raises(DataError, match=f"{len(over)} samples are too long") as caught:
        chat_data(base, overlong="error", **config)
    assert all(f"{key}: " in str(caught.value) for key in over)


def test_held_out_samples_are_measured_never_trained_on(base):
    data = chat_data(base, HeldOutConfig(fraction=0.3, most=5), **AUGMENTED)
    batches = {name: list(part) for name, part in data.held_out().items()}
    held = {key for part in batches.values() for key in keys(part)}
    assert {name: len(keys(part)) for name, part in batches.items()} == {"talk": 5, "short": 1}
    trained = {key for step in range(3 * data.steps_per_epoch) for key in keys(data.step(step, 0, 1))}
    assert not held & trained
    assert len(held | trained) == 26
    other = chat_data(base, HeldOutConfig(fraction=0.3, most=5), seed=5)
    assert {key for part in other.held_out().values() for key in keys(part)} == held, "for every run seed"
    again = {name: list(part) for name, part in data.held_out().items()}
    assert all(same(again[name], batches[name]) for name in batches), "no draw is made for them"
    ranks = [data.held_out(rank, 2)["talk"] for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    assert keys([*ranks[0], *ranks[1]]) == keys(batches["talk"])


def test_held_out_samples_for_generation_take_turns(base):
    data = chat_data(base, HeldOutConfig(fraction=0.3, most=5))
    sources = [sample.key.partition("#")[0] for sample in data.held_out_samples(3)]
    assert sources == ["talk", "short", "talk"]
    assert chat_data(base).held_out_samples(3) == []


def test_stream_is_one_ranks_view(base):
    data = chat_data(base, HeldOutConfig(fraction=0.3, most=5))
    stream = data.stream(1, 2)
    assert stream.steps_per_epoch == data.steps_per_epoch
    assert same(next(iter(stream.steps(2, 3))), data.step(2, 1, 2))
    assert stream.held_out() is stream.held_out()
    assert keys(stream.held_out()["talk"][:]) == keys(list(data.held_out(1, 2)["talk"]))


def test_unknown_key_lists_what_there_is(base):
    with pytest.raises(DataError, match=r"talk#99: the mix has no such sample\. .* talk#20, short#4"):
        chat_data(base).find("talk#99")


def test_a_workers_error_reaches_the_trainer(base, monkeypatch):
    def fail(*_):
        raise MemoryError("what no policy covers")

    monkeypatch.setattr(ChatData, "step", fail)
    with pytest.raises(MemoryError, match="in DataLoader worker process 0"):
        list(step_loader(chat_data(base), 0, 1, 0, 2, workers=1))


def _children() -> set[int]:
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_workers_outlive_a_signal_to_the_group(base, sent):
    """A scheduler's SIGTERM to every process must not take the workers from a trainer that is about to save."""
    before = _children()
    steps = step_loader(chat_data(base), 0, 1, 0, 6, workers=1)
    next(steps)
    (worker,) = _children() - before
    os.kill(worker, sent)
    assert len(list(steps)) == 5


_kept = []
"""Keeps a loader alive to the end of its process, as a traceback does."""


def _leave_in_the_middle(data: ChatData) -> None:
    _kept.append(step_loader(data, 0, 1, 0, 6, workers=2))
    next(_kept[0])


def test_a_trainer_that_fails_in_the_middle_can_exit(base):
    """At exit Python terminates the workers and waits for them: they must not outlive that."""
    trainer = multiprocessing.get_context("fork").Process(
        target=_leave_in_the_middle, args=(chat_data(base),)
    )
    trainer.start()
    trainer.join(20)
    ended = trainer.exitcode
    trainer.kill()
    assert ended == 0
