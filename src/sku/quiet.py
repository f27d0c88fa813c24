"""Silence of the libraries, whose lines would break ours."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_imports() -> None:
    """Silences what libraries say while they are imported, without importing one."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")  # Read when tqdm is imported, so before the libraries below.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # It warns of a missing CPU kernel when imported.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Silences bars and notices of libraries, whose lines would break ours. Warnings of Python stay, but for one."""
    quiet_imports()
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    # PEFT 0.21 reads the old name in every get_peft_model, which no user can mend.
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
