"""The report card: features of every block, what is chosen on what, intervals, the picture."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_utils import TINY, TINY_MAE
from sklearn import metrics

import models_mae
import models_vit
from util.data.targets import Targets
from util.errors import UserError
from util.evaluate.card import PROTOCOLS, Column, Plan, make_column, make_row, stratified
from util.evaluate.card_output import COMPARED, differences, draw_depth
from util.evaluate.features import encoder_features
from util.evaluate.knn import knn_from_features, knn_votes
from util.evaluate.layers import EveryBlock, Layers, RawPixels, effective_rank
from util.evaluate.tasks import auroc, one_class_each, r2, task_of
from util.figures.canvas import FAINT_INK


def models():
    torch.manual_seed(0)
    return {
        "mae": models_mae.MaskedAutoencoderViT(**TINY_MAE),
        "class token": models_vit.VisionTransformer(False, num_classes=3, **TINY),
        "mean": models_vit.VisionTransformer(True, num_classes=3, **TINY),
    }


@pytest.mark.parametrize("kind", models())
def test_features_of_every_block_in_one_pass(kind):
    model = models()[kind].double().eval()
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    source = EveryBlock(model, [1, 2])
    with torch.no_grad():
        rows = source(images)
        pooled = rows[:, : 4 * 24].view(3, 4, 24)
        tokens = rows[:, 4 * 24 :].view(3, 2, 16, 24)
        assert source.sets == [(1, "class"), (1, "mean"), (2, "class"), (2, "mean")]
        torch.testing.assert_close(pooled[:, 3], encoder_features(model, images))
        if kind != "mean":
            torch.testing.assert_close(pooled[:, 2], encoder_features(model, images, global_pool=False))
            torch.testing.assert_close(tokens.mean(dim=2), pooled[:, [1, 3]])
        model.blocks = model.blocks[:1]  # what is left computes what block 1 gives
        torch.testing.assert_close(pooled[:, 1], encoder_features(model, images))
    assert not any(block._forward_hooks for block in model.blocks)


def test_raw_pixels_and_their_patches():
    images = torch.randn(2, 3, 32, 48)
    source = RawPixels({"patch_size": 8, "img_size": (32, 48), "in_chans": 3})
    pixels, tokens = source(images).split([3 * 32 * 32, 24 * 192], dim=1)
    torch.testing.assert_close(pixels, F.adaptive_avg_pool2d(images, (32, 32)).flatten(1))
    patch = tokens.view(2, *source.token_shape)[1, 7]  # the second of the second row
    torch.testing.assert_close(patch, images[1, :, 8:16, 8:16].flatten())


def test_effective_rank():
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(500, 1, generator=generator) * torch.randn(1, 6, generator=generator) + 3
    ball, _ = torch.linalg.qr(torch.randn(500, 6, generator=generator, dtype=torch.float64))
    two = torch.diag(torch.tensor([1.0, 1, 0, 0, 0, 0])).repeat(2, 1) * torch.tensor(
        [[1.0]] * 6 + [[-1.0]] * 6
    )
    assert effective_rank(torch.stack([line, (ball - ball.mean(0)).float()], dim=1)) == pytest.approx(
        [1, 6], rel=0.01
    )
    assert effective_rank(two[:, None]) == pytest.approx([2])


def test_votes_of_a_grid_are_those_of_one_setting_after_the_other():
    generator = torch.Generator().manual_seed(0)
    train, val = (torch.randn(n, 5, generator=generator) for n in (40, 30))
    labels, answers = (torch.randint(0, 4, (n,), generator=generator) for n in (40, 30))
    settings = [(20, 0.07), (1, 0.2), (100, 1.0)]
    votes = [vote.argmax(1) for _, vote in knn_votes(train, labels, val, settings, 4)]
    for vote, setting in zip(votes, settings, strict=True):
        expected = knn_from_features(train, labels, val, answers, *setting)["acc1"]
        assert 100 * (vote == answers).double().mean().item() == pytest.approx(expected)


def layers(count: int, seed: int) -> Layers:
    """Features of three classes, which the second block tells better."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    strength = torch.tensor([0.1, 0.2, 0.3, 0.6]).view(1, 4, 1)
    pooled = torch.randn(count, 4, 8, generator=generator) + strength * centres[labels][:, None]
    tokens = {2: torch.randn(count, 5, 8, generator=generator) + 0.5 * centres[labels][:, None]}
    return Layers(pooled, tokens, labels, [(1, "class"), (1, "mean"), (2, "class"), (2, "mean")])


def targets_of_kind(kind: str, classes: torch.Tensor) -> tuple[Targets, torch.Tensor]:
    """What is to be said of images of three classes, and of each image."""
    if kind == "class":
        return Targets("class", ["a", "b", "c"]), classes
    if kind == "labels":
        return Targets("labels", ["a", "b"], [0.5, 0.3]), F.one_hot(classes, 3)[:, :2].float()
    values = torch.stack([classes - 1.0, (classes == 2) * 3.0], dim=1)
    return Targets("numbers", ["x", "y"], mean=[10.0, 0.0], std=[2.0, 1.0]), values


@pytest.mark.parametrize("kind", ["class", "labels", "numbers"])
def test_the_evaluated_images_choose_nothing(kind):
    train, val = layers(120, 1), layers(60, 2)
    targets, train.labels = targets_of_kind(kind, train.labels)
    _, val.labels = targets_of_kind(kind, val.labels)
    groups = None if kind == "class" else np.arange(120) // 3
    plan = Plan(task_of(targets), train.labels.view(120, -1)[:, 0], steps=20, groups=groups)
    column = make_column(train, val, plan)
    shuffled = val.labels[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    other = make_column(train, Layers(val.pooled, val.tokens, shuffled, val.sets), plan)
    given = {key for key in PROTOCOLS if kind == "class" or key != "few_5"}
    assert column.rows.keys() == other.rows.keys() == given
    for key, row in column.rows.items():
        twin = other.rows[key]
        assert (row.block, row.tokens, row.setting) == (twin.block, twin.tokens, twin.setting)
    least = {"class": 60, "labels": 75, "numbers": 40}[kind]  # by chance 33, 50 and 0
    assert column.rows["linear"].score > least > other.rows["linear"].score + 5
    for key, row in column.rows.items():
        assert row.low <= row.score <= row.high
        metric = {"class": "accuracy", "labels": "auroc", "numbers": "r2"}[kind]
        if not key.startswith("few"):  # scikit-learn's, of probabilities, or numbers in their own units
            assert 100 * row.figures[metric] == pytest.approx(row.score, abs=1e-9)
    if kind == "labels":  # what neighbours give are probabilities, of which some are below the thresholds
        found = column.rows["knn"].figures
        assert found["balanced_accuracy"] > 0.55 and found["kappa"] > 0.1
    if kind == "numbers":
        errors = column.rows["knn"].figures
        assert errors["rmse"] >= errors["mae"] > 0 and column.rows["knn_main"].score > least
    few = {"class": ("3 images", "15 images")}.get(kind, ("1 image", "12 images"))
    assert column.rows["few_1_percent"].setting == few[0]
    assert column.rows["few_5" if kind == "class" else "few_10_percent"].setting == few[1]


def test_what_is_held_out_of_a_table_parts_no_group():
    groups, labels = np.arange(60) // 4, torch.arange(60) % 2
    learns, held = Plan(one_class_each(2), labels, groups=groups).split()
    assert len(held) == 12 and not set(groups[held]) & set(groups[learns])
    assert Plan(one_class_each(2), labels, seed=1, groups=groups).split()[1].tolist() != held.tolist()
    some = Plan(one_class_each(2), labels, groups=groups).of(torch.arange(60) >= 8)
    assert len(some.strata) == len(some.groups) == 52 and some.groups[0] == 2
    with pytest.raises(UserError, match="all images are of one group"):
        Plan(one_class_each(2), labels, groups=np.zeros(60, int)).split()


@pytest.mark.parametrize("seed", range(20))
def test_metrics_of_a_card_are_scikit_learns(seed):
    rs = np.random.RandomState(seed)
    values, numbers = rs.randn(30, 4), rs.randn(30, 4)
    values = values.round() if seed % 2 else values  # ties
    labels = (rs.rand(30, 4) < 0.3).astype(float)
    labels[0], labels[1] = 0, 1
    assert auroc(values, labels) == pytest.approx(100 * metrics.roc_auc_score(labels, values), abs=1e-10)
    assert r2(values, numbers) == pytest.approx(100 * metrics.r2_score(numbers, values), abs=1e-9)
    labels[:, 0] = 1  # undefined, and left out
    rest = metrics.roc_auc_score(labels[:, 1:], values[:, 1:])
    assert auroc(values, labels) == pytest.approx(100 * rest, abs=1e-10)
    assert np.isnan(auroc(values, np.ones((30, 4)))) and np.isnan(r2(values, np.ones((30, 4))))


@pytest.mark.parametrize("kind", ["labels", "numbers"])
def test_losses_of_many_probes_are_those_of_each(kind):
    targets, wanted = targets_of_kind(kind, torch.arange(9) % 3)
    logits = torch.randn(2, 3, 9, 2)
    losses = task_of(targets).loss(logits, wanted)
    plain = {"labels": F.binary_cross_entropy_with_logits, "numbers": F.smooth_l1_loss}[kind]
    for f, r, i in itertools.product(range(2), range(3), range(9)):
        torch.testing.assert_close(losses[f, r, i], plain(logits[f, r, i], wanted[i]))


def test_one_class_of_two_images_is_a_card_too():
    side = layers(2, 1)
    side.labels.zero_()
    column = make_column(side, side, Plan(one_class_each(1), side.labels, steps=2))
    assert {row.score for row in column.rows.values()} == {100.0}


def test_held_out_images_are_a_fifth_of_each_class_and_not_learned_from():
    labels = torch.tensor([0] * 10 + [1] * 5 + [2] * 2 + [3])
    learns, held = Plan(one_class_each(4), labels, seed=3).split()
    assert torch.cat([learns, held]).sort().values.tolist() == list(range(18))
    assert labels[held].tolist() == [0, 0, 1, 2]
    assert Plan(one_class_each(4), labels, seed=4).split()[1].tolist() != held.tolist()
    with pytest.raises(UserError, match="no class has two images"):
        Plan(one_class_each(4), torch.arange(4)).split()
    assert labels[stratified(labels, lambda n: min(n, 3), 0)].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3]


def test_intervals_of_the_same_images():
    targets = np.arange(400) % 2
    plan = Plan(one_class_each(2), torch.from_numpy(targets))
    decisions = np.where(np.arange(400) < 300, targets, 1 - targets)  # three of four
    row = make_row("linear", (1, "mean"), "", decisions, targets, plan)
    assert row.score == 75 and row.samples.shape == (1000,)
    # Binomial: 1.96 * sqrt(0.75 * 0.25 / 400) is 4.2
    assert row.score - row.low == pytest.approx(4.2, abs=0.6) and row.high - 75 == pytest.approx(4.2, abs=0.6)
    better = make_row("linear", (1, "mean"), "", np.where(np.arange(400) < 320, targets, 2), targets, plan)
    found = differences({"encoder": Column({"linear": better}), "random encoder": Column({"linear": row})})
    assert found[0]["what"] == "linear: encoder above random encoder" and found[0]["difference"] == 5
    # All of 20 images in 400: narrower than the intervals of the two, which share the images
    assert 2 < found[0]["low"] < 5 < found[0]["high"] < 8


def test_a_curve_is_where_its_figures_are():
    depth = {"rank": [(1, "class", 2.0), (1, "mean", 2.0)], "attentive": [(2, "patches", 20.0)]}
    depth |= {"linear": [(1, "mean", 10.0), (2, "mean", 30.0)], "knn": [], "linear_norm": []}
    pixels = {"rank": [(0, "pixels", 3.0)], "linear_norm": [(0, "pixels", 20.0)]}
    columns = {"encoder": depth, "random encoder": depth, "raw pixels": pixels}
    columns = {name: {"depth": depth} for name, depth in columns.items()}
    picture = draw_depth({"columns": columns, "metric": "accuracy (%)", "finetune": "a.pth"})
    drawn, (linear, attentive) = np.asarray(picture), (COMPARED["linear"], COMPARED["attentive"])
    rows, places = np.nonzero((drawn[:420] == linear).all(-1))
    panel = places < picture.width // 2
    assert panel.any() and not panel.all()  # in both
    upper, lower = rows[panel & (places > 400)].min(), rows[panel & (places < 100)]
    dots, _ = np.nonzero((drawn[:420] == attentive).all(-1))
    assert upper + 50 < dots.mean() < lower.min() - 50
    level = (drawn[round(dots.mean()), 100:400] == FAINT_INK).all(-1)  # of the pixels, as high as the dot
    assert level.mean() > 0.9
