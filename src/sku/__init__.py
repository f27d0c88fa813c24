"""Selective Knowledge negation Unlearning for language models (arXiv 2402.10058).

The public names are listed once, in ``__init__.pyi``; each is imported when it is first used, so that ``sku --help``
does not wait for torch.
"""

import sys
import types

import lazy_loader

from sku._version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


class _Package(types.ModuleType):
    """Keeps ``sku.negate`` and ``sku.evaluate`` the functions, whatever was imported before.

    Importing ``sku.negate.task_vector`` would otherwise bind the folder of that name here, and the next
    ``from sku import negate`` would bring the folder.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
