"""demo/app.py: what it does with masks here; the page itself in a real browser (make test-browser)."""

import asyncio
import importlib.util
import itertools
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import models_mae
from util.cli.parser import ArgumentParser
from util.demo_set.files import SHIPPED
from util.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "demo" / "app.py"
PORT = 20000 + os.getpid() % 10000


def load_script():
    spec = importlib.util.spec_from_file_location("app", SCRIPT)
    module = sys.modules["app"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A full checkpoint, 32 x 64 pixels in patches of 8, that says its flags as ours do."""
    torch.manual_seed(0)
    sizes = dict(decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2)
    model = models_mae.mae_vit_tiny_patch16(img_size=(32, 64), patch_size=8, norm_pix_loss=True, **sizes)
    args = {"model": "mae_vit_tiny_patch16", "input_size": (32, 64), "patch_size": 8, "in_chans": 3}
    args |= {"norm_pix_loss": True, "mean": [0.5] * 3, "std": [0.25] * 3, **sizes}
    path = tmp_path_factory.mktemp("weights") / "checkpoint-0.pth"
    torch.save({"model": model.state_dict(), "args": args, "epoch": 0}, path)
    return path


@pytest.fixture
def player(checkpoint):
    app = load_script()
    args = app.ArgumentParser(parents=[app.get_args_parser()]).parse_args(["--resume", str(checkpoint)])
    weights = app.describe_file(args, "full")
    return app.Player(app.build(weights), weights, torch.device("cpu"))


def test_masks_and_clicks(player):
    assert player.grid == (4, 8) and player.scale == 6
    assert [player.patch_at(x, y) for x, y in ((0, 0), (47, 47), (48, 0), (383, 191), (999, -5))] == [
        0, 0, 1, 31, 7,
    ]  # fmt: skip
    masks = [player.random_mask(ratio, seed=3) for ratio in (0.0, 0.5, 0.75, 1.0)]
    assert [int(mask.sum()) for mask in masks] == [1, 16, 24, 31]
    assert all((small <= large).all() for small, large in itertools.pairwise(masks))
    assert not np.array_equal(masks[1], player.random_mask(0.5, seed=4))


@pytest.mark.parametrize("hidden", [0, 5, 32])
def test_pictures_follow_the_mask(player, hidden):
    removed = np.arange(32) < hidden
    picture = torch.randint(0, 256, (3, 32, 64), dtype=torch.uint8)
    masked, _, pasted = player.show(picture, removed)
    original = player.enlarge(picture.permute(1, 2, 0).numpy())
    assert masked.shape == pasted.shape == original.shape == (192, 384, 3)
    for patch in range(32):
        row, column = divmod(patch, 8)
        area = np.s_[row * 48 : (row + 1) * 48, column * 48 : (column + 1) * 48]
        assert (masked[area] == 128).all() == removed[patch]
        assert np.abs(masked[area].astype(int) - original[area]).max() <= 1 or removed[patch]
        assert (np.abs(pasted[area].astype(int) - original[area]).max() <= 1) == (not removed[patch])


def test_mistakes_are_one_clear_line(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "gradio.py").write_text("raise ImportError\n")  # as if it were not installed
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    command = [sys.executable, SCRIPT, "--resume", str(checkpoint)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "pip install 'gradio>=6'" in result.stderr
    assert result.stderr.count("\n") == 1
    app = load_script()
    parser = ArgumentParser(parents=[app.get_args_parser()])
    with pytest.raises(UserError, match="--port 0: must lie between 1 and 65535"):
        app.main(parser.parse_args(["--resume", str(checkpoint), "--port", "0"]))
    assert parser.parse_args([]).resume == str(SHIPPED / "model.safetensors")


@contextmanager
def browser():
    """A headless Chromium; what it logs and asks for is recorded."""
    from selenium import webdriver

    os.environ["SE_OFFLINE"] = "true"  # it would look for newer browsers on the network
    options = webdriver.ChromeOptions()
    flags = "headless=new no-sandbox disable-dev-shm-usage disable-gpu disable-background-networking"
    for flag in [*flags.split(), "window-size=1280,1100"]:
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options)
    try:
        yield driver
    finally:
        driver.quit()


@pytest.mark.browser
def test_the_page_in_a_browser(checkpoint, tmp_path):
    """Upload, ratio, clicks, buttons and samples each change the pictures; the console stays clean."""
    from selenium.webdriver import ActionChains, Keys
    from selenium.webdriver.common.by import By

    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "upload.png"):
        Image.fromarray(rng.integers(0, 256, (40, 80, 3), dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:300])
    words = ["--resume", checkpoint, "--port", PORT, "--device", "cpu", "--samples"]
    words += [tmp_path / "a.png", tmp_path / "b.png"]
    command = [sys.executable, "-u", SCRIPT, *map(str, words)]
    with open(tmp_path / "told.txt", "w", encoding="utf-8") as told:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=told, text=True)
    try:
        line = server.stdout.readline()
        assert f"http://127.0.0.1:{PORT}" in line
        taken = subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True)
        assert taken.returncode == 2 and f"--port {PORT}: not free" in taken.stderr
        with browser() as driver:
            driver.get(f"http://127.0.0.1:{PORT}/")

            def find(selector):
                return driver.find_element(By.CSS_SELECTOR, selector)

            def wait(condition, seconds=30):
                for _ in range(10 * seconds):
                    try:
                        if condition():
                            return
                    except Exception:
                        pass
                    time.sleep(0.1)
                driver.save_screenshot(str(tmp_path / "failed.png"))
                pytest.fail(f"the page did not come there; see {tmp_path / 'failed.png'}")

            def state():
                pictures = tuple(find(f"#panel-{i} img").get_attribute("src") for i in range(3))
                return pictures, find("#hidden textarea, #hidden input").get_attribute("value")

            def changes(action, text=None):
                before = state()
                action()
                wait(lambda: all(a != b for a, b in zip(state()[0], before[0], strict=True)))
                wait(lambda: text is None or state()[1] == f"{text} of 32 patches hidden")

            def click_patch(row, column):
                image = find("#panel-0 img")
                side = image.size["width"] / 8
                x, y = (column + 0.5) * side - image.size["width"] / 2, (row - 1.5) * side
                ActionChains(driver).move_to_element_with_offset(image, int(x), int(y)).click().perform()

            def slide_to(value):
                box = find("#ratio input[type=number]")
                box.send_keys(Keys.CONTROL, "a")
                box.send_keys(value, Keys.ENTER)

            wait(lambda: state()[1] == "24 of 32 patches hidden")
            start = state()
            assert "original patch mean/std" in driver.page_source  # a norm_pix_loss model
            changes(lambda: click_patch(2, 5))
            toggled = int(state()[1].split()[0])
            assert toggled in (23, 25)
            changes(lambda: click_patch(2, 5), 24)
            assert state() == start
            changes(lambda: slide_to("0.5"), 16)
            changes(lambda: find("#shuffle").click(), 16)
            changes(lambda: find("#invert").click(), 16)
            changes(lambda: slide_to("0.25"), 8)
            changes(lambda: driver.find_elements(By.CSS_SELECTOR, "#samples .thumbnail-lg")[1].click())
            upload = "#upload input[type=file]"
            changes(lambda: find(upload).send_keys(str(tmp_path / "upload.png")), 8)
            wait(lambda: driver.execute_script("return [...document.images].every(i => i.complete)"))
            driver.save_screenshot(str(tmp_path / "page.png"))
            assert [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"] == []
            asked = driver.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
            assert asked and all(f"127.0.0.1:{PORT}/" in address for address in asked)
            before = state()
            find("#upload button[aria-label='Remove Image']").click()
            wait(lambda: driver.find_elements(By.CSS_SELECTOR, upload))
            find(upload).send_keys(str(tmp_path / "broken.png"))
            wait(lambda: "this file cannot be shown" in driver.page_source)
            assert state() == before
        assert "Traceback" not in (tmp_path / "told.txt").read_text(encoding="utf-8")
        print(f"screenshot: {tmp_path / 'page.png'}")
    finally:
        server.terminate()
        server.wait(timeout=30)


@pytest.mark.browser
def test_addresses_are_not_fetched():
    import gradio

    field = gradio.Image(render=False)
    load_script().refuse_addresses(gradio, field)
    with pytest.raises(gradio.Error, match="only uploaded files"):
        asyncio.run(field.async_move_resource_to_block_cache("http://127.0.0.1:1/x.png"))
