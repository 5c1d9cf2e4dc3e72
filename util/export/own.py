"""This code's own files: safetensors of a checkpoint, and `model.pth` of other libraries' models."""

from argparse import Namespace
from pathlib import Path

import torch

import models_mae
import models_vit
from util.export.files import write_safetensors
from util.export.hf import compare_original
from util.export.source import Source, read_source
from util.export.timm import compare_timm, load_original
from util.run.writer import save_checkpoint

_SETTINGS = ("model", "input_size", "patch_size", "in_chans", "mean", "std")
_FULL = ("norm_pix_loss", "mask_ratio", "decoder_embed_dim", "decoder_depth", "decoder_num_heads")
_CLASSIFIER = ("global_pool", "nb_classes", "class_names", "recipe")


def settings(source: Source) -> dict:
    """The entry of a checkpoint that says how to build its model: `args`; of classifiers `model_info`."""
    info = {name: source.info.get(name) for name in (*_SETTINGS, "num_heads")}
    if source.part == "full":
        name = f"mae_{info['model']}"
        info |= {"model": name if name in models_mae.MODELS else None}
        info |= {name: source.info[name] for name in _FULL}
    if source.part == "classifier":
        info |= {name: source.info.get(name) for name in _CLASSIFIER}
        info["class_names"] = list(info["class_names"] or [])
    return {name: list(v) if isinstance(v, tuple) else v for name, v in info.items() if v is not None}


def write_own_safetensors(source: Source, folder: Path) -> None:
    """Writes `model.safetensors`: this code's tensors, settings as metadata."""
    entries = {"model_info" if source.part == "classifier" else "args": settings(source)}
    if isinstance(source.content.get("epoch"), int):
        entries["epoch"] = source.content["epoch"]
    write_safetensors(folder / "model.safetensors", source.state, **entries)


def check_own_safetensors(source: Source, folder: Path) -> dict[str, float]:
    """Reads the file with nothing but itself to go by, and compares."""
    return _compare_again(source, folder / "model.safetensors")


def own_usage(source: Source, folder: str) -> str:
    """Code that loads the export with nothing but this code's model files."""
    info, full = source.info, source.part == "full"
    module = "models_mae" if full else "models_vit"
    sizes = {"img_size": tuple(info["input_size"])} | {k: info[k] for k in ("patch_size", "in_chans")}
    if full:
        sizes |= {name: info[name] for name in _FULL if name != "mask_ratio"}
    else:
        sizes |= {"global_pool": info["global_pool"], "num_classes": source.vit.num_classes}
    name, imports = f"mae_{info.get('model')}" if full else info.get("model"), [f"import {module}"]
    if name not in (models_mae.MODELS if full else models_vit.MODELS):
        name = "MaskedAutoencoderViT" if full else "VisionTransformer"
        sizes |= {key: info[key] for key in ("embed_dim", "depth", "num_heads")}
        sizes |= {"mlp_ratio": info["mlp_dim"] / info["embed_dim"], "norm_layer": _Code("norm_layer")}
    lines = [f"model = {module}.{name}(", *(f"    {k}={v!r}," for k, v in sizes.items()), ")"]
    if "norm_layer" in sizes:
        imports = ["from functools import partial", "import torch", *imports]
        lines = ["norm_layer = partial(torch.nn.LayerNorm, eps=1e-6)", *lines]
    if "head.1.weight" in source.state:
        imports = ["import torch", *imports]
        lines += ["norm = torch.nn.BatchNorm1d(model.embed_dim, affine=False, eps=1e-6)",
                  "model.head = torch.nn.Sequential(norm, model.head)"]  # fmt: skip
    lines += [f'model.load_state_dict(load_file("{folder}/model.safetensors"))', "model.eval()"]
    return "\n".join([*imports, "from safetensors.torch import load_file", "", *lines])


class _Code(str):
    """Text that is code, not a string of it."""

    __repr__ = str.__str__


def write_checkpoint(source: Source, folder: Path) -> None:
    """Writes `model.pth`, weights only, for --resume and --finetune."""
    entry = "model_info" if source.part == "classifier" else "args"
    save_checkpoint(folder / "model.pth", {"model": source.state, entry: settings(source)})


def check_checkpoint(source: Source, folder: Path, library: str) -> dict[str, float]:
    """Reads `model.pth` again and compares it with what the library makes of the original."""
    written = read_source(str(folder / "model.pth"), _no_flags())
    written.path, written.content = source.path, source.content
    if library == "hf":
        return compare_original(written)
    return compare_timm(written, {"timm": load_original(source)})


def checkpoint_advice(source: Source) -> str:
    """What the file is for."""
    if source.part == "full":
        return "main_pretrain.py takes it with --resume, the others with --finetune"
    if source.part == "classifier":
        script = f"main_{source.info.get('recipe', 'finetune')}.py"
        return f"{script} --eval takes it with --resume, all but main_pretrain.py with --finetune"
    return "main_finetune.py, main_linprobe.py and main_knn.py take it with --finetune"


def _no_flags() -> Namespace:
    names = ("input_size", "num_heads", "decoder_num_heads", "mean", "std", "mask_ratio", "norm_pix_loss")
    return Namespace(encoder_only=False, **dict.fromkeys(names))


@torch.no_grad()
def _compare_again(source: Source, path: Path) -> dict[str, float]:
    again, images = read_source(str(path), _no_flags()), source.images(2)
    what = "logits" if source.vit.num_classes else "tokens"
    ours, theirs = getattr(source, what)(images), getattr(again, what)(images)
    differences = {what: (ours - theirs).abs().max().item()}
    if source.mae is not None:
        noise = torch.rand(2, source.mae.patch_embed.num_patches, generator=torch.Generator().manual_seed(1))
        ratio = source.info["mask_ratio"]
        ours, theirs = source.mae(images, ratio, noise), again.mae(images, again.info["mask_ratio"], noise)
        differences["loss"] = (ours[0] - theirs[0]).abs().item()
        differences["prediction"] = (ours[1] - theirs[1]).abs().max().item()
    return differences
