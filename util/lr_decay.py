"""Layer-wise learning-rate decay for fine-tuning (BEiT, arXiv 2106.08254; ELECTRA, arXiv 2003.10555)."""


def param_groups_lrd(model, weight_decay=0.05, no_weight_decay_list=(), layer_decay=0.75):
    """Groups the trainable parameters of a ViT by layer and by whether they are decayed.

    1-D tensors (biases, norms) and the names in `no_weight_decay_list` are not decayed. Layer ids: 0 for
    class token, registers, position table and patch embedding, block i -> i + 1, all else the last
    (depth + 1).

    Returns optimizer parameter groups with `lr_scale` = layer_decay ** (depth + 1 - id), which
    `util.lr_sched.adjust_learning_rate` multiplies into the learning rate, in the order in which the model's
    parameters first need them. Frozen parameters are left out.
    """
    last_layer = len(model.blocks) + 1
    groups = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and name not in no_weight_decay_list
        layer = get_layer_id_for_vit(name, last_layer)
        if (layer, decayed) not in groups:
            groups[layer, decayed] = {
                "lr_scale": layer_decay ** (last_layer - layer),
                "weight_decay": weight_decay if decayed else 0.0,
                "params": [],
            }
        groups[layer, decayed]["params"].append(parameter)
    return list(groups.values())


def get_layer_id_for_vit(name, last_layer):
    """Layer id (0 .. last_layer) of the parameter called `name` in a ViT with `last_layer` - 1 blocks."""
    if name in ("cls_token", "reg_token", "pos_embed") or name.startswith("patch_embed."):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return last_layer
