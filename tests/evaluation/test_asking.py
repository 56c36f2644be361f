"""Asking: prompts as in training, draws that nobody else changes, and a file that `train` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from tests.tiny import tiny_images, tiny_model
from vlmtune.cli import app
from vlmtune.config.loader import load_mix
from vlmtune.data.render import Renderer, template_text
from vlmtune.data.sources import open_source
from vlmtune.errors import DataError
from vlmtune.evaluation import asking as asking_module
from vlmtune.evaluation import generate, question_file
from vlmtune.evaluation.asking import Asked, Asking, Question, ask, distinct, question_statistics
from vlmtune.evaluation.chat import Conversation
from vlmtune.evaluation.decode import Prompt, Sampler
from vlmtune.evaluation.generate import Completion, answer
from vlmtune.evaluation.question_file import ask_pictures, picture_files, records
from vlmtune.models.attention import use_attention
from vlmtune.models.vision import ImageTokens
from vlmtune.types import ChatSample, ImageRef, Size, Turn

SHORT = {"max_new_tokens": 12, "max_answer_tokens": 5}


def ready() -> tuple[Any, Any]:
    """A model whose scaled fresh weights tell prompts and pictures apart."""
    model, processor = tiny_model(template="brief")
    use_attention(model, "auto")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    return model, processor


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any]:
    return ready()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    model, processor = ready()
    out = tmp_path_factory.mktemp("model")
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return str(out)


def scenes(folder: Path, count: int) -> list[tuple[ImageRef, ...]]:
    return [(ImageRef(name, folder),) for name in tiny_images(folder, count)]


# ---------------------------------------------------------------- draws


def test_draws_follow_the_warped_distribution():
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -9.0]])
    prompts = [Prompt(index, [], ()) for index in range(4000)]
    sampler = Sampler(1.2, 4, 0.95, {index: (index,) for index in range(4000)})
    drawn = torch.bincount(sampler(logits.repeat(4000, 1), prompts), minlength=5) / 4000
    expected = (logits[0, :4] / 1.2).softmax(0)
    assert drawn[4] == 0
    torch.testing.assert_close(drawn[:4], expected, atol=0.03, rtol=0)
    assert Sampler(1.0, 1, 1.0, {0: (0,)})(logits, prompts[:1]).tolist() == [0]
    nucleus = Sampler(1.0, 5, 0.5, {index: (index,) for index in range(4000)})(
        logits.repeat(4000, 1), prompts
    )
    assert set(nucleus.tolist()) == {0}


def test_a_draw_is_the_same_alone_and_in_company(tmp_path: Path, parts: tuple[Any, Any]):
    given = scenes(tmp_path, 4)
    asking = Asking(3, first_turn=True, **SHORT)
    together = ask(*parts, given, asking, batch_size=64)
    alone = [ask(*parts, [scene], asking, batch_size=1)[0] for scene in given]
    assert together == alone
    texts = [question.text for each in together for question in each.questions]
    assert len(texts) == 12 and len(set(texts)) >= 10  # shots and pictures draw apart
    assert ask(*parts, given[:1], Asking(3, True, seed=1, **SHORT)) != together[:1]


@pytest.mark.parametrize("first_turn", [False, True])
def test_the_prompts_are_those_of_training(
    tmp_path: Path, parts: tuple[Any, Any], first_turn: bool, monkeypatch: pytest.MonkeyPatch
):
    """What stands before a question, and before its answer, is what stands there in a training sample."""
    model, processor = parts
    seen: list[Prompt] = []
    complete = asking_module.complete
    monkeypatch.setattr(asking_module, "complete", lambda *given: seen.extend(given[2]) or complete(*given))
    (asked,) = ask(model, processor, scenes(tmp_path, 1), Asking(1, first_turn, **SHORT))
    turns = (*asked.context, Turn("questioner", "What is it?"), Turn("assistant", "red"))
    renderer = Renderer(processor.tokenizer, ImageTokens(16), template_text("brief"))
    trained = renderer.render(ChatSample("k#0", asked.images, turns), [Size(8, 8)]).input_ids
    (prompt,) = seen
    assert trained[: len(prompt.ids)] == prompt.ids
    text = processor.tokenizer.decode(prompt.ids).replace("<image>" * 16, "<image>")
    assert text.endswith("USER: <image> VUSER:" if first_turn else "</s>VUSER:")
    assert [turn.role for turn in asked.context] == (["user"] if first_turn else ["user", "assistant"])


def test_answers_belong_to_their_questions(
    tmp_path: Path, parts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
):
    """Only questions that ended are answered, each as if it were the only one."""
    monkeypatch.setattr(generate, "_ends", lambda model, processor: torch.arange(0, 500, 7))
    given = scenes(tmp_path, 3)
    free = ask(*parts, given, Asking(3, first_turn=True, **SHORT))
    monkeypatch.setattr(asking_module, "complete", lambda *given: replay(free))
    asked = ask(*parts, given, Asking(3, first_turn=True, answers=True, **SHORT))
    ended = 0
    for scene, each in zip(given, asked, strict=True):
        for one in each.questions:
            turns = (*each.context, Turn("questioner", one.text))
            sample = ChatSample("k", scene, turns)
            (alone,) = answer(*parts, [sample], 1, 5) if one.ended and one.text else (None,)
            assert one.answer == (alone.prediction if alone else "")
            ended += bool(alone)
    assert ended >= 3 and len({one.answer for each in asked for one in each.questions}) >= 3


def replay(found: list[Asked]) -> Iterator[list[Completion]]:
    questions = [question for each in found for question in each.questions]
    yield [Completion(place, one.text, one.ended) for place, one in enumerate(questions)]


# ---------------------------------------------------------------- the file


def fake_ask(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    """Questions without a model: what is written and skipped does not depend on it."""

    def asked(model: Any, processor: Any, given: Any, asking: Asking, batch_size: int) -> list[Asked]:
        found = []
        for (image,) in given:
            calls.append(image.name)
            if image.name.startswith("bad"):
                found.append(Asked(image.name, (image,), error="not an image"))
                continue
            context = (Turn("user", "<image>"),)
            if not asking.first_turn:
                context = (Turn("user", "<image>\nDescribe it."), Turn("assistant", "a red circle"))
            questions = (
                Question("what color?", True, "red"),
                Question("what color?", True, "red"),
                Question("a circle?", True, "yes"),
                Question("never ended", False),
            )
            found.append(Asked(image.name, (image,), context, questions))
        return found

    monkeypatch.setattr(question_file, "ask", asked)
    monkeypatch.setattr(question_file, "open_model", lambda path: (None, None))


def opened(mix: Path, tmp_path: Path) -> list[ChatSample]:
    (source,) = [open_source(each, mix.parent, tmp_path / "cache") for each in load_mix(mix).sources]
    return [source[row] for row in range(len(source))]


@pytest.mark.parametrize(
    ("first_turn", "answers", "roles", "lines"),
    [(True, False, "uq", 2), (False, False, "uaq", 2), (True, True, "uaua", 1), (False, True, "uauaua", 1)],
)
def test_what_is_written_is_read_and_rendered(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    parts: Any,
    first_turn: bool,
    answers: bool,
    roles: str,
    lines: int,
):
    fake_ask(monkeypatch, [])
    tiny_images(tmp_path / "images", 2)
    report = ask_pictures(
        "m", [tmp_path / "images"], tmp_path / "q" / "out.jsonl", Asking(4, first_turn, answers)
    )
    samples = opened(report.mix, tmp_path)
    assert len(samples) == 2 * lines and report.pictures == 2 and report.bad == 0
    renderer = Renderer(parts[1].tokenizer, ImageTokens(16), template_text("vicuna_v1_sq"))
    for sample in samples:
        assert "".join(turn.role[0] for turn in sample.turns) == roles
        assert renderer.render(sample, [Size(8, 8)]).input_ids.count(renderer.image_token_id) == 16
    words = [turn.text for sample in samples for turn in sample.turns]
    assert sum("what color?" in text for text in words) == 2 and "never ended" not in words  # once a picture


def test_a_second_run_goes_on_and_bad_pictures_stop_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    fake_ask(monkeypatch, calls)
    images, out = tmp_path / "images", tmp_path / "out.jsonl"
    tiny_images(images, 3)
    (images / "bad.png").write_bytes(b"nothing")
    first = ask_pictures("m", [images / "0.png", images / "bad.png"], out, Asking(4))
    assert (first.pictures, first.skipped, first.bad) == (1, 0, 1)
    out.write_text(out.read_text() + '{"images": ["1.png"], "mess')  # killed while writing
    seen: list[tuple[int, int]] = []
    second = ask_pictures("m", [images], out, Asking(4), 4, lambda *done: seen.append(done))
    assert (second.pictures, second.skipped, second.bad) == (2, 1, 1)
    assert calls == ["0.png", "bad.png", "1.png", "2.png", "bad.png"] and seen[-1] == (4, 4)
    assert len(opened(second.mix, tmp_path)) == 6
    (note,) = (tmp_path / "out.quarantine.jsonl").read_text().splitlines()
    assert json.loads(note) == {"key": "bad.png", "reason": "not an image"}
    with pytest.raises(DataError, match="Choose another --out"):
        ask_pictures("m", tiny_paths(tmp_path / "elsewhere"), out, Asking(4))


def tiny_paths(folder: Path) -> list[Path]:
    return [folder / name for name in tiny_images(folder, 1)]


def test_pictures_come_from_files_and_folders_once(tmp_path: Path):
    tiny_images(tmp_path / "a", 2)
    (tmp_path / "a" / "note.txt").write_text("no picture")
    found = list(picture_files([tmp_path / "a" / "1.png", tmp_path / "a"]))
    assert [path.name for path in found] == ["1.png", "0.png"]
    for wrong in (tmp_path / "missing", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(DataError, match=wrong.name):
            list(picture_files([wrong]))


def test_unanswered_questions_make_no_conversation():
    asked = Asked("k", (ImageRef("x.png"),), (Turn("user", "<image>"),), (Question("why?", True),))
    assert records(asked, answers=True) == []
    (line,) = records(asked, answers=False)
    assert [message["role"] for message in line["messages"]] == ["user", "questioner"]


def test_the_command_asks_and_a_real_model_answers(tmp_path: Path, folder: str):
    images = tmp_path / "images"
    tiny_images(images, 2)
    (images / "cut.png").write_bytes((images / "0.png").read_bytes()[:40])
    out = tmp_path / "q.jsonl"
    command = ["ask", folder, str(images), "--out", str(out), "--first-turn", "--number", "2"]
    result = CliRunner().invoke(app, [*command, "--max-new-tokens", "300", "--temperature", "2.0"])
    assert result.exit_code == 0, result.output
    assert "2 pictures asked about, 0 were in the file, 1 unreadable" in result.output
    assert yaml.safe_load(out.with_suffix(".yaml").read_text())["sources"][0]["images"] == str(
        images.resolve()
    )
    assert "cut.png" in out.with_suffix(".quarantine.jsonl").read_text()


def test_chat_lets_the_model_ask(tmp_path: Path, folder: str, monkeypatch: pytest.MonkeyPatch):
    (name,) = tiny_images(tmp_path, 1)
    talk = Conversation(folder, [tmp_path / name], 4)
    monkeypatch.setattr(
        "vlmtune.evaluation.chat.ask",
        lambda model, processor, given, asking: [
            Asked("k", given[0], (), (Question("what?", True, "red"),) * asking.number)
        ],
    )
    assert talk.questions(2, first_turn=True) == (Question("what?", True, "red"),)
    with pytest.raises(DataError, match="no picture to ask about"):
        Conversation(folder, [], 4).questions(1, first_turn=True)


# ---------------------------------------------------------------- statistics


def test_distinct_n_and_shares():
    texts = ["what is it?", "what is that?", "A B"]
    assert distinct(texts, 1) == 6 / 8 and distinct(texts, 2) == 4 / 5
    assert distinct([], 1) == 0 == distinct(["one"], 2)
    found = question_statistics([Question(text, True) for text in texts] + [Question("what", False)])
    assert (found.questions, found.ended, found.question_marks) == (4, 0.75, 0.5)
    assert "distinct-1" in found.lines()[0]


def test_seeds_of_draws_are_apart():
    numbers = {np.random.default_rng((0, 2**70 + shot, shot)).integers(2**60) for shot in range(50)}
    assert len(numbers) == 50
