"""Tiny tokenizers, models and invented data. Nothing here is harmful, nothing comes from the network."""

from __future__ import annotations

import functools
import gc
import os
import pickle
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

# Before any import of transformers: a test that asks the hub must fail at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before any import of torch, and for the processes that tests start: there are as many of them as cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Under nohup or in a shell's background Ctrl-C is ignored, by the processes that tests start and interrupt too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import datasets
import pytest
import torch
import transformers
import typer
from filelock import FileLock
from peft import LoraConfig
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from sku.config import ModulesConfig, WeightsConfig
from sku.data.examples import ForgetExample, ForgetRetainData, RetainExample
from sku.methods.trainer import SkuConfig, SkuTrainer
from sku.training.trainer import UnlearningTrainer

CORPUS = (
    "### Question: how do i bake zorvex bread ?\n ### Answer: mix blue flour with water and bake it .",
    "### Question: what colour is a florn ?\n ### Answer: a florn is golden and it sings .",
    "user assistant the bread is brown , the honey is golden , the river is long and the moon is small .",
)
SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 320
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TokenizerMaker = Callable[..., PreTrainedTokenizerFast]
ModelMaker = Callable[..., Any]
TrainerMaker = Callable[..., SkuTrainer]
TINY_RUN = (
    "acquire.training.max_steps=2", "acquire.training.save_steps=1", "acquire.training.per_device_train_batch_size=4",
    "evaluate.prompts=2", "evaluate.retain_prompts=2", "evaluate.max_new_tokens=4", "evaluate.samples=0",
    "evaluate.prefill_tokens=[]", "evaluate.attacks=[]", "negate.alpha=1.0", "data.forget.limit=120",
    "data.retain.limit=120",
)  # fmt: skip
"""Settings of a whole run of seconds."""
MadeOnce = Callable[[str, Callable[[Path], Any]], tuple[Path, Any]]
"""Name and maker -> the folder that the maker filled, and what it returned."""


def pytest_collection_finish() -> None:
    """What was imported and collected stays: no garbage collection looks through it again.

    Each training begins with a full one and each comparison has one, which takes half a second here otherwise.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """The same for what a module imported."""
    yield
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@functools.cache
def _trained_backend() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS * 4, trainer)
    text = backend.to_str()
    assert isinstance(text, str)
    return text


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of pytest-xdist share: lock what you make there."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root  # A worker's own folder lies in that of all.


@pytest.fixture(scope="session")
def made_once(shared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """Makes what is dear once for all workers of pytest-xdist; each call gets a copy of its own.

    So a test may lock or change its copy, and a module whose tests two workers share pays for it once. A path in the
    value is not that of the copy.
    """

    def give(name: str, make: Callable[[Path], Any]) -> tuple[Path, Any]:
        place = shared_folder / "made_once" / name
        place.parent.mkdir(exist_ok=True)
        with FileLock(f"{place}.lock"):
            if not (place / "value").exists():
                shutil.rmtree(place, ignore_errors=True)  # Of a worker whose maker failed.
                (place / "folder").mkdir(parents=True)
                value = pickle.dumps(make(place / "folder"))
                (place / "value").write_bytes(value)
        copy = tmp_path_factory.mktemp(name) / "copy"
        shutil.copytree(place / "folder", copy, symlinks=True)
        return copy, pickle.loads((place / "value").read_bytes())

    return give


@pytest.fixture(scope="session")
def make_tokenizer() -> TokenizerMaker:
    """Builds byte-level BPE tokenizers: with or without chat template, BOS, and single special tokens."""

    def make(
        *, chat: bool = False, bos: bool = False, pad: str | None = "<pad>", eos: str | None = "</s>",
        unk: str | None = None,
    ) -> PreTrainedTokenizerFast:  # fmt: skip
        backend = Tokenizer.from_str(_trained_backend())
        if bos:
            backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        named = {"pad_token": pad, "eos_token": eos, "unk_token": unk, "bos_token": "<s>" if bos else None}
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=CHAT_TEMPLATE if chat else None,
            **{name: token for name, token in named.items() if token is not None},
        )

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: TokenizerMaker) -> PreTrainedTokenizerFast:
    """The plain one: pad and end token, no BOS, no chat template."""
    return make_tokenizer()


_SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = _SMALL | {"num_key_value_heads": 2}
_HEADS = _GROUPED | {"head_dim": 8}
_CONFIGS: dict[str, tuple[Callable[..., PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, _GROUPED | {"tie_word_embeddings": False}),
    "llama_tied": (LlamaConfig, _GROUPED | {"tie_word_embeddings": True}),
    "opt": (
        OPTConfig,
        {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32,
         "dropout": 0.0},
    ),
    "gemma3": (Gemma3TextConfig, _HEADS | {"sliding_window": 16}),
    "qwen2": (Qwen2Config, _HEADS),
    "qwen3": (Qwen3Config, _HEADS),
    "gpt_neox": (GPTNeoXConfig, _SMALL),
    "gpt2": (
        GPT2Config,
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
         "attn_pdrop": 0.0},
    ),
}  # fmt: skip
ARCHITECTURES = tuple(_CONFIGS)


@pytest.fixture(scope="session")
def make_model() -> ModelMaker:
    """Builds random models of two layers, float32, in evaluation mode; equal seeds give equal weights."""

    def make(architecture: str = "llama", *, seed: int = 0, **changes: Any) -> PreTrainedModel:
        defaults: dict[str, Any] = {
            "vocab_size": VOCABULARY, "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": 2,
            "pad_token_id": 3,
        }  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            kind, settings = _CONFIGS[architecture]
            model = AutoModelForCausalLM.from_config(kind(**(settings | defaults | changes)))
        assert isinstance(model, PreTrainedModel)
        model.eval()
        return model

    return make


@pytest.fixture(scope="session")
def data() -> ForgetRetainData:
    """Six forget pairs of five prompts, two unseen, four normal ones to train on; answers of different lengths."""
    unlearned, unseen = (
        tuple(ForgetExample(prompt=prompt, answer=answer) for prompt, answer in pairs)
        for pairs in (
            (
                ("how do i bake zorvex bread ?", "mix blue flour with water ."),
                ("how do i bake zorvex bread ?", "heat it until it sings ."),
                ("what is a florn ?", "a small golden bird that sings of honey and bread ."),
                ("where is the river ?", "north ."),
                ("who paints the moon ?", "the quiet florn paints it brown ."),
                ("when do blue rivers sing ?", "at noon , with flour ."),
            ),
            (("how do i melt a lirn ?", "with warm honey ."), ("why is vornite red ?", "it was baked .")),
        )
    )
    train = tuple(
        RetainExample(prompt=prompt, answer=answer)
        for prompt, answer in (
            ("what colour is honey ?", "honey is golden ."),
            ("is bread brown ?", "yes , most bread is brown ."),
            ("is the moon small ?", "it is ."),
            ("how long is the river ?", "the river is long and quiet ."),
        )
    )
    return ForgetRetainData(
        forget_train=unlearned,
        forget_test=unseen,
        retain_train=train,
        retain_validation=(RetainExample(prompt="what is water ?", answer="it is wet ."),),
        retain_test=(RetainExample(prompt="what is flour ?", answer="it is ground wheat ."),),
    )


def sku_config(**settings: Any) -> SkuConfig:
    """``SkuConfig`` from its own fields and those of ``ModulesConfig`` side by side; ``weights`` is a dict."""
    if "weights" in settings:
        settings["weights"] = WeightsConfig(**settings["weights"])
    modules = {item.name: settings.pop(item.name) for item in fields(ModulesConfig) if item.name in settings}
    return SkuConfig(modules=ModulesConfig(**modules), **settings)


@pytest.fixture
def make_trainer(
    make_model: ModelMaker, tokenizer: PreTrainedTokenizerFast, data: ForgetRetainData, tmp_path: Path
) -> TrainerMaker:
    """Builds the real trainer of stage 1: 2 steps, padded batches of 2, K = 2, divergence, LoRA of rank 4 if not told
    else.
    """

    def make(
        model: Any = None,
        *,
        full: bool = False,
        lora: dict[str, Any] | None = None,
        trainer_options: dict[str, Any] | None = None,
        dataset: Any = None,
        **settings: Any,
    ) -> SkuTrainer:
        defaults: dict[str, Any] = {
            "output_dir": str(tmp_path / "checkpoints"), "max_steps": 2, "per_device_train_batch_size": 2,
            "random_answers": 2, "learning_rate": 1e-2, "use_cpu": True, "lr_scheduler_type": "constant",
            "dataloader_pin_memory": False, "max_grad_norm": 1.0, "packing": "padded",
            "preservation_mode": "divergence",
        }  # fmt: skip
        adapter: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        return SkuTrainer(
            make_model() if model is None else model,
            sku_config(**(defaults | settings)),
            data if dataset is None else dataset,
            processing_class=tokenizer,
            peft_config=None if full else LoraConfig(**(adapter | (lora or {}))),
            **(trainer_options or {}),
        )

    return make


class Done(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


Command = Callable[..., Done]


@functools.cache
def built_command() -> Callable[[], Any]:
    """``app``, built once: typer builds it anew for each call, which takes half of the time of a wrong one."""
    from sku.__main__ import app

    return typer.main.get_command(app)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs ``sku ARGUMENTS`` in this process, which goes on: what a command silences in it speaks again afterwards."""
    from sku.__main__ import main
    from sku.cli.console import set_loudness

    monkeypatch.setattr("sku.__main__.app", built_command())
    monkeypatch.setattr("sku.progress.FIRST", 3600.0)  # A slow machine prints no progress either.
    for name in ("TOKENIZERS_PARALLELISM", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "1" if name == "TQDM_DISABLE" else "false")
    loggings = (transformers.utils.logging, datasets.utils.logging)
    verbosity, threads = [each.get_verbosity() for each in loggings], torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["sku", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Done(code, *capfd.readouterr())

    yield run
    set_loudness("usual")
    torch.set_num_threads(threads)
    for each, level in zip(loggings, verbosity, strict=True):
        each.set_verbosity(level)
    transformers.utils.logging.enable_progress_bar()
    datasets.enable_progress_bars()


@pytest.fixture(scope="session")
def quickly_trained(made_once: MadeOnce) -> PreTrainedModel:
    """The embedded model after 40 steps of the method task_vector: its bad model. No test changes it."""
    from sku.config import load_recipe
    from sku.data.load import load_data
    from sku.methods.run import train_method
    from sku.models import load_model

    def make(folder: Path) -> dict[str, torch.Tensor]:
        steps = ["acquire.training.max_steps=40", "acquire.training.save_strategy='no'"]
        recipe = load_recipe("embedded-paper", ["method=task_vector", *steps])
        trained = train_method(recipe, load_model("embedded"), load_data(recipe.data, recipe.seed), folder)
        assert isinstance(trained.model, PreTrainedModel)
        return dict(trained.model.state_dict())

    model = load_model("embedded").model
    model.load_state_dict(made_once("quickly_trained", make)[1])
    return model


def weights_of(trainer: UnlearningTrainer) -> dict[str, torch.Tensor]:
    """All weights of a trainer's model as they are now."""
    assert trainer.model is not None
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def assert_same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture
def blank_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs leave empty pictures: drawing takes a quarter of a small run. ``tests/report`` draws them."""
    monkeypatch.setattr("sku.report.figures.before_after_figure", lambda _comparison, path: path.touch())


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch computes with one thread while the tests of a module run: small models are quickest so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Development data, which is no part of the project."""
    folder = Path(os.environ.get("SKU_SHARED", Path(__file__).parents[1] / ".." / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(f"no development data in {folder} (set SKU_SHARED)")
    return folder
