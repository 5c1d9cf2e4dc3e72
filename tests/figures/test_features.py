"""features.py against numpy's SVD and a loop over neighbours; images at full size, tile by tile."""

import numpy as np
import pytest
import torch
from golden_utils import TINY, TINY_MAE, fill

from models_mae import MaskedAutoencoderViT
from models_vit import VisionTransformer
from util.evaluate.features import encoder_features
from util.figures.features import (
    colours,
    components,
    foreground,
    nearest,
    neighbour_panels,
    patch_features,
    pca_panels,
)
from util.figures.reconstruction import PANELS, padded_size, reconstruct, reconstruct_full
from util.rng import fixed_noise

STATS = [0.5] * 3, [0.25] * 3


def tiny_mae(**options):
    return fill(MaskedAutoencoderViT(**{**TINY_MAE, **options}), 3, 0.2, skip="pos_embed").float().eval()


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("rows", "width"), [(300, 24), (10, 24)])
def test_components_are_those_of_numpys_svd_up_to_sign(rows, width):
    features = random(rows, width) * torch.linspace(1, 3, width) + 5
    found = components(features).numpy()
    centred = features.double().numpy() - features.double().numpy().mean(axis=0)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    expected = (u * s)[:, :3]
    # Float64; by the squares of singular values, which are apart by a tenth of the largest's at least: 1e-16
    # times their ratios, 10, squared, times some hundred terms
    for k in range(3):
        sign = np.sign(expected[:, k] @ found[:, k])
        np.testing.assert_allclose(found[:, k], sign * expected[:, k], rtol=0, atol=1e-10 * s[0])
        assert sign * vt[k][np.abs(vt[k]).argmax()] > 0  # the rule that fixes it
    assert components(features).numpy().tobytes() == found.tobytes()


def test_colours_and_foreground():
    scores = torch.cat([random(500, 2).double(), torch.full((500, 1), 1e-17, dtype=torch.float64)], dim=1)
    shown = colours(scores)
    assert shown.dtype == torch.float32 and shown.min() == 0 and shown[:, :2].max() == 1
    assert shown[:, 2].std() == 0  # rounding is not stretched to colours
    object_ = torch.full((2, 5, 5), -1.0)
    object_[:, 1:4, 1:4] = 1.0
    assert torch.equal(foreground(object_), object_ > 0)
    assert torch.equal(foreground(-object_), object_ > 0)  # the sign is not the library's
    assert foreground(object_, 2.0).sum() == 0


def test_patch_features_are_what_the_encoder_gives():
    model, images = tiny_mae(), random(3, 3, 32, 32)
    found = patch_features(model.train(), images, batch_size=2)
    assert model.training and found.shape == (3, 16, 24)
    # Float32, values of about 1: sums of up to 96 terms in batches of another size, 6e-7 each, in two blocks
    with torch.no_grad():
        torch.testing.assert_close(
            found.mean(1), encoder_features(model.eval(), images), rtol=1e-5, atol=1e-5
        )
    vit = VisionTransformer(global_pool=True, num_classes=0, **TINY).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            patch_features(vit, images), vit.forward_tokens(images)[:, 1:], rtol=1e-5, atol=1e-5
        )


def test_pca_panels_are_the_same_twice():
    model, images = tiny_mae(img_size=(32, 64)), random(3, 3, 32, 64)
    one, two = (pca_panels(model, images, *STATS) for _ in range(2))
    assert len(one.columns) == len(one.headings) == 4
    assert all(
        panel.shape == (3, 3, 32, 64) and 0 <= panel.min() <= panel.max() <= 1 for panel in one.columns
    )
    assert one.draw("c", ["a", "b", "c"]).tobytes() == two.draw("c", ["a", "b", "c"]).tobytes()
    whole = pca_panels(model, images, *STATS, threshold=-100.0)  # all is foreground
    assert torch.equal(whole.columns[3], whole.columns[2])
    assert pca_panels(model, images, *STATS, threshold=100.0).columns[3].max() == 0


def test_nearest_is_that_of_a_loop():
    features = random(40, 8)
    features[7] = 3 * features[5]  # equally like all others
    found = nearest(features, [0, 5, 39], 6)
    unit = features.double().numpy() / np.linalg.norm(features.double().numpy(), axis=1, keepdims=True)
    for query, row in zip([0, 5, 39], found.tolist(), strict=True):
        others = [i for i in range(40) if i != query]
        assert row == sorted(others, key=lambda i: (-round(float(unit[query] @ unit[i]), 12), i))[:6]
    assert found[1, 0] == 7
    assert sorted(nearest(features[:3], [1], 9)[0].tolist()) == [0, 2]


def test_neighbour_panels_read_what_can_be_read():
    images = random(70, 3, 32, 32)
    images[69] = images[3] + 1e-4

    def read(numbers):
        kept = [i for i in numbers if i != 4]
        return images[kept], kept

    panels = neighbour_panels(tiny_mae(), read, 70, [0, 3], 2, *STATS)
    assert panels.headings == ["image", "neighbour 1", "neighbour 2"]
    assert torch.equal(panels.columns[1][1], (images[69] * 0.25 + 0.5).clamp(0, 1))


@pytest.mark.parametrize("norm", [False, True])
def test_full_size_is_the_tiles_one_by_one(norm):
    model, image = tiny_mae(img_size=(32, 16), norm_pix_loss=norm), random(3, 50, 40)
    assert padded_size((50, 40), (32, 16)) == (64, 48)
    panels = reconstruct_full(model, image, 0.5, 7, *STATS, batch_size=4)
    assert list(panels) == list(PANELS) and all(panel.shape == (1, 3, 50, 40) for panel in panels.values())
    assert torch.equal(panels["original"][0], (image * 0.25 + 0.5).clamp(0, 1))
    noise = fixed_noise(6, 8, 7)
    tile = reconstruct(model, image[None, :, :32, 16:32], noise[1:2], 0.5, *STATS)
    for name in PANELS:
        # Float32 and batches of another size, as above
        torch.testing.assert_close(panels[name][:, :, :32, 16:32], tile[name], rtol=1e-4, atol=1e-4)
    one = reconstruct_full(model, image[:, :32, :16], 0.5, 7, *STATS)
    own = reconstruct(model, image[None, :, :32, :16], noise[:1], 0.5, *STATS)
    assert all(torch.equal(one[name], own[name]) for name in PANELS)
