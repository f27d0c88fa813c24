"""Recipes that are no YAML, ask for the impossible, or want to write elsewhere: refused before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.battery import UNLOADABLE, Battery

pytestmark = pytest.mark.integration

NAME = "recipes"
SOUND = "name: mine\nmodel: {path: embedded}\ndata: {forget: {path: embedded}, retain: {path: embedded}}\n"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)

TEXTS: dict[str, tuple[str | bytes, str]] = {
    "key twice": (SOUND + "seed: 1\nseed: 2\n", 'found duplicate key "seed"'),
    "Python object": (SOUND + "seed: !!python/object/apply:os.getpid []\n", "is not YAML"),
    "billion laughs": (BOMB + SOUND + "description: *a11\n", "values"),
    "brackets a thousand deep": ("name: " + "[" * 3000 + "]" * 3000, "is not YAML"),
    "mapping a hundred deep": (SOUND + "evaluate: " + "{a: " * 100 + "1" + "}" * 100, "deep"),
    "month 13": (SOUND + "description: 2020-13-45\n", "is not YAML"),
    "set where anything goes": (SOUND + "evaluate: {judge_settings: {a: !!set {b, c}}}\n", "judge_settings.a"),
    "NaN where anything goes": (SOUND + "evaluate: {judge_settings: {threshold: .nan}}\n", "threshold is nan"),
    "number for a key deep down": (SOUND + "evaluate: {judge_settings: {a: {1: 2}}}\n", "judge_settings.a"),
    "huge integer": (SOUND + f"seed: {'9' * 5000}\n", "mine.yaml"),
    "integer too long for a float": (SOUND + f"negate: {{alpha: {'9' * 400}}}\n", "negate.alpha"),
    "lone surrogate": (SOUND + 'description: "\\ud800"\n', "no Unicode text"),
    "NUL byte": (SOUND.encode() + b"seed: 1\0\n", "is not YAML"),
    "UTF-16": (SOUND.encode("utf-16"), "can't be read"),
    "a key of a million characters": (SOUND + f"? {'x' * 1_000_000}\n: 1\n", "is not a known key"),
}

SETTINGS: dict[str, tuple[str, str]] = {
    "name that leads out": ("name=../../elsewhere", "name is"),
    "name with a line break": ('name="a\\nb"', "name is"),
    "seed below 0": ("seed=-1", "seed"),
    "all unseen": ("data.unseen_fraction=1", "unseen_fraction"),
    "answers longer than all": ("data.max_answer_tokens=128", "max_answer_tokens"),
    "adapter of rank 0": ("acquire.lora.r=0", "lora.r"),
    "batch of 0": ("acquire.training.per_device_train_batch_size=0", "per_device_train_batch_size"),
    "learning rate nan as text": ('acquire.training.learning_rate="nan"', "learning_rate"),
    "unknown optimizer": ("acquire.training.optim=adamax9", "adamax9"),
    "training key with a place of its own": ("acquire.training.output_dir=/tmp/elsewhere", "output_dir"),
    "alpha of text": ("negate.alpha=much", "negate.alpha"),
    "budget below 1": ("sweep.utility_budget=0.9", "utility_budget"),
    "unknown attack": ("evaluate.attacks=[templat]", "Did you mean template?"),
    "unknown judge": ("evaluate.judge=embeded", "Did you mean embedded?"),
    "unknown method": ("method=skuu", "skuu"),
    "settings of an unknown method": ("methods.rmuu.strength=1", "Did you mean rmu?"),
    "unknown device": ("model.device=cuda:x", "model.device"),
    "GGUF file that is not there": ("model.gguf_file=../../a.gguf", "a.gguf"),
    "a bomb behind --set": (f"negate.operators={'[' * 300}{']' * 300}", "--set"),
}  # fmt: skip


def recipe(battery: Battery, text: str | bytes) -> Path:
    path = battery.inputs / "mine.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(("text", "words"), TEXTS.values(), ids=TEXTS.keys())
def test_text_that_is_no_recipe(battery: Battery, text: str | bytes, words: str) -> None:
    battery.refuses(NAME, "run", recipe(battery, text), "--out", battery.out, words=words)


@pytest.mark.parametrize(("setting", "words"), SETTINGS.values(), ids=SETTINGS.keys())
def test_setting_that_makes_no_sense(battery: Battery, setting: str, words: str) -> None:
    # The model can't be loaded: a setting that is looked at too late would be told of that.
    late = ("model", "evaluate.judge")
    model = () if setting.startswith(late) else ("--model", UNLOADABLE)
    battery.refuses(NAME, "run", *model, "--set", setting, "--out", battery.out, words=words)


PLACES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "folder": ("mine.yaml", Path.mkdir),
    "pipe": ("mine.yaml", os.mkfifo),
    "link to itself": ("mine.yaml", lambda path: path.symlink_to(path)),
    "missing": ("mine.yaml", lambda path: None),
    "control characters in the name": ("mi\x1b[31m\nne.yaml", lambda path: path.write_text("a")),
    "long name": ("x" * 400 + ".yaml", lambda path: None),
}


@pytest.mark.parametrize(("file", "make"), PLACES.values(), ids=PLACES.keys())
def test_place_that_holds_no_recipe(battery: Battery, file: str, make: Callable[[Path], object]) -> None:
    path = battery.inputs / file
    make(path)
    battery.refuses(NAME, "run", path, "--out", battery.out)
