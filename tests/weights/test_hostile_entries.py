"""The short form of `tests/hostile.py`: entry x value x script."""

import random

import pytest
import torch
from hostile import Fuzz

import models_mae
import models_vit


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
    names = {id(models): set(models.MODELS) for models in (models_mae, models_vit)}
    yield Fuzz(tmp_path_factory.mktemp("hostile"))
    for models in (models_mae, models_vit):
        for name in set(models.MODELS) - names[id(models)]:
            del models.MODELS[name]


# As in the report of these faults: what ended in a traceback
SEEN = [
    ("finetune", "evaluate", ("model_info", "mean"), "text"),
    ("finetune", "predict", ("model_info", "mean"), "text"),
    ("finetune", "resume_classes", ("model_info", "input_size"), "texts"),
    ("pretrain", "features", ("args", "input_size"), "texts"),
    ("pretrain", "visualize", ("args", "decoder_num_heads"), "text"),
    ("finetune", "evaluate", ("model_info", "nb_classes"), "large"),
    ("finetune", "evaluate", ("model_info", "nb_classes"), "true"),
    ("finetune", "knn", ("model_info", "model"), "texts"),
    ("finetune", "export", ("model_info", "class_names"), "half"),
    *(("pretrain", reader, ("model", "pos_embed"), value)
      for reader in ("start", "features", "visualize", "knn")
      for value in ("empty", "scalar", "sparse", "meta", "float8")),
    *(("finetune", "predict", ("model_info", "class_names"), value) for value in ("escapes", "long")),
]  # fmt: skip


def test_c6_hostile_entries(fuzz):
    torch.set_num_threads(1)
    for case in [*SEEN, *random.Random(0).sample(fuzz.cases(), 45)]:
        fuzz.run(*case)
    assert not fuzz.bad, "\n".join(fuzz.bad)
    assert fuzz.counts["refused"] > 20 and fuzz.counts["done"] > 20
