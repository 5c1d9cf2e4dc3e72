"""Whole runs on archives: final weights are the folder's to the bit, also resumed, also in order `near`."""

import os
import subprocess
import sys

import pytest
import torch
from archive_utils import make_parquet, make_shards, make_tar, make_zip, serve
from golden_utils import REPO
from image_utils import make_folder
from test_main_pretrain import TINY, assert_same, run, weights

import main_finetune
import main_knn
from util.cli.parser import ArgumentParser, parse_args
from util.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    make_folder(tmp_path / "set" / "train", 13, classes=2)
    make_folder(tmp_path / "set" / "val", 4, classes=2)
    return tmp_path / "set"


def final(path, output, *flags):
    run(path, output, *flags)
    return weights(output / "checkpoint-1.pth")


def test_final_weights_are_the_folders(tmp_path, folder):
    expected = final(folder, tmp_path / "folder")
    shards = make_shards(tmp_path / "shards", folder)
    assert_same(
        final(make_zip(tmp_path / "all.zip", folder), tmp_path / "zip", "--num_workers", "2"), expected
    )
    assert_same(final(make_tar(tmp_path / "all.tar", folder), tmp_path / "tar"), expected)
    assert_same(final(shards, tmp_path / "4"), expected)
    with serve(tmp_path) as server:
        assert_same(final(f"{server.address}/shards/{{000..003}}.tar", tmp_path / "http"), expected)


def test_near_resumes_to_the_bit_and_is_another_order(tmp_path, folder):
    shards = make_shards(tmp_path / "shards", folder)
    whole = final(shards, tmp_path / "whole", "--shuffle", "near")
    stopped = ["--shuffle", "near", "--max_steps", "2", "--save_minutes", "0.0001"]
    run(shards, tmp_path / "parts", *stopped)
    assert_same(final(shards, tmp_path / "parts", "--shuffle", "near", "--resume", "auto"), whole)
    full = final(shards, tmp_path / "full")
    assert any(not torch.equal(whole[name], full[name]) for name in whole)
    with pytest.raises(UserError, match="--shuffle near: is for images in archives"):
        run(folder, tmp_path / "none", "--shuffle", "near")


def test_other_scripts_take_archives(tmp_path, folder, capsys):
    sizes = ["--model", "vit_tiny_patch16", "--input_size", "32", "--patch_size", "8", "--num_workers", "0"]
    sizes += ["--device", "cpu", "--batch_size", "4"]
    results = []
    for number, path in enumerate((folder, make_tar(tmp_path / "all.tar", folder))):
        output = tmp_path / str(number)
        parser = ArgumentParser(parents=[main_finetune.get_args_parser()])
        flags = ["--data_path", str(path), "--output_dir", str(output), "--log_dir", "", "--epochs", "1"]
        main_finetune.main(parse_args(parser, [*sizes, *flags, "--warmup_epochs", "0"]))
        parser = ArgumentParser(parents=[main_knn.get_args_parser()])
        accuracy = main_knn.main(parse_args(parser, [*sizes, "--data_path", str(path), "--k", "3"]))
        results.append((weights(output / "checkpoint-0.pth"), accuracy))
    assert_same(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert "4 images in 2 classes" in capsys.readouterr().out


def start(path, output, processes, *flags):
    """The same in processes of their own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    command += ["--master_port", str(20000 + os.getpid() % 9000), "main_pretrain.py", *TINY, *flags]
    command += ["--data_path", str(path), "--output_dir", str(output), "--log_dir", "", "--num_workers", "2"]
    subprocess.run(command, cwd=REPO, check=True, capture_output=True)
    return weights(output / "checkpoint-1.pth")


@pytest.mark.slow
def test_final_weights_in_two_processes(tmp_path, folder):
    expected = start(folder, tmp_path / "folder", 2)
    shards = make_shards(tmp_path / "shards", folder)
    for path in (shards, make_zip(tmp_path / "a.zip", folder), make_tar(tmp_path / "a.tar", folder)):
        assert_same(start(path, tmp_path / f"{path.name}-out", 2), expected)
    with serve(tmp_path) as server:
        address = f"{server.address}/shards/{{000..003}}.tar"
        assert_same(start(address, tmp_path / "http", 2), expected)
        near = start(address, tmp_path / "near", 2, "--shuffle", "near")
    assert_same(start(shards, tmp_path / "near-here", 2, "--shuffle", "near"), near)


@pytest.mark.extra
def test_final_weights_of_parquet(tmp_path, folder):
    pytest.importorskip("pyarrow")
    expected = final(folder, tmp_path / "folder")
    path = make_parquet(tmp_path / "parquet", folder)
    assert_same(final(path, tmp_path / "one"), expected)
    assert_same(final(path, tmp_path / "two", "--num_workers", "2"), expected)
