"""Base and unlearned model of a run, and what each says to a prompt, at any alpha.

Where the run left an adapter, one set of weights serves both: the adapter is switched off for the base, and its factor
is alpha. Else both models are loaded, and a third for another alpha once one is asked for. No file is written.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from transformers import PreTrainedModel, TextStreamer

from sku.config import Recipe, recipe_from_dict
from sku.config.check import check_alpha
from sku.data.examples import RetainExample
from sku.errors import EvaluationError, one_line
from sku.evaluate.generation.decoding import Decoding, GenerationRequest, only_these_settings
from sku.evaluate.generation.prompts import PromptEncoder, free_request
from sku.evaluate.generation.writing import record_of_ids
from sku.evaluate.judges import Judge
from sku.evaluate.judges.choose import AUTO, build_judge
from sku.evaluate.metrics import decide_outcomes
from sku.models import embedding_weight, load_model
from sku.negate.adapters import load_adapter
from sku.report.read_run import RecordedRun, read_run

Side = Literal["base", "unlearned"]
SIDES: tuple[Side, ...] = ("base", "unlearned")


class Said(NamedTuple):
    """A reply, and what the judge makes of it."""

    reply: str
    outcome: str
    """As in a run's table (``harmful``, ``refusal``, ``safe_answer``, ``gibberish``, ...), or ``not refused`` where
    the judge tells refusals only."""


class Pair:
    """The two models of one run."""

    def __init__(self, folder: Path, *, judge: str | None = None, max_new_tokens: int | None = None) -> None:
        """Loads the models of a finished run, at the run's own alpha.

        Args:
            folder: Of ``sku run``.
            judge: As in ``sku evaluate --judge``; None for the run's own.
            max_new_tokens: Longest reply; None for the run's own.

        Raises:
            ModelError: A model or adapter can't be loaded.
            EvaluationError: The folder is none of a finished run, or there is no such judge.
        """
        run = read_run(folder, replies=False)
        recipe = recipe_from_dict(run.recipe, str(folder / "manifest.json"))
        self.judge = _judge_of(run, recipe, judge)  # Before the models, which take longest.
        self.strength = run.strength
        loaded = load_model(recipe.model)
        self._encoder = encoder = PromptEncoder.of(loaded.model, loaded.tokenizer, recipe.model.prompt_format)
        self._decoding = Decoding.of(
            encoder.tokenizer,
            encoder.stop_ids(loaded.model),
            max_new_tokens=max_new_tokens or recipe.evaluate.max_new_tokens,
            window=encoder.window,
        )
        self._device = embedding_weight(loaded.model).device
        self._base: PreTrainedModel | PeftModel = loaded.model
        """The same object as the unlearned one where an adapter is switched on and off."""
        self._unlearned: PreTrainedModel | PeftModel
        parts = run.parts()
        if "adapter" in parts:
            self._base = self._unlearned = load_adapter(loaded.model, parts["adapter"]).eval()
        else:
            own = dataclasses.replace(recipe.model, path=str(parts["model"]), gguf_file=None, revision=None)
            self._unlearned = load_model(own).model
        self._mixture: PreTrainedModel | None = None

    def ask(
        self, prompt: str, *, alpha: float | None = None, show: Callable[[Side, str], None] = lambda *_: None
    ) -> dict[Side, Said]:
        """What both models say, greedily, as in the run's evaluation; the base first.

        Args:
            prompt: The user's words.
            alpha: Strength of the unlearned model, 0 or more: 0 is the base. None for the run's own.
            show: Called with each side's words as they are written.

        Raises:
            RecipeError: ``alpha`` is below 0 or not finite.
            EvaluationError: An empty prompt, one that leaves no room for a reply, another alpha than a run's of 0,
                or a reply that could not be written.
        """
        if not prompt.strip():
            raise EvaluationError("the prompt is empty: write something to ask")
        factor = self._factor(alpha)
        request = free_request("forget_test", RetainExample(prompt=prompt, answer=""), self._encoder)
        if not self._encoder.has_room(request, self._decoding.max_new_tokens):
            raise EvaluationError("the prompt is too long: it leaves no room for a reply in the model's window")
        return {side: self._said(side, request, factor, show) for side in SIDES}

    def _factor(self, alpha: float | None) -> float:
        """What the adapter, saved at the run's strength, is multiplied with."""
        if alpha is None or alpha == self.strength:
            return 1.0
        check_alpha(alpha)
        if self.strength == 0:
            raise EvaluationError("alpha of this run is 0, its model the base: sku negate --alpha makes another")
        return alpha / self.strength

    def _said(self, side: Side, request: GenerationRequest, factor: float, show: Callable[[Side, str], None]) -> Said:
        settings = self._decoding.generation_config(self._decoding.max_new_tokens_for(request))
        with self._at(side, factor) as model, only_these_settings(model, settings), torch.inference_mode():
            ids = torch.tensor([request.input_ids], device=self._device)
            try:
                written = cast(Any, model).generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    generation_config=settings,
                    streamer=_Words(self._encoder.tokenizer, lambda text: show(side, text)),
                )
            except RuntimeError as error:
                raise EvaluationError(f"the reply could not be written: {one_line(error)}") from error
        new_ids = written.sequences[0, ids.shape[1] :].tolist()
        record = record_of_ids(request, new_ids, self._decoding, self._encoder.tokenizer)
        [found] = decide_outcomes([record], self.judge)
        # A judge of refusals alone calls all else harmful, a recipe for bread too.
        untold = found.outcome == "harmful" and not self.judge.card.tells_safe
        return Said(record.reply, "not refused" if untold else found.outcome)

    @contextmanager
    def _at(self, side: Side, factor: float) -> Iterator[PreTrainedModel | PeftModel]:
        """One of the two models, the unlearned one with its change multiplied."""
        if isinstance(self._unlearned, PeftModel):
            adapted = self._unlearned
            with adapted.disable_adapter() if side == "base" else rescale_adapter_scale(adapted, factor):
                yield adapted
        elif side == "base":
            yield self._base
        else:
            yield self._unlearned if factor == 1 else self._mixed(factor)

    def _mixed(self, factor: float) -> PreTrainedModel:
        """A third model, ``base + factor * (unlearned - base)``: the base itself at 0."""
        if self._mixture is None:
            self._mixture = copy.deepcopy(cast(PreTrainedModel, self._unlearned))
        parameters = (model.parameters() for model in (self._mixture, self._base, self._unlearned))
        with torch.no_grad():
            for mixed, start, end in zip(*parameters, strict=True):
                mixed.copy_(torch.lerp(start, end, factor))
        return self._mixture


class _Words(TextStreamer):
    """Gives a reply's words to a function, as soon as they are whole."""

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._show = show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._show(text)


def _judge_of(run: RecordedRun, recipe: Recipe, name: str | None) -> Judge:
    """Of a name, else the run's: its recipe may leave the choice to its data, and its result says what that was."""
    if name is not None:
        return build_judge(name)
    own = recipe.evaluate.judge
    return build_judge(run.comparison.unlearned.judge.name if own == AUTO else own, recipe.evaluate.judge_settings)
