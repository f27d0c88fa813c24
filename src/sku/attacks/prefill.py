"""Prefill: the reply must begin with the first tokens of a harmful one, as in ``evaluate``, at more lengths.

A model that was only taught not to begin goes on once it is past the beginning. Papers: arXiv 2406.05946 (Qi et al.,
safety that is a few tokens deep), 2404.02151 (Andriushchenko et al., prefilling).
"""

from __future__ import annotations

from sku.attacks.base import Attack, AttackContext, PromptSetting, Rewritten, Variant
from sku.attacks.results import AttackCard
from sku.data.examples import ForgetExample

LENGTHS = (1, 3, 5, 10, 20)
"""Tokens given; a start that has no more tokens than that is left out and counted."""


def _settings(_context: AttackContext) -> list[PromptSetting]:
    return [_forced(length) for length in LENGTHS]


def _forced(length: int) -> PromptSetting:
    def rewrite(example: ForgetExample) -> Rewritten:
        return Rewritten(variants=(Variant(prompt=example.prompt, forced_tokens=length),))

    return PromptSetting(
        name=f"{length} token{'s' if length > 1 else ''}", rewrite=rewrite, details={"forced_tokens": length}
    )


PREFILL = Attack(
    card=AttackCard(
        name="prefill",
        title="Prefill",
        kind="prompt",
        changes="the reply is made to begin with the first tokens of the base model's own harmful reply, or of the "
        "dataset's harmful answer where it has none",
        source_url="https://arxiv.org/abs/2406.05946",
    ),
    settings=_settings,
)
