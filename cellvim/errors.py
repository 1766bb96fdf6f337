"""Exceptions and warnings. Their messages state what was found, what was expected and what to do.

Every error that a user can cause is a `CellvimError`; the command line prints its message as one line and exits with
its ``exit_code``. Any other exception is a bug.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class CellvimError(Exception):
    """Base class of all errors that the user can fix; the message is one line."""

    exit_code = 2


class InputError(CellvimError, ValueError):
    """A path, file, option or value from the user cannot be used."""


class PlateError(InputError):
    """A path is not a plate that CellVim can read, or a part of it cannot be read."""


class ChannelError(InputError):
    """A channel name is unknown, missing or ambiguous."""


class MetadataError(InputError):
    """A plate map or another table does not match the plate."""


class OutputError(InputError):
    """The output exists already or cannot be written."""


class ModelError(InputError):
    """A model name, configuration or weights file cannot be used."""


class TrainingError(CellvimError):
    """A training cannot continue; its last checkpoint is kept."""


class BackendError(InputError):
    """A back end is unknown, not available, or does not support its inputs."""


class DeviceError(CellvimError):
    """A device failed or cannot run the model, which stops the run whatever the field."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a message about the results that are kept."""


class FieldReadError(CellvimError):
    """The pixels of one field cannot be read; the other fields are processed."""

    exit_code = 3


class CellvimWarning(UserWarning):
    """A possible problem with a result that was computed nevertheless; the message is one line."""


def listing(names: Iterable[object], limit: int = 12) -> str:
    """Return the names joined by commas, cut at ``limit`` with a count of the rest."""
    names = [str(n) for n in names]
    if not names:
        return "none"
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean X?`` if a known name is similar to ``name``, otherwise an empty string."""
    close = get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""


def check_seed(seed: int) -> None:
    """Check that NumPy, PyTorch and scikit-learn accept a random seed.

    Raises
    ------
    InputError
        It is negative or has more than 32 bits.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"The seed is {seed}; expected 0 to {2**32 - 1}.")
