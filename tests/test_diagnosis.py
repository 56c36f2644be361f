"""vlmtune doctor: everything that is off says why, and what turns it on."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vlmtune import diagnosis
from vlmtune.cli import app
from vlmtune.diagnosis import Finding, attention, kernels, optional


def test_the_report_has_every_section_and_the_versions_in_use() -> None:
    text = CliRunner().invoke(app, ["doctor"]).stdout
    for said in ("python ", "versions", "devices", "attention", "kernels", "optional", "launch", "GiB free"):
        assert said in text, said
    assert importlib.metadata.version("transformers") in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_what_is_off_says_why() -> None:
    found = {finding.name: finding for finding in (*attention(), *kernels())}
    assert found["sdpa"].on and found["eager"].on
    assert found["auto"].why == "is sdpa: no CUDA device"
    assert (
        str(found["flex_attention"]).split(" off ")[1].startswith("no CUDA device; it has no backward pass")
    )
    assert "vlmtune[liger]" in str(found["run.liger"])


def test_a_missing_package_names_an_extra_that_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "_version", lambda package: "")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    missing = [finding for finding in optional() if finding.remedy]
    assert len(missing) >= 10 and not any(finding.on for finding in missing)
    for finding in missing:
        extra = finding.remedy.split("[")[1].split("]")[0]
        brought = project["optional-dependencies"][extra]
        assert any(each.startswith(finding.name) for each in brought), finding


def test_what_is_on_needs_no_remedy() -> None:
    assert str(Finding("a", True, "runs here", "install it")) == f"  {'a':<18} on  runs here"
    assert str(Finding("a", False, "no GPU", "buy one")) == f"  {'a':<18} off no GPU; buy one"
