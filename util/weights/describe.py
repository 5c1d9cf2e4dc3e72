"""What a weights file says about its model: which kind it is, its sizes, its images, its classes.

Checkpoints of this code store their flags, folders of other libraries a config. Released files hold tensors
only: width and depth tell which of the named models it is, and what no tensor shows is asked for.
"""

import functools
import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

import models_mae
import models_vit
from util.cli.questions import NO_PIXELS
from util.data.depth import known_range
from util.data.transforms import channel_stats
from util.errors import UserError
from util.files import shown, some
from util.sizes import size_pair
from util.weights.encoder import count_blocks, encoder_state, has_encoder, part_state, stored_grid
from util.weights.flags import FLAGS, settle
from util.weights.hugging_face import decoder_from_hugging_face
from util.weights.schema import check_settings, said_settings, stored_settings
from util.weights.state import not_finite, registers

_DECODER = {"mask_token", "decoder_embed.weight", "decoder_pred.weight"}  # every decoder has these
_OTHERS = ("args", "model_info", "epoch", "config", "preprocessor", "settings")  # entries beside the tensors
_UNSEEN = ("num_heads", "decoder_num_heads", "norm_pix_loss", "mean", "std")  # no tensor shows these
_ABSENT = {
    "full": "no decoder ({kind}), which reconstructions need; pass a checkpoint-*.pth of main_pretrain.py or "
    "a released mae_visualize_vit_*.pth",
    "classifier": "no classifier ({kind}); pass --features FILE.npz for its features, or a checkpoint of "
    "main_finetune.py or main_linprobe.py",
}


@dataclass
class WeightsFile:
    """A weights file and what it says about its model."""

    path: str  # file, URL or folder, as the user gave it
    kind: str  # the file in words, for messages
    part: str  # what is described of it: "full" (encoder and decoder), "classifier" or "encoder"
    state: dict[str, torch.Tensor]  # that part's tensors, float32, under this code's names
    sizes: dict  # of the encoder: img_size, patch_size, ..., as arguments of either model's constructor
    input_size: tuple[int, int]  # (height, width) in pixels
    mean: tuple[float, ...]  # of pixels in [0, 1], one per channel
    std: tuple[float, ...]  # likewise
    pixel_range: tuple[float, ...] | None = None  # of images of more than 8 bits: `util.data.depth`
    decoder: dict = field(default_factory=dict)  # of part "full": decoder_embed_dim, _depth and _num_heads
    norm_pix_loss: bool = False  # the decoder predicts patches that are normalised by their own mean and std
    mask_ratio: float = 0.75  # share of patches that pre-training masked
    model: str | None = None  # the model in models_vit.MODELS of this width and depth
    constructor: str | None = None  # the file's own word for its model, of any MODELS
    recipe: str | None = None  # of the file's classifier: "finetune" or "linprobe"; None without one
    class_names: list[str] | None = None  # in the order of the outputs; None where the file stores none
    content: dict = field(default_factory=dict)  # what it holds besides tensors: args, epoch, config, ...
    notes: list[str] = field(default_factory=list)  # what was assumed, to be told to the user


def describe(content: dict, path, flags: Namespace, *parts: str, override: bool = False) -> WeightsFile:
    """Works out all that is needed to build one part of a weights file and to prepare images for it.

    Args:
        content: the file at `path`, as `read_file` returns it.
        flags: input_size, num_heads, decoder_num_heads, norm_pix_loss, mean, std, pixel_range, for what the
            file does not say; None, or absent, where not given.
        parts: "full", "classifier", "encoder"; the first that the file holds is described.
        override: flags win over what the file says, instead of being refused where they contradict it.

    Raises:
        UserError: the file holds no vision transformer or none of `parts`, its weights are not finite, flags
            contradict it, or neither they nor it say something that is needed.
    """
    where = f"--resume {path}"
    state, kind = encoder_state(content, where)
    state = decoder_from_hugging_face(state) if "decoder.mask_token" in state else state
    if not has_encoder(state):
        raise UserError(
            f"{where}: has no usable encoder keys but is {kind} (keys: {some(state, 3) or 'none'})"
        )
    if bad := not_finite(state):
        raise UserError(f"{where}: its weights are not finite ({bad}); take an earlier checkpoint")
    other = target if (target := said_settings(content).get("target")) in NO_PIXELS else ""
    held = {"full": state.keys() >= _DECODER and not other, "classifier": _head(state), "encoder": True}
    if not (found := [part for part in parts if held[part]]):
        if other and parts[0] == "full":
            raise UserError(f"{where}: its decoder predicts {other}, not pixels; pass a model of --target "
                            "pixels, or look at features: visualize.py --pca, --attention")  # fmt: skip
        raise UserError(f"{where}: holds {_ABSENT[parts[0]].format(kind=kind)}")
    used = ("model", "recipe", "input_size", *_UNSEEN, "pixel_range", "mask_ratio", "class_names")
    used = [name for name in used if found[0] == "full" or not name.startswith("decoder_")]
    stored = stored_settings(content, where, *used)
    info = _info_of_tensors(state, stored)
    _check_info(content, stored, info, where)
    known = _known_flags(state, stored, info)
    said = {name: settle(name, getattr(flags, name, None), v, path, override) for name, v in known.items()}
    sizes = _sizes(state, info, said, path)
    weights = WeightsFile(
        str(path), kind, found[0], part_state(state, found[0]), sizes, sizes["img_size"],
        *channel_stats(sizes["in_chans"], said["mean"], said["std"]),
        pixel_range=known_range(flags, stored, sizes["in_chans"], path),
        norm_pix_loss=bool(said["norm_pix_loss"]),
        mask_ratio=0.75 if stored.get("mask_ratio") is None else stored["mask_ratio"],
        model=info.get("model"), constructor=stored.get("model"),
        recipe=stored.get("recipe", info.get("recipe")),
        class_names=stored.get("class_names"),
        content={k: v for k, v in content.items() if k in _OTHERS},
    )  # fmt: skip
    if weights.part == "full":
        width, depth = state["mask_token"].shape[-1], count_blocks(state, "decoder_blocks")
        heads = _heads("decoder_num_heads", said, width, depth, models_mae.MODELS, path)
        weights.decoder = {"decoder_embed_dim": width, "decoder_depth": depth, "decoder_num_heads": heads}
        if said["norm_pix_loss"] is None:
            weights.notes.append(f"{path} does not say whether it predicts normalised pixels; taken for "
                                 "plain pixels (--norm_pix_loss if not)")  # fmt: skip
    return weights


def _known_flags(state: dict, stored: dict, info: dict) -> dict:
    """What the file says of the flags of `describe`; None for those that it does not say."""
    known = {name: stored.get(name) for name in _UNSEEN}
    known["input_size"] = info["input_size"] if stored_grid(state, stored) else None
    named, size = _stacks(named_constructor(stored.get("model"))), _width_and_depth(state)
    if known["num_heads"] is None and named[0][:2] == size:
        known["num_heads"] = named[0][2]
    if known["num_heads"] is None and "model" in stored and "model" in info:  # nobody names one with others
        *_, known["num_heads"] = _stacks(models_vit.MODELS[info["model"]])[0]
    if known["decoder_num_heads"] is None and len(named) > 1:
        known["decoder_num_heads"] = named[1][2] if named[0][:2] == size else None
    return known


def named_constructor(name: str | None, part: str = "") -> Callable | None:
    """The constructor of that name, of the kind of model that `part` needs ("full": a masked autoencoder,
    other words: a classifier, "": either); None where there is none.
    """
    modules = [models_mae] if part == "full" else [models_vit] if part else [models_mae, models_vit]
    return next((module.MODELS[name] for module in modules if name in module.MODELS), None)


def _sizes(state: dict, info: dict, said: dict, path) -> dict:
    """Arguments of the encoder's constructors; UserError for what neither file nor flags say."""
    (width, depth), positions = _width_and_depth(state), state["pos_embed"].shape[1] - 1
    _, channels, height, side = state["patch_embed.proj.weight"].shape
    patches = f"{positions} patches of {height}x{side} pixels"
    if height != side:
        raise UserError(f"--resume {path}: has {patches}; only square ones are read")
    heads = _heads("num_heads", said, width, depth, models_vit.MODELS, path)
    size = info.get("input_size") if said["input_size"] is None else size_pair(said["input_size"])
    if size is None:
        raise UserError(f"--resume {path}: does not say the grid of its {patches}; pass --input_size "
                        "HEIGHTxWIDTH")  # fmt: skip
    if any(length % side for length in size) or math.prod(size) != positions * side * side:
        raise UserError(f"--input_size {size[0]}x{size[1]}: does not give the {patches} that {path} has")
    mlp = state.get("blocks.0.mlp.fc1.bias", torch.empty(4 * width))
    return {
        "img_size": size, "patch_size": side, "in_chans": channels, "embed_dim": width,
        "depth": depth, "num_heads": heads, "mlp_ratio": len(mlp) / width,
        "norm_layer": functools.partial(nn.LayerNorm, eps=1e-6),
        **({"registers": number} if (number := registers(state)) else {}),
    }  # fmt: skip


def _heads(flag: str, said: dict, width: int, depth: int, named: dict, path) -> int:
    """Attention heads: what the file or the flag says, else those of the `named` model of this size."""
    if (heads := said[flag]) is None:  # the last stack of a masked autoencoder is its decoder
        stacks = (_stacks(constructor)[-1] for constructor in named.values())
        heads = next((stack[2] for stack in stacks if stack[:2] == (width, depth)), None)
    if heads is None:
        whose = "decoder's " if flag.startswith("decoder") else ""
        raise UserError(f"--resume {path}: does not say its {whose}number of attention heads (width {width}, "
                        f"{depth} blocks), and is no named model; pass --{flag}")  # fmt: skip
    if heads < 1 or width % heads:
        raise UserError(f"--{flag} {heads}: must divide the width of {width}")
    return heads


@functools.cache
def _stacks(constructor: Callable | None) -> list[tuple[int, int, int | None]]:
    """(width, blocks, heads) of a named model's encoder and, if it has one, decoder; zeros where there is no
    such model, or a client's has no blocks like these.
    """
    try:
        with torch.device("meta"):
            model = constructor()
        stacks = [(model.cls_token, model.blocks)]
        if hasattr(model, "decoder_blocks"):
            stacks.append((model.mask_token, model.decoder_blocks))
        return [(token.shape[-1], len(blocks), blocks[0].attn.num_heads) for token, blocks in stacks]
    except Exception:  # whatever a client's constructor does when it is called without arguments
        return [(0, 0, None)]


def _width_and_depth(state: dict) -> tuple[int, int]:
    return state["cls_token"].shape[-1], count_blocks(state)


def make_model_info(args: Namespace, class_names: list[str], recipe: str) -> dict:
    """The checkpoint entry `model_info`: how to build the model, prepare images, and name its classes.

    `recipe`: "finetune", or "linprobe" (the head is BatchNorm and linear layer).
    """
    info = {name: getattr(args, name) for name in FLAGS} | {"input_size": size_pair(args.input_size)}
    more = {"pixel_range": getattr(args, "pixel_range", None), "class_names": list(class_names)}
    return {**info, **more, "recipe": recipe}


def read_model_info(content: dict, where: str = "the checkpoint") -> dict:
    """`model_info` of a loaded checkpoint; of a file without it, what its tensors (and stored flags) tell.

    Raises:
        UserError: the file, `where`, says something else there than its tensors, or what cannot be.
    """
    state, _ = encoder_state(content, where)
    stored = stored_settings(content, where, "input_size", "mean", "std")
    seen = _info_of_tensors(state, stored) if has_encoder(state) else {}
    _check_info(content, stored, seen, where)
    return dict(content["model_info"]) if isinstance(content.get("model_info"), dict) else seen


def _check_info(content: dict, stored: dict, seen: dict, where: str) -> None:
    """Raises UserError where the settings in a file contradict what was `seen` of its tensors, or each other.

    Of `args` that holds for mean and std only: other code stores flags there that its model did not heed.
    """
    info = content.get("model_info")
    if isinstance(info, dict):
        check_settings(info, f"{where}: its model_info")
        for name in ("nb_classes", "in_chans", "patch_size", "global_pool", "recipe"):
            if (said := info.get(name)) is not None and said != seen.get(name, said):
                raise UserError(f"{where}: its model_info is damaged: {name} is {shown(said)}, but "
                                f"{seen[name]} by its tensors")  # fmt: skip
        names, count = len(info.get("class_names") or ()), info.get("nb_classes")
        if count is not None and names > count:
            raise UserError(f"{where}: its model_info is damaged: {names} class names for {count} classes")
    for name in ("mean", "std"):
        number, channels = len(stored.get(name, [0])), seen.get("in_chans", 1)
        if number not in (1, channels):
            raise UserError(f"{where} is damaged: {name} has {number} values for {channels} channels")


def _info_of_tensors(state: dict, stored: dict) -> dict:
    weight, positions = state["patch_embed.proj.weight"], state["pos_embed"].shape[1] - 1
    info = {"in_chans": weight.shape[1], "patch_size": weight.shape[-1]}
    grid, side = stored_grid(state, stored), round(positions**0.5)
    if grid := grid or ((side, side) if side * side == positions else None):
        info["input_size"] = (grid[0] * weight.shape[-2], grid[1] * weight.shape[-1])
    if "fc_norm.weight" in state or "norm.weight" in state:
        info["global_pool"] = "fc_norm.weight" in state
    if (head := _head(state)) is not None:
        info["nb_classes"] = state[head].shape[0]
        info["recipe"] = "finetune" if head == "head.weight" else "linprobe"
    size = _width_and_depth(state)
    if names := [name for name, make in models_vit.MODELS.items() if _stacks(make)[0][:2] == size]:
        info["model"] = stored["model"] if stored.get("model") in names else names[0]  # two: a client's
    return info


def _head(state: dict) -> str | None:
    return next((key for key in ("head.weight", "head.1.weight") if key in state), None)
