"""Other libraries' words kept from the user, where ours say what there is to say."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers and PEFT: the report on loading (a new head is what we asked for), what is logged about attention that
    cannot be switched and about texts with padding tokens in them, and progress bars, which break ours."""
    from transformers.utils import logging as hf_logging

    logger, bars = logging.getLogger("transformers"), hf_logging.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        if bars:
            hf_logging.enable_progress_bar()
