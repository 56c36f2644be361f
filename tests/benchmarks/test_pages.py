"""The pages of the methods quote the newest results, with their date and commit."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def table_lines(folder: str, file: str, report: dict) -> list[str]:
    """The table as the benchmark prints it."""
    spec = importlib.util.spec_from_file_location(f"{folder}_table", ROOT / "benchmarks" / folder / file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return list(module.table_lines(report))


@pytest.mark.parametrize(("name", "file"), [("sq_llava", "table.py"), ("ross", "figures.py")])
def test_a_method_page_quotes_its_small_reproduction(name: str, file: str):
    report = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    page = (ROOT / "recipes" / name / "README.md").read_text()
    missing = [line for line in table_lines(name, file, report) if line not in page]
    assert not missing, f"copy the printed table into recipes/{name}/README.md"
    assert f"{report['date'][:10]}, commit {report['commit']['hash'][:7]}" in page
    assert not report["settings"]["quick"] and not report["commit"]["dirty"]
    assert min(len(each["seeds"]) for each in report["arms"].values()) >= 3
