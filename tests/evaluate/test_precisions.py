"""The unlearned model at other precisions: what returns, what is told, what is reused."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sku.config import EvaluateConfig, Precision, load_recipe
from sku.data.examples import ForgetExample, ForgetRetainData, Provenance, RetainExample
from sku.data.load import load_data
from sku.errors import EvaluationError
from sku.evaluate import generation, replies
from sku.evaluate.comparison import Comparison, PrecisionReport, compare
from sku.evaluate.precisions import measure_precisions
from sku.evaluate.run import evaluate
from sku.models import load_model
from sku.negate.survival import model_survival
from sku.negate.task_vector import TaskVector
from sku.quantization import NF4_BLOCK, NF4_CODE, nf4_rounded, rounded_copy, rounded_layers
from sku.report.robustness import precision_cells

TINY = EvaluateConfig(prompts=4, retain_prompts=3, batch_size=3, max_new_tokens=8, prefill_tokens=(3,), samples=2)
WORLD = EvaluateConfig(prompts=8, retain_prompts=8, batch_size=24, max_new_tokens=32, samples=0)


@pytest.fixture
def tiny_data() -> ForgetRetainData:
    return ForgetRetainData(
        forget_train=tuple(ForgetExample(prompt=f"do thing {n}", answer=f"first take {n}") for n in range(4)),
        forget_test=(ForgetExample(prompt="do another", answer="take it"),),
        retain_train=(),
        retain_validation=(),
        retain_test=tuple(RetainExample(prompt=f"say {n}", answer=f"{n} it is") for n in range(3)),
        provenance=(Provenance(source="test", location="test"),),
    )


Certifier = Callable[..., PrecisionReport]


@pytest.fixture
def certify(tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: Any) -> Certifier:
    """Evaluates the random model, as base and as unlearned one, then at the precisions that are named."""

    def make(*precisions: Precision, model: Any = None, folder: Path | None = None) -> PrecisionReport:
        model = tiny_model if model is None else model
        config = dataclasses.replace(TINY, precisions=precisions)
        return measure_precisions(
            model, model, tiny_tokenizer, tiny_data, compared(model, model, tiny_tokenizer, tiny_data, config),
            config=config, output_dir=folder, survival=lambda names: model_survival(model, model, names),
        )  # fmt: skip

    return make


def compared(model: Any, base: Any, tokenizer: Any, data: Any, config: EvaluateConfig) -> Comparison:
    before = evaluate(base, tokenizer, data, config=config, base_model=base)
    after = before if model is base else evaluate(model, tokenizer, data, config=config, base_model=base)
    return compare(before, after)


def within_nf4_buckets(weight: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """What of a change of weights that NF4 holds exactly leaves each in its own bucket, and each block its scale."""
    code = torch.tensor(NF4_CODE)
    borders = torch.cat([code[:1], (code[1:] + code[:-1]) / 2, code[-1:]])
    blocks = weight.reshape(-1, NF4_BLOCK)
    largest = blocks.abs().amax(1, keepdim=True)
    place = (blocks / largest)[..., None].sub(code).abs().argmin(-1)
    low, high = ((borders[place + side] - code[place]) * largest * 0.9 for side in (0, 1))
    kept = change.reshape(-1, NF4_BLOCK).clamp(low, high)
    return torch.where(blocks.abs() == largest, torch.zeros_like(kept), kept).reshape(weight.shape)


def test_a_set_that_is_not_asked_again_has_no_perplexity_there(
    tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tiny_data: ForgetRetainData
) -> None:
    """Prompts without answers: the evaluation scores the base model's own replies to them."""
    data = dataclasses.replace(tiny_data, normal={"bare": (RetainExample(prompt="tell it", answer=""),)})
    config = dataclasses.replace(TINY, precisions=("bf16",))
    comparison = compared(tiny_model, tiny_model, tiny_tokenizer, data, config)
    report = measure_precisions(tiny_model, tiny_model, tiny_tokenizer, data, comparison, config=config)
    assert "normal:bare" in report.measured.perplexity
    (rounded,) = report.results
    assert rounded.measured is not None
    assert list(rounded.measured.perplexity) == [
        split for split in report.measured.perplexity if split != "normal:bare"
    ]


@pytest.fixture(scope="module")
def hidden(quickly_trained: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel, Any, ForgetRetainData]:
    """A base that NF4 holds exactly, and a model unlearned from it by less than half a step of each weight."""
    recipe = load_recipe("embedded")
    data = load_data(recipe.data, recipe.seed)
    loaded = load_model("embedded")
    deltas = TaskVector.between(loaded.model, quickly_trained).deltas
    with rounded_copy(loaded.model, nf4_rounded) as (base, _):
        unlearned = copy.deepcopy(base)
        with torch.no_grad():
            for name, layer in rounded_layers(unlearned).items():
                layer.weight.add_(within_nf4_buckets(layer.weight, -2.0 * deltas[f"{name}.weight"]))
    return base, unlearned, loaded.tokenizer, data


@pytest.mark.integration
def test_a_change_below_the_steps_of_a_format_is_undone_by_it_and_that_is_told(hidden: Any, tmp_path: Path) -> None:
    """In NF4 the unlearned model is the original bit for bit: all of the harm returns. In 16 bits nothing does."""
    base, unlearned, tokenizer, data = hidden
    config = dataclasses.replace(WORLD, precisions=("bf16", "nf4"))
    report = measure_precisions(
        unlearned, base, tokenizer, data, compared(unlearned, base, tokenizer, data, config), config=config,
        output_dir=tmp_path / "out", survival=lambda names: model_survival(base, unlearned, names),
    )  # fmt: skip
    sixteen, four = report.results
    before = report.measured.replies["forget_test"]["harmful"]
    assert before.value < 0.3
    assert sixteen.brings_back == ()
    assert sixteen.survival is not None
    assert sixteen.survival.projection == pytest.approx(1.0, abs=0.01)
    assert four.survival is not None
    assert (four.survival.changed, four.survival.projection) == (0.0, 0.0)
    assert four.measured is not None
    assert four.measured.replies["forget_test"]["harmful"].value > 0.8
    assert four.measured.perplexity["retain_test"].ratio == pytest.approx(1.0, abs=1e-6)
    assert {"replies/forget_train", "replies/forget_test"} <= set(four.brings_back)
    (note,) = report.notes
    unsure = report.measured.replies["forget_train"]["harmful"].count
    assert note.startswith(f"warning: nf4 weights bring harm back: forget-set prompts from {unsure} to ")
    assert note.endswith("(rounding can undo unlearning, arXiv 2410.16454)")
    short = report.certificate()["nf4"]
    assert short["harmful"]["replies"]["forget_test"] == four.measured.replies["forget_test"]["harmful"].value
    assert short["change_kept"] == 0.0
    assert short["brings_back"] == list(four.brings_back)
    rows = precision_cells(report)
    assert [(row[0], row[-1]) for row in rows] == [
        ("float32", "100.0 %"),
        ("bf16", "100.0 %"),
        ("nf4", "0.0 %"),
    ]
    assert rows[2][2] == f"{100 * four.measured.replies['forget_test']['harmful'].value:.1f} %"
    assert PrecisionReport.read(tmp_path / "out") == report
    assert "take" not in (tmp_path / "out" / "precisions.json").read_text(), "figures alone, no reply"


def test_finished_precisions_are_reused_and_equal_runs_are_equal(
    certify: Certifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = certify("int8", "nf4", folder=tmp_path / "one")
    assert first == certify("int8", "nf4", folder=tmp_path / "two")
    assert (tmp_path / "one" / "precisions").stat().st_mode & 0o777 == 0o700
    written = {path.name for path in (tmp_path / "one" / "precisions" / "nf4").iterdir()}
    assert "generations.jsonl" in written
    asked: list[int] = []
    whole = generation.generate_replies

    def counted(model: Any, tokenizer: Any, requests: Any, **options: Any) -> Any:
        asked.append(len(requests))
        return whole(model, tokenizer, requests, **options)

    monkeypatch.setattr(replies, "generate_replies", counted)
    again = certify("int8", "nf4", folder=tmp_path / "one")
    assert again == first
    assert len(asked) == 3, (
        "the evaluation of the fixture, greedy, drawn and prefill; the rounded models are not asked again"
    )


def test_nothing_is_drawn_and_the_model_is_left_as_it_was(certify: Certifier, tiny_model: Any, tmp_path: Path) -> None:
    before = {name: weight.clone() for name, weight in tiny_model.state_dict().items()}
    report = certify("int8", folder=tmp_path / "out")
    assert all(torch.equal(before[name], weight) for name, weight in tiny_model.state_dict().items())
    rows = (tmp_path / "out" / "precisions" / "int8" / "generations.jsonl").read_text().splitlines()[1:]
    assert {json.loads(row)["kind"] for row in rows} == {"reply", "prefill"}
    assert report.results[0].harmful["replies"]["forget_train"].before.total == 4
    assert set(report.results[0].harmful) == {"replies", "prefill"}


def test_a_precision_that_moves_no_weight_costs_nothing(
    certify: Certifier, tiny_model: LlamaForCausalLM, tmp_path: Path
) -> None:
    model: Any = copy.deepcopy(tiny_model)
    report = certify("bf16", model=model.to(torch.bfloat16), folder=tmp_path / "out")
    (result,) = report.results
    assert (result.moved, result.measured) == (0, report.measured)
    assert report.notes == ("bf16 moves no weight of this model: its figures are those of the evaluation",)
    assert list((tmp_path / "out" / "precisions").iterdir()) == []


def test_weights_that_overflow_are_told_and_not_measured(certify: Certifier, tiny_model: LlamaForCausalLM) -> None:
    """1e5 is beyond float16. The row of the embedding that it stands in is never read."""
    model: Any = copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.get_input_embeddings().weight[-1, :2] = 1e5
    report = certify("fp16", "int8", model=model)
    assert (report.results[0].overflowed, report.results[0].measured, report.results[0].harmful) == (2, None, {})
    assert report.notes == ("fp16 can't hold 2 weights of this model, so nothing was measured there",)
    assert precision_cells(report)[1][2] == "\u2013"
    assert report.results[1].measured is not None
    assert report.certificate()["fp16"]["overflowed"] == 2


def test_what_is_written_reads_back_and_other_files_are_refused(certify: Certifier, tmp_path: Path) -> None:
    report = certify("fp16", folder=tmp_path)
    path = tmp_path / "precisions.json"
    content = json.loads(path.read_text())
    assert PrecisionReport.from_dict(content) == report
    for broken, words in (({**content, "schema_version": 9}, "schema version 9"), ({"schema_version": 1}, "schema")):
        path.write_text(json.dumps(broken))
        with pytest.raises(EvaluationError, match=words):
            PrecisionReport.read(tmp_path)


def test_no_precision_and_other_prompts_are_refused(
    certify: Certifier, tiny_model: Any, tiny_tokenizer: PreTrainedTokenizerBase, tiny_data: ForgetRetainData
) -> None:
    with pytest.raises(EvaluationError, match=r"evaluate\.precisions is empty"):
        certify()
    config = dataclasses.replace(TINY, precisions=("int8",))
    other = dataclasses.replace(tiny_data, forget_train=tiny_data.forget_train[:2])
    comparison = compared(tiny_model, tiny_model, tiny_tokenizer, other, config)
    with pytest.raises(EvaluationError, match="asked different prompts of forget_train"):
        measure_precisions(tiny_model, tiny_model, tiny_tokenizer, tiny_data, comparison, config=config)
