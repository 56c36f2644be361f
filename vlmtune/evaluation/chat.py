"""A conversation with a model about pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlmtune.errors import DataError
from vlmtune.evaluation.asking import Asking, Question, ask
from vlmtune.evaluation.generate import answer, open_model
from vlmtune.types import IMAGE_MARK, ChatSample, ImageRef, Turn


class Conversation:
    """Keeps the turns; the pictures go in front of the first question."""

    def __init__(self, model: str, images: Sequence[Path], max_new_tokens: int) -> None:
        self._model, self._processor = open_model(model)
        self._images = tuple(ImageRef(path.name, path.resolve().parent) for path in images)
        self._limit = max_new_tokens
        self._turns: list[Turn] = []

    def ask(self, question: str) -> str:
        """The model's answer; both stay in the conversation. Raises DataError for a picture that cannot be read."""
        marks = "" if self._turns else f"{IMAGE_MARK}\n" * (len(self._images) - question.count(IMAGE_MARK))
        turns = [*self._turns, Turn("user", marks + question)]
        sample = ChatSample("chat", self._images, tuple(turns))
        (prediction,) = answer(self._model, self._processor, [sample], 1, self._limit)
        self._turns = [*turns, Turn("assistant", prediction.prediction)]
        return prediction.prediction

    def questions(self, number: int, first_turn: bool) -> tuple[Question, ...]:
        """Up to `number` different questions of the model's about the pictures, with its answers.

        They stay outside the conversation. Raises DataError without a picture, or for one that cannot be read.
        """
        if not self._images:
            raise DataError("there is no picture to ask about", remedy="Give one with --image.")
        asking = Asking(number, first_turn, answers=True, max_answer_tokens=self._limit)
        (asked,) = ask(self._model, self._processor, [self._images], asking)
        if asked.error:
            raise DataError(asked.error, asked.key)
        return asked.distinct
