"""Which crops are for training, validation and test: whole wells, plates or sources, never parts of them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np

from cellvim.errors import InputError, MetadataError, listing, suggestion

if TYPE_CHECKING:
    import pandas as pd

GROUPS = {  # name of a split -> what is held out whole
    "well": ("Metadata_Plate", "Metadata_Well"),
    "plate": ("Metadata_Plate",),
    "source": ("Metadata_Source",),
}
LEAKY = "random_by_cell"  # the published one
PARTS = ("train", "val", "test")


def split_rows(
    table: pd.DataFrame,
    by: str = "well",
    *,
    val: float = 0.15,
    test: float = 0.15,
    seed: int = 0,
    label: str = "label",
    where: str = "the data",
) -> dict[str, np.ndarray]:
    """Assign every row to training, validation or test.

    Parameters
    ----------
    table
        One row a crop, with a column ``label`` (empty where there is none) and the columns that the split needs.
    by
        "well", "plate" or "source": these are held out whole, and classes are spread as evenly as that allows.
        "random_by_cell": the split that published JUMP-CP results use. It **leaks**: neighbours in a well are in
        training and in test. A column's name: its values are train, val and test.
    val, test
        Share of the rows; 0 for none.
    seed
        Of the draw. Validation is drawn after the test, so that other validations leave the test as it is.
    label
        Column of the classes to spread.
    where
        What the rows are of, for messages.

    Returns
    -------
    dict
        "train", "val", "test" -> row numbers, ascending.

    Warns
    -----
    UserWarning
        The split leaks, or a part lacks classes.

    Raises
    ------
    MetadataError
        A column is missing, or there are too few wells (plates, sources) to hold some out.

    Examples
    --------
    >>> import pandas as pd
    >>> table = pd.DataFrame({"Metadata_Plate": "P", "Metadata_Well": list("ABCDEFGH"), "label": list("xy") * 4})
    >>> {part: len(rows) for part, rows in split_rows(table, val=0, test=0.25).items()}
    {'train': 6, 'val': 0, 'test': 2}
    """
    for name, share in (("val", val), ("test", test)):
        if not 0 <= share < 1 or val + test >= 1:
            raise InputError(f"The share of {name} is {share}; expected 0 to below 1, and both together below 1.")
    if by in table.columns and by not in (*GROUPS, LEAKY):
        return _given(table, by, where)
    classes = _classes(table, label)
    if by == LEAKY:
        warnings.warn(
            f"The split '{LEAKY}' leaks: cells of one well are in training and in test, so its accuracy says little "
            "about another well. It is here to compare with published figures; split by well, plate or source for "
            "your own.",
            stacklevel=2,
        )
        groups = np.arange(len(table))
    else:
        groups = check_groups(table, by, val=val, test=test, label=label, where=where)
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


def check_groups(
    table: pd.DataFrame, by: str, *, val: float, test: float, label: str = "label", where: str = "the data"
) -> np.ndarray:
    """Number what is held out whole, (n,) int64, or say why it cannot be; parameters and Raises as `split_rows`."""
    if by not in GROUPS:
        known = [*GROUPS, LEAKY]
        raise InputError(
            f"There is no split by '{by}'; there are {listing(known)}, or a column that says train, val and test; "
            f"{where} has {listing(table.columns)}.{suggestion(by, known)}"
        )
    keys = [name for name in GROUPS[by] if name in table.columns]
    if GROUPS[by][-1] not in keys:
        raise MetadataError(
            f"A split by {by} needs {GROUPS[by][-1]}; {where} has {listing(table.columns)}. Give that column in the "
            "plate map, with --data.table or with --data.pattern, or choose another --data.split."
        )
    groups = table.groupby(keys, sort=True, observed=True, dropna=False).ngroup().to_numpy()
    classes, parts, n_groups = _classes(table, label), 1 + (val > 0) + (test > 0), len(np.unique(groups))
    if n_groups < parts:
        raise MetadataError(
            f"{where} has {n_groups} {by}{'s' * (n_groups != 1)}; a split by {by} needs at least {parts}, one for each "
            "of training, validation and test. Hold out less, or split by something finer."
        )
    names = np.unique(classes[classes != ""])
    in_one = [name for name in names if len(np.unique(groups[classes == name])) == 1]
    if parts > 1 and len(names) > 1 and len(in_one) == len(names):
        raise MetadataError(
            f"Every class of {where} lies in one {by} only ({listing(names, 6)}), so no {by} can be held out: what was "
            f"learned of a class could not be told from what is peculiar to its {by}. Choose a label with replicates."
        )
    return groups


def _classes(table: pd.DataFrame, label: str) -> np.ndarray:
    if label not in table:
        return np.zeros(len(table), "<U1")
    return table[label].astype("string").fillna("").to_numpy(dtype=str)


def _hold_out(groups: np.ndarray, classes: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Return a mask of about ``share`` of the rows: whole groups, classes spread as evenly as they allow."""
    from sklearn.model_selection import StratifiedGroupKFold

    unique, first = np.unique(groups, return_index=True)
    if len(unique) == len(groups):  # single rows: no need to keep groups together
        return _stratified(classes, share, seed)
    if (classes == classes[first][np.searchsorted(unique, groups)]).all():  # one class a group, as wells mostly have
        return np.isin(groups, unique[_some_of_each_class(classes[first], share, seed)])
    folds = int(np.clip(round(1 / share), 2, len(unique)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a class with fewer members than folds: said by _warn_of_absent_classes
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        _, held_out = next(splitter.split(np.zeros(len(groups)), classes, groups))
    mask = np.zeros(len(groups), bool)
    mask[held_out] = True
    if not mask.any():  # an empty fold: the folds were too many for these groups
        mask = groups == np.random.default_rng(seed).choice(unique)
    return mask


def _some_of_each_class(classes: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Choose groups by their class: a share of each, at least one of every class that has two or more."""
    generator = np.random.default_rng(seed)
    chosen: list[int] = []
    for name in np.unique(classes):
        members = generator.permutation(np.flatnonzero(classes == name))
        count = round(share * len(members)) or min(1, len(members) - 1)
        chosen += members[:count].tolist()
    if not chosen:  # every class has one group only, and classes are allowed to be so
        chosen = [int(generator.integers(len(classes)))]
    return np.array(chosen)


def _stratified(classes: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Hold out a share of every class, row by row."""
    generator = np.random.default_rng(seed)
    mask = np.zeros(len(classes), bool)
    for name in np.unique(classes):
        rows = generator.permutation(np.flatnonzero(classes == name))
        mask[rows[: round(share * len(rows))]] = True
    return mask


def _warn_of_absent_classes(rows: dict[str, np.ndarray], classes: np.ndarray, by: str) -> None:
    everywhere = set(classes) - {""}
    absent = {
        part: sorted(everywhere - set(classes[chosen]))
        for part, chosen in rows.items()
        if len(chosen) and everywhere - set(classes[chosen])
    }
    if absent:
        said = "; ".join(f"{part}: {listing(names, 6)}" for part, names in absent.items())
        warnings.warn(f"Some classes are absent from parts of the split by {by} ({said}).", stacklevel=3)
