"""Judges: is a reply to a harmful prompt harmful? One protocol, a kind a file."""

from sku.evaluate.judges.base import Calibration, Judge, JudgeCard, Label, Verdict, label_of, verdicts_of
from sku.evaluate.judges.choose import (
    EmbeddedWorldJudge,
    RefusalRulesJudge,
    build_judge,
    choose_judge,
    is_embedded,
    judge_names,
)

__all__ = [
    "Calibration",
    "EmbeddedWorldJudge",
    "Judge",
    "JudgeCard",
    "Label",
    "RefusalRulesJudge",
    "Verdict",
    "build_judge",
    "choose_judge",
    "is_embedded",
    "judge_names",
    "label_of",
    "verdicts_of",
]
