"""Models for other engines: what is written says what the unlearned model says, or isn't kept."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from conftest import ModelMaker
from negate.conftest import with_adapter
from sku.config import ModelConfig
from sku.errors import EvaluationError, ModelError, OutputError
from sku.export import find_converter, to_adapter, to_gguf, to_vllm
from sku.models import load_model
from test_models import write_gguf


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the parts that a test puts into it."""
    folder = tmp_path / "run"

    def read(given: Path, *, replies: bool) -> Any:
        assert (given, replies) == (folder, False)
        names = {"model": "unlearned", "adapter": "negated_adapter"}
        parts = {part: folder / name for part, name in names.items() if (folder / name).is_dir()}
        model = {"path": str(tmp_path / "base"), "dtype": "auto"}
        recipe = {"model": model, "method": "sku", "acquire": {"twin": "none"}}
        return SimpleNamespace(folder=folder, parts=lambda: parts, recipe=recipe, negates=True)

    monkeypatch.setattr("sku.export.read_run", read)
    return folder


@pytest.fixture
def quantized(run: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """A GGUF file with the weights of the run's model."""
    file = tmp_path / "made" / "tiny.gguf"
    file.parent.mkdir()
    write_gguf(file, tokenizer)
    loaded = load_model(ModelConfig(path=str(file.parent), gguf_file=file.name, device="cpu"))
    loaded.model.save_pretrained(run / "unlearned")
    loaded.tokenizer.save_pretrained(run / "unlearned")
    return file


def converter(path: Path, body: str) -> Path:
    """A script that is called as llama.cpp's is."""
    path.write_text(
        "import shutil, sys\n"
        "model, out = sys.argv[1], sys.argv[sys.argv.index('--outfile') + 1]\n"
        f"assert sys.argv[sys.argv.index('--outtype') + 1] == 'q8_0'\n{body}\n"
    )
    return path


def test_a_gguf_file_is_read_back(run: Path, quantized: Path, tmp_path: Path) -> None:
    script = converter(tmp_path / "c.py", f"shutil.copy({str(quantized)!r}, out)")
    done = to_gguf(run, tmp_path / "new" / "out.gguf", converter=script, outtype="q8_0")
    assert done.path.read_bytes() == quantized.read_bytes()
    assert done.agreement is not None
    assert (done.agreement.same_first, done.agreement.positions > 50) == (1.0, True)
    assert done.agreement.largest < 1e-4
    assert [path.name for path in done.path.parent.iterdir()] == ["out.gguf"]
    with pytest.raises(OutputError, match="is there already"):
        to_gguf(run, done.path, converter=script)


def test_a_gguf_file_of_another_model_is_not_kept(
    run: Path, quantized: Path, make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    make_model(seed=5).save_pretrained(run / "unlearned")
    script = converter(tmp_path / "c.py", f"shutil.copy({str(quantized)!r}, out)")
    with pytest.raises(EvaluationError, match="the GGUF file is not the unlearned model: the same token first at"):
        to_gguf(run, tmp_path / "out.gguf", converter=script, outtype="q8_0")
    assert not list(tmp_path.glob("*.gguf")) + list(tmp_path.glob(".*.gguf"))


def test_what_transformers_cant_read_is_kept_and_said(run: Path, quantized: Path, tmp_path: Path) -> None:
    done = to_gguf(
        run, tmp_path / "out.gguf", converter=converter(tmp_path / "c.py", "open(out, 'w').write('x')"), outtype="q8_0"
    )
    assert done.agreement is None
    assert "transformers can't read the file back" in done.unchecked


def test_a_converter_that_fails_or_is_missing_is_one_line(
    run: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = converter(tmp_path / "c.py", "raise NotImplementedError('unknown tokenizer')")
    with pytest.raises(OutputError, match=r"c\.py failed on .*unlearned: NotImplementedError: unknown tokenizer"):
        to_gguf(run, tmp_path / "out.gguf", converter=script, outtype="q8_0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    with pytest.raises(OutputError, match="no convert_hf_to_gguf.py on the path: git clone"):
        to_gguf(run, tmp_path / "out.gguf")
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(OutputError, match="which LLAMA_CPP names"):
        find_converter()
    (tmp_path / "convert_hf_to_gguf.py").write_text("")
    assert find_converter() == tmp_path / "convert_hf_to_gguf.py"


def test_an_adapter_says_what_the_model_says(
    run: Path, make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base = make_model()
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted: Any = with_adapter(base)
    adapted.save_pretrained(run / "negated_adapter")
    adapted.merge_and_unload().save_pretrained(run / "unlearned")
    tokenizer.save_pretrained(run / "unlearned")
    with pytest.raises(OutputError, match=r"bad model's with its sign turned.*--i-know-this-is-the-bad-model"):
        to_adapter(run, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    done = to_adapter(run, tmp_path / "adapter", acknowledged=True)
    assert done.agreement is not None
    assert done.agreement.same_first == 1.0
    assert (tmp_path / "adapter" / "adapter_config.json").is_file()
    make_model(seed=3).save_pretrained(run / "unlearned")
    with pytest.raises(EvaluationError, match="the adapter on its base is not the unlearned model"):
        to_adapter(run, tmp_path / "other", acknowledged=True)
    assert not (tmp_path / "other").exists()


def test_a_run_without_an_adapter(run: Path, quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="has no adapter, only a whole model"):
        to_adapter(run, tmp_path / "adapter")


def test_vllm_reads_the_folder_itself(run: Path, quantized: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "unlearned" / "generation_config.json").write_text("{}")
    monkeypatch.setattr("sku.export.find_spec", lambda name: None)
    assert to_vllm(run).unchecked == "vLLM is not installed here, so it was not started"
    monkeypatch.setattr("sku.export.find_spec", lambda name: object())
    done = to_vllm(run)
    assert (done.path, done.commands[0][:2]) == (run / "unlearned", ("vllm", "serve"))
    assert "evaluate.backend=vllm" in done.unchecked
    (run / "unlearned" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"lacks config\.json, which vLLM reads"):
        to_vllm(run)
