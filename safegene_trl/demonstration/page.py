"""The page in the browser, by Gradio, which is imported here and nowhere else.

It listens on 127.0.0.1 alone, is told nothing but a prompt of the list and a place of the slider,
and asks nobody else for anything: its fonts are the machine's, and a browser is told to fetch
nothing from elsewhere.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..errors import ConfigError, SafeGeneError
from ..judges.intervals import Rate
from ..reporting.outcome import ANSWERED
from ..text import markdown, one_line
from .privacy import HOST
from .prompts import KINDS
from .side_by_side import STEPS, SideBySide


TITLES = {
    "aligned": "aligned",
    "fine_tune": "fine-tuned",
    "safeguarded": "safeguarded, at the slider",
}
_POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; form-action 'none'"
_NARROWEST = 220  # pixels of a column: three stand side by side in a small window
Texts = list[str]


class OwnOnly:
    """ASGI middleware: tells the browser to fetch nothing from elsewhere."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Adds a Content-Security-Policy to every response."""

        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = [*message["headers"], (b"content-security-policy", _POLICY)]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, with_policy)


def answers(models: SideBySide, prompt: str, slider: float) -> Iterator[Texts]:
    """An answer and what the judge says of it, for each column, as they come."""
    texts = [""] * (2 * len(models.roles))
    for place, role in enumerate(models.roles):
        shown = models.answer(role, prompt, slider)
        texts[2 * place : 2 * place + 2] = shown.answer, ANSWERED.get(shown.label, shown.label)
        yield list(texts)


def refusals(models: SideBySide, slider: float) -> Iterator[Texts]:
    """How many harmful prompts are refused, for each column, as it is counted."""
    texts = ["…"] * len(models.roles)
    for place, role in enumerate(models.roles):
        yield list(texts)
        texts[place] = _told(
            models.refused(role, slider), slider if role == "safeguarded" else None
        )
    yield texts


def _told(rate: Rate | None, slider: float | None) -> str:
    if rate is None:
        return "the vector brings no harmful prompts"
    at = "" if slider is None else f"at {round(slider * STEPS) / STEPS:g}: "
    low, high = rate.interval
    return f"{at}refused {rate.successes} of {rate.count} (95 % interval: {low:.0%}–{high:.0%})"


def _plainly(call: Callable[..., Iterator[Texts]], models: SideBySide) -> Callable[..., Any]:
    """The call as Gradio takes it, errors in one sentence."""

    def told(*inputs: Any) -> Iterator[Texts]:
        try:
            yield from call(models, *inputs)
        except SafeGeneError as error:
            raise gr.Error(one_line(error), print_exception=False) from error

    return told


def build_page(models: SideBySide) -> gr.Blocks:
    """The page: prompt and slider, a column for each model, and the counts."""
    choices = [(f"{one.text}  ({KINDS[one.kind]})", text) for text, one in models.prompts.items()]
    limit = models.tuned.asking.max_new_tokens
    with gr.Blocks(title="safegene demo", analytics_enabled=False, fill_width=True) as page:
        gr.Markdown(
            "# What the safety step does\n\nOne prompt, the same for every model. Move the slider: at 0 the last column is the "
            "fine-tune, at 1 the safeguarded model as it was released, between them the fine-tune with that share of the "
            f"coefficients. Answers are greedy, and cut at {limit} tokens."
        )
        prompt = gr.Dropdown(choices, value=choices[0][1], label="Prompt", filterable=False)
        slider = gr.Slider(0, 1, value=1, step=1 / STEPS, label="Share of the coefficients")
        shown: list[Any] = []
        counted: list[Any] = []
        with gr.Row():
            for role in models.roles:
                with gr.Column(min_width=_NARROWEST):
                    title = TITLES[role]
                    shown.append(gr.Textbox(label=title, lines=9, interactive=False))
                    shown.append(gr.Textbox(label=f"{title}: it …", interactive=False))
                    counted.append(gr.Textbox(label="Harmful prompts", interactive=False))
        count = gr.Button(
            f"Count refusals of {models.harmful_count} harmful prompts at this place of the slider"
        )
        gr.Markdown("\n".join(f"- {markdown(note)}" for note in _notes(models)))
        shared: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "models"}
        gr.on(
            [page.load, prompt.change, slider.change],
            _plainly(answers, models),
            [prompt, slider],
            shown,
            api_name="answers",
            trigger_mode="always_last",
            **shared,
        )
        count.click(_plainly(refusals, models), [slider], counted, api_name="refusals", **shared)
    return page


def _notes(models: SideBySide) -> Iterator[str]:
    """What stands below the columns."""
    if models.aligned is not None:
        yield f"Aligned: {models.aligned.name}."
    yield f"Fine-tuned and safeguarded: {models.tuned.name}, in memory once."
    yield from models.notes
    yield "Of harmful prompts only counts are shown, and no answer leaves the function that counts."


@contextmanager
def served(models: SideBySide, port: int) -> Iterator[str]:
    """While open, the page is there; gives its address.

    Raises:
        ConfigError: The port is in use, or may not be used.
    """
    page = build_page(models)
    try:
        _, address, _ = page.launch(
            server_name=HOST,
            server_port=free_port(port),
            share=False,
            root_path="",
            prevent_thread_lock=True,
            quiet=True,
            theme=gr.themes.Base(
                font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
            ),
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            max_file_size=1,  # byte: nothing is to be uploaded
            app_kwargs={
                "middleware": [
                    Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
                    Middleware(OwnOnly),
                ]
            },
        )
        yield address
    except OSError as error:
        raise _no_port(port) from error
    finally:
        models.end()
        page.close(verbose=False)


def free_port(port: int) -> int:
    """The port itself where it can be listened on, and a free one for 0.

    Raises:
        ConfigError: It cannot.
    """
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((HOST, port))
        except OSError as error:
            raise _no_port(port) from error
        found: int = tried.getsockname()[1]
        return found


def _no_port(port: int) -> ConfigError:
    return ConfigError(
        f"Port {port} at {HOST} cannot be listened on: leave out `port`, which takes a free one."
    )
