"""Uploading: only a finished folder, only what lies in it, private unless asked."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from tests.tiny import tiny_model
from vlmtune.errors import CheckpointError
from vlmtune.export.hf import export_model
from vlmtune.export.probe import probe_batch
from vlmtune.export.push import push_folder

REPO = "me/model"


class FakeApi:
    """Records what it is asked; its repository is public or private, and it may fail."""

    def __init__(self, private: bool = True, error: Exception | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.private = private
        self.error = error

    def create_repo(self, repo_id: str, **options: Any) -> str:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        if self.error:
            raise self.error
        return f"https://huggingface.co/{repo_id}"

    def model_info(self, repo_id: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private)

    def upload_folder(self, **options: Any) -> None:
        self.calls.append(("upload_folder", options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, processor = tiny_model()
    out = tmp_path_factory.mktemp("push") / "export"
    return export_model(model, processor, out, None, probe_batch(model, processor), {}).path


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    fake = FakeApi()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    return fake


@pytest.mark.parametrize("private", [True, False])
def test_what_is_asked_of_the_hub(folder: Path, api: FakeApi, private: bool) -> None:
    assert push_folder(folder, REPO, private) == f"https://huggingface.co/{REPO}"
    (create, made), (upload, sent) = api.calls
    assert (create, upload) == ("create_repo", "upload_folder")
    assert made == {"repo_id": REPO, "repo_type": "model", "private": private, "exist_ok": True}
    assert sent == {
        "repo_id": REPO,
        "folder_path": folder,
        "repo_type": "model",
        "commit_message": "Upload export (vlmtune)",
        "delete_patterns": ["*.safetensors", "*.safetensors.index.json"],
    }


def test_the_hub_takes_these_arguments() -> None:
    """The fake takes anything; the real functions are asked by name."""
    import inspect

    for name, words in {
        "create_repo": {"repo_type", "private", "exist_ok"},
        "upload_folder": {"repo_id", "folder_path", "repo_type", "commit_message", "delete_patterns"},
    }.items():
        assert words <= inspect.signature(getattr(huggingface_hub.HfApi, name)).parameters.keys()


def test_a_public_repository_is_not_taken_for_private(folder: Path, api: FakeApi) -> None:
    api.private = False
    with pytest.raises(CheckpointError, match="public already"):
        push_folder(folder, REPO)
    assert [name for name, _ in api.calls] == ["create_repo"]


def test_nothing_outside_the_folder_is_uploaded(folder: Path, api: FakeApi, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    (folder / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="link is a link to another place"):
        push_folder(folder, REPO)
    (folder / "link").unlink()
    assert not api.calls


def test_only_finished_folders_are_uploaded(api: FakeApi, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"kind": "step"}')
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CheckpointError, match="not a finished export"):
            push_folder(path, REPO)
    assert not api.calls


def test_without_a_token(folder: Path, api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(CheckpointError, match=r"no token.*hf auth login"):
        push_folder(folder, REPO)
    assert not api.calls


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OfflineModeIsEnabled("offline"), "Unset HF_HUB_OFFLINE"),
        (ConnectionError("no route"), r"out of reach: no route.*try again"),
        (HfHubHTTPError("403", response=SimpleNamespace(headers={}, request=None)), "refused.*403"),
    ],
)
def test_a_hub_that_fails(folder: Path, api: FakeApi, error: Exception, says: str) -> None:
    api.error = error
    with pytest.raises(CheckpointError, match=says):
        push_folder(folder, REPO)
    assert folder.is_dir()
