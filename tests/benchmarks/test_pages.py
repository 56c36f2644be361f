"""The pages of the methods quote the newest results, with their date and commit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks.opened import opened

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "file"), [("sq_llava", "table.py"), ("ross", "figures.py")])
def test_a_method_page_quotes_its_small_reproduction(name: str, file: str):
    report = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    page = (ROOT / "recipes" / name / "README.md").read_text()
    missing = [line for line in opened(name, file).table_lines(report) if line not in page]
    assert not missing, f"copy the printed table into recipes/{name}/README.md"
    assert f"{report['date'][:10]}, commit {report['commit']['hash'][:7]}" in page
    assert not report["settings"]["quick"] and not report["commit"]["dirty"]
    assert min(len(each["seeds"]) for each in report["arms"].values()) >= 3
