"""What is set before Gradio is imported, so that the page has to do with this machine alone."""

import os


HOST = "127.0.0.1"
_PROXIES = ("no_proxy", "NO_PROXY")


def keep_to_this_machine() -> None:
    """Sets this process's environment: no telemetry, nothing that somebody has set for Gradio pages
    of theirs, and no proxy between this machine and itself.
    """
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        del os.environ[name]
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for name in _PROXIES:
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), HOST)))
