"""Recipes that are no YAML, ask for the impossible, or want to write elsewhere: refused before a model is loaded."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from faults.battery import UNLOADABLE, Battery
from sku.config import load_recipe, recipe_names

pytestmark = pytest.mark.integration

NAME = "recipes"
SOUND = "name: mine\nmodel: {path: embedded}\ndata: {forget: {path: embedded}, retain: {path: embedded}}\n"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)

TEXTS: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "keys and values"),
    "only comments": ("# nothing\n", "keys and values"),
    "list": ("- name: a\n", "keys and values"),
    "number": ("7", "keys and values"),
    "tabs": ("name: a\nmodel:\n\tpath: embedded\n", "is not YAML"),
    "unclosed list": (SOUND + "negate: {operators: [\n", "is not YAML"),
    "unclosed quote": (SOUND + 'description: "a\n', "is not YAML"),
    "two documents": (SOUND + "---\n" + SOUND, "is not YAML"),
    "alias of nothing": (SOUND + "seed: *one\n", "is not YAML"),
    "key twice": (SOUND + "seed: 1\nseed: 2\n", 'found duplicate key "seed"'),
    "section twice": (SOUND + "model: {path: other}\n", 'found duplicate key "model"'),
    "key twice inside": (SOUND.replace("path: embedded}", "path: a, path: b}", 1), 'found duplicate key "path"'),
    "key twice, quoted once": (SOUND + "seed: 1\n'seed': 2\n", 'found duplicate key "seed"'),
    "Python object": (SOUND + "seed: !!python/object/apply:os.getpid []\n", "is not YAML"),
    "Python name": (SOUND + "seed: !!python/name:os.getpid\n", "is not YAML"),
    "Python module": (SOUND + "seed: !!python/module:antigravity\n", "is not YAML"),
    "own tag": (SOUND + "seed: !mine 3\n", "is not YAML"),
    "billion laughs": (BOMB + SOUND + "description: *a11\n", "values"),
    "billion laughs as keys of a mapping": (
        BOMB.replace("[x, x, x, x, x, x, x, x, x, x]", "{x: x}") + SOUND + "evaluate: *a11\n",
        "values",
    ),
    "billion laughs by merging": (
        "a0: &a0 {x: x}\n"
        + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 12))
        + SOUND,
        "is not YAML",
    ),
    "holds itself": (SOUND + "evaluate: &e {judge_settings: *e}\n", "holds itself"),
    "list that holds itself": (SOUND + "sweep: {alphas: &o [*o]}\n", "holds itself"),
    "merge of itself": (SOUND + "evaluate: &e {<<: *e}\n", "mine.yaml"),
    "brackets a thousand deep": ("name: " + "[" * 3000 + "]" * 3000, "is not YAML"),
    "mapping a hundred deep": (SOUND + "evaluate: " + "{a: " * 100 + "1" + "}" * 100, "deep"),
    "month 13": (SOUND + "description: 2020-13-45\n", "is not YAML"),
    "date for text": (SOUND + "description: 2020-01-01\n", "description"),
    "date where anything goes": (SOUND + "evaluate: {judge_settings: {since: 2020-01-01}}\n", "since"),
    "set where anything goes": (SOUND + "evaluate: {judge_settings: {a: !!set {b, c}}}\n", "judge_settings.a"),
    "bytes where anything goes": (SOUND + "evaluate: {judge_settings: {a: !!binary aGk=}}\n", "judge_settings.a"),
    "NaN where anything goes": (SOUND + "evaluate: {judge_settings: {threshold: .nan}}\n", "threshold is nan"),
    "infinity for training": (SOUND + "acquire: {training: {learning_rate: .inf}}\n", "learning_rate"),
    "number for a key": (SOUND + "1: 2\n", "the key 1, which is no text"),
    "number for a key where anything goes": (SOUND + "evaluate: {judge_settings: {1: 2}}\n", "judge_settings"),
    "number for a key deep down": (SOUND + "evaluate: {judge_settings: {a: {1: 2}}}\n", "judge_settings.a"),
    "list for a key": (SOUND + "? [a, b]\n: c\n", "which is no text"),
    "null for a key": (SOUND + "~: 1\n", "the key None, which is no text"),
    "huge integer": (SOUND + f"seed: {'9' * 5000}\n", "mine.yaml"),
    "integer too long for a float": (SOUND + f"negate: {{alpha: {'9' * 400}}}\n", "negate.alpha"),
    "integer tag on text": (SOUND + "seed: !!int one\n", "is not YAML"),
    "float tag on text": (SOUND + "seed: !!float one\n", "is not YAML"),
    "truth tag on text": (SOUND + "seed: !!bool maybe\n", "is not YAML"),
    "time tag on text": (SOUND + "seed: !!timestamp now\n", "is not YAML"),
    "lone surrogate": (SOUND + 'description: "\\ud800"\n', "no Unicode text"),
    "lone surrogate in a path": (SOUND.replace("{path: embedded}", '{path: "\\udcff"}', 1), "no Unicode text"),
    "NUL byte": (SOUND.encode() + b"seed: 1\0\n", "is not YAML"),
    "control characters": (SOUND + "description: \x1b[2J\n", "is not YAML"),
    "UTF-16": (SOUND.encode("utf-16"), "can't be read"),
    "Latin-1": (SOUND.encode() + "description: là\n".encode("latin-1"), "can't be read"),
    "noise": (bytes(range(256)) * 40, "can't be read"),
    "JSON cut off": (json.dumps(yaml.safe_load(SOUND))[:-3], "is not YAML"),
    "a million characters": (SOUND + f"description: {'x' * 1_000_000}\nsede: 1\n", "sede is not a known key"),
    "a name of a million characters": (SOUND.replace("mine", "x" * 1_000_000), "name is"),
    "a key of a million characters": (SOUND + f"? {'x' * 1_000_000}\n: 1\n", "is not a known key"),
    "a hundred thousand keys": (SOUND + "".join(f"k{n}: 1\n" for n in range(20_000)), "values"),
}

SETTINGS: dict[str, tuple[str, str]] = {
    "name that leads out": ("name=../../elsewhere", "name is"),
    "absolute name": ("name=/tmp/elsewhere", "name is"),
    "name with a backslash": ('name="..\\\\\\\\elsewhere"', "name is"),
    "name of two dots": ("name=..", "name is"),
    "empty name": ('name=""', "name is"),
    "blank name": ('name="  "', "name is"),
    "name with a line break": ('name="a\\nb"', "name is"),
    "name with a NUL": ('name="a\\0b"', "name is"),
    "name too long for a folder": (f"name={'x' * 300}", "name is"),
    "no key before the sign": ("=1", "key.sub=value"),
    "dots alone": ("...=1", "is not a known key"),
    "a key below a value": ("seed.a=1", "it has no keys below it"),
    "a key of nothing": ("acquire..weights=1", "known key"),
    "no value": ("model=", "model"),
    "seed below 0": ("seed=-1", "seed"),
    "huge seed": ("seed=18446744073709551616", "seed"),
    "training seed below 0": ("acquire.seed=-5", "seed"),
    "nothing unseen": ("data.unseen_fraction=0", "unseen_fraction"),
    "all unseen": ("data.unseen_fraction=1", "unseen_fraction"),
    "answers longer than all": ("data.max_answer_tokens=128", "max_answer_tokens"),
    "limit 0": ("data.forget.limit=0", "limit"),
    "half a filter": ("data.forget.unsafe_column=a", "go together"),
    "format of another world": ("data.forget.format=parquet", "data.forget.format"),
    "no module at all": (
        "acquire.weights={guided_distortion: 0, random_disassociation: 0, preservation_divergence: 0}", "all 0"
    ),
    "no random answers": ("acquire.random_answers=0", "random_answers"),
    "cap below 0": ("acquire.preservation_cap=-1", "preservation_cap"),
    "cap 0": ("acquire.preservation_cap=0", "preservation_cap"),
    "adapter of rank 0": ("acquire.lora.r=0", "lora.r"),
    "adapter of rank -1": ("acquire.lora.r=-1", "lora.r"),
    "adapter without strength": ("acquire.lora.alpha=0", "lora.alpha"),
    "batch of 0": ("acquire.training.per_device_train_batch_size=0", "per_device_train_batch_size"),
    "batch below 0": ("acquire.training.per_device_train_batch_size=-4", "per_device_train_batch_size"),
    "batch that is no number": ("acquire.training.per_device_train_batch_size=four", "per_device_train_batch_size"),
    "half a batch": ("acquire.training.per_device_train_batch_size=1.5", "per_device_train_batch_size"),
    "learning rate below 0": ("acquire.training.learning_rate=-1", "learning_rate"),
    "learning rate of text": ("acquire.training.learning_rate=fast", "learning_rate"),
    "learning rate nan as text": ('acquire.training.learning_rate="nan"', "learning_rate"),
    "half a step": ("acquire.training.max_steps=1.5", "max_steps"),
    "no steps": ("acquire.training.max_steps=0", "max_steps"),
    "steps of text": ("acquire.training.max_steps=many", "max_steps"),
    "saving every 0 steps": ("acquire.training.save_steps=0", "save_steps"),
    "gradients added up 0 times": ("acquire.training.gradient_accumulation_steps=0", "gradient_accumulation_steps"),
    "clipping below 0": ("acquire.training.max_grad_norm=-1", "max_grad_norm"),
    "unknown optimizer": ("acquire.training.optim=adamax9", "adamax9"),
    "unknown schedule": ("acquire.training.lr_scheduler_type=cosin", "cosin is not"),
    "training key with a place of its own": ("acquire.training.output_dir=/tmp/elsewhere", "output_dir"),
    "unknown packing": ("acquire.training.packing=flatt", "packing"),
    "training that is a list": ("acquire.training=[1]", "acquire.training"),
    "alpha of text": ("negate.alpha=much", "negate.alpha"),
    "alpha 0 among them": ("sweep.alphas=[0, 1]", "sweep.alphas"),
    "no points": ("sweep.points=0", "sweep.points"),
    "KL budget 0": ("sweep.kl_budget=0", "sweep.kl_budget"),
    "budget below 1": ("sweep.utility_budget=0.9", "utility_budget"),
    "hopeless before the budget": ("sweep.hopeless_ratio=1", "hopeless_ratio"),
    "batch of no replies": ("evaluate.batch_size=0", "batch_size"),
    "unknown attack": ("evaluate.attacks=[templat]", "Did you mean template?"),
    "unknown backend": ("evaluate.backend=vlm", "Did you mean vllm?"),
    "unknown judge": ("evaluate.judge=embeded", "Did you mean embedded?"),
    "judge file that is not there": ("evaluate.judge=none.yaml", "none.yaml"),
    "labels that are not there": ("evaluate.judge=none.csv", "none.csv"),
    "judge settings of a judge without any": ("evaluate.judge_settings={a: 1}", "judge"),
    "relearning from nothing": ("evaluate.relearn_pairs=[0]", "relearn_pairs"),
    "relearning in no steps": ("evaluate.relearn_steps=[]", "relearn_steps"),
    "relearning at no rate": ("evaluate.relearn_learning_rates=[0]", "relearn_learning_rates"),
    "templates that are not there": ("evaluate={attacks: [template], attack_templates: none.txt}", "none.txt"),
    "lm-eval limit 0": ("evaluate.lm_eval_limit=0", "lm_eval_limit"),
    "unknown method": ("method=skuu", "skuu"),
    "method file that is not there": ("method=../none.py", "none.py"),
    "method that leads out": ("method=../../sku", "method"),
    "settings of an unknown method": ("methods.rmuu.strength=1", "Did you mean rmu?"),
    "settings of SKU as a method": ("methods.sku.strength=1", "its own place"),
    "strength 0": ("methods.rmu.strength=0", "strength"),
    "no seeds to compare": ("compare.seeds=0", "compare.seeds"),
    "unknown device": ("model.device=cuda:x", "model.device"),
    "unknown dtype": ("model.dtype=float8", "model.dtype"),
    "GGUF file that is not there": ("model.gguf_file=../../a.gguf", "a.gguf"),
    "a model path of NUL": ('model.path="a\\0b"', "model"),
    "a model path of a line break": ('model.path="./a\\nb"', "model"),
    "an empty model path": ('model.path=""', "model"),
    "a bomb behind --set": (f"sweep.alphas={'[' * 300}{']' * 300}", "--set"),
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


@pytest.mark.parametrize("command", ["run", "compare", "sweep", "plan"])
@pytest.mark.parametrize("name", ["../../elsewhere", "/tmp/elsewhere", "a/../../b"])
def test_no_command_makes_a_folder_elsewhere(battery: Battery, command: str, name: str) -> None:
    battery.refuses(NAME, command, recipe(battery, SOUND.replace("mine", name)), words=("name is", name))


PLACES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "folder": ("mine.yaml", Path.mkdir),
    "pipe": ("mine.yaml", os.mkfifo),
    "link to itself": ("mine.yaml", lambda path: path.symlink_to(path)),
    "link to an endless device": ("mine.yaml", lambda path: path.symlink_to("/dev/zero")),
    "link to nothing": ("mine.yaml", lambda path: path.symlink_to("nowhere.yaml")),
    "missing": ("mine.yaml", lambda path: None),
    "missing folder": ("none/mine.yaml", lambda path: None),
    "no recipe's suffix": ("mine.txt", lambda path: path.write_text("a")),
    "control characters in the name": ("mi\x1b[31m\nne.yaml", lambda path: path.write_text("a")),
    "bytes in the name": (os.fsdecode(b"mi\xff.yaml"), lambda path: path.write_text("a")),
    "long name": ("x" * 400 + ".yaml", lambda path: None),
    "device": ("../../../../../../../../dev/zero", lambda path: None),
}


@pytest.mark.parametrize(("file", "make"), PLACES.values(), ids=PLACES.keys())
def test_place_that_holds_no_recipe(battery: Battery, file: str, make: Callable[[Path], object]) -> None:
    path = battery.inputs / file
    make(path)
    battery.refuses(NAME, "run", path, "--out", battery.out)


SOUND_RECIPES: dict[str, dict[str, Any]] = {
    # With a model that can't be loaded: what is looked at too late would be told of that. What is missing of the data,
    # and a judge that nobody has made, is told before.
    name: load_recipe(
        name,
        [
            f"model.path={UNLOADABLE}",
            "data.forget={path: embedded}",
            "data.retain={path: embedded}",
            "evaluate.judge=auto",
        ],
    ).to_dict()
    for name in recipe_names()
}
SECTIONS = (
    "model", "data", "data.forget", "data.retain", "acquire", "acquire.weights", "acquire.lora", "negate", "sweep",
    "evaluate", "compare",
)  # fmt: skip
BELOW_1 = (
    "data.forget.limit", "data.max_answer_tokens", "acquire.random_answers", "acquire.lora.r", "acquire.lora.alpha",
    "acquire.training.per_device_train_batch_size", "sweep.prompts", "sweep.retain_prompts", "sweep.max_new_tokens",
    "sweep.points",
    "evaluate.prompts", "evaluate.retain_prompts", "evaluate.max_new_tokens", "evaluate.batch_size",
    "evaluate.attack_prompts", "evaluate.lm_eval_limit", "compare.seeds",
)  # fmt: skip
"""Keys of whole numbers that must be 1 or more."""
BELOW_0 = (
    "seed", "acquire.seed", "acquire.weights.guided_distortion", "acquire.weights.random_disassociation",
    "acquire.weights.preservation_divergence", "acquire.preservation_cap",
    "acquire.training.learning_rate", "acquire.training.weight_decay", "data.unseen_fraction",
    "sweep.kl_budget",
    "sweep.harm_target", "sweep.gibberish_limit", "sweep.over_refusal_limit",
    "sweep.utility_budget", "sweep.hopeless_ratio", "evaluate.samples",
)  # fmt: skip
"""Keys of numbers that must not be negative."""


def holder(content: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """The mapping that holds a dotted key, and the key's last part."""
    *parents, last = key.split(".")
    for parent in parents:
        content = content[parent]
    return content, last


def leaves(content: dict[str, Any], key: str = "") -> list[str]:
    """Dotted keys of all values that a dataclass describes, each of which has one type."""
    found = []
    for name, value in content.items():
        path = f"{key}.{name}" if key else name
        if path in ("acquire.training", "evaluate.judge_settings", "methods"):
            continue
        found += leaves(value, path) if isinstance(value, dict) else [path]
    return found


def wrong_values(value: Any) -> st.SearchStrategy[Any]:
    """Values of a type that can't stand where ``value`` stands."""
    times = st.dates()
    mappings = st.dictionaries(st.text(min_size=1, max_size=5), st.integers(), min_size=1, max_size=2)
    if isinstance(value, bool):
        return st.integers(2, 9) | st.text(max_size=9) | st.none() | st.lists(st.booleans()) | mappings
    if isinstance(value, int | float):
        return st.text("xyz!", max_size=9) | st.lists(st.integers(), max_size=2) | mappings | times | st.booleans()
    if isinstance(value, list):
        return st.integers() | st.text(max_size=9) | st.booleans() | mappings | times
    return st.integers() | st.floats() | mappings | times | st.booleans()


@st.composite
def bad_recipes(draw: st.DrawFn) -> tuple[str, str]:
    """A recipe of the package with one fault, and the words that its message must hold."""
    content = copy.deepcopy(draw(st.sampled_from(list(SOUND_RECIPES.values()))))
    kind = draw(st.sampled_from(["unknown", "type", "below 1", "below 0", "missing", "text"]))
    if kind == "unknown":
        section = draw(st.sampled_from(["", *SECTIONS]))
        keys = holder(content, f"{section}.x" if section else "x")[0]
        long_enough = sorted(name for name in keys if len(name) > 4)
        name = draw(st.sampled_from(long_enough or ["path"]))
        place = draw(st.integers(1, len(name) - 1))
        misspelt = draw(st.sampled_from([name[:place] + name[place + 1 :], name[:place] + "z" + name[place:]]))
        if misspelt in keys:
            misspelt += "zz"
        keys[misspelt] = keys.get(name)
        return yaml.safe_dump(content), f"{misspelt} is not a known key. Did you mean "
    if kind == "type":
        key = draw(st.sampled_from(leaves(content)))
        keys, last = holder(content, key)
        keys[last] = draw(wrong_values(keys[last]))
        return yaml.safe_dump(content), last
    if kind in ("below 1", "below 0"):
        key = draw(st.sampled_from(BELOW_1 if kind == "below 1" else BELOW_0))
        keys, last = holder(content, key)
        numbers: st.SearchStrategy[Any] = st.integers(-(2**70), 0) if kind == "below 1" else st.integers(-(2**70), -1)
        if kind == "below 0" and last not in ("seed", "samples"):
            numbers = st.sampled_from([float("nan"), float("inf"), -float("inf"), -1e-9]) | st.floats(
                max_value=-1e-300
            )
        keys[last] = draw(numbers)
        return yaml.safe_dump(content), last
    if kind == "missing":
        key = draw(
            st.sampled_from(["name", "model", "data", "model.path", "data.forget", "data.retain", "data.forget.path"])
        )
        keys, last = holder(content, key)
        del keys[last]
        return yaml.safe_dump(content), f"{key} is missing"
    junk = [
        "a: [", "\ta: b", "a: b: c", "'a", "{", "]", "- a", "name: again", "? [a]\n: b", "%YAML 9",
        "a: !!python/name:os", "a: *nothing", "seed: 2020-99-99", "@", "`a`", "a: >x", "&a &b c: d", "\x00", "model",
        "...\na: b",
    ]  # fmt: skip
    lines = yaml.safe_dump(content).splitlines()
    # Only before a key of the outermost level: inside folded text a line might be text.
    places = [number for number, line in enumerate(lines) if line[:1].isalpha()]
    lines.insert(draw(st.sampled_from(places)), draw(st.sampled_from(junk)))
    return "\n".join(lines), "mine.yaml"


@settings(
    max_examples=100, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(bad=bad_recipes())
def test_bad_recipes_of_hypothesis(battery: Battery, bad: tuple[str, str]) -> None:
    text, words = bad
    battery.refuses(NAME, "run", recipe(battery, text), "--out", battery.out, words=words)
