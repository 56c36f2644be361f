"""What a run says of itself: phases are the time that somebody waited."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmtune import provenance
from vlmtune.provenance import Clock


def phases(path: Path) -> dict[str, float]:
    return {row["phase"]: row["seconds"] for row in json.loads(path.read_text())}


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that says 0, 10, 20, ..."""
    times = iter(range(0, 1000, 10))
    monkeypatch.setattr(provenance.time, "monotonic", lambda: float(next(times)))


def test_a_resumed_phase_adds_up(tmp_path: Path, ticks: None) -> None:
    clock = Clock(tmp_path / "run" / "phases.json")
    with clock.phase("train align"):
        pass
    with pytest.raises(KeyboardInterrupt), clock.phase("train align"):
        raise KeyboardInterrupt
    with clock.phase("export"):
        pass
    assert phases(clock.path) == {"train align": 20.0, "export": 10.0}
    assert clock.training() == 20.0


def test_other_ranks_do_not_add_their_time(
    tmp_path: Path, ticks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(tmp_path / "phases.json")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with clock.phase("train"):
            pass
    assert phases(clock.path) == {"train": 10.0}
