"""A finished folder uploaded to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from vlmtune.errors import CheckpointError
from vlmtune.export.folder import read_json

_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
"""Removed from the repository unless uploaded: model.safetensors of an earlier push is read before an index."""


def push_folder(folder: Path, repo: str, private: bool = True) -> str:
    """The address of the model repository that holds `folder` and the weights of nothing else.

    The repository is made if it is not there. Raises CheckpointError when the folder is not a finished export,
    when it links outside, when the repository is public and should not be, or when the hub refuses.
    """
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import OfflineModeIsEnabled

    name = _demand_complete(folder)
    if get_token() is None:
        raise CheckpointError("there is no token for the hub", repo, "Run `hf auth login`, or set HF_TOKEN.")
    api = HfApi()
    try:
        address = str(api.create_repo(repo, repo_type="model", private=private, exist_ok=True))
        if private and not api.model_info(repo).private:
            raise CheckpointError("the repository is public already", repo, "Give --public, or another name.")
        api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            repo_type="model",
            commit_message=f"Upload {name} (vlmtune)",
            delete_patterns=_WEIGHTS,
        )
    except OfflineModeIsEnabled as error:
        raise CheckpointError(
            "the hub is switched off", repo, f"Unset HF_HUB_OFFLINE. The folder {folder} is complete."
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # the HTTP client, and its errors, change with huggingface_hub's version
        raise CheckpointError(
            f"the hub refused or is out of reach: {error}",
            repo,
            f"The folder {folder} is complete: try again.",
        ) from error
    return address


def _demand_complete(folder: Path) -> str:
    """The name of a finished export; raises CheckpointError when it is none, or when a file lies elsewhere."""
    manifest = read_json(folder / "manifest.json")
    if manifest.get("kind") != "export":
        raise CheckpointError(
            "is not a finished export", str(folder), "Export, merge or convert into it first."
        )
    root = folder.resolve()
    outside = [path for path in folder.rglob("*") if not path.resolve().is_relative_to(root)]
    if outside:
        raise CheckpointError(
            f"{outside[0].name} is a link to another place",
            str(folder),
            "Replace it by what is to be uploaded.",
        )
    return manifest.get("name", folder.name)
