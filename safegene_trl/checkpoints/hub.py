"""A finished checkpoint on the hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from ..errors import OutputError


def check_hub(repository: str) -> None:
    """Raises `OutputError` unless the hub can be reached and this user may upload to a repository;
    makes nothing there.

    A repository that is not there yet must be in the user's own namespace or in that of an
    organization of theirs.
    """
    try:
        api = HfApi()
        user = api.whoami()
        namespace, _, name = repository.rpartition("/")
        namespace = namespace or user["name"]
        exists = _exists(api, f"{namespace}/{name}")
    except Exception as error:  # as many kinds as there are libraries below
        raise OutputError(
            f"{repository} cannot be looked up on the hub ({_reason(error)}): check its name, your token (`hf auth login`) and the "
            "network, or leave out `output.hub_model_id`."
        ) from error
    if _role(user) == "read":
        raise OutputError(
            f"The hub token of {user['name']} may only read: log in with one that may write to {repository}."
        )
    if not exists and namespace not in (
        user["name"],
        *(group["name"] for group in user.get("orgs") or ()),
    ):
        raise OutputError(
            f"{repository} is not on the hub and {user['name']} cannot make it in {namespace}: choose another `output.hub_model_id`."
        )


def upload(folder: Path, repository: str, private: bool) -> None:
    """Puts a finished checkpoint on the hub, in one commit; the repository is made if it is not
    there.

    Raises:
        OutputError: It cannot be uploaded. The folder stays.
    """
    try:
        api = HfApi()
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message="Safeguarded checkpoint"
        )
    except Exception as error:  # as many kinds as there are libraries below
        raise OutputError(
            f"{folder} is finished, but uploading it to {repository} failed ({_reason(error)}): check your access, then `hf upload` it."
        ) from error


def _exists(api: HfApi, repository: str) -> bool:
    try:
        api.model_info(repository)
    except RepositoryNotFoundError:
        return False
    return True


def _role(user: dict[str, Any]) -> str | None:
    return ((user.get("auth") or {}).get("accessToken") or {}).get("role")


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0] or type(error).__name__
