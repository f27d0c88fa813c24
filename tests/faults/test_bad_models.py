"""Weights, configurations and tokenizers that are cut off, lie about themselves, or lead out of their folder."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from conftest import ModelMaker, TokenizerMaker
from faults.battery import Battery
from sku.negate.task_vector import TaskVector

pytestmark = pytest.mark.integration

NAME = "models"
FILES = {"base": "model", "bad": "model", "adapter": "adapter_model", "vector": "task_vector"}
"""Folder -> stem of its weight file."""
Change = Callable[[Path], object]
"""Puts something wrong into a folder of weights, or into the file that is given."""


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
    adapted = get_peft_model(
        make_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    )
    adapted.save_pretrained(str(folder / "adapter"))
    return folder


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def put(path: Path, header: bytes, data: bytes, length: int | None = None) -> None:
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)


def rewritten(change: Callable[[dict[str, Any], str], object]) -> Change:
    """Changes a header; the change is given the header and the name of the last tensor in the file."""

    def make(path: Path) -> None:
        header, data = parts(path)
        last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
        change(header, last)
        put(path, json.dumps(header).encode(), data)

    return make


def cut(share: float) -> Change:
    return lambda path: path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def cut_to(size: int) -> Change:
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def with_length(length: int) -> Change:
    return lambda path: path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])


def with_header(header: bytes) -> Change:
    return lambda path: put(path, header, parts(path)[1])


def one_name_twice(path: Path) -> None:
    header, data = parts(path)
    first = next(name for name in header if name != "__metadata__")
    text = json.dumps(header)
    put(path, f"{text[:-1]}, {json.dumps(first)}: {json.dumps(header[first])}}}".encode(), data)


def with_value(value: float) -> Change:
    def make(path: Path) -> None:
        tensors = load_file(path)
        metadata = parts(path)[0].get("__metadata__")
        next(iter(tensors.values())).view(-1)[3] = value
        save_file(tensors, path, metadata)

    return make


def as_dtype(dtype: torch.dtype) -> Change:
    def make(path: Path) -> None:
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
        save_file(tensors, path, parts(path)[0].get("__metadata__"))

    return make


def without_first(path: Path) -> None:
    tensors = load_file(path)
    del tensors[next(iter(tensors))]
    save_file(tensors, path, parts(path)[0].get("__metadata__"))


def transposed(path: Path) -> None:
    tensors = {name: tensor.T.contiguous() if tensor.ndim == 2 else tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, parts(path)[0].get("__metadata__"))


def pickled(path: Path) -> None:
    torch.save(load_file(path), path.with_name("pytorch_model.bin" if path.stem == "model" else f"{path.stem}.bin"))
    path.unlink()


def replaced_by(make: Change) -> Change:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()


def set_entry(key: str, value: object) -> Change:
    return rewritten(lambda header, last: header[last].update({key: value}))


DAMAGED: dict[str, Change] = {
    "empty": cut_to(0),
    "cut off behind its length": cut_to(8),
    "cut off at 50%": cut(0.5),
    "bytes behind the end": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "a header longer than the file": with_length(10**9),
    "a header of 2**64 - 1 bytes": with_length(2**64 - 1),
    "a header of text": with_header(b"weights here"),
    "a header without tensors": with_header(b"{}"),
    "a header of brackets": with_header(b"[" * 50_000),
    "a tensor twice": one_name_twice,
    "unknown type": set_entry("dtype", "F31"),
    "type of another size": set_entry("dtype", "F64"),
    "negative size": set_entry("shape", [-1, 4]),
    "sizes that overflow": set_entry("shape", [2**40, 2**40]),
    "offsets that run backwards": set_entry("data_offsets", [8, 0]),
    "offsets far beyond the end": set_entry("data_offsets", [2**50, 2**50 + 4]),
    "offsets of another tensor": rewritten(
        lambda header, last: header[last].update(data_offsets=next(iter(header.values())).get("data_offsets", [0, 8]))
    ),
    "NaN": with_value(float("nan")),
    "8-bit integers": as_dtype(torch.int8),
    "8-bit floats": as_dtype(torch.float8_e4m3fn),
    "a tensor missing": without_first,  # A vector alone may lack some: it changes those that it has.
    "turned matrices": transposed,
    "pickled": pickled,
    "a folder in its place": replaced_by(Path.mkdir),
    "missing": Path.unlink,
}


OF_EACH_KIND = (
    "cut off at 50%", "a header of text", "a tensor missing", "turned matrices", "NaN", "8-bit floats", "pickled",
    "missing",
)  # fmt: skip
"""One reader opens all forms of weights: the bad model has every fault, the others one of each kind."""
FORMS = [
    *(("bad", name) for name in DAMAGED),
    *(
        (form, name)
        for name in OF_EACH_KIND
        for form in ("adapter", "vector")
        if (form, name) != ("vector", "a tensor missing")
    ),
]


@pytest.mark.parametrize(("form", "name"), FORMS)
def test_damaged_weights_of_a_bad_model(battery: Battery, sound: Path, form: str, name: str) -> None:
    folders = copies(battery, sound, "base", form)
    DAMAGED[name](folders[form] / f"{FILES[form]}.safetensors")
    arguments = ("negate", folders["base"], folders[form], "--out", battery.out)
    battery.refuses(NAME, *arguments)


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_damaged_weights_of_a_base_model(battery: Battery, sound: Path, name: str) -> None:
    folders = copies(battery, sound, "base", "bad")
    DAMAGED[name](folders["base"] / "model.safetensors")
    battery.refuses(NAME, "negate", folders["base"], folders["bad"], "--out", battery.out)


@pytest.mark.parametrize(
    ("command", "name"),
    [
        *(("run", name) for name in OF_EACH_KIND if name != "NaN"),
        *(("evaluate", name) for name in ("cut off at 50%", "a tensor missing", "8-bit floats", "pickled", "missing")),
    ],
)
def test_damaged_weights_of_a_run(battery: Battery, sound: Path, command: str, name: str) -> None:
    folders = copies(battery, sound, "base")
    DAMAGED[name](folders["base"] / "model.safetensors")
    model = ("run", "--model", folders["base"]) if command == "run" else ("evaluate", folders["base"])
    battery.refuses(NAME, *model, "--out", battery.out, words=str(folders["base"]))


def copies(battery: Battery, sound: Path, *names: str) -> dict[str, Path]:
    return {name: Path(shutil.copytree(sound / name, battery.inputs / name)) for name in names}


def sharded(folder: Path, index: object) -> None:
    """Renames the weights to a shard and writes an index as it is."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    text = index if isinstance(index, str) else json.dumps(index)
    (folder / "model.safetensors.index.json").write_text(text)


def placed(file: str) -> Change:
    def make(folder: Path) -> None:
        names = [name for name in parts(folder / "model.safetensors")[0] if name != "__metadata__"]
        sharded(folder, {"metadata": {}, "weight_map": dict.fromkeys(names, file)})

    return make


SHARD = "model-00001-of-00001.safetensors"
INDEXES: dict[str, Change] = {
    "no JSON": lambda folder: sharded(folder, "{"),
    "an empty map": lambda folder: sharded(folder, {"weight_map": {}}),
    "a name that no shard holds": lambda folder: sharded(folder, {"weight_map": {"no.such.weight": SHARD}}),
    "a shard above": placed("../base2/model.safetensors"),
    "a shard with a backslash": placed("..\\x.safetensors"),
    "a shard with a NUL": placed("a\0.safetensors"),
}


@pytest.mark.parametrize("command", ["negate", "run"])
@pytest.mark.parametrize("name", INDEXES)
def test_wrong_index_of_shards(battery: Battery, sound: Path, name: str, command: str) -> None:
    folders = copies(battery, sound, "base", "bad")
    shutil.copytree(folders["base"], battery.inputs / "base2")
    INDEXES[name](folders["base"])
    given = ("negate", folders["base"], folders["bad"]) if command == "negate" else ("run", "--model", folders["base"])
    battery.refuses(NAME, *given, "--out", battery.out, words="base")


def json_file(name: str, change: Callable[[dict[str, Any]], object]) -> Change:
    def make(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return make


def text_file(name: str, content: str | bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


CONFIGS: dict[str, Change] = {
    "missing": lambda folder: (folder / "config.json").unlink(),
    "a list": text_file("config.json", "[]"),
    "UTF-16": text_file("config.json", "{}".encode("utf-16")),
    "unknown type": json_file("config.json", lambda content: content.update(model_type="nonesuch", architectures=[])),
    "no language model": json_file("config.json", lambda content: content.update(model_type="vit")),
    "hidden size below 0": json_file("config.json", lambda content: content.update(hidden_size=-32)),
    "another vocabulary": json_file("config.json", lambda content: content.update(vocab_size=7)),
    "quantized, of text": json_file("config.json", lambda content: content.update(quantization_config="awq")),
}
TOKENIZERS: dict[str, Change] = {
    "missing": without_tokenizer,
    "null": text_file("tokenizer.json", "null"),
    "no vocabulary": json_file("tokenizer.json", lambda content: content["model"].update(vocab={})),
    "a template that fails": text_file("chat_template.jinja", "{{ raise_exception('no') }}"),
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS.keys())
def test_wrong_config_of_a_run(battery: Battery, sound: Path, change: Change) -> None:
    base = copies(battery, sound, "base")["base"]
    change(base)
    battery.refuses(NAME, "run", "--model", base, "--out", battery.out, words=str(base))


@pytest.mark.parametrize("change", TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_wrong_tokenizer_of_a_run(battery: Battery, sound: Path, change: Change) -> None:
    base = copies(battery, sound, "base")["base"]
    change(base)
    battery.refuses(NAME, "run", "--model", base, "--out", battery.out)


@pytest.mark.parametrize("name", ["missing", "a list", "UTF-16"])
@pytest.mark.parametrize("form", ["base", "bad"])
def test_wrong_config_of_negate(battery: Battery, sound: Path, form: str, name: str) -> None:
    folders = copies(battery, sound, "base", "bad")
    CONFIGS[name](folders[form])
    arguments = ("negate", folders["base"], folders["bad"], "--out", battery.out)
    battery.refuses(NAME, *arguments, words=str(folders[form]))


ADAPTERS: dict[str, Change] = {
    "no JSON": text_file("adapter_config.json", "{"),
    "nothing in it": text_file("adapter_config.json", "{}"),
    "another kind": json_file("adapter_config.json", lambda content: content.update(peft_type="PROMPT_TUNING")),
    "rank of text": json_file("adapter_config.json", lambda content: content.update(r="two")),
    "a pattern that is none": json_file("adapter_config.json", lambda content: content.update(target_modules="(")),
    "with biases": json_file("adapter_config.json", lambda content: content.update(bias="all")),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_wrong_settings_of_an_adapter(battery: Battery, sound: Path, name: str) -> None:
    folders = copies(battery, sound, "base", "adapter")
    ADAPTERS[name](folders["adapter"])
    battery.refuses(NAME, "negate", folders["base"], folders["adapter"], "--out", battery.out)


VECTORS: dict[str, Change] = {
    "no ties": rewritten(lambda header, last: header["__metadata__"].pop("tied")),
    "ties of numbers": rewritten(lambda header, last: header["__metadata__"].update(tied='{"a": 1}')),
    "no metadata": rewritten(lambda header, last: header.pop("__metadata__")),
}


@pytest.mark.parametrize("change", VECTORS.values(), ids=VECTORS.keys())
def test_wrong_header_of_a_task_vector(battery: Battery, sound: Path, change: Change) -> None:
    folders = copies(battery, sound, "base", "vector")
    change(folders["vector"] / "task_vector.safetensors")
    battery.refuses(NAME, "negate", folders["base"], folders["vector"], "--out", battery.out)


class Trap:
    """Unpickling it would write a file."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path("sprung"),)  # type: ignore[return-value]


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "adapter_model.bin", "training_args.bin"])
def test_no_pickle_is_ever_opened(battery: Battery, sound: Path, file: str) -> None:
    """The trap lies beside nothing: a folder with weights in safetensors is read without it."""
    folders = copies(battery, sound, "base", "bad", "adapter")
    form = "adapter" if file.startswith("adapter") else "bad"
    (folders[form] / f"{FILES[form]}.safetensors").unlink()
    (folders[form] / file).write_bytes(pickle.dumps(Trap()))
    battery.refuses(NAME, "negate", folders["base"], folders[form], "--out", battery.out)
    battery.refuses(NAME, "evaluate", folders["bad"] if form == "bad" else folders["adapter"], "--out", battery.out)
