"""What a model knows of hidden patches, beside what their visible neighbours say.

    python benchmarks/bench_hidden.py --resume demo/mae_micro.safetensors --mask_ratio 0.5 0.75 0.9

Mean squared error over the hidden patches of validation images, in units of the pixels' variance (the mean
and std of the weights file), and its 95 % interval over images; of
    model       the prediction, of a model that was trained on plain pixels
    neighbours  each hidden patch is the mean of its visible neighbours among the eight around it; where there
                are none, of the visible patches nearest to it
    mean        each is the mean colour of all visible patches
"""

import argparse
import math

import numpy as np
import torch
from harness import Parser, finish, print_table, run_benchmark  # first of ours: it finds the repository

from util.data.dataset import build_val_dataset
from util.data.transforms import normalize_batch
from util.demo_set.files import ensure_demo_data
from util.errors import UserError
from util.rng import fixed_noise
from util.weights.build import build
from util.weights.flags import add_decoder_args, add_weights_args
from util.weights.size import describe_file


def neighbours(mask: torch.Tensor, colours: torch.Tensor, columns: int) -> torch.Tensor:
    """Colours (N, L, C) of all patches, those of the hidden ones made of the visible ones near them.

    Args:
        mask: (N, L), 1 = hidden. colours: (N, L, C), the mean colour of each patch.
    """
    places = torch.arange(mask.shape[1])
    rows, cols = places // columns, places % columns
    distance = torch.maximum((rows[:, None] - rows).abs(), (cols[:, None] - cols).abs()).float()  # (L, L)
    visible = mask == 0
    nearest = distance.masked_fill(~visible[:, None], math.inf).amin(-1, keepdim=True)  # (N, L, 1)
    weights = ((distance <= nearest.clamp(min=1)) & visible[:, None]).float()  # (N, L, L)
    made = weights @ colours / weights.sum(-1, keepdim=True)
    return torch.where(visible[..., None], colours, made)


def errors(model, images: torch.Tensor, ratio: float, start: int) -> dict[str, torch.Tensor]:
    """{what: (N,) error of each image}; `start`: the number of the first, on which its mask depends."""
    noise = fixed_noise(list(range(start, start + len(images))), model.patch_embed.num_patches, seed=0)
    _, pred, mask = model(images, ratio, noise=noise)
    target = model.patchify(images)
    colours = target.unflatten(-1, (-1, model.in_chans)).mean(-2)  # (N, L, C)
    near = neighbours(mask, colours, model.patch_embed.grid_size[1])
    visible = (1 - mask)[..., None]
    mean = (colours * visible).sum(1, keepdim=True) / visible.sum(1, keepdim=True)
    said = {"model": pred, "neighbours": near, "mean": mean.expand_as(colours)}
    pixels = target.shape[-1] // model.in_chans
    found = {}
    for name, value in said.items():
        value = value if name == "model" else value.repeat(1, 1, pixels)  # inside a patch: pixel, channel
        squares = (value - target).square().mean(-1)
        found[name] = (squares * mask).sum(1) / mask.sum(1)
    return found


@torch.no_grad()
def main(args: argparse.Namespace) -> int:
    weights = describe_file(args, "full")
    if weights.norm_pix_loss:
        raise UserError(f"--resume {args.resume}: predicts normalised patches, which are not compared here")
    model = build(weights).eval()
    data = argparse.Namespace(
        data_path=args.data_path or str(ensure_demo_data()),
        input_size=model.img_size,
        in_chans=model.in_chans,
    )
    dataset = build_val_dataset(data)
    if dataset is None:
        raise UserError(f"--data_path {data.data_path}: has no val/")
    count = min(len(dataset), args.images)
    rows, figures = [], {}
    for ratio in args.mask_ratio:
        parts = []
        for start in range(0, count, 50):
            images = torch.stack([dataset[(0, i)][0] for i in range(start, min(start + 50, count))])
            images = normalize_batch(images, torch.device("cpu"), weights.mean, weights.std)
            parts.append(errors(model, images, ratio, start))
        figures[ratio] = {name: torch.cat([part[name] for part in parts]).tolist() for name in parts[0]}
        for name, values in figures[ratio].items():
            half = 1.96 * np.std(values, ddof=1) / math.sqrt(len(values))
            rows.append([f"{ratio:.0%} hidden, {name}", f"{np.mean(values):.4f} ± {half:.4f}"])
    print_table([f"error over {count} images", "± 95 %"], rows, width=20)
    return finish(args, figures)


if __name__ == "__main__":
    parser = Parser(__doc__, images=500)
    parser.add_argument("--data_path", metavar="DIR", help="with val/ (default: the demo set)")
    parser.add_argument("--mask_ratio", type=float, nargs="+", default=[0.75])
    add_weights_args(parser)
    add_decoder_args(parser)
    run_benchmark(main, parser)
