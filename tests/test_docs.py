"""README and CHANGELOG say what is so: commands, files and figures are looked up, examples are run."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from tests.tiny import tiny_images, tiny_model
from vlmtune.cli import app
from vlmtune.config.loader import load_mix
from vlmtune.config.tuning import TuningConfig
from vlmtune.data.faults import check_mix

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TESTS = (ROOT / "tests" / "README.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
PAGES = {str(path.relative_to(ROOT)): path.read_text() for path in ROOT.glob("recipes/**/README.md")} | {
    "README.md": README,
    "tests/README.md": TESTS,
    "benchmarks/README.md": (ROOT / "benchmarks/README.md").read_text(),
}
RECIPES = sorted(path for path in ROOT.glob("recipes/*/*.yaml") if path.parent.name != "launch")


def fences(page: str, *kinds: str) -> list[str]:
    return [body for kind, body in re.findall(r"^```(\w+)\n(.*?)^```$", page, re.M | re.S) if kind in kinds]


def commands(page: str) -> list[list[str]]:
    """The words of every `vlmtune ...` line of the page's fences; what stands after wide blanks explains it."""
    lines = "\n".join(fences(page, "bash", "text")).replace("\\\n", " ").splitlines()
    wanted = (re.split(r"\s{3,}|\s#", line)[0] for line in lines if re.search(r"(^|-m )vlmtune ", line))
    return [shlex.split(line[line.index("vlmtune ") :]) for line in wanted]


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_their_options_exist(page):
    known = get_command(app).commands
    for _, name, *words in commands(PAGES[page]):
        assert name in known, f"{page}: vlmtune {name}"
        options = {option for parameter in known[name].params for option in parameter.opts}
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= options, f"{page}: vlmtune {name} has no {sorted(given - options)}"


def test_extras_that_are_named_exist():
    """In pages, recipes, mixes and error messages."""
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    files = [
        path
        for path in ROOT.glob("*/**/*")
        if path.suffix in (".md", ".yaml", ".py") and path.parts[len(ROOT.parts)][0] != "."
    ]
    named = {
        extra
        for text in (README, *(path.read_text() for path in files))
        for group in re.findall(r"vlmtune\[([a-z,]+)\]", text)
        for extra in group.split(",")
    }
    assert len(named) >= 5 and named <= extras


def test_the_readme_shows_every_command():
    assert {name for _, name, *_ in commands(README)} == set(get_command(app).commands)


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page):
    named = re.findall(r"\b(?:recipes|data_mixes|benchmarks|tests|vlmtune)/[\w./-]*\w", PAGES[page])
    missing = {name for name in named if not (ROOT / name).exists() and Path(name).stem not in ("mine", "x")}
    assert not missing


def test_the_tests_that_the_table_of_pitfalls_names_exist():
    rows = re.findall(r"^\| (\d+)\. .*$", TESTS, re.M)
    assert [int(number) for number in rows] == list(range(1, 26))
    named = re.findall(r"`([\w/]+\.py)::(\w+)`", TESTS)
    missing = [
        f"{file}::{name}"
        for file, name in named
        if f"\ndef {name}(" not in (ROOT / "tests" / file).read_text()
    ]
    assert len(named) > 25 and not missing


def test_make_targets_that_pages_name_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {name for page in PAGES.values() for name in re.findall(r"\bmake ([a-z-]+)", "".join(code(page)))}
    assert named and named <= targets


def code(page: str) -> list[str]:
    return [*fences(page, "bash", "text"), *re.findall(r"`([^`\n]+)`", page)]


def test_the_readme_lists_every_recipe():
    table = README[README.index("## Methods and recipes") :]
    assert [
        path.name for path in RECIPES if path.name not in table and not (path.parent / "README.md").exists()
    ] == []


def test_the_readme_opens_an_export(tmp_path, monkeypatch):
    from vlmtune.export.hf import export_model
    from vlmtune.export.probe import probe_batch
    from vlmtune.models.attention import use_attention

    monkeypatch.chdir(tmp_path)
    model, processor = tiny_model("siglip", "pixel_shuffle")
    use_attention(model, "auto")
    batch = probe_batch(model, processor)
    export_model(model, processor, tmp_path / "runs/demo/export", None, batch, {"recipe": "tiny"})
    (example,) = fences(README, "python")
    found: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), found)
    assert type(found["model"]).__name__ == "VLM" and type(found["processor"]).__name__ == "LlavaProcessor"


def examples() -> list[dict]:
    return [yaml.safe_load(text) for text in fences(README, "yaml")]


def test_the_readme_tuning_is_a_valid_one():
    (tuning,) = (each["tuning"] for each in examples() if "tuning" in each)
    parts = TuningConfig.model_validate(tuning)
    assert [part.mode for part in (parts.vision, parts.projector, parts.language)] == [
        "lora",
        "full",
        "qlora",
    ]


def test_the_readme_mix_and_record_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (mix,), (record,) = (each for each in examples() if "sources" in each), fences(README, "json")
    mix["sources"] = [source for source in mix["sources"] if source["format"] == "chat_jsonl"]
    path = tmp_path / "data_mixes" / "mine.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(mix))
    tiny_images(tmp_path / "data/images", 1)
    (tmp_path / "data/mine.jsonl").write_text(json.dumps(json.loads(record)) + "\n")
    assert check_mix(load_mix(path), path.parent, tmp_path / "cache") == []


def test_the_readme_quotes_the_recorded_scores():
    demo = json.loads((ROOT / "benchmarks/results/demo.json").read_text())
    for value in (demo["accuracy"], demo["accuracy_open"]):
        assert f"{value:.1%}".replace("%", " %") in README
    assert demo["date"][:10] in README


def test_the_changelog_keeps_its_form():
    titles = re.findall(r"^## \[(.+?)\]", CHANGELOG, re.M)
    assert titles[0] == "Unreleased" and len(set(titles)) == len(titles)
    newest = CHANGELOG.partition("## [Unreleased]")[2].partition("\n## [")[0]
    sections = re.findall(r"^### (.+)$", newest, re.M)
    known = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security", "Changes to results"}
    assert "Changes to results" in sections and set(sections) <= known and len(set(sections)) == len(sections)
