"""``sku chat``: base and unlearned model of a run answer side by side."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.columns import Columns
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from sku.cli.console import notes, print_error, print_json, printable, results
from sku.cli.options import JsonOption, judge_option
from sku.config.check import check_alpha
from sku.errors import EvaluationError, RecipeError
from sku.quiet import quiet_libraries

if TYPE_CHECKING:
    from sku.chat import Pair

_HELP = "a prompt, or /alpha NUMBER, or /quit"


def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Ask this and end; repeatable.")] = None,
    web: Annotated[bool, typer.Option("--web", help="On a page of this machine instead of in the terminal.")] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of --web; 0 takes a free one.")] = 0,
    alpha: Annotated[
        float | None, typer.Option(help="Strength, 0 or more, in place of the run's; 0 is the base.")
    ] = None,
    judge: Annotated[str | None, judge_option("In place of the run's judge.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest reply, in place of the run's.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask base and unlearned model the same and see both replies, each with the judge's word, at any alpha.

    The base model may answer with harmful text: that is what it was unlearned for. Nothing is kept but what is
    labelled on the page, in chat_labels.jsonl in the run's folder.
    """
    if web and (prompt or as_json):
        raise RecipeError("--web takes its prompts on the page: leave out --prompt and --json")
    if alpha is not None:
        check_alpha(alpha, "--alpha")
    quiet_libraries()
    from sku.chat import Pair

    notes.print("loading both models ...")
    pair = Pair(run, judge=judge, max_new_tokens=max_new_tokens)
    if web:
        _serve(pair, run, port)
        return
    show = _print_replies_json if as_json else _print_replies
    for words in prompt or ():
        show(pair, words, alpha)
    for words in () if prompt else _typed():
        if words.startswith("/"):
            alpha = _command(words, pair, alpha)
            continue
        try:
            show(pair, words, alpha)
        except EvaluationError as error:  # One prompt too long must not end the talk.
            print_error(str(error))


def _typed() -> Iterator[str]:
    """What is written in the terminal, or stands in a file, line by line."""
    typed = sys.stdin.isatty()
    if typed:
        notes.print(_HELP)
    while True:
        if typed:
            notes.print("> ", end="")
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if line.strip():
            yield line.strip()


def _command(words: str, pair: Pair, alpha: float | None) -> float | None:
    name, _, value = words.partition(" ")
    try:
        chosen = float(value) if name == "/alpha" else math.nan
    except ValueError:
        chosen = math.nan
    if not math.isfinite(chosen):
        notes.print(f"{words}: write {_HELP}")
        return alpha
    try:
        check_alpha(chosen)
    except RecipeError as error:
        print_error(str(error))
        return alpha
    notes.print(f"alpha {chosen:g} (of the run: {pair.strength:g})")
    return chosen


def _print_replies(pair: Pair, prompt: str, alpha: float | None) -> None:
    """Side by side as they are written; one below the other where nobody watches."""
    said = {"base": "", "unlearned": ""}
    outcomes: dict[str, str] = {}

    def title(side: str) -> str:
        strength = "" if side == "base" else f", alpha {pair.strength if alpha is None else alpha:g}"
        return f"{side}{strength}" + (f": {outcomes[side].replace('_', ' ')}" if side in outcomes else "")

    def panels() -> Columns:
        width = max(20, results.width // 2 - 1)
        return Columns(
            [Panel(Text(printable(text)), title=Text(title(side)), width=width) for side, text in said.items()]
        )

    live = Live(console=results, refresh_per_second=8) if results.is_terminal else None
    with live or nullcontext():
        for piece in pair.replies(prompt, alpha=alpha):
            said[piece.side] += piece.text
            if piece.outcome is not None:
                said[piece.side], outcomes[piece.side] = piece.reply or "", piece.outcome
            if live is not None:
                live.update(panels())
    if live is None:
        for side, text in said.items():
            results.print(f"{title(side)}\n{text}\n")


def _print_replies_json(pair: Pair, prompt: str, alpha: float | None) -> None:
    ends = [piece for piece in pair.replies(prompt, alpha=alpha) if piece.outcome is not None]
    sides: dict[str, Any] = {piece.side: {"reply": piece.reply, "outcome": piece.outcome} for piece in ends}
    print_json({"prompt": prompt, "alpha": pair.strength if alpha is None else alpha, **sides})


def _serve(pair: Pair, run: Path, port: int) -> None:
    from sku.chat.web import ChatServer
    from sku.kept_replies import LABELS_FILE

    with ChatServer(pair, run / LABELS_FILE, title=run.resolve().name, port=port) as server:
        results.print(f"chat      {server.url}  (this machine only; Ctrl-C ends it)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            notes.print("the page is no longer served")
