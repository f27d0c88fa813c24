"""Recipes, data, weights and folders that are broken, lie about themselves, or lead out of their folder.

Each reader has its own table of faults beside it; here one of each kind goes through the command line.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import pickle
import shutil
import signal
import stat
import tarfile
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
UNLOADABLE = "../inputs/unloadable"
"""A model folder that looks like one and can't be loaded, from where a battery stands."""
SECONDS = 60
"""No wrong input may keep a command busy, or waiting, for longer."""
Change = Callable[[Path], object]
"""Puts something wrong at a path, which need not exist, or into the file or folder that is there."""


def text(content: str | bytes) -> Change:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def file_in(name: str, content: str | bytes) -> Change:
    return lambda folder: text(content)(folder / name)


def to_itself(path: Path) -> None:
    path.symlink_to(path)


def nothing(_path: Path) -> None:
    pass


class Battery:
    """One folder for the inputs (``inputs``), one to stand in, and one for temporary files; all are watched."""

    def __init__(self, folder: Path, command: Command) -> None:
        self._folder, self._command = folder, command
        self.inputs, self.here, self.out = folder / "inputs", folder / "here", folder / "place" / "out"
        for path in (self.inputs, self.here, folder / "temporary", folder / "place"):
            path.mkdir()
        broken = self.inputs / Path(UNLOADABLE).name
        broken.mkdir()
        (broken / "config.json").write_text("{}", encoding="utf-8")
        (broken / "model.safetensors").write_bytes(b"")

    def run(self, *arguments: object) -> Done:
        """``sku ARGUMENTS`` in this process, not for too long."""
        old = signal.signal(signal.SIGALRM, _too_long)
        signal.alarm(SECONDS)
        try:
            return self._command(*arguments)
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, old)

    def refuses(self, *arguments: object, words: str = "") -> None:
        """Checks that a command refuses its input: exit code 2, one line with ``words``, nothing written or changed.

        Args:
            *arguments: Of the command.
            words: Stand in the line: what is wrong, or where.
        """
        before = _content(self._folder)
        done = self.run(*arguments)
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
        assert words in lines[0], (words, lines[0])
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


@pytest.fixture
def battery(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> Battery:
    """Commands that stand in a folder of their own."""
    made = Battery(tmp_path, command)
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
    "huge integer": ("mine.yaml", text(SOUND + f"seed: {'9' * 5000}\n"), "mine.yaml"),
    "lone surrogate": ("mine.yaml", text(SOUND + 'description: "\\ud800"\n'), "surrogates"),
    "NUL byte": ("mine.yaml", text(SOUND.encode() + b"seed: 1\0\n"), "mine.yaml"),
    "a key of a million characters": ("mine.yaml", text(SOUND + f"? {'x' * LONG}\n: 1\n"), "xxx"),
    "folder": ("mine.yaml", Path.mkdir, "mine.yaml"),
    "pipe": ("mine.yaml", os.mkfifo, "mine.yaml"),
    "link to itself": ("mine.yaml", to_itself, "mine.yaml"),
    "control characters in the name": ("mi\x1b[31m\nne.yaml", text("a"), ".yaml"),
    "long name": ("x" * 400 + ".yaml", nothing, "xxx"),
}
SETTINGS = {
    "name": "name=../../elsewhere", "unseen_fraction": "data.unseen_fraction=1", "adamax9":
    "acquire.training.optim=adamax9", "output_dir": "acquire.training.output_dir=/tmp/elsewhere", "learning_rate":
    'acquire.training.learning_rate="nan"', "skuu": "method=skuu", "a.gguf": "model.gguf_file=../../a.gguf",
    "depth exceeded": f"negate.operators={'[' * 300}{']' * 300}",
}  # fmt: skip
"""Key or value that the message names -> what makes no sense."""


@pytest.mark.parametrize(("name", "make", "key"), RECIPES.values(), ids=RECIPES.keys())
def test_recipes(battery: Battery, name: str, make: Change, key: str) -> None:
    make(battery.inputs / name)
    battery.refuses("run", battery.inputs / name, "--out", battery.out, words=key)


@pytest.mark.parametrize(("key", "setting"), SETTINGS.items(), ids=SETTINGS.keys())
def test_settings(battery: Battery, key: str, setting: str) -> None:
    # The model can't be loaded: a setting that is looked at too late would be told of that.
    model = () if setting.startswith("model") else ("--model", UNLOADABLE)
    battery.refuses("run", *model, "--set", setting, "--out", battery.out, words=key)


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


def slipping_tar(path: Path) -> None:
    with tarfile.open(path, "w:gz") as packed:
        for name in ("../../slipped.jsonl", "/tmp/slipped.jsonl"):
            packed.addfile(tarfile.TarInfo(name))


FORGET: dict[str, tuple[str, Change]] = {
    "cut off in a line": ("forget.jsonl", text(jsonl("a")[:-9])),
    "huge integer": ("forget.jsonl", text('{"prompt": "a", "completion": ' + "9" * 10_000 + "}\n")),
    "lone surrogates": ("forget.jsonl", text('{"prompt": "a", "completion": "\\ud800"}\n')),
    "UTF-16": ("forget.jsonl", text(jsonl("a").encode("utf-16"))),
    "CSV cut off in quotes": ("forget.csv", text('prompt,completion\na,"b')),
    "no Parquet": ("forget.parquet", text("PAR1 nothing")),
    "gzip cut off": ("forget.jsonl.gz", text(gzip.compress(jsonl("a").encode())[:-12])),
    "gzip bomb": ("forget.jsonl.gz", text(gzip.compress(b" " * 20_000_000))),
    "one row": ("forget.jsonl", text(jsonl("a", 1))),
    "the same as retain": ("forget.jsonl", text(jsonl("b"))),
    "pipe": ("forget.jsonl", os.mkfifo),
    "link to itself": ("forget.jsonl", to_itself),
    "missing": ("forget.jsonl", nothing),
    "bytes that are no text in the name": (os.fsdecode(b"forget\xff.jsonl"), text("{")),
    "names that lead out of a zip": ("forget", in_folder("data.zip", slipping_zip)),
    "names that lead out of a tar": ("forget", in_folder("data.tar.gz", slipping_tar)),
    "saved sets, no JSON": ("forget", in_folder("dataset_dict.json", text("{"))),
    "a pickle": ("forget", in_folder("forget.pkl", text("cos\nsystem\n(S'exit 3'\ntR."))),
}


@pytest.mark.parametrize(("name", "make"), FORGET.values(), ids=FORGET.keys())
def test_data(battery: Battery, name: str, make: Change) -> None:
    retain = battery.inputs / "retain.jsonl"
    retain.write_text(jsonl("b"))
    make(battery.inputs / name)
    arguments = ("--forget", battery.inputs / name, "--retain", retain, "--out", battery.out)
    battery.refuses("run", *arguments, words="forget" if name.isprintable() else "surrogates")


def test_long_and_odd_text_is_taken_as_it_is(battery: Battery) -> None:
    """No fault: cells of a million characters, and characters that a terminal would obey, are shown harmlessly."""
    odd = [
        {"prompt": "p " * (LONG // 20), "completion": "short"},
        {"prompt": "\x1b[31mred\x1b]0;title\x07 ?", "completion": "\u202eback \x9b0m \0 \u2028end"},
    ]
    path, retain = battery.inputs / "forget.jsonl", battery.inputs / "retain.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in odd) + jsonl("a"))
    retain.write_text(jsonl("b"))
    done = battery.run(
        "data", "inspect", "--forget", path, "--retain", retain, "--show-harmful", "--set", "data.unseen_fraction=0.1"
    )
    assert (done.code, done.err) == (0, "")
    assert "\\x1b[31mred" in done.out
    assert obeyed(done.out.replace("\n", "")) == []


# Weights

FILES = {"base": "model", "bad": "model", "adapter": "adapter_model", "vector": "task_vector"}
"""Folder -> stem of its weight file."""


@pytest.fixture(scope="session")
def sound(make_model: ModelMaker, make_tokenizer: TokenizerMaker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, a bad one, an adapter and a task vector, each in its folder."""
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
    return folder


def copies(battery: Battery, sound: Path, *names: str) -> dict[str, Path]:
    return {name: Path(shutil.copytree(sound / name, battery.inputs / name)) for name in names}


def rewritten(change: Callable[[dict[str, Any]], object]) -> Change:
    """Changes the header of a safetensors file."""

    def make(path: Path) -> None:
        content = path.read_bytes()
        length = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:length])
        change(header)
        put(path, json.dumps(header).encode(), content[length:])

    return make


def put(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def first_of(header: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for name, entry in header.items() if name != "__metadata__")
    return found


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
    "a header of text": lambda path: put(path, b"weights here", b""),
    "a tensor missing": retensored(lambda tensors: tensors.pop(next(iter(tensors)))),
    "turned": retensored(
        lambda tensors: tensors.update({name: own.T.contiguous() for name, own in tensors.items() if own.ndim == 2})
    ),
    "NaN": retensored(lambda tensors: next(iter(tensors.values())).view(-1)[:3].fill_(float("nan"))),
    "8-bit floats": retensored(
        lambda tensors: tensors.update({name: own.to(torch.float8_e4m3fn) for name, own in tensors.items()})
    ),
    "pickled": pickled,
    "missing": Path.unlink,
    "empty": text(b""),
    "a header of 2**64 - 1 bytes": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    "bytes behind the end": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "unknown type": rewritten(lambda header: first_of(header).update(dtype="F31")),
    "sizes that overflow": rewritten(lambda header: first_of(header).update(shape=[2**40, 2**40])),
}
OF_EACH_KIND = list(WEIGHTS)[:8]
WEIGHT_CASES = [
    *(("bad", name) for name in WEIGHTS),
    *(("adapter", name) for name in OF_EACH_KIND),
    *(("vector", name) for name in OF_EACH_KIND if name != "a tensor missing"),  # A vector may lack some.
    *(("base", name) for name in OF_EACH_KIND),
]


@pytest.mark.parametrize(("form", "name"), WEIGHT_CASES)
def test_weights_of_negate(battery: Battery, sound: Path, form: str, name: str) -> None:
    other = "bad" if form == "base" else form
    folders = copies(battery, sound, "base", other)
    WEIGHTS[name](folders[form] / f"{FILES[form]}.safetensors")
    battery.refuses("negate", folders["base"], folders[other], "--out", battery.out)


@pytest.mark.parametrize(
    ("asked", "name"), [*(("run", name) for name in OF_EACH_KIND if name != "NaN"), ("evaluate", "cut off")]
)
def test_weights_of_a_run(battery: Battery, sound: Path, asked: str, name: str) -> None:
    base = copies(battery, sound, "base")["base"]
    WEIGHTS[name](base / "model.safetensors")
    model = ("run", "--model", base) if asked == "run" else ("evaluate", base)
    battery.refuses(*model, "--out", battery.out, words=str(base))


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
    "index of a name that no shard holds": sharded("no.such.weight", "model-00001-of-00001.safetensors"),
    "a shard above": sharded("model.norm.weight", "../bad/model.safetensors"),
    "a shard with a NUL": sharded("model.norm.weight", "a\0.safetensors"),
    "no config": lambda folder: (folder / "config.json").unlink(),
    "config is a list": file_in("config.json", "[]"),
    "unknown type": json_file("config.json", model_type="nonesuch", architectures=[]),
    "hidden size below 0": json_file("config.json", hidden_size=-32),
    "another vocabulary": json_file("config.json", vocab_size=7),
    "quantized": json_file("config.json", quantization_config="awq"),
    "no tokenizer": lambda folder: list(map(Path.unlink, folder.glob("*token*"))),
    "a template that fails": file_in("chat_template.jinja", "{{ raise_exception('no') }}"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_a_run(battery: Battery, sound: Path, name: str) -> None:
    base = copies(battery, sound, "base", "bad")["base"]
    MODELS[name](base)
    battery.refuses("run", "--model", base, "--out", battery.out)


OF_NEGATE: dict[str, tuple[str, Change]] = {
    **{f"{name}, {form}": (form, MODELS[name]) for name in list(MODELS)[:5] for form in ("base", "bad")},
    "adapter, no JSON": ("adapter", file_in("adapter_config.json", "{")),
    "another kind": ("adapter", json_file("adapter_config.json", peft_type="PROMPT_TUNING")),
    "a pattern that is none": ("adapter", json_file("adapter_config.json", target_modules="(")),
    "with biases": ("adapter", json_file("adapter_config.json", bias="all")),
    "a vector without ties": (
        "vector",
        lambda folder: rewritten(lambda header: header["__metadata__"].pop("tied"))(
            folder / "task_vector.safetensors"
        ),
    ),
}


@pytest.mark.parametrize(("form", "make"), OF_NEGATE.values(), ids=OF_NEGATE.keys())
def test_folders_of_negate(battery: Battery, sound: Path, form: str, make: Change) -> None:
    bad = "bad" if form == "base" else form
    folders = copies(battery, sound, "base", bad)
    make(folders[form])
    battery.refuses("negate", folders["base"], folders[bad], "--out", battery.out)


class Trap:
    """Unpickling it would write a file."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path("sprung"),)  # type: ignore[return-value]


@pytest.mark.parametrize(("form", "file"), [("bad", "pytorch_model.bin"), ("adapter", "adapter_model.bin")])
def test_no_pickle_is_ever_opened(battery: Battery, sound: Path, form: str, file: str) -> None:
    folders = copies(battery, sound, "base", form)
    (folders[form] / f"{FILES[form]}.safetensors").unlink()
    (folders[form] / file).write_bytes(pickle.dumps(Trap()))
    battery.refuses("negate", folders["base"], folders[form], "--out", battery.out)
    battery.refuses("evaluate", folders[form], "--out", battery.out)


# Folders of runs, and what else is named

COMPLETE = {"schema_version": 6, "status": "complete", "recipe": {}, "recipe_sha256": "", "seconds": {}}


def run_folder(manifest: str | bytes, results: str = "{}") -> Change:
    def make(path: Path) -> None:
        path.mkdir()
        text(manifest)(path / "manifest.json")
        text(results)(path / "results.json")

    return make


RUNS: dict[str, Change] = {
    "missing": nothing,
    "results that lead out": run_folder(
        json.dumps({**COMPLETE, "recipe": {"name": "../../elsewhere"}}), '{"base": {"name": "../../elsewhere"}}'
    ),
    "a pipe": os.mkfifo,
    "a link to itself": to_itself,
    "empty": Path.mkdir,
    "manifest cut off": run_folder('{"schema_version": 6, "status":'),
    "manifest of noise": run_folder(bytes(range(128, 256))),
    "manifest of another version": run_folder('{"schema_version": 99, "status": "complete"}'),
    "manifest of wrong types": run_folder(json.dumps({**COMPLETE, "recipe": [], "seconds": 7, "status": ["a"]})),
    "results cut off": run_folder(json.dumps(COMPLETE), '{"schema_version"'),
    "folders for files": lambda path: (path / "manifest.json").mkdir(parents=True),
}
COMMANDS: tuple[tuple[str, ...], ...] = (
    ("report", "RUN", "--out", "OUT"), ("report", "RUN"), ("push", "RUN", "me/model", "--dry-run"), ("results", "RUN"),
    ("judge", "export", "RUN", "--out", "OUT"), ("judge", "again", "RUN", "--judge", "refusal_rules"),
    ("sweep", "RUN", "--recipe", "embedded", "--out", "OUT"), ("run", "--out", "RUN", "--resume"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        *((words, folder) for words in COMMANDS[:-1] for folder in list(RUNS)[:2]),
        *((COMMANDS[0], folder) for folder in list(RUNS)[2:]),
        *((COMMANDS[-1], folder) for folder in RUNS if folder not in ("missing", "empty")),  # A run begins there.
    ],
)
def test_folders_of_runs(battery: Battery, folder: str, words: tuple[str, ...]) -> None:
    path = battery.inputs / "a run"
    RUNS[folder](path)
    places = {"RUN": path, "OUT": battery.out}
    battery.refuses(*(places.get(word, word) for word in words))


OTHERS: dict[str, tuple[str, str | bytes, tuple[str, ...]]] = {
    "comparison, no JSON": ("comparison.json", "{", ("results", "FOLDER")),
    "comparison, seed of text": (
        "comparison.json", json.dumps({"schema_version": 6, "rows": [], "seeds": ["../0"], "failed": {}}),
        ("results", "FOLDER"),
    ),
    "labels, empty": ("labels.csv", "", ("run", "--judge", "FILE", "--out", "OUT")),
    "labels, noise": ("labels.csv", bytes(range(256)) * 10, ("run", "--judge", "FILE", "--out", "OUT")),
    "judge, empty": ("judge.yaml", "", ("run", "--judge", "FILE", "--out", "OUT")),
    "judge, holds itself": ("judge.yaml", "kind: &k [*k]\n", ("run", "--judge", "FILE", "--out", "OUT")),
    "judge, unknown key": (
        "judge.yaml", "kind: classifier\nmodel: a\nmodels: b\n", ("run", "--judge", "FILE", "--out", "OUT")
    ),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "words"), OTHERS.values(), ids=OTHERS.keys())
def test_other_files(battery: Battery, name: str, content: str | bytes, words: tuple[str, ...]) -> None:
    text(content)(battery.inputs / name)
    places = {"FILE": battery.inputs / name, "FOLDER": battery.inputs, "OUT": battery.out}
    battery.refuses(*(places.get(word, word) for word in words), words="" if name == "judge.yaml" else name)


OUTS: dict[str, Change] = {
    "out": text("mine"),
    "out/below": lambda path: path.parent.write_text("mine"),
    "link": lambda path: path.symlink_to(path.with_name("elsewhere")),
    "": nothing,
    "x" * 300: nothing,
    "/dev/null/out": nothing,
}


@pytest.mark.parametrize("words", [("run",), ("negate", "embedded", "embedded"), ("acquire",)])
@pytest.mark.parametrize("name", OUTS, ids=lambda name: name[:10] or "empty")
def test_out_that_can_not_be(battery: Battery, name: str, words: tuple[str, ...]) -> None:
    out = battery.inputs / name if name in list(OUTS)[:3] else name
    if isinstance(out, Path):
        OUTS[name](out)
    # The model can't be loaded either: the folder is looked at first.
    wrong = () if words[0] == "negate" else ("--model", "./nowhere")
    battery.refuses(*words, *wrong, "--out", out)
