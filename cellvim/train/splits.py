"""Splits into training, validation and test that hold out complete wells, plates or sources."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from cellvim.errors import InputError, MetadataError, listing, suggestion

if TYPE_CHECKING:
    import pandas as pd

GROUPS = {  # name of a split -> columns that identify what is held out
    "well": ("Metadata_Plate", "Metadata_Well"),
    "plate": ("Metadata_Plate",),
    "source": ("Metadata_Source",),
}
LEAKY = "random_by_cell"  # of the published JUMP-CP results
PARTS = ("train", "val", "test")


def split_rows(
    table: pd.DataFrame,
    by: str = "well",
    *,
    val: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
    where: str = "the data",
) -> dict[str, np.ndarray]:
    """Assign every row to training, validation or test.

    Parameters
    ----------
    table
        One row per crop, with a column ``label`` (empty for unlabelled crops) and the columns that the split needs.
    by
        "well", "plate" or "source": each of these belongs to one part, and classes are distributed as evenly as that
        allows. "random_by_cell": the split of the published JUMP-CP results. It **leaks**: neighbours in a well are in
        training and in test. Name of a column: its values are train, val and test.
    val, test
        Fraction of the rows; 0 for none.
    seed
        Random seed. Validation is drawn after the test, so the test does not depend on the validation fraction.
    where
        Name of the data, for messages.

    Returns
    -------
    dict
        "train", "val", "test" -> row numbers, ascending.

    Warns
    -----
    UserWarning
        The split leaks, or classes are missing from a part.

    Raises
    ------
    MetadataError
        A column is missing, or there are too few wells (plates, sources).

    Examples
    --------
    >>> import pandas as pd
    >>> table = pd.DataFrame({"Metadata_Plate": "P", "Metadata_Well": list("ABCDEFGH"), "label": list("xy") * 4})
    >>> {part: len(rows) for part, rows in split_rows(table, val=0, test=0.25).items()}
    {'train': 6, 'val': 0, 'test': 2}
    """
    for name, share in (("val", val), ("test", test)):
        if not 0 <= share < 1 or val + test >= 1:
            raise InputError(f"The fraction {name} is {share}; expected 0 to below 1, val and test together below 1.")
    if by in table.columns and by not in (*GROUPS, LEAKY):
        return _given(table, by, where)
    classes = _classes(table)
    if by == LEAKY:
        warnings.warn(
            f"The split '{LEAKY}' leaks: cells of one well are in training and in test, so its accuracy does not "
            "carry over to other wells. Use it to compare with published results only; otherwise split by well, plate "
            "or source.",
            stacklevel=2,
        )
        groups = np.arange(len(table))
    else:
        groups = check_groups(table, by, val=val, test=test, where=where)
    rest = np.arange(len(table))
    rows = {"val": np.zeros(0, int), "test": np.zeros(0, int)}
    for part, share, offset in (("test", test, 0), ("val", val / (1 - test), 1)):
        if share > 0:
            held_out = _hold_out(groups[rest], classes[rest], share, seed + offset)
            rows[part], rest = rest[held_out], rest[~held_out]
    rows = {"train": rest, "val": rows["val"], "test": rows["test"]}
    _warn_of_absent_classes(rows, classes, by)
    return rows


def _given(table: pd.DataFrame, column: str, where: str) -> dict[str, np.ndarray]:
    values = table[column].astype("string").str.lower().replace({"valid": "val", "validation": "val"})
    unknown = sorted(set(values.dropna()) - set(PARTS))
    if unknown:
        raise MetadataError(f"Column '{column}' of {where} has {listing(unknown)}; expected train, val or test.")
    if not (values == "train").any():
        raise MetadataError(f"Column '{column}' of {where} has no row for training; expected train, val and test.")
    return {part: np.flatnonzero((values == part).fillna(False)) for part in PARTS}


def check_groups(table: pd.DataFrame, by: str, *, val: float, test: float, where: str) -> np.ndarray:
    """Return the number of each row's well (plate, source), (n,) int64; raise if `split_rows` is not possible."""
    if by not in GROUPS:
        known = [*GROUPS, LEAKY]
        raise InputError(
            f"There is no split by '{by}'; expected {listing(known)}, or a column with train, val and test; "
            f"{where} has {listing(table.columns)}.{suggestion(by, known)}"
        )
    keys = [name for name in GROUPS[by] if name in table.columns]
    if GROUPS[by][-1] not in keys:
        raise MetadataError(
            f"A split by {by} requires {GROUPS[by][-1]}; {where} has {listing(table.columns)}. Give that column in the "
            "plate map, with --data.table or with --data.pattern, or choose another --data.split."
        )
    groups = table.groupby(keys, sort=True, observed=True, dropna=False).ngroup().to_numpy()
    classes, parts, n_groups = _classes(table), 1 + (val > 0) + (test > 0), len(np.unique(groups))
    if n_groups < parts:
        raise MetadataError(
            f"{where} has {n_groups} {by}{'s' * (n_groups != 1)}; a split by {by} requires at least {parts}, one each "
            "for training, validation and test. Use a smaller unit, or set --data.val or --data.test to 0."
        )
    names = np.unique(classes[classes != ""])
    in_one = [name for name in names if len(np.unique(groups[classes == name])) == 1]
    if parts > 1 and len(names) > 1 and len(in_one) == len(names):
        raise MetadataError(
            f"Every class of {where} lies in one {by} only ({listing(names, 6)}), so no {by} can be held out: effects "
            f"of a class cannot be distinguished from those of its {by}. Choose a label with replicates."
        )
    return groups


def _classes(table: pd.DataFrame) -> np.ndarray:
    if "label" not in table:
        return np.zeros(len(table), "<U1")
    return table["label"].astype("string").fillna("").to_numpy(dtype=str)


def _hold_out(groups: np.ndarray, classes: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return a mask of about ``share`` of the rows: complete groups, classes distributed as evenly as possible."""
    from sklearn.model_selection import StratifiedGroupKFold

    unique, first = np.unique(groups, return_index=True)
    if len(unique) == len(groups):  # groups of single rows
        return np.isin(np.arange(len(groups)), _draw_from_each_class(classes, share, seed))
    if (classes == classes[first][np.searchsorted(unique, groups)]).all():  # one class per group, as in most wells
        return np.isin(groups, unique[_draw_from_each_class(classes[first], share, seed, at_least=1)])
    folds = int(np.clip(round(1 / share), 2, len(unique)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # small classes: _warn_of_absent_classes warns if they are absent
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        _, held_out = next(splitter.split(np.zeros(len(groups)), classes, groups))
    mask = np.zeros(len(groups), bool)
    mask[held_out] = True
    if not mask.any():  # an empty fold, if there are too many folds for the groups
        mask = groups == np.random.default_rng(seed).choice(unique)
    return mask


def _draw_from_each_class(classes: np.ndarray, share: float, seed: int, *, at_least: int = 0) -> np.ndarray:
    """Draw a fraction of the members of each class; ``at_least`` of them unless the class would have none left."""
    generator = np.random.default_rng(seed)
    chosen: list[int] = []
    for name in np.unique(classes):
        members = generator.permutation(np.flatnonzero(classes == name))
        count = round(share * len(members)) or min(at_least, len(members) - 1)
        chosen += members[:count].tolist()
    if at_least and not chosen:  # every class has one member only
        chosen = [int(generator.integers(len(classes)))]
    return np.array(chosen, int)


def _warn_of_absent_classes(rows: dict[str, np.ndarray], classes: np.ndarray, by: str) -> None:
    everywhere = set(classes) - {""}
    absent = {
        part: sorted(everywhere - set(classes[chosen]))
        for part, chosen in rows.items()
        if len(chosen) and everywhere - set(classes[chosen])
    }
    if absent:
        parts = "; ".join(f"{part}: {listing(names, 6)}" for part, names in absent.items())
        warnings.warn(f"Some classes are absent from parts of the split by {by} ({parts}).", stacklevel=3)
