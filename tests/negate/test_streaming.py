"""Negation from file to file gives the bits of negation in memory, and refuses what that refuses."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from conftest import ModelMaker
from negate.conftest import assert_same_bits, disturbed, with_adapter
from sku.errors import ModelError, OutputError, RecipeError, TaskVectorError
from sku.negate import arithmetic
from sku.negate.adapters import AdapterVector
from sku.negate.arithmetic import Rounding
from sku.negate.files import ADAPTER_FILE
from sku.negate.streaming import negate_folders
from sku.negate.task_vector import TaskVector, negate, save_unlearned
from sku.storage import BAD_MODEL_MARK, mark_hazardous

FILE = "model.safetensors"
DTYPES = {"same": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny models in many blocks; in memory the factors of an adapter are multiplied in the same ones."""
    monkeypatch.setattr(arithmetic, "BLOCK_ELEMENTS", 1000)


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


class Folders:
    """A base and the three forms of a bad model on disk."""

    def __init__(self, path: Path, base: Any, tokenizer: Any, *, shards: str = "5GB", bad_shards: str = "5GB") -> None:
        self.path = path
        self.base = path / "base"
        base.save_pretrained(self.base, max_shard_size=shards)
        bad = disturbed(base)
        bad.save_pretrained(path / "model", max_shard_size=bad_shards)
        for folder in (self.base, path / "model"):
            tokenizer.save_pretrained(folder)
        mark_hazardous(path / "model")
        options = {"fan_in_fan_out": True} if base.config.model_type == "gpt2" else {}
        with_adapter(base, **options).save_pretrained(str(path / "adapter"))
        TaskVector.between(base, bad).save(path / "vector")

    def check(self, form: str, alpha: float, dtype: torch.dtype | None, tokenizer: Any) -> None:
        """Both ways, compared."""
        out, expected = self.path / "out", self.path / "expected"
        model = negate(self.base, self.path / form, alpha, output_dtype=dtype)
        shutil.rmtree(expected, ignore_errors=True)
        save_unlearned(model, tokenizer, expected)
        negate_folders(self.base, self.path / form, out, alpha, output_dtype=dtype)
        assert_same_bits(stored(out), stored(expected))
        loaded = AutoModelForCausalLM.from_pretrained(out)
        assert loaded.dtype == model.dtype
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, loaded.state_dict()[name]), name
        shutil.rmtree(out)


@pytest.mark.parametrize(
    ("architecture", "stored_as"),
    [("llama", None), ("gpt2", None), ("llama_tied", torch.bfloat16)],
)
def test_streamed_is_in_memory_bit_for_bit(
    architecture: str, stored_as: torch.dtype | None, make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:  # fmt: skip
    base = make_model(architecture).to(stored_as or torch.float32)
    with torch.no_grad():
        next(base.parameters())[0] = -0.0  # -0.0 - 0 * x would be +0.0 for x < 0.
    folders = Folders(tmp_path, base, tokenizer, shards="40KB", bad_shards="90KB")
    for form, alpha, dtype in (
        ("model", 0.7, torch.float32), ("model", 0.3, torch.bfloat16), ("adapter", 1.0, torch.float16),
        ("adapter", 0.7, None), ("vector", 2.5, None),
    ):  # fmt: skip
        folders.check(form, alpha, dtype, tokenizer)
    for rounding in get_args(Rounding):
        record = negate_folders(folders.base, tmp_path / "model", tmp_path / rounding, 0.0, rounding=rounding).record
        assert_same_bits(stored(tmp_path / rounding), stored(folders.base))
        assert (record.changed_weights, record.survival) == (0, 1.0)


@pytest.mark.parametrize(
    "options",
    [
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 32}},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_adapters_by_the_settings_that_peft_reads(
    options: dict[str, Any], make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base = make_model()
    folders = Folders(tmp_path, base, tokenizer)
    with_adapter(base, **options).save_pretrained(str(tmp_path / "other"))
    folders.check("other", 1.0, None, tokenizer)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("form", ["model", "adapter"])
def test_a_tied_pair_that_is_stored_twice_stays_one(
    form: str, make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The base stores both copies, its bad model one: transformers ties them, so both become the same."""
    base = make_model("llama_tied")
    folders = Folders(tmp_path, base, tokenizer)
    if form == "adapter":
        adapter = with_adapter(base, target_modules=["embed_tokens"])
        TaskVector.from_factors(AdapterVector.of(adapter)).save(tmp_path / "other")
        form = "other"
    tensors = stored(folders.base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folders.base / "model.safetensors", {"format": "pt"})
    model = negate(folders.base, tmp_path / form)
    negate_folders(folders.base, tmp_path / form, tmp_path / "out")
    after = stored(tmp_path / "out")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], tensors["lm_head.weight"])
    assert_same_bits(
        {name: after[name] for name in model.state_dict()}, {n: t.detach() for n, t in model.state_dict().items()}
    )


def test_a_bad_model_that_stores_the_tied_pair_twice_or_under_its_other_name(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folders = Folders(tmp_path, make_model("llama_tied"), tokenizer)
    negate_folders(folders.base, tmp_path / "model", tmp_path / "expected")
    tensors = stored(tmp_path / "model")
    shared = tensors.pop("model.embed_tokens.weight")
    for name, more in (("both", {"model.embed_tokens.weight": shared.clone()}), ("other", {})):
        shutil.copytree(tmp_path / "model", tmp_path / name)
        save_file(tensors | {"lm_head.weight": shared} | more, tmp_path / name / "model.safetensors", {"format": "pt"})
        negate_folders(folders.base, tmp_path / name, tmp_path / f"from_{name}")
        assert_same_bits(stored(tmp_path / f"from_{name}"), stored(tmp_path / "expected"))


def test_the_new_folder_is_cut_and_named_like_the_base(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folders = Folders(tmp_path, make_model(), tokenizer, shards="40KB")
    (folders.base / "README.md").write_text("The base is good at its work.")
    (folders.base / "LICENSE").write_text("Terms.")
    (folders.base / "pytorch_model.bin").write_bytes(b"other weights")
    before = {path.name: path.read_bytes() for path in folders.base.iterdir()}
    out = tmp_path / "out"
    negated = negate_folders(folders.base, tmp_path / "model", out)
    assert negated.left_out == ("README.md", "pytorch_model.bin")
    assert {path.name for path in out.iterdir()} == before.keys() - set(negated.left_out)
    assert not (out / BAD_MODEL_MARK).exists()
    assert (out / "LICENSE").read_text() == "Terms."
    for path in out.glob("*.safetensors"):
        size = int.from_bytes(before[path.name][:8], "little") + 8
        assert path.read_bytes()[:size] == before[path.name][:size]
    assert {path.name: path.read_bytes() for path in folders.base.iterdir()} == before, "the base is only read"
    assert json.loads((out / "config.json").read_text()) == json.loads(before["config.json"])
    assert {path.name for path in tmp_path.iterdir()} == {"base", "model", "adapter", "vector", "out"}
    assert out.stat().st_mode & 0o777 == 0o755


def test_another_type_is_told_in_config_and_index(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folders = Folders(tmp_path, make_model(), tokenizer, shards="40KB")
    negate_folders(folders.base, tmp_path / "model", tmp_path / "out", output_dtype=torch.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    sizes = [
        json.loads((folder / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
        for folder in (folders.base, tmp_path / "out")
    ]
    assert sizes[0] == 2 * sizes[1]


def test_integers_and_constants_of_old_checkpoints_go_along(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Position ids are compared; causal masks and rotary frequencies, which only old files hold, are not asked for."""
    folders = Folders(tmp_path, make_model(), tokenizer)
    old = {
        "model.position_ids": torch.arange(5),
        "model.layers.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(4),
    }
    base, bad = folders.base / "model.safetensors", tmp_path / "model" / "model.safetensors"
    save_file(load_file(base) | old, base, {"format": "pt"})
    with pytest.raises(TaskVectorError, match=r"position_ids is torch\.int64 and differs"):
        negate_folders(folders.base, tmp_path / "model", tmp_path / "out")
    save_file(load_file(bad) | {"model.position_ids": torch.arange(5)}, bad, {"format": "pt"})
    record = negate_folders(folders.base, tmp_path / "model", tmp_path / "out", output_dtype=torch.bfloat16).record
    after = stored(tmp_path / "out")
    assert_same_bits({name: after[name] for name in old}, old)
    assert record.changed_weights == len(after) - 3


def test_threads_do_not_change_a_bit(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folders = Folders(tmp_path, make_model().to(torch.bfloat16), tokenizer)
    for form in ("model", "adapter"):
        first, second = (tmp_path / f"{form}{threads}" for threads in (1, 4))
        one = negate_folders(folders.base, tmp_path / form, first, 0.3, rounding="stochastic", threads=1)
        four = negate_folders(folders.base, tmp_path / form, second, 0.3, rounding="stochastic", threads=4)
        assert one.record == four.record
        assert_same_bits(stored(first), stored(second))


def test_stochastic_rounding_keeps_a_change_that_rounding_to_nearest_drops(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Changes of 1e-4 of each weight are a fortieth of half a bfloat16 step."""
    base = make_model().to(torch.bfloat16)
    bad = copy.deepcopy(base).float()
    with torch.no_grad():
        for parameter in bad.parameters():
            parameter.mul_(1.0001)
    for name, model in (("base", base), ("bad", bad)):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    calls: tuple[tuple[Rounding, int], ...] = (("nearest", 0), ("stochastic", 0), ("stochastic", 1))
    nearest, by_chance, other = (
        negate_folders(
            tmp_path / "base", tmp_path / "bad", tmp_path / f"{rounding}{seed}", rounding=rounding, seed=seed
        ).record
        for rounding, seed in calls
    )
    assert nearest.survival < 0.01
    assert by_chance.survival == pytest.approx(1.0, abs=0.15)
    assert (other.rounding, other.rounding_seed) == ("stochastic", 1)
    first, second = (stored(tmp_path / f"stochastic{seed}") for seed in (0, 1))
    assert any(not torch.equal(tensor, second[name]) for name, tensor in first.items())


# --- any set of tensors


SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)


@st.composite
def tensor_sets(draw: st.DrawFn) -> dict[str, Tensor]:
    """Small tensors of mixed types; none, one or three dimensions; empty ones too."""
    kinds = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool])
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    return {
        f"part.{number}.w{'é' * draw(st.integers(0, 1))}": torch.randn(shape, generator=generator).to(dtype)
        for number, (shape, dtype) in enumerate(draw(st.lists(st.tuples(SHAPES, kinds), min_size=1, max_size=6)))
    }


@given(tensors=tensor_sets(), alpha=st.sampled_from([0.0, 1.0, 0.3]), result=st.sampled_from(sorted(DTYPES)),
       cut=st.integers(0, 6), block=st.integers(1, 50))  # fmt: skip
@settings(
    max_examples=40, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)  # fmt: skip
def test_any_set_of_tensors(
    tensors: dict[str, Tensor], alpha: float, result: str, cut: int, block: int,
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By the equation itself, element by element, in a base of two shards and a bad model of one."""
    monkeypatch.setattr(arithmetic, "BLOCK_ELEMENTS", block)
    tmp_path = tmp_path_factory.mktemp("any")
    base, bad = tmp_path / "base", tmp_path / "bad"
    for folder in (base, bad):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    names = list(tensors)
    place = {name: f"model-0000{1 + (number >= cut)}-of-00002.safetensors" for number, name in enumerate(names)}
    for file in set(place.values()):
        save_file({name: tensors[name] for name in names if place[name] == file}, base / file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    moved = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(moved, bad / "model.safetensors")
    if not any(tensor.is_floating_point() and tensor.numel() for tensor in tensors.values()):
        with pytest.raises(TaskVectorError, match="equal"):
            negate_folders(base, bad, tmp_path / "out", alpha)
        return
    negate_folders(base, bad, tmp_path / "out", alpha, output_dtype=DTYPES[result])
    after = stored(tmp_path / "out")
    assert after.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = tensor
        if tensor.is_floating_point():
            if alpha:
                expected = tensor.float() + -alpha * (moved[name].float() - tensor.float())
            expected = expected.to(DTYPES[result] or tensor.dtype)
        assert_same_bits({name: after[name]}, {name: expected})


# --- what is refused


@pytest.fixture
def folders(make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Folders:
    """An untied Llama."""
    return Folders(tmp_path, make_model(), tokenizer)


UP = "model.layers.0.mlp.up_proj.weight"
A = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
EMBEDDING = "model.embed_tokens.weight"
Tensors = dict[str, Tensor]


def beyond_float16(tensors: Tensors) -> None:
    tensors[EMBEDDING].view(-1)[-1:].fill_(1e5)


UNFIT: tuple[tuple[str, Callable[[Tensors], object], dict[str, Any], str], ...] = (
    # Whose tensors are changed, how, other arguments, and what the error names.
    ("model", lambda t: t.pop(UP), {}, UP),
    ("model", lambda t: t.update({UP: torch.ones(3, 4)}), {}, UP),
    ("base", lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), {}, UP),
    ("model", lambda t: t[UP].fill_(math.nan), {}, UP),
    ("model", lambda t: t[UP].fill_(-1e38), {"alpha": 10.0}, UP),
    ("adapter", lambda t: [part.zero_() for name, part in t.items() if "lora_B" in name], {}, "adapter"),
    ("adapter", lambda t: t.pop(A), {}, A),
    ("adapter", lambda t: t.update({A: t[A][:, :5].clone()}), {}, "up_proj"),
    # In a tensor that an adapter leaves alone, and at alpha 0 in one that changes.
    ("base", beyond_float16, {"form": "adapter", "output_dtype": torch.float16}, EMBEDDING),
    ("base", beyond_float16, {"form": "vector", "alpha": 0.0, "output_dtype": torch.float16}, EMBEDDING),
)


def check_refused(folders: Folders, error: type[Exception], key: str, form: str = "model", **options: Any) -> None:
    before = sorted(folders.path.iterdir())
    with pytest.raises(error) as caught:
        negate_folders(folders.base, folders.path / form, folders.path / "out", **options)
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(folders.path.iterdir()) == before, "nothing is left"


@pytest.mark.parametrize(("place", "change", "options", "key"), UNFIT)
def test_weights_that_do_not_fit(
    place: str, change: Callable[[Tensors], object], options: dict[str, Any], key: str, folders: Folders
) -> None:
    [path] = (folders.path / place).glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    check_refused(folders, TaskVectorError, key, **{"form": "adapter" if place == "adapter" else "model", **options})


def test_what_is_refused(folders: Folders) -> None:
    check_refused(folders, TaskVectorError, "stage 1", "base")
    check_refused(folders, ModelError, "nothing", "nothing")
    for options in ({"alpha": math.nan}, {"alpha": -1.0}, {"rounding": "up"}, {"threads": 0}):
        check_refused(folders, RecipeError, next(iter(options)), **options)
    shutil.copyfile(folders.base / FILE, folders.path / "model" / FILE)
    check_refused(folders, TaskVectorError, "stage 1")
    (folders.path / "adapter" / ADAPTER_FILE).unlink()
    check_refused(folders, ModelError, ADAPTER_FILE, "adapter")
    (folders.base / FILE).rename(folders.base / "pytorch_model.bin")
    check_refused(folders, ModelError, "pytorch_model.bin")
    config = folders.base / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "gptq"}}))
    check_refused(folders, ModelError, "gptq")
    config.unlink()
    check_refused(folders, ModelError, "config.json")


def test_a_disk_too_small_and_an_input_that_changes_meanwhile(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = folders.path / "model" / FILE
    with pytest.raises(ModelError, match=str(file)):
        negate_folders(
            folders.base, folders.path / "model", folders.path / "out", progress=lambda done, total: os.utime(file)
        )
    monkeypatch.setattr("sku.storage.free_bytes", lambda folder: 1000)
    with pytest.raises(OutputError, match="out"):
        negate_folders(folders.base, folders.path / "model", folders.path / "out")
    assert not list(folders.path.glob("*out*"))
