"""A finished run's model for the engines that serve models: what each reads, and whether it still says the same."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from sku.config import ModelConfig, SourceConfig
from sku.data.sources.tables import read_table
from sku.errors import EvaluationError, ModelError, OutputError
from sku.models import LoadedModel, load_model
from sku.negate.adapters import load_adapter
from sku.negate.refactor import check_refactored
from sku.report.read_run import read_run
from sku.report.reflection import check_adapter, reflection_of
from sku.storage import new_folder

Engine = Literal["gguf", "vllm", "adapter"]
CONVERTER = "convert_hf_to_gguf.py"
LLAMA_CPP = "LLAMA_CPP"
"""Environment variable that names a checkout of llama.cpp."""
_PROMPTS = 8
_LEAST_EQUAL = 0.9
"""Share of positions at which both must put the same token first: 16 bits move near ties and nothing else."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A model and its export on the same text."""

    positions: int
    same_first: float
    """Share of positions at which both put the same token first."""
    largest: float
    """Largest difference of two scores (logits)."""

    @property
    def words(self) -> str:
        """In one line."""
        return (
            f"the same token first at {100 * self.same_first:.1f} % of {self.positions} positions, largest difference "
            f"of scores {self.largest:.2g}"
        )


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an engine is given, and what was found out about it."""

    engine: Engine
    path: Path
    """File or folder that the engine reads."""
    commands: tuple[tuple[str, ...], ...]
    """How it is used from there."""
    agreement: Agreement | None = None
    unchecked: str = ""
    """Why nothing was compared."""


def to_adapter(run: Path, out: Path, *, acknowledged: bool = False) -> Exported:
    """Copies a run's adapter into a folder of its own, and puts it on the base to see what it says.

    Args:
        run: Folder of a finished run.
        out: New folder.
        acknowledged: As of ``push.plan_push``.

    Returns:
        The folder, compared with the unlearned model.

    Raises:
        EvaluationError: No finished run, or the adapter says something else than the model.
        OutputError: The run has no adapter, it is not one to be handed out as of ``plan_push``, or the folder can't be
            written.
        ModelError: A model can't be loaded.
    """
    found = read_run(run, replies=False)
    parts, base = found.parts(), found.recipe["model"]
    if "adapter" not in parts:
        raise OutputError(f"{run} has no adapter, only a whole model: export that, with --to vllm or --to gguf")
    check_adapter(found, acknowledged=acknowledged)
    if reflection_of(found) == "twins":
        check_refactored(parts["adapter"])
    original = load_model(_original(base))
    unlearned = _unlearned(parts["model"])
    with new_folder(out) as folder:
        shutil.copytree(parts["adapter"], folder, dirs_exist_ok=True)
        with_adapter: PeftModel = load_adapter(original.model, folder)
        agreement = _compared(unlearned, with_adapter.eval(), "the adapter on its base")
    served = ("vllm", "serve", str(base["path"]), "--enable-lora", "--lora-modules", f"unlearned={out}")
    return Exported(engine="adapter", path=out, commands=(served,), agreement=agreement)


def to_gguf(run: Path, out: Path, *, converter: Path | None = None, outtype: str = "f16") -> Exported:
    """Has llama.cpp's own converter write a GGUF file, and reads it back to see what it says.

    Args:
        run: Folder of a finished run.
        out: New file.
        converter: ``convert_hf_to_gguf.py`` of llama.cpp; looked for if None (``find_converter``).
        outtype: Its type of weights: ``f32``, ``f16``, ``bf16``, ``q8_0``.

    Returns:
        The file, compared with the unlearned model where transformers can read it.

    Raises:
        EvaluationError: No finished run, or the file says something else than the model.
        OutputError: The file is there, there is no converter, or it fails.
    """
    model = read_run(run, replies=False).parts()["model"]
    if out.exists():
        raise OutputError(f"{out} is there already: name another file with --out")
    script = converter or find_converter()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial.gguf")
    try:
        command = [sys.executable, str(script), str(model), "--outfile", str(partial), "--outtype", outtype]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not partial.is_file():
            said = (done.stderr or done.stdout).strip().splitlines() or ["it says nothing"]
            raise OutputError(f"{script} failed on {model}: {said[-1]}")
        agreement, unchecked = _read_back(model, partial)
        partial.rename(out)
    finally:
        partial.unlink(missing_ok=True)
    return Exported(
        engine="gguf",
        path=out,
        commands=(("llama-cli", "-m", str(out)), ("ollama", "create", "unlearned", "-f", "Modelfile")),
        agreement=agreement,
        unchecked=unchecked,
    )


def to_vllm(run: Path) -> Exported:
    """Looks whether a run's folder is what vLLM reads; nothing is copied.

    Args:
        run: Folder of a finished run.

    Returns:
        The folder. It is compared by ``sku evaluate --set evaluate.backend=vllm``, where vLLM is installed.

    Raises:
        EvaluationError: No finished run.
        ModelError: A file that vLLM needs is missing.
    """
    model = read_run(run, replies=False).parts()["model"]
    names = {path.name for path in model.iterdir()}
    needed = ("config.json", "tokenizer_config.json", "generation_config.json")
    missing = [name for name in needed if name not in names]
    if missing or not any(name.endswith(".safetensors") for name in names):
        raise ModelError(f"{model} lacks {', '.join(missing) or 'safetensors files'}, which vLLM reads: run again")
    there = find_spec("vllm") is not None
    return Exported(
        engine="vllm",
        path=model,
        commands=(("vllm", "serve", str(model)),),
        unchecked="sku evaluate ... --set evaluate.backend=vllm asks it beside generate"
        if there
        else "vLLM is not installed here, so it was not started",
    )


def find_converter() -> Path:
    """llama.cpp's converter, in the folder that ``LLAMA_CPP`` names or on the path.

    Raises:
        OutputError: It is in neither.
    """
    folder = os.environ.get(LLAMA_CPP)
    found = shutil.which(CONVERTER) if folder is None else str(Path(folder) / CONVERTER)
    if found is None or not Path(found).is_file():
        where = "on the path" if folder is None else f"in {folder}, which {LLAMA_CPP} names"
        raise OutputError(
            f"there is no {CONVERTER} {where}: git clone https://github.com/ggml-org/llama.cpp, and set {LLAMA_CPP} "
            "to that folder or give --converter"
        )
    return Path(found)


def _original(model: object) -> ModelConfig:
    """The base as a run's recipe names it, in float32 on the CPU: what is compared is the files, not a device."""
    assert isinstance(model, dict)
    plain = {name: model[name] for name in ("path", "revision", "gguf_file", "trust_remote_code") if name in model}
    return ModelConfig(**plain, dtype="float32", device="cpu")


def _unlearned(model: Path) -> LoadedModel:
    return load_model(ModelConfig(path=str(model), dtype="float32", device="cpu"))


def _read_back(model: Path, file: Path) -> tuple[Agreement | None, str]:
    try:
        written = load_model(ModelConfig(path=str(file.parent), gguf_file=file.name, dtype="float32", device="cpu"))
    except ModelError as error:
        return None, f"transformers can't read the file back ({error})"
    return _compared(_unlearned(model), written.model, "the GGUF file"), ""


@torch.no_grad()
def _compared(unlearned: LoadedModel, other: PreTrainedModel | PeftModel, name: str) -> Agreement:
    """The two on everyday prompts.

    Raises:
        EvaluationError: They differ in more than what rounding does.
    """
    same, positions, largest = 0, 0, 0.0
    for row in list(read_table(SourceConfig(path="sku:normal")).rows)[:_PROMPTS]:
        ids = unlearned.tokenizer(str(row["prompt"]), return_tensors="pt").input_ids
        first, second = (one(input_ids=ids).logits[0].float() for one in (unlearned.model, other))
        same += int((first.argmax(-1) == second.argmax(-1)).sum())
        positions += ids.shape[1]
        largest = max(largest, float((first - second).abs().max()))
    found = Agreement(positions=positions, same_first=same / positions, largest=largest)
    if found.same_first < _LEAST_EQUAL:
        raise EvaluationError(f"{name} is not the unlearned model: {found.words}; nothing was kept")
    return found
