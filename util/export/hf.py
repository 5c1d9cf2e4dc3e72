"""A checkpoint as a folder of Hugging Face's transformers, in the layout of the public MAE repositories.

| what | class |
| --- | --- |
| full MAE | ViTMAEForPreTraining, which ViTMAEModel also loads |
| encoder | ViTMAEModel |
| classifier of the class token | ViTForImageClassification |
| global pooling | TimmWrapperForImageClassification, TimmWrapperModel: timm's model inside transformers |

transformers' own ViT always takes the normed class token: it cannot normalise the mean of the patch tokens.
"""

import tempfile
from pathlib import Path

import torch

from util.data.depth import depth_of
from util.errors import UserError
from util.export import timm
from util.export.files import render, write_json, write_safetensors
from util.export.source import Source, read_source
from util.files import read_json, shown
from util.weights.folder import weights_files
from util.weights.hugging_face import classifier_config, mae_config, problem_type, to_hugging_face
from util.weights.state import is_cross

_BICUBIC = 3


def _class(source: Source) -> str:
    """Name of the class in transformers that computes what `source` does."""
    if source.part == "full":
        return "ViTMAEForPreTraining"
    if source.pooled:
        return "TimmWrapperForImageClassification" if source.vit.num_classes else "TimmWrapperModel"
    return "ViTForImageClassification" if source.vit.num_classes else "ViTMAEModel"


def write(source: Source, folder: Path) -> None:
    """Writes `config.json`, `model.safetensors` and `preprocessor_config.json`.

    Raises:
        UserError: transformers has no class that computes this.
    """
    info, name = source.info, _class(source)
    height, width = info["input_size"]
    if source.mae is not None and is_cross(source.state):
        raise UserError("--to hf: its ViTMAE has no cross-attention decoder; pass --encoder_only, or --to "
                        "safetensors, which keeps it")  # fmt: skip
    if "registers" in info and not name.startswith("TimmWrapper"):
        raise UserError("--to hf: its ViT and ViTMAE have no register tokens; --to timm, safetensors, "
                        "torch_export and onnx keep them")  # fmt: skip
    if height != width and name.startswith("ViTMAE"):
        raise UserError(f"--to hf: its ViTMAE takes square images only, this model {height}x{width}; "
                        "--to timm, torch_export or onnx can take them")  # fmt: skip
    if name.startswith("TimmWrapper"):  # its config.json holds the preprocessing too
        import transformers

        if not hasattr(transformers.TimmWrapperConfig(), "model_args"):
            version = transformers.__version__
            raise UserError(f"--to hf: global pooling needs a newer transformers than {version}: "
                            "pip install -U transformers")  # fmt: skip
        timm.write(source, folder)
        config = {"architectures": [name], "model_type": "timm_wrapper", **read_json(folder / "config.json")}
        config |= problem_type(info)
        write_json(folder / "config.json", config)
        return
    write_json(folder / "config.json", {"architectures": [name], **_config(source)})
    state = (source.mae or source.vit).state_dict()
    prefix = "" if name == "ViTMAEModel" else "vit."
    write_safetensors(folder / "model.safetensors", to_hugging_face(state, prefix))
    write_json(folder / "preprocessor_config.json", _preprocessor_config(source))


def _config(source: Source) -> dict:
    return classifier_config(source.info) if source.vit.num_classes else mae_config(source.info)


def _preprocessor_config(source: Source) -> dict:
    """Resizing, scaling and normalisation as the checkpoint's images had them.

    Of classifiers, resizing and centre crop of their evaluation; else the whole picture at the model's size,
    as in the public repositories.
    """
    height, width = source.info["input_size"]
    size = {"height": height, "width": width}
    config = {
        "do_resize": True,
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(source.info["mean"]),
        "image_std": list(source.info["std"]),
    }
    if depth := depth_of(source):  # of the files' own values, which are not clipped here
        mean, std = depth.low + depth.span * source.mean, depth.span * source.std
        config |= {"do_rescale": False, "image_mean": mean.tolist(), "image_std": std.tolist()}
        config["pixel_range"] = list(source.pixel_range)  # for an import; transformers passes it over
    if source.vit.num_classes and height == width:
        edge = int(height / 0.875) if height <= 224 else height
        config |= {"size": {"shortest_edge": edge}, "do_center_crop": True, "crop_size": size}
        return {"image_processor_type": "BitImageProcessor", **config}
    return {"image_processor_type": "ViTImageProcessor", **config, "size": size}


def _load(name: str, folder: Path, **changes) -> torch.nn.Module:
    """A model of transformers from a folder, float32, in eval mode.

    Args:
        changes: of its config, or arguments of the class.

    Raises:
        UserError: the folder lacks tensors of it, which transformers would draw at random.
    """
    import transformers

    transformers.logging.set_verbosity_error()  # no load reports
    transformers.logging.disable_progress_bar()
    try:
        model, report = getattr(transformers, name).from_pretrained(
            folder, output_loading_info=True, local_files_only=True, **changes
        )
    except Exception as error:  # of many kinds, for a config.json that it cannot take
        raise UserError(f"{folder}: transformers cannot load it: {shown(str(error), 300)}") from None
    if lost := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise UserError(f"{folder}: transformers {transformers.__version__} does not find all tensors of its "
                        f"{name} there ({', '.join(map(str, sorted(lost)[:3]))})")  # fmt: skip
    return model.float().eval()


def check(source: Source, path: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Loads what lies at `path` with transformers; of a full model also loss, mask and reconstruction."""
    if not (path / "config.json").exists():  # without one: beside the config that its tensors tell
        files = weights_files(path, f"--resume {path}") if path.is_dir() else [path]
        name = "model.safetensors" if files[0].suffix == ".safetensors" else "pytorch_model.bin"
        names = {name: files[0]} if len(files) == 1 else {file.name: file for file in path.iterdir()}
        with tempfile.TemporaryDirectory() as folder:
            write_json(Path(folder) / "config.json", _config(source))
            for name, file in names.items():
                (Path(folder) / name).symlink_to(file.absolute())
            return check(source, Path(folder))
    images, in_order = source.images(2), torch.arange(source.vit.patch_embed.num_patches).float()
    name, config = _class(source), read_json(path / "config.json")
    if source.vit.num_classes:
        return {"logits": (_load(name, path)(images).logits, source.logits(images))}
    if source.pooled:
        return {"features": (_load(name, path)(images).pooler_output, source.vit(images))}
    tokens = source.tokens(images)
    if name == "ViTMAEModel" and config.get("model_type") == "vit":
        model = _load("ViTModel", path, add_pooling_layer=False)  # a layer that is not the encoder's
        return {"tokens": (model(images).last_hidden_state, tokens)}
    outputs, mae = {}, source.mae
    if mae is not None:  # the same patches masked
        model = _load(name, path)
        noise = torch.rand(2, len(in_order), generator=torch.Generator().manual_seed(1))
        loss, prediction, mask = mae(images, source.info["mask_ratio"], noise)
        theirs = model(images, noise=noise)
        outputs = {
            "loss": (theirs.loss, loss),
            "prediction": (theirs.logits, prediction),
            "mask": (theirs.mask, mask),
            "reconstruction": (model.unpatchify(theirs.logits), mae.unpatchify(prediction)),
        }
    model = _load("ViTMAEModel", path, mask_ratio=0.0)  # no patch masked, and noise that leaves their order
    return {**outputs, "tokens": (model(images, noise=in_order.expand(2, -1)).last_hidden_state, tokens)}


def usage(source: Source, folder: str) -> str:
    """Code that loads the export."""
    return render("hf.py", source, folder=folder, name=_class(source))


def read(path: str, args) -> Source:
    """Reads a folder or file of transformers; raises UserError where it is none."""
    source = read_source(path, args)
    if not source.kind.startswith("Hugging Face"):
        raise UserError(
            f"--from hf --resume {path}: has no tensors of Hugging Face's names, it is {source.kind}; "
            "timm's files go with --from timm, this code's need no change"
        )
    return source
