"""How badly a masked autoencoder predicts each patch of an image from others: what is unlike its training
images is predicted worst, so it is an anomaly score too.

The masks are complementary (each patch is hidden equally often) and the same for all images, so that scores
compare. Like those of `util.evaluate.predict`, the figures are the same at any batch size and number of
loader processes.
"""

import itertools
import math
from argparse import Namespace
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from models_mae import MaskedAutoencoderViT
from util.data.dataset import ImageDataset
from util.data.depth import depth_of
from util.data.find import ImageFiles
from util.data.transforms import EvalTransform
from util.errors import UserError
from util.evaluate.features import extract_features
from util.evaluate.predict import batches_of
from util.rng import fixed_noise
from util.weights.describe import WeightsFile

LEAST, MOST = 4, 100  # masks that are taken if nobody says how many
Masks = Sequence[tuple[Tensor, float]]  # (noise (L,), mask ratio) of each, as the model takes them


def mask_count(ratio: float, masks: int | None = None) -> int:
    """How many masks of about `ratio` hide every patch equally often: `masks`, or the least number from 4 on.

    Raises UserError where there is no such number up to 100, or `masks` is none.
    """
    visible = Fraction(1 - ratio).limit_denominator(MOST)
    step, flag = visible.denominator, f"--mask_ratio {ratio:g}" if masks is None else f"--masks {masks}"
    if 0 < visible < 1 and (masks is None or (masks % step == 0 and masks <= MOST)):
        return masks or step * -(-LEAST // step)
    counts = ", ".join(f"{i * step}" for i in (1, 2, 3))
    advice = f"pass --masks {counts}, ..." if 0 < visible < 1 else "pass --mask_ratio 0.75"
    rule = f"only if masks x (1 - mask ratio) is a whole number; with a ratio of {ratio:g} {advice}"
    raise UserError(f"{flag}: every patch is hidden equally often {rule}")


def complementary_masks(length: int, masks: int, ratio: float, seed: int) -> Masks:
    """`masks` maskings of `length` patches L, each patch hidden in the same number of them.

    The patches, shuffled, stand on a circle; each mask leaves the next stretch of it visible. Numbers of
    hidden patches differ by one at most. With a ratio of 0.75 each four masks part the patches into the four
    quarters that they leave visible.

    Raises UserError where a mask would hide all patches or none.
    """
    visible = round(masks * (1 - ratio))  # masks that leave a patch visible
    circles = math.gcd(masks, visible)
    stretches, rounds, found = masks // circles, visible // circles, []
    for shuffled in fixed_noise(circles, length, seed):
        places = (shuffled * length).round().long()
        bounds = [rounds * length * i // stretches for i in range(stretches + 1)]
        for start, end in itertools.pairwise(bounds):
            if not 0 < end - start < length:
                raise UserError(
                    f"--masks {masks}: of {length} patches a mask would hide all or none; pass fewer"
                )
            # Half a patch to spare on both sides: int(L * (1 - ratio)) does not hang on rounding
            found.append(((places - start) % length / length, 1 - (end - start + 0.5) / length))
    return found


def patch_losses(model: MaskedAutoencoderViT, images: Tensor, masks: Masks) -> Tensor:
    """Of images (N, C, H, W), normalised: (N, L), the mean of each patch's loss over the masks that hide it.

    The loss of a patch is the one that the model was trained on (`forward_loss` is its mean), in float32 at
    least: with `norm_pix_loss` of the normalised patch.
    """
    target = model.patchify(images)  # (N, L, p * p * C)
    target = target.to(torch.promote_types(target.dtype, torch.float32))
    if model.norm_pix_loss:
        variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (variance + 1e-6).sqrt()
    total = hidden = 0
    for noise, ratio in masks:
        noise = noise.to(images.device).expand(len(images), -1)
        _, pred, mask = model(images, mask_ratio=ratio, noise=noise)
        total = total + (pred.to(target.dtype) - target).square().mean(dim=-1) * mask
        hidden = hidden + mask
    return total / hidden


def loss_loader(
    files: ImageFiles, weights: WeightsFile, args: Namespace, pin_memory: bool = False
) -> torch.utils.data.DataLoader:
    """Batches of the largest centred part of each image that has the model's shape, without a margin.

    Args:
        args: as of `prediction_loader`.
    """
    depth = depth_of(weights)
    transform, channels = EvalTransform(weights.input_size, depth), weights.sizes["in_chans"]
    dataset = ImageDataset(files, transform, channels, 0, args.bad_images, depth=depth)
    return batches_of(dataset, args, pin_memory)


def image_losses(
    model: MaskedAutoencoderViT,
    loader: Iterable,
    device: torch.device,
    masks: Masks,
    amp_dtype: str = "none",
    progress=None,
    stats: Namespace | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """`patch_losses` of the images of a loader; other arguments as of `util.evaluate.predict.predict`.

    Returns: of each readable image its place, int64 (n,), and its patches' losses, float32 (n, L).
    """

    def losses(images: Tensor) -> Tensor:
        if progress:
            progress.update(len(images))
        return patch_losses(model, images, masks)

    args = Namespace(**{**(vars(stats) if stats else {}), "amp_dtype": amp_dtype})
    found, _ = extract_features(losses, loader, device, args, keep_all=True)
    rows = np.flatnonzero(loader.dataset.bad.numpy() == 0)  # of others the picture in their place was seen
    return rows, found.numpy()[rows]
