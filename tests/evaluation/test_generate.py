"""Batched answers are those of one prompt at a time through transformers' own generate."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, GenerationConfig

from tests import tiny
from tests.tiny import tiny_images, tiny_model
from vlmtune.data.images import image_size, open_image
from vlmtune.data.render import Renderer
from vlmtune.errors import DataError
from vlmtune.evaluation import generate
from vlmtune.evaluation.generate import answer, open_model
from vlmtune.export.hf import export_model
from vlmtune.export.probe import probe_batch
from vlmtune.models.attention import use_attention
from vlmtune.models.vision import token_counter
from vlmtune.types import ChatSample, ImageRef, Turn

QUESTIONS = (
    "what color is the shape?",
    "is there a circle?",
    "is there a red circle in the image? yes or no",
    "hello",
)


def sample(number: int, images: Sequence[ImageRef], *texts: str) -> ChatSample:
    turns = [Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(texts)]
    turns[0] = Turn("user", "<image>\n" * len(images) + texts[0])
    return ChatSample(f"set#{number}", tuple(images), tuple(turns))


def make_samples(folder: Path) -> list[ChatSample]:
    """Several questions a picture, two pictures, no picture, earlier turns, in mixed order."""
    images = [ImageRef(name, folder) for name in tiny_images(folder, 4)]
    samples = [sample(i, images[i % 3 : i % 3 + 1], QUESTIONS[i % 4], "red") for i in range(9)]
    samples.append(sample(9, images[2:4], QUESTIONS[0], "blue"))
    # The same two pictures, but the prompts part before the second: it belongs to the ending.
    first, second = images[2:4]
    late = Turn("user", "<image> or <image>, what is larger?")
    samples.append(ChatSample("set#9b", (first, second), (late, Turn("assistant", "red"))))
    samples.append(ChatSample("set#9c", (second, first), (late, Turn("assistant", "red"))))
    samples.append(sample(10, [], QUESTIONS[1], "no"))
    samples.append(sample(11, [], QUESTIONS[3], "hi"))
    samples.append(sample(12, images[:1], QUESTIONS[0], "red", QUESTIONS[1], "no"))
    samples.append(sample(13, images[:1], QUESTIONS[0], "red", QUESTIONS[3]))
    return samples


def ready(*names: str, **options: Any) -> tuple[Any, Any]:
    """A model as a run has it, its matrices scaled so that fresh weights tell prompts apart."""
    model, processor = tiny_model(*names, **options)
    use_attention(model, "auto")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim == 2 else 1)
    return model, processor


@torch.no_grad()
def one_by_one(model: Any, processor: Any, samples: list[ChatSample], limit: int) -> list[str]:
    """No batch, no shared beginning, no own loop: transformers' generate on the renderer's prompt."""
    renderer = Renderer(processor.tokenizer, token_counter(model.config), processor.chat_template)
    config = GenerationConfig(
        max_new_tokens=limit, eos_token_id=processor.tokenizer.eos_token_id, pad_token_id=0
    )
    texts = []
    for each in samples:
        turns = each.turns if each.turns[-1].role == "assistant" else (*each.turns, Turn("assistant", "x"))
        asked = ChatSample(each.key, each.images, turns)
        ids = torch.tensor([renderer.prompt(asked, [image_size(image) for image in each.images])])
        pictures = [open_image(image) for image in each.images]
        pixels = processor.image_processor(pictures, return_tensors="pt") if pictures else {}
        new = model.generate(ids, attention_mask=torch.ones_like(ids), **pixels, generation_config=config)
        texts.append(processor.tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True).strip())
    return texts


@pytest.mark.parametrize(
    "parts",
    [("clip", "mlp2x", "llama"), ("siglip", "pixel_shuffle", "qwen2"), ("dinov2", "resampler", "llama")],
    ids="-".join,
)
@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_batched_is_one_by_one(tmp_path: Path, parts: tuple[str, str, str], batch_size: int) -> None:
    model, processor = ready(*parts)
    samples = make_samples(tmp_path)
    predictions = answer(model, processor, samples, batch_size, 6)
    assert [each.key for each in predictions] == [each.key for each in samples]
    expected = one_by_one(model, processor, samples, 6)
    assert [each.prediction for each in predictions] == expected
    assert len(set(expected)) >= 14  # the answers differ: a mix-up would show


@pytest.mark.parametrize("window", [8, 40])
def test_sliding_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    """Padding between the shared beginning and the question would push tokens out of the window."""
    sliding = {"use_sliding_window": True, "sliding_window": window, "max_window_layers": 1}
    monkeypatch.setitem(tiny.LANGUAGES, "qwen2", tiny.LANGUAGES["qwen2"] | sliding)
    model, processor = ready("clip", "mlp2x", "qwen2")
    samples = make_samples(tmp_path)
    expected = one_by_one(model, processor, samples, 6)
    assert [each.prediction for each in answer(model, processor, samples, 64, 6)] == expected


def test_rows_end_at_their_own_end_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row leaves the batch when it ends; the others go on as if alone."""
    model, processor = ready()
    samples = make_samples(tmp_path)
    free = answer(model, processor, samples, 64, 8)
    ids = [processor.tokenizer(each.prediction, add_special_tokens=False)["input_ids"] for each in free]
    end = max({token for row in ids for token in row}, key=lambda token: sum(token in row for row in ids))
    monkeypatch.setattr(generate, "_ends", lambda model, processor: torch.tensor([end]))
    lengths = []
    for whole, short in zip(free, answer(model, processor, samples, 64, 8), strict=True):
        assert whole.prediction.startswith(short.prediction)
        lengths.append(len(short.prediction))
    assert len(set(lengths)) > 2


def test_stops_at_the_end_token_and_at_the_limit(tmp_path: Path) -> None:
    model, processor = ready()
    samples = make_samples(tmp_path)[:3]
    steps = []
    model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    answer(model, processor, samples, 64, 5)
    assert len(steps) == 1 + 1 + 4  # shared beginnings, endings, and one for each token but the first
    steps.clear()
    model.lm_head.weight.data.zero_()
    model.generation_config.eos_token_id = 0  # argmax of equal logits
    assert [each.prediction for each in answer(model, processor, samples, 64, 5)] == ["", "", ""]
    assert len(steps) == 2


def test_a_picture_is_encoded_once(tmp_path: Path) -> None:
    model, processor = ready()
    image = ImageRef(tiny_images(tmp_path, 1)[0], tmp_path)
    seen = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((*args, *kwargs.values())[0].shape[0]), with_kwargs=True
    )
    answer(model, processor, [sample(i, [image], QUESTIONS[i % 4]) for i in range(12)], 64, 2)
    assert seen == [1]


def test_a_bad_sample_is_wrong_and_stops_nothing(tmp_path: Path) -> None:
    model, processor = ready()
    good = make_samples(tmp_path)[:2]
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:500])

    class Source(list[ChatSample]):
        def __getitem__(self, index: int) -> ChatSample:
            if index == 5:
                raise DataError("broken JSON", "set#25")
            return super().__getitem__(index)

    missing = sample(21, [ImageRef("nowhere.png", tmp_path)], QUESTIONS[0], "red")
    cut = sample(22, [ImageRef("cut.png", tmp_path)], QUESTIONS[0], "red")
    marks = ChatSample("set#23", (), (Turn("user", "<image> what?"), Turn("assistant", "red")))
    empty = ChatSample("set#24", (), ())
    samples = Source([good[0], missing, cut, marks, good[1], empty, empty])
    predictions = answer(model, processor, samples, 64, 4)
    assert [bool(each.error) for each in predictions[:6]] == [False, True, True, True, False, True]
    assert [each.key for each in predictions] == [
        "set#0",
        "set#21",
        "set#22",
        "set#23",
        "set#1",
        "set#25",
        "set#24",
    ]
    assert "nowhere.png" in predictions[1].error
    assert predictions[2].references == ("red",)
    expected = answer(model, processor, good, 64, 4)
    assert [predictions[0], predictions[4]] == expected
    assert all(each.error for each in answer(model, processor, [missing, cut], 1, 4))


def test_no_sample(tmp_path: Path) -> None:
    assert answer(*ready(), [], 4, 4) == []


def test_deterministic_and_reports_progress(tmp_path: Path) -> None:
    model, processor = ready()
    samples = make_samples(tmp_path)
    model.train()
    seen: list[tuple[int, int]] = []
    first = answer(model, processor, samples, 4, 4, lambda done, total: seen.append((done, total)))
    assert model.training
    assert seen[-1] == (len(samples), len(samples))
    assert seen == sorted(seen)
    assert first == answer(model, processor, samples, 4, 4)


def test_prediction_carries_question_and_references(tmp_path: Path) -> None:
    model, processor = ready()
    image = ImageRef(tiny_images(tmp_path, 1)[0], tmp_path)
    asked = sample(0, [image], "what color?", "red", "which shape?", "circle")
    given = ChatSample("vqa#1", (image,), asked.turns, "shape", ("circle", "disc"))
    first, second = answer(model, processor, [asked, given], 4, 2)
    assert (first.prompt, first.references, first.kind) == ("which shape?", ("circle",), "")
    assert (second.key, second.kind, second.references) == ("vqa#1", "shape", ("circle", "disc"))


def test_export_answers_as_the_model_did(tmp_path: Path) -> None:
    """Through `open_model`, and through the class that the Auto classes give a stranger."""
    model, processor = ready("siglip", "mlp2x", "qwen2", tied=True)
    samples = make_samples(tmp_path / "images")
    expected = answer(model, processor, samples, 8, 5)
    folder = export_model(model, processor, tmp_path / "export", None, probe_batch(model, processor), {}).path
    assert answer(*open_model(str(folder)), samples, 8, 5) == expected
    stock = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
    assert type(stock).__name__ == "LlavaForConditionalGeneration"
    assert answer(stock, processor, samples, 8, 5) == expected


def test_open_model_takes_a_step_folder(tmp_path: Path) -> None:
    model, processor = tiny_model()
    model.save_pretrained(tmp_path / "step_000001" / "model")
    processor.save_pretrained(tmp_path / "step_000001" / "model")
    reopened, _ = open_model(str(tmp_path / "step_000001"))
    assert torch.equal(reopened.lm_head.weight, model.lm_head.weight)
