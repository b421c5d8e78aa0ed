"""Whatever goes wrong with the hub is one plain error; uploads themselves are tested in
`tests/test_hub.py`.
"""

import httpx
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    RepositoryNotFoundError,
)

from safegene_trl.checkpoints.hub import check_hub, upload
from safegene_trl.errors import OutputError


REQUEST = httpx.Request("GET", "https://hub")
ERRORS = [
    httpx.ConnectError("no route"),
    httpx.ReadTimeout("too slow"),
    HfHubHTTPError("forbidden", response=httpx.Response(403, request=REQUEST)),
    HFValidationError("no name"),
    LocalTokenNotFoundError("no token"),
    ValueError("neither\nnor"),
    OSError("no disk"),
    RuntimeError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("method", ["whoami", "model_info", "create_repo", "upload_folder"])
def test_every_failure(error, method, monkeypatch, tmp_path):
    def fails(*arguments, **keywords):
        raise error

    monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(HfApi, "model_info", lambda self, name: None)
    monkeypatch.setattr(
        HfApi, "create_repo", lambda *args, **keywords: type("Url", (), {"repo_id": "me/x"})
    )
    monkeypatch.setattr(HfApi, method, fails)
    reason = str(error).partition("\n")[0] or "RuntimeError"
    message = (
        "cannot be looked up"
        if method in ("whoami", "model_info")
        else f"{tmp_path} is finished, but"
    )
    with pytest.raises(OutputError, match=message) as caught:
        check_hub("me/x")
        upload(tmp_path, "me/x", True)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_offline(tmp_path, monkeypatch):
    """As the tests are: nothing is asked."""
    monkeypatch.setenv("HF_TOKEN", "hf_made_up")
    for act in (lambda: check_hub("me/x"), lambda: upload(tmp_path, "me/x", True)):
        with pytest.raises(OutputError, match="offline"):
            act()


@pytest.mark.parametrize(
    ("role", "repository", "exists", "message"),
    [
        ("read", "me/x", True, "may only read"),
        ("write", "me/x", False, None),
        ("write", "team/x", False, None),
        ("write", "others/x", True, None),
        ("write", "others/x", False, "cannot make it in others"),
        ("fineGrained", "x", False, None),
    ],
)
def test_rights(role, repository, exists, message, monkeypatch):
    def model_info(self, name):
        asked.append(name)
        if not exists:
            raise RepositoryNotFoundError("none", response=httpx.Response(404, request=REQUEST))

    asked = []
    user = {"name": "me", "orgs": [{"name": "team"}], "auth": {"accessToken": {"role": role}}}
    monkeypatch.setattr(HfApi, "whoami", lambda self: user)
    monkeypatch.setattr(HfApi, "model_info", model_info)
    if message is None:
        check_hub(repository)
    else:
        with pytest.raises(OutputError, match=message):
            check_hub(repository)
    assert asked == [repository if "/" in repository else f"me/{repository}"]
