r"""Looks at a folder of images and says what is in it, which command to run on it, and what that will cost.

    python plan.py DIR
    python plan.py DIR --hours 8 --write recipe.txt
    python main_pretrain.py @recipe.txt

Every image is read once: sizes, colours, unreadable files, duplicates within a split and across train and
val. Then the command runs for a few steps, on this machine, and is timed. Nothing is written but --write. The
choices are rules of thumb, told with their reasons; change what you know better.
"""

import argparse
import itertools
import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from util.cli.flags import above, at_least, check_flags
from util.cli.parser import ArgumentParser, run_script
from util.compute.blocks import CPU_HAS_MATRIX_UNIT
from util.compute.precision import resolve_device
from util.data.examine import settle_range
from util.data.find import bad_limit, find_images
from util.data.survey import Survey, duplicates, pixel_statistics, survey
from util.data.transforms import channel_stats
from util.errors import TrainingError, UserError
from util.evaluate.output import check_output, replacing_output
from util.files import counted, printable, some
from util.processes.collectives import log as say
from util.recipes.choose import choose, words
from util.sizes import image_size

OUTPUT = ["--output_dir", "pretrained"]
TRIAL_STEPS = 10  # micro-steps; the first half warms caches up and compiles, the rest is timed
REPO = Path(__file__).resolve().parent


def get_args_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser("MAE plan", add_help=False)
    # fmt: off
    flag = parser.add_argument
    flag("data_path", metavar="DIR", help="as --data_path of main_pretrain.py")
    flag("--hours", type=above(0), help="how long the run may take: fewer epochs where it would take longer")
    flag("--write", metavar="FILE", help="write the flags, for main_pretrain.py @FILE")
    flag("--most", default=20_000, type=at_least(1), metavar="N",
         help="images of a split that are looked at, evenly spread")
    flag("--device", default="auto", help="auto (cuda, else mps, else cpu) or a torch device")
    flag("--no_trial", action="store_true", help="leave the timed steps out")
    return parser


def look_at(args: argparse.Namespace) -> dict[str, Survey]:
    """The surveys of train and, where there is one, val."""
    found = {}
    for split in ("train", "val"):
        files = find_images(args.data_path, split, "skip any", called="DIR ")
        if files is not None:
            found[split] = survey(files, args.most)
            if not found[split].good():
                raise UserError(f"DIR {printable(args.data_path)}: no image of {split} can be read")
    return found


def describe(found: dict[str, Survey]) -> list[str]:
    """What was found, a line each."""
    lines = []
    for split, part in found.items():
        looks = part.good()
        shapes = sorted(look.size for look in looks)
        heights, widths = zip(*shapes, strict=True)
        middle = f"{statistics.median_low(heights)} x {statistics.median_low(widths)}"
        kinds = Counter(
            f"{look.kind}{' (grey)' if look.channels == 1 and look.kind == 'RGB' else ''}" for look in looks
        )
        looked = f", {len(part.rows):,} of them looked at" if len(part.rows) < len(part.files.paths) else ""
        lines.append(f"{split}: {part.files.describe()}{looked}")
        if part.files.labels is not None:
            counts = Counter(part.files.labels.tolist()).values()
            lines.append(f"  images a class: {min(counts):,} to {max(counts):,}")
        lines.append(f"  height x width: median {middle}, heights {min(heights)} to {max(heights)}, "
                     f"widths {min(widths)} to {max(widths)}")  # fmt: skip
        lines.append("  pixels: " + ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common(6)))
        flat = sum(look.flat for look in looks)
        if flat:
            lines.append(f"  constant images: {flat:,}")
        if part.bad:
            text = some((f"{printable(path)} ({reason})" for path, reason in part.bad), 3)
            lines.append(f"  unreadable: {len(part.bad):,}: {text}; --bad_images skip leaves out 1 % at most")
    names, parts = list(found), list(found.values())
    exact, near = duplicates(parts)
    for kind, pairs in (("the same file", exact), ("nearly the same picture", near)):
        for where, chosen in (
            ("within a split", [p for p in pairs if p[0][0] == p[1][0]]),
            ("ACROSS train and val, so that val looks too good", [p for p in pairs if p[0][0] != p[1][0]]),
        ):
            if chosen:
                lines.append(f"{kind}, {where}: {len(chosen):,}{', as' if len(chosen) > 3 else ''}")
                for pair in chosen[:3]:
                    lines.append("  " + " = ".join(printable(parts[s].path(n)) for s, n in pair))
    if not exact and not near:
        where = f" within or across {' and '.join(names)}" if len(names) > 1 else ""
        lines.append(f"duplicates: none{where}")
    return lines


def step_time(times: list[float], window: int) -> float:
    """Seconds of a micro-step: its median at each place of a window, of the later half of `times`. The last
    one of a window makes the update as well, which takes long with Muon.
    """
    half = times[len(times) // 2 :]
    return statistics.fmean(statistics.median(half[i::window]) for i in range(min(window, len(half))))


def trial(command: list[str], steps: int, window: int) -> dict[str, float]:
    """Runs `command` for `steps` updates, each of `window` micro-steps. Seconds to the first micro-step and
    of leaving (start), of a micro-step (step), from an epoch to the next (turn), of validation, figures and a
    checkpoint (look); MB of memory; bytes of a checkpoint.

    Empty where the memory did not suffice. Raises TrainingError where it fails otherwise.
    """
    with tempfile.TemporaryDirectory() as folder:
        extra = ["--max_steps", str(steps), "--print_freq", "1", "--vis_freq", "1000", "--log_dir", folder]
        words = [sys.executable, str(REPO / "main_pretrain.py"), *command, *extra, "--output_dir", folder]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        lines, done, begin = [], [], time.perf_counter()  # done: (when, epoch) of each micro-step
        with subprocess.Popen(words, **pipes, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as process:
            for line in process.stdout:
                lines.append(line)
                now = time.perf_counter()
                if match := re.match(r"Epoch: \[(\d+)\] +\[", line):
                    done.append((now, match[1]))
        end = time.perf_counter()
        if process.returncode:
            last = "".join("".join(lines).strip().splitlines()[-1:])
            if "memory" in last:
                return {}
            raise TrainingError(f"the trial run failed: {last}; its command: {shlex.join(words[1:])}")
        written = next(Path(folder).glob("checkpoint-*.pth")).stat().st_size
    gaps = [(there - here, epoch == other) for (here, epoch), (there, other) in itertools.pairwise(done)]
    times = [seconds for seconds, same in gaps if same] or [seconds for seconds, _ in gaps]
    step = step_time(times, window)
    turn = min((seconds for seconds, same in gaps if not same), default=step) - step
    memory = re.findall(r"max mem: ([\d.]+)", "".join(lines))
    return {"start": done[0][0] - begin + end - now, "step": step, "turn": max(turn, 0),
            "look": now - done[-1][0], "memory": float(memory[-1]), "checkpoint": written}  # fmt: skip


def try_out(flags: dict, common: list[str], images: int) -> dict[str, float]:
    """What `trial` found, after halving `batch_size` in `flags` as often as the memory demands."""
    while True:
        epoch = images // flags["batch_size"]  # three of them, if short: the first ends with a look
        steps = math.ceil((3 * epoch if epoch <= TRIAL_STEPS else TRIAL_STEPS) / flags["accum_iter"])
        found = trial([*common, *words(flags)], max(2, steps), flags["accum_iter"])
        if found:
            return found
        if flags["batch_size"] == 1:
            raise TrainingError("the memory does not suffice for one image; choose a smaller --model")
        flags["batch_size"], flags["accum_iter"] = flags["batch_size"] // 2, 2 * flags["accum_iter"]


def hours_of(flags: dict, images: int, cost: dict[str, float]) -> float:
    """Hours that the run takes, with a look in every `vis_freq` epochs and at the end."""
    epoch = images // flags["batch_size"] * cost["step"] + cost["turn"]
    looks = math.ceil(flags["epochs"] / flags["vis_freq"]) + ((flags["epochs"] - 1) % flags["vis_freq"] > 0)
    return (cost["start"] + flags["epochs"] * epoch + looks * cost["look"]) / 3600


def _duration(hours: float) -> str:
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{60 * hours:.0f} min" if hours >= 1 / 12 else f"{3600 * hours:.0f} s"


def fit_hours(flags: dict, images: int, cost: dict[str, float], hours: float) -> str | None:
    """Fewer epochs in `flags` where the run would take longer than `hours`; says so."""
    proposed = flags["epochs"]
    while (whole := hours_of(flags, images, cost)) > hours and flags["epochs"] > 1:
        flags["epochs"] = max(1, min(flags["epochs"] - 1, int(flags["epochs"] * hours / whole)))
        flags["warmup_epochs"] = math.ceil(flags["epochs"] / 20) if flags["epochs"] > 1 else 0
        flags["vis_freq"] = flags["save_freq"] = max(1, flags["epochs"] // 10)
    if flags["epochs"] == proposed:
        return None
    return f"--epochs {flags['epochs']}: as many as --hours allows; {proposed:,} were better"


def write(path: str, command: list[str], note: str) -> None:
    """Writes a recipe: a flag and its values a line."""
    lines = [f"# {note}"]
    for word in command:
        if word.startswith("--"):
            lines.append(word)
        else:
            lines[-1] += f" {shlex.quote(word)}"
    with replacing_output("--write", path) as temporary:
        temporary.write_text("\n".join([*lines, ""]), encoding="utf-8", errors="surrogateescape")


def main(args: argparse.Namespace) -> None:
    check_flags(args, get_args_parser())
    if args.write:
        check_output("--write", args.write)  # before minutes of looking
    device = resolve_device(args.device)
    memory = torch.cuda.get_device_properties(device).total_memory / 1e9 if device.type == "cuda" else None
    found = look_at(args)
    say("\n".join(describe(found)))

    train, images = found["train"], len(found["train"].files.paths)
    if len(train.bad) > (most := bad_limit(images + len(train.files.skipped))):
        bad = f"DIR {printable(args.data_path)}: {counted(len(train.bad), 'file')} of train cannot be read"
        raise UserError(f"{bad}, and --bad_images skip leaves out {most} at most; repair or remove them")
    looks = train.good()
    heights, widths = zip(*(look.size for look in looks), strict=True)
    shape = statistics.median_low(heights), statistics.median_low(widths)
    channels = max(look.channels for look in looks)
    matrix_unit = device.type == "cpu" and CPU_HAS_MATRIX_UNIT
    flags, reasons = choose(images, shape, channels, memory, matrix_unit)
    settings = argparse.Namespace(in_chans=channels, seed=0, bad_images="skip", pixel_range="auto")
    depth = settle_range(settings, train.files)
    if depth is not None:
        flags["pixel_range"] = settings.pixel_range
        reasons.append("--pixel_range: what becomes 0 and 1, as the files are deeper than 8 bits")
    mean, std = pixel_statistics(train, channels, image_size(flags["input_size"]), depth)
    usual = channel_stats(channels)
    if any(abs(a - b) > 0.03 for a, b in zip([*mean, *std], [*usual[0], *usual[1]], strict=True)):
        flags.update(mean=mean, std=std)
        reasons.append("--mean, --std: measured; they are not those of ImageNet's photographs")
    if train.bad:
        flags["bad_images"] = "skip"

    common = ["--data_path", args.data_path, *(["--device", args.device] if args.device != "auto" else [])]
    if not args.no_trial:
        say(f"now the command for a few steps, to time it{', once it is compiled' * (device.type == 'cuda')}")
    cost = None if args.no_trial else try_out(flags, common, images)
    if cost and args.hours and (shorter := fit_hours(flags, images, cost, args.hours)):
        reasons = [shorter if reason.startswith("--epochs") else reason for reason in reasons]
    command = [*common, *words(flags)]
    say("\nCommand:\npython " + shlex.join(["main_pretrain.py", *command, *OUTPUT]))
    say("\nWhy:\n" + "\n".join(f"- {reason}" for reason in reasons))
    if cost:
        hours, size = hours_of(flags, images, cost), cost["checkpoint"] / 2**20
        within = f" of the {args.hours:g} hours there are" if args.hours else ""
        say(
            f"\nCost, from a short run here on {device}: {_duration(hours)}{within} (a step: "
            f"{cost['step']:.3f} s), {cost['memory']:.0f} MB of memory,\n"
            f"{size * 4:.0f} MB of disk (checkpoints of {size:.0f} MB)"
        )
    if args.write:
        limit = f" --hours {args.hours:g}" if args.hours else ""
        write(args.write, [*command, *OUTPUT], f"python plan.py {printable(args.data_path)}{limit}")
        say(f"\nwrote {args.write}: python main_pretrain.py @{args.write}")


if __name__ == "__main__":
    run_script(main, ArgumentParser(description=__doc__, parents=[get_args_parser()]))
