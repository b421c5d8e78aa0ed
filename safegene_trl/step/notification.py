"""A message to a web hook where a step is rejected or fails, for pipelines that nobody watches.

Its address is a secret as a rule, so that it comes from the environment and stands in no setting,
report or log.
"""

import ipaddress
import json
import logging
import os
import re
import socket
import threading
from collections.abc import Mapping
from http.client import responses
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from ..config.metrics import METRICS
from ..errors import ConfigError
from ..text import printable


logger = logging.getLogger(__name__)
VARIABLE = "SAFEGENE_WEBHOOK"
LONGEST_WAIT = 10  # seconds for all of it, from the name's look-up to the answer
_LONGEST_NAME = 253  # characters of a host name (RFC 1035)
_NO_ADDRESS = "is no address that a message can go to: set it to one that begins with https://"


class _NoRedirect(HTTPRedirectHandler):
    """What is posted goes to the address that was named, and to no other."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def check_webhook() -> None:
    """Checks before the training that the address, where one is set, can be used at its end.

    Raises:
        ConfigError: It is no https address, nor one of this machine; it holds a user's name, or a
            character that no request takes; or no host can have that name.
    """
    if os.environ.get(VARIABLE):
        _address()


def _address() -> SplitResult:
    """The address, its host in ASCII and without spaces around it, as files of secrets have them.

    Raises:
        ConfigError: As `check_webhook` says.
    """
    text = os.environ[VARIABLE].strip()
    try:
        parts = urlsplit(text)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise _refused(_NO_ADDRESS) from None  # it holds the address
    allowed = parts.scheme == "https" or (parts.scheme == "http" and _is_here(parts))
    if not host or port == 0 or not allowed:
        raise _refused(_NO_ADDRESS)
    if "@" in parts.netloc:
        raise _refused(
            "holds a user name or a password, which is not sent to a web hook: set it to an address without"
        )
    behind = parts.path + parts.query + parts.fragment
    if re.search(r"[\s\x00-\x1f\x7f]", text) or not behind.isascii():
        raise _refused(
            "holds a space, a control character, or a letter outside ASCII behind its host: write them percent-encoded, as %20 "
            "for a space"
        )
    try:
        host = _ascii_host(host, parts.netloc)
    except (ValueError, OSError):
        raise _refused(
            "names a host that cannot be: write its name as the web hook's own page does"
        ) from None
    return parts._replace(netloc=host if port is None else f"{host}:{port}")


def _refused(why: str) -> ConfigError:
    """What is wrong with the address, which is not told itself."""
    return ConfigError(f"The environment variable {VARIABLE} {why}, or unset it.")


def _ascii_host(host: str, netloc: str) -> str:
    """A host's name as it is asked for (IDNA), or its IP address, that of version 6 in brackets.

    Raises:
        ValueError: There can be no such host.
        OSError: There is no such IP address.
    """
    if netloc.startswith("["):
        if not re.fullmatch(r"\[[^]]*\](:\d*)?", netloc):
            raise ValueError
        return f"[{ipaddress.IPv6Address(unquote(host))}]"
    name = host.encode("idna").decode()  # no label is empty or longer than 63
    if len(name.rstrip(".")) > _LONGEST_NAME or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ValueError
    if name.rstrip(".").rpartition(".")[2].isdigit():
        socket.inet_aton(name)
    return name


def _is_here(parts: SplitResult) -> bool:
    """Whether the host is this machine itself."""
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return parts.hostname == "localhost"


def notify(report: Mapping[str, Any], place: Path) -> None:
    """Posts what became of a step that released nothing, as JSON. That it is not taken within
    `LONGEST_WAIT` seconds is a warning, and hides no error of the step.

    Args:
        report: As it was written: no prompt, answer or setting of it is sent.
        place: Where it lies.
    """
    if not os.environ.get(VARIABLE):
        return
    said: list[str] = []
    message = json.dumps(message_of(report, place)).encode()
    # a socket's own time-out begins anew with every byte that comes, and the look-up of a name has
    # none; the process ends without waiting for a daemon
    exchange = threading.Thread(target=_post, args=(message, said), daemon=True)
    exchange.start()
    exchange.join(LONGEST_WAIT)
    reason = said[0] if said else f"there was no answer within {LONGEST_WAIT} seconds"
    if reason:
        logger.warning("The message to %s was not taken: %s", VARIABLE, printable(reason))


def _post(message: bytes, said: list[str]) -> None:
    """Posts the message, and adds to `said` why it was not taken, or an empty text.

    This machine itself is asked directly. Any other host is asked through the proxy that the
    environment names, if any, and by https, so that the proxy reads the host's name and nothing
    else.
    """
    try:
        address = _address()
        request = Request(
            address.geturl(), message, {"Content-Type": "application/json"}, method="POST"
        )
        proxies = ProxyHandler({} if _is_here(address) else None)
        with build_opener(proxies, _NoRedirect).open(request, timeout=LONGEST_WAIT):
            said.append("")
    except HTTPError as error:  # a server's own words for its code mean nothing (RFC 9112)
        said.append(f"{error.code} {responses.get(error.code, '')}".rstrip())
    except URLError as error:
        said.append(str(error.reason))
    except Exception as error:  # its text may hold the address
        said.append(type(error).__name__)


def message_of(report: Mapping[str, Any], place: Path) -> dict[str, Any]:
    """`text` for people, which most chats show, and the same in parts: `outcome` (`rejected` or
    `failed`), `report`, `fine_tune`, and in `measured` each metric after the step (share 0–1).
    """
    decision, measured = report.get("decision") or {}, report.get("measured") or {}
    outcome = "rejected" if decision.get("outcome") == "rejected" else "failed"
    shares = {key: metric.measured(measured) for key, metric in METRICS.items()}
    return {
        "text": f"safegene: {outcome}. {report['error']['message']}",
        "outcome": outcome,
        "report": str(place),
        "fine_tune": report.get("fine_tune"),
        "measured": {key: found["share"] for key, found in shares.items() if found},
    }
