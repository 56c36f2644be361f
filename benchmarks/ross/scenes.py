"""Pictures of a few tiny shapes, and questions by kind: how many, what colour, what shape, where, whether.

A shape is 9 to 11 pixels wide on 64 x 64, one or two patches of the tower: what language alone cannot guess and a
coarse look misses. Answers are balanced within a kind as far as a scene allows. Everything follows from a seed.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from vlmtune.types import IMAGE_MARK, ChatSample, ImageRef, Turn

SIDE = 64
COLORS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 80, 200),
    "yellow": (240, 200, 20),
    "black": (20, 20, 20),
    "purple": (140, 60, 180),
}
SHAPES = ("circle", "square", "triangle")
NUMBERS = ("zero", "one", "two", "three", "four")
CAPTION_PROMPT = "describe the image."


@dataclass(frozen=True)
class Thing:
    """A shape with its centre and half its width, in pixels."""

    color: str
    shape: str
    x: int
    y: int
    half: int

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    answer: str


def scene(rng: np.random.Generator) -> list[Thing]:
    """One to four things with different names that do not touch, from left to right."""
    names = [(color, shape) for color in COLORS for shape in SHAPES]
    chosen = rng.choice(len(names), size=int(rng.integers(1, 5)), replace=False)
    things: list[Thing] = []
    for color, shape in (names[place] for place in chosen):
        half = int(rng.integers(4, 6))
        while True:
            x, y = (int(each) for each in rng.integers(half + 1, SIDE - half - 1, size=2))
            if all(max(abs(x - each.x), abs(y - each.y)) > half + each.half + 2 for each in things):
                break
        things.append(Thing(color, shape, x, y, half))
    return sorted(things, key=lambda each: each.x)


def draw(things: list[Thing], rng: np.random.Generator) -> Image.Image:
    """The picture, on a light background of a chance colour."""
    picture = Image.new("RGB", (SIDE, SIDE), tuple(int(each) for each in rng.integers(225, 256, size=3)))
    pen = ImageDraw.Draw(picture)
    for each in things:
        box = (each.x - each.half, each.y - each.half, each.x + each.half, each.y + each.half)
        color = COLORS[each.color]
        if each.shape == "circle":
            pen.ellipse(box, fill=color)
        elif each.shape == "square":
            pen.rectangle(box, fill=color)
        else:
            pen.polygon([(box[0], box[3]), (box[2], box[3]), (each.x, box[1])], fill=color)
    return picture


def caption(things: list[Thing]) -> str:
    """What there is, from left to right."""
    return " and ".join(f"a {each.name}" for each in things)


def questions(things: list[Thing], rng: np.random.Generator) -> list[Question]:
    """At most one question of each kind."""
    asked = [
        _count(things, rng),
        _presence(things, rng),
        _color(things),
        _shape(things),
        _position(things, rng),
    ]
    return [each for each in asked if each is not None]


def _count(things: list[Thing], rng: np.random.Generator) -> Question:
    if rng.random() < 0.5:
        return Question("count", "how many shapes are there?", NUMBERS[len(things)])
    shape = SHAPES[rng.integers(len(SHAPES))]
    number = sum(each.shape == shape for each in things)
    return Question("count", f"how many {shape}s are there?", NUMBERS[number])


def _presence(things: list[Thing], rng: np.random.Generator) -> Question:
    """A no is hard: where there can be one, its colour and its shape are both there, in different things."""
    present = {each.name for each in things}
    if rng.random() < 0.5:
        name, answer = sorted(present)[rng.integers(len(present))], "yes"
    else:
        colors, shapes = {each.color for each in things}, {each.shape for each in things}
        near = [f"{color} {shape}" for color in sorted(colors) for shape in sorted(shapes)]
        far = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
        absent = [each for each in near if each not in present] or [
            each for each in far if each not in present
        ]
        name, answer = absent[rng.integers(len(absent))], "no"
    return Question("presence", f"is there a {name}?", answer)


def _color(things: list[Thing]) -> Question | None:
    counts = Counter(each.shape for each in things)
    single = [each for each in things if counts[each.shape] == 1]
    return Question("color", f"what color is the {single[0].shape}?", single[0].color) if single else None


def _shape(things: list[Thing]) -> Question | None:
    counts = Counter(each.color for each in things)
    single = [each for each in things if counts[each.color] == 1]
    return Question("shape", f"what shape is {single[-1].color}?", single[-1].shape) if single else None


def _position(things: list[Thing], rng: np.random.Generator) -> Question | None:
    """Which of two is on the left or above; at least six pixels apart on that axis."""
    if len(things) < 2:
        return None
    first, second = (things[place] for place in rng.choice(len(things), size=2, replace=False))
    across = bool(rng.random() < 0.5)
    gap = second.x - first.x if across else second.y - first.y
    if abs(gap) < 6:
        return None
    word = "left of" if across else "above"
    return Question("position", f"is the {first.name} {word} the {second.name}?", "yes" if gap > 0 else "no")


# ---------------------------------------------------------------- files


def write_split(folder: Path, count: int, seed: int) -> None:
    """Writes pictures, questions.json, captions.json (llava_json) and test.jsonl, unless they are there."""
    done = folder / "test.jsonl"
    if done.exists():
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    asked, told, rows = [], [], []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        things = scene(rng)
        draw(things, rng).save(folder / "images" / f"{number}.png")
        told.append(_record(number, CAPTION_PROMPT, caption(things)))
        for each in questions(things, rng):
            asked.append(_record(number, each.text, each.answer))
            rows.append(
                {"image": f"{number}.png", "kind": each.kind, "text": each.text, "answer": each.answer}
            )
    (folder / "questions.json").write_text(json.dumps(asked))
    (folder / "captions.json").write_text(json.dumps(told))
    done.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _record(number: int, question: str, answer: str) -> dict[str, object]:
    turns = [{"from": "human", "value": f"{IMAGE_MARK}\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": str(number), "image": f"{number}.png", "conversations": turns}


def test_samples(folder: Path) -> list[ChatSample]:
    """The questions of a split with their kinds, ready to be asked."""
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    return [
        ChatSample(
            f"scenes#{number}",
            (ImageRef(row["image"], folder / "images"),),
            (Turn("user", f"{IMAGE_MARK}\n{row['text']}"), Turn("assistant", row["answer"])),
            f"tiny {row['kind']}",
        )
        for number, row in enumerate(rows)
    ]
