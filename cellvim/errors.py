"""What can go wrong, in words for the user: what was found, what was expected, what to do.

Every error that a user can cause is a `CellvimError`; the command line prints its message as one line and
exits with its ``exit_code``. Anything else that escapes is a bug.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class CellvimError(Exception):
    """Base of all errors that the user can mend; the message is one clear line."""

    exit_code = 2


class InputError(CellvimError, ValueError):
    """A path, file, option or value from the user cannot be used."""


class PlateError(InputError):
    """A path is not a plate that CellVim can read, or part of it cannot be read."""


class ChannelError(InputError):
    """A channel name is unknown, missing or ambiguous."""


class MetadataError(InputError):
    """A plate map or another table does not fit the plate."""


class OutputError(InputError):
    """The output exists already or cannot be written."""


class ModelError(InputError):
    """A model name, configuration or weights file cannot be used."""


class TrainingError(CellvimError):
    """A training cannot go on; what was learned up to then is kept."""


class BackendError(InputError):
    """A kernel back-end was named that is not there."""


class DeviceError(CellvimError):
    """A device cannot do what was asked of it: the whole run stops, whatever the field."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, with a line about what is kept."""


class FieldReadError(CellvimError):
    """One field's pixels cannot be read; the rest of the plate goes on."""

    exit_code = 3


class CellvimWarning(UserWarning):
    """Something the user should know about a result that was computed all the same; the message is one clear line."""


def listing(names: Iterable[object], limit: int = 12) -> str:
    """Return the names joined by commas, cut at ``limit`` with a count of the rest."""
    names = [str(n) for n in names]
    if not names:
        return "none"
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean X?`` when a known name is close to ``name``, else nothing."""
    close = get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]}?" if close else ""
