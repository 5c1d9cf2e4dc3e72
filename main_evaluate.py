r"""Says what an encoder is worth: a report card of neighbours and probes on its frozen features.

After a pre-training of the tiny model on the demo set:
    python main_evaluate.py --finetune output_dir/checkpoint-9.pth

On your images (DIR/train/CLASS/..., DIR/val/CLASS/..., or a table of labels), beside a random encoder and
raw pixels:
    python main_evaluate.py --finetune mae_pretrain_vit_base.pth --data_path DIR --baselines
    python main_evaluate.py --finetune mae_pretrain_vit_base.pth --data_path DIR --labels FILE.csv

The encoder sees each image once; model and image size come from the file. k, temperatures, learning rates,
blocks and pooling are chosen on a fifth of `train`, never on `val`. In --output_dir: card.md, which is also
printed, card.json, card.png (accuracy over depth), and a line of log.txt.
"""

import argparse
import math
import time

import torch

from util.cli import flags
from util.cli.parser import ArgumentParser, run_script, take_given
from util.compute.precision import resolve_amp_dtype, resolve_device
from util.data.depth import adopt_pixel_range
from util.data.folds import strata_of
from util.errors import UserError
from util.evaluate.card import Column, Plan, make_column
from util.evaluate.card_output import card_record, markdown, write_card
from util.evaluate.exact import eval_loader
from util.evaluate.knn import knn_sets
from util.evaluate.layers import EveryBlock, RawPixels, check_memory, extract_layers
from util.evaluate.normal import anomaly_scores, measure_anomaly
from util.evaluate.tasks import task_of
from util.processes.collectives import check_agreement, gather, is_main_process, log
from util.processes.group import init_distributed_mode, shut_down
from util.recipes.classifier import make_report_dir
from util.recipes.labels import add_label_args, check_label_args, prepare_targets
from util.rng import seed_all
from util.run.run_log import log_arguments, write_log
from util.sizes import image_size
from util.weights.build import build, random_encoder
from util.weights.describe import WeightsFile, describe
from util.weights.files import read_file
from util.weights.flags import add_decoder_args


def get_args_parser() -> argparse.ArgumentParser:
    """All flags; `add_help=False`, so that launchers can take it as a parent."""
    parser = argparse.ArgumentParser("MAE report card", add_help=False)
    # fmt: off
    flag = parser.add_argument_group("model").add_argument
    flag("--finetune", "--resume", default="", metavar="FILE|URL|FOLDER",
         help="a pre-training or fine-tuning checkpoint, a released, timm or Hugging Face file or folder")
    flag("--input_size", type=image_size, help="only for files that do not say it: 224, or 32x128 "
         "(height x width)")
    flag("--num_heads", type=flags.at_least(1), help="only for files that do not say it: attention heads")
    flags.add_verify_arg(flag)
    flag = parser.add_argument_group("card").add_argument
    flag("--baselines", action="store_true",
         help="the same for the encoder before any training, and for raw pixels")
    flag("--token_blocks", type=int, nargs="+", metavar="N",
         help="blocks, counted from 1, whose patch tokens are kept for attentive probing; 0: none (default: "
              "the last, and the one at three quarters)")
    flag("--normal", metavar="CLASS",
         help="also the AUROC of the reconstruction error as an anomaly score: this class against the others")
    flag("--steps", default=300, type=flags.at_least(1), help="of 256 images, that a probe learns for")
    flag("--memory", default=16.0, type=flags.at_least(0, float), metavar="GB",
         help="that the features may take at most")
    flag("--batch_size", default=64, type=flags.at_least(1),
         help="images per loader batch; changes no figure")
    flag = parser.add_argument_group("run").add_argument
    flag("--device", default="auto", help="auto (cuda, else mps, else cpu) or a torch device")
    flag("--amp_dtype", default="auto", choices=["auto", "bf16", "fp16", "none"],
         help="mixed precision of the encoder")
    flag("--seed", default=0, type=flags.seed_number,
         help="of the held-out part, the probes' batches, draws of few labels, and the random encoder")
    flag("--output_dir", default="./output_evaluate", help="where the card goes (default: %(default)s)")
    add_decoder_args(parser)
    add_label_args(parser, trains=False)
    flags.add_data_args(parser)
    flags.add_distributed_args(parser)
    return parser


def read_encoder(args: argparse.Namespace, given: set[str]) -> WeightsFile:
    """What the file says of its encoder; `args` get the image settings, UserError where they contradict."""
    content = read_file(args.finetune, "--finetune", not args.no_verify)
    try:
        weights = describe(content, args.finetune, args, "full" if args.normal else "encoder")
    except UserError as error:
        raise UserError(str(error).replace("--resume ", "--finetune ")) from None
    channels = weights.sizes["in_chans"]
    if "in_chans" in given and args.in_chans != channels:
        raise UserError(f"--in_chans {args.in_chans}: {args.finetune} has {channels}; leave the flag out")
    args.in_chans, args.input_size = channels, weights.input_size
    args.mean, args.std = weights.mean, weights.std
    adopt_pixel_range(args, content, f"--finetune {args.finetune}")
    return weights


def token_blocks(chosen: list[int] | None, depth: int) -> list[int]:
    """The blocks of --token_blocks, ascending; UserError for those that there are not."""
    if chosen is None:
        return sorted({max(1, round(0.75 * depth)), depth})
    for block in chosen:
        if not 0 <= block <= depth:
            raise UserError(f"--token_blocks {block}: the encoder has {depth} blocks, from 1; 0: none")
    return sorted(set(chosen) - {0})


def main(args: argparse.Namespace) -> dict[str, Column] | None:
    """Returns the card's columns, on the first process."""
    start, parser = time.time(), get_args_parser()
    given = take_given(args, parser)
    init_distributed_mode(args)
    flags.check_flags(args, parser)
    check_label_args(args)
    if not args.finetune:
        raise UserError("--finetune FILE is needed: the encoder that the card is of")
    weights = read_encoder(args, given)
    device = resolve_device(args.device, args.gpu)
    resolve_amp_dtype(args.amp_dtype, device)

    # Data
    train_set, val_set = knn_sets(args)
    prepare_targets(args, train_set, val_set)
    check_agreement(args, images=len(train_set), evaluated=len(val_set))
    scores = anomaly_scores(args, weights, val_set, device) if args.normal else None
    blocks = token_blocks(args.token_blocks, weights.sizes["depth"])
    pin_memory = args.pin_mem and device.type == "cuda"
    loaders = [eval_loader(part, args, pin_memory) for part in (train_set, val_set)]

    # What is measured
    sources = {"encoder": EveryBlock(build(weights, "encoder"), blocks)}
    if args.baselines:
        seed_all(args.seed)
        sources["random encoder"] = EveryBlock(random_encoder(weights), blocks)
        sources["raw pixels"] = RawPixels(weights.sizes, bool(blocks))

    strata = torch.as_tensor(strata_of(train_set.files.labels))
    groups = getattr(train_set.files, "groups", None)
    task, truth = task_of(val_set.targets, bool(args.labels)), val_set.files.labels
    if math.isnan(task.metric(truth, truth)):
        raise UserError(
            f"{val_set.files.source}: {task.name} is not defined, as all evaluated images are alike"
        )
    whole = Plan(task, strata, args.seed, args.steps, device, groups=groups)
    whole.split()  # before the first pass, if it cannot be
    log_arguments(args)
    log(f"data: {train_set.describe()}; evaluation: {val_set.describe()}")
    check_memory(sources.values(), len(train_set) + len(val_set), args.memory)
    make_report_dir(args.output_dir)

    # One column after the other, so that the features of one alone are in memory
    columns = {}
    for name, source in sources.items():
        began = time.time()
        train, val = (extract_layers(source.to(device).eval(), loader, device, args) for loader in loaders)
        source.cpu()
        kept = torch.from_numpy(sum(gather(train_set.bad.numpy())) == 0)  # the images that could be read
        if train is not None:
            passed = time.time()
            plan = whole.of(kept)
            columns[name] = make_column(train, val, plan)
            log(f"{name}: features in {passed - began:.0f} s, probes in {time.time() - passed:.0f} s")
        del train, val
    anomaly = measure_anomaly(scores, (train_set, val_set), args, weights, device) if scores else None
    if is_main_process():
        record = card_record(columns, args, plan, train_set, val_set, time.time() - start, anomaly)
        text = markdown(record)
        log(text)
        write_card(args.output_dir, record, text)
        scores = {f"card_{key}": row.score for key, row in columns["encoder"].rows.items()}
        write_log(args.output_dir, {**scores, "seconds": record["seconds"], "finetune": args.finetune})
    shut_down()
    return columns or None


if __name__ == "__main__":
    run_script(main, ArgumentParser(description=__doc__, parents=[get_args_parser()]))
