"""Whether what is not normal is reconstructed worse: AUROC of anomaly scores beside that of brightness."""

from argparse import Namespace
from collections.abc import Callable, Sequence

import torch

from util.data.labelled import LabelledImages
from util.errors import UserError
from util.evaluate.anomaly import complementary_masks, loss_loader, mask_count, patch_losses
from util.evaluate.card import Plan, Row, make_row
from util.evaluate.exact import eval_loader
from util.evaluate.features import extract_features
from util.evaluate.tasks import Task, auroc
from util.files import some
from util.rng import takes_noise
from util.weights.build import build
from util.weights.describe import WeightsFile

SCORES = {  # in the order of `anomaly_scores`
    "loss": "reconstruction error, mean of the patches",
    "largest": "reconstruction error, worst patch",
    "brightness": "mean brightness",
}


def brightness(images: torch.Tensor) -> torch.Tensor:
    """(N, 1) of (N, C, H, W)."""
    return images.mean(dim=(1, 2, 3))[:, None]


def anomaly_scores(args: Namespace, weights: WeightsFile, val: LabelledImages, device) -> Callable:
    """What gives images (N, C, H, W) their `SCORES` (N, 3); UserError where --normal cannot be answered.

    Args:
        args: normal, a class of `val`; seed, of the masks. weights: of part "full".
    """
    if val.targets.task != "class" or args.normal not in val.classes or len(val.classes) < 2:
        there = f"there are {len(val.targets.names)} {val.targets.words}: {some(val.targets.names)}"
        raise UserError(f"--normal {args.normal}: must be one of several classes; {there}")
    model = build(weights)
    if not takes_noise(model):
        raise UserError(f"--normal: the model of {weights.path} draws its own masks, so no scores compare")
    count = mask_count(weights.mask_ratio)
    masks = complementary_masks(model.patch_embed.num_patches, count, weights.mask_ratio, args.seed)
    model.to(device)

    def scores(images: torch.Tensor) -> torch.Tensor:
        losses = patch_losses(model, images, masks)
        return torch.cat([losses.mean(1, keepdim=True), losses.amax(1, keepdim=True), brightness(images)], 1)

    return scores


def measure_anomaly(
    scores: Callable, sets: Sequence[LabelledImages], args: Namespace, weights: WeightsFile, device
) -> tuple[str, dict[str, Row]] | None:
    """(what is compared, the row of each score) on the second of `sets`; None but on the first process.
    Whether dark or bright images are taken for not normal is chosen on the first.
    """
    found = []
    for part, function in zip(sets, (brightness, scores), strict=True):
        loader = eval_loader(loss_loader(part.files, weights, args).dataset, args)
        found.append(extract_features(function, loader, device, args, everywhere=False))
    if found[0] is None:
        return None
    normal = sets[1].classes.index(args.normal)
    (known, others), (values, odd) = ((x.double().numpy(), (y != normal)[:, None].numpy()) for x, y in found)
    dark = auroc(known, others) < 50
    values[:, 2] *= -1 if dark else 1
    plan = Plan(Task(1, None, None, auroc, "AUROC (%)", "labels"), torch.zeros(1), args.seed)
    rows = {key: make_row(key, ("", ""), "", values[:, i : i + 1], odd, plan) for i, key in enumerate(SCORES)}
    text = f"{odd.sum()} images that are not {args.normal} against {(~odd).sum()} that are"
    return f"{text}; {'dark' if dark else 'bright'} images of train are the less normal ones", rows
