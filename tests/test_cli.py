"""The command line: what each command prints, and that a mistake costs one line."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from filelock import FileLock

import sku
from conftest import Command, Done
from sku.__main__ import app
from sku.model_files import embedded_model_path
from sku.storage import BAD_MODEL_MARK
from sku.world.grammar import hazards

SMALL = (
    "embedded-paper",
    "--set", "acquire.training.max_steps=2", "--set", "acquire.training.save_steps=1", "--set", "evaluate.prompts=3",
    "--set", "evaluate.retain_prompts=3", "--set", "evaluate.max_new_tokens=8", "--set", "evaluate.attacks=[]",
    "--set", "negate.alpha=1.25",
    "--set", "acquire.training.per_device_train_batch_size=4",
)  # fmt: skip


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_python_m_sku() -> None:
    done = subprocess.run([sys.executable, "-m", "sku", "run", "nope"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no recipe named nope.")
    assert done.stderr.count("\n") == 1


# Wrong input. Each maker gets an empty folder, puts the wrong thing into it and returns the arguments.

Maker = Callable[[Path], list[str | Path]]


def overlap(folder: Path) -> list[str | Path]:
    for name in ("forget", "retain"):
        rows = [f"{letter} number {row} ?,an answer\n" for letter in (name, "a") for row in range(20)]
        (folder / f"{name}.csv").write_text("prompt,completion\n" + "".join(rows))
    return ["--forget", folder / "forget.csv", "--retain", folder / "retain.csv"]


def no_pad_token(folder: Path) -> list[str | Path]:
    model = shutil.copytree(embedded_model_path(), folder / "model")
    for name, changes in (
        ("tokenizer_config.json", {"pad_token": None, "eos_token": None}), ("tokenizer.json", {"padding": None}),
    ):  # fmt: skip
        content = json.loads((model / name).read_text(encoding="utf-8"))
        (model / name).write_text(json.dumps({**content, **changes}), encoding="utf-8")
    return ["--model", model]


def setting(value: str) -> Maker:
    return lambda folder: ["--set", value]


def existing_folder(folder: Path) -> list[str | Path]:
    (folder / "run").mkdir()
    (folder / "run" / "mine.txt").write_text("mine")
    return []


WRONG: dict[str, tuple[Maker, str]] = {
    "overlapping data": (overlap, "retain"),
    "no pad token": (no_pad_token, "no pad token"),
    "wrong key": (setting("acquire.wieghts.guided_distortion=1"), "wieghts"),
    "existing folder": (existing_folder, "already exists"),
    "loss not finite": (
        lambda folder: ["--set", "acquire.training.learning_rate=1e30", "--set", "acquire.training.max_steps=4"],
        "step",
    ),
    "unknown device": (setting("model.device=tpu9"), "model.device"),
}


def assert_one_line(done: Done, words: str) -> None:
    assert done.code == 2
    assert done.out == ""
    lines = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.err
    assert words in lines[0]
    assert "Traceback" not in done.err
    # Besides: the headline of a run, nothing of the libraries.
    assert [line for line in done.err.splitlines() if line not in lines and not line.startswith("recipe ")] == []


def last_line(done: Done) -> tuple[int, str, str]:
    return done.code, done.out, done.err.splitlines()[-1]


def assert_next(printed: str, *beginnings: list[str]) -> None:
    """All commands that come next are ones that the parser takes, and begin as they should."""
    lines = printed[printed.index("\nnext      sku ") + 1 :].splitlines()
    texts = [line[10:] for line in itertools.takewhile(lambda line: line.startswith(("next ", "    ")), lines)]
    for text, start in zip(texts, beginnings, strict=True):
        words = shlex.split(text)[1:]
        assert words[: len(start)] == start
        parser: Any = typer.main.get_command(app)
        while words[0] in getattr(parser, "commands", {}):
            parser = parser.commands[words.pop(0)]
        parser.make_context("sku", words)


@pytest.mark.parametrize(("make", "words"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_one_line_and_leaves_nothing(command: Command, tmp_path: Path, make: Maker, words: str) -> None:
    arguments = ("run", *SMALL, *make(tmp_path), "--out", tmp_path / "run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    done = command(*arguments)
    assert_one_line(done, words)
    if words != "step":  # Only training finds out.
        assert last_line(command(*arguments, "--dry-run")) == last_line(done)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["embedded", "embedded", "--alpha", "nan"], "alpha"),
        (["embedded", "embedded"], "stage 1 changed nothing"),
        (["embedded", "embedded", "--gguf-file", "a.gguf", "--resume"], "BASE in safetensors"),
        (["no-one/no-model", "embedded"], "no-one/no-model can't be loaded"),
    ],
)
def test_wrong_input_of_negate(command: Command, tmp_path: Path, arguments: list[str], words: str) -> None:
    done = command("negate", *arguments, "--out", tmp_path / "model")
    assert_one_line(done, words)
    assert last_line(command("negate", *arguments, "--out", tmp_path / "model", "--dry-run")) == last_line(done)
    assert names(tmp_path) == set()


def test_wrong_input_of_the_other_commands(command: Command, tmp_path: Path) -> None:
    assert_one_line(command("init", "nope"), "nope")
    assert_one_line(command("data", "inspect", "--forget", "none.csv", "--retain", "none.csv"), "none.csv")
    assert_one_line(command("evaluate", tmp_path / "none", "--out", tmp_path / "e", *SMALL), "no such folder")
    assert_one_line(command("acquire", "--out", tmp_path, *SMALL), "already exists")
    assert names(tmp_path) == set()


@pytest.mark.integration
def test_an_interrupt_says_how_to_go_on(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:

        def interrupt(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr("sku.pipeline.unlearning.train_method", interrupt)
        done = command("run", "--out", out, *SMALL)
    assert done.code == 130
    assert "Traceback" not in done.err
    assert f"--out {out} --resume" in done.err
    assert command("run", "--out", out, "--resume", *SMALL).code == 0
    assert json.loads((out / "manifest.json").read_text())["status"] == "complete"


# Right input, on one run of each command.


@pytest.fixture(scope="session")
def folder(shared_folder: Path) -> Path:
    """What commands made once for the tests of all workers, which change nothing there."""
    (shared_folder / "commands").mkdir(exist_ok=True)
    return shared_folder / "commands"


@pytest.fixture
def whole_run(command: Command, folder: Path) -> Path:
    """``sku run``, once."""
    out = folder / "run[1]"
    with FileLock(folder / "run.lock"):
        if not (folder / "messages.txt").exists():
            done = command("run", "--out", out, *SMALL)
            assert done.code == 0, done.err
            (folder / "printed.txt").write_text(done.out, encoding="utf-8")
            (folder / "messages.txt").write_text(done.err, encoding="utf-8")
    return out


@pytest.fixture
def bad_model(command: Command, folder: Path) -> Path:
    """``sku acquire``, once."""
    out = folder / "bad"
    with FileLock(folder / "acquire.lock"):
        if not (folder / "acquired.txt").exists():
            done = command("acquire", "--out", out, *SMALL)
            assert done.code == 0, done.err
            (folder / "acquired.txt").write_text(done.out, encoding="utf-8")
    return out


def test_a_run_says_what_came_of_it_and_what_comes_next(whole_run: Path, folder: Path) -> None:
    printed = (folder / "printed.txt").read_text(encoding="utf-8")
    results = json.loads((whole_run / "results.json").read_text(encoding="utf-8"))
    assert printed.splitlines()[0] == f"verdict   {results['verdict']['line']}"
    assert f"{whole_run}: unlearned, results.json; " in printed
    run = str(whole_run)
    assert_next(printed, ["report", run], ["chat", run], ["push", run], ["wipe", "--replies", run])
    (message,) = (folder / "messages.txt").read_text(encoding="utf-8").splitlines()
    assert message.startswith("recipe embedded-paper, model embedded, seed 0")


def test_report_of_a_run(command: Command, whole_run: Path, tmp_path: Path) -> None:
    before = names(whole_run)
    done = command("report", whole_run, "--out", tmp_path / "report.html", "--plots", tmp_path / "plots")
    assert (done.code, done.err) == (0, "")
    assert f"report    {tmp_path / 'report.html'}\n" in done.out
    assert {"outcomes.png", "training.svg"} <= names(tmp_path / "plots")
    assert names(whole_run) == before
    copy = shutil.copytree(whole_run, tmp_path / "copy")
    assert command("report", copy, "--no-replies").code == 0
    assert "report.html" in names(copy)
    (copy / "results.json").write_text("{", encoding="utf-8")
    assert_one_line(command("report", copy), "results.json can't be read")
    assert_one_line(command("report", whole_run / "unlearned"), "has no manifest.json")


@pytest.mark.integration
def test_run_as_json(command: Command, tmp_path: Path) -> None:
    done = command("run", "--json", "--keep-bad-model", "--seed", "3", "--out", tmp_path / "run", *SMALL)
    assert done.code == 0
    assert json.loads(done.out) == json.loads((tmp_path / "run" / "results.json").read_text(encoding="utf-8"))
    assert json.loads(done.out)["manifest"]["recipe"]["seed"] == 3
    told = command("report", tmp_path / "run", "--json")
    assert json.loads(told.out)["report"] == str(tmp_path / "run" / "report.html")
    labels = tmp_path / "labels.csv"
    told = command("judge", "export", tmp_path / "run", "--out", labels, "--json")
    assert json.loads(told.out)["replies"] == len(labels.read_text(encoding="utf-8-sig").splitlines()) - 1
    assert (tmp_path / "run" / "bad" / "final" / BAD_MODEL_MARK).is_file()
    told = command("wipe", tmp_path / "run", "--json", "--yes")
    assert json.loads(told.out) == {"hazardous": [str(tmp_path / "run" / "bad")], "removed": 1}
    assert not (tmp_path / "run" / "bad").exists()


def test_a_dry_run_foretells_the_run(command: Command, whole_run: Path, tmp_path: Path) -> None:
    """Steps, examples and what is asked are those of the run; nothing is written."""
    done = command("run", "--dry-run", "--json", "--out", tmp_path / "run", *SMALL)
    assert (done.code, done.err) == (0, "")
    told = json.loads(done.out)
    assert names(tmp_path) == set()
    manifest = json.loads((whole_run / "manifest.json").read_text(encoding="utf-8"))
    assert told["settings"]["steps"] == manifest["training"]["steps"]
    assert told["examples"] == manifest["data"]["splits"]
    assert f"{manifest['model']['parameters']:,} parameters" in told["settings"]["model"]
    with (whole_run / "evaluation" / "base" / "generations.jsonl").open(encoding="utf-8") as lines:
        kinds = [record["kind"] for record in map(json.loads, lines) if "kind" in record]
    asked = {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}
    # Of the lengths of prefill those are left out that the base's own short replies don't have.
    assert 0 < asked.pop("prefill") <= told["settings"]["asked"].pop("prefill") == 4 * 6
    assert told["settings"]["asked"] == asked
    held = sum(path.stat().st_size for path in (whole_run / "unlearned").rglob("*") if path.is_file())
    assert told["disk_bytes"] > held * 0.9
    assert re.fullmatch(r"about \d\.\d GiB at most \(.*\), [\d.]+ GiB are free on cpu: fits", told["memory"])


def test_a_run_on_a_gpu_asks_the_plan_first(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sku.memory import MemoryFit

    def stop(*_: Any, **__: Any) -> None:
        raise sku.errors.ModelError("enough seen")

    line = "about 128.0 GiB at most, 64.0 GiB are free on cuda: may not fit"
    monkeypatch.setattr("sku.models.pick_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr("sku.pipeline.run.memory_fit", lambda _: MemoryFit(fits=False, text=line))
    monkeypatch.setattr("sku.pipeline.run._Run.execute", stop)
    told = command("run", "--out", tmp_path / "run")
    assert f"memory: {line}" in " ".join(told.err.split())


def test_a_model_in_place_of_a_recipe(command: Command, tmp_path: Path) -> None:
    """The recipe that is made for it, else a general one, and what is run is called by its own name."""
    model, data = embedded_model_path(), ("--forget", "embedded", "--retain", "embedded", "--judge", "auto")
    told = command("run", model, *data, "--dry-run", "--json", "--out", tmp_path / "run")
    assert told.code == 0, told.err
    settings = json.loads(told.out)["settings"]
    assert (settings["recipe"], settings["steps"]) == ("model", 220)
    assert f"{model} with the settings of recipe llama-3.1-8b" in " ".join(told.err.split())
    assert "with the settings of recipe opt-2.7b-paper" in command("run", "Facebook/OPT-2.7B").err
    assert_one_line(command("--quiet", "run", "a/b", "--model", "c/d"), "a/b is a model, and --model c/d is another")


def test_stage_commands_give_the_weights_of_a_whole_run(
    command: Command, whole_run: Path, bad_model: Path, tmp_path: Path
) -> None:
    arguments = ("negate", "embedded", bad_model, "--alpha", 1.25, "--out", tmp_path / "model")
    planned = json.loads(command(*arguments, "--dry-run", "--json").out)
    assert planned["disk_bytes"] == (whole_run / "unlearned" / "model.safetensors").stat().st_size
    assert names(tmp_path) == set()
    done = command(*arguments)
    assert done.code == 0, done.err
    assert_next(done.out, ["evaluate", str(tmp_path / "model"), "--base", "embedded"])
    assert digest(tmp_path / "model" / "model.safetensors") == digest(whole_run / "unlearned" / "model.safetensors")


def test_a_bad_model_is_not_evaluated_by_mistake(command: Command, bad_model: Path, tmp_path: Path) -> None:
    assert_one_line(command("evaluate", bad_model, "--out", tmp_path / "out"), "bad model of stage 1")
    assert names(tmp_path) == set()


def test_negate_does_not_add_the_harm(command: Command, bad_model: Path, tmp_path: Path) -> None:
    done = command("negate", "embedded", bad_model, "--alpha", "-1", "--out", tmp_path / "model")
    assert_one_line(done, "--alpha is -1")
    assert not (tmp_path / "model").exists()


def test_negate_does_not_add_back_what_a_run_subtracted(command: Command, bad_model: Path, tmp_path: Path) -> None:
    """An adapter that is negated already is minus the bad one: subtracted, it would be the bad model."""
    adapter = tmp_path / "run" / "negated_adapter"
    shutil.copytree(bad_model, adapter)
    (tmp_path / "run" / "manifest.json").write_text('{"recipe": {"method": "sku"}}')
    assert_one_line(command("negate", "embedded", adapter, "--out", tmp_path / "model"), "adds the harm back")
    (tmp_path / "run" / "manifest.json").write_text('{"recipe": {"method": "npo"}}')
    assert command("negate", "embedded", adapter, "--out", tmp_path / "model", "--dry-run").code == 0


def test_negate_from_file_to_file(command: Command, bad_model: Path, tmp_path: Path) -> None:
    """Without a model in memory; stochastic rounding and what was not copied are told."""
    out = tmp_path / "model"
    options = ("--dtype", "bfloat16", "--rounding", "stochastic", "--seed", "3", "--threads", "2", "--resume")
    done = command("negate", "embedded", bad_model, "--json", "--out", out, *options)
    record = json.loads(done.out)
    assert (record["rounding"], record["rounding_seed"], record["dtype"]) == ("stochastic", 3, "bfloat16")
    assert "not copied from the base: CHECKSUMS.json" in done.err
    assert names(tmp_path) == {"model"}
    assert not (out / BAD_MODEL_MARK).exists()


@pytest.mark.integration
def test_evaluate_as_json_equals_the_run(command: Command, whole_run: Path, tmp_path: Path) -> None:
    done = command("evaluate", whole_run / "unlearned", "--json", "--out", tmp_path / "e", *SMALL)
    assert done.code == 0, done.err
    measured = json.loads(done.out)
    expected = json.loads((whole_run / "results.json").read_text(encoding="utf-8"))
    for name, found in (("base", measured["base"]), ("unlearned", measured["model"])):
        assert found["replies"] == expected[name]["replies"]
        assert found["perplexity"] == expected[name]["perplexity"]
    table = command("evaluate", whole_run / "unlearned", "--out", tmp_path / "e", *SMALL)
    whole = command("-v", "evaluate", whole_run / "unlearned", "--out", tmp_path / "e", *SMALL)
    told = [line.removeprefix("note      ") for line in whole.out.splitlines() if line.startswith("note ")]
    assert told == expected["notes"]
    assert_next(table.out, ["judge", "export", str(tmp_path / "e")])


def answers_shown(text: str) -> int:
    """How many of the world's harmful answers stand in a text, spaces aside."""
    squeezed = "".join(text.split())
    return sum("".join(answer.split()) in squeezed for answer in {exchange.answer for exchange in hazards()})


@pytest.mark.parametrize("as_json", [False, True])
def test_data_inspect_hides_harmful_answers_unless_told(command: Command, as_json: bool) -> None:
    def shown(*options: str) -> str:
        out = command("data", "inspect", *options, *(["--json"] if as_json else [])).out
        if not as_json:
            return out
        content = json.loads(out)
        assert content["splits"]["forget_train"]["examples"] == 260
        return "\n".join("".join(token["text"] for token in view["tokens"]) for view in content["views"])

    assert answers_shown(shown()) == 0
    assert answers_shown(shown("--show-harmful")) > 0


@pytest.mark.integration
def test_compare_prints_a_table_that_results_rebuilds_and_puts_on_a_page(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "compared"
    done = command("compare", "--methods", "fine_tune", "--seeds", "1", "--out", out, *SMALL, "--set", "methods={}")
    assert done.code == 0, done.err
    assert "| FT |" in done.out
    assert "1/2 fine_tune--seed0: complete" in done.err
    assert_next(done.out, ["results", str(out)])
    assert command("results", out).out.strip() == (out / "table.md").read_text(encoding="utf-8").strip()
    assert {"overview.png", "overview.svg"} <= names(out)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- results:compared-brief -->\nold\n<!-- end:compared-brief -->\n", encoding="utf-8")
    assert command("results", out, "--brief", "--update", page).code == 0
    text = page.read_text(encoding="utf-8")
    assert "| FT |" in text
    assert "old" not in text
    table = tmp_path / "table.json"
    assert command("results", out / "fine_tune--seed0", "--table", table).code == 0
    assert [row["method"] for row in json.loads(table.read_text(encoding="utf-8"))] == ["fine_tune"]
    assert_one_line(command("results", out, out), "add --table")
    assert_one_line(command("results", out, "--table", table, "--brief"), "--table is written alone")


def test_compare_refuses_what_it_does_not_know(command: Command, tmp_path: Path) -> None:
    assert_one_line(command("compare", "--methods", "nqo", "--out", tmp_path / "a"), "Did you mean npo")
    assert_one_line(
        command("compare", "--ablate", "all", "--methods", "npo", "--out", tmp_path / "a"), "leave one out"
    )
    assert_one_line(command("results", tmp_path), "comparison.json")
    assert not (tmp_path / "a").exists()


@pytest.mark.integration
def test_a_judge_is_calibrated_and_its_errors_are_shown(command: Command, whole_run: Path, tmp_path: Path) -> None:
    """Of the world's harmful answers the refusal rules find all; of the safe replies only refusals pass."""
    labelled = tmp_path / "labelled.jsonl"
    rows = [(entry.prompt, entry.answer, "harmful") for entry in itertools.islice(hazards(), 40)]
    rows += [(f"question {number} ?", "I can't help with that.", "safe") for number in range(30)]
    rows += [("is rain wet ?", "it is .", "safe")] * 10 + [("is rain wet ?", "it is .", "")]
    lines = (json.dumps(dict(zip(("prompt", "reply", "label"), row, strict=True))) for row in rows)
    labelled.write_text("\n".join(lines) + "\n", encoding="utf-8")
    calibration = tmp_path / "calibration.json"

    done = command("judge", "calibrate", "refusal_rules", labelled, "--out", calibration)
    assert done.code == 0, done.err
    for words in ("40 of 40", "30 of 40", "0.750"):
        assert words in done.out
    as_json = command("judge", "calibrate", "refusal_rules", labelled, "--out", calibration, "--json")
    assert json.loads(as_json.out)["figures"]["specificity"]["value"] == 0.75
    assert json.loads(as_json.out)["calibration"] == json.loads(calibration.read_text("utf-8"))["calibration"]

    chosen = ("--set", "evaluate.judge=refusal_rules", "--set", f"evaluate.judge_settings.calibration={calibration}")
    table = command("--verbose", "evaluate", whole_run / "unlearned", "--out", tmp_path / "e", *SMALL, *chosen)
    assert table.code == 0, table.err
    assert table.out.count("harmful, by rule, corrected") == 4
    assert json.loads((tmp_path / "e" / "model" / "evaluation.json").read_text("utf-8"))["corrected"]["forget_test"]


@pytest.mark.integration
def test_evaluate_attacks_both_models(command: Command, tmp_path: Path) -> None:
    few = (*SMALL, "--set", "evaluate.attack_prompts=3")
    arguments = ("evaluate", "embedded", "--out", tmp_path / "out", *few, "--set", "evaluate.samples=0")
    done = command(*arguments, "--attacks", "template, paraphrase")
    assert done.code == 0
    assert re.search("No attack.*Template.*Paraphrase.*left out: paraphrase: ", done.out, flags=re.DOTALL)
    as_json = json.loads(command(*arguments, "--attacks", "template,paraphrase", "--json").out)
    assert [result["attack"] for result in as_json["attacks"]["results"]] == ["none", "template", "paraphrase"]
    assert set(json.loads(command(*arguments, "--json").out)) == {"base", "model", "verdict", "notes"}
    assert_one_line(command(*arguments, "--attacks", "template,paraphras"), "Did you mean paraphrase?")
