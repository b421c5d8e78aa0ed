"""The message to a web hook: what goes out, when, and that nothing else depends on it."""

import json
import socket
import threading
import time
from contextlib import contextmanager, suppress
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


@contextmanager
def answering(*pieces, pause=0.0):
    """A server on this machine that says these bytes to one caller, a pause before each, and the
    port and what it was asked.
    """
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            connection, _ = server.accept()
            with connection, suppress(OSError):  # the caller has left
                asked.append(connection.recv(65536))
                for piece in pieces:
                    time.sleep(pause)
                    connection.sendall(piece)

        thread = threading.Thread(target=answer)
        thread.start()
        yield server.getsockname()[1], asked
        thread.join(timeout=10)
        assert not thread.is_alive()


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
        "https://example.com:0/x",
        "https://example.com:99999/x",
        " ",
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


HOST = "a host that cannot be"
CHARACTER = "percent-encoded"


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("https://user:pw@example.com/x", "a user name or a password"),
        ("https://user@example.com/x", "a user name or a password"),
        ("https://exa mple.com/x", CHARACTER),
        ("https://example.com/x y", CHARACTER),
        ("https://example.com/x\ty", CHARACTER),
        ("https://example.com/x\ny", CHARACTER),
        ("https://example.com/\x7f", CHARACTER),
        ("https://example.com/b\u00fccher", CHARACTER),
        ("https://example.com/x?name=b\u00fccher", CHARACTER),
        ("https://example..com/x", HOST),
        (f"https://{'x' * 64}.example/x", HOST),
        (f"https://{'example.' * 32}com/x", HOST),
        ("https://exa%20mple.com/x", HOST),
        ("https://example.com\\x", HOST),
        ("https://999.1.1.1/example", HOST),
    ],
)
def test_an_address_that_no_request_takes_is_refused(address, why, monkeypatch):
    """One would learn of it after the training, when it is needed."""
    monkeypatch.setenv(VARIABLE, address)
    with pytest.raises(ConfigError, match=why) as refused:
        check_webhook()
    assert str(refused.value).count(VARIABLE) == 1 and "\n" not in str(refused.value)
    assert not any(part in str(refused.value) for part in ("exa", "pw", "999", "cher"))


@pytest.mark.parametrize("host", ["[::1]x", "[::1]8080", "[v1.x]"])
def test_no_address_of_version_6_is_refused(host, monkeypatch):
    monkeypatch.setenv(VARIABLE, f"https://{host}/x")
    with pytest.raises(ConfigError):
        check_webhook()


@pytest.mark.parametrize(
    ("address", "sent"),
    [
        ("https://hooks.example.com/T0/B0", None),
        ("https://hooks.example.com:8443/T0?key=%20x&y=a@b", None),
        ("https://my_hook.example.com./x", None),
        ("https://192.0.2.1:8443/x", None),
        ("https://[2001:db8::1]:8443/x", None),
        ("http://localhost:8080/x", None),
        ("http://127.0.0.1/x", None),
        ("http://[::1]/x", None),
        ("https://hooks.example.com/x\n", "https://hooks.example.com/x"),
        ("https://b\u00fccher.example:8443/x", "https://xn--bcher-kva.example:8443/x"),
        ("https://\u4f8b\u3048.example/x", "https://xn--r8jz45g.example/x"),
    ],
)
def test_addresses_that_are_taken(address, sent, tmp_path, monkeypatch):
    asked = []

    class Opener:
        def open(self, request, timeout):
            asked.append(request.full_url)
            raise OSError

    monkeypatch.setattr(notification, "build_opener", lambda *handlers: Opener())
    monkeypatch.setenv(VARIABLE, address)
    check_webhook()
    notify(FAILED, tmp_path / "report.json")
    assert asked == [sent or address]


def test_a_redirect_is_not_followed(tmp_path, monkeypatch, caplog):
    with (
        listening() as (other, elsewhere),
        listening(302, [("Location", other)]) as (address, taken),
    ):
        monkeypatch.setenv(VARIABLE, address)
        notify(FAILED, tmp_path / "report.json")
    assert len(taken) == 1 and not elsewhere
    assert f"The message to {VARIABLE} was not taken: 302 Found" in caplog.text


def test_a_hook_that_is_not_there_is_a_warning(tmp_path, monkeypatch, caplog):
    with listening() as (address, _):
        pass
    monkeypatch.setenv(VARIABLE, address)
    notify(FAILED, tmp_path / "report.json")
    assert "was not taken" in caplog.text and "/secret" not in caplog.text


def test_a_hook_that_answers_nonsense_is_a_warning(tmp_path, monkeypatch, caplog):
    with answering(b"nonsense\r\n\r\n") as (port, _):
        monkeypatch.setenv(VARIABLE, f"http://127.0.0.1:{port}/secret")
        notify(FAILED, tmp_path / "report.json")
    assert "was not taken: BadStatusLine" in caplog.text and "/secret" not in caplog.text


@pytest.mark.parametrize(
    "pieces",
    [
        [b"H", b"T", b"T", b"P", b"/", b"1", b".", b"1", b" ", b"2", b"0", b"0"],
        [b"HTTP/1.1 200 OK\r\n", *[b"X-Wait: 1\r\n"] * 11, b"\r\n"],
    ],
)
def test_all_of_it_has_one_deadline(pieces, tmp_path, monkeypatch, caplog):
    """Not each read: a byte now and then would hold the job for as long as the server likes."""
    monkeypatch.setattr(notification, "LONGEST_WAIT", 0.4)
    with answering(*pieces, pause=0.2) as (port, asked):
        monkeypatch.setenv(VARIABLE, f"http://127.0.0.1:{port}/secret")
        begun = time.monotonic()
        notify(FAILED, tmp_path / "report.json")
        assert time.monotonic() - begun < 2  # the pieces take 2.4
    assert asked and "was not taken: there was no answer within 0.4 seconds" in caplog.text


def test_what_a_server_says_reaches_no_terminal(tmp_path, monkeypatch, caplog):
    """Neither its own words for its code, nor those of a proxy, which are told as Python writes them."""
    with answering(b"HTTP/1.1 500 \x1b[2J/secret\r\n\r\n") as (port, _):
        monkeypatch.setenv(VARIABLE, f"http://127.0.0.1:{port}/secret")
        notify(FAILED, tmp_path / "report.json")
    assert "was not taken: 500 Internal Server Error" in caplog.text
    with answering(b"HTTP/1.1 407 \x1b[2J\r\n\r\n") as (port, _):
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        monkeypatch.setenv(VARIABLE, "https://hooks.example.com/secret")
        notify(FAILED, tmp_path / "report.json")
    assert "407 \\x1b[2J" in caplog.text
    assert "\x1b" not in caplog.text and "/secret" not in caplog.text


@pytest.fixture
def proxied(monkeypatch):
    """What a proxy is asked that the environment names for everything, as clusters do."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with answering(b"HTTP/1.1 502 x\r\n\r\n") as (port, asked):
        for name in ("http_proxy", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        yield asked
        with suppress(OSError):  # nobody has asked
            socket.create_connection(("127.0.0.1", port), timeout=1).close()


def test_this_machine_is_asked_without_a_proxy(proxied, tmp_path, monkeypatch):
    """To which the address, a secret, would go in clear text."""
    with listening() as (address, taken):
        monkeypatch.setenv(VARIABLE, address)
        notify(FAILED, tmp_path / "report.json")
    assert len(taken) == 1 and not proxied


def test_another_machine_is_asked_through_the_proxy(proxied, tmp_path, monkeypatch):
    """Which reads the host's name, and no more of the address."""
    monkeypatch.setenv(VARIABLE, "https://hooks.example.com/secret")
    notify(FAILED, tmp_path / "report.json")
    (asked,) = proxied
    assert asked.startswith(b"CONNECT hooks.example.com:443 ") and b"secret" not in asked
