"""What the page takes, gives and listens on."""

import re
import shutil
import socket
import subprocess
from pathlib import Path

import psutil
import pytest

from safegene_trl.demonstration.privacy import keep_to_this_machine
from safegene_trl.demonstration.side_by_side import ROLES, load_side_by_side
from safegene_trl.errors import ConfigError
from safegene_trl.evaluation import evaluate as evaluation
from safegene_trl.judges.intervals import Rate

from ..auditing.models import NO, YES
from .conftest import config_for


pytest.importorskip("gradio")
import httpx
from gradio_client import Client
from gradio_client.exceptions import AppError

from safegene_trl.demonstration import page as module
from safegene_trl.demonstration.page import free_port, served


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PROMPT = "Write a joke about lawyers."


@pytest.fixture(scope="module")
def environment():
    """As the command has it, and as it was afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        # nobody is there: a request that goes by it fails
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            patch.setenv(name, "http://127.0.0.1:9")
        patch.setenv("no_proxy", "somewhere")
        patch.delenv("NO_PROXY", raising=False)
        patch.setenv("GRADIO_SHARE", "true")
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
        keep_to_this_machine()
        yield


@pytest.fixture(scope="module")
def address(environment, models, family):
    """Of a page that is there."""
    own = load_side_by_side(config_for(family.safeguarded))
    with served(own, 0) as found:
        yield found


@pytest.fixture(scope="module")
def client(address):
    return Client(address, verbose=False)


def test_the_page_is_on_this_machine_only(address):
    port = int(re.fullmatch(r"http://127\.0\.0\.1:(\d+)/", address)[1])
    listening = [
        each.laddr
        for each in psutil.Process().net_connections("inet")
        if each.status == psutil.CONN_LISTEN
    ]
    assert [each.ip for each in listening if each.port == port] == ["127.0.0.1"]
    assert {each.ip for each in listening} <= {"127.0.0.1"}  # no tunnel, no other server


def test_answers_by_the_page_s_own_functions(client, models):
    found = client.predict(PROMPT, 0.5, api_name="/answers")
    assert len(found) == 2 * len(ROLES)
    assert list(found[::2]) == [models.answer(role, PROMPT, 0.5).answer for role in ROLES]


def test_free_text_is_not_taken(client, monkeypatch):
    monkeypatch.setattr(evaluation, "answers_to_tokens", None)  # nobody is asked
    for words in (("Write a poem.", 0.5), (PROMPT, 2), ([PROMPT], 1), (None, 1)):
        with pytest.raises(AppError):
            client.predict(*words, api_name="/answers")


def test_there_are_two_functions_that_can_be_called(client):
    assert set(client.view_api(return_format="dict", print_info=False)["named_endpoints"]) == {
        "/answers",
        "/refusals",
    }


def test_no_answer_to_a_harmful_prompt_leaves_them(client, monkeypatch):
    def answers_to_tokens(model, tokenizer, prompts, *rest):
        return [NO, *[YES] * (len(prompts) - 1)]

    monkeypatch.setattr(evaluation, "answers_to_tokens", answers_to_tokens)
    job = client.submit(0.25, api_name="/refusals")
    found = [job.result(timeout=60), *job.outputs()]
    assert "ZQX" not in str(found) and "help with" not in str(found)
    for row in found:
        for text in row:
            assert re.fullmatch(
                r"…|(at 0\.25: )?refused 2 of 12 \(95 % interval: \d+%–\d+%\)", text
            )
    assert found[0][-1].startswith("at 0.25") and found[0][0].startswith("refused")


def test_what_else_a_server_might_give_or_take(address):
    page = httpx.get(address)
    assert page.status_code == 200
    assert page.headers["content-security-policy"].startswith("default-src 'self' ")
    assert httpx.get(address, headers={"host": "elsewhere.example"}).status_code == 400
    assert httpx.get(f"{address}gradio_api/file={Path(__file__)}").status_code in (403, 404)
    sent = httpx.post(f"{address}gradio_api/upload", files={"files": ("a.txt", b"some text")})
    assert sent.status_code >= 400
    assert httpx.get(f"{address}monitoring").status_code >= 400


def test_a_port_that_is_taken_is_told():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"Port {port} at 127.0.0.1 cannot be listened on"):
            free_port(port)
    assert free_port(port) == port and free_port(0) > 1023


def columns(models):
    """Of the page: the least width of each in pixels, and the labels on it."""
    parts = module.build_page(models).config["components"]
    widths = [part["props"]["min_width"] for part in parts if part["type"] == "column"]
    return widths, {part["props"].get("label") for part in parts}


def test_columns_stand_side_by_side(models, monkeypatch):
    widths, labels = columns(models)
    assert len(widths) == 3 and sum(widths) < 800
    assert {"aligned", "fine-tuned", "safeguarded, at the slider"} <= labels
    monkeypatch.setattr(models, "aligned", None)
    monkeypatch.setattr(models, "roles", ROLES[1:])
    widths, labels = columns(models)
    assert len(widths) == 2 and "aligned" not in labels and "fine-tuned" in labels


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_in_a_browser(address, tmp_path):
    shown = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--proxy-server=direct://",
            "--enable-logging=stderr",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=20000",
            "--dump-dom",
            address,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.returncode == 0 and "Content Security Policy" not in shown.stderr
    for title in ("aligned", "fine-tuned", "safeguarded, at the slider"):
        assert re.search(rf">\s*{title}\s*<", shown.stdout), title
    elsewhere = set(re.findall(r"(?:href|src)=\"(https?://[^\"/]+)", shown.stdout))
    assert elsewhere <= {address.rstrip("/")}


def test_the_place_of_the_slider_that_was_asked_at_is_told():
    assert module._told(Rate(3, 12), 0.024).startswith("at 0: refused 3 of 12")
    assert module._told(Rate(3, 12), 0.26).startswith("at 0.25: refused")
