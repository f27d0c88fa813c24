"""Every operator on the same bad vectors: how much harm each removes for how much normal text.

Trains one bad vector for each preservation mode, saves it, and measures each operator on it over a grid of alphas:
perplexity after / before of held-out harmful answers (``forget_test``), of a benign set and of held-out normal
answers, and selectivity, ln(harmful ratio) / ln(benign ratio). The best points are then asked: harmful replies by the
rules, the worst prefill, gibberish replies. Writes counts and ratios only (``points.jsonl``, ``table.md``); a second
call goes on where the first stopped. OUT holds bad vectors: it is made private, and is to be removed after use.

    python scripts/operator_table.py MODEL_DIR --gguf-file NAME --forget pku_saferlhf.csv --retain TruthfulQA.csv \
        --benign benign.jsonl --out runs/operators
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from sku.config import Recipe, recipe_from_dict
from sku.data.examples import Example
from sku.data.load import load_data
from sku.data.tokens import TokenizedExample, resolve_prompt_format
from sku.errors import EvaluationError, TaskVectorError
from sku.evaluate.asking import Writer, draw_examples, window_of
from sku.evaluate.perplexity import score_examples
from sku.evaluate.records import Start
from sku.evaluate.run import evaluate
from sku.methods.run import train_method
from sku.models import LoadedModel, load_model
from sku.negate.operators import operate, prepare_operators
from sku.negate.operators.base import context_of
from sku.negate.run import subtract_into, task_vector_of
from sku.negate.task_vector import TaskVector
from sku.pipeline.bad_model import plan_acquire
from sku.storage import mark_hazardous, new_folder, write_json

SPLITS = ("forget_test", "benign", "retain_test")
MODES: dict[str, dict[str, Any]] = {
    "retention": {"preservation_mode": "retention"},
    "divergence": {"preservation_mode": "divergence", "preservation_cap": 1.0},
    "none": {"weights": {"guided_distortion": 1.0, "random_disassociation": 1.0, "preservation_divergence": 0.0}},
}
RESAMPLES = 1000
MOST_TRIES = 5
CLOSE_ENOUGH = 0.1
LARGEST_ALPHA = 100.0
COLUMNS = (
    "mode", "operator", "alpha", "harmful", "benign (95 %)", "retain_test", "selectivity", "harmful replies",
    "gibberish", "worst prefill", "over-refusal",
)  # fmt: skip


ROWS = """
plain: []
MLP only: [{layers: {"*.mlp.*": 1.0, rest: 0.0}}]
attention only: [{layers: {"*.self_attn.*": 1.0, rest: 0.0}}]
top 10 %: [{trim: {keep: 0.1}}]
top 30 %: [{trim: {keep: 0.3}}]
null space 0.8: [{null_space: {energy: 0.8}}]
null space 0.9: [{null_space: {energy: 0.9}}]
null space 0.95: [{null_space: {energy: 0.95}}]
null space 0.99: [{null_space: {energy: 0.99}}]
null space 0.9, unit: [{null_space: {energy: 0.9, unit: true}}]
null space 0.95, unit: [{null_space: {energy: 0.95, unit: true}}]
null space, soft 10: [{null_space: {soft: 10.0}}]
null space, soft 100: [{null_space: {soft: 100.0}}]
contrast 1: [{contrast: {strength: 1.0}}]
contrast 4: [{contrast: {strength: 4.0}}]
contrast 16: [{contrast: {strength: 16.0}}]
contrast 64: [{contrast: {strength: 64.0}}]
contrast 256: [{contrast: {strength: 256.0}}]
contrast 4, decision: [{contrast: {strength: 4.0, positions: decision}}]
contrast 8: [{contrast: {strength: 8.0}}]
contrast 16, MLP only: [{contrast: {strength: 16.0}}, {layers: {"*.mlp.*": 1.0, rest: 0.0}}]
contrast 64, MLP only: [{contrast: {strength: 64.0}}, {layers: {"*.mlp.*": 1.0, rest: 0.0}}]
contrast 16, unit: [{contrast: {strength: 16.0, unit: true}}]
PerTA grad: [{PERTA: {importance: grad}}]
PerTA Fisher: [{PERTA: {importance: fisher}}]
minus benign: [{minus_benign: {path: BENIGN, how: subtract}}]
benign alone: [{layers: {"*": 0.0}}, {minus_benign: {path: BENIGN, how: subtract}}]
minus benign 0.03: [{minus_benign: {path: BENIGN, how: subtract, beta: 0.03}}]
contrast 16, minus benign 0.03:
  [{contrast: {strength: 16.0}}, {minus_benign: {path: BENIGN, how: subtract, beta: 0.03}}]
contrast 16, minus benign 0.015:
  [{contrast: {strength: 16.0}}, {minus_benign: {path: BENIGN, how: subtract, beta: 0.015}}]
benign component: [{minus_benign: {path: BENIGN, how: project}}]
learned: [{learned: {}}]
learned, short: [{learned: {steps: 15, batch_size: 4, learning_rate: 0.2}}]
learned, each module: [{learned: {per: layer_and_module}}]
learned, each module, short: [{learned: {per: layer_and_module, steps: 15, batch_size: 4, learning_rate: 0.2}}]
learned, each direction: [{learned: {per: direction, steps: 60}}]
null space 0.9 + learned: [{null_space: {energy: 0.9}}, {learned: {start: 2.0}}]
contrast 16 + learned: [{contrast: {strength: 16.0}}, {learned: {start: 2.0}}]
contrast 16 + learned directions:
  - contrast: {strength: 16.0}
  - learned: {per: direction, steps: 40, batch_size: 6, learning_rate: 0.5, start: 10.0, largest: 40.0}
PerTA grad + null space 0.9: [{PERTA: {}}, {null_space: {energy: 0.9}}]
NegMerge of the modes: [{NEG_MERGE: {paths: OTHERS}}]
NegMerge + null space 0.9: [{NEG_MERGE: {paths: OTHERS}}, {null_space: {energy: 0.9}}]
"""
"""Name of the row -> operators, one after the other, as in a recipe; ``operator_rows`` fills in what is in capitals.
``benign alone`` is a control: what normal training does."""
PERTA, NEG_MERGE = (
    str(Path(__file__).parents[1] / "docs" / "examples" / name) for name in ("perta.py", "neg_merge.py")
)


def operator_rows(out: Path, modes: Sequence[str], mode: str) -> dict[str, list[dict[str, Any]]]:
    """The rows with the paths of the other vectors; those that need other modes are left out where there are none."""
    others = [str(out / f"bad-{other}") for other in modes if other != mode]
    text = ROWS.replace("BENIGN", json.dumps(str(out / "benign"))).replace("OTHERS", json.dumps(others))
    text = text.replace("PERTA", json.dumps(PERTA)).replace("NEG_MERGE", json.dumps(NEG_MERGE))
    rows: dict[str, list[dict[str, Any]]] = yaml.safe_load(text)
    return rows if others else {name: entries for name, entries in rows.items() if "NegMerge" not in name}


def recipe_of(options: argparse.Namespace, mode: str) -> Recipe:
    """The recipe of one preservation mode."""
    acquire = {
        "weights": {
            "guided_distortion": 1.0, "random_disassociation": 1.0,
            "preservation_divergence": options.preservation_weight,
        },
        "random_answers": options.random_answers, "tuning": "lora", "lora": {"r": 16, "alpha": 32},
        "training": {
            "max_steps": options.steps, "per_device_train_batch_size": options.batch_size,
            "learning_rate": options.learning_rate, "lr_scheduler_type": "cosine",
            "warmup_steps": max(1, options.steps // 15), "max_grad_norm": 1.0, "logging_steps": 10,
        },
    }  # fmt: skip
    return recipe_from_dict(
        {
            "name": f"operators-{mode}", "seed": options.seed,
            "model": {"path": options.model, "gguf_file": options.gguf_file, "dtype": options.train_dtype},
            "data": {
                "forget": {"path": options.forget}, "retain": {"path": options.retain},
                "normal": {} if options.benign is None else {"benign": {"path": options.benign}},
                "max_length": 256, "max_answer_tokens": 64,
            },
            "acquire": {**acquire, **MODES[mode]},
            "evaluate": {
                "prompts": options.reply_prompts, "retain_prompts": options.reply_prompts, "max_new_tokens": 48,
                "batch_size": 20, "samples": 0, "judge": "auto",
            },
        }
    )  # fmt: skip


class Table:
    """One call of the script."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Loads what all modes share."""
        self.options, self.out = options, options.out
        mark_hazardous(self.out)
        recipe = recipe_of(options, "retention")
        # For the rows of learned; held out for all, so that they share their bad model.
        self.data = load_data(recipe.data, recipe.seed, forget_validation=recipe.sweep.validation_fraction)
        self.loaded = load_model(dataclasses.replace(recipe.model, dtype="float32"))
        self.base = self.loaded.model
        self.memory: dict[str, Any] = {}
        self._starts: tuple[Start, ...] | None = None
        self.texts = self._texts()
        self.before = {split: self._score(self.base, split) for split in self.texts}
        print({split: len(texts) for split, texts in self.texts.items()}, flush=True)

    def _texts(self) -> dict[str, list[TokenizedExample]]:
        writer = Writer(
            tokenizer=self.loaded.tokenizer,
            prompt_format=resolve_prompt_format("auto", self.loaded.tokenizer),
            window=min(window_of(self.base), 256),
        )
        splits: dict[str, Sequence[Example]] = {
            "forget_test": self.data.forget_test,
            "benign": self.data.normal.get("benign", ()),
            "retain_test": self.data.retain_test,
        }
        texts = {}
        for split, examples in splits.items():
            drawn = draw_examples(examples, self.options.score, seed=self.options.seed)
            scored = (writer.scored(item.prompt, item.answer, with_end=item.finished) for item in drawn)
            texts[split] = [text for text in scored if text is not None]
        return {split: found for split, found in texts.items() if found}

    def _score(self, model: PreTrainedModel, split: str) -> list[tuple[float, int]]:
        return score_examples(model, self.texts[split], batch_size=16)

    def train(self, modes: Sequence[str]) -> None:
        """One bad vector a mode, and one of normal training; what is there already is taken."""
        for mode in modes:
            folder = self.out / f"bad-{mode}"
            if not folder.exists():
                started = time.monotonic()
                log = plan_acquire(recipe_of(self.options, mode), folder).execute(None)
                losses = {name: round(value, 3) for name, value in log[-1].items() if name.startswith("loss")}
                print(f"trained {mode}: {time.monotonic() - started:.0f} s, {losses}", flush=True)
        folder = self.out / "benign"
        rows = self.options.rows
        if (not rows or any("benign" in row for row in rows)) and not folder.exists():
            recipe = dataclasses.replace(recipe_of(self.options, "retention"), method="fine_tune")
            loaded: LoadedModel = load_model(recipe.model)
            with new_folder(folder, private=True) as temporary:
                trained = train_method(recipe, loaded, self.data, temporary / "checkpoints")
                trained.model.save_pretrained(str(temporary))

    def points(self, mode: str, modes: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Each operator at each alpha, from the smallest, or where benign text stands at the budget."""
        done: dict[str, dict[float, dict[str, Any]]] = {}
        for point in self.read():
            if point["mode"] == mode:
                done.setdefault(point["row"], {})[point["alpha"]] = point
        for row, entries in operator_rows(self.out, modes, mode).items():
            if self.options.rows and row not in self.options.rows:
                continue
            vector: TaskVector | None = None
            found = done.setdefault(row, {})
            for alpha in self._alphas(found, [*done.get("plain", {}).values()]):
                if alpha not in found:
                    started = time.monotonic()
                    if vector is None:
                        vector = self._vector(mode, row, entries)
                    found[alpha] = {
                        "mode": mode, "row": row, "alpha": alpha, "norm": vector.norm(),
                        **self.measure(vector, alpha), "seconds": round(time.monotonic() - started, 1),
                    }  # fmt: skip
                    yield found[alpha]

    def _alphas(self, found: Mapping[float, Mapping[str, Any]], plain: Sequence[Mapping[str, Any]]) -> Iterator[float]:
        """What to measure next, given what was: ``found`` holds each alpha when the next one is asked for.

        ``plain`` are the plain vector's points: at the one nearest to the budget a search begins.
        """
        budget = self.options.benign_budget
        if budget is None:
            for alpha in self.options.alphas:
                yield alpha
                if found[alpha]["benign"] > self.options.worst_benign:
                    return
            return
        begin = points_at(plain, budget)
        next_one: float | None = begin[0]["alpha"] if begin else self.options.alphas[0]
        for _ in range(MOST_TRIES):
            if next_one is None:
                return
            yield next_one
            next_one = alpha_for(budget, {alpha: point["benign"] for alpha, point in found.items()})

    def measure(self, vector: TaskVector, alpha: float) -> dict[str, Any]:
        """Ratios of perplexity, with the 95 % interval of the benign one, and selectivity."""
        model = self._model()
        try:
            subtract_into(model, self.base, vector, alpha)
            after = {split: self._score(model, split) for split in self.texts}
        except (TaskVectorError, EvaluationError):
            return {**dict.fromkeys(self.texts, math.inf), "benign": math.inf, "interval": None, "selectivity": None}
        growth = {split: _log_ratio(self.before[split], after[split]) for split in self.texts}
        # Without a benign set the held-out normal answers stand in for it.
        benign = "benign" if "benign" in growth else "retain_test"
        growth["benign"] = growth[benign]
        return {
            **{split: math.exp(min(value, 700.0)) for split, value in growth.items()},
            "interval": [math.exp(min(value, 700.0)) for value in _interval(self.before[benign], after[benign])],
            "selectivity": growth["forget_test"] / growth["benign"] if growth["benign"] > 0 else None,
        }

    def ask(self, point: Mapping[str, Any], modes: Sequence[str]) -> dict[str, Any]:
        """Replies of one point: rates of harmful and gibberish ones, with the worst prefill apart."""
        mode, recipe = point["mode"], recipe_of(self.options, point["mode"])
        model = self._model()
        if point["row"] == "base":
            model = self.base
        else:
            vector = self._vector(mode, point["row"], operator_rows(self.out, modes, mode)[point["row"]])
            subtract_into(model, self.base, vector, point["alpha"])
        result = evaluate(
            model,
            self.loaded.tokenizer,
            dataclasses.replace(self.data, normal={}),
            config=recipe.evaluate,
            base_model=self.base,
            starts=self._starts,
            model_name="point",
            seed=recipe.seed,
        )
        self._starts = result.starts  # Of the base, whichever point was asked first.
        prefill = result.worst_prefills()["forget_test"]
        unseen, retain = result.replies["forget_test"], result.replies["retain_test"]
        rates = {
            "harmful": unseen["harmful"], "gibberish": unseen["gibberish"], "prefill": prefill["harmful"],
            "prefill_gibberish": prefill["gibberish"], "over_refusal": retain["over_refusal"],
            "normal_gibberish": retain["gibberish"],
        }  # fmt: skip
        return {**point, "replies": {name: f"{rate.count}/{rate.total}" for name, rate in rates.items()}}

    def _model(self) -> PreTrainedModel:
        if "model" not in self.memory:
            self.memory["model"] = copy.deepcopy(self.base)
        model = self.memory["model"]
        assert isinstance(model, PreTrainedModel)
        # Another vector may have changed weights that this one leaves alone.
        model.load_state_dict(self.base.state_dict())
        return model

    def _vector(self, mode: str, row: str, entries: Sequence[Mapping[str, Any]]) -> TaskVector:
        """What a row subtracts; its operators' accounts go to ``operators.json``."""
        context = context_of(
            self.base, self.loaded.tokenizer, self.data, recipe_of(self.options, mode).data, seed=self.options.seed,
            cache=self.out / "cache", memory=self.memory,
        )  # fmt: skip
        bad = task_vector_of(self.base, self.out / f"bad-{mode}")
        operated = operate(bad, prepare_operators(entries), context)
        path = self.out / "operators.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, {**known, f"{mode}: {row}": list(operated.records)})
        return operated.vector

    def read(self, name: str = "points.jsonl") -> list[dict[str, Any]]:
        """Points of earlier calls."""
        path = self.out / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def write(self, point: Mapping[str, Any], name: str = "points.jsonl") -> None:
        """One more line, at once."""
        with (self.out / name).open("a") as file:
            file.write(json.dumps(point) + "\n")


def _log_ratio(before: Sequence[tuple[float, int]], after: Sequence[tuple[float, int]]) -> float:
    tokens = sum(count for _, count in before)
    return (math.fsum(nll for nll, _ in after) - math.fsum(nll for nll, _ in before)) / tokens


def _interval(before: Sequence[tuple[float, int]], after: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """95 % of resampled sets of examples."""
    generator = random.Random(0)
    places = range(len(before))
    found = sorted(
        _log_ratio([before[place] for place in drawn], [after[place] for place in drawn])
        for drawn in (generator.choices(places, k=len(before)) for _ in range(RESAMPLES))
    )
    return found[int(0.025 * RESAMPLES)], found[int(0.975 * RESAMPLES) - 1]


def alpha_for(budget: float, benign: Mapping[float, float]) -> float | None:
    """The alpha at which the benign ratio should stand at a budget.

    Args:
        budget: Above 1.
        benign: What was measured: alpha -> benign ratio. At least one.

    Returns:
        Between the two nearest on a line of logarithms, or beyond the outermost as a square grows; None where a point
        is within a tenth of the budget's logarithm, or where no alpha up to ``LARGEST_ALPHA`` uses it up.
    """
    wanted = math.log(budget)
    grown = {alpha: math.log(ratio) if 0 < ratio < math.inf else math.inf for alpha, ratio in sorted(benign.items())}
    if any(abs(growth / wanted - 1) <= CLOSE_ENOUGH for growth in grown.values()):
        return None
    below = max((alpha for alpha, growth in grown.items() if growth < wanted), default=None)
    above = min((alpha for alpha, growth in grown.items() if growth >= wanted), default=None)
    if below is None:
        assert above is not None
        return _rounded(above * math.sqrt(wanted / grown[above]) if math.isfinite(grown[above]) else above / 2)
    least = max(grown[below], wanted / 16)
    if above is None or not math.isfinite(grown[above]):
        guess = below * math.sqrt(wanted / least)
        if above is not None:
            guess = min(guess, (below + above) / 2)
        return None if below >= LARGEST_ALPHA else min(_rounded(guess), LARGEST_ALPHA)
    share = math.log(wanted / least) / math.log(grown[above] / least)
    return _rounded(math.exp(math.log(below) + share * math.log(above / below)))


def _rounded(alpha: float) -> float:
    return float(f"{alpha:.3g}")


def points_at(points: Sequence[Mapping[str, Any]], budget: float) -> list[Mapping[str, Any]]:
    """Of each mode and operator the point whose benign ratio is nearest to the budget; the most harm removed first."""
    chosen = _one_each(points, lambda point: -abs(point["benign"] - budget))
    return sorted(chosen, key=lambda point: -point["forget_test"])


def best_points(points: Sequence[Mapping[str, Any]], least_harm: float) -> list[Mapping[str, Any]]:
    """Of each mode and operator the most selective point whose harmful ratio is at least ``least_harm``.

    The most selective comes first; a benign ratio of at most 1 counts as the best there is. Near alpha 0, below
    ``least_harm``, selectivity is a ratio of two noises.
    """

    def rank(point: Mapping[str, Any]) -> float:
        return math.inf if point["selectivity"] is None else float(point["selectivity"])

    harmed = [point for point in points if point["forget_test"] >= least_harm]
    return sorted(_one_each(harmed, rank), key=rank, reverse=True)


def _one_each(
    points: Sequence[Mapping[str, Any]], rank: Callable[[Mapping[str, Any]], float]
) -> list[Mapping[str, Any]]:
    """Of each mode and operator the first of the highest rank, of points at which benign text did not break."""
    chosen: dict[tuple[str, str], Mapping[str, Any]] = {}
    for point in points:
        key = (point["mode"], point["row"])
        if point["benign"] < math.inf and (key not in chosen or rank(point) > rank(chosen[key])):
            chosen[key] = point
    return list(chosen.values())


def table(chosen: Sequence[Mapping[str, Any]], asked: Sequence[Mapping[str, Any]], title: str) -> str:
    """One point of each operator as Markdown, with what was asked."""
    replies = {(point["mode"], point["row"], point["alpha"]): point["replies"] for point in asked}
    lines = [
        f"{title}; all points in points.jsonl.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for point in chosen:
        found = replies.get((point["mode"], point["row"], point["alpha"]), {})
        low, high = point["interval"]
        selectivity = "benign not above 1" if point["selectivity"] is None else f"{point['selectivity']:.1f}"
        cells = [
            point["mode"], point["row"], f"{point['alpha']:g}", f"x{point['forget_test']:.2f}",
            f"x{point['benign']:.3f} ({low:.3f} to {high:.3f})", f"x{point['retain_test']:.3f}", selectivity,
            *(found.get(name, "") for name in ("harmful", "gibberish", "prefill", "over_refusal")),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    base = next((point["replies"] for point in asked if point["row"] == "base"), None)
    if base is not None:
        lines += ["", f"Base model: {', '.join(f'{name} {value}' for name, value in base.items())}."]
    return "\n".join(lines) + "\n"


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of the base model, or embedded")
    parser.add_argument("--gguf-file")
    parser.add_argument("--forget", required=True)
    parser.add_argument("--retain", required=True)
    parser.add_argument("--benign", help="prompt/completion JSONL of another source (scripts/benign_from_base.py)")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=["retention", "divergence", "none"])
    parser.add_argument("--rows", nargs="+", help="names of operator rows; all where this is left out")
    parser.add_argument("--alphas", nargs="+", type=float, default=[1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--steps", type=int, default=90)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--random-answers", type=int, default=3)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--preservation-weight", type=float, default=1.0)
    parser.add_argument("--train-dtype", default="bfloat16")
    parser.add_argument("--score", type=int, default=64, help="answers of each split that are scored")
    parser.add_argument("--worst-benign", type=float, default=2.0, help="a row ends where benign is worse than this")
    parser.add_argument("--least-harm", type=float, default=2.0)
    parser.add_argument(
        "--benign-budget",
        type=float,
        help="search for each operator the alpha at which benign is this, such as 1.1; from the first of --alphas",
    )
    parser.add_argument("--reply-prompts", type=int, default=40)
    parser.add_argument("--ask", type=int, default=6, help="best points that are asked")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, measures, asks, writes the table."""
    options = options_of(arguments)
    run = Table(options)
    run.train(options.modes)
    for mode in options.modes:
        for point in run.points(mode, options.modes):
            run.write(point)
            print(
                f"{mode:>10} {point['row']:<30} alpha {point['alpha']:<4g} harmful x{point['forget_test']:.2f} "
                f"benign x{point['benign']:.3f} selectivity {point['selectivity'] or 0:.2f} {point['seconds']:.0f} s",
                flush=True,
            )
    points = run.read()
    asked = run.read("asked.jsonl")
    known = {(point["mode"], point["row"], point["alpha"]) for point in asked}
    if options.benign_budget is None:
        chosen = best_points(points, options.least_harm)
        title = f"Most selective point of each operator with harmful x{options.least_harm:g} or more"
    else:
        chosen = points_at(points, options.benign_budget)
        title = f"The point of each operator whose benign ratio is nearest to x{options.benign_budget:g}"
    base = {"mode": options.modes[0], "row": "base", "alpha": 0.0}
    for point in [base, *chosen[: options.ask]] if options.ask else []:
        if (point["mode"], point["row"], point["alpha"]) not in known:
            run.write(run.ask(point, options.modes), "asked.jsonl")
            print(f"asked {point['mode']} {point['row']}", flush=True)
    text = table(chosen, run.read("asked.jsonl"), title)
    (run.out / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
