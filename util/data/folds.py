"""Folds that never part a group, and what training and validation labels must have."""

import numpy as np

from util.errors import UserError
from util.files import counted, some


def deal(groups: np.ndarray, strata: np.ndarray, folds: int) -> np.ndarray:
    """Fold of each image, int (n,), from 0: groups stay whole, and each fold gets about as much of each
    stratum (a class, or small and large numbers). The same arguments give the same folds.

    Args:
        groups: (n,), any values that can be sorted. strata: numbers (n,); of a group the middle one counts.
    """
    whole, place, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    middle = strata[np.lexsort((strata, place))][np.cumsum(sizes) - (sizes + 1) // 2]
    shuffled = np.random.default_rng(0).permutation(len(whole))
    fold_of = np.empty(len(whole), int)
    # As cards are dealt, so that a class with as many groups as folds is in each
    fold_of[np.lexsort((shuffled, -sizes, middle))] = np.arange(len(whole)) % folds
    return fold_of[place]


def strata_of(labels: np.ndarray) -> np.ndarray:
    """One number of each image by which folds are to be alike: class, number of labels, first number."""
    if labels.ndim == 1:
        return labels
    return labels.sum(axis=1) if np.isin(labels, (0, 1)).all() else labels[:, 0]


def check_sets(place: str, task: str, names: list[str], labels: dict[str, np.ndarray]) -> None:
    """Raises UserError where there is nothing to learn: a class that `train` or `val` lacks, labels or
    numbers that are alike in all images of `train`.

    Args:
        place: begins the message. labels: of "train" and of "val", as `LabelledFiles` has them.
    """
    if task == "class":
        counts = {one: np.bincount(values, minlength=len(names)) for one, values in labels.items()}
        if (alone := np.flatnonzero(sum(counts.values()) == 1)).size:
            text = f"{counted(len(alone), 'class')} of one image ({some(names[k] for k in alone)})"
            advice = "remove them, or pass --task numbers if they are numbers"
            raise UserError(f"{place}: {text}, which cannot be in train and in val; {advice}")
        for one, count in counts.items():
            if (absent := np.flatnonzero(count == 0)).size:
                text = f"{counted(len(absent), 'class')} ({some(names[k] for k in absent)})"
                advice = "add some, remove the classes, or take fewer folds"
                raise UserError(f"{place}: {one} has no image of {text}; {advice}")
        alike = names if len(names) == 1 else []
    else:
        columns = zip(names, labels["train"].T, strict=True)
        alike = [name for name, column in columns if column.min() == column.max()]
    if alike:
        text = f"{some(alike)}: alike in all images of train, so there is nothing to learn"
        raise UserError(f"{place}: {text}; leave it out with --label_columns")
