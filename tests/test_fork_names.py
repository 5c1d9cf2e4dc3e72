"""The names that forks of the reference import, where they import them, with the parameters they pass."""

import importlib
import inspect

import pytest

# module: {name: its first parameters, in order; None where only the name counts}
NAMES = {
    "engine_pretrain": {
        "train_one_epoch": "model data_loader optimizer device epoch loss_scaler log_writer args",
    },
    "engine_finetune": {
        "train_one_epoch": "model criterion data_loader optimizer device epoch loss_scaler max_norm mixup_fn "
        "log_writer args",
        "evaluate": "data_loader model device",
    },
    "main_pretrain": {"get_args_parser": "", "main": "args"},
    "main_finetune": {"get_args_parser": "", "main": "args"},
    "main_linprobe": {"get_args_parser": "", "main": "args"},
    "models_mae": {
        "MaskedAutoencoderViT": "img_size patch_size in_chans embed_dim depth num_heads decoder_embed_dim "
        "decoder_depth decoder_num_heads mlp_ratio norm_layer norm_pix_loss",
        "mae_vit_base_patch16": None,
        "mae_vit_large_patch16": None,
        "mae_vit_huge_patch14": None,
        "mae_vit_base_patch16_dec512d8b": None,
        "mae_vit_large_patch16_dec512d8b": None,
        "mae_vit_huge_patch14_dec512d8b": None,
    },
    "models_vit": {
        "VisionTransformer": None,
        "vit_base_patch16": None,
        "vit_large_patch16": None,
        "vit_huge_patch14": None,
    },
    "util.crop": {"RandomResizedCrop": None},
    "util.datasets": {"build_dataset": "is_train args", "build_transform": "is_train args"},
    "util.lars": {"LARS": None},
    "util.lr_decay": {"param_groups_lrd": "model weight_decay no_weight_decay_list layer_decay"},
    "util.lr_sched": {"adjust_learning_rate": "optimizer epoch args"},
    "util.misc": {
        "MetricLogger": "delimiter",
        "NativeScalerWithGradNormCount": None,
        "SmoothedValue": "window_size fmt",
        "all_reduce_mean": "x",
        "get_grad_norm_": "parameters norm_type",
        "get_rank": "",
        "get_world_size": "",
        "init_distributed_mode": "args",
        "is_dist_avail_and_initialized": "",
        "is_main_process": "",
        "load_model": "args model_without_ddp optimizer loss_scaler",
        "save_model": "args epoch model model_without_ddp optimizer loss_scaler",
        "save_on_master": "",
        "setup_for_distributed": "is_master",
    },
    "util.pos_embed": {
        "get_1d_sincos_pos_embed_from_grid": "embed_dim pos",
        "get_2d_sincos_pos_embed": "embed_dim grid_size cls_token",
        "get_2d_sincos_pos_embed_from_grid": "embed_dim grid",
        "interpolate_pos_embed": "model checkpoint_model",
    },
}
CASES = [(module, name, first) for module, names in NAMES.items() for name, first in names.items()]
METHODS = {
    "forward": "imgs mask_ratio",
    "forward_encoder": "x mask_ratio",
    "forward_decoder": "x ids_restore",
    "forward_loss": "imgs pred mask",
    "patchify": "imgs",
    "unpatchify": "x",
    "random_masking": "x mask_ratio",
}


def parameters(function) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize(("module", "name", "first"), CASES, ids=lambda value: value and str(value)[:40])
def test_a_fork_finds_the_name(module, name, first):
    found = getattr(importlib.import_module(module), name)
    if first is not None:
        assert parameters(found)[: len(first.split())] == first.split()


@pytest.mark.parametrize("name", METHODS)
def test_the_models_methods(name):
    import models_mae

    names = METHODS[name].split()
    assert parameters(getattr(models_mae.MaskedAutoencoderViT, name))[: len(names)] == names
