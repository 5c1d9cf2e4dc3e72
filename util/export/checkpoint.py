"""`model.pth`, which an import (`--from`) writes: weights, and the settings that the main scripts read."""

from argparse import Namespace
from pathlib import Path

import models_mae
from util.export.source import Source, read_source
from util.run.writer import save_checkpoint
from util.weights.schema import plain

FULL = ("norm_pix_loss", "mask_ratio", "decoder_embed_dim", "decoder_depth", "decoder_num_heads")
_SETTINGS = ("model", "input_size", "patch_size", "in_chans", "mean", "std", "pixel_range", "num_heads")
_SETTINGS += ("registers",)
_CLASSIFIER = ("global_pool", "nb_classes", "class_names", "recipe")
_CLASSIFIER += ("task", "thresholds", "target_mean", "target_std")


def settings(source: Source) -> dict[str, dict]:
    """The entry of a checkpoint that says how to build its model: `args`; of classifiers `model_info`."""
    info = {name: source.info.get(name) for name in _SETTINGS}
    if source.part == "full":
        names = source.constructor, f"mae_{info['model']}"
        info |= {"model": next((name for name in names if name in models_mae.MODELS), None)}
        info |= {name: source.info[name] for name in FULL}
    if source.part == "classifier":
        info |= {name: source.info.get(name) for name in _CLASSIFIER}
        info["class_names"] = list(info["class_names"] or [])
    info = {name: list(v) if isinstance(v, tuple) else plain(v) for name, v in info.items() if v is not None}
    return {"model_info" if source.part == "classifier" else "args": info}


def write(source: Source, folder: Path) -> None:
    """Writes `model.pth`, weights only, for --resume and --finetune."""
    save_checkpoint(folder / "model.pth", {"model": source.state, **settings(source)})


def read_again(file: Path) -> Source:
    """A file of this code, with nothing but itself to go by."""
    return read_source(str(file), Namespace(encoder_only=False, mask_ratio=None, mean=None, std=None))


def advice(source: Source) -> str:
    """What the file is for."""
    if source.part == "full":
        return "main_pretrain.py takes it with --resume, the others with --finetune"
    if source.part == "classifier":
        script = f"main_{source.info.get('recipe', 'finetune')}.py"
        return f"{script} --eval takes it with --resume, all but main_pretrain.py with --finetune"
    return "main_finetune.py, main_linprobe.py and main_knn.py take it with --finetune"
