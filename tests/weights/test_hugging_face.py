"""Names and settings of Hugging Face's ViT and ViTMAE, there and back."""

import pytest
import torch
from export_utils import make_mae, make_vit

from util.weights.hugging_face import (
    classifier_config,
    decoder_from_hugging_face,
    from_hugging_face,
    info_of_config,
    mae_config,
    to_hugging_face,
)

INFO = dict(
    embed_dim=24, depth=2, num_heads=3, mlp_dim=96, input_size=(32, 32), patch_size=8, in_chans=3,
    mask_ratio=0.6, norm_pix_loss=True, decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=4,
    decoder_mlp_dim=64,
)  # fmt: skip


def new_names(key: str) -> str:
    """The names of transformers 5 inside its modules."""
    for old, new in [
        ("encoder.layer.", "layers."), ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"), ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"), ("intermediate.dense", "mlp.fc1"),
    ]:  # fmt: skip
        key = key.replace(old, new)
    return key.replace("output.dense", "mlp.fc2")


RENAMES = {
    "public files": lambda key: key,
    "modules of version 5": new_names,
    "files written by version 5": lambda key: key.replace("decoder_layers.", "decoder_encoder.layer."),
}


@pytest.mark.parametrize("names", RENAMES)
def test_full_model_comes_back(names):
    state = make_mae().state_dict()
    theirs = {RENAMES[names](key): value for key, value in to_hugging_face(state).items()}
    assert len(theirs) == len(state) + 4 * 4  # q, k, v and their biases of four blocks
    back = decoder_from_hugging_face(from_hugging_face(theirs))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], value) for key, value in state.items())


def test_names_are_those_of_the_public_files():
    keys = set(to_hugging_face(make_mae().state_dict()))
    block = "vit.encoder.layer.1."
    assert {
        "vit.embeddings.cls_token", "vit.embeddings.position_embeddings", "vit.layernorm.weight",
        "vit.embeddings.patch_embeddings.projection.weight", block + "attention.attention.query.weight",
        block + "attention.output.dense.bias", block + "intermediate.dense.weight",
        block + "output.dense.weight", block + "layernorm_before.bias", "decoder.mask_token",
        "decoder.decoder_pos_embed", "decoder.decoder_embed.weight", "decoder.decoder_norm.bias",
        "decoder.decoder_layers.1.attention.attention.value.bias", "decoder.decoder_pred.weight",
    } <= keys  # fmt: skip
    assert "classifier.weight" in to_hugging_face(make_vit().state_dict())
    assert "embeddings.cls_token" in to_hugging_face({"cls_token": torch.zeros(1)}, prefix="")


def test_settings_come_back():
    config = mae_config(INFO)
    assert config["layer_norm_eps"] == 1e-6 and config["image_size"] == 32
    info = info_of_config(config)
    assert info == {name: INFO[name] for name in info} and info["norm_pix_loss"] is True
    names = ["bee", "ant"]
    config = classifier_config({**INFO, "class_names": names, "nb_classes": 3})
    assert config["id2label"] == {"0": "bee", "1": "ant", "2": "LABEL_2"} and config["label2id"]["ant"] == 1
    assert info_of_config(config)["class_names"] == ["bee", "ant", "LABEL_2"]
    assert "class_names" not in info_of_config(classifier_config({**INFO, "nb_classes": 3}))
    assert classifier_config({**INFO, "input_size": (16, 32), "nb_classes": 3})["image_size"] == [16, 32]


@pytest.mark.parametrize("change", [{"model_type": "deit"}, {"hidden_act": "relu"}])
def test_other_models_are_refused(change):
    with pytest.raises(ValueError, match=str(next(iter(change.values())))):
        info_of_config({**mae_config(INFO), **change})
