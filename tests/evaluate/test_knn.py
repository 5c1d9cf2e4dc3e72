"""Weighted k-NN on frozen features, against a plain computation."""

import numpy as np
import pytest
import torch
from golden_utils import TINY, TINY_MAE

import models_mae
import models_vit
from util.data.loader import Batch
from util.data.sampler import EpochSampler, EvalSampler
from util.evaluate.features import FeatureLoader, encoder_features, extract_features
from util.evaluate.knn import knn_accuracy, knn_from_features


def plain_knn(train, train_labels, val, k, temperature):
    """Best classes by votes, one query at a time, in float64 numpy."""
    train = train / np.linalg.norm(train, axis=1, keepdims=True)
    answers = []
    for query in val / np.linalg.norm(val, axis=1, keepdims=True):
        similarity = train @ query
        nearest = np.argsort(-similarity)[:k]
        votes = np.zeros(train_labels.max() + 1)
        for i in nearest:
            votes[train_labels[i]] += np.exp(similarity[i] / temperature)
        answers.append(votes.argmax())
    return np.array(answers)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (5, 1.0), (1000, 0.07)])
def test_against_plain_computation(k, temperature):
    rs = np.random.RandomState(0)
    train, val = rs.standard_normal((60, 8)), rs.standard_normal((40, 8))
    train_labels, val_labels = rs.randint(0, 7, 60), rs.randint(0, 7, 40)
    expected = 100 * (plain_knn(train, train_labels, val, k, temperature) == val_labels).mean()
    found = knn_from_features(*map(torch.from_numpy, (train, train_labels, val, val_labels)), k, temperature)
    assert found["acc1"] == pytest.approx(expected)
    assert found["acc5"] >= found["acc1"]


def test_temperature_without_overflow():
    train, labels = torch.eye(4), torch.arange(4)
    assert knn_from_features(train, labels, train + 0.01, labels, 4, 1e-3) == {"acc1": 100.0, "acc5": 100.0}


def loader(count, size, seed):
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % 3
    images += 2 * labels[:, None, None, None]  # brightness tells the class
    order = torch.arange(count)
    parts = zip(*(column.split(size) for column in (images, labels, order)), strict=True)
    return [Batch(*part) for part in parts]


@pytest.mark.parametrize("kind", ["mae", "vit", "function"])
def test_knn_accuracy_of_models_and_functions(kind):
    torch.manual_seed(0)
    model = {
        "mae": lambda: models_mae.MaskedAutoencoderViT(**TINY_MAE),
        "vit": lambda: models_vit.VisionTransformer(True, num_classes=3, **TINY),
        "function": lambda: lambda images: images.mean(dim=(2, 3)) + 5 * torch.tensor([0.0, 0.0, 1.0]),
    }[kind]()
    stats = knn_accuracy(model, loader(60, 7, 0), loader(30, 7, 1), "cpu", k=5)
    assert stats["acc1"] > 60
    if kind != "function":
        assert model.training


def test_mae_features_are_the_encoders_without_masking():
    model = models_mae.MaskedAutoencoderViT(**TINY_MAE).double().eval()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    noise = torch.arange(16.0).expand(2, -1)  # keeps every patch where it is
    with torch.no_grad():
        latent, _, _ = model.forward_encoder(images, 0.0, noise)
        torch.testing.assert_close(encoder_features(model, images), latent[:, 1:].mean(1))
        torch.testing.assert_close(encoder_features(model, images, global_pool=False), latent[:, 0])


def test_features_do_not_depend_on_the_batch_size_and_come_in_order():
    torch.manual_seed(0)
    model = models_vit.VisionTransformer(False, num_classes=0, **{**TINY, "embed_dim": 96}).eval()
    results = [extract_features(model.forward_features, loader(70, size, 0), "cpu") for size in (1, 7, 70)]
    for features, labels in results:
        assert torch.equal(features, results[0][0]) and torch.equal(labels, torch.arange(70) % 3)
    shuffled = [Batch(*(part.flip(0) for part in batch)) for batch in reversed(loader(70, 70, 0))]
    features, labels = extract_features(model.forward_features, shuffled, "cpu")
    # Torch's bounds for float32 (1.3e-6 of the value, 1e-5): in groups of other members matrix products may
    # add up their 96 terms in another order, sqrt(96) x 6e-8 each
    torch.testing.assert_close(features, results[0][0])
    assert torch.equal(labels, results[0][1])


def test_cached_views_follow_the_epoch_and_the_sampler():
    features, labels = torch.arange(20.0).reshape(2, 5, 2), torch.tensor([5, 6, 7, 8, 9])
    sampler = EpochSampler(5, seed=1, batch_size=2)
    loader = FeatureLoader(features, labels, sampler, 2, drop_last=True)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = [index for _, index in sampler]
        batches = list(loader)
        assert len(loader) == len(batches) == 2 and loader.sampler is sampler
        assert torch.cat([b[2] for b in batches]).tolist() == order
        for images, targets, indices in batches:
            assert torch.equal(images, features[epoch % 2][indices]) and torch.equal(targets, labels[indices])
    whole = list(FeatureLoader(features[:1], labels, EvalSampler(5), 2))
    assert [len(b[1]) for b in whole] == [2, 2, 1]
