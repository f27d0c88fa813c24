"""One step of stage 1 on tensors without content, to see how much lies in memory at once and what is computed.

The real model code and the real losses run (torch's ``FakeTensorMode``), so whatever the architecture keeps for its
backward pass is counted and not guessed. Only the rows are made up: all as long as the longest.

Shapes: R = rows, T = tokens of a row, N = kept positions, V = vocabulary.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedModel

from sku.errors import ModelError
from sku.losses import answer_nll, token_kl
from sku.models import plain_model
from sku.plan.job import Job, model_of
from sku.training.layers import adapter_inputs_as_they_are, decoder_layers

_FEW, _MORE = 2, 4
"""Numbers of decoder layers that are traced; memory and work grow by the same amount with every further one."""


@dataclass(frozen=True, kw_only=True)
class StepTrace:
    """What one forward and backward pass takes, without weights, gradients and optimizer."""

    activation_bytes: int
    """Most that lies in memory at once besides weights and gradients."""
    peak_bytes: int
    """The same with those gradients of trained weights that exist at that moment."""
    flops: int
    """Of matrix products and attention; one multiply-add is two."""


def trace_step(job: Job) -> StepTrace:
    """Traces the step of a job.

    Args:
        job: What is trained on what.

    Returns:
        Memory of one process before anything is sharded, and its work.

    Raises:
        ModelError: The architecture can't be run without content, as where experts are chosen by what a token says.
        RecipeError: The adapter doesn't fit.
    """
    layers: int = job.config.get_text_config().num_hidden_layers
    if layers <= _MORE:
        return _joined(*_traced(job, layers))
    (phases, flops), (more_phases, more_flops) = _traced(job, _FEW), _traced(job, _MORE)

    def grown(few: int, more: int) -> int:
        return few + (layers - _FEW) * (more - few) // (_MORE - _FEW)

    return _joined(
        [[grown(*ends) for ends in zip(*both, strict=True)] for both in zip(phases, more_phases, strict=True)],
        grown(flops, more_flops),
    )


class AllocationCount(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on and still in use, and the work.

    ``FlopCounterMode`` beside it would hold recomputed activations in memory.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.live = 0
        self.gradients = 0
        self._known: dict[int, Any] = {}
        self.phases = [[0, 0]]
        """Peaks with the gradients of trained weights, and without: until the backward pass is in the middle of the
        layers, and from there on. Within each the peak grows evenly with the number of layers; the larger of the two
        need not."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation and counts the memory of what it gives."""
        made = func(*args, **(kwargs or {}))
        self.flops += _flops(func, args, kwargs or {}, made)
        self.count(leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor))
        return made

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Counts the memory of tensors that is not counted yet."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known[key] = weakref.ref(storage, partial(self._forget, key, size))
                self.live += size
        peak = self.phases[-1]
        peak[:] = max(peak[0], self.live), max(peak[1], self.live - self.gradients)

    def _forget(self, key: int, size: int, _storage: object) -> None:
        self._known.pop(key, None)
        self.live -= size


def _flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], made: Any) -> int:
    """Of one operation, as torch counts them; it knows attention on GPUs alone."""
    aten = torch.ops.aten
    operation = func._overloadpacket
    if operation is aten._scaled_dot_product_flash_attention_for_cpu:
        return int(sdpa_flop_count(args[0].shape, args[1].shape, args[2].shape))
    if operation is aten._scaled_dot_product_flash_attention_for_cpu_backward:
        return int(sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4])))
    formula = flop_registry.get(operation)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=made))


def _joined(phases: list[list[int]], flops: int) -> StepTrace:
    return StepTrace(
        peak_bytes=max(phase[0] for phase in phases), activation_bytes=max(phase[1] for phase in phases), flops=flops
    )


def _traced(job: Job, layers: int) -> tuple[list[list[int]], int]:
    """The phases of a pass, without weights, and its work."""
    model = model_of(job, layers)
    if job.checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        if isinstance(model, PeftModel):
            model.enable_input_require_grads()
    reference = model_of(job, layers) if job.copies_reference else None
    model.train()
    try:
        with FakeTensorMode():
            for one in filter(None, (model, reference)):
                _give_storage(one)
            return _run(job, model, reference)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise ModelError(
            f"the memory of {job.name} can't be traced: what its layers compute depends on the data ({error}), as "
            "where experts are chosen for each token"
        ) from error


def _run(
    job: Job, model: PreTrainedModel | PeftModel, reference: PreTrainedModel | PeftModel | None
) -> tuple[list[list[int]], int]:
    counter = AllocationCount()
    for one in filter(None, (model, reference)):
        counter.count([*one.parameters(), *one.buffers()])
    weights = counter.live

    def grown(parameter: Tensor) -> None:
        assert parameter.grad is not None
        counter.gradients += parameter.grad.nbytes

    def passed(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if args[0].requires_grad:
            args[0].register_hook(
                lambda _gradient: counter.phases.append([0, 0]) if len(counter.phases) == 1 else None
            )

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(grown)
    layers = decoder_layers(plain_model(model))[1]
    cast = nullcontext() if job.autocast is None else torch.autocast("cpu", job.autocast)
    with counter, cast, adapter_inputs_as_they_are(model, autocast=job.autocast is not None):
        handle = layers[len(layers) // 2].register_forward_pre_hook(passed)
        loss = _loss(job, model, reference, handle)
        loss.backward()
    return [[peak - weights for peak in phase] for phase in counter.phases], counter.flops


def _loss(
    job: Job, model: PreTrainedModel | PeftModel, reference: PreTrainedModel | PeftModel | None, handle: Any
) -> Tensor:
    """The sum of stage 1's terms on rows of the greatest length, as the trainer computes them."""
    logits_NV = _logits(job, model, job.rows)
    handle.remove()  # Only the pass that is trained has a backward pass.
    terms: list[Tensor] = []
    start = 0
    for kind, rows in (("forget", int(job.forget)), ("mismatched", job.mismatched), ("retain", job.retain)):
        count = job.examples * rows * job.answer_tokens
        if not count:
            continue
        part_NV = logits_NV[torch.arange(start, start + count)]
        start += count
        if kind != "retain":
            terms.append(answer_nll(part_NV, torch.zeros(count, dtype=torch.long)).sum())
            continue
        if job.keeps_reference:
            terms.append(token_kl(part_NV.detach().clone(), part_NV).sum())
            continue
        adapter_off = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
        with torch.no_grad(), adapter_off:
            said_NV = _logits(job, model if reference is None else reference, job.examples * rows)
            said_NV = said_NV[torch.arange(count)]
        terms.append(token_kl(said_NV, part_NV).sum())
    return torch.stack(terms).sum()


def _logits(job: Job, model: PreTrainedModel | PeftModel, rows: int) -> Tensor:
    length = job.row_tokens
    outputs = model(
        input_ids=torch.zeros(rows, length, dtype=torch.long),
        # What transformers makes of the padding mask, which would have to be looked at.
        attention_mask=torch.ones(rows, 1, length, length, dtype=torch.bool),
        position_ids=torch.arange(length).expand(rows, length),
        logits_to_keep=job.answer_tokens,
        use_cache=False,
    )
    logits: Tensor = outputs.logits
    return logits.flatten(0, 1)


def _give_storage(model: nn.Module) -> None:
    """Puts tensors that have a device, but still no content, in the place of those on ``meta``; tied ones once."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                if id(parameter) not in made:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                    made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
