from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from vlmtune.config.mix import ChatJsonlSource, EasyVqaSource, HfDatasetSource, LlavaJsonSource, Mix
from vlmtune.data.caching import make_once
from vlmtune.data.faults import Quarantine, check_mix
from vlmtune.data.sources import RecordSource, open_source
from vlmtune.errors import DataError

MIXES = sorted((Path(__file__).parents[2] / "data_mixes").glob("*.yaml"))


def bomb() -> bytes:
    """A PNG that says it is 50,000 x 50,000 pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def line(image: str | None = "good.png", question: str = "<image>\nwhat?", answer: str = "a cat") -> str:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return json.dumps({"messages": turns, "images": [image] if image else []})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of pictures in every state."""
    root = tmp_path / "pictures"
    root.mkdir()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
    picture.save(root / "good.png")
    picture.save(root / "good.jpg")
    picture.save(tmp_path / "outside.png")
    for name in ("good.png", "good.jpg"):
        data = (root / name).read_bytes()
        (root / name.replace("good", "cut")).write_bytes(data[: len(data) // 2])
    (root / "text.png").write_text("<html>404</html>")
    (root / "empty.png").touch()
    (root / "folder.png").mkdir()
    (root / "bomb.png").write_bytes(bomb())
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    return root


CASES = [
    (line(), None),
    (line("none.png"), "none.png: the image is missing"),
    (line("cut.png"), "cut.png: the image cannot be read"),
    (line("cut.jpg"), "cut.jpg: the image cannot be read"),
    (line("text.png"), "text.png: not an image"),
    (line("empty.png"), "empty.png: the image file has 0 bytes"),
    (line("folder.png"), "folder.png: the image is a folder"),
    (line("bomb.png"), "bomb.png: the image is too large, perhaps a decompression bomb"),
    (line("../outside.png"), "../outside.png: the path leaves the image root"),
    (line("/etc/passwd"), "/etc/passwd: the path leaves the image root"),
    (line("link.png"), "link.png: the path leaves the image root"),
    (line("https://example.org/a.png"), "remote images are not fetched"),
    (line(question="what?"), "0 <image> marks for 1 images"),
    (line(question="<image><image>"), "2 <image> marks for 1 images"),
    (line(None), "1 <image> marks for 0 images"),
    (line(answer="  "), "an assistant turn is empty"),
    (line()[:40], "not JSON"),
    ("[]", "the record is of type list"),
    (line("good.jpg"), None),
    (line(None, "text only"), None),
]


def faulty_mix(folder: Path, repeat: int = 1) -> Mix:
    (folder / "bad.jsonl").write_text("\n".join(text for text, _ in CASES * repeat))
    return Mix(
        sources=(ChatJsonlSource(name="bad", format="chat_jsonl", path="bad.jsonl", images="pictures"),)
    )


def test_every_bad_input_is_named_with_its_key_and_its_reason(root: Path, tmp_path: Path) -> None:
    faults = {fault.where: fault for fault in check_mix(faulty_mix(tmp_path), tmp_path, tmp_path / "cache")}
    expected = {f"bad#{index}": what for index, (_, what) in enumerate(CASES) if what}
    assert faults.keys() == expected.keys()
    for key, what in expected.items():
        assert what in faults[key].what and faults[key].remedy
    broken = next(key for key, what in expected.items() if what == "not JSON")
    assert f"bad.jsonl:{int(broken.split('#')[1]) + 1}" in faults[broken].what


def test_bad_samples_move_no_other_sample(root: Path, tmp_path: Path) -> None:
    """PITFALLS 20: elsewhere the neighbour, the first or a random sample takes the place."""
    source = open_source(faulty_mix(tmp_path).sources[0], tmp_path, tmp_path / "cache")
    assert len(source) == len(CASES)
    for index in (0, 18, 19):
        assert source[index].key == f"bad#{index}"
    assert source[18].images[0].name == "good.jpg" and source[19].images == ()


def test_the_list_ends_at_most_and_stops_looking(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mix, seen, read = faulty_mix(tmp_path, repeat=3), [], RecordSource.__getitem__
    monkeypatch.setattr(
        RecordSource, "__getitem__", lambda self, index: seen.append(index) or read(self, index)
    )
    assert len(check_mix(mix, tmp_path, tmp_path / "cache", most=7)) == 7
    assert seen == list(range(8))
    assert len(check_mix(mix, tmp_path, tmp_path / "cache", most=10_000)) == 3 * 17


def test_a_source_that_cannot_be_opened_does_not_hide_the_others(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "easy_vqa", None)  # not installed
    monkeypatch.setitem(sys.modules, "datasets", None)
    mix = Mix(
        sources=(
            LlavaJsonSource(name="gone", format="llava_json", path="gone.json"),
            EasyVqaSource(name="easy", format="easy_vqa"),
            HfDatasetSource(name="hub", format="hf_dataset", path="some/set"),
            *faulty_mix(tmp_path).sources,
        )
    )
    faults = check_mix(mix, tmp_path, tmp_path / "cache")
    assert [fault.where for fault in faults[:3]] == ["source gone", "source easy", "source hub"]
    assert "vlmtune[demo]" in faults[1].remedy and "vlmtune[datasets]" in faults[2].remedy
    assert len(faults) == 3 + 17


@pytest.mark.parametrize("path", MIXES, ids=lambda path: path.stem)
def test_every_mix_on_disk_is_valid_and_clean_or_says_what_to_get(path: Path, tmp_path: Path) -> None:
    mix = Mix.model_validate(yaml.safe_load(path.read_text("utf-8")))
    faults = check_mix(mix, path.parent, tmp_path)
    if path.stem.startswith("easy_vqa"):
        pytest.importorskip("easy_vqa")
        assert faults == []
    else:
        assert all(re.search(r"there is no (file|folder) playground/data/", fault.what) for fault in faults)
    assert mix.description


def test_the_mixes_on_disk_are_found() -> None:
    names = {path.stem for path in MIXES}
    assert names >= {
        "easy_vqa_captions",
        "easy_vqa_train",
        "easy_vqa_test",
        "llava_pretrain_558k",
        "llava_665k",
    }


# ---------------------------------------------------------------- quarantine


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(text) for text in path.read_text("utf-8").splitlines()]


def test_each_key_is_written_once_and_the_budget_stops_the_run(tmp_path: Path) -> None:
    path = tmp_path / "run" / "quarantine.jsonl"
    quarantine = Quarantine(path, total=300, budget=0.01)
    assert not path.parent.exists()
    for key in ("a#1", "a#2", "a#1", "a#3", "a#3"):
        quarantine.add(key, f"reason of {key}\n\ud800")
    assert [entry["key"] for entry in lines(path)] == ["a#1", "a#2", "a#3"]
    with pytest.raises(DataError) as caught:
        quarantine.add("b#9", "cut off")
    told = str(caught.value)
    for part in (
        "4 of 300 samples",
        "1.00%",
        "b#9: cut off",
        str(path),
        "vlmtune check",
        "bad_samples.budget",
    ):
        assert part in told
    assert lines(path)[3] == {"key": "b#9", "reason": "cut off"}


def test_a_resumed_run_goes_on_counting_where_the_killed_one_was(tmp_path: Path) -> None:
    path = tmp_path / "quarantine.jsonl"
    Quarantine(path, 100, 0.02).add("a#1", "r")
    with path.open("a") as file:
        file.write('{"key": "a#7", "rea')  # killed while writing
    resumed = Quarantine(path, 100, 0.02)
    assert len(resumed) == 1
    resumed.add("a#1", "r")
    resumed.add("a#7", "r")
    assert len(Quarantine(path, 100, 0.02)) == 2
    with pytest.raises(DataError):
        resumed.add("a#8", "r")


@pytest.mark.parametrize(
    ("total", "budget", "allowed"), [(100, 0.29, 29), (10, 0.0, 0), (3, 1.0, 3), (50, 0.01, 0)]
)
def test_the_budget_is_met_exactly(total: int, budget: float, allowed: int, tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q.jsonl", total, budget)
    for index in range(allowed):
        quarantine.add(f"a#{index}", "r")
    if allowed < total:
        with pytest.raises(DataError):
            quarantine.add("one more", "r")


# ---------------------------------------------------------------- cache folders


def test_a_folder_is_built_by_one_process_while_the_others_wait(tmp_path: Path) -> None:
    code = """if True:
        import os, sys, time
        from pathlib import Path
        from vlmtune.data.caching import make_once
        def build(folder):
            time.sleep(0.3)
            (folder / "by").write_text(str(os.getpid()))
            with open(sys.argv[1] + "/builds", "a") as log: log.write("x")
        print((make_once(Path(sys.argv[1]) / "made", build) / "by").read_text())
    """
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    said = {run.communicate()[0] for run in runs}
    assert len(said) == 1 and said != {b""} and (tmp_path / "builds").read_text() == "x"


def test_a_build_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        make_once(tmp_path / "made", fail)
    assert not [path for path in os.listdir(tmp_path) if "lock" not in path]
    assert (make_once(tmp_path / "made", lambda folder: (folder / "whole").touch()) / "whole").exists()
