from __future__ import annotations

import base64
import builtins
import io
import json
import os
import pickle
import subprocess
import sys
import tracemalloc
import uuid
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from vlmtune.config.mix import ChatJsonlSource, EasyVqaSource, HfDatasetSource, LlavaJsonSource
from vlmtune.data import record_files
from vlmtune.data.easy_vqa import COLORS, SHAPES, EasyVqa, Facts, caption_of, facts_of
from vlmtune.data.hf_dataset import row_sample
from vlmtune.data.images import open_image
from vlmtune.data.readers import chat_sample, llava_sample
from vlmtune.data.sources import Source, open_source
from vlmtune.errors import DataError
from vlmtune.types import ChatSample, Turn


def png(color: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), color).save(buffer, "PNG")
    return buffer.getvalue()


def llava(path: Path, **options: Any) -> LlavaJsonSource:
    return LlavaJsonSource(name="s", format="llava_json", path=str(path), **options)


def chat(path: Path, **options: Any) -> ChatJsonlSource:
    return ChatJsonlSource(name="s", format="chat_jsonl", path=str(path), **options)


def talk(question: str = "<image>\nwhat?", answer: str = "a cat") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def messages(question: Any = "<image>\nwhat?", answer: Any = "a cat") -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def written(path: Path, records: list[Any]) -> Path:
    lines = path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, records)) if lines else json.dumps(records))
    return path


def reason(source: Source, index: int) -> str:
    with pytest.raises(DataError) as caught:
        source[index]
    fault = caught.value.faults[0]
    assert fault.where == f"{source.name}#{index}" and fault.remedy
    return fault.what


# ---------------------------------------------------------------- llava_json


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_llava_records_of_every_kind_are_read_as_written(name: str, tmp_path: Path) -> None:
    records = [
        {"id": 1, "image": "coco/a.jpg", "conversations": talk()},
        {"id": "2", "conversations": [{"from": "system", "value": "be brief"}, *talk("  hi \n", " ü ")]},
        {"image": ["a.jpg", "b.jpg"], "conversations": talk("<image><image> differ?")},
        {"images": ["a.jpg"], "conversations": talk("what?\n<image>") + talk("and now?", "a dog")},
        {"image": None, "x": 1.5, "conversations": talk("text only", "yes <b>")},
        {"image": "a.jpg", "conversations": talk("what?", "<image> is in the answer")},
    ]
    source = open_source(llava(written(tmp_path / name, records)), tmp_path, tmp_path / "cache")
    assert isinstance(source, Source) and len(source) == len(records)
    samples = list(source)
    assert [sample.key for sample in samples] == [f"s#{i}" for i in range(6)]
    assert [[ref.name for ref in sample.images] for sample in samples] == [
        ["coco/a.jpg"], [], ["a.jpg", "b.jpg"], ["a.jpg"], [], ["a.jpg"],
    ]  # fmt: skip
    assert samples[1].turns == (Turn("system", "be brief"), Turn("user", "  hi \n"), Turn("assistant", " ü "))
    assert [turn.role for turn in samples[3].turns] == ["user", "assistant"] * 2
    assert all(ref.root == tmp_path for sample in samples for ref in sample.images)
    for index in (-1, 6):
        with pytest.raises(IndexError):
            source[index]


def test_a_json_list_is_converted_once_in_flat_memory(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        path = written(
            tmp_path / f"{count}.json",
            [{"image": "a", "conversations": talk("<image>" + "x" * 1000)}] * count,
        )
        tracemalloc.start()
        source = open_source(llava(path), tmp_path, tmp_path / "cache")
        memory = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(source) == count and source[count - 1].key == f"s#{count - 1}"
        return memory

    peak(10)  # imports
    assert peak(8000) < peak(2000) + 100_000  # 9 MB against 2 MB of JSON
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    open_source(llava(tmp_path / "2000.json"), tmp_path, tmp_path / "cache")
    assert made == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"conversations": []}', "not a JSON list"),
        ("", "not a JSON list"),
        ("[]", "holds no record"),
        ('[{"a": 1}, {"b":', "breaks off after 1 records"),
        ('[{"a": 1}, oops]', "breaks off after 1 records"),
        ("[" * 100_000, "breaks off|holds no record"),
    ],
)
def test_a_broken_list_is_named_and_leaves_no_cache(text: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(DataError, match=what) as caught:
        open_source(llava(tmp_path / "data.json"), tmp_path, tmp_path / "cache")
    assert caught.value.faults[0].where == "source s" and "data.json" in str(caught.value)
    assert not list((tmp_path / "cache").glob(".*[0-9]"))


def test_a_byte_order_mark_is_passed_over(tmp_path: Path) -> None:
    record = json.dumps({"conversations": talk("q")})
    for name, text in (("a.json", f" [{record}]"), ("a.jsonl", record)):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert open_source(llava(tmp_path / name), tmp_path, tmp_path / "cache")[0].turns[0].text == "q"


def test_a_list_behind_a_link_without_suffix_is_still_a_list(tmp_path: Path) -> None:
    """The hub's cache stores files so: snapshots/x.json -> blobs/0123abcd."""
    blob = written(tmp_path / "blob.json", [{"conversations": talk("q")}]).rename(tmp_path / "0123abcd")
    (tmp_path / "data.json").symlink_to(blob)
    assert open_source(llava(tmp_path / "data.json"), tmp_path, tmp_path / "cache")[0].turns[0].text == "q"


# ---------------------------------------------------------------- chat_jsonl


def test_chat_messages_take_images_from_parts_and_from_the_list(tmp_path: Path) -> None:
    uri = "data:image/png;base64," + base64.b64encode(png("blue")).decode()
    (tmp_path / "a.png").write_bytes(png())
    parts = [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "text", "text": "and"},
        {"type": "image_url", "image_url": uri},
        {"type": "text", "text": "differ?"},
    ]
    records = [
        {"messages": messages(parts)},
        {"images": ["a.png"], "messages": messages()},
        {"images": ["a.png"], "messages": messages([{"type": "image"}, {"type": "text", "text": "what?"}])},
        {"messages": messages([{"type": "image", "image": "a.png"}])},
        {"messages": [{"role": "system", "content": "s"}, *messages([{"type": "text", "text": "q"}])]},
    ]
    source = open_source(chat(written(tmp_path / "d.jsonl", records)), tmp_path, tmp_path / "cache")
    assert source[0].turns[0].text == "<image>\nand\n<image>\ndiffer?"
    colors = [open_image(ref).getpixel((0, 0)) for ref in source[0].images]
    assert colors == [(255, 0, 0), (0, 0, 255)]
    assert source[2].turns == source[1].turns and source[2].images == source[1].images
    assert [len(sample.images) for sample in source] == [2, 1, 1, 1, 0]


def test_a_broken_line_is_one_bad_sample_with_file_and_line(tmp_path: Path) -> None:
    good = json.dumps({"messages": messages("q")}).encode()
    lines = [good, b"", b'{"messages": [', b"  ", good, b"\xff\xfe{}", b"[" * 100_000, good + b"\r"]
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(lines) + b"\n\n")
    source = open_source(chat(tmp_path / "d.jsonl"), tmp_path, tmp_path / "cache")
    assert len(source) == 6
    for index in (0, 2, 5):
        assert source[index].turns[1].text == "a cat"
    for index, line in ((1, 3), (3, 6), (4, 7)):
        assert f"d.jsonl:{line}: not JSON" in reason(source, index)


def test_malformed_records_give_key_place_reason_and_remedy(tmp_path: Path) -> None:
    one = {"images": ["a.png"]}
    cases = [
        ([1], "the record is of type list, not an object"),
        ({"conversations": []}, "no messages (its keys: conversations)"),
        ({"messages": {}}, "messages is of type dict, not a list"),
        ({"messages": []}, "no assistant turn"),
        ({"messages": messages("q")[:1]}, "no assistant turn"),
        ({"messages": ["hi"]}, "a message is of type str"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role is 'tool'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "role is ['user']"),
        ({"messages": [{"content": "x"}]}, "role is missing"),
        ({"messages": messages("q", None)}, "content is missing"),
        ({"messages": messages("q", 7)}, "content is of type int"),
        ({"messages": messages("q", " \n")}, "an assistant turn is empty"),
        ({"messages": messages("q", [])}, "an assistant turn is empty"),
        ({"messages": messages()}, "1 <image> marks for 0 images"),
        ({"messages": messages("q"), **one}, "0 <image> marks for 1 images"),
        ({"messages": messages("<image>", "see <image>"), **one}, "2 <image> marks for 1 images"),
        ({"messages": messages([{"type": "audio"}])}, "type 'audio'"),
        ({"messages": messages([{"type": "image_url"}])}, "image_url is missing"),
        (
            {"messages": messages([{"type": "image_url", "image_url": {"url": 3}}])},
            "image_url is of type int",
        ),
        ({"messages": messages([{"type": "image", "image": "a"}]), **one}, "their order is unknown"),
        ({"messages": messages(), "images": [None]}, "an image is given as missing"),
        ({"messages": messages(), "images": [""]}, "an image is given as of type str"),
        ({"messages": messages(), "images": ["data:image/png;base64,@@"]}, "data: URI cannot be decoded"),
        ({"messages": messages(), "image": "a", **one}, "both image and images"),
    ]
    records = [record for record, _ in cases]
    source = open_source(chat(written(tmp_path / "d.jsonl", records)), tmp_path, tmp_path / "cache")
    for index, (_, what) in enumerate(cases):
        told = reason(source, index)
        assert what in told and f"d.jsonl:{index + 1}" in told


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
words = st.sampled_from(
    ["user", "gpt", "assistant", "human", "text", "image", "image_url", "<image>", "data:,", "a"]
)
leaf = json_values | words
part = st.fixed_dictionaries({}, optional={"type": leaf, "text": leaf, "image": leaf, "image_url": leaf})
message = st.fixed_dictionaries(
    {},
    optional={"role": leaf, "content": leaf | st.lists(part | leaf, max_size=3), "from": leaf, "value": leaf},
)
record = st.fixed_dictionaries(
    {},
    optional={
        "messages": st.lists(message | leaf, max_size=3) | leaf,
        "conversations": st.lists(message | leaf, max_size=3) | leaf,
        "image": leaf,
        "images": st.lists(leaf, max_size=2) | leaf,
        "question": leaf,
        "answer": leaf,
        "answers": st.lists(leaf | st.fixed_dictionaries({"answer": leaf}), max_size=3) | leaf,
        "kind": leaf,
    },
)


@settings(deadline=None, max_examples=300)
@given(record | json_values)
def test_random_records_are_samples_or_data_errors(value: Any) -> None:
    readers = [llava_sample, chat_sample]
    if isinstance(value, dict):
        readers.append(row_sample)
        readers.append(
            lambda fields, *rest: row_sample({k: v for k, v in fields.items() if k != "messages"}, *rest)
        )
    for read in readers:
        try:
            sample = read(value, "s#0", Path("root"))
        except DataError as error:
            assert error.faults[0].where == "s#0" and error.faults[0].remedy
        else:
            assert isinstance(sample, ChatSample) and sample.image_marks == len(sample.images)
            assert any(turn.role == "assistant" and turn.text.strip() for turn in sample.turns)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(json_values, min_size=1, max_size=6), st.sampled_from([None, 1]), st.integers(1, 9))
def test_a_list_reads_the_same_whatever_the_size_of_the_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: list[Any], indent: int | None, chunk: int
) -> None:
    monkeypatch.setattr(record_files, "_CHUNK", chunk)
    path = tmp_path / f"{uuid.uuid4()}.json"
    path.write_text(json.dumps(values, indent=indent))
    records = record_files.open_records(path, tmp_path / "cache")
    assert [json.dumps(records.read(i)) for i in range(len(records))] == [
        json.dumps(value) for value in values
    ]


# ---------------------------------------------------------------- sources in general


def test_paths_are_looked_for_here_first_and_then_beside_the_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, base = tmp_path / "here", tmp_path / "mixes"
    for folder, word in ((here, "here"), (base, "base")):
        (folder / "pictures").mkdir(parents=True)
        written(folder / "d.jsonl", [{"image": "a.png", "messages": messages(answer=word)}])
    monkeypatch.chdir(here)
    config = ChatJsonlSource(name="s", format="chat_jsonl", path="d.jsonl", images="pictures")
    sample = open_source(config, base, tmp_path / "cache")[0]
    assert sample.turns[1].text == "here" and sample.images[0].root == here / "pictures"
    (here / "d.jsonl").unlink()
    assert open_source(config, base, tmp_path / "cache")[0].turns[1].text == "base"
    for changed in ({"path": "none.jsonl"}, {"images": "nowhere"}):
        with pytest.raises(DataError, match=r"there is no (file none\.jsonl|folder nowhere)") as caught:
            open_source(config.model_copy(update=changed), base, tmp_path / "cache")
        assert "source s" in str(caught.value) and str(base) in str(caught.value)


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_fingerprints_follow_the_content_and_nothing_else(name: str, tmp_path: Path) -> None:
    path = tmp_path / name

    def fingerprint(cache: str = "cache", **options: Any) -> str:
        return open_source(llava(path, **options), tmp_path, tmp_path / cache).fingerprint

    first = fingerprint(written(path, [{"conversations": talk("q", "aa")}]) and "cache")
    os.utime(path, (1, 1))
    assert fingerprint() == first == fingerprint("other cache")
    (tmp_path / "images").mkdir()
    assert fingerprint(images=str(tmp_path / "images")) != first
    written(path, [{"conversations": talk("q", "ab")}])  # the same size
    assert fingerprint() != first


def test_a_file_changed_while_in_use_is_an_error_not_another_sample(tmp_path: Path) -> None:
    path = written(tmp_path / "d.jsonl", [{"messages": messages("q", "one")}] * 3)
    source = open_source(chat(path), tmp_path, tmp_path / "cache")
    assert source[2].turns[1].text == "one"
    written(path, [{"messages": messages("q", "two")}] * 3)
    assert "the file was changed after it was opened" in reason(source, 2)
    assert open_source(chat(path), tmp_path, tmp_path / "cache")[2].turns[1].text == "two"


def test_sources_survive_pickling_forking_and_a_fresh_process(tmp_path: Path) -> None:
    path = written(tmp_path / "d.json", [{"conversations": talk("q", str(i))} for i in range(50)])
    source = open_source(llava(path), tmp_path, tmp_path / "cache")
    assert source[7].turns[1].text == "7"
    packed = pickle.dumps(source)
    assert len(packed) < 2000
    code = f"import pickle; s = pickle.loads({packed!r}); print(s.fingerprint, s[49].turns[1].text)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.split() == [source.fingerprint, "49"]
    child = os.fork()
    if child == 0:
        os._exit(all(source[i].turns[1].text == str(i) for i in range(50)) - 1)
    assert os.waitpid(child, 0)[1] == 0
    assert source[3].turns[1].text == "3"


def test_reading_data_needs_no_torch() -> None:
    modules = "vlmtune.data.faults, vlmtune.data.mixes, vlmtune.data.transforms"
    code = f"import sys, {modules}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("package", "extra", "config"),
    [
        ("easy_vqa", "demo", EasyVqaSource(name="s", format="easy_vqa")),
        ("datasets", "datasets", HfDatasetSource(name="s", format="hf_dataset", path="x")),
    ],
)
def test_a_missing_package_names_the_extra(
    package: str, extra: str, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name == package:
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(DataError, match=rf'pip install "vlmtune\[{extra}\]"'):
        open_source(config, tmp_path, tmp_path)


# ---------------------------------------------------------------- hf_dataset


@pytest.fixture
def datasets(monkeypatch: pytest.MonkeyPatch) -> Any:
    library = pytest.importorskip("datasets")
    library.disable_progress_bars()
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("a pixel was decoded"))
    yield library
    library.enable_progress_bars()


def hf(path: Path, **options: Any) -> HfDatasetSource:
    return HfDatasetSource(name="h", format="hf_dataset", path=str(path), **options)


VQA = {"images": "picture", "question": "q", "answers": "a", "kind": "k"}


def saved(datasets: Any, folder: Path) -> Path:
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "q": datasets.Value("string"),
            "a": datasets.List(datasets.Value("string")),
            "k": datasets.Value("string"),
        }
    )
    rows = {
        "picture": [{"bytes": png("blue"), "path": None}, None, {"bytes": png(), "path": "r.png"}],
        "q": ["what color?", "2+2?", "is it <image> red?"],
        "a": [["blue", "navy", "blue"], ["4"], []],
        "k": ["color", None, "yes/no"],
    }
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder))
    return folder


def test_hf_rows_go_through_the_column_map_undecoded(datasets: Any, tmp_path: Path) -> None:
    config = hf(saved(datasets, tmp_path / "saved"), columns=VQA)
    source = open_source(config, tmp_path, tmp_path / "cache")
    assert isinstance(source, Source) and len(source) == 3
    first = source[0]
    assert first.turns == (Turn("user", "<image>\nwhat color?"), Turn("assistant", "blue"))
    assert first.images[0].data == png("blue") and first.kind == "color"
    assert first.references == ("blue", "navy", "blue")
    assert source[1].images == () and source[1].turns[0].text == "2+2?"
    assert "question or answer is missing" in reason(source, 2)
    again = pickle.loads(pickle.dumps(source))
    assert again[0] == first and again.fingerprint == source.fingerprint
    assert open_source(config, tmp_path, tmp_path / "cache").fingerprint == source.fingerprint
    assert len(open_source(hf(tmp_path / "saved", columns=VQA, take=2), tmp_path, tmp_path / "cache")) == 2
    with pytest.raises(IndexError):
        source[3]


def test_hf_messages_with_parts_and_several_images(datasets: Any, tmp_path: Path) -> None:
    image = [{"bytes": png(), "path": None}]
    rows = [
        {
            "images": image,
            "messages": messages([{"type": "image", "text": None}, {"type": "text", "text": "q"}]),
        },
        {"images": image * 2, "messages": messages([{"type": "text", "text": "<image> or <image>"}])},
    ]
    folder = tmp_path / "saved"
    for row in rows:
        row["messages"][1]["content"] = [{"type": "text", "text": "one"}]
    datasets.DatasetDict({"val": datasets.Dataset.from_list(rows)}).save_to_disk(str(folder))
    source = open_source(hf(folder, split="val"), tmp_path, tmp_path / "cache")
    assert [sample.turns[0].text for sample in source] == ["<image>\nq", "<image> or <image>"]
    assert [len(sample.images) for sample in source] == [1, 2]


def test_a_folder_of_files_is_read_whole_or_streamed_once(datasets: Any, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    rows = [{"file_name": f"{i}.png", "question": f"q{i}", "answer": f"a{i}"} for i in range(4)]
    for i in range(4):
        (folder / f"{i}.png").write_bytes(png())
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = {"images": "image", "question": "question", "answer": "answer"}
    whole = open_source(hf(folder, columns=columns), tmp_path, tmp_path / "cache")
    assert len(whole) == 4 and whole[3].turns[1].text == "a3"
    assert Path(whole[3].images[0].name) == folder / "3.png" and whole[3].images[0].root == folder
    config = hf(folder, columns=columns, streaming=True, take=3)
    streamed = open_source(config, tmp_path, tmp_path / "cache")
    assert len(streamed) == 3 and streamed[2].images[0].data == png()
    spools = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("spool-*/*")}
    assert open_source(config, tmp_path, tmp_path / "cache").fingerprint == streamed.fingerprint
    assert spools == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("spool-*/*")}


def test_hf_faults_name_the_source_and_the_nearest_column(datasets: Any, tmp_path: Path) -> None:
    saved(datasets, tmp_path / "saved")
    wrong = {"images": "pictures", "question": "q", "answer": "zzz"}
    with pytest.raises(DataError) as caught:
        open_source(hf(tmp_path / "saved", columns=wrong), tmp_path, tmp_path / "cache")
    assert len(caught.value.faults) == 2 and {fault.where for fault in caught.value.faults} == {"source h"}
    assert "Did you mean picture?" in str(caught.value) and "It has: picture, q, a, k" in str(caught.value)
    with pytest.raises(DataError, match="neither messages nor question"):
        open_source(hf(tmp_path / "saved", columns={"images": "picture"}), tmp_path, tmp_path / "cache")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="cannot be loaded"):
        open_source(hf(tmp_path / "nothing"), tmp_path, tmp_path / "cache")


# ---------------------------------------------------------------- easy_vqa


def easy(**options: Any) -> EasyVqa:
    pytest.importorskip("easy_vqa")
    source = open_source(EasyVqaSource(name="e", format="easy_vqa", **options), Path(), Path())
    assert isinstance(source, EasyVqa)
    return source


@pytest.mark.parametrize(("split", "size", "images"), [("train", 38_575, 4_000), ("test", 9_673, 1_000)])
def test_every_easy_vqa_question_is_understood_and_none_contradicts(
    split: Any, size: int, images: int
) -> None:
    source = easy(split=split)
    assert len(source) == size
    known: dict[int, Facts] = {}
    for sample in source.samples:
        facts = facts_of(*sample.pairs[0])
        known[sample.image] = known.get(sample.image, Facts()) & facts
    assert len(known) == images
    assert all(facts.colors and facts.shapes for facts in known.values())
    assert {sample.kind for sample in source} == {"yes/no", "color", "shape"}


def test_easy_vqa_facts_and_captions() -> None:
    everything = Facts()
    assert facts_of("is there a blue shape?", "yes") == Facts(frozenset({"blue"}))
    assert facts_of("is there not a blue shape?", "no") == Facts(frozenset({"blue"}))
    assert facts_of("is no circle present?", "yes") == Facts(shapes=SHAPES - {"circle"})
    assert facts_of("does the image not contain a circle?", "yes") == Facts(shapes=SHAPES - {"circle"})
    assert facts_of("what is the teal shape?", "circle") == Facts(frozenset({"teal"}), frozenset({"circle"}))
    assert facts_of("what color is the shape?", "red") == Facts(frozenset({"red"}))
    assert caption_of(everything) is None
    assert caption_of(facts_of("is there a circle?", "yes")) == "a circle"
    assert caption_of(facts_of("is a red shape present?", "yes")) == "a red shape"
    assert caption_of(facts_of("what is the red shape?", "circle")) == "a red circle"
    neither = facts_of("is there a circle?", "no") & facts_of("is there a triangle?", "no")
    assert caption_of(neither) == "a rectangle"
    assert caption_of(facts_of("is there a red shape?", "no")) is None
    for question, answer in (
        ("how many shapes?", "yes"),
        ("is there a circle?", "maybe"),
        ("what color is the shape?", "circle"),
    ):
        with pytest.raises(DataError, match="not an easy-VQA question"):
            facts_of(question, answer)
    assert len(COLORS) == 8 and len(SHAPES) == 3


def test_easy_vqa_captions_come_from_their_own_split_and_say_what_the_answers_say() -> None:
    captions, questions = easy(task="caption"), easy(task="conversation")
    assert len(captions) == 3_971 and len(questions) == 4_000
    answers = {sample.image: sample.pairs for sample in questions.samples}
    for sample in captions.samples:
        words = set(sample.pairs[0][1].split()) - {"a", "shape"}
        assert words  # proves something
        for _, answer in answers[sample.image]:
            if answer in COLORS and len(words) == 2:
                assert answer in words
            if answer in SHAPES:
                assert answer in words
    first = captions[0]
    assert first.turns == (
        Turn("user", "<image>\ndescribe the image."),
        Turn("assistant", "a blue rectangle"),
    )
    assert first.key == "e#0" and first.kind == "caption"
    assert open_image(first.images[0]).size == (64, 64)
    assert "train" in str(first.images[0].root) and "test" in str(easy(split="test")[0].images[0].root)


def test_easy_vqa_conversations_hold_every_question_once_and_at_most_turns() -> None:
    singles = sorted((sample.image, sample.pairs[0]) for sample in easy(split="test").samples)
    for turns, size in ((None, 1_000), (4, None)):
        source = easy(split="test", task="conversation", turns=turns)
        assert size is None or len(source) == size
        assert sorted((s.image, pair) for s in source.samples for pair in s.pairs) == singles
        assert all(len(s.pairs) <= (turns or 99) for s in source.samples)
        assert all(
            sample.image_marks == 1 and sample.turns[0].text.startswith("<image>\n") for sample in source
        )
    prints = {easy(split="test", task=task).fingerprint for task in ("question", "conversation", "caption")}
    assert len(prints) == 3 and easy(split="test").fingerprint in prints
