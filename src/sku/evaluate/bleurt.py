"""BLEURT: a learned score of how well a reply says what a reference says.

Paper: https://arxiv.org/abs/2004.04696, and for BLEURT-20 https://arxiv.org/abs/2110.06341

The checkpoints are those of ``lucadiliello/bleurt-pytorch`` on the hub (``lucadiliello/BLEURT-20``), whose own package
does not run under transformers 5. Their format: ``config.json`` of type ``bleurt``; weights named ``bleurt.*`` and
``classifier.*``; WordPiece files for the sizes of BERT, ``spm.model`` for BLEURT-20 and its smaller ones. The network
is BERT, or RemBERT where ``embedding_size`` is set, with one number read off the pooled first token::

    score = w . tanh(W h_[CLS] + b) + c        of  [CLS] reference [SEP] reply [SEP]
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertModel, BertTokenizer, PreTrainedModel, RemBertConfig, RemBertModel

from sku.errors import ModelError, one_line
from sku.evaluate.batching import Progress, pad, run_in_batches

_SHAPE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
    "max_position_embeddings", "type_vocab_size", "layer_norm_eps",
)  # fmt: skip
_FILES = ["config.json", "*.safetensors", "pytorch_model.bin", "vocab.txt", "spm.model", "tokenizer*.json"]
_PROBE = ("the river is long", "the river is very long")

Cutter = Callable[[str], list[int]]
"""Text to token ids, nothing added."""
Pair = Callable[[str, str], tuple[list[int], int]]
"""Reference and reply to the ids of both, and the number of them that belong to the reference."""


@dataclass(frozen=True, kw_only=True)
class Bleurt:
    """A loaded checkpoint."""

    encoder: PreTrainedModel
    head: torch.nn.Linear
    pair: Pair
    name: str

    def score(
        self, references: Sequence[str], replies: Sequence[str], *, batch_size: int, progress: Progress | None = None
    ) -> list[float]:
        """Scores each reply against its reference.

        Args:
            references: One for each reply.
            replies: Any text; an empty one has a score too.
            batch_size: Pairs at once.
            progress: Called after each batch.

        Returns:
            One score a pair, in order. About 0 to 1 under BLEURT-20; the older checkpoints leave that range.

        Raises:
            EvaluationError: GPU memory runs out on a single pair.
        """
        pairs = [self.pair(reference, reply) for reference, reply in zip(references, replies, strict=True)]
        scores: dict[int, float] = {}

        def score_batch(batch: list[int]) -> None:
            found = self.score_ids([pairs[index][0] for index in batch], [pairs[index][1] for index in batch])
            scores.update(zip(batch, found.tolist(), strict=True))

        run_in_batches([len(ids) for ids, _ in pairs], score_batch, batch_size=batch_size, progress=progress)
        return [scores[index] for index in range(len(pairs))]

    def score_ids(self, rows: Sequence[Sequence[int]], reference_lengths: Sequence[int]) -> Tensor:
        """Scores token ids.

        Args:
            rows: B rows, each the ids of one pair.
            reference_lengths: Ids of each row that belong to the reference, its ``[SEP]`` included.

        Returns:
            ``[B]`` scores.
        """
        device = self.head.weight.device
        ids_BT, mask_BT = pad(rows, int(self.encoder.config.pad_token_id or 0), left=False, device=device)
        starts_B1 = torch.tensor(list(reference_lengths), device=device)[:, None]
        types_BT = (torch.arange(ids_BT.shape[1], device=device) >= starts_B1).long() * mask_BT
        with torch.inference_mode():
            output = self.encoder(input_ids=ids_BT, attention_mask=mask_BT, token_type_ids=types_BT)
            scores_B1: Tensor = self.head(output.pooler_output)
        return scores_B1[:, 0]

    def fingerprint(self) -> str:
        """A hash of what it computes."""
        ids, length = self.pair(*_PROBE)
        return hashlib.sha256(self.score_ids([ids], [length]).cpu().numpy().tobytes()).hexdigest()


def load_bleurt(source: str, device: torch.device) -> Bleurt:
    """Loads a checkpoint.

    Args:
        source: Folder or hub id.
        device: Where it runs, in float32.

    Returns:
        The scorer, in evaluation mode.

    Raises:
        ModelError: It can't be found or read, is no BLEURT checkpoint, or its weights are not exactly those that its
            configuration asks for.
    """
    folder = _folder(source)
    config = _read_config(folder, source)
    encoder: PreTrainedModel
    if config.get("embedding_size") is None:
        encoder = BertModel(BertConfig(**_shape(config, source)))
    else:
        size = config["embedding_size"]
        shape = _shape(config, source)
        encoder = RemBertModel(RemBertConfig(**shape, input_embedding_size=size, output_embedding_size=size))
    head = torch.nn.Linear(int(config["hidden_size"]), 1)
    _fill(encoder, head, _read_weights(folder, source), source)
    encoder.to(device).eval()  # type: ignore[arg-type]
    return Bleurt(
        encoder=encoder, head=head.to(device), pair=_pairing(folder, config["max_position_embeddings"]), name=source
    )


def _folder(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or source.startswith(("/", ".", "~")):
        raise ModelError(f"evaluate.bleurt_model {source} is no folder: name a folder, or a hub id")
    try:
        return Path(snapshot_download(source, allow_patterns=_FILES))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = one_line(error)
        raise ModelError(f"evaluate.bleurt_model {source} can't be fetched from the hub: {reason}") from None


def _read_config(folder: Path, source: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"evaluate.bleurt_model {source}: its config.json can't be read ({error})") from None
    if not isinstance(config, dict) or config.get("model_type") != "bleurt":
        raise ModelError(
            f"evaluate.bleurt_model {source} is no BLEURT checkpoint in PyTorch (its config.json does not say "
            "model_type bleurt): use lucadiliello/BLEURT-20 or another of those"
        )
    return config


def _shape(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    missing = [name for name in _SHAPE if name not in config]
    if missing:
        raise ModelError(f"evaluate.bleurt_model {source}: its config.json lacks {', '.join(missing)}")
    ids = {"pad_token_id": config.get("pad_token_id", 0), "bos_token_id": None, "eos_token_id": None}
    return {name: config[name] for name in _SHAPE} | ids


def _read_weights(folder: Path, source: str) -> dict[str, Tensor]:
    safe, plain = folder / "model.safetensors", folder / "pytorch_model.bin"
    try:
        weights = load_file(safe) if safe.is_file() else torch.load(plain, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch and safetensors raise many kinds for a broken file
        reason = one_line(error)
        raise ModelError(f"evaluate.bleurt_model {source}: its weights can't be read ({reason})") from None
    if not isinstance(weights, dict):
        raise ModelError(f"evaluate.bleurt_model {source}: {plain.name} holds no named weights")
    return weights


def _fill(encoder: PreTrainedModel, head: torch.nn.Linear, weights: Mapping[str, Tensor], source: str) -> None:
    """Gives every weight its place; none may be missing, of another shape or left over."""
    # Counts up to the longest text; older versions of transformers stored it with the weights.
    named = {name: value for name, value in weights.items() if not name.endswith("embeddings.position_ids")}
    inner = {_inner_name(name): value for name, value in named.items() if name.startswith("bleurt.")}
    outer = {
        name.removeprefix("classifier."): value for name, value in named.items() if name.startswith("classifier.")
    }
    odd = sorted(set(named) - {name for name in named if name.startswith(("bleurt.", "classifier."))})
    for module, found in ((encoder, inner), (head, outer)):
        wanted = {name: value.shape for name, value in module.state_dict().items()}
        shapes = {name: value.shape for name, value in found.items()}
        odd += sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
    if odd:
        raise ModelError(
            f"evaluate.bleurt_model {source} can't be used: {len(odd)} weights are missing, left over or of another "
            f"shape than its config.json asks for, the first is {odd[0]}"
        )
    encoder.load_state_dict(inner)
    head.load_state_dict(outer)


def _inner_name(name: str) -> str:
    """The name of a weight in transformers' BERT and RemBERT."""
    return name.removeprefix("bleurt.").replace("embedding_projection", "embedding_hidden_mapping_in")


def _pairing(folder: Path, longest: int) -> Pair:
    """``[CLS] reference [SEP] reply [SEP]``; of a pair that is too long, the end of the longer text is cut off."""
    cut, first, end = _pieces(folder / "spm.model") if (folder / "spm.model").is_file() else _word_pieces(folder)

    def pair(reference: str, reply: str) -> tuple[list[int], int]:
        own, other = cut(reference), cut(reply)
        while len(own) + len(other) > longest - 3:
            (own if len(own) > len(other) else other).pop()
        return [first, *own, end, *other, end], len(own) + 2

    return pair


def _word_pieces(folder: Path) -> tuple[Cutter, int, int]:
    try:
        tokenizer = BertTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise ModelError(f"the tokenizer of evaluate.bleurt_model {folder} can't be loaded: {reason}") from None

    def cut(text: str) -> list[int]:
        # A reply that says "[SEP]" must not end the text.
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)

    return cut, int(tokenizer.cls_token_id), int(tokenizer.sep_token_id)


def _pieces(file: Path) -> tuple[Cutter, int, int]:
    """BLEURT-20's pieces as the sentencepiece library itself cuts them, its own normalisation of text included."""
    try:
        import sentencepiece
    except ImportError:
        raise ModelError(
            f'evaluate.bleurt_model {file.parent} needs sentencepiece: pip install "sku-unlearning[bleurt]"'
        ) from None
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise ModelError(f"{file} can't be read: {one_line(error)}") from None
    first, end = (int(pieces.piece_to_id(mark)) for mark in ("[CLS]", "[SEP]"))
    if pieces.unk_id() in (first, end):
        raise ModelError(f"{file} has no piece [CLS] or [SEP]: it is not that of a BLEURT checkpoint")
    return lambda text: list(pieces.encode(text)), first, end
