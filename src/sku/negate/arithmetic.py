"""``base - alpha * (bad - base)`` on pieces of tensors, and the account of it; in memory and from file to file alike.

Whole tensors would take several times the model's size in temporary ones, and most of the time goes to getting that
memory from the system. Pieces stay in a core's cache, and each thread has one set of buffers.

Stochastic rounding goes up or down by chance, so that on average nothing is lost. Gupta et al., Deep Learning with
Limited Numerical Precision, 2015 (https://arxiv.org/abs/1502.02551). Rounding to nearest drops each change below half
a step of the shorter type; this keeps it as the chance of a whole step.

Shapes: O = outputs of a layer, I = its inputs, r = rank of an adapter.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import torch
from torch import Tensor

from sku.errors import TaskVectorError

BLOCK_ELEMENTS = 2 * 2**20
"""Elements of a tensor that are held in memory together, and at which a new seed of stochastic rounding begins."""
PIECE = 2**18
"""Elements that are computed together. Few enough that intermediate results stay in a processor's cache; enough that
the time goes to arithmetic: threads of Python wait for each other between two operations."""
MOST_THREADS = 4
"""More don't help: memory or disk is the limit by then."""
_LOST = 2.0**-64
"""A float32 sum below it may have lost squares that are too small for float32; above it, none that count."""
_SERIAL_PIECE = 2**15
"""The most that torch computes without waking its other threads, whose meeting costs more than such a piece."""
Rounding = Literal["nearest", "stochastic"]
"""How float32 results become those of a shorter type."""
EMPTY_ADAPTER = "the adapter is zero: stage 1 changed nothing, so there is nothing to negate"
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, kw_only=True)
class Negation:
    """What a subtraction did, for the manifest."""

    alpha: float
    task_vector_norm: float
    base_norm: float
    """Euclidean norm of the original weights that were changed."""
    changed_weights: int
    """Number of tensors, tied ones once."""
    dtype: str
    """Type of the result."""
    survival: float
    """Projection of the applied change on the wanted one: 1 when rounding to ``dtype`` lost nothing."""
    rounding: Rounding
    rounding_seed: int
    """Of the stochastic rounding; the nearest one draws nothing."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums of squares and products, right to one part in 10,000: see ``dot_in_cache``."""

    base: float = 0.0
    """Of the original weights, squared."""
    difference: float = 0.0
    """Of the task vector, squared."""
    wanted: float = 0.0
    """Of the wanted change, squared."""
    applied: float = 0.0
    """Of the applied change times the wanted one."""

    @property
    def survival(self) -> float:
        """Projection of the applied change on the wanted one; 1 where none was wanted."""
        return self.applied / self.wanted if self.wanted else 1.0

    @staticmethod
    def total(parts: Sequence[Sums]) -> Sums:
        """The sum over several blocks or tensors."""
        names = [field.name for field in dataclasses.fields(Sums)]
        return Sums(**{name: sum(getattr(part, name) for part in parts) for name in names})

    def check_finite(self, name: str, dtype: torch.dtype) -> None:
        """Refuses a weight whose difference or result is not finite.

        A sum of squares is finite exactly where all its terms are: no float32 squared is too large for float64.
        """
        if not math.isfinite(self.difference):
            raise unusable_difference(name)
        if not math.isfinite(self.wanted) or not math.isfinite(self.applied):
            raise unusable_result(name, dtype)


class Arithmetic(threading.local):
    """What one block comes to, computed in buffers that each thread has of its own."""

    def __init__(self) -> None:
        super().__init__()
        self._buffers = torch.empty(3, PIECE)

    def subtract(
        self, base: Tensor, other: Tensor, result: Tensor, alpha: float, *, is_difference: bool, draws: Tensor | None
    ) -> Sums:
        """Subtracts flat tensors of one length in float32 and rounds once; alpha 0 copies ``base``.

        Args:
            base: Original weights.
            other: The bad model's, or the difference itself.
            result: Takes the result in its own type.
            alpha: How much.
            is_difference: Whether ``other`` is the difference.
            draws: Uniform numbers for stochastic rounding; None rounds to nearest.

        Returns:
            The sums. One of them is not finite where a difference or a result is not.
        """
        parts = []
        for piece in _pieces(base):
            own = None if draws is None else draws[piece]
            parts.append(self._piece(base[piece], other[piece], result[piece], alpha, is_difference, own))
        return Sums.total(parts)

    def _piece(
        self, base: Tensor, other: Tensor, result: Tensor, alpha: float, is_difference: bool, draws: Tensor | None
    ) -> Sums:
        weight, change, after = self._buffers[:, : base.numel()]
        weight.copy_(base)
        change.copy_(other)
        if not is_difference:
            change.sub_(weight)
        base_square = dot_in_cache(weight, weight)
        difference_square = dot_in_cache(change, change)
        if alpha == 0:
            _round(base, result, draws)  # -0.0 - 0 * x would already turn a bit.
            broken = math.inf if overflows(base, result) else 0.0
            return Sums(base=base_square, difference=difference_square, applied=broken)
        change.mul_(-alpha)
        torch.add(weight, change, out=after)
        _round(after, result, draws)
        after.copy_(result).sub_(weight)
        return Sums(
            base=base_square,
            difference=difference_square,
            wanted=difference_square * alpha * alpha,
            applied=dot_in_cache(after, change),
        )


def convert(base: Tensor, result: Tensor, draws: Tensor | None) -> bool:
    """Gives weights that stay as they are another type; returns whether all that is finite stayed so."""
    for piece in _pieces(base):
        _round(base[piece], result[piece], None if draws is None else draws[piece])
        if overflows(base[piece], result[piece]):
            return False
    return True


def subtract_tensors(
    weights: Mapping[str, Tensor],
    others: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    alpha: float,
    *,
    are_differences: bool,
) -> Sums:
    """``Arithmetic.subtract`` tensor by tensor, on any device, in the blocks in which files are subtracted.

    Returns:
        The sums over all tensors of ``others``, which may be some of the weights.

    Raises:
        TaskVectorError: A difference or a result is not finite.
    """
    arithmetic = Arithmetic()
    parts = []
    with torch.no_grad(), block_pool(min(MOST_THREADS, torch.get_num_threads())) as pool:
        for name, other in others.items():
            target = targets[name]
            base, changed = _flat(weights[name]), _flat(other)
            direct = target.device.type == "cpu" and target.is_contiguous()
            result = target.detach().view(-1) if direct else torch.empty(base.numel(), dtype=target.dtype)

            def block(start: int, base: Tensor = base, changed: Tensor = changed, result: Tensor = result) -> Sums:
                piece = slice(start, start + BLOCK_ELEMENTS)
                return arithmetic.subtract(
                    base[piece], changed[piece], result[piece], alpha, is_difference=are_differences, draws=None
                )

            sums = Sums.total(list(pool.map(block, range(0, base.numel(), BLOCK_ELEMENTS))))
            if not direct:
                target.copy_(result.view(target.shape))
            sums.check_finite(name, target.dtype)
            parts.append(sums)
    return Sums.total(parts)


@contextmanager
def block_pool(threads: int) -> Iterator[Executor]:
    """Threads for the blocks; torch itself takes one in each of them."""
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # The pool is the parallelism; its threads begin with this number.
    try:
        with ThreadPoolExecutor(threads, "negate") as pool:
            yield pool
    finally:
        torch.set_num_threads(torch_threads)


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """``scaling * B A``, the change of one weight, or its transpose."""

    upper_Or: Tensor
    """B."""
    lower_rI: Tensor
    """A."""
    scaling: float = 1.0
    transposed: bool = False
    """The model keeps the weight as ``[I, O]``: embeddings and GPT-2's layers."""
    of_embedding: bool = False

    @property
    def rank(self) -> int:
        """R."""
        return self.lower_rI.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the change, as the model keeps the weight."""
        made = (self.upper_Or.shape[0], self.lower_rI.shape[1])
        return made[::-1] if self.transposed else made

    @property
    def alpha(self) -> int:
        """PEFT's ``lora_alpha``; it takes other numbers than whole ones, too."""
        return self.scaling * self.rank  # type: ignore[return-value]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the change, as the model keeps the weight, from one to before another: float32."""
        if self.transposed:
            return (self.upper_Or @ self.lower_rI[:, start:stop]).T * self.scaling
        return self.upper_Or[start:stop] @ self.lower_rI * self.scaling

    def delta(self) -> Tensor:
        """All rows, block by block: a product of the whole need not agree with that of some rows in the last bit."""
        rows, columns = self.shape
        step = block_rows(columns)
        blocks = [self.rows(start, min(start + step, rows)) for start in range(0, rows, step)]
        return torch.cat(blocks) if len(blocks) > 1 else blocks[0]

    def file_names(self, weight: str) -> tuple[str, str]:
        """Names of B and A in the adapter's file."""
        layer = f"base_model.model.{weight.removesuffix('.weight')}"
        form = "{}.lora_embedding_{}" if self.of_embedding else "{}.lora_{}.weight"
        return form.format(layer, "B"), form.format(layer, "A")


def block_rows(columns: int) -> int:
    """Rows of a matrix that make up one block; at least one."""
    return max(1, BLOCK_ELEMENTS // max(1, columns))


def dot_float64(first: Tensor, second: Tensor) -> float:
    """The sum of all products of two tensors of one shape, each product and the sum in float64."""
    pairs = zip(first.reshape(-1).split(_SERIAL_PIECE), second.reshape(-1).split(_SERIAL_PIECE), strict=True)
    # Not ``dot``: its library wakes all threads even for this little.
    return sum(float(one.double().mul_(other.double()).sum()) for one, other in pairs)


def dot_in_cache(first: Tensor, second: Tensor) -> float:
    """The sum of all products of two pieces: in float32 where that holds it, in float64 elsewhere.

    A float32 sum over a piece is right to one part in 10,000, mostly to one in 1,000,000, takes a third of the time
    of one over float64 copies, and is checked for what it can't hold: numbers whose squares overflow or vanish. It is
    finite exactly where all products are, and 0 only where all are.
    """
    found = float(first.dot(second))
    if _LOST < abs(found) < math.inf:
        return found
    if found == 0 and first.numel() and first.amax() == 0 and first.amin() == 0:  # ``any`` takes 3 times as long.
        return 0.0
    return dot_float64(first, second)


def _pieces(tensor: Tensor) -> Iterator[slice]:
    return (slice(at, at + PIECE) for at in range(0, tensor.numel(), PIECE))


def _flat(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().reshape(-1)


def _round(values: Tensor, result: Tensor, draws: Tensor | None) -> None:
    if draws is None or values.dtype == result.dtype:
        result.copy_(values)
    else:
        result.copy_(round_stochastically(values.float(), result.dtype, draws))


def round_stochastically(values: Tensor, dtype: torch.dtype, draws: Tensor) -> Tensor:
    """Rounds to one of the two neighbours in a shorter type, to the nearer one with the greater chance.

    Values are float32 and finite, draws uniform in [0, 1). What the type has is kept, the sign of zero too; the mean
    over the draws is the value, as far as the type reaches.
    """
    nearest = values.to(dtype)
    rest = values - nearest.float()  # Exact: both lie within half a step.
    bits = nearest.view(_INTEGERS[dtype.itemsize])
    away_from_zero = torch.where((rest < 0) == torch.signbit(nearest), 1, -1).to(bits.dtype)
    other = (bits + away_from_zero).view(dtype)
    smallest = torch.ones_like(bits).view(dtype)
    other = torch.where(nearest == 0, torch.copysign(smallest, rest.to(dtype)), other)
    gap = (other.float() - nearest.float()).abs()
    # Where the value is kept, the neighbour's bits may stand for anything.
    return torch.where((rest != 0) & (draws * gap < rest.abs()), other, nearest)


def overflows(values: Tensor, rounded: Tensor) -> bool:
    """Whether a finite number became infinite in a type of a smaller range."""
    largest = torch.finfo(rounded.dtype).max
    if largest >= torch.finfo(values.dtype).max or not values.numel():
        return False
    low, high = values.detach().aminmax()
    if -largest <= low.item() and high.item() <= largest:  # False for NaN, too.
        return False
    return bool((values.isfinite() & ~rounded.isfinite()).any())


def draws_for(seed: int, name: str, block: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1), float32, that depend on nothing but their place: seed, tensor and block."""
    digest = sha256(f"{seed}\0{name}\0{block}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, generator=generator)


def unusable_difference(name: str) -> TaskVectorError:
    """The refusal of a difference with values that are not finite."""
    return TaskVectorError(f"the difference of {name} holds NaN or infinity; the bad model is unusable")


def unusable_result(name: str, dtype: object) -> TaskVectorError:
    """The refusal of a result with values that are not finite."""
    return TaskVectorError(f"{name} would hold NaN or infinity in {dtype}; lower alpha or keep float32")


def check_same_names(first: Iterable[str], second: Iterable[str], first_name: str, second_name: str) -> None:
    """Refuses two sets of weights with different names.

    Raises:
        TaskVectorError: With the first name that is in one set only, and how many there are.
    """
    first_names, second_names = set(first), set(second)
    for only, here, there in (
        (first_names - second_names, first_name, second_name), (second_names - first_names, second_name, first_name),
    ):  # fmt: skip
        if only:
            raise TaskVectorError(f"{len(only)} weights are in {here} but not in {there}, the first is {min(only)}")


def check_same_shape(name: str, first: Any, second: Any) -> None:
    """Refuses weights of one name and two shapes.

    Raises:
        TaskVectorError: With both shapes.
    """
    if tuple(first.shape) != tuple(second.shape):
        raise TaskVectorError(
            f"{name} has shape {tuple(first.shape)} in one model and {tuple(second.shape)} in the other"
        )


def quantized_weight(name: str, dtype: object) -> TaskVectorError:
    """The refusal of a weight that is no floating-point number of at least two bytes."""
    return TaskVectorError(
        f"{name} is {dtype}: quantized weights have no exact difference. Use full-precision weights"
    )
