"""Hands a checkpoint to another library, and proves that the numbers agree.

An encoder for timm, or the whole MAE for Hugging Face's transformers:
    python export.py --resume out/checkpoint-399.pth --to timm --output exported/timm
    python export.py --resume out/checkpoint-399.pth --to hf --output exported/hf

A fine-tuned classifier as ONNX (or torch_export, or safetensors with this code's names):
    python export.py --resume tuned/checkpoint-best.pth --to onnx --output exported/onnx

A finished export to the Hugging Face hub; without --yes it says what would go:
    python export.py --output exported/timm --push OWNER/NAME --private

The other way, to a file for --resume and --finetune of the main scripts:
    python export.py --from hf --resume vit-mae-base/ --output imported

After writing, the result is loaded with its library and compared with the checkpoint on random images; above
a difference of 1e-4 nothing is left and the exit code is 1.
"""

import argparse
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

from util.cli.flags import Bounded, add_verify_arg, at_least, check_flags
from util.cli.parser import ArgumentParser, run_script
from util.console import say
from util.errors import TrainingError, UserError
from util.export import checkpoint, hf, onnx, safetensors, timm, torch_export
from util.export.card import PARTS, make_card
from util.export.files import check_output, output_folder, require
from util.export.source import Source, read_source
from util.files import nameable, printable
from util.sizes import image_size
from util.weights.files import fetch

TOLERANCE = 1e-4


class Target(NamedTuple):
    """What can be written: a module of util/export, and a line in the table below.

    The module has `write(source, folder)`; `check(source, path)`, which loads what lies at `path` with its
    library and returns {what: (the library's output, the checkpoint's own)}; `usage(source, folder)`, the
    code that loads it (a text in templates/); and for --from, `read(path, args)` -> Source.

    title: in words. library: as model hubs call it. packages: needed beyond requirements.txt. decoder: a full
    MAE keeps its decoder. pixels: a model that gives each pixel a class keeps its head.
    """

    module: ModuleType
    title: str
    library: str = "pytorch"
    packages: tuple[str, ...] = ()
    decoder: bool = False
    pixels: bool = False


TARGETS = {
    "timm": Target(timm, "timm", "timm"),
    "hf": Target(hf, "Hugging Face transformers", "transformers", ("transformers",), decoder=True),
    "torch_export": Target(torch_export, "torch.export", pixels=True),
    "onnx": Target(onnx, "ONNX", "onnx", ("onnx", "onnxscript", "onnxruntime"), pixels=True),
    "safetensors": Target(safetensors, "this code, as safetensors", decoder=True),
}


def get_args_parser() -> argparse.ArgumentParser:
    """All flags; `add_help=False`, as the main scripts'."""
    parser = argparse.ArgumentParser("MAE export", add_help=False)
    # fmt: off
    flag = parser.add_argument_group("export").add_argument
    flag("--resume", default="", metavar="FILE|URL|DIR",
         help="a checkpoint of pre-training, fine-tuning or probing, a released file; a folder of a Hugging "
              "Face or timm model")
    add_verify_arg(flag)
    flag("--to", choices=TARGETS, help="what to write")
    flag("--from", choices=[name for name, target in TARGETS.items() if hasattr(target.module, "read")],
         dest="from_",
         help="what --resume is of: writes model.pth for --resume and --finetune of the main scripts")
    flag("--output", required=True, metavar="DIR", help="a folder that is made; must be new or empty")
    flag("--overwrite", action="store_true", help="replace a folder that an earlier export wrote")
    flag("--encoder_only", action="store_true", help="leave out the decoder, or the classifier's head")
    flag("--half", action="store_true", help="--to safetensors: float16, a file of half the size")
    flag = parser.add_argument_group("Hugging Face hub").add_argument
    flag("--push", default="", metavar="OWNER/NAME",
         help="upload --output there, after --to or of an earlier export; a dry run without --yes")
    flag("--private", action="store_true", help="make a private repository")
    flag("--yes", action="store_true", help="do upload it")
    flag = parser.add_argument_group("what a file may not say (released files)").add_argument
    flag("--input_size", type=image_size, help="pixels: 224, or 32x128 (height x width)")
    flag("--mean", default=None, type=float, nargs="+", help="channel means of pixels in [0, 1]")
    flag("--std", default=None, type=float, nargs="+", help="channel standard deviations")
    flag("--norm_pix_loss", action="store_const", const=True,
         help="the model predicts patches normalised by their own statistics")
    flag("--mask_ratio", type=Bounded(float, lambda value: 0 <= value < 1, "be at least 0 and below 1"),
         help="share of patches removed")
    flag("--num_heads", type=at_least(1), help="of the encoder, if it is of no named model")
    flag("--decoder_num_heads", type=at_least(1))
    return parser


def check_args(args: argparse.Namespace) -> None:
    """Raises UserError for flags that cannot work, before anything is read or written."""
    if args.push:
        from util.export.push import check_push  # huggingface_hub is slow to import

        check_push(args.push)
        if args.from_ or bool(args.to) != bool(args.resume):
            raise UserError("--push: of a new export needs --to and --resume; of an earlier one neither")
    elif args.private or args.yes:
        raise UserError("--private and --yes: are of --push OWNER/NAME")
    elif not args.resume:
        raise UserError("--resume: is needed, the file to export or import")
    elif (args.to is None) == (args.from_ is None):
        raise UserError("pass one of --to (what to write) and --from (what to read)")
    if args.half and args.to != "safetensors":
        raise UserError("--half: is for --to safetensors; other libraries round themselves")
    check_flags(args, get_args_parser())


def require_agreement(source: Source, differences: dict[str, float]) -> None:
    """Prints the differences; raises TrainingError (exit code 1) where one is too large, or not a number."""
    for what, value in differences.items():
        say(f"  {what}: {value:.1e}")
    worst = max(differences, key=lambda what: (differences[what] != differences[what], differences[what]))
    say(f"largest difference: {differences[worst]:.1e} ({worst})")
    if not differences[worst] <= TOLERANCE:
        raise TrainingError(
            f"{source.path}: {worst}: a difference of {differences[worst]:.1e}, more than {TOLERANCE:g}; "
            "nothing was written"
        )


def main(args: argparse.Namespace) -> None:
    check_args(args)
    if args.to or args.from_:
        convert(args)
    if args.push:
        from util.export.push import push

        push(Path(args.output), args.push, args.private, args.yes, args.overwrite)


def convert(args: argparse.Namespace) -> None:
    """Writes the export, or what is imported, to `args.output`."""
    output = check_output(args.output, args.overwrite)
    target = TARGETS[args.to or args.from_]
    require(args.to or args.from_, target.packages)
    if args.to:
        source = read_source(args.resume, args, decoder=target.decoder, pixels=target.pixels)
    else:
        source = target.module.read(args.resume, args)
    verb = "exporting" if args.to else "importing"
    say(f"{printable(args.resume)}: {printable(source.kind)}; {verb} the {PARTS[source.part]}")
    for note in source.notes:
        say(f"note: {printable(note)}")
    size = sum(p.nbytes for p in (source.mae or source.vit).parameters())
    with output_folder(output, size) as folder, torch.no_grad():
        if args.to:
            target.module.write(source, folder)
            outputs = target.module.check(source, folder)
        else:  # what was written against what it was read from
            checkpoint.write(source, folder)
            with nameable(fetch(source.path)) as original:
                outputs = target.module.check(checkpoint.read_again(folder / "model.pth"), original)
        differences = {what: (theirs - ours).abs().max().item() for what, (theirs, ours) in outputs.items()}
        require_agreement(source, differences)
        if args.to:
            code = target.module.usage(source, output.name)
            card = make_card(source, target.title, target.library, code, differences)
            (folder / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
    if args.to:
        say(f"written: {printable(args.output)}; load it with\n\n{target.module.usage(source, args.output)}")
    else:
        say(f"written: {printable(args.output)}/model.pth; {checkpoint.advice(source)}")


if __name__ == "__main__":
    run_script(main, ArgumentParser(description=__doc__, parents=[get_args_parser()]))
