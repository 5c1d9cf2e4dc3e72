"""The demo behind `make demo`: pre-trains a tiny MAE on the demo set and shows what it learned.

    python demo/run_demo.py [--output_dir demo_output] [--epochs 12]

Prints every command that it runs, so that they can be repeated by hand; what they say goes to text files.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.cli.flags import at_least
from util.cli.parser import ArgumentParser, run_script
from util.cli.progress import progress_bar
from util.console import say
from util.demo_set.files import SHIPPED
from util.errors import UserError

REPO = Path(__file__).resolve().parents[1]
SIZES = ["--input_size", "64", "--patch_size", "8"]
DECODER = ["--decoder_embed_dim", "128", "--decoder_depth", "2", "--decoder_num_heads", "4"]
RECIPE = ["--decoder", "cross", "--opt", "muon", "--opt_args", "ns_steps=3", "nesterov=True", "--lr", "7e-3",
          "--schedule", "wsd"]  # fmt: skip
PROBE = ["--global_pool", "--batch_size", "64", "--lr", "12.8", "--epochs", "100", "--cache_features"]


def run(log: Path, *command: str) -> None:
    """Runs a command of this repository: prints it, how far it is, and when it ended; all that it says
    goes to the file `log`. Stops the demo if it fails, with the last lines of that.
    """
    say(f"\n$ python {shlex.join(command)}")
    start, progress = time.time(), None
    if sys.stdout.isatty():
        progress = progress_bar(1, file=sys.stdout, bar_format="{desc}", leave=False)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "encoding": "utf-8", "errors": "replace"}
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen([sys.executable, *command], cwd=REPO, **pipes) as process,
    ):
        for line in process.stdout:
            file.write(line)
            file.flush()
            if progress and line.startswith("Epoch: ["):
                progress.set_description_str(" ".join(line.split())[: shutil.get_terminal_size().columns - 1])
    if progress:
        progress.close()
    if process.returncode:
        lines = log.read_text(encoding="utf-8").splitlines()
        say("\n".join([*lines[-20:], "", f"this command failed; all that it said: {log}"]), sys.stderr)
        sys.exit(max(process.returncode, 1))
    say(f"  {time.time() - start:.0f} s; all that it said: {log}")


def main(args: argparse.Namespace) -> None:
    start = time.time()
    output = (REPO / args.output_dir).resolve()
    marker = output / ".demo"
    if output.exists() and not marker.exists():
        raise UserError(f"--output_dir {output}: exists and is no demo's; pass another")
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    marker.touch()

    log = output / "pretraining.txt"
    run(log, "main_pretrain.py", "--model", "mae_vit_tiny_patch16", *SIZES, *DECODER, "--norm_pix_loss",
        "--batch_size", "32", "--epochs", str(args.epochs), "--warmup_epochs", "1", *RECIPE,
        "--cooldown", str(args.epochs - 1),
        "--vis_freq", "4", "--print_freq", "50", "--no_compile",  # takes longer than this training
        "--output_dir", str(output))  # fmt: skip
    records = read_log(output)
    checkpoint = output / f"checkpoint-{records[-1]['epoch']}.pth"

    # The same linear classifier on all: what pre-training is worth
    accuracy, shipped = {}, str(SHIPPED / "model.safetensors")
    starts = {
        "pre-trained": ["vit_tiny_patch16", "--finetune", str(checkpoint)],
        "random": ["vit_tiny_patch16"],
        "shipped": ["vit_micro_patch8", "--finetune", shipped],
    }
    for name, flags in starts.items():
        folder = output / f"probe-{name}"
        log = output / f"probe-{name}.txt"
        run(log, "main_linprobe.py", *SIZES, *PROBE, "--model", *flags,
            "--output_dir", str(folder))  # fmt: skip
        accuracy[name] = read_log(folder)[-1]["test_acc1"]

    run(output / "shipped.txt", "demo/visualize.py", "--output", str(output / "shipped.png"))

    held_out = [record["val_loss"] for record in records if "val_loss" in record]
    first, last = records[0]["train_loss"], records[-1]["train_loss"]
    say(f"\nDone in {time.time() - start:.0f} s.")
    say(f"training loss:   {first:.4f} in the first epoch, {last:.4f} in the last")
    say(f"held-out loss:   {held_out[0]:.4f} after the first epoch, {held_out[-1]:.4f} at the end")
    say(f"linear probe:    {accuracy['pre-trained']:.1f} % right with the pre-trained encoder, "
        f"{accuracy['random']:.1f} % with a random one, {accuracy['shipped']:.1f} % with the model in "
        "demo/shipped, which was trained for longer on more pictures (10 classes)")  # fmt: skip
    say(f"what that one sees: {output}/shipped.png")
    say(f"reconstructions: {output}/reconstruction-{records[-1]['epoch']}.png")


def read_log(folder: Path) -> list[dict]:
    """The lines of `log.txt`, one dict an epoch."""
    return [json.loads(line) for line in (folder / "log.txt").read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", default="demo_output", help="remade each time")
    parser.add_argument("--epochs", default=12, type=at_least(2))
    run_script(main, parser)
