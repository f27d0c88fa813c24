"""Running text: books, articles and papers, as the corpora of MUSE and WMDP are.

Papers: https://arxiv.org/abs/2407.06460 (MUSE), https://arxiv.org/abs/2403.03218 (WMDP)
Licence: that of the dataset.

One row, with ``format: passages``, since no table tells by itself that its text is to be continued::

    {"text": "The river rose in the night. In the morning the bridge was gone, and ..."}

The text is cut into pieces of ``PIECE`` words; the first ``OPENING`` words of a piece are the prompt, the rest is its
answer. All pieces of a row are one group: split apart, a model would be tested on what it was trained to go on with. A
piece ends where the count of words does, so its answer teaches no end.
"""

from __future__ import annotations

from collections.abc import Iterator

from sku.data.examples import normalise_prompt
from sku.data.sources.rows import Form, Format, LeftOut, Pair, Row

COLUMN = "text"
PIECE, OPENING = 120, 30
TOO_SHORT = f"passage of fewer than {2 * OPENING} words"


def _pieces(row: Row) -> Iterator[Pair | LeftOut]:
    text = row[COLUMN]
    words = text.split() if isinstance(text, str) else []
    if len(words) < 2 * OPENING:
        yield LeftOut(TOO_SHORT)
        return
    group = normalise_prompt(" ".join(words[:PIECE]))
    for begin in range(0, len(words), PIECE):
        piece = words[begin : begin + PIECE]
        if len(piece) >= 2 * OPENING:  # The rest of the last one may be short.
            opening, rest = " ".join(piece[:OPENING]), " ".join(piece[OPENING:])
            yield Pair(opening, rest, group=group, finished=begin + PIECE >= len(words))


FORMAT = Format("passages", (Form((COLUMN,), _pieces),), named_only=True)
