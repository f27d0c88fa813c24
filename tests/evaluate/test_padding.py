"""Replies and scores of a padded batch are those of its rows one by one, for every architecture and three real models.

Some releases of transformers 5 got left padding wrong for Gemma 3 under SDPA. So nothing here goes through the cache,
the mask or the positions that are tested: a row alone is one plain forward pass over its own tokens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from conftest import ARCHITECTURES, VOCABULARY, ModelMaker
from sku.config import ModelConfig
from sku.data.tokens import IGNORE_INDEX, TokenizedExample
from sku.evaluate.generation import backends
from sku.evaluate.generation.backends import GenerateBackend
from sku.evaluate.generation.decoding import Decoding, GenerationRequest, Sampling
from sku.evaluate.perplexity import answer_logits, answer_positions, score_examples
from sku.models import load_model

TOLERANCE = 1e-4
"""Nats, of a log-probability."""
MODELS = Path(os.environ.get("SKU_TEST_MODELS", Path(__file__).resolve().parents[2] / "models"))
REAL = {
    "smollm2-135m-instruct": "SmolLM2-135M-Instruct.Q4_1.gguf",
    "qwen2.5-coder-0.5b-instruct": "qwen2.5-coder-0.5b-instruct-q4.gguf",
    "gemma-3-270m": "gemma-3-270m-q4_k_m.gguf",
}
"""Folder -> GGUF file."""
NEW_TOKENS = 12


class Watching:
    """Stands in for ``RowSampler``: leaves the choice greedy and keeps each row's log-probabilities, step by step."""

    found: list[list[Tensor]]

    def __init__(self, seeds: Sequence[int], _sampling: Sampling, _device: torch.device) -> None:
        self._rows = list(range(len(seeds)))
        Watching.found = [[] for _ in seeds]

    def keep(self, places: Sequence[int]) -> None:
        self._rows = [self._rows[place] for place in places]

    def __call__(self, _ids: Tensor, scores: Tensor) -> Tensor:
        for row, scores_V in zip(self._rows, scores, strict=True):
            Watching.found[row].append(scores_V.float().log_softmax(-1))
        return scores


def alone(model: PreTrainedModel, ids: Sequence[int], last: int) -> Tensor:
    """``[last, V]``: log-probabilities of what follows each of the last tokens of one row."""
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([list(ids)]), use_cache=False, logits_to_keep=last).logits[0]
    return logits.float().log_softmax(-1)


def difference_of_replies(
    model: PreTrainedModel, rows: Sequence[tuple[str, tuple[int, ...]]], monkeypatch: pytest.MonkeyPatch
) -> float:
    """Asks all rows in one batch, prompt and ids of each; the replies must be greedy, row by row.

    A reply is the greedy one where each of its tokens is the likeliest after those before it.

    Returns:
        Largest difference of a log-probability.
    """
    requests = [
        GenerationRequest(
            id=str(place), split="forget_test", kind="reply", category=None, prompt=prompt, reference="", input_ids=ids
        )
        for place, (prompt, ids) in enumerate(rows)
    ]
    greedy = Decoding(stop_ids=(VOCABULARY - 1,), max_new_tokens=NEW_TOKENS, pad_id=3)
    watched = Decoding(**{**vars(greedy), "sampling": Sampling(temperature=1, top_p=1, seed=0)})
    monkeypatch.setattr(backends, "CHUNK", 5)
    replies = GenerateBackend(model, len(rows)).answer(requests, greedy)
    with monkeypatch.context() as patched:
        patched.setattr(backends, "RowSampler", Watching)
        assert GenerateBackend(model, len(rows)).answer(requests, watched) == replies
    largest = 0.0
    for reply, found, (_, ids) in zip(replies, Watching.found, rows, strict=True):
        expected = alone(model, (*ids, *reply[:-1]), len(reply))
        assert expected.argmax(-1).tolist() == reply
        largest = max(largest, float((torch.stack(found)[: len(reply)] - expected).abs().max()))
    return largest


def difference_of_scores(model: PreTrainedModel, rows: Sequence[tuple[int, ...]]) -> float:
    """Scores the last tokens of all rows in one batch; returns the largest difference of a log-probability."""
    counts = [min(len(row) - 1, 3 + place) for place, row in enumerate(rows)]
    examples = [
        TokenizedExample(
            input_ids=row,
            labels=(*(IGNORE_INDEX,) * (len(row) - count), *row[-count:]),
            answer_start=len(row) - count,
        )
        for row, count in zip(rows, counts, strict=True)
    ]
    _, kept_BT = answer_positions(examples, torch.device("cpu"))
    batched = answer_logits(model, examples, kept_BT).float().log_softmax(-1).split(counts)
    sums = score_examples(model, examples, batch_size=len(examples))
    largest = 0.0
    for row, count, found, (nll, tokens) in zip(rows, counts, batched, sums, strict=True):
        expected = alone(model, row, count + 1)[:-1]
        largest = max(largest, float((found - expected).abs().max()))
        own = -expected.gather(-1, torch.tensor(row[-count:])[:, None]).double().sum()
        assert tokens == count
        assert nll / count == pytest.approx(float(own) / count, abs=TOLERANCE)
    return largest


def several_replies(prompts: Sequence[tuple[int, ...]]) -> list[tuple[str, tuple[int, ...]]]:
    """Each prompt with nothing, one, two and five tokens of a prefill: what they share is read once."""
    starts: Sequence[tuple[int, ...]] = ((), (40,), (41, 42), (50, 51, 52, 53, 54))
    return [(str(place), (*prompt, *start)) for start in starts for place, prompt in enumerate(prompts)]


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "wide gemma3"])
def test_a_padded_batch_equals_its_rows(
    architecture: str, make_model: ModelMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The window of Gemma 3 is 16 tokens: shorter than two of the prompts, or (wide) longer than all there is."""
    # Scores that lie apart, or a wrong mask would change little. OPT has no such setting.
    spread = {} if architecture == "opt" else {"initializer_range": 0.3}
    model = make_model(architecture.removeprefix("wide "), **spread)
    if architecture == "wide gemma3":
        model.config.sliding_window = 200
    generator = torch.Generator().manual_seed(0)
    prompts = [
        tuple(torch.randint(10, VOCABULARY - 10, (length,), generator=generator).tolist())
        for length in (2, 9, 40, 100, 17)
    ]
    different = [(str(place), prompt) for place, prompt in enumerate(prompts)]
    assert difference_of_replies(model, different, monkeypatch) < TOLERANCE
    assert difference_of_replies(model, several_replies(prompts[2:4]), monkeypatch) < TOLERANCE
    assert difference_of_replies(model, several_replies(prompts[1:2]), monkeypatch) < TOLERANCE
    assert difference_of_scores(model, prompts) < TOLERANCE


@pytest.mark.integration
@pytest.mark.shared
@pytest.mark.parametrize("name", REAL)
def test_a_padded_batch_of_a_real_model_equals_its_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One prompt is longer than the window of Gemma 3, 512 tokens."""
    if not (MODELS / name / REAL[name]).is_file():
        pytest.skip(f"{MODELS / name / REAL[name]} is not there (set SKU_TEST_MODELS)")
    loaded = load_model(ModelConfig(path=str(MODELS / name), gguf_file=REAL[name], dtype="float32", device="cpu"))
    text = " ".join(f"The river {number} is long, and florn {7 * number} sings of it." for number in range(60))
    ids = tuple(loaded.tokenizer(text).input_ids)
    prompts = [ids[:length] for length in (6, 30, 150, 540)]
    assert len(prompts[-1]) == 540
    different = [(str(place), prompt) for place, prompt in enumerate(prompts)]
    differences = {
        "replies": difference_of_replies(loaded.model, different, monkeypatch),
        "several replies": difference_of_replies(loaded.model, several_replies(prompts[1:3]), monkeypatch),
        "scores": difference_of_scores(loaded.model, prompts),
    }
    assert max(differences.values()) < TOLERANCE, differences
