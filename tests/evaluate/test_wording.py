"""One sentence for everything is seen at once."""

from __future__ import annotations

from sku.evaluate.wording import Wording, wording_of

from .conftest import RecordMaker


def test_counts_by_hand(make_record: RecordMaker) -> None:
    replies = ("I do not know.", "i do NOT know", "a b a b", "")
    found = wording_of([make_record(reply, id=str(number), num_tokens=4) for number, reply in enumerate(replies)])
    # Pairs: (i do)(do not)(not know) twice, (a b)(b a)(a b): 9 in all, 5 of them different.
    assert found == Wording(replies=4, same_reply=0.5, distinct_pairs=5 / 9, mean_tokens=4.0, median_words=4)


def test_nothing_said_has_no_pairs(make_record: RecordMaker) -> None:
    assert wording_of([make_record("", num_tokens=0)]) == Wording(
        replies=1, same_reply=1.0, distinct_pairs=0.0, mean_tokens=0.0, median_words=0
    )
    assert wording_of([]) is None
