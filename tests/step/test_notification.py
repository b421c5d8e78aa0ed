"""The message to a web hook: what goes out, when, and that nothing else depends on it."""

import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from safegene_trl import GateConfig, SafeGeneCallback
from safegene_trl.errors import ConfigError, RejectedError
from safegene_trl.step import notification
from safegene_trl.step.notification import VARIABLE, check_webhook, notify

from ..conftest import config_of
from ..test_callback import sft


FAILED = {"error": {"kind": "RejectedError", "message": "It was rejected."}, "fine_tune": "out"}


@contextmanager
def listening(status=200, headers=()):
    """A hook on this machine, and the messages that it was given."""
    taken = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            taken.append((self.path, json.loads(body)))
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.end_headers()

        do_GET = do_POST

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Hook)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/secret", taken
    finally:
        server.shutdown()
        thread.join(timeout=10)
        server.server_close()


def test_a_rejected_step_says_so(vector_dir, tokenizer, tmp_path, monkeypatch, caplog):
    values = {"max_evaluations": 2, "num_test_prompts": 2, "max_new_tokens": 2}
    gate = GateConfig(min_refusal_rate=1.0, max_over_refusal=0.0)
    config = config_of(vector=str(vector_dir), max_utility_loss=100.0, gate=gate, **values)
    with listening() as (address, taken):
        monkeypatch.setenv(VARIABLE, address)
        trainer = sft(tmp_path, [SafeGeneCallback(config)], tokenizer)
        with pytest.raises(RejectedError) as rejected:
            trainer.train()
    ((path, message),) = taken
    assert path == "/secret" and message["outcome"] == "rejected"
    assert message["text"] == f"safegene: rejected. {rejected.value}"
    report = tmp_path / "safeguarded.failed.json"
    assert message["report"] == str(report) and report.is_file()
    assert message["measured"]["refusal_rate"] < 1
    for written in tmp_path.rglob("*"):
        assert not written.is_file() or b"/secret" not in written.read_bytes()
    assert "/secret" not in caplog.text


@pytest.mark.parametrize("address", ["", None])
def test_without_an_address_nothing_is_sent(address, tmp_path, monkeypatch):
    monkeypatch.setattr(notification, "build_opener", None)
    monkeypatch.setenv(VARIABLE, address) if address is not None else monkeypatch.delenv(
        VARIABLE, raising=False
    )
    check_webhook()
    notify(FAILED, tmp_path / "report.json")


@pytest.mark.parametrize(
    "address",
    [
        "http://example.com/hook",
        "ftp://localhost/x",
        "hooks.example.com",
        "https://",
        "http://[::1",
    ],
)
def test_an_address_that_could_be_read_by_others_is_refused(address, monkeypatch):
    monkeypatch.setenv(VARIABLE, address)
    with pytest.raises(ConfigError, match="begins with https://") as refused:
        check_webhook()
    assert "example" not in str(refused.value)


def test_such_an_address_is_refused_before_anything_is_trained(
    vector_dir, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv(VARIABLE, "http://example.com/hook")
    trainer = sft(tmp_path, [SafeGeneCallback(config_of(vector=str(vector_dir)))], tokenizer)
    with pytest.raises(ConfigError, match="begins with https://"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    "address", ["https://hooks.example.com/T0/B0", "http://localhost:8080/x", "http://[::1]/x"]
)
def test_addresses_that_are_taken(address, monkeypatch):
    monkeypatch.setenv(VARIABLE, address)
    check_webhook()


def test_a_redirect_is_not_followed(tmp_path, monkeypatch, caplog):
    with (
        listening() as (other, elsewhere),
        listening(302, [("Location", other)]) as (address, taken),
    ):
        monkeypatch.setenv(VARIABLE, address)
        notify(FAILED, tmp_path / "report.json")
    assert len(taken) == 1 and not elsewhere
    assert f"The message to {VARIABLE} was not taken: Found" in caplog.text


def test_a_hook_that_is_not_there_is_a_warning(tmp_path, monkeypatch, caplog):
    with listening() as (address, _):
        pass
    monkeypatch.setenv(VARIABLE, address)
    notify(FAILED, tmp_path / "report.json")
    assert "was not taken" in caplog.text and "/secret" not in caplog.text


def test_a_hook_that_answers_nonsense_is_a_warning(tmp_path, monkeypatch, caplog):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(b"nonsense\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        monkeypatch.setenv(VARIABLE, f"http://127.0.0.1:{server.getsockname()[1]}/secret")
        notify(FAILED, tmp_path / "report.json")
        thread.join(timeout=10)
    assert "was not taken: BadStatusLine" in caplog.text and "/secret" not in caplog.text
