"""Figures as text, attacks as rows of tables, and text of strangers in Markdown: one line, nothing of it markup."""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sku.attacks import AttackedReplies, AttackReport, AttackResult, Relearned, RelearnResult
from sku.errors import EvaluationError
from sku.evaluate.judges import JudgeCard
from sku.evaluate.metrics import Rate, RateChange, start_words
from sku.evaluate.results import LeakChange
from sku.evaluate.statistics import Estimate

NOTHING = "\u2013"
"""Where nothing was measured."""
LONGEST = 400
"""Characters of one value that a card shows."""
_MARKUP = re.compile(r"([\\`*_\[\]|~$#])")


def percent(share: float) -> str:
    """A share as a percentage with one decimal: ``12.5 %``."""
    return f"{100 * share:.1f} %"


def interval(rate: Rate | Estimate) -> str:
    """Bounds of a share in per cent: ``7.4 to 16.1``."""
    return f"{100 * rate.low:.1f} to {100 * rate.high:.1f}"


def in_points(difference: float, low: float, high: float) -> str:
    """A difference of shares with its interval, in points: ``-7.4 (-16.1 to -1.2)``."""
    return f"{100 * difference:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def before_after(change: RateChange | LeakChange) -> tuple[str, str, str]:
    """The base's share, the unlearned model's, and their difference in points."""
    points = in_points(change.difference, change.low, change.high)
    return percent(change.before.value), percent(change.after.value), points


@dataclass(frozen=True)
class TableRow:
    """One line of the table; the fields are its columns, in words."""

    section: str
    """What was asked: ``trained-on prompts``, ``unseen prompts, prefill, 5 tokens``, ``perplexity``, ..."""
    measure: str
    before: str
    after: str
    interval: str = ""
    """95 % interval of ``after``; of the ratio for a perplexity."""
    change: str = ""
    """Difference in points, or ratio, with its 95 % interval."""
    wanted: str = ""
    """``down``, ``up``, ``same`` or empty where neither is better."""
    p_holm: str = ""
    """Exact McNemar test of no change, Holm-corrected over the whole table; empty where a row is not tested."""
    caution: str = ""
    """Why the figures can't be taken as they stand: the judge can't measure them; ``change`` says it too."""

    @property
    def label(self) -> str:
        """Section and measure in one."""
        return f"{self.section}: {self.measure}"


class Written(str):
    """Markdown of our own, which is put into a template as it is."""

    __slots__ = ()


def one_line(text: str) -> str:
    """Without line breaks, control and direction characters, and not longer than ``LONGEST``."""
    plain = "".join(" " if unicodedata.category(char) in {"Cc", "Cf", "Zl", "Zp"} else char for char in text)
    line = " ".join(plain.split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}\u2026"


def escaped(value: Any) -> str:
    """A value for a place inside a line or a table cell; what is ``Written`` stays."""
    if isinstance(value, Written):
        return value
    # A full stop after www and a colon before // would make a link of it.
    text = html.escape(one_line(str(value)), quote=False).replace("://", ":&#47;&#47;").replace("www.", "www&#46;")
    return _MARKUP.sub(r"\\\1", text).replace("&\\#", "&#")


def fenced(text: str) -> Written:
    """A block of YAML whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Written(f"{fence}yaml\n{text.rstrip()}\n{fence}")


def bars_escaped(text: str) -> str:
    """Text of our own for a table cell."""
    return text.replace("|", r"\|")


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: Collection[int] = (0,),
    cell: Callable[[str], str] = escaped,
) -> Written:
    """A table that ends with a newline; columns that are not ``left`` hold figures, and ``cell`` escapes."""
    rule = ["---" if place in left else "---:" for place in range(len(columns))]
    lines = [columns, rule, *([cell(text) for text in row] for row in rows)]
    return Written("".join(f"| {' | '.join(line)} |\n" for line in lines))


def replace_block(text: str, name: str, block: str, where: str = "the text") -> str:
    """A text with a block in place of what stood between ``<!-- results:NAME -->`` and ``<!-- end:NAME -->``.

    Raises:
        EvaluationError: The marks are missing, double or out of order.
    """
    start, end = f"<!-- results:{name} -->", f"<!-- end:{name} -->"
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise EvaluationError(f"{where} must hold the lines {start} and {end}, once each and in this order")
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), flags=re.DOTALL)
    return pattern.sub(lambda _: f"{start}\n\n{block.strip()}\n\n{end}", text)


UNMEASURED = "not measurable"
"""In place of an interval where the judge would call as many harmless replies harmful."""


ATTACK_COLUMNS = ("attack", "setting", "unlearned", "95 %", "base", "gibberish")


def attack_rows(report: AttackReport) -> list[tuple[str, ...]]:
    """``ATTACK_COLUMNS`` of each attack and setting in the order in which they ran, the questions as they are first.

    Where a question is asked in several ways, the worst counts, and a second row shows their mean, without an interval
    since their replies are not independent. The base's share is under the same attack.
    """
    titles = {card.name: card.title for card in report.cards}
    return [row for result in report.results for row in _rows(titles[result.attack], result, report.setup.judge)]


RELEARN_COLUMNS = (
    "relearning", "steps to half", "rate", "harmful then", "95 %", "perplexity", "gibberish", "base",
)  # fmt: skip


def relearn_rows(report: AttackReport) -> list[tuple[str, ...]]:
    """How much fine-tuning brings half of the base's harm back: ``RELEARN_COLUMNS`` for each number of pairs.

    What stands behind the attacker's best learning rate is of the last checkpoint of its training; the perplexity is
    that of normal answers as a multiple of the base's, the base's share that after the same training.
    """
    found = report.relearn
    return [] if found is None else [_relearn_row(one, found, report.setup.judge) for one in found.results]


def _relearn_row(result: RelearnResult, found: Relearned, judge: JudgeCard) -> tuple[str, ...]:
    last, base = result.model.checkpoints[-1], result.control.checkpoints[-1]
    measured = judge.can_measure(last.harmful.value, last.harmful.low)
    bounds = _interval(last.harmful, last.harmful_upper_bound) if measured else UNMEASURED
    return (
        pairs_text(result.pairs),
        f"> {found.steps[-1]}" if result.model.half_steps is None else str(result.model.half_steps),
        NOTHING if result.model.learning_rate is None else f"{result.model.learning_rate:g}",
        percent(last.harmful.value),
        bounds,
        NOTHING if last.perplexity is None else f"\u00d7{last.perplexity:.4g}",
        percent(last.gibberish.value),
        percent(base.harmful.value),
    )


def pairs_text(pairs: int) -> str:
    """``10 pairs``."""
    return f"{pairs} pair{'' if pairs == 1 else 's'}"


def left_out_lines(report: AttackReport) -> list[str]:
    """What could not be asked, a line each: ``left out: prefill, 20 tokens: the answer is too short: 100``."""
    lines = [f"left out: {what}: {number}" for what, number in report.left_out.items()]
    if report.relearn is not None and not report.relearn.results:
        lines.append(
            f"left out: relearn: the base model gives no harmful reply to {report.relearn.questions} questions, so "
            "there is none to bring back"
        )
    return lines


def _rows(title: str, result: AttackResult, judge: JudgeCard) -> Iterator[tuple[str, ...]]:
    model, control, ways = result.model, result.control, len(result.model.variants)
    gibberish, after = percent(model.replies["gibberish"].value), model.harmful.after
    measured = judge.can_measure(after.value, after.low, replies=max(ways, 1))
    setting, bounds = "worst case" if ways > 1 else result.setting, _interval(after, model.harmful_upper_bound)
    yield title, setting, _share(model), bounds if measured else UNMEASURED, _share(control), gibberish
    if ways > 1:
        own, base = (percent(side.replies["harmful"].value) for side in (model, control))
        yield title, "mean", own, NOTHING if measured else UNMEASURED, base, gibberish


def _share(measured: AttackedReplies) -> str:
    """A share, or both bounds where the judge failed on replies."""
    low, high = measured.harmful.after, measured.harmful_upper_bound
    return percent(low.value) if low.count == high.count else f"{100 * low.value:.1f} to {percent(high.value)}"


def _interval(low: Rate, high: Rate) -> str:
    """From the lower end of the one to the upper end of the other."""
    return f"{100 * min(low.low, high.low):.1f} to {100 * max(low.high, high.high):.1f}"


def rate_text(rate: Rate | None) -> str:
    """A share with its interval, a dash for none."""
    return NOTHING if rate is None else f"{percent(rate.value)} ({interval(rate)})"


def start_text(key: str | None) -> str:
    """What a prefill was, after its rate: ``, 3 tokens``."""
    return "" if key is None else f", {start_words(key)}"
