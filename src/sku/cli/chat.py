"""``sku chat``: base and unlearned model of a run answer side by side."""

from __future__ import annotations

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
from sku.progress import quiet_libraries

if TYPE_CHECKING:
    from sku.chat import Pair, Side

_HELP = "a prompt, or /alpha NUMBER, or /quit"


def chat(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished run.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Ask this and end; repeatable.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Strength, 0 or more; 0 is the base.")] = None,
    judge: Annotated[str | None, judge_option("In place of the run's judge.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest reply.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Ask base and unlearned model the same and see both replies, each with the judge's word, at any alpha.

    The base model may answer with harmful text: that is what it was unlearned for. Nothing is kept.
    """
    if alpha is not None:
        check_alpha(alpha, "--alpha")
    quiet_libraries()
    from sku.chat import Pair

    notes.print("loading both models ...")
    pair = Pair(run, judge=judge, max_new_tokens=max_new_tokens)
    show = _print_replies_json if as_json else _print_replies
    for words in prompt or ():
        show(pair, words, alpha)
    for words in () if prompt else _typed():
        try:
            if words.startswith("/"):
                alpha = _chosen_alpha(words)
                notes.print(f"alpha {alpha:g} (of the run: {pair.strength:g})")
            else:
                show(pair, words, alpha)
        except (EvaluationError, RecipeError) as error:  # One prompt too long must not end the talk.
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


def _chosen_alpha(words: str) -> float:
    name, _, value = words.partition(" ")
    try:
        alpha = float(value if name == "/alpha" else "")
    except ValueError:
        raise RecipeError(f"{words}: write {_HELP}") from None
    check_alpha(alpha)
    return alpha


def _print_replies(pair: Pair, prompt: str, alpha: float | None) -> None:
    """Side by side as they are written; one below the other where nobody watches."""
    strength = pair.strength if alpha is None else alpha
    titles: dict[Side, str] = {"base": "base", "unlearned": f"unlearned, alpha {strength:g}"}
    texts: dict[Side, str] = dict.fromkeys(titles, "")
    live = Live(console=results, refresh_per_second=8) if results.is_terminal else None

    def draw() -> None:
        if live is not None:
            width = max(20, results.width // 2 - 1)
            panels = (Panel(Text(printable(texts[side])), title=Text(titles[side]), width=width) for side in texts)
            live.update(Columns(list(panels)))

    def add(side: Side, text: str) -> None:
        texts[side] += text
        draw()

    with live or nullcontext():
        for side, said in pair.ask(prompt, alpha=alpha, show=add).items():
            texts[side] = said.reply
            titles[side] += f": {said.outcome.replace('_', ' ')}"
        draw()
    if live is None:
        for side, text in texts.items():
            results.print(f"{titles[side]}\n{text}\n")


def _print_replies_json(pair: Pair, prompt: str, alpha: float | None) -> None:
    sides: dict[str, Any] = {side: said._asdict() for side, said in pair.ask(prompt, alpha=alpha).items()}
    print_json({"prompt": prompt, "alpha": pair.strength if alpha is None else alpha, **sides})
