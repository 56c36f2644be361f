from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmtune.config.tree import MAX_DEPTH, Place, Tree, merge, read_file, read_text
from vlmtune.errors import Fault


def read(text: str) -> tuple[Tree | None, list[Fault]]:
    faults: list[Fault] = []
    return read_text(text, lambda line: Place("f.yaml", line, Path("/")), (), faults), faults


def grown(text: str) -> Tree:
    tree, faults = read(text)
    assert tree is not None
    assert faults == []
    return tree


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E5", 1e5),
        ("-.5e+3", -500.0),
        ("3.", 3.0),
        ("007", 7),
        ("-12", -12),
        ("true", True),
        ("no", "no"),
        ("off", "off"),
        ("12:30:00", "12:30:00"),
        ("2024-01-01", "2024-01-01"),
        ("none", "none"),
        ("~", None),
        ("", None),
        (".inf", ".inf"),
        ("'1e-4'", "1e-4"),
        ("1e", "1e"),
        ("e5", "e5"),
        ("!!float 3", 3.0),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, value: object):
    found = grown(f"key: {text}").plain()["key"]
    assert found == value
    assert type(found) is type(value)


def test_pyyaml_reads_1e_4_as_a_string():
    assert yaml.safe_load("lr: 1e-4") == {"lr": "1e-4"}  # the trap; when this fails, the resolver can go
    assert grown("lr: 1e-4").plain() == {"lr": 0.0001}


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(deadline=None, max_examples=200)
def test_every_float_reads_back(number: float):
    assert grown(f"x: {number!r}").plain()["x"] == number
    assert grown(f"x: {number:e}").plain()["x"] == float(f"{number:e}")


def test_every_value_knows_the_line_of_its_key():
    tree = grown("a:\n  b: 1\n  c:\n    - x\n    - {d: 2}\ne: >\n  long\n  text\nf: 3\n")
    lines = {"a": 1, "a.b": 2, "a.c": 3, "a.c.0": 4, "a.c.1": 5, "a.c.1.d": 5, "e": 6, "f": 9}
    for dotted, line in lines.items():
        node = tree.find([int(key) if key.isdigit() else key for key in dotted.split(".")])
        assert node is not None
        assert (node.where.line, node.dotted) == (line, dotted)


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("a: 1\nb: {c: 1,\n    c: 2}\n", 3, "b.c is given twice. The first is at f.yaml:2"),
        ("a: 1\nb: [1\n", 3, "not valid YAML: while parsing a flow sequence, expected ',' or ']'"),
        ("a: 1\n\tb: 2\n", 2, "found character '\\t' that cannot start any token"),
        ("a: &x 1\nb: *x\n", 2, "aliases (*name) are not used here"),
        ("a: &x [*x]\n", 1, "aliases (*name) are not used here"),
        ("a: 1\nb: !!python/object/apply:os.system [ls]\n", 2, "the tag tag:yaml.org,2002:python/object"),
        ("a: !secret 1\n", 1, "the tag !secret is not used here"),
        ("a: 1\n? [x]\n: 2\n", 2, "a key must be a plain word"),
        ("a: 1\n---\nb: 2\n", 2, "expected a single document"),
        ("a: 1\nb: \0\n", 2, "special characters are not allowed"),
        ("a: 1\nb: 1e999\n", 2, "b: 1e999 is not a usable float"),
        (f"a: {'9' * 5000}\n", 1, "is not a usable int"),
        ('a: "\\UFFFFFFFF"\n', 1, "not valid YAML"),
        ("[" * 60 + "]" * 60, 1, "nested more than"),
        ("[" * 5000, 1, "nested too deeply"),
    ],
)
def test_what_is_not_a_recipe_is_named_with_its_line(text: str, line: int, what: str):
    _, faults = read(text)
    assert len(faults) >= 1
    assert faults[0].where == f"f.yaml:{line}"
    assert what in str(faults[0])


def test_depth_up_to_the_limit_is_read():
    assert grown("[" * MAX_DEPTH + "]" * MAX_DEPTH).plain() != []


@given(st.text() | st.text("ab:-[]{}#&*!|>'\"%@, \n\t\\xU0", max_size=40))
@settings(deadline=None, max_examples=400)
def test_any_text_gives_a_tree_or_faults(text: str):
    tree, faults = read(text)
    assert tree is not None or faults


def test_files_that_cannot_be_read_are_faults(tmp_path: Path):
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    for name in ("latin.yaml", "none.yaml", ".", "nul\0.yaml", "x" * 5000):
        faults: list[Fault] = []
        assert read_file(tmp_path / name, faults) is None
        assert len(faults) == 1
        assert faults[0].what
        assert faults[0].where


def merged(base: str, over: str) -> object:
    return merge(grown(base), grown(over), {("p",): "type"}).plain()


def test_mappings_merge_and_the_rest_is_replaced():
    assert merged("{a: {b: 1, c: [1, 2]}, d: 4}", "{a: {c: [3]}, d: null}") == {
        "a": {"b": 1, "c": [3]},
        "d": None,
    }
    assert merged("{a: {b: 1}}", "{a: 2}") == {"a": 2}
    assert merged("{a: 2}", "{a: {b: 1}}") == {"a": {"b": 1}}


def test_another_kind_of_mapping_replaces():
    base = "{p: {type: x, old: 1}}"
    assert merged(base, "{p: {type: y}}") == {"p": {"type": "y"}}
    assert merged(base, "{p: {type: x, new: 2}}") == {"p": {"type": "x", "old": 1, "new": 2}}
    assert merged(base, "{p: {new: 2}}") == {"p": {"type": "x", "old": 1, "new": 2}}
    assert merged("{q: {type: x, old: 1}}", "{q: {type: y}}") == {"q": {"type": "y", "old": 1}}


trees = st.recursive(
    st.integers(0, 3), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=8
)


def leaves(value: object, at: tuple[str, ...] = ()) -> dict[tuple[str, ...], object]:
    if not isinstance(value, dict) or not value:
        return {at: value}
    return {path: leaf for key, child in value.items() for path, leaf in leaves(child, (*at, key)).items()}


@given(trees, trees)
@settings(deadline=None, max_examples=150)
def test_every_leaf_of_a_merge_is_the_later_ones_or_else_the_earlier_ones(one: object, two: object):
    base, over = (grown(yaml.safe_dump({"root": value})) for value in (one, two))
    found = merge(base, over, {}).plain()
    early, late = leaves({"root": one}), leaves({"root": two})
    for path, leaf in late.items():
        assert leaf == {} or leaves(found)[path] == leaf
    for path, leaf in leaves(found).items():
        assert late.get(path, early.get(path, {})) == leaf
    assert merge(base, base, {}).plain() == base.plain()
