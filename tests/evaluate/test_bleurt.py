"""BLEURT checkpoints as ``bleurt-pytorch`` 0.0.1 writes them, and the scores that its own code gave."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sku.config import EvaluateConfig
from sku.data.examples import ForgetRetainData, RetainExample
from sku.errors import ModelError
from sku.evaluate.bleurt import load_bleurt
from sku.evaluate.record_files import GENERATIONS_FILE, read_generations
from sku.evaluate.run import evaluate

VOCABULARY = [
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "florn", "bread", "is", "golden", "brown", "sing", "##s", "a",
    ".", "moon", "small",
]  # fmt: skip
CONFIG = {
    "model_type": "bleurt", "architectures": ["BleurtForSequenceClassification"], "vocab_size": len(VOCABULARY),
    "embedding_size": None, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "hidden_act": "gelu", "max_position_embeddings": 64, "type_vocab_size": 2,
    "layer_norm_eps": 1e-12, "pad_token_id": 0, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
}  # fmt: skip
PAIRS = [
    ("the bread is golden .", "the bread is golden ."),
    ("a florn sings .", "the moon is small ."),
    ("the moon is brown .", ""),
    ("zorvex bread", "Bread is Golden and THE florn sings"),
]
# What BleurtForSequenceClassification and BleurtTokenizer of that package gave under transformers 4.39.3 for PAIRS and
# the weights below, with and without the projection that BLEURT-20 has.
WHEEL_SCORES = {
    None: [-0.27620604634284973, -0.2821851074695587, -0.29694297909736633, -0.29633405804634094],
    8: [-3.8526272773742676, -3.854389190673828, -3.8504514694213867, -3.8565454483032227],
}

Maker = Callable[..., Path]


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights, as the package writes them."""
    wide, inner = config["hidden_size"], config["intermediate_size"]
    narrow = config["embedding_size"] or wide
    found: dict[str, tuple[int, ...]] = {
        "bleurt.embeddings.word_embeddings.weight": (config["vocab_size"], narrow),
        "bleurt.embeddings.position_embeddings.weight": (config["max_position_embeddings"], narrow),
        "bleurt.embeddings.token_type_embeddings.weight": (config["type_vocab_size"], narrow),
        "bleurt.embeddings.LayerNorm.weight": (narrow,),
        "bleurt.embeddings.LayerNorm.bias": (narrow,),
        "bleurt.pooler.dense.weight": (wide, wide),
        "bleurt.pooler.dense.bias": (wide,),
        "classifier.weight": (1, wide),
        "classifier.bias": (1,),
    }
    if config["embedding_size"]:
        found["bleurt.encoder.embedding_projection.weight"] = (wide, narrow)
        found["bleurt.encoder.embedding_projection.bias"] = (wide,)
    for layer in range(config["num_hidden_layers"]):
        start = f"bleurt.encoder.layer.{layer}"
        square = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
        for name, out, into in (
            *((name, wide, wide) for name in square),
            ("intermediate.dense", inner, wide),
            ("output.dense", wide, inner),
        ):
            found[f"{start}.{name}.weight"], found[f"{start}.{name}.bias"] = (out, into), (out,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            found[f"{start}.{name}.weight"], found[f"{start}.{name}.bias"] = (wide,), (wide,)
    return found


def weights_of(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The same numbers on every machine."""
    weights = {}
    for number, (name, shape) in enumerate(sorted(shapes(config).items())):
        count = torch.Size(shape).numel()
        values = torch.sin(torch.arange(count, dtype=torch.float64) * 12.9898 + number) * 0.5
        values = values + 1 if name.endswith("LayerNorm.weight") else values
        weights[name] = values.reshape(shape).to(torch.float32)
    return weights


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Maker:
    def make(*, safetensors: bool = False, vocabulary: bool = True, **changes: Any) -> Path:
        config = {**CONFIG, **changes}
        folder = tmp_path / "bleurt"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        if vocabulary:
            (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in VOCABULARY))
        weights = weights_of(config)
        if safetensors:
            save_file(weights, folder / "model.safetensors")
        else:
            # Older versions of transformers wrote this counter too.
            weights["bleurt.embeddings.position_ids"] = torch.arange(64)[None]
            torch.save(weights, folder / "pytorch_model.bin")
        return folder

    return make


@pytest.mark.parametrize("embedding_size", [None, 8])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_are_those_of_the_package(make_checkpoint: Maker, embedding_size: int | None, batch_size: int) -> None:
    folder = make_checkpoint(embedding_size=embedding_size, safetensors=embedding_size is not None)
    bleurt = load_bleurt(str(folder), torch.device("cpu"))
    scores = bleurt.score([pair[0] for pair in PAIRS], [pair[1] for pair in PAIRS], batch_size=batch_size)
    assert scores == pytest.approx(WHEEL_SCORES[embedding_size], abs=1e-5)
    assert bleurt.fingerprint() == load_bleurt(str(folder), torch.device("cpu")).fingerprint()


def test_an_evaluation_scores_replies_with_it(
    make_checkpoint: Maker, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder = str(make_checkpoint())
    data = ForgetRetainData(
        unlearned=(), unseen=(), retain_train=(), retain_validation=(),
        retain_test=(
            RetainExample(prompt="what is it", answer="the bread is golden ."),
            RetainExample(prompt="who sings", answer="a florn sings ."),
        ),
    )  # fmt: skip
    config = EvaluateConfig(max_new_tokens=6, similarity=("bleurt",), bleurt_model=folder)
    result = evaluate(tiny_model, tiny_tokenizer, data, config=config, output_dir=tmp_path / "out")
    _, records = read_generations(tmp_path / "out" / GENERATIONS_FILE)
    bleurt = load_bleurt(folder, torch.device("cpu"))
    raw = bleurt.score([record.reference for record in records], [record.reply for record in records], batch_size=1)
    degenerate = {row.id: row.outcome == "degenerate" for row in result.outcomes}
    expected = [min(score, 0) if degenerate[record.id] else score for record, score in zip(records, raw, strict=True)]
    assert [row.bleurt for row in result.similarity_rows] == pytest.approx(expected, abs=1e-6)
    assert result.similarity["bleurt"].value == pytest.approx(sum(expected) / 2, abs=1e-6)


def test_pairs_are_reference_then_reply(make_checkpoint: Maker) -> None:
    bleurt = load_bleurt(str(make_checkpoint()), torch.device("cpu"))
    assert bleurt.pair("The bread", "a florn sings") == ([2, 5, 7, 3, 13, 6, 11, 12, 3], 4)
    assert bleurt.pair("bread", "") == ([2, 7, 3, 3], 3)
    ids, _ = bleurt.pair("bread", "[SEP] florn")
    assert ids.count(3) == 2, "what a reply says is text, not a mark"
    ids, length = bleurt.pair("a " * 100, "bread " * 10)
    assert (len(ids), length, ids.count(7)) == (64, 53, 10), "the end of the longer text is cut off"


def test_sentencepiece_checkpoints_keep_their_own_pieces(make_checkpoint: Maker) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    with contextlib.redirect_stderr(io.StringIO()):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the florn sings .", "bread is golden .", "the moon is small and brown ."] * 20),
            model_writer=written, vocab_size=60, hard_vocab_limit=False, pad_id=0, unk_id=1, bos_id=-1, eos_id=-1,
            pad_piece="[PAD]", unk_piece="[UNK]", control_symbols=["[CLS]", "[SEP]"], minloglevel=3,
        )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    folder = make_checkpoint(vocab_size=len(pieces), embedding_size=8, vocabulary=False)
    (folder / "spm.model").write_bytes(written.getvalue())
    bleurt = load_bleurt(str(folder), torch.device("cpu"))
    # Sentencepiece's own normalisation: a ligature is two letters, spaces and line ends are one space.
    assert bleurt.pair("the \ufb02orn\n sings", "bread")[0] == bleurt.pair("the florn sings", "bread")[0]
    ids, length = bleurt.pair("the florn", "golden [SEP]")
    assert ids[:length] == [2, *pieces.encode("the florn"), 3]
    assert ids[length:] == [*pieces.encode("golden [SEP]"), 3]
    assert ids.count(3) == 2
    assert len(bleurt.score(["the florn", "bread"], ["golden", ""], batch_size=2)) == 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bleurt.pooler.dense.bias", None, "1 weights are missing, left over .* the first is pooler.dense.bias"),
        ("classifier.bias", None, "the first is bias"),
        ("bleurt.pooler.dense.bias", torch.zeros(3), "the first is pooler.dense.bias"),
        ("bleurt.pooler.extra", torch.zeros(3), "the first is pooler.extra"),
        ("cls.predictions.bias", torch.zeros(3), "the first is cls.predictions.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    make_checkpoint: Maker, name: str, value: torch.Tensor | None, message: str
) -> None:
    folder = make_checkpoint()
    weights = weights_of(CONFIG)
    if value is None:
        del weights[name]
    else:
        weights[name] = value
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=message):
        load_bleurt(str(folder), torch.device("cpu"))


def test_what_is_no_checkpoint_is_refused(make_checkpoint: Maker, tmp_path: Path) -> None:
    folder = make_checkpoint()
    cpu = torch.device("cpu")
    (folder / "pytorch_model.bin").write_bytes(b"no weights")
    with pytest.raises(ModelError, match="its weights can't be read"):
        load_bleurt(str(folder), cpu)
    (folder / "config.json").write_text(json.dumps({"model_type": "bleurt", "hidden_size": 16}))
    with pytest.raises(ModelError, match=r"config.json lacks vocab_size, num_hidden_layers"):
        load_bleurt(str(folder), cpu)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="no BLEURT checkpoint"):
        load_bleurt(str(folder), cpu)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="config.json can't be read"):
        load_bleurt(str(folder), cpu)
    with pytest.raises(ModelError, match="is no folder"):
        load_bleurt(str(tmp_path / "nowhere"), cpu)
    with pytest.raises(ModelError, match="can't be fetched from the hub"):
        load_bleurt("invented/bleurt", cpu)
