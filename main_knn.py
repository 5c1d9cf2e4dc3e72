r"""Classifies by nearest neighbours on frozen features: how good an encoder is, without any training.

    python main_knn.py --finetune output_dir/checkpoint-9.pth --model vit_tiny_patch16 --input_size 64 \
        --patch_size 8
    python main_knn.py --data_path DIR --finetune mae_pretrain_vit_base.pth --model vit_base_patch16

Weighted k-NN with k = 20 and temperature 0.07 as in DINO (arXiv 2104.14294). Without --finetune the encoder
is random.
"""

import argparse

import torch

from util.cli import flags
from util.cli.parser import ArgumentParser, run_script, take_given
from util.compute.precision import resolve_amp_dtype, resolve_device
from util.data.depth import adopt_pixel_range
from util.data.transforms import channel_stats
from util.evaluate.exact import eval_loader
from util.evaluate.features import encoder_features
from util.evaluate.knn import knn_accuracy, knn_sets
from util.evaluate.report import figures_line
from util.processes.collectives import log
from util.processes.group import init_distributed_mode, shut_down
from util.recipes.classifier import build_classifier, make_report_dir, start_from
from util.recipes.labels import add_label_args, check_label_args, prepare_targets
from util.rng import seed_all
from util.run.run_log import log_arguments, write_log
from util.sizes import image_size
from util.weights.describe import read_model_info
from util.weights.encoder import check_final_norm, encoder_state
from util.weights.files import read_file
from util.weights.flags import adopt_model_info
from util.weights.state import registers

import models_vit  # isort: skip


def get_args_parser() -> argparse.ArgumentParser:
    """All flags; `add_help=False`, so that launchers can take it as a parent."""
    parser = argparse.ArgumentParser("MAE k-NN", add_help=False)
    # fmt: off
    flag = parser.add_argument_group("model").add_argument
    flag("--model", default="vit_large_patch16", choices=models_vit.MODELS, metavar="MODEL",
         help=f"one of {', '.join(models_vit.MODELS)}")
    flag("--input_size", default=224, type=image_size, help="pixels: 224, or 32x128 (height x width)")
    flag("--patch_size", type=flags.at_least(1), help="default: the model's")
    flag("--finetune", "--resume", default="", metavar="FILE|URL|FOLDER",
         help="a pre-training or fine-tuning checkpoint, a released, timm or Hugging Face file or folder")
    flags.add_verify_arg(flag)
    flag("--global_pool", action="store_true", help="features: the mean of the patch tokens (default)")
    flag("--cls_token", action="store_false", dest="global_pool", help="features: the class token")
    flag = parser.add_argument_group("k-NN").add_argument
    flag("--k", default=20, type=flags.at_least(1), help="neighbours that vote")
    flag("--temperature", default=0.07, type=flags.above(0),
         help="a neighbour of similarity s votes with exp(s / T)")
    flag("--batch_size", default=64, type=flags.at_least(1), help="images per loader batch")
    flag = parser.add_argument_group("run").add_argument
    flag("--device", default="auto", help="auto (cuda, else mps, else cpu) or a torch device")
    flag("--amp_dtype", default="auto", choices=["auto", "bf16", "fp16", "none"], help="mixed precision")
    flag("--seed", default=0, type=flags.seed_number, help="of the random encoder, without --finetune")
    flag("--output_dir", default="", help="folder whose log.txt gets a line with the result (default: none)")
    parser.set_defaults(global_pool=True)
    add_label_args(parser, trains=False)
    flags.add_data_args(parser)
    flags.add_distributed_args(parser)
    return parser


def adopt_flags(args: argparse.Namespace, content: dict, given: set[str]) -> None:
    """Takes the model's flags from a file that stores them, registers and pixel range of any checkpoint;
    UserError where a `given` one contradicts.
    """
    adopt_pixel_range(args, content, args.finetune, args.in_chans if "in_chans" in given else 0)
    args.registers = registers(encoder_state(content, f"--finetune {args.finetune}")[0])
    if isinstance(content.get("model_info"), dict):  # pooling is a choice here, and there is no head
        stored = read_model_info(content, f"--finetune {args.finetune}")
        info = {name: value for name, value in stored.items() if name not in ("global_pool", "nb_classes")}
        adopt_model_info(args, info, args.finetune, given)


def main(args: argparse.Namespace) -> dict[str, float]:
    """Prints and returns knn_acc1 and knn_acc5 in percent."""
    parser = get_args_parser()
    given = take_given(args, parser)
    init_distributed_mode(args)
    flags.check_flags(args, parser)
    check_label_args(args)
    verify, key = not args.no_verify, args.weights_key
    content = read_file(args.finetune, "--finetune", verify, key) if args.finetune else {}
    adopt_flags(args, content, given)
    device = resolve_device(args.device, args.gpu)
    resolve_amp_dtype(args.amp_dtype, device)
    args.mean, args.std = channel_stats(args.in_chans, args.mean, args.std)

    train_set, val_set = knn_sets(args)
    prepare_targets(args, train_set, val_set)
    log_arguments(args)
    log(f"data: {train_set.describe()}; evaluation: {val_set.describe()}")

    # A classifier fine-tuned with global pooling has no final norm over tokens: its pooled features are taken
    pooled, args.nb_classes = args.global_pool, 0
    info = read_model_info(content, f"--finetune {args.finetune}")
    args.global_pool = pooled and bool(info.get("global_pool"))
    seed_all(args.seed)
    model = build_classifier(args)
    if args.finetune:
        check_final_norm(start_from(model, args, content, given))
    model = model.to(device).eval()

    def features(images: torch.Tensor) -> torch.Tensor:
        return encoder_features(model, images, pooled)

    pin_memory = args.pin_mem and device.type == "cuda"
    loaders = (eval_loader(dataset, args, pin_memory) for dataset in (train_set, val_set))
    targets = val_set.targets if args.labels else None
    make_report_dir(args.output_dir)
    stats = knn_accuracy(features, *loaders, device, args.k, args.temperature, args, targets)
    if targets:
        log(figures_line(stats))
    if "acc1" in stats:
        closing = f"* k-NN Acc@1 {stats['acc1']:.3f} Acc@5 {stats['acc5']:.3f}"
        log(f"{closing} (k {args.k}, T {args.temperature})")
    stats = {f"knn_{name}": value for name, value in stats.items()}
    result = {**stats, "k": args.k, "temperature": args.temperature, "finetune": args.finetune}
    write_log(args.output_dir, result)
    shut_down()
    return stats


if __name__ == "__main__":
    run_script(main, ArgumentParser(description=__doc__, parents=[get_args_parser()]))
