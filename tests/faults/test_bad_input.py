"""Recipes, data, weights and folders that are broken, lie about themselves, or lead out of their folder.

Each reader has its own table of faults beside it; here one of each kind goes through the command line.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import signal
import stat
import tempfile
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from conftest import Command, Done, ModelMaker, TokenizerMaker
from sku.negate.task_vector import TaskVector

pytestmark = pytest.mark.integration

LONG = 1_000_000
SECONDS = 60
"""No wrong input may keep a command busy, or waiting, for longer."""
Change = Callable[[Path], object]
"""Puts something wrong at a path, which need not exist, or into the file or folder that is there."""


def text(content: str | bytes) -> Change:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def file_in(name: str, content: str | bytes) -> Change:
    return lambda folder: text(content)(folder / name)


def nothing(_path: Path) -> None:
    pass


class Battery:
    """One folder for the inputs (``inputs``), one to stand in, and one for temporary files; all are watched."""

    def __init__(self, folder: Path, command: Command) -> None:
        self._folder, self._command = folder, command
        self.inputs, self.here = folder / "inputs", folder / "here"
        for name in ("here", "temporary", "place"):
            (folder / name).mkdir()

    def run(self, *words: str) -> Done:
        """``sku WORDS`` in this process, not for too long; ``@NAME`` is an input, ``OUT`` a place for results."""
        places = {word: str(self.inputs / word[1:]) for word in words if word[:1] == "@"}
        places["OUT"] = str(self._folder / "place" / "out")
        old = signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(SECONDS)
        try:
            return self._command(*(places.get(word, word) for word in words))
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, old)

    def refuses(self, *words: str, said: str = "") -> None:
        """Exit code 2, one line with what is ``said``, nothing written or changed."""
        before = _content(self._folder)
        done = self.run(*words)
        assert done.code == 2, (done.code, done.out, done.err)
        assert done.out == ""
        assert "Traceback" not in done.err
        lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, done.err
        # Besides: the headline of a run and its progress bars.
        others = [line for line in done.err.splitlines() if line.strip() and line not in lines]
        assert [line for line in others if not line.startswith("recipe ") and " left " not in line] == [], done.err
        assert obeyed(lines[0]) == []
        assert len(lines[0]) < LONGEST, len(lines[0])
        assert said in lines[0], (said, lines[0])
        after = _content(self._folder)
        assert after == before, {path for path in after.keys() | before.keys() if after.get(path) != before.get(path)}


LONGEST = 1000
"""Characters of an error line: what a user can read, whatever was in the file."""


class TookTooLongError(BaseException):
    """No ``Exception``: no reader may take it for a fault of the file."""


def _too_long(_signal: int, _frame: object) -> None:
    raise TookTooLongError(f"the command took more than {SECONDS} s")


def obeyed(text: str) -> list[str]:
    """Characters that a terminal may obey, or that are no text."""
    return [one for one in text if unicodedata.category(one) in ("Cc", "Cf", "Cs", "Zl", "Zp")]


def _content(folder: Path) -> dict[str, tuple[int, str]]:
    """Path -> mode and SHA-256 of everything below a folder; a pipe is not opened, a link not followed."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            status = path.lstat()
            text = b""
            if stat.S_ISREG(status.st_mode):
                text = path.read_bytes()
            elif stat.S_ISLNK(status.st_mode):
                text = os.fsencode(path.readlink())
            found[str(path)] = status.st_mode, hashlib.sha256(text).hexdigest()
    return found


@pytest.fixture(scope="session")
def sound(make_model: ModelMaker, make_tokenizer: TokenizerMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, a bad one, an adapter and a task vector, each in its folder; and a broken model; rows."""
    folder = tmp_path_factory.mktemp("sound")
    base, bad = make_model("llama"), make_model("llama")
    with torch.no_grad():
        for weight in bad.parameters():
            weight.mul_(1.001)
    TaskVector.between(base, bad).save(folder / "vector")
    for name, model in (("base", base), ("bad", bad)):
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(make_model("llama"), settings).save_pretrained(str(folder / "adapter"))
    (folder / "unloadable").mkdir()
    (folder / "unloadable" / "config.json").write_text("{}", encoding="utf-8")
    (folder / "unloadable" / "model.safetensors").write_bytes(b"")
    (folder / "retain.jsonl").write_text(jsonl("b"), encoding="utf-8")
    return folder


@pytest.fixture
def battery(tmp_path: Path, sound: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> Battery:
    """Commands that stand in a folder of their own, with copies of sound inputs."""
    made = Battery(tmp_path, command)
    shutil.copytree(sound, made.inputs)
    monkeypatch.chdir(made.here)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return made


# Recipes

SOUND = "name: mine\nmodel: {path: embedded}\ndata: {forget: {path: embedded}, retain: {path: embedded}}\n"
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
RECIPES: dict[str, tuple[str, Change, str]] = {
    "key twice": ("mine.yaml", text(SOUND + "seed: 1\nseed: 2\n"), "seed"),
    "Python object": ("mine.yaml", text(SOUND + "seed: !!python/object/apply:os.getpid []\n"), "mine.yaml"),
    "billion laughs": ("mine.yaml", text(BOMB + SOUND + "description: *a11\n"), "mine.yaml"),
    "brackets a thousand deep": ("mine.yaml", text("name: " + "[" * 3000 + "]" * 3000), "mine.yaml"),
    "a key of a million characters": ("mine.yaml", text(SOUND + f"? {'x' * LONG}\n: 1\n"), "xxx"),
    "pipe": ("mine.yaml", os.mkfifo, "mine.yaml"),
    "control characters in the name": ("mi\x1b[31m\nne.yaml", text("a"), ".yaml"),
}
SETTINGS = {
    "name": "name=../../elsewhere", "output_dir": "acquire.training.output_dir=/tmp/elsewhere",
    "learning_rate": 'acquire.training.learning_rate="nan"', "skuu": "method=skuu",
    "a.gguf": "model.gguf_file=../../a.gguf", "depth exceeded": f"negate.operators={'[' * 300}{']' * 300}",
}  # fmt: skip
"""Key or value that the message names -> what makes no sense."""


@pytest.mark.parametrize(("key", "setting"), SETTINGS.items(), ids=SETTINGS.keys())
def test_settings(battery: Battery, key: str, setting: str) -> None:
    # The model can't be loaded: a setting that is looked at too late would be told of that.
    model = () if setting.startswith("model") else ("--model", "@unloadable")
    battery.refuses("run", *model, "--set", setting, "--out", "OUT", said=key)


# Data


def jsonl(prefix: str, count: int = 12) -> str:
    rows = ({"prompt": f"{prefix} number {index} ?", "completion": f"answer {index}"} for index in range(count))
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def in_folder(name: str, make: Change) -> Change:
    def change(folder: Path) -> None:
        folder.mkdir()
        make(folder / name)

    return change


def slipping_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as packed:
        for name in ("../../slipped.jsonl", "/tmp/slipped.jsonl", "a/../../../../slipped.jsonl"):
            packed.writestr(name, '{"prompt": "a", "completion": ""}\n')


FORGET: dict[str, tuple[str, Change]] = {
    "cut off in a line": ("forget.jsonl", text(jsonl("a")[:-9])),
    "lone surrogates": ("forget.jsonl", text('{"prompt": "a", "completion": "\\ud800"}\n')),
    "gzip bomb": ("forget.jsonl.gz", text(gzip.compress(b" " * 20_000_000))),
    "one row": ("forget.jsonl", text(jsonl("a", 1))),
    "pipe": ("forget.jsonl", os.mkfifo),
    "bytes that are no text in the name": (os.fsdecode(b"forget\xff.jsonl"), text("{")),
    "names that lead out of a zip": ("forget", in_folder("data.zip", slipping_zip)),
    "a pickle": ("forget", in_folder("forget.pkl", text("cos\nsystem\n(S'exit 3'\ntR."))),
}


def test_long_and_odd_text_is_taken_as_it_is(battery: Battery) -> None:
    """No fault: cells of a million characters, and characters that a terminal would obey, are shown harmlessly."""
    odd = [
        {"prompt": "p " * (LONG // 20), "completion": "short"},
        {"prompt": "\x1b[31mred\x1b]0;title\x07 ?", "completion": "\u202eback \x9b0m \0 \u2028end"},
    ]
    (battery.inputs / "forget.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in odd) + jsonl("a"))
    done = battery.run(
        *("data", "inspect", "--forget", "@forget.jsonl", "--retain", "@retain.jsonl", "--show-harmful"),
        *("--set", "data.unseen_fraction=0.1"),
    )
    assert (done.code, done.err) == (0, "")
    assert "\\x1b[31mred" in done.out
    assert obeyed(done.out.replace("\n", "")) == []


# Weights

FILES = {"base": "model", "bad": "model", "adapter": "adapter_model", "vector": "task_vector"}
"""Folder -> stem of its weight file."""


def retensored(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """Changes the tensors of a safetensors file."""

    def make(path: Path) -> None:
        tensors = load_file(path)
        change(tensors)
        header = path.read_bytes()
        metadata = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")]).get("__metadata__")
        save_file(tensors, path, metadata)

    return make


def pickled(path: Path) -> None:
    torch.save(load_file(path), path.with_name("pytorch_model.bin" if path.stem == "model" else f"{path.stem}.bin"))
    path.unlink()


WEIGHTS: dict[str, Change] = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a header of text": lambda path: path.write_bytes((12).to_bytes(8, "little") + b"weights here"),
    "a tensor missing": retensored(lambda tensors: tensors.pop(next(iter(tensors)))),
    "NaN": retensored(lambda tensors: next(iter(tensors.values())).view(-1)[:3].fill_(float("nan"))),
    "8-bit floats": retensored(
        lambda tensors: tensors.update({name: own.to(torch.float8_e4m3fn) for name, own in tensors.items()})
    ),
    "pickled": pickled,
    "a header of 2**64 - 1 bytes": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
}
WEIGHT_CASES = [
    *(("bad", name) for name in WEIGHTS),
    *((form, name) for form in ("base", "adapter", "vector") for name in ("cut off", "NaN", "pickled")),
]


def sharded(name: str, file: str) -> Change:
    """Renames the weights to a shard, whose index places a tensor of a name in a file."""

    def make(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
        index = {"metadata": {}, "weight_map": {name: file}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return make


def json_file(name: str, **entries: Any) -> Change:
    def make(folder: Path) -> None:
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | entries))

    return make


MODELS: dict[str, Change] = {
    "a shard above": sharded("model.norm.weight", "../bad/model.safetensors"),
    "config is a list": file_in("config.json", "[]"),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "unknown type": json_file("config.json", model_type="nonesuch", architectures=[]),
    "another vocabulary": json_file("config.json", vocab_size=7),
    "quantized": json_file("config.json", quantization_config="awq"),
    "no tokenizer": lambda folder: list(map(Path.unlink, folder.glob("*token*"))),
    "a template that fails": file_in("chat_template.jinja", "{{ raise_exception('no') }}"),
}


OF_NEGATE: dict[str, tuple[str, Change]] = {
    **{f"{name}, {form}": (form, MODELS[name]) for name in list(MODELS)[:2] for form in ("base", "bad")},
    "another kind": ("adapter", json_file("adapter_config.json", peft_type="PROMPT_TUNING")),
    "a pattern that is none": ("adapter", json_file("adapter_config.json", target_modules="(")),
}

# Folders of runs, and what else is named

COMPLETE = {"schema_version": 6, "status": "complete", "recipe": {}, "recipe_sha256": "", "seconds": {}}


def run_folder(manifest: str | bytes, results: str = "{}") -> Change:
    def make(path: Path) -> None:
        path.mkdir()
        text(manifest)(path / "manifest.json")
        text(results)(path / "results.json")

    return make


RUNS: dict[str, Change] = {
    "results that lead out": run_folder(
        json.dumps({**COMPLETE, "recipe": {"name": "../../elsewhere"}}), '{"base": {"name": "../../elsewhere"}}'
    ),
    "a pipe": os.mkfifo,
    "manifest of noise": run_folder(bytes(range(128, 256))),
    "manifest of another version": run_folder('{"schema_version": 99, "status": "complete"}'),
    "manifest of wrong types": run_folder(json.dumps({**COMPLETE, "recipe": [], "seconds": 7, "status": ["a"]})),
    "results cut off": run_folder(json.dumps(COMPLETE), '{"schema_version"'),
    "folders for files": lambda path: (path / "manifest.json").mkdir(parents=True),
}
ON_RUNS = (
    "report @run --out OUT", "run --out @run --resume", "report @run", "push @run me/model --dry-run", "results @run",
    "judge export @run --out OUT", "judge again @run --judge refusal_rules",
    "sweep @run --recipe embedded --out OUT",
)  # fmt: skip
JUDGED = "run --judge @judge.yaml --out OUT"
OUTS: dict[str, Change] = {
    "out": text("mine"),
    "out/below": lambda path: path.parent.write_text("mine"),
    "link": lambda path: path.symlink_to(path.with_name("elsewhere")),
}


def negate(form: str) -> str:
    return f"negate @base @{'bad' if form == 'base' else form} --out OUT"


CASES: dict[str, tuple[str | tuple[str, ...], str, Change, str]] = {
    **{name: (("run", f"@{file}", "--out", "OUT"), file, make, said) for name, (file, make, said) in RECIPES.items()},
    **{f"forget {name}": (f"run --forget @{file} --retain @retain.jsonl --out OUT", file, make,
                          "forget" if file.isprintable() else "surrogates")
       for name, (file, make) in FORGET.items()},
    **{f"{form} {name}": (negate(form), f"{form}/{FILES[form]}.safetensors", WEIGHTS[name], "")
       for form, name in WEIGHT_CASES},
    "run on weights": ("run --model @base --out OUT", "base/model.safetensors", WEIGHTS["a tensor missing"], "base"),
    "evaluate weights": ("evaluate @base --out OUT", "base/model.safetensors", WEIGHTS["cut off"], "base"),
    **{f"run on {name}": ("run --model @base --out OUT", "base", make, "") for name, make in MODELS.items()},
    **{f"negate {name}": (negate(form), form, make, "") for name, (form, make) in OF_NEGATE.items()},
    **{f"{words}, {name}": (words, "run", RUNS[name], "") for words in ON_RUNS for name in list(RUNS)[:1]},
    **{f"{words}, {name}": (words, "run", RUNS[name], "") for words in ON_RUNS[:2] for name in list(RUNS)[1:]},
    "comparison": (
        "results @", "comparison.json", text('{"schema_version": 6, "rows": [], "seeds": ["../0"], "failed": {}}'),
        "comparison.json",
    ),
    "labels of noise": ("run --judge @labels.csv --out OUT", "labels.csv", text(bytes(range(256)) * 10), "labels.csv"),
    "judge that holds itself": (JUDGED, "judge.yaml", text("kind: &k [*k]\n"), ""),
    "judge, unknown key": (JUDGED, "judge.yaml", text("kind: classifier\nmodel: a\nmodels: b\n"), ""),
    # The model can't be loaded either: the folder is looked at first.
    **{f"into {name}": (f"run --model @unloadable --out @{name}", name, make, "") for name, make in OUTS.items()},
    "negate into out": ("negate embedded embedded --out @out", "out", OUTS["out"], ""),
    "acquire into a link": ("acquire --model @unloadable --out @link", "link", OUTS["link"], ""),
    "into nothing": (("run", "--model", "@unloadable", "--out", ""), "", nothing, ""),
    "negate into a long name": (f"negate embedded embedded --out {'x' * 300}", "", nothing, ""),
    "acquire into a device": ("acquire --model @unloadable --out /dev/null/out", "", nothing, ""),
}  # fmt: skip


@pytest.mark.parametrize(("words", "place", "make", "said"), CASES.values(), ids=CASES.keys())
def test_bad_input(battery: Battery, words: str | tuple[str, ...], place: str, make: Change, said: str) -> None:
    make(battery.inputs / place)
    battery.refuses(*(words.split() if isinstance(words, str) else words), said=said)
