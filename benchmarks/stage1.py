"""One step of stage 1 as the paper describes it against ours, padded, flat and as a tree. All in one run.

    python benchmarks/stage1.py --model models/smollm2-135m-instruct --gguf-file SmolLM2-135M-Instruct.Q4_1.gguf

A step is the forward pass and the backward of the three modules on the same token ids, weights 2.5, 2.5 and 1; the
optimizer, equal on all sides, is left out. ``naive`` is written from the paper's description: one padded batch and one
forward pass a module, scores at every position, a second model beside the first. The other ways are those of the
setting ``packing``, through the trainer. ``+bf16`` runs a way under bfloat16 autocast, ``+bf16+casts`` with what PEFT
casts there and the trainer does not (``adapter_inputs_as_they_are``).

Loss and gradient of every way are compared with those of the first one before anything is timed; where they differ,
the run ends with exit code 1 and no figure. Tokens are random: nothing harmful is read or written.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import importlib.util
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import processor_name
from peft import LoraConfig, PeftModel
from stage1_naive import NaiveBatch, naive_loss
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from sku.config import ModelConfig, ModulesConfig, WeightsConfig
from sku.data.batches import ROWS, JointCollator, JointExample
from sku.data.examples import RowType
from sku.data.joint import JointDataset
from sku.data.tokens import IGNORE_INDEX, TokenizedExample
from sku.methods.trainer import SkuConfig, SkuTrainer
from sku.model_files import embedded_model_path
from sku.models import LoadedModel, load_model, plain_model
from sku.training import adapter_inputs_as_they_are

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
        "vocab_size": 1024,
    },
    "llama-2-7b": {},  # The defaults of LlamaConfig.
}  # fmt: skip
WEIGHTS = (2.5, 2.5, 1.0)
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-2, 1e-1)}
"""Type of the arithmetic -> largest relative difference of the loss, and of the gradient as one vector. Autocast alone
moves the gradient of the naive step by 3.4e-2 on SmolLM2-135M."""


@dataclass(kw_only=True)
class Way:
    """One way to take the step."""

    name: str
    step: Callable[[Sequence[JointExample]], Tensor]
    """Loss of a batch, ready for its backward."""
    autocast: bool
    casts: bool = False
    """Whether the inputs of an adapter are cast under autocast, as PEFT does by itself."""
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def pass_of(self, model: nn.Module, batch: Sequence[JointExample], device: torch.device) -> Tensor:
        """One forward and backward pass; gives the loss."""
        with adapter_inputs_as_they_are(model, autocast=self.autocast and not self.casts):
            with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
                loss = self.step(batch)
            loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()


def main() -> None:
    """Compares, measures and prints."""
    options = _options()
    torch.manual_seed(options.seed)
    loaded = _load(options)
    batches = [_examples(options, loaded, number) for number in range(options.batches)]
    trainer = _trainer(options, loaded, batches)
    model = trainer.model
    assert isinstance(model, nn.Module)
    ways = [_way(name, trainer, loaded) for name in options.ways]
    _print_head(options, loaded, batches)
    _check_equal(ways, model, batches[0], loaded)
    for way in ways:
        # Sets up what later steps find. Memory is measured here: with the heap trimmed, a step takes longer.
        held = _start_memory(loaded.model.device)
        _timed(way, model, batches[0], loaded.model.device)
        way.peak_bytes = _peak_memory(loaded.model.device) - held
        way.seconds.clear()
        way.processor.clear()
    for number in range(options.steps):
        # In turn, so that a slow minute of the machine meets all ways.
        for way in ways:
            _timed(way, model, batches[number % len(batches)], loaded.model.device)
    _print_results(options, ways, loaded, model, batches)
    if options.trl:
        _print_trl(options, trainer, loaded, batches)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The step of stage 1, naive against padded, flat and tree.")
    parser.add_argument("--model", default="embedded", help="folder of the model")
    parser.add_argument("--gguf-file", help="GGUF file in that folder")
    parser.add_argument("--shape", choices=SHAPES, help="a Llama of this shape, random weights, in place of a model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="type of the weights")
    parser.add_argument(
        "--tuning",
        choices=("full", "lora", "lora-all"),
        default="full",
        help="lora: rank 32 on q_proj, v_proj; lora-all: rank 16 on all linear layers",
    )
    parser.add_argument("--ways", nargs="+", help="of naive, padded, flat, tree, also with +bf16 or +bf16+casts")
    parser.add_argument("--batch", type=int, default=2, help="joint examples of a step")
    parser.add_argument("--k", type=int, default=5, help="answers of other prompts for each prompt")
    parser.add_argument("--prompt", type=int, default=30, help="mean tokens of a prompt")
    parser.add_argument("--answer", type=int, default=90, help="mean tokens of an answer")
    parser.add_argument("--normal", type=int, default=45, help="mean tokens of a normal example, prompt and answer")
    parser.add_argument("--spread", type=float, default=0.6, help="sigma of the lognormal lengths, cut at 3 means")
    parser.add_argument(
        "--batches", type=int, default=6, help="batches in turn: lengths differ much from one to the next"
    )
    parser.add_argument(
        "--steps", type=int, default=6, help="timed steps of each way; the figures are means over them"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing, in every way")
    parser.add_argument(
        "--trl", action="store_true", help="race TRL's packed SFT, where installed, on the harmful rows"
    )
    options = parser.parse_args()
    if options.ways is None:
        options.ways = ["naive", "naive+bf16", "padded", "flat", "tree", "tree+bf16"]
        if options.dtype == "bfloat16":
            options.ways = ["naive", "padded", "flat", "tree"]
    for name in options.ways:
        kind, _, extra = name.partition("+")
        if kind not in ("naive", "padded", "flat", "tree") or extra not in ("", "bf16", "bf16+casts"):
            parser.error(f"{name} is no way: naive, padded, flat or tree, alone or with +bf16 or +bf16+casts")
    return options


class Examples(JointDataset):
    """Joint examples that were made elsewhere."""

    def __init__(self, examples: Iterable[JointExample]) -> None:
        """Holds them; nothing is tokenized."""
        self._made = list(examples)

    def __len__(self) -> int:
        """How many."""
        return len(self._made)

    def __getitem__(self, index: int) -> JointExample:
        """One of them."""
        return self._made[index]

    def fixed_rows(self, kind: int, _examples: int) -> list[TokenizedExample] | None:
        """As of ``JointDataset``: the normal rows, each once."""
        if kind != RowType.RETAIN:
            return None
        return [row for example in self._made for row in example.of(RowType.RETAIN)]


def _load(options: argparse.Namespace) -> LoadedModel:
    if options.shape is None:
        return load_model(ModelConfig(path=options.model, gguf_file=options.gguf_file, dtype=options.dtype))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            LlamaConfig(**SHAPES[options.shape]), dtype=getattr(torch, options.dtype)
        )
    # No text is read; the trainer asks a tokenizer for its pad token.
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    return LoadedModel(model=model.eval(), tokenizer=tokenizer, name=options.shape, revision=None)


def _examples(options: argparse.Namespace, loaded: LoadedModel, number: int) -> list[JointExample]:
    """A batch of joint examples of random tokens, with the lengths that were asked for."""
    rng = random.Random(f"{options.seed}/{number}")
    vocabulary = plain_model(loaded.model).get_input_embeddings().weight.shape[0]

    def ids(mean: int) -> tuple[int, ...]:
        # A lognormal with median m has the mean m exp(sigma^2 / 2).
        drawn = mean * rng.lognormvariate(-(options.spread**2) / 2, options.spread)
        return tuple(rng.randrange(5, vocabulary) for _ in range(max(2, min(round(drawn), 3 * mean))))

    def row(prompt: tuple[int, ...], answer: tuple[int, ...], place: int) -> TokenizedExample:
        labels = (*(IGNORE_INDEX,) * len(prompt), *answer)
        return TokenizedExample(
            input_ids=(*prompt, *answer), labels=labels, answer_start=len(prompt), example_id=place
        )

    examples = []
    for place in range(number * options.batch, (number + 1) * options.batch):
        prompt = ids(options.prompt)
        harmful = [(RowType.FORGET, row(prompt, ids(options.answer), place))]
        harmful += [(RowType.MISMATCHED, row(prompt, ids(options.answer), place)) for _ in range(options.k)]
        normal = row(ids(options.normal // 3), ids(options.normal - options.normal // 3), place)
        examples.append(JointExample(rows=(*harmful, (RowType.RETAIN, normal)), forget_index=place))
    return examples


def _trainer(
    options: argparse.Namespace, loaded: LoadedModel, batches: Sequence[Sequence[JointExample]]
) -> SkuTrainer:
    """The trainer of stage 1, whose model has moved away from the original, so that the divergence is not 0."""
    settings = SkuConfig(
        output_dir=tempfile.mkdtemp(prefix="sku-stage1-"), max_steps=1, use_cpu=loaded.model.device.type == "cpu",
        modules=ModulesConfig(
            weights=WeightsConfig(
                guided_distortion=WEIGHTS[0], random_disassociation=WEIGHTS[1], preservation_divergence=WEIGHTS[2]
            ),
            random_answers=options.k, preservation_mode="divergence", preservation_cap=None,
        ),
        packing="tree",
        activation_checkpointing=options.checkpointing,
    )  # fmt: skip
    targets: dict[str, Any] = {"r": 32, "target_modules": ["q_proj", "v_proj"]}
    if options.tuning == "lora-all":
        targets = {"r": 16, "target_modules": "all-linear"}
    adapter = LoraConfig(lora_alpha=32, task_type="CAUSAL_LM", **targets)
    trainer = SkuTrainer(
        copy.deepcopy(loaded.model) if options.tuning == "full" else loaded.model,
        settings,
        Examples(example for batch in batches for example in batch),
        processing_class=loaded.tokenizer,
        peft_config=None if options.tuning == "full" else adapter,
    )
    assert isinstance(trainer.model, nn.Module)
    if options.checkpointing:
        plain_model(trainer.model).gradient_checkpointing_enable({"use_reentrant": False})
        trainer.model.train()
    with torch.no_grad():
        # The original model is asked before anything moves, as training does.
        trainer.compute_loss(
            trainer.model,
            trainer._prepare_inputs(JointCollator("tree")(list(batches[0]))),
        )
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                # lora_B is all 0 at first.
                size = 0.05 * float(parameter.float().std(correction=0)) if parameter.any() else 0.01
                parameter.add_(torch.randn_like(parameter) * size)
    return trainer


def _way(name: str, trainer: SkuTrainer, loaded: LoadedModel) -> Way:
    kind, _, extra = name.partition("+")
    precision: dict[str, Any] = {"autocast": extra != "", "casts": extra == "bf16+casts"}
    model = trainer.model
    assert isinstance(model, nn.Module)
    if kind == "naive":
        # A second model beside the first, as the authors' code has.
        teacher = (
            _without_adapter(model)
            if isinstance(model, PeftModel)
            else loaded.model.requires_grad_(requires_grad=False)
        )

        def naive(examples: Sequence[JointExample]) -> Tensor:
            batch = NaiveBatch.of(examples, int(loaded.tokenizer.pad_token_id), loaded.model.device)
            return naive_loss(model, teacher, batch, WEIGHTS)

        return Way(name=name, step=naive, **precision)
    packing: Any = kind
    collator = JointCollator(packing, pad_token_id=int(loaded.tokenizer.pad_token_id))

    def ours(examples: Sequence[JointExample]) -> Tensor:
        loss: Tensor = trainer.compute_loss(model, trainer._prepare_inputs(collator(list(examples))))
        return loss

    return Way(name=name, step=ours, **precision)


def _without_adapter(model: PeftModel) -> nn.Module:
    copied = copy.deepcopy(model).unload()
    assert isinstance(copied, nn.Module)
    return copied.eval().requires_grad_(requires_grad=False)


def _gradient(way: Way, model: nn.Module, batch: Sequence[JointExample], device: torch.device) -> tuple[float, Tensor]:
    model.zero_grad()
    loss = way.pass_of(model, batch, device)
    gradients = [weight.grad.float().flatten().cpu() for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    return float(loss), torch.cat(gradients)


def _check_equal(ways: Sequence[Way], model: nn.Module, batch: Sequence[JointExample], loaded: LoadedModel) -> None:
    """Ends the run where a way computes something else than the first one."""
    device = loaded.model.device
    first_loss, first = _gradient(ways[0], model, batch, device)
    print(f"loss       {first_loss:.7f} ({ways[0].name})")
    unequal = []
    for way in ways[1:]:
        loss, gradient = _gradient(way, model, batch, device)
        loss_error = abs(loss - first_loss) / abs(first_loss)
        gradient_error = float((gradient - first).norm() / first.norm())
        narrow = way.autocast or ways[0].autocast or loaded.model.dtype != torch.float32
        limits = TOLERANCES[torch.bfloat16 if narrow else torch.float32]
        fits = loss_error <= limits[0] and gradient_error <= limits[1]
        unequal += [] if fits else [way.name]
        print(
            f"equal      {way.name}: relative difference of the loss {loss_error:.1e} (limit {limits[0]:.0e}), of the "
            f"gradient {gradient_error:.1e} (limit {limits[1]:.0e}){'' if fits else '  DIFFERS'}"
        )
    if unequal:
        sys.exit(f"void: {', '.join(unequal)} and {ways[0].name} don't compute the same; nothing was timed")


def _timed(way: Way, model: nn.Module, batch: Sequence[JointExample], device: torch.device) -> None:
    model.zero_grad()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started, worked = time.perf_counter(), time.process_time()
    way.pass_of(model, batch, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    way.seconds.append(time.perf_counter() - started)
    way.processor.append(time.process_time() - worked)


def _start_memory(device: torch.device) -> int:
    """Bytes held now; the high-water mark starts again from here."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    marks = Path("/proc/self/clear_refs")
    if marks.exists():
        ctypes.CDLL(None).malloc_trim(0)  # What was freed before would hide what a step takes.
        marks.write_text("5", encoding="ascii")
    return _status("VmRSS")


def _peak_memory(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    path = Path("/proc/self/status")
    if not path.exists():
        return 0
    lines = dict(line.split(":", 1) for line in path.read_text(encoding="utf-8").splitlines() if ":" in line)
    return int(lines[name].split()[0]) * 1024


def _print_head(options: argparse.Namespace, loaded: LoadedModel, batches: Sequence[Sequence[JointExample]]) -> None:
    device = loaded.model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()
    print(f"machine    {name}, {torch.get_num_threads()} threads")
    print(f"versions   torch {torch.__version__}, transformers {transformers.__version__}")
    print(f"model      {loaded.name}, {options.dtype}, {options.tuning}")
    print(f"step       {options.batch} joint examples, K = {options.k}, weights {WEIGHTS}, no optimizer")
    counted = [_tokens(batch) for batch in batches]
    for kind in ("padded by module", "padded", "flat", "tree"):
        print(f"tokens     {kind}: {statistics.mean(count[kind] for count in counted):.0f} a step")


def _tokens(batch: Sequence[JointExample]) -> dict[str, int]:
    modules = NaiveBatch.of(batch, 0, torch.device("cpu"))
    padded, flat, tree = (
        JointCollator(packing)(list(batch))["input_ids"].numel() for packing in ("padded", "flat", "tree")
    )
    by_module = sum(part.input_ids.numel() for part in modules.parts)
    return {"padded by module": by_module, "padded": padded, "flat": flat, "tree": tree}


def _useful_flops(model: nn.Module, batch: Sequence[JointExample], full: bool) -> float:
    """Matrix products that the step can't do without: each distinct token once, scores where they count."""
    head = plain_model(model).get_output_embeddings()  # type: ignore[arg-type]
    head_size = head.weight.numel()
    body = sum(
        module.weight.numel()
        for name, module in plain_model(model).named_modules()  # type: ignore[arg-type]
        if isinstance(module, nn.Linear) and module is not head and "lora_" not in name
    )
    packed = JointCollator("tree")(list(batch))[ROWS]
    normal = packed.of_kind(RowType.RETAIN)
    passes = 3 if full else 2  # Forward, gradient of the inputs, and of the weights where they are trained.
    trained = 2 * (body * packed.input_ids.numel() + head_size * len(packed.model_inputs["logits_to_keep"])) * passes
    return trained + 2 * (body * normal.input_ids.numel() + head_size * len(normal.model_inputs["logits_to_keep"]))


def _gemm_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large square product: what this machine gives at best."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        started = time.perf_counter()
        _ = a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def _print_results(
    options: argparse.Namespace, ways: Sequence[Way], loaded: LoadedModel, model: nn.Module,
    batches: Sequence[Sequence[JointExample]],
) -> None:  # fmt: skip
    device = loaded.model.device
    useful = statistics.mean(_useful_flops(model, batch, options.tuning == "full") for batch in batches)
    # The same number for all ways: what the rows hold, each without its last token, which predicts nothing.
    raw = statistics.mean(_tokens(batch)["flat"] for batch in batches)
    peaks = {dtype: _gemm_peak(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    print(
        f"peak       {peaks[torch.float32] / 1e12:.3g} TFLOP/s float32, {peaks[torch.bfloat16] / 1e12:.3g} bfloat16, "
        "measured; MFU is of the tree's matrix products"
    )
    second = sum(weight.numel() * weight.element_size() for weight in loaded.model.parameters())
    for way in ways:
        narrow = way.autocast or loaded.model.dtype == torch.bfloat16
        seconds = statistics.fmean(way.seconds)
        mfu = useful / seconds / peaks[torch.bfloat16 if narrow else torch.float32]
        extra = f" + {second / 2**30:.2f} for the second model" if way.name.startswith("naive") else ""
        print(
            f"{way.name:<15} {seconds:.3f} s ({statistics.fmean(way.processor):.3f} s of processor time), "
            f"{raw / seconds:,.0f} tokens/s, MFU {100 * mfu:.1f} %, {way.peak_bytes / 2**30:.2f} GiB{extra}"
        )
    for base in (way for way in ways if way.name.startswith("naive") or way.casts):
        for way in ways:
            if not way.name.startswith("naive") and not way.casts:
                wall = sum(base.seconds) / sum(way.seconds)
                work = sum(base.processor) / sum(way.processor)
                print(f"ratio      {base.name} / {way.name}: {wall:.2f} x ({work:.2f} x of processor time)")


def _print_trl(
    options: argparse.Namespace, trainer: SkuTrainer, loaded: LoadedModel, batches: Sequence[Sequence[JointExample]]
) -> None:
    if importlib.util.find_spec("trl") is None:
        print("trl        skipped: it is not installed (pip install 'trl>=1.16')")
        return
    from stage1_trl import race

    print(f"trl        {race(trainer, loaded, batches, steps=options.steps)}")


if __name__ == "__main__":
    main()
