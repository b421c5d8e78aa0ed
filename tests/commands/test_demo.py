"""`safegene demo` as a command: what it says before it loads anything, and how it ends."""

import json
import signal
import subprocess
import sys
import urllib.request
import webbrowser
from contextlib import contextmanager
from importlib.util import find_spec
from threading import Timer

import pytest

from safegene_trl.commands import demo
from safegene_trl.commands.main import main
from safegene_trl.demonstration.config import DemoConfig

from ..demonstration.conftest import make_family


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("safegene_trl.demonstration.side_by_side.load_placed", refuse)


def test_without_gradio_it_is_one_sentence(tmp_path, monkeypatch, capsys, nothing_is_loaded):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    assert main(["demo", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said == "safegene demo: The demo needs Gradio: pip install 'safegene-trl[demo]'.\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "No safeguarded checkpoint is named"),
        (["out", "--port", "70000"], "`port` is 70000: it must be"),
        (["out", "--max_new_tokens", "0"], "`max_new_tokens` is 0: it must be"),
        (["out", "--share"], "Unknown key `share` in the command line"),
        (["out", "--prompt", "hello"], "Unknown key `prompt` in the command line"),
    ],
)
def test_options_that_are_wrong_are_told_first(words, said, capsys, nothing_is_loaded):
    assert main(["demo", *words]) == 2
    assert capsys.readouterr().err.startswith(f"safegene demo: {said}")


@pytest.mark.skipif(find_spec("gradio") is None, reason="Gradio is not installed")
def test_a_folder_that_is_none_is_told(tmp_path, capsys, nothing_is_loaded):
    assert main(["demo", str(tmp_path), "--no_browser"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"safegene demo: {tmp_path} is no safeguarded checkpoint")
    assert len(said.splitlines()) == 1


@pytest.mark.skipif(find_spec("gradio") is None, reason="Gradio is not installed")
def test_its_document_is_where_it_was(tmp_path, monkeypatch, capsys):
    @contextmanager
    def served(models, port):
        yield "http://127.0.0.1:1"

    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr("safegene_trl.demonstration.side_by_side.load_side_by_side", str)
    monkeypatch.setattr("safegene_trl.demonstration.page.served", served)
    monkeypatch.setattr(DemoConfig, "check", lambda self: None)
    monkeypatch.setattr("threading.Event.wait", stop)
    assert main(["demo", str(tmp_path), "--no_browser", "--json"]) == 0
    printed = capsys.readouterr()
    found = {"release": str(tmp_path), "address": "http://127.0.0.1:1"}
    assert json.loads(printed.out) == found and "127.0.0.1:1 (until" in printed.err


@pytest.mark.skipif(find_spec("gradio") is None, reason="Gradio is not installed")
def test_it_opens_the_page_and_ends_by_ctrl_c(tmp_path, tokenizer, monkeypatch, capsys):
    places = make_family(tmp_path, tokenizer)
    for name in ("no_proxy", "NO_PROXY", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")  # and put back afterwards
    opened = []

    def open_browser(address):
        opened.append((address, page_at(address)))
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(webbrowser, "open", open_browser)
    capsys.readouterr()
    assert main(["demo", str(places.safeguarded), "--max_new_tokens", "8"]) == 0
    ((address, page),) = opened
    assert b"gradio" in page
    assert capsys.readouterr().out == f"{places.safeguarded}: {address} (until Ctrl-C)\n"
    with pytest.raises(OSError):
        page_at(address)


def page_at(address):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address, timeout=30) as page:
        return page.read()


@pytest.mark.exhaustive
@pytest.mark.skipif(find_spec("gradio") is None, reason="Gradio is not installed")
def test_as_a_process_it_ends_without_noise(tmp_path, tokenizer):
    places = make_family(tmp_path, tokenizer)
    command = [sys.executable, "-m", "safegene_trl", "demo", str(places.safeguarded)]
    process = subprocess.Popen(
        [*command, "--no_browser", "--max_new_tokens", "8"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watch = Timer(180, process.kill)
    watch.start()
    try:
        line = process.stdout.readline()
        assert line.startswith(f"{places.safeguarded}: http://127.0.0.1:"), process.stderr.read()
        address = line.split(": ")[1].split()[0]
        assert b"gradio" in page_at(address)
        process.send_signal(signal.SIGINT)
        out, errors = process.communicate(timeout=60)
    finally:
        watch.cancel()
        process.kill()
    assert process.returncode == 0 and out == "" and "Traceback" not in errors
