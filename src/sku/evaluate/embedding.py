"""Sentence embeddings with plain transformers, in the format of all-MiniLM-L6-v2: mean over the tokens, length 1."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sku.errors import ModelError, one_line
from sku.evaluate.batching import Progress, pad, run_in_batches

MAX_TOKENS = 256
"""Longest text that is read, the limit of all-MiniLM-L6-v2; what is longer is cut at its end."""
_PROBE = "the river is long and the moon is small"
_LOADING_ERRORS = (OSError, ValueError, KeyError, RuntimeError, HfHubHTTPError, HFValidationError, SafetensorError)


@dataclass(frozen=True, kw_only=True)
class Embedder:
    """A loaded sentence embedding model."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str

    def embed(self, texts: Sequence[str], *, batch_size: int, progress: Progress | None = None) -> Tensor:
        """Embeds texts; equal texts are embedded once.

        Args:
            texts: N texts, empty ones too.
            batch_size: Texts at once.
            progress: Called after each batch.

        Returns:
            ``[N, d]`` float32 on the CPU, each row of length 1: the dot product of two is their cosine.

        Raises:
            EvaluationError: GPU memory runs out on a single text.
        """
        if not texts:
            return torch.empty(0, int(self.model.config.hidden_size))
        place = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        rows = [self._ids(text) for text in place]
        found: dict[int, Tensor] = {}

        def embed_batch(batch: list[int]) -> None:
            found.update(zip(batch, self._mean_states([rows[index] for index in batch]), strict=True))

        run_in_batches([len(row) for row in rows], embed_batch, batch_size=batch_size, progress=progress)
        return torch.stack([found[place[text]] for text in texts])

    def fingerprint(self) -> str:
        """A hash of what it computes."""
        return hashlib.sha256(self.embed([_PROBE], batch_size=1).numpy().tobytes()).hexdigest()

    def _ids(self, text: str) -> list[int]:
        own = int(getattr(self.model.config, "max_position_embeddings", MAX_TOKENS))
        longest = min(MAX_TOKENS, own, self.tokenizer.model_max_length)
        return list(self.tokenizer(text, truncation=True, max_length=longest).input_ids)

    def _mean_states(self, rows: Sequence[Sequence[int]]) -> Tensor:
        ids_BT, mask_BT = pad(rows, self.tokenizer.pad_token_id or 0, left=False, device=self.model.device)
        with torch.inference_mode():
            states_BTD = self.model(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state.float()
        weights_BT1 = mask_BT[:, :, None].float()
        means_BD = (states_BTD * weights_BT1).sum(1) / weights_BT1.sum(1)
        return functional.normalize(means_BD, dim=-1).cpu()


def load_embedder(source: str, device: torch.device) -> Embedder:
    """Loads an encoder and its tokenizer.

    Args:
        source: Folder or hub id of a sentence embedding model whose embedding is the mean over its tokens.
        device: Where it runs, in float32.

    Returns:
        The embedder, in evaluation mode.

    Raises:
        ModelError: It can't be found or read, lacks weights, or a folder says that it is read otherwise.
    """
    folder = Path(source).expanduser()
    is_local = folder.exists() or source.startswith(("/", ".", "~"))
    if is_local and not (folder / "config.json").is_file():
        raise ModelError(f"evaluate.embedding_model {source} is no model folder: it holds no config.json")
    _check_pooling(folder / "1_Pooling" / "config.json", source)
    name = str(folder) if is_local else source
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, loading = AutoModel.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except _LOADING_ERRORS as error:
        reason = one_line(error)
        raise ModelError(f"evaluate.embedding_model {source} can't be loaded: {reason}") from None
    # The embedding is read off the token states: what would stand behind them may be missing.
    missing = [key for key in loading["missing_keys"] if not key.startswith("pooler.")]
    if missing:
        raise ModelError(f"evaluate.embedding_model {source} lacks {len(missing)} weights, the first is {missing[0]}")
    model.to(device).eval()
    return Embedder(model=model, tokenizer=tokenizer, name=source)


def _check_pooling(file: Path, source: str) -> None:
    if not file.is_file():
        return
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} can't be read: {error}") from None
    modes = {
        name for name, value in content.items() if name.startswith("pooling_mode_") and value is True
    }  # fmt: skip
    if modes - {"pooling_mode_mean_tokens"}:
        raise ModelError(
            f"evaluate.embedding_model {source} does not take the mean over its tokens ({', '.join(sorted(modes))}): "
            "use one that does, such as all-MiniLM-L6-v2"
        )
