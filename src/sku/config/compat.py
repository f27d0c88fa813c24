"""Key ``compat``: behaviours of the public code."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

REFERENCE = "reference"
"""What ``compat`` says to switch on every behaviour of the public code."""


@dataclass(frozen=True, kw_only=True)
class CompatConfig:
    """Behaviours of the authors' public code (franciscoliu/SKU), each of which can be switched on alone.

    SKU has none of them unless it is told to: they are here so that a user can see what each is worth. ``compat:
    reference`` switches all on; ``docs/compat.md`` has them in one table. Below, s is the code's ``start_loc``: its
    weights begin at position s, whose logits predict token s + 1, so the first target is token s + 1, from 0.
    """

    question_tokens: bool = False
    """Random disassociation learns the question too. ``get_rand_ans_loss`` takes ``len`` of the tokenizer's output
    for s, which is its number of fields, 2: the targets are the tokens from index 3 to the end of the row (not BOS,
    where there is one, and not the two tokens behind it), the answer among them. Cost: question and answer weigh by
    their length, so a part of the term goes to writing harmful questions."""
    pad_dilution: bool = False
    """Padding counts. Rows are padded to ``data.max_length`` (L) tokens. ``get_answer_loss`` finds padding by
    ``id == 1``, the pad of OPT; with another pad id, as of Llama-like tokenizers, pads stay in the denominator with
    loss 0, since their labels are -100: guided distortion and random disassociation divide the sum over the targets
    by L - s, the positions from the start to the end of the padded row. This is what is done here whatever the pad id
    is. ``compute_reverse_kl`` has no mask with any tokenizer: its mean is over all L positions of the normal row,
    question and pads included, with the KL that the models have there (``acquire.preservation_tokens`` is not read).
    Cost: 100 pads behind 11 positions cut a loss of 5.34 to 0.53, so short answers hardly train, and the divergence
    is mostly that of pads. The public code pads so far only where the tokenizer names a longest length; where it names
    none, rows end with the longest of their batch and the effect is smaller."""
    shared_draw: bool = False
    """``get_rand_ans_loss`` draws its K answers once for a batch, from all harmful answers: every prompt of the
    (micro-)batch gets the same ones, which may be its own. Cost: fewer different pairs, and some are no mismatch."""
    unbounded_divergence: bool = False
    """``compute_reverse_kl``: -KL(P||Q) without a cap over all positions of the normal row, question and last position
    included, as p log((p + 1e-12) / q) of two softmaxes. ``acquire.preservation_cap`` and ``preservation_tokens`` are
    not read. Cost: where q underflows, in float32 from a gap of about 90 between logits on, the loss is -inf or NaN;
    the run then ends with ``NonFiniteLossError``. Needs ``acquire.preservation_mode`` ``divergence``."""
    epoch_step_limit: bool = False
    """``unlearn_harm_new.py`` looks at its step limit between passes only, a pass being the shorter of the harmful and
    the normal loader: ``max_steps`` is rounded up to whole passes, while the schedule (linear there) is that of the
    steps asked for. Cost: 1,000 steps over passes of 572 are 1,144, the last 144 at learning rate 0. Needs
    ``acquire.training.max_steps``."""
    row_split: bool = False
    """``create_truthfulqa_dataloader_augmented`` splits rows, not questions: ``retain_train`` is a seeded draw of 70 %
    of all normal rows, those of ``retain_validation`` and ``retain_test`` included. These two stay as they are, so
    that figures can be compared; but they are no longer held out, and every evaluation says so. Cost: memorised test
    questions. A row is one answer here, while the code makes two rows of a question."""

    @classmethod
    def reference(cls) -> CompatConfig:
        """All of them."""
        return cls(**{item.name: True for item in dataclasses.fields(cls)})
