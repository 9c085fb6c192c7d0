"""`fluvial chat`: talk to the tuned model, with its base beside it."""

import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fluvial import interrupt
from fluvial.cli.console import Format, Overrides, err, finite, out, print_line_of_json
from fluvial.cli.progress import spinner
from fluvial.errors import ConfigError
from fluvial.formatting import safe_text, shown_answer

if TYPE_CHECKING:
    from fluvial.models.streaming import Sampling
    from fluvial.runs.chat import Chat

NARROW = 80
"""Columns of a terminal below which the answers stand one after the other."""
MAX_SEED = 2**31 - 1
NEW = "/new"
"""Line that begins a new conversation."""


def chat(
    run: Annotated[
        str,
        typer.Argument(
            help="A run's folder, such as runs/NAME, a folder of an adapter or a model, a hub id, "
            "or 'embedded'.",
        ),
    ],
    prompt: Annotated[
        str | None,
        typer.Option(help="One prompt to answer; else prompts are read from standard input."),
    ] = None,
    only: Annotated[
        Literal["base", "tuned"] | None, typer.Option(help="Ask one of the two models only.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of an answer at most; unset, those of the run, or 128.",
            show_default=False,
        ),
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(
            min=0, max=10, callback=finite, help="0 takes the most likely token every time."
        ),
    ] = 0.0,
    seed: Annotated[
        int,
        typer.Option(min=0, max=MAX_SEED, help="Seed of the draws, the same for both models."),
    ] = 0,
    template: Annotated[
        Literal["auto", "chat", "none"],
        typer.Option(
            help="chat: by the chat template; none: the bare text; auto: as most records of the "
            "run were, or by the template if there is one."
        ),
    ] = "auto",
    site: Annotated[
        str | None,
        typer.Option(
            help="The site whose chat template is used, where those of sites differ; in a folder "
            "without its run, which names no sites, the number of a template."
        ),
    ] = None,
    overrides: Overrides = None,
    format: Format = "table",
) -> None:
    """Answer prompts with the tuned model of a run and with its base, side by side.

    The answers are shown as they are generated. Ctrl-D ends, /new begins a new conversation.
    """
    talks = prompt is None and sys.stdin.isatty()
    if prompt is not None and not prompt.strip():
        raise ConfigError("--prompt: is blank; write a prompt, or leave it out to be asked for one")
    if format == "json" and talks:
        raise ConfigError("--format json: needs --prompt, or prompts on standard input")

    interrupt.set_advice(str)
    with spinner("loading the models"):
        from fluvial.models.streaming import Sampling
        from fluvial.runs.chat import Chat

        chat = Chat(run, only=only, template=template, site=site, overrides=overrides)

    sampling = Sampling(max_new_tokens or chat.max_new_tokens, temperature, seed)
    with chat:
        keys = f"; {NEW} begins a new conversation, Ctrl-D ends" if talks else ""
        err.print(f"[dim]{chat.way}{keys}[/]")
        for text in [prompt] if prompt is not None else _prompts(talks):
            if text.strip() == NEW:
                for speaker in chat.speakers:
                    speaker.forget()
            elif text.strip():
                if prompt is None and not talks and format != "json":
                    out.print("[bold]prompt[/]")
                    out.print(f"{safe_text(text)}\n", markup=False, soft_wrap=True)
                try:
                    _answer(chat, text, sampling, format)
                except ConfigError as error:
                    if not talks:
                        raise
                    err.print(safe_text(str(error)), style="red", markup=False)


def _prompts(talks: bool) -> Iterator[str]:
    """Yield lines of standard input, without their line breaks; raises `ConfigError` where they are
    no text."""
    try:
        yield from _typed() if talks else (line.rstrip("\n") for line in sys.stdin)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"standard input: byte 0x{error.object[error.start]:02x} is no {error.encoding}; write "
            f"the prompts in {error.encoding}"
        ) from None


def _typed() -> Iterator[str]:
    """Yield lines as a person types them, until Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401 - lets the user edit the line

    while True:
        try:
            yield input("> ")
        except EOFError:
            print(file=sys.stderr)  # noqa: T201 - ends the line of the prompt
            return


def _answer(chat: "Chat", text: str, sampling: "Sampling", format: str) -> None:
    names = [speaker.name for speaker in chat.speakers]
    if format == "json":
        said = {speaker.name: "".join(speaker.answer(text, sampling)) for speaker in chat.speakers}
        print_line_of_json({"prompt": text, **said})
    elif out.is_terminal and out.width >= NARROW and len(names) > 1:
        _beside(chat, text, sampling)
    else:
        for speaker in chat.speakers:
            out.print(f"[bold]{escape(speaker.name)}[/]")
            answer = ""
            for piece in speaker.answer(text, sampling):
                answer += piece
                out.print(safe_text(piece), end="", markup=False, soft_wrap=True)
            out.print("\n" if answer.strip() else f"{shown_answer(answer)}\n", markup=False)


def _beside(chat: "Chat", text: str, sampling: "Sampling") -> None:
    """Show all answers in columns while they are generated."""
    said = {speaker.name: "" for speaker in chat.speakers}
    pieces: queue.Queue[tuple[str, str | Exception | None]] = queue.Queue()

    def listen(name: str, answer: Iterator[str]) -> None:
        try:
            for piece in answer:
                pieces.put((name, piece))
            pieces.put((name, None))
        except Exception as error:
            pieces.put((name, error))

    for speaker in chat.speakers:
        answer = speaker.answer(text, sampling)
        threading.Thread(target=listen, args=(speaker.name, answer), daemon=True).start()

    open_answers = len(said)
    with Live(_columns(said), console=out, refresh_per_second=12, transient=True) as live:
        while open_answers:
            name, piece = pieces.get()
            if isinstance(piece, Exception):
                raise piece
            open_answers -= piece is None
            said[name] += piece or ""
            live.update(_columns(said))

    out.print(_columns({name: shown_answer(answer) for name, answer in said.items()}))


def _columns(said: dict[str, str]) -> Table:
    """Return the answers side by side."""
    table = Table(*said, box=None, expand=True, padding=(0, 2, 0, 0), header_style="bold")
    for column in table.columns:
        column.ratio = 1
        column.overflow = "fold"

    table.add_row(*(Text(safe_text(answer)) for answer in said.values()))
    return table
