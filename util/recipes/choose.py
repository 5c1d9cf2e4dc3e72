"""Flags of pre-training for a set of images and a machine: rules of thumb, each with its reason."""

import math

from util.files import counted

# Shorter side from which: (input size, patch size). At least 7 x 7 patches, and 12 x 12 where pixels allow it
SIZES = ((160, 224, 16), (112, 128, 8), (80, 96, 8), (48, 64, 8), (32, 32, 4), (24, 28, 4))
# On a GPU: images from which, memory in GB from which, model, images a micro-step, learning rate
MODELS = (
    (500_000, 40, "large", 128, 6e-4),
    (20_000, 12, "base", 256, 6e-4),
    (2_000, 6, "small", 256, 1e-3),
    (0, 0, "tiny", 256, 1e-3),
)
CPU_SIDE = 96  # pixels: 144 patches, which a few cores can train on in hours
UPDATES_PER_EPOCH = 32  # at least; a larger batch would leave too few
UPDATES = {"cpu": 6_000, "gpu": 40_000}  # of a whole run, as far as 50 to 1,600 epochs give them


def input_size(height: int, width: int, gpu: bool) -> tuple[tuple[int, int], int]:
    """((height, width), patch size) of the model for images that are mostly `height` x `width` pixels."""
    short, long = sorted((height, width))
    ratio = min(round(long / short), 8)
    short = short if gpu else min(short, CPU_SIDE)
    _, size, patch = next((row for row in SIZES if short >= row[0]), (0, max(8, short // 4 * 4), 4))
    longer = size * ratio if long >= 2 * min(height, width) else size
    return ((size, longer) if height <= width else (longer, size)), patch


def choose(
    images: int, shape: tuple[int, int], channels: int, gpu_memory: float | None, matrix_unit: bool = False
) -> tuple[dict, list[str]]:
    """Flags of main_pretrain.py by name, and reasons, a line each.

    Args:
        images: of the training split.
        shape: the median (height, width), in pixels.
        channels: that the files have.
        gpu_memory: in GB; None: there is no GPU.
        matrix_unit: of the CPU, for bf16.
    """
    size, patch = input_size(*shape, gpu_memory is not None)
    text = str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"
    grid = f"{size[0] // patch} x {size[1] // patch} patches"
    flags: dict = {"model": "mae_vit_tiny_patch16", "input_size": text, "patch_size": patch}
    reasons = [f"--input_size {text} --patch_size {patch}: the images' median is {shape[0]} x {shape[1]} "
               f"(height x width); {grid}"]  # fmt: skip
    if channels != 3:
        flags["in_chans"] = channels
        why = "all are grey" if channels == 1 else "as the files have"
        reasons.append(f"--in_chans {channels}: {why}")
    if gpu_memory is None:
        batch, rate, kind = 32, 4e-3, "cpu"
        flags.update(decoder_embed_dim=128, decoder_depth=2, decoder_num_heads=4)
        flags.update(opt="muon", opt_args=["ns_steps=3", "nesterov=True"])
        reasons += ["tiny encoder, two decoder blocks: there is no GPU",
                    "--opt muon: a better encoder after the same time (records/README.md)"]  # fmt: skip
        if matrix_unit:
            flags["amp_dtype"] = "bf16"
            reasons.append("--amp_dtype bf16: this CPU has a matrix unit for it, which float32 leaves idle")
    else:
        *_, name, batch, rate = next(row for row in MODELS if images >= row[0] and gpu_memory >= row[1])
        flags["model"], kind = f"mae_vit_{name}_patch16", "gpu"
        reasons.append(f"{name} encoder: {counted(images, 'image')}, a GPU of {gpu_memory:.0f} GB")
    # A power of two, so that an epoch has some updates and a GPU works on full batches
    most = min(images, max(8, min(images / UPDATES_PER_EPOCH, 4096 if kind == "gpu" else 64)))
    effective = 2 ** int(math.log2(most))
    flags["batch_size"] = min(batch, effective)
    flags["accum_iter"] = effective // flags["batch_size"]
    updates = max(1, images // effective)
    epochs = min(1600, max(50, math.ceil(UPDATES[kind] / updates)))
    # AdamW's rate grows with the batch (1.5e-4 for 256, the published recipe) above what small ones stand
    rate = max(rate, 1.5e-4 * effective / 256) if effective > 256 else rate
    flags.update(epochs=epochs, warmup_epochs=min(40, math.ceil(epochs / 20)))
    flags.update(blr=float(f"{rate * 256 / effective:.2g}"), norm_pix_loss=True)
    reasons += [
        f"--batch_size, --blr: effective batch {effective}, which gives "
        f"{counted(updates, 'update')} an epoch; learning rate {rate:.1e}",
        f"--epochs {epochs}: {epochs * updates:,} updates; a tenth would do to see that it learns",
        "--norm_pix_loss: better features; losses are then near 1 and fall slowly",
    ]
    often = max(1, epochs // 10)
    flags.update(vis_freq=often, save_freq=often, keep_checkpoints=3)
    return flags, reasons


def words(flags: dict) -> list[str]:
    """Flags as words of a command line; True: a flag without value, False and None: left out."""
    found = []
    for name, value in flags.items():
        if value is None or value is False or (name == "accum_iter" and value == 1):
            continue
        values = [] if value is True else value if isinstance(value, list | tuple) else [value]
        found += [f"--{name}", *(f"{v:.9g}" if isinstance(v, float) else str(v) for v in values)]
    return found
