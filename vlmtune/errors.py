"""Errors that say what is wrong, where, and what to do; several faults travel in one error."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong: `what`, `where` (file:line or sample key) and the `remedy`."""

    what: str
    where: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        remedy = f" {self.remedy}" if self.remedy else ""
        return f"{place}{self.what}{'' if self.what.endswith(('.', '?', '!')) else '.'}{remedy}"


class VlmtuneError(Exception):
    """The base of every error a user can cause; holds one fault or many."""

    def __init__(self, what: str | Iterable[Fault], where: str = "", remedy: str = "") -> None:
        self.faults: tuple[Fault, ...] = (
            (Fault(what, where, remedy),) if isinstance(what, str) else tuple(what)
        )
        super().__init__("\n".join(str(fault) for fault in self.faults))


class RecipeError(VlmtuneError):
    """A recipe, mix or override that cannot be run as written."""


class DataError(VlmtuneError):
    """A sample, image or source that cannot be used; `where` is the sample key or file:line."""


class CheckpointError(VlmtuneError):
    """A checkpoint that is incomplete, foreign, or not what its manifest says."""


class TrainingError(VlmtuneError):
    """A run that must stop: a non-finite loss, a part that gets no gradient, too many bad samples."""
