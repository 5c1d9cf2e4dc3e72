"""A checkpoint as a folder of Hugging Face's transformers, in the layout of the public MAE repositories.

| what | class |
| --- | --- |
| full MAE | ViTMAEForPreTraining, which ViTMAEModel also loads |
| encoder | ViTMAEModel |
| classifier of the class token | ViTForImageClassification |
| global pooling | TimmWrapperForImageClassification, TimmWrapperModel: timm's model inside transformers |

transformers' own ViT always takes the normed class token: it cannot normalise the mean of the patch tokens.
"""

import contextlib
import tempfile
from pathlib import Path

import torch

from util.errors import UserError
from util.export.files import write_json, write_safetensors
from util.export.source import Source
from util.export.timm import write_timm
from util.weights.hugging_face import classifier_config, mae_config, to_hugging_face

_BICUBIC = 3


def hf_class(source: Source) -> str:
    """Name of the class in transformers that computes what `source` does."""
    if source.part == "full":
        return "ViTMAEForPreTraining"
    if source.pooled:
        return "TimmWrapperForImageClassification" if source.vit.num_classes else "TimmWrapperModel"
    return "ViTForImageClassification" if source.vit.num_classes else "ViTMAEModel"


def write_hf(source: Source, folder: Path) -> None:
    """Writes `config.json`, `model.safetensors` and `preprocessor_config.json`.

    Raises:
        UserError: transformers has no class that computes this.
    """
    info, name = source.info, hf_class(source)
    height, width = info["input_size"]
    if height != width and name.startswith("ViTMAE"):
        raise UserError(f"--to hf: its ViTMAE takes square images only, this model {height}x{width}; "
                        "--to timm, torch_export or onnx can take them")  # fmt: skip
    if name.startswith("TimmWrapper"):  # its config.json holds the preprocessing too
        import transformers

        if not hasattr(transformers.TimmWrapperConfig(), "model_args"):
            version = transformers.__version__
            raise UserError(f"--to hf: global pooling needs a newer transformers than {version}: "
                            "pip install -U transformers")  # fmt: skip
        write_timm(source, folder, architectures=[name], model_type="timm_wrapper")
        return
    config = classifier_config(info) if source.vit.num_classes else mae_config(info)
    write_json(folder / "config.json", {"architectures": [name], **config})
    state = (source.mae or source.vit).state_dict()
    prefix = "" if name == "ViTMAEModel" else "vit."
    write_safetensors(folder / "model.safetensors", to_hugging_face(state, prefix))
    write_json(folder / "preprocessor_config.json", preprocessor_config(source))


def preprocessor_config(source: Source) -> dict:
    """Resizing, scaling and normalisation as the checkpoint's images had them.

    Of classifiers, resizing and centre crop of their evaluation; else the whole picture at the model's size,
    as in the public repositories.
    """
    info = source.info
    height, width = info["input_size"]
    config = {
        "do_resize": True,
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(info["mean"]),
        "image_std": list(info["std"]),
    }
    if source.vit.num_classes and height == width:
        edge = int(height / 0.875) if height <= 224 else height
        crop = {"height": height, "width": width}
        return {
            "image_processor_type": "BitImageProcessor", **config,
            "size": {"shortest_edge": edge}, "do_center_crop": True, "crop_size": crop,
        }  # fmt: skip
    size = {"height": height, "width": width}
    return {"image_processor_type": "ViTImageProcessor", **config, "size": size}


@contextlib.contextmanager
def _quiet():
    """transformers without progress bars and load reports."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def load_hf(name: str, folder: Path, **changes) -> torch.nn.Module:
    """A model of transformers from a folder, float32, in eval mode.

    Args:
        changes: of its config, or arguments of the class.

    Raises:
        UserError: the folder lacks tensors of it, which transformers would draw at random.
    """
    import transformers

    with _quiet():
        model, report = getattr(transformers, name).from_pretrained(
            folder, output_loading_info=True, local_files_only=True, **changes
        )
    if lost := [*report["missing_keys"], *report["mismatched_keys"]]:
        raise UserError(f"{folder}: transformers {transformers.__version__} does not find all tensors of its "
                        f"{name} there ({', '.join(map(str, sorted(lost)[:3]))})")  # fmt: skip
    return model.float().eval()


def check_hf(source: Source, folder: Path) -> dict[str, float]:
    """Loads the export with transformers and compares."""
    return compare_hf(source, hf_class(source), folder)


@torch.no_grad()
def compare_hf(source: Source, name: str, folder: Path) -> dict[str, float]:
    """Largest differences between `source` and the class `name` of transformers, loaded from `folder`."""
    images = source.images(2)
    if name == "ViTMAEForPreTraining":
        return _compare_full(source, folder, images) | _compare_tokens(source, folder, images)
    if name == "ViTMAEModel":
        return _compare_tokens(source, folder, images)
    changes = {"add_pooling_layer": False} if name == "ViTModel" else {}  # a layer that is not the encoder's
    model = load_hf(name, folder, **changes)
    if name == "ViTModel":
        return {"tokens": _largest(model(images).last_hidden_state, source.tokens(images))}
    if name == "TimmWrapperModel":
        return {"features": _largest(model(images).pooler_output, source.vit(images))}
    return {"logits": _largest(model(images).logits, source.logits(images))}


def _largest(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def _compare_full(source: Source, folder: Path, images: torch.Tensor) -> dict[str, float]:
    """Loss, mask, prediction and its picture, the same patches masked."""
    model, mae = load_hf("ViTMAEForPreTraining", folder), source.mae
    noise = torch.rand(len(images), mae.patch_embed.num_patches, generator=torch.Generator().manual_seed(1))
    loss, pred, mask = mae(images, source.info["mask_ratio"], noise)
    theirs = model(images, noise=noise)
    return {
        "loss": _largest(theirs.loss, loss),
        "prediction": _largest(theirs.logits, pred),
        "mask": _largest(theirs.mask, mask),
        "reconstruction": _largest(model.unpatchify(theirs.logits), mae.unpatchify(pred)),
    }


def _compare_tokens(source: Source, folder: Path, images: torch.Tensor) -> dict[str, float]:
    """All tokens in image order: no patch masked, and noise that leaves their order."""
    model = load_hf("ViTMAEModel", folder, mask_ratio=0.0)
    noise = torch.arange(source.vit.patch_embed.num_patches).float().expand(len(images), -1)
    return {"tokens": _largest(model(images, noise=noise).last_hidden_state, source.tokens(images))}


def compare_original(source: Source) -> dict[str, float]:
    """Compares `source` with what it was read from, a folder or a file of transformers (`--from hf`)."""
    config = source.content.get("config")
    usual = {"full": "ViTMAEForPreTraining", "classifier": "ViTForImageClassification"}
    name = usual.get(source.part, "ViTMAEModel")
    if source.part == "encoder" and (config or {}).get("model_type") == "vit":
        name = "ViTModel"
    if config is not None:
        return compare_hf(source, name, Path(source.path))
    with tempfile.TemporaryDirectory() as folder:  # a file alone: beside the config that its tensors tell
        config = mae_config(source.info) if name.startswith("ViTMAE") else classifier_config(source.info)
        write_json(Path(folder) / "config.json", config)
        kind = "model.safetensors" if source.path.endswith(".safetensors") else "pytorch_model.bin"
        (Path(folder) / kind).symlink_to(Path(source.path).absolute())
        return compare_hf(source, name, Path(folder))


def hf_usage(source: Source, folder: str) -> str:
    """Code that loads the export."""
    name, info = hf_class(source), source.info
    names = "ViTMAEForPreTraining, ViTMAEModel" if source.mae is not None else name
    shape = ", ".join(map(str, (info["in_chans"], *info["input_size"])))
    lines = [
        "import torch",
        f"from transformers import AutoImageProcessor, {names}",
        "",
        f'prepare = AutoImageProcessor.from_pretrained("{folder}")',
        f'images = torch.randn(2, {shape})  # or prepare([picture, ...], return_tensors="pt").pixel_values',
    ]
    if not name.startswith("ViTMAE"):
        output = "logits" if source.vit.num_classes else "pooler_output"
        lines += [f'model = {name}.from_pretrained("{folder}").eval()', "with torch.no_grad():",
                  f"    {output.removeprefix('pooler_')} = model(images).{output}"]  # fmt: skip
        return "\n".join(lines)
    lines += [
        f'encoder = ViTMAEModel.from_pretrained("{folder}", mask_ratio=0.0).eval()',
        f"order = torch.arange({source.vit.patch_embed.num_patches}).float().expand(len(images), -1)  "
        "# else it shuffles the tokens",
        "with torch.no_grad():",
        "    tokens = encoder(images, noise=order).last_hidden_state",
    ]
    if source.mae is not None:
        lines += [f'mae = ViTMAEForPreTraining.from_pretrained("{folder}").eval()', "with torch.no_grad():",
                  "    loss, reconstruction = mae(images)[:2]  # masks at random"]  # fmt: skip
    return "\n".join(lines)
