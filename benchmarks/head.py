"""What does it cost never to hold all scores? Cross-entropy and KL of a head, all at once and chunk by chunk.

    python benchmarks/head.py                                     # Gemma-3-270m's head on 1,024 positions
    python benchmarks/head.py --rows 64 --vocabulary 5000         # a short try

One run measures both ways on the same hidden states, for a frozen head (LoRA) and a trained one (full fine-tuning),
each forward and backward. Losses and gradients are compared first; where they differ the timing is void and the
command ends with 1. Each case runs in a process of its own, one warm-up and then ``--repeats`` times: the time is the
median, the memory is what the process grew by at its highest (on a GPU what torch allocated), inputs and the gradient
of the head's weight included.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from machine import processor_name
from torch import Tensor

from sku.losses import CHUNK_BYTES, Head, HeadScores, answer_nll, token_kl

WAYS = ("all at once", "in chunks")
_MEGABYTE = 2**20


@dataclass(frozen=True, kw_only=True)
class Case:
    """One loss, one way, one kind of head."""

    loss: str
    way: str
    trained: bool
    rows: int
    width: int
    vocabulary: int
    dtype: str
    device: str
    chunk_rows: int | None
    repeats: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a case cost."""

    seconds: float
    megabytes: float


def main() -> int:
    """Compares, measures and prints.

    Returns:
        0, or 1 where the two ways differ.
    """
    options = _options()
    rows_of_a_chunk = options.chunk_rows or max(1, CHUNK_BYTES // (4 * options.vocabulary))
    print(f"machine   {_machine(options.device)}, {options.threads} threads")
    print(f"versions  torch {torch.__version__}")
    print(f"head      {options.vocabulary} x {options.width}, {options.dtype}; chunks of {rows_of_a_chunk} positions")
    logits = 4 * options.rows * options.vocabulary / _MEGABYTE
    print(f"positions {options.rows}: {logits:.0f} MB of float32 scores")
    apart = _largest_difference(options)
    tolerance = 1e-5 if options.dtype == "float32" else 2e-2
    print(f"equal     largest difference {apart:.1e} of the largest entry, on 64 positions (at most {tolerance:g})")
    if not apart <= tolerance:
        print("the two ways differ, so that there is nothing to time", file=sys.stderr)
        return 1
    print("loss  head     way           ms      MB")
    for loss in ("CE", "KL"):
        for trained in (False, True):
            measured = {way: _in_own_process(_case(options, loss, way, trained=trained)) for way in WAYS}
            head = "trained" if trained else "frozen"
            for way, cost in measured.items():
                print(f"{loss:5} {head:8} {way:12} {1000 * cost.seconds:7.1f} {cost.megabytes:7.0f}")
            whole, chunked = (measured[way] for way in WAYS)
            print(
                f"{loss:5} {head:8} ratio        {whole.seconds / chunked.seconds:6.2f}x "
                f"{whole.megabytes / max(chunked.megabytes, 1):6.1f}x"
            )
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Losses of a head, all scores at once against chunk by chunk.")
    parser.add_argument("--rows", type=int, default=1024, help="positions whose next token counts")
    parser.add_argument("--vocabulary", type=int, default=262144, help="of Gemma 3 by default")
    parser.add_argument("--width", type=int, default=640, help="of the hidden states, Gemma-3-270m's by default")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--chunk-rows", type=int, help="positions of a chunk; those of training where left out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def _case(options: argparse.Namespace, loss: str, way: str, *, trained: bool) -> Case:
    names = ("rows", "width", "vocabulary", "dtype", "device", "chunk_rows", "repeats", "threads")
    return Case(loss=loss, way=way, trained=trained, **{name: getattr(options, name) for name in names})


def _step(case: Case) -> tuple[Callable[[], Tensor], HeadScores]:
    """One forward and backward pass of a case, and what its gradients are found in."""
    generator = torch.Generator(case.device).manual_seed(0)
    dtype: torch.dtype = getattr(torch, case.dtype)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator, device=case.device)).to(dtype)

    weight_VH = draw(case.vocabulary, case.width, scale=case.width**-0.5).requires_grad_(case.trained)
    head = Head(weight_VH=weight_VH, chunk_rows=case.chunk_rows)
    scores = HeadScores(hidden_NH=draw(case.rows, case.width).requires_grad_(), head=head)
    targets_N = torch.randint(case.vocabulary, (case.rows,), generator=generator, device=case.device)
    reference = HeadScores(
        hidden_NH=(scores.hidden_NH + draw(case.rows, case.width)).detach(),
        head=Head(weight_VH=weight_VH.detach(), chunk_rows=case.chunk_rows),
    )
    weights_N = torch.rand(case.rows, generator=generator, device=case.device)

    def step() -> Tensor:
        scores.hidden_NH.grad = weight_VH.grad = None
        made = scores if case.way == "in chunks" else scores.logits()
        if case.loss == "CE":
            loss_N = answer_nll(made, targets_N)
        else:
            loss_N = token_kl(reference if case.way == "in chunks" else reference.logits(), made)
        (loss_N * weights_N).sum().backward()
        return loss_N.detach()

    return step, scores


def _largest_difference(options: argparse.Namespace) -> float:
    """Between the two ways, over losses and gradients, as a part of the largest entry."""
    small = argparse.Namespace(**vars(options) | {"rows": min(64, options.rows)})
    if not small.chunk_rows:
        small.chunk_rows = 24
    apart = 0.0
    for loss in ("CE", "KL"):
        results = []
        for way in WAYS:
            step, scores = _step(_case(small, loss, way, trained=True))
            loss_N = step()
            results.append((loss_N, scores.hidden_NH.grad, scores.head.weight_VH.grad))
        for first, second in zip(*results, strict=True):
            assert first is not None
            assert second is not None
            largest = float(first.abs().max())
            apart = max(apart, float((first.float() - second.float()).abs().max()) / largest)
    return apart


def _in_own_process(case: Case) -> Measured:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (case,))


def _measure(case: Case) -> Measured:
    torch.set_num_threads(case.threads)
    on_gpu = case.device.startswith("cuda")
    _step(_case_of_size(case, 2))[0]()  # What the first call sets up is no part of the growth.
    before = _forget_peak(on_gpu=on_gpu)
    step, _ = _step(case)
    times = []
    for _ in range(case.repeats + 1):
        started = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return Measured(seconds=statistics.median(times[1:]), megabytes=(_peak(on_gpu=on_gpu) - before) / _MEGABYTE)


def _case_of_size(case: Case, rows: int) -> Case:
    return Case(**vars(case) | {"rows": rows, "vocabulary": 64})


def _forget_peak(*, on_gpu: bool) -> int:
    """Bytes in use now, from which the highest is counted from here on."""
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _peak(*, on_gpu: bool) -> int:
    """Bytes at the highest since then."""
    return torch.cuda.max_memory_allocated() if on_gpu else _status("VmHWM")


def _status(name: str) -> int:
    """Bytes of a line of this process's status, of Linux."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").split("\n"):
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {name}")


def _machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return processor_name()


if __name__ == "__main__":
    sys.exit(main())
