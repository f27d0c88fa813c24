"""Selective Knowledge negation Unlearning for language models (arXiv 2402.10058).

The public names are listed once, in ``__init__.pyi``; each is imported when it is first used, so that ``sku --help``
does not wait for torch.
"""

import lazy_loader

from sku._version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
