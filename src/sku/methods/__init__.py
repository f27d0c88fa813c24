"""All unlearning methods, each in a file of its own, in one explicit list."""

from __future__ import annotations

from sku.errors import RecipeError, no_method_named
from sku.from_file import SUFFIX, names_in_file
from sku.methods.base import AnyMethod, Method
from sku.methods.circuit_breakers import CIRCUIT_BREAKERS
from sku.methods.dpo import DPO
from sku.methods.fine_tune import FINE_TUNE
from sku.methods.grad_diff import GRAD_DIFF, GRAD_DIFF_KL
from sku.methods.gradient_ascent import GRADIENT_ASCENT
from sku.methods.gradient_ascent_mismatch import GRADIENT_ASCENT_MISMATCH
from sku.methods.npo import NPO
from sku.methods.refusal_tuning import REFUSAL_TUNING
from sku.methods.rmu import RMU
from sku.methods.safe_unlearning import SAFE_UNLEARNING
from sku.methods.simnpo import SIMNPO
from sku.methods.sku import SKU
from sku.methods.task_vector import TASK_VECTOR

METHODS: tuple[AnyMethod, ...] = (
    SKU,
    FINE_TUNE,
    GRADIENT_ASCENT,
    GRADIENT_ASCENT_MISMATCH,
    TASK_VECTOR,
    GRAD_DIFF,
    GRAD_DIFF_KL,
    NPO,
    SIMNPO,
    RMU,
    DPO,
    REFUSAL_TUNING,
    SAFE_UNLEARNING,
    CIRCUIT_BREAKERS,
)
"""SKU and the baselines of its paper in its order, then the later and stronger ones."""


def method_named(name: str) -> AnyMethod:
    """The method of a name, or the one that a Python file defines.

    Args:
        name: Of ``METHODS``, or the path of a file ending in ``.py``.

    Returns:
        The method.

    Raises:
        RecipeError: There is none, with a suggestion, or the file can't be used.
    """
    if name.endswith(SUFFIX):
        names = names_in_file(name, "method")
        found = {id(value): value for value in names.values() if isinstance(value, Method)}
        own = [method for method in found.values() if method.objective.__module__ == names["__name__"]]
        if len(own) != 1:
            raise RecipeError(
                f"the method file {name} defines {len(own)} methods of its own; it must define one, such as MY_METHOD "
                "= Method(name=..., ...) with an objective function of the file"
            )
        return own[0]
    methods = {method.name: method for method in METHODS}
    if name not in methods:
        raise no_method_named(name, methods)
    return methods[name]
