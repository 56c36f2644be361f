"""For every template and every sample of every mix: the learned tokens are the answers, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.tiny import tiny_processor
from vlmtune.config.loader import load_mix
from vlmtune.data.render import TEMPLATES, Renderer
from vlmtune.data.sources import open_source
from vlmtune.models.tokenizer import train_tokenizer
from vlmtune.types import IGNORE, Size

ROOT = Path(__file__).parents[2]
MIXES = sorted((ROOT / "data_mixes").glob("*.yaml"))
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
ABSENT = {"cambrian_737k", "llava_665k", "llava_pretrain_558k"}
"""Mixes whose data nobody ships; a file of LLaVA's form stands in for them."""


def llava_records() -> list[dict]:
    """LLaVA-665K's shapes: one image first, last and in the middle of the turn, several turns, text only."""
    ask, answer = {"from": "human"}, {"from": "gpt"}
    texts = [
        "  Two spaces.",
        "Line\nbreak",
        "Ünïcödé ✓ 漢字",
        "ends with space ",
        "A. B",
        "<b>html</b> & more",
    ]
    shapes = [("<image>\n{}",), ("{}\n<image>",), ("<image>\n{}", "{}", "{}"), ("{}", "{}")]
    records = []
    for i in range(200):
        turns, words = [], np.random.default_rng(i)
        for form in shapes[i % 4]:
            turns.append(ask | {"value": form.format("What is " + str(words.integers(1000)) + "?")})
            turns.append(answer | {"value": texts[int(words.integers(len(texts)))]})
        marks = sum(turn["value"].count("<image>") for turn in turns)
        records.append({"id": i, "image": ["x.jpg"] * marks, "conversations": turns})
    return records


def sources(mix: Path, folder: Path):
    if mix.stem not in ABSENT:
        return [open_source(source, mix.parent, folder) for source in load_mix(mix).sources]
    (folder / "llava.json").write_text(json.dumps(llava_records()))
    stand_in = (
        load_mix(mix)
        .sources[0]
        .model_copy(update={"path": str(folder / "llava.json"), "images": str(folder)})
    )
    return [open_source(stand_in, folder, folder)]


def test_every_mix_and_template_is_collected():
    assert len(MIXES) >= 5 and {path.stem for path in MIXES} >= ABSENT
    assert NAMES == ["brief", "chatml", "llama3", "plain", "vicuna_v1", "vicuna_v1_sq"]


@pytest.mark.parametrize("template", NAMES)
@pytest.mark.parametrize("mix", MIXES, ids=lambda path: path.stem)
def test_decoded_labels_are_the_answers(mix, template, tmp_path):
    """LLaVA#1166 #1706: "tokenization mismatch (ignored)", and training went on."""
    opened = sources(mix, tmp_path)
    words = [turn.text for source in opened for row in range(0, len(source), 7) for turn in source[row].turns]
    tokenizer = train_tokenizer(words, 600, (TEMPLATES / f"{template}.jinja").read_text())
    renderer = Renderer(tokenizer, lambda width, height: 3, (TEMPLATES / f"{template}.jinja").read_text())
    image, special = renderer.image_token_id, set(tokenizer.all_special_tokens)
    checked, seen = 0, set()
    for source in opened:
        for row in range(len(source)):
            sample = source[row]
            checked += 1
            if sample.turns in seen:  # the same words again: labels depend on nothing else
                continue
            seen.add(sample.turns)
            rendered = renderer.render(sample, [Size(8, 8)] * len(sample.images))
            labels = np.array(rendered.labels)
            learned = labels != IGNORE
            assert image not in labels[learned], sample.key
            assert (labels[learned] == np.array(rendered.input_ids)[learned]).all(), sample.key
            assert rendered.input_ids.count(image) == 3 * len(sample.images), sample.key
            text = tokenizer.decode(labels[learned].tolist())
            for token in special:
                text = text.replace(token, "\n")
            answers = [turn.text for turn in sample.turns if turn.role == "assistant"]
            assert text.split() == " ".join(answers).split(), sample.key
    assert checked == sum(map(len, opened)) >= 200 and len(seen) >= 24


def test_the_processor_of_a_model_carries_the_template():
    """LLaVA#1778 #1237: train and inference templates differed."""
    for name in NAMES:
        processor = tiny_processor(name)
        assert processor.chat_template == (TEMPLATES / f"{name}.jinja").read_text()
