"""The frozen original model: inside the one in training, as a copy, or kept as what goes into its head.

One pass over the rows that training will ask about, before the first step, takes the place of one in every step, and
of a second model where all weights are trained: of the original only the head is kept, and only if it is trained too.
Scores are never kept: 45 tokens of Gemma's vocabulary are 47 MB, their hidden states 58 KB.

Shapes: N = kept positions, M = rows of one kind, B = joint examples of a batch, H = width of the hidden states,
P = kept positions of all rows of a kind, I = examples of a split, L = decoder layers that are read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn

from sku.data.batches import JointExample
from sku.data.examples import RowType
from sku.data.joint import JointDataset
from sku.data.tokens import TokenizedExample
from sku.errors import RecipeError
from sku.losses import Head, HeadScores
from sku.models import changed_by_adapter
from sku.training import evaluation_mode, is_four_bit
from sku.training.config import UnlearningConfig
from sku.training.objective import ScoredRows

_MEGABYTE = 2**20
Ask = Callable[[RowType, list[JointExample]], ScoredRows]
"""Kind and joint examples of one row each -> what goes into the original model's head there."""


@contextmanager
def original_weights(model: nn.Module) -> Iterator[None]:
    """The frozen reference for a while: adapter off, or no step has moved the weights; and dropout off."""
    with evaluation_mode(model), model.disable_adapter() if isinstance(model, PeftModel) else nullcontext():
        yield


def check_original_stays(model: nn.Module, added: PeftConfig | None) -> None:
    """Refuses an adapter, there or to be added, that changes the original weights themselves.

    With it off they would not be the original.

    Raises:
        RecipeError: With the setting that does so.
    """
    there = model.peft_config.values() if isinstance(model, PeftModel) else ()
    for settings in (*there, *([] if added is None else [added])):
        changed = changed_by_adapter(settings)
        if changed is not None:
            raise RecipeError(
                f"the adapter changes the original weights: {changed}; leave that setting at its default"
            )


def keep_four_bit_trainable(model: nn.Module) -> None:
    """Puts four-bit layers in training mode before a model that will be trained is first run.

    In evaluation mode bitsandbytes repacks their weights on a CPU for a kernel that has no backward.
    """
    for module in model.modules():
        if is_four_bit(module):
            module.training = True


class NoCacheError(Exception):
    """Why the original model has to be asked in each step."""


class ReferenceCache:
    """What the original model will be asked in training, kind by kind, filled when a kind is first asked for."""

    def __init__(self, dataset: JointDataset, ask: Ask, settings: UnlearningConfig, head: Head | None) -> None:
        """Keeps nothing yet; the original model may be asked until the first optimizer step."""
        self._dataset, self._ask, self._settings, self._head = dataset, ask, settings, head
        self._rows: dict[RowType, CachedRows] = {}

    def why_not(self, *, is_spread: bool) -> str:
        """Why there can't be a cache, empty where there can; weights may be spread over several processes."""
        if not self._settings.reference_cache_mb:
            return "reference_cache_mb is 0"
        if is_spread:
            return "the head's weight is spread over several processes"
        if self._head is None:
            return "the model's head can't be left out"
        return ""

    def look_up(self, kind: RowType, rows: ScoredRows, inputs: Mapping[str, Tensor]) -> ScoredRows:
        """The original model on the rows of one kind of a batch.

        Args:
            kind: Which rows.
            rows: Of the model in training.
            inputs: The batch.

        Returns:
            The same rows as the original model scores them, without gradient. Scores are made where they fit, or the
            model in training has its made.

        Raises:
            NoCacheError: These rows are drawn anew in each step, or all that is asked for is too much to keep.
        """
        if kind not in self._rows:
            self._rows[kind] = self._filled(kind)
        index_M = inputs["retain_rows"] if kind == RowType.RETAIN else inputs["forget_index"][rows.example_M]
        found = self._rows[kind].look_up(rows, index_M)
        # Where hidden states of a layer are compared, no one asks for scores.
        if isinstance(rows.scores_NV, HeadScores) or found.hidden_NLH is not None:
            return found
        return replace(found, scores_NV=found.logits_NV)

    def _filled(self, kind: RowType) -> CachedRows:
        rows = self._dataset.fixed_rows(kind, self._examples())
        if rows is None:
            raise NoCacheError("answers of other prompts are drawn anew in each step")
        # Batches as in training, where the first rows then stand beside the same ones and get the same bits.
        size, limit = self._settings.per_device_train_batch_size, self._settings.reference_cache_mb
        hidden: list[Tensor] = []
        layers: list[Tensor] = []
        lengths: list[Tensor] = []
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            scored = self._ask(kind, [_alone(kind, row) for row in batch])
            scores_NV = scored.scores_NV
            assert isinstance(scores_NV, HeadScores)
            head = scores_NV.head
            hidden.append(scores_NV.hidden_NH)
            layers.extend([] if scored.hidden_NLH is None else [scored.hidden_NLH])
            lengths.append(torch.bincount(scored.row_N, minlength=len(batch)))
            done = start + len(batch)
            expected = sum(tensor.nbytes for tensor in (*hidden, *layers)) * len(rows) / done / _MEGABYTE
            if expected > limit and done >= min(8 * size, len(rows)):
                raise NoCacheError(
                    f"its hidden states on {len(rows)} rows would take about {expected:.0f} MB, and "
                    f"reference_cache_mb is {limit:g}"
                )
        length_M = torch.cat(lengths)
        example_ids = torch.tensor([row.example_id for row in rows], device=length_M.device)
        start_I = length_M.new_full((int(example_ids.max()) + 2,), -1)
        start_I[example_ids] = length_M.cumsum(0) - length_M
        return CachedRows(
            start_I=start_I,
            hidden_PH=_with_nan(hidden),
            head=replace(
                head,
                weight_VH=_original(head.weight_VH),
                bias_V=None if head.bias_V is None else _original(head.bias_V),
            ),
            layers_PLH=_with_nan(layers) if layers else None,
        )

    def _examples(self) -> int:
        """Joint examples from the start of training to its end, or more."""
        settings, size = self._settings, len(self._dataset)
        steps: int = settings.max_steps
        batch: int = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * settings.world_size
        if steps <= 0:
            return math.ceil(settings.num_train_epochs) * size
        steps_of_an_epoch = max(1, size // batch)
        if steps <= steps_of_an_epoch:
            return min(size, steps * batch)
        return -(-steps // steps_of_an_epoch) * size


@dataclass(frozen=True, kw_only=True)
class CachedRows:
    """The original model on all rows of one kind."""

    start_I: Tensor
    """Position in ``hidden_PH`` of the first kept position of each example's row, -1 where it isn't kept. The last
    entry stands for all examples beyond."""
    hidden_PH: Tensor
    """What goes into the head, in the model's own type. A last row of NaN stands for all that isn't kept, so that it
    can't be used unnoticed."""
    head: Head
    layers_PLH: Tensor | None
    """The same of ``Objective.hidden_layers``."""

    def look_up(self, rows: ScoredRows, index_M: Tensor) -> ScoredRows:
        """The original model on the rows of a batch, its scores not made yet. Nothing waits for a GPU.

        Of the rows of the model in training, what isn't scores is the same for the original; ``index_M`` is the place
        of each in its split.
        """
        start_M = self.start_I[index_M.clamp(max=len(self.start_I) - 1)]
        # Positions of a row lie one after the other, so a row begins where its number is first met.
        first_M = torch.searchsorted(rows.row_N, torch.arange(len(start_M), device=rows.row_N.device))
        place_N = torch.arange(len(rows.row_N), device=rows.row_N.device) - first_M[rows.row_N]
        start_N = start_M[rows.row_N]
        place_N = torch.where(start_N < 0, len(self.hidden_PH) - 1, start_N + place_N)
        return replace(
            rows,
            scores_NV=HeadScores(hidden_NH=self.hidden_PH[place_N], head=self.head),
            hidden_NLH=None if self.layers_PLH is None else self.layers_PLH[place_N],
        )


def _with_nan(parts: list[Tensor]) -> Tensor:
    return torch.cat([*parts, torch.full_like(parts[0][:1], torch.nan)])


def _original(weight: Tensor) -> Tensor:
    """A copy of a weight that training changes; a frozen one as it is."""
    return weight.detach().clone() if weight.requires_grad else weight


def _alone(kind: RowType, row: TokenizedExample) -> JointExample:
    """A joint example of one row."""
    return JointExample(rows=((kind, row),), forget_index=-1 if kind == RowType.RETAIN else row.example_id)
