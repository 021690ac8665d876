"""Keeps libraries from telling what people at a console did not ask."""

import warnings

import datasets
import transformers


def silence_libraries() -> None:
    """Their progress bars and deprecation notes: the console tells what matters here."""
    warnings.simplefilter("ignore", FutureWarning)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
