"""Figures equal scikit-learn's; what is not defined is None and said, never NaN."""

import numpy as np
import pytest
from sklearn import metrics

from util.errors import UserError
from util.evaluate import metrics as ours
from util.evaluate.metrics import METRICS, measure, undefined

# 200 random cases, of which the slow tests take most
SEEDS = [range(15), pytest.param(range(15, 200), marks=pytest.mark.slow)]


def classes_of(seed):
    """(labels, probabilities): also ties, absent classes, one sample."""
    rs = np.random.RandomState(seed)
    count, classes = rs.choice([1, 2, 3, 10, 60]), rs.choice([2, 3, 6])
    values = rs.random_sample((count, classes)) ** 3
    values = values.round(1) + 0.01 if seed % 3 == 0 else values  # ties
    labels = rs.randint(0, rs.choice([1, classes, classes]), count)
    return labels, values / values.sum(axis=1, keepdims=True)


def columns_of(seed):
    rs = np.random.RandomState(seed)
    count, names = rs.choice([1, 2, 3, 10, 60]), rs.choice([1, 2, 5])
    values = rs.random_sample((count, names))
    labels = (rs.random_sample((count, names)) < rs.choice([0.0, 0.2, 0.5, 1.0], names)).astype(float)
    return labels, values.round(1) if seed % 3 == 0 else values


def quiet(score, *args, **named):
    """scikit-learn's own answer, None where it has none."""
    try:
        value = score(*args, **named)
    except ValueError:
        return None
    return None if np.isnan(value) else value


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seeds", SEEDS)
def test_classes_equal_scikit_learns(seeds):
    for seed in seeds:
        labels, values = classes_of(seed)
        found, best, all_there = measure("class", labels, values), values.argmax(axis=1), set(labels)
        assert tuple(found) == METRICS["class"]
        assert found["accuracy"] == metrics.accuracy_score(labels, best)
        assert found["balanced_accuracy"] == metrics.balanced_accuracy_score(labels, best)
        assert found["f1"] == metrics.f1_score(labels, best, average="macro", zero_division=0)
        assert found["kappa"] == quiet(metrics.cohen_kappa_score, labels, best)
        if values.shape[1] == 2:
            assert found["auroc"] == quiet(metrics.roc_auc_score, labels, values[:, 1])
            if len(all_there) == 2:
                assert found["average_precision"] == metrics.average_precision_score(labels, values[:, 1])
        elif len(all_there) == values.shape[1]:
            theirs = metrics.roc_auc_score(labels, values, multi_class="ovr")
            assert found["auroc"] == pytest.approx(theirs, rel=1e-14)  # the same means, summed alike
            hot = np.eye(values.shape[1])[labels]
            assert found["average_precision"] == pytest.approx(
                metrics.average_precision_score(hot, values), rel=1e-14
            )
        else:
            there = [k for k in range(values.shape[1]) if 0 < (labels == k).sum() < len(labels)]
            theirs = [metrics.roc_auc_score(labels == k, values[:, k]) for k in there]
            assert found["auroc"] == (np.mean(theirs) if there else None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seeds", SEEDS)
def test_labels_and_numbers_equal_scikit_learns(seeds):
    for seed in seeds:
        labels, values = columns_of(seed)
        threshold = (0.5, 0.3)[seed % 2]
        found, there = measure("labels", labels, values, threshold), (values >= threshold).astype(int)
        differ = [k for k in range(labels.shape[1]) if labels[:, k].min() != labels[:, k].max()]
        assert found["accuracy"] == metrics.accuracy_score(labels, there)
        own = [metrics.f1_score(labels[:, k], there[:, k], zero_division=0) for k in range(labels.shape[1])]
        assert found["f1"] == pytest.approx(np.mean(own), rel=1e-14)
        if len(differ) == labels.shape[1]:
            if len(differ) > 1:
                assert found["f1"] == metrics.f1_score(labels, there, average="macro", zero_division=0)
            assert found["auroc"] == pytest.approx(metrics.roc_auc_score(labels, values), rel=1e-14)
            theirs = metrics.average_precision_score(labels, values)
            assert found["average_precision"] == pytest.approx(theirs, rel=1e-14)
        for name, score in (("balanced_accuracy", metrics.balanced_accuracy_score),
                            ("kappa", metrics.cohen_kappa_score)):  # fmt: skip
            theirs = [quiet(score, labels[:, k], there[:, k]) for k in differ]
            assert found[name] == (np.mean(theirs) if differ else None)
        assert len(undefined("labels", labels, list("abcde"[: labels.shape[1]]))) == labels.shape[1] - len(
            differ
        )
        numbers, guesses = 100 * labels + values, 100 * values
        found = measure("numbers", numbers, guesses)
        assert found["mae"] == metrics.mean_absolute_error(numbers, guesses)
        assert found["rmse"] == metrics.root_mean_squared_error(numbers, guesses)
        assert found["r2"] == quiet(metrics.r2_score, numbers, guesses)


def test_all_labels_alike_is_said_and_no_nan():
    alike = measure("class", np.zeros(4, int), np.full((4, 3), 1 / 3))
    assert alike["auroc"] is None and alike["average_precision"] is None and alike["accuracy"] == 1
    assert undefined("class", np.zeros(4, int), ["a", "b"]) == [
        ("a", "all evaluated images have it"),
        ("b", "no evaluated image has it"),
    ]
    assert measure("numbers", np.ones((1, 1)), np.ones((1, 1)))["r2"] is None


def test_without_scikit_learn_one_line(monkeypatch):
    monkeypatch.setattr(ours.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--best auroc: needs scikit-learn .*pip install scikit-learn"):
        ours.require_sklearn("--best auroc")
