"""main_knn.py: features of any file, no training; and the hook that pre-training calls."""

from argparse import Namespace

import pytest
import torch
from transfer_utils import given_args, make_mae, make_pictures, read_log, released_files, vit_test

import main_knn
import models_vit
from util.data.presets import eval_transform
from util.data.read import read_picture
from util.data.transforms import normalize_batch
from util.errors import UserError
from util.evaluate.knn import knn_accuracy, knn_loaders

COMMON = ["--model", "vit_test", "--input_size", "32", "--num_workers", "0", "--device", "cpu"]


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    monkeypatch.setitem(models_vit.MODELS, "vit_test", vit_test)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"))


def run_knn(*words):
    return main_knn.main(main_knn.get_args_parser().parse_args([*COMMON, *map(str, words)]))


@pytest.mark.parametrize("kind", ["encoder", "full", "finetuned"])
def test_released_layouts(pictures, tmp_path, kind, capsys):
    path = released_files(tmp_path)[kind]
    stats = run_knn("--data_path", pictures, "--finetune", path, "--k", 3, "--output_dir", tmp_path)
    assert stats["knn_acc1"] > 80 and stats["knn_acc5"] == 100
    assert f"* k-NN Acc@1 {stats['knn_acc1']:.3f}" in capsys.readouterr().out
    assert read_log(tmp_path)[-1]["knn_acc1"] == stats["knn_acc1"]


def test_random_encoder_and_batch_size(pictures):
    results = [run_knn("--data_path", pictures, "--batch_size", size, "--cls_token") for size in (1, 7, 64)]
    assert results[0] == results[1] == results[2]


def test_hook_of_pre_training_agrees_with_the_script(pictures, tmp_path):
    model = make_mae()
    torch.save({"model": model.state_dict()}, tmp_path / "mae.pth")
    args = Namespace(data_path=str(pictures), input_size=32, batch_size=5, num_workers=0)
    stats = knn_accuracy(model.train(), *knn_loaders(args), "cpu", args=args)
    assert model.training
    assert stats["acc1"] == run_knn("--data_path", pictures, "--finetune", tmp_path / "mae.pth")["knn_acc1"]


def test_hook_without_labels_or_val_says_why(tmp_path, capsys):
    data = make_pictures(tmp_path / "a", splits=("train",))
    assert knn_loaders(Namespace(data_path=str(data), input_size=32, batch_size=5, num_workers=0)) is None
    assert "no k-NN accuracy and no report card: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--k", "0"], "--k 0: must be at least 1"),
        (["--temperature", "0"], "--temperature 0.0: must be above 0"),
        (["--temperature", "nan"], "--temperature nan: must be above 0 and finite"),
        (["--patch_size", "0"], "--patch_size 0: must be at least 1"),
        (["--finetune", "nowhere.pth"], "no such file"),
    ],
)
def test_bad_flags(pictures, words, message):
    with pytest.raises(UserError, match=message):
        run_knn("--data_path", pictures, *words)


def test_class_token_of_a_global_pool_classifier(pictures, tmp_path):
    path = released_files(tmp_path)["finetuned"]
    with pytest.raises(UserError, match=r"--cls_token: .*has no norm for the class token"):
        run_knn("--data_path", pictures, "--finetune", path, "--cls_token")


def test_flags_are_those_of_a_file_that_stores_them(pictures, tmp_path):
    torch.manual_seed(0)
    state = vit_test(global_pool=True, num_classes=9).state_dict()
    info = dict(model="vit_test", global_pool=True, input_size=(32, 32), patch_size=8, in_chans=3)
    info |= dict(nb_classes=9, mean=(0.5, 0.5, 0.5), std=(0.3, 0.3, 0.3), recipe="finetune")
    torch.save({"model": state, "model_info": info}, tmp_path / "a.pth")
    torch.save({"model": state}, tmp_path / "plain.pth")
    words = ["--data_path", pictures, "--num_workers", "0", "--device", "cpu"]
    found = main_knn.main(given_args(main_knn, [*map(str, words), "--finetune", str(tmp_path / "a.pth")]))
    flags = ["--mean", "0.5", "--std", "0.3", "--finetune", tmp_path / "plain.pth"]
    assert found == run_knn("--data_path", pictures, *flags)
    with pytest.raises(UserError, match=r"--input_size: 64x64 was given, but .*a.pth was trained with 32x32"):
        words = [*map(str, words), "--input_size", "64", "--finetune", str(tmp_path / "a.pth")]
        main_knn.main(given_args(main_knn, words))


def test_output_folder_is_made_and_checked_before_the_work(pictures, tmp_path, monkeypatch):
    run_knn("--data_path", pictures, "--output_dir", tmp_path / "new" / "folder")
    assert len(read_log(tmp_path / "new" / "folder")) == 1
    (tmp_path / "file").touch()
    monkeypatch.setattr(main_knn, "knn_accuracy", None)  # the work
    with pytest.raises(UserError, match=r"--output_dir .*file: cannot be written"):
        run_knn("--data_path", pictures, "--output_dir", tmp_path / "file")


def test_hook_uses_the_scripts_transform_above_224_pixels(pictures):
    args = Namespace(data_path=str(pictures), input_size=256, batch_size=5, num_workers=0)
    for loader in knn_loaders(args):
        picture = read_picture(loader.dataset.files.paths[0], 3)
        image = eval_transform(args, always_crop=True)(picture)
        assert torch.equal(normalize_batch(loader.dataset[0][0][None], "cpu")[0], image)
        assert not torch.equal(image, eval_transform(args)(picture))


def test_warns_of_other_means(pictures, tmp_path, capsys):
    torch.save({"model": make_mae().state_dict(), "args": {"mean": (0.5, 0.5, 0.5)}}, tmp_path / "a.pth")
    run_knn("--data_path", pictures, "--finetune", tmp_path / "a.pth")
    assert "a.pth was trained with --mean 0.5 0.5 0.5, now it is 0.485 0.456 0.406" in capsys.readouterr().err
