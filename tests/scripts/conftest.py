"""What several tests of the scripts train on, and with."""

import pytest
from golden_utils import TINY_MAE
from image_utils import make_folder

import models_mae


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    make_folder(root / "train", 13, classes=2)
    make_folder(root / "val", 5, classes=2)
    return root


@pytest.fixture
def nano(monkeypatch):
    """A masked autoencoder of two blocks, 24 wide, that --model knows."""
    monkeypatch.setitem(
        models_mae.MODELS, "mae_vit_nano", lambda **sizes: models_mae.mae_vit(TINY_MAE, **sizes)
    )
