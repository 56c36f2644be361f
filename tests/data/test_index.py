from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from PIL import Image, ImageFile

from tests.tiny import TEXTS, tiny_images
from vlmtune.data import index
from vlmtune.data.images import image_size
from vlmtune.data.index import build_index
from vlmtune.data.render import Renderer, template_text
from vlmtune.errors import DataError
from vlmtune.models.tokenizer import train_tokenizer
from vlmtune.types import ChatSample, ImageRef, Turn


@dataclass(frozen=True)
class TallAreLong:
    """An image token count that depends on the size."""

    factor: int = 1

    def __call__(self, width: int, height: int) -> int:
        return self.factor * (height // 5)


@dataclass
class Listed:
    """A source in memory: sample i asks about image i; sample 3 cannot be read."""

    root: Path
    size: int
    name: str = "listed"
    fingerprint: str = "f0"
    slow: float = 0.0

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: int) -> ChatSample:
        time.sleep(self.slow)
        if row == 3:
            raise DataError("the line is not JSON", f"{self.name}#3")
        image = ImageRef(f"{row % 5}.png", self.root)
        turns = (Turn("user", f"<image>\nWhat? {'no ' * row}"), Turn("assistant", "" if row == 5 else "yes"))
        return ChatSample(f"{self.name}#{row}", (image,), turns)


@pytest.fixture
def source(tmp_path) -> Listed:
    tiny_images(tmp_path / "images", 5)
    return Listed(tmp_path / "images", 12)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(index, "_BLOCK", 2)
    monkeypatch.setattr(index, "_POLL", 0.01)


@cache
def tokenizer(vocab_size: int = 400):
    return train_tokenizer(TEXTS, vocab_size, template_text("vicuna_v1"))


def renderer(template: str = "vicuna_v1", factor: int = 1, vocab_size: int = 400) -> Renderer:
    return Renderer(tokenizer(vocab_size), TallAreLong(factor), template_text(template))


def test_lengths_are_those_of_the_rendered_samples(source, tmp_path, monkeypatch):
    """PITFALLS 19: from headers alone; decoding every image before step 0 took others hours."""

    def decoded(self):
        raise AssertionError("a pixel was decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", decoded)
    monkeypatch.setattr(Image.Image, "load", decoded)
    seen = []
    made = build_index(source, renderer(), tmp_path / "cache", lambda done, total: seen.append((done, total)))
    for row in set(range(12)) - {3, 5}:
        sample = source[row]
        sizes = [image_size(ref) for ref in sample.images]
        assert made.lengths[row] == len(renderer().render(sample, sizes).input_ids)
    assert made.lengths[[3, 5]].tolist() == [0, 0]
    assert made.images.tolist() == [1, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1, 1]
    assert made.reasons() == {3: "the line is not JSON", 5: "a supervised assistant turn is empty"}
    assert json.loads(made.faults.read_text().splitlines()[0])["key"] == "listed#3"
    assert seen == [(done, 12) for done in (2, 4, 6, 8, 10, 12)]


def test_missing_image_is_a_bad_sample(source, tmp_path):
    (source.root / "4.png").unlink()
    made = build_index(source, renderer(), tmp_path / "cache")
    assert made.lengths[[4, 9]].tolist() == [0, 0]
    assert made.reasons()[9] == "4.png: the image is missing"


def test_second_call_reads_the_file(source, tmp_path):
    first = build_index(source, renderer(), tmp_path / "cache")
    source.root = None  # any look at the data would fail
    again = build_index(source, renderer(), tmp_path / "cache", lambda done, total: pytest.fail("measured"))
    assert again.lengths.tolist() == first.lengths.tolist()


def test_key_holds_all_that_a_length_depends_on(source, tmp_path):
    folders = {build_index(source, renderer(), tmp_path / "cache").folder}
    assert folders == {build_index(source, renderer(), tmp_path / "cache").folder}
    folders.add(build_index(source, renderer("plain"), tmp_path / "cache").folder)
    folders.add(build_index(source, renderer(factor=2), tmp_path / "cache").folder)
    folders.add(build_index(source, renderer(vocab_size=410), tmp_path / "cache").folder)
    source.fingerprint = "f1"
    folders.add(build_index(source, renderer(), tmp_path / "cache").folder)
    assert len(folders) == 5


def test_padding_state_of_the_tokenizer_does_not_change_the_key(source, tmp_path):
    before = build_index(source, renderer(), tmp_path / "cache").folder
    tokenizer()(["a", "b b"], padding=True, truncation=True, max_length=5)
    assert build_index(source, renderer(), tmp_path / "cache").folder == before


def test_empty_source_has_an_empty_index(source, tmp_path):
    source.size = 0
    made = build_index(source, renderer(), tmp_path / "cache")
    assert made.lengths.tolist() == made.images.tolist() == []


def _start(source: Listed, cache: Path):
    process = multiprocessing.get_context("fork").Process(
        target=build_index, args=(source, renderer(), cache)
    )
    process.start()
    return process


def _alive(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _partial(cache: Path) -> Path:
    return next(path for path in (cache / "index").iterdir() if path.is_dir())


def _until(true) -> None:
    for _ in range(2000):
        if true():
            return
        time.sleep(0.005)
    pytest.fail("waited 10 s")


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_in_the_middle_it_goes_on(source, tmp_path, monkeypatch, processes):
    """SIGKILL may tear a block or a line; both are cut off, and no finished block is measured again.

    The processes that measured for the killed one end too, and hold no lock.
    """
    whole = build_index(source, renderer(), tmp_path / "whole")
    cache = tmp_path / "cache"
    source.slow = 0.05
    monkeypatch.setattr(index, "_PER_PROCESS", source.size // processes)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    process = _start(source, cache)
    _until(lambda: any(cache.glob("index/.*/lengths")))
    _until(lambda: (_partial(cache) / "lengths").stat().st_size >= 4 * 6)
    forks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    partial = _partial(cache)
    assert partial.name.startswith("."), "it was killed before the end"
    assert len(forks) == (processes if processes > 1 else 0)
    _until(lambda: not any(map(_alive, forks)))
    for name, torn in (("images", b"\1\2\3"), ("faults.jsonl", b'{"row": 11, "reason": "x"}\n{"row": 1')):
        with (partial / name).open("ab") as file:
            file.write(torn)
    first = []
    made = build_index(source, renderer(), cache, lambda done, total: first.append(done))
    assert first[0] >= 8
    assert made.lengths.tolist() == whole.lengths.tolist()
    assert made.images.tolist() == whole.images.tolist()
    assert made.reasons() == whole.reasons()


def test_another_process_waits_and_reads(source, tmp_path):
    source.slow = 0.02
    process = _start(source, tmp_path / "cache")
    _until(
        lambda: (
            (tmp_path / "cache" / "index").exists() and any((tmp_path / "cache" / "index").glob(".*/lengths"))
        )
    )
    made = build_index(
        source, renderer(), tmp_path / "cache", lambda done, total: pytest.fail("measured twice")
    )
    process.join()
    assert len(made.lengths) == 12


def test_waiting_for_a_process_that_does_not_get_on_says_so(source, tmp_path, monkeypatch):
    monkeypatch.setattr(index, "_PATIENCE", 0.2)
    source.slow = 30
    process = _start(source, tmp_path / "cache")
    _until(lambda: any((tmp_path / "cache").glob("index/.*/faults.jsonl")))
    try:
        with pytest.raises(DataError, match=r"token index of source listed, .*stays at 0 of 12 samples"):
            build_index(source, renderer(), tmp_path / "cache")
    finally:
        process.kill()
        process.join()


def test_many_samples_are_measured_by_several_processes(source, tmp_path, monkeypatch):
    alone = build_index(source, renderer(), tmp_path / "alone")
    monkeypatch.setattr(index, "_PER_PROCESS", 6)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    together = build_index(source, renderer(), tmp_path / "together")
    assert together.lengths.tolist() == alone.lengths.tolist()
    assert together.reasons() == alone.reasons()
