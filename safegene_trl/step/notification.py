"""A message to a web hook where a step is rejected or fails, for pipelines that nobody watches.

Its address is a secret as a rule, so that it comes from the environment and stands in no setting,
report or log.
"""

import ipaddress
import json
import logging
import os
from collections.abc import Mapping
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from ..config.metrics import METRICS
from ..errors import ConfigError


logger = logging.getLogger(__name__)
VARIABLE = "SAFEGENE_WEBHOOK"
LONGEST_WAIT = 10  # seconds


class _NoRedirect(HTTPRedirectHandler):
    """What is posted goes to the address that was named, and to no other."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def check_webhook() -> None:
    """Checks the address before the training.

    Raises:
        ConfigError: It is no https address, nor one of this machine.
    """
    address = os.environ.get(VARIABLE)
    if not address:
        return
    try:
        parts = urlsplit(address)
        host, _ = parts.hostname, parts.port
    except ValueError:
        parts, host = None, None
    if parts is None or not host or not (parts.scheme == "https" or _is_here(parts.scheme, host)):
        raise ConfigError(
            f"The environment variable {VARIABLE} is no address that a message can go to: set it to one that begins with https://, "
            "or unset it."
        )


def _is_here(scheme: str, host: str) -> bool:
    """Whether it is plain http to this machine itself."""
    try:
        own = ipaddress.ip_address(host).is_loopback
    except ValueError:
        own = host == "localhost"
    return scheme == "http" and own


def notify(report: Mapping[str, Any], place: Path) -> None:
    """Posts what became of a step that released nothing, as JSON. That it cannot be sent is a warning,
    and hides no error of the step.

    Args:
        report: As it was written: no prompt, answer or setting of it is sent.
        place: Where it lies.
    """
    address = os.environ.get(VARIABLE)
    if not address:
        return
    message = json.dumps(message_of(report, place)).encode()
    request = Request(address, message, {"Content-Type": "application/json"}, method="POST")
    try:
        with build_opener(_NoRedirect).open(request, timeout=LONGEST_WAIT):
            pass
    except (OSError, ValueError, HTTPException) as error:
        reason = error.reason if isinstance(error, URLError) else type(error).__name__
        logger.warning("The message to %s was not taken: %s", VARIABLE, reason)


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
