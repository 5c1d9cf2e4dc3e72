"""report.py: one page of a run, whatever lies in its folder; in a real browser with make test-browser."""

import base64
import contextlib
import csv
import hashlib
import io
import json
import os
import re
import socket
from functools import partial
from html.parser import HTMLParser

import pytest
import torch
from golden_utils import TINY_MAE, fill
from image_utils import make_folder
from PIL import Image

import main_finetune
import main_pretrain
import models_mae
import models_vit
import report
from models_mae import MaskedAutoencoderViT
from util.cli.parser import ArgumentParser, parse_args
from util.errors import UserError
from util.report.folder import read_confusion, read_log
from util.report.page import nice_range
from util.report.pictures import embed
from util.run import owner

EVIL = "<script>alert(1)</script>&\"'<b>"


class Page(HTMLParser):
    """Tags, texts and tables of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.tables, self.cell = [], "", [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append((dict(attrs).get("class"), []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][1][-1].append("")
            self.cell = True

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.cell = None

    def handle_data(self, data):
        self.text += data
        if self.cell:
            self.tables[-1][1][-1][-1] += data

    def of(self, kind):
        return [rows for name, rows in self.tables if name == kind]


def run(*words):
    report.main(parse_args(ArgumentParser(parents=[report.get_args_parser()]), [str(word) for word in words]))


def records(epochs):
    return [
        {"train_lr": 2.46e-3 + 4e-5 * e, "train_loss": 1 / (e + 3), "epoch": e, "run": "a"}
        | ({"val_loss": 1 / (e + 2.5)} if e % 2 == 0 else {})
        for e in range(epochs)
    ]


def write_log(folder, lines):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.txt").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def trained(tmp_path):
    """A run of three epochs, with a checkpoint, a picture, a card and held-out images."""
    data = tmp_path / "data"
    make_folder(data / "train", 4)
    make_folder(data / "val", 9)
    folder = write_log(tmp_path / "out", records(3))
    model = fill(MaskedAutoencoderViT(**TINY_MAE), 3, 0.2, skip="pos_embed").float()
    args = {"input_size": 32, "patch_size": 8, "num_heads": 3, "decoder_num_heads": 4, "norm_pix_loss": True}
    args |= {
        "data_path": str(data),
        "epochs": 3,
        "mean": [0.5] * 3,
        "std": [0.2] * 3,
        "blr": 0.1,
        "note": EVIL,
    }
    listing = {"id": "a", "images": 4, "files": "f1" * 32, "held_out": {"images": 9, "files": "e2" * 32}}
    content = {"model": model.state_dict(), "args": args, "epoch": 2, "run": listing}
    torch.save(content, folder / "checkpoint-2.pth")
    for epoch in range(3):
        Image.new("RGB", (60, 30), (80 * epoch, 0, 0)).save(folder / f"reconstruction-{epoch}.png")
    (folder / "card.md").write_text(f"# Report card of {EVIL}\n\n| protocol | encoder |\n| --- | --- |\n")
    (folder / "plan.txt").write_text("train: 4 images\n")
    return folder


def state_of(folder):
    """Digest and time of every file but the page."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "report.html":
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns
    return found


def test_the_page_has_it_all_and_touches_nothing(trained, capsys):
    before = state_of(trained.parent)
    run(trained, "--images", 8)
    assert state_of(trained.parent) == before and "report.html" in capsys.readouterr().out
    text = (trained / "report.html").read_text(encoding="utf-8")
    page, log = Page(text), [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()]
    assert len(text) < 5_000_000 and "Complete: 3 of 3 epochs. checkpoint-2.pth\n" in page.text
    # Every number of log.txt, and the curves at their places
    (head, *rows) = page.of("numbers epochs")[0]
    assert rows == [[str(record.get(name, "")) for name in head] for record in log]
    lines = [tag["points"] for name, tag in page.tags if name == "polyline" and tag["points"] != "0,4 28,4"]
    loss = [float(point.split(",")[1]) for point in lines[1].split()]
    first, middle, last = (record["train_loss"] for record in log)
    assert len(lines) == 3 and loss[0] < loss[1] < loss[2]  # y goes down
    assert abs((loss[1] - loss[0]) / (loss[2] - loss[0]) - (first - middle) / (first - last)) < 0.01
    assert "train: 0.2 (epoch 2); smallest 0.2 (epoch 2), largest 0.333333 (epoch 0)" in page.text
    # Settings, data, texts
    facts = dict(page.of("settings")[0][1:])
    assert facts["note"] == EVIL and facts["blr"] == "0.1" and facts["held-out images"] == "9"
    assert facts["training digest of names"] == "f1" * 32
    assert "train: 4 images" in page.text and f"# Report card of {EVIL}" in page.text
    # Pictures
    images = [tag for name, tag in page.tags if name == "img"]
    assert [image["alt"] for image in images] == [
        "Reconstructions after epoch 0", "Reconstructions after epoch 1", "Reconstructions after epoch 2",
        "Best and worst reconstructed of 8 images, with their losses",
        "Principal components of patch features as colours", "Nearest neighbours among 8 images",
        "Attention of the class token, last block",
    ]  # fmt: skip
    drawn = [Image.open(io.BytesIO(base64.b64decode(i["src"].split(",")[1]))) for i in images]
    assert [picture.getpixel((5, 5))[0] // 70 for picture in drawn[:3]] == [0, 1, 2]
    assert all(picture.width > 400 for picture in drawn[3:])
    # Nothing from elsewhere, nothing that runs
    assert not re.search(r"https?://|@import|url\(", text)
    assert {name for name, _ in page.tags}.isdisjoint({"script", "iframe", "b", "object"})
    assert all(i["src"].startswith("data:") for i in images) and "default-src 'none'" in text


def test_best_and_worst_are_those_of_the_loss(trained, monkeypatch):
    from util.figures import canvas

    labels, grid = [], canvas.draw_grid
    monkeypatch.setattr(canvas, "draw_grid", lambda *a: (labels.append(a[3]), grid(*a))[1])
    run(trained)
    losses = [float(label.split()[0]) for label in labels[0]]
    assert len(losses) == 6 and losses == sorted(losses) and losses[2] < losses[3]
    names = [label.split()[1] for label in labels[0]]
    assert len(set(names)) == 6


def test_runs_side_by_side(trained, tmp_path):
    other = write_log(tmp_path / "elsewhere/out", records(2))
    content = torch.load(trained / "checkpoint-2.pth", weights_only=True)
    content["args"] |= {"blr": 0.2, "seed": 1}
    torch.save(content, other / "checkpoint-1.pth")
    with pytest.raises(UserError, match=r"2 runs: pass --output FILE\.html"):
        run(trained, other)
    before = state_of(tmp_path)
    run(trained, other, "--output", tmp_path / "both.html", "--images", 6)
    page = Page((tmp_path / "both.html").read_text(encoding="utf-8"))
    assert not (trained / "report.html").exists()
    assert {k: v for k, v in state_of(tmp_path).items() if "both" not in k} == before
    differs, same = page.of("settings")
    assert [row[0].removeprefix("≠ ") for row in differs[1:]] == ["blr", "seed"]
    assert differs[0] == ["", "out (1)", "out (2)"] and differs[1][1:] == ["0.1", "0.2"]
    assert all(row[1] == row[2] for row in same[1:]) and "Not complete, and not going on: 2 of 3" in page.text
    assert "out (1) train: 0.2 (epoch 2)" in page.text and "out (2) val: 0.4 (epoch 0)" in page.text


@pytest.mark.parametrize("lines", ['{"train_loss": 0.5, "epo', "\0\0\0", "[" * 5000, "7", "caf\udce9"])
def test_half_written_lines_are_left_out(tmp_path, lines):
    folder = write_log(tmp_path / "run", records(2))
    with open(folder / "log.txt", "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(lines)
    run(folder)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert "Lines of log.txt that cannot be read and are left out: 1." in page.text
    assert len(page.of("numbers epochs")[0]) == 3 and "No pictures of features: no checkpoint" in page.text


def test_epochs_of_earlier_runs_do_not_count():
    old, new = records(5), [{**record, "run": "b"} for record in records(3)]
    lines = [json.dumps(record) for record in [*old, {"knn_acc1": 5.0}, *new[1:]]]
    epochs, others, broken = read_log([*lines, "", "{"])
    assert [(r["epoch"], r["run"]) for r in epochs] == [(0, "a"), (1, "b"), (2, "b")]
    assert others == [{"knn_acc1": 5.0}] and broken == 1


def test_odd_numbers_and_settings(trained):
    """What no script writes, but a file may hold."""
    lines = records(3)
    lines[0] |= {"a": 1e12, "b": float("nan"), "c": 10**400, "d": True, "e": "x", "f": -1e299, "g": None}
    lines[1] |= {"a": 1e12, "f": 1e299}
    write_log(trained, [*lines, {"epoch": 10**400}, {"epoch": True}])
    content = torch.load(trained / "checkpoint-2.pth", weights_only=True)
    content["args"] |= {"data_path": 5, "epochs": "many", 7: [[]], "model": {}}
    torch.save({**content, "run": {"held_out": 3, "images": "x" * 999}}, trained / "checkpoint-2.pth")
    run(trained)
    page = Page((trained / "report.html").read_text(encoding="utf-8"))
    titles = [tag["aria-label"].split()[0] for _, tag in page.tags if "aria-label" in tag]
    assert titles == ["lr", "loss", "a", "f"] and "No more pictures of features" in page.text


@pytest.mark.parametrize("value", [0.1125, 0.531008, -0.0327869, 3, 91.2, 5.2418e-05, 0.0])
def test_the_axis_of_one_value_has_ticks_that_fit(value):
    low, high, step = nice_range([value, value])
    ticks = [f"{low + i * step:g}" for i in range(round((high - low) / step) + 1)]
    assert low <= value <= high and len(set(ticks)) == len(ticks) and max(map(len, ticks)) <= 7


def test_a_run_that_is_going_on(trained):
    record = {"id": "a", "host": socket.gethostname(), "pid": os.getppid(), "environment": "Python 9"}
    (trained / ".run.json").write_text(json.dumps(record))
    assert owner.is_at_work(trained)
    run(trained, "--images", 0)
    text = (trained / "report.html").read_text(encoding="utf-8")
    assert "This run is going on: 3 of 3 epochs logged" in text and "<td>Python 9</td>" in text
    (trained / "log.txt").unlink()
    with pytest.raises(UserError, match=r"holds no log\.txt; its first epoch is not over"):
        run(trained)
    (trained / ".run.json").write_text(json.dumps({**record, "pid": 2**30}))  # stopped by --max_steps
    with pytest.raises(UserError, match=r"holds no log\.txt; its first epoch is not over"):
        run(trained)


def test_what_is_no_run_is_one_line(tmp_path, trained):
    with pytest.raises(UserError, match="no such folder; name the --output_dir"):
        run(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no log\.txt; name the --output_dir of a training"):
        run(tmp_path / "empty")
    with pytest.raises(UserError, match="is a folder; name a file"):
        run(trained, "--output", tmp_path / "empty")
    with pytest.raises(UserError, match="--images -1: must be at least 0"):
        run(trained, "--images", -1)
    assert not list((tmp_path / "empty").iterdir())
    # What is broken beside log.txt is told on the page
    (trained / "checkpoint-2.pth").write_bytes(b"no checkpoint")
    (trained / "reconstruction-1.png").write_bytes(b"no picture")
    run(trained)
    text = Page((trained / "report.html").read_text(encoding="utf-8")).text
    assert "cannot be read as a checkpoint" in text and "reconstruction-1.png cannot be read" in text


def test_images_that_are_gone(trained):
    (trained.parent / "data").rename(trained.parent / "moved")
    run(trained)
    text = Page((trained / "report.html").read_text(encoding="utf-8")).text
    assert re.search("No more pictures of features: .*data", text) and "Complete" in text


def predictions(folder, pairs):
    with open(folder / "predictions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "prediction", "correct", "confidence", "loss"])
        writer.writerows(("x.jpg", one, two, int(one == two), 0.5, 1.0) for one, two in pairs)


def test_confusion_matrix_with_names_of_markup(tmp_path):
    folder = write_log(tmp_path / "run", records(1))
    predictions(folder, [(EVIL, EVIL), (EVIL, "cat"), ("cat", "cat"), (EVIL, EVIL)])
    Image.new("RGB", (40, 40)).save(folder / "confusion.png")
    run(folder)
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    (matrix,) = page.of("numbers matrix")
    assert matrix == [["", "1", "2"], [f"1 {EVIL}", "2", "1"], ["2 cat", "", "1"]]
    assert "3 of 4 images in 2 classes are right" in page.text and f"{EVIL} for cat 1." in page.text
    assert {name for name, _ in page.tags}.isdisjoint({"script", "b", "img"})


def test_a_thousand_classes(tmp_path):
    folder = write_log(tmp_path / "run", records(1))
    names = [f"class {i:04d} {EVIL}" for i in range(1000)]
    predictions(
        folder, [(name, names[(i + i % 2) % 1000]) for i, name in enumerate(names)] + [names[3:5]] * 9
    )
    run(folder)
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(text) < 100_000 and not page.of("numbers matrix")
    assert "500 of 1009 images in 1000 classes" in page.text and f"{names[3]} for {names[4]} 10," in page.text


def test_other_files_of_that_name_are_no_matrix(tmp_path):
    (tmp_path / "predictions.csv").write_text("path,label a,probability a,prediction a\nx,1,0.5,1\n")
    assert read_confusion(tmp_path / "predictions.csv") is None
    assert read_confusion(tmp_path / "none.csv") is None


def test_pictures_keep_within_their_room():
    noise = Image.frombytes("RGB", (1500, 1500), os.urandom(1500 * 1500 * 3))
    assert len(embed(noise, 200_000)) < 220_000 and len(embed(noise, 4_000_000)) > 1_000_000


@pytest.mark.parametrize("script", [main_pretrain, main_finetune])
def test_the_training_scripts_write_it(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models_mae.MODELS, "mae_vit_test", partial(MaskedAutoencoderViT, **TINY_MAE))
    small = {name: value for name, value in TINY_MAE.items() if not name.startswith("decoder")}
    monkeypatch.setitem(models_vit.MODELS, "vit_test", partial(models_vit.VisionTransformer, **small))
    for split in ("train", "val"):
        make_folder(tmp_path / "data" / split, 8, classes=2)
    mae = script is main_pretrain
    words = f"--model {'mae_vit_test' if mae else 'vit_test'} --patch_size 8 --input_size 32 --batch_size 8"
    words += " --epochs 2 --warmup_epochs 0 --num_workers 0 --device cpu --report"
    words = [
        *words.split(),
        "--log_dir",
        "",
        "--data_path",
        str(tmp_path / "data"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    parser = ArgumentParser(parents=[script.get_args_parser()])
    script.main(parse_args(parser, words))
    page = Page((tmp_path / "out/report.html").read_text(encoding="utf-8"))
    facts = dict(page.of("settings")[0][1:])
    assert "Complete: 2 of 2 epochs." in page.text and facts["report"] == "True"
    assert f"torch {torch.__version__.split('+')[0]}" in facts["environment"]
    titles = [tag["alt"].split()[0] for name, tag in page.tags if name == "img"]
    model = ["Principal", "Nearest", "Attention"]
    assert titles == (["Reconstructions"] * 2 + ["Best"] if mae else ["Confusion"]) + model
    # Later, by hand, the environment is that of the run
    run(tmp_path / "out", "--images", 0)
    page = Page((tmp_path / "out/report.html").read_text(encoding="utf-8"))
    assert dict(page.of("settings")[0][1:])["environment"] == facts["environment"]


def test_a_page_that_cannot_be_written_ends_no_training(tmp_path, capsys):
    from util.report.page import write_at_end

    write_at_end(str(tmp_path), "", torch.device("cpu"))
    assert "--report: not written" in capsys.readouterr().err


@contextlib.contextmanager
def browser():
    """A headless Chromium; what it logs is recorded."""
    from selenium import webdriver

    os.environ["SE_OFFLINE"] = "true"  # it would look for newer browsers on the network
    options = webdriver.ChromeOptions()
    flags = "headless=new no-sandbox disable-dev-shm-usage disable-gpu disable-background-networking"
    for flag in flags.split():
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options)
    try:
        yield driver
    finally:
        driver.quit()


@pytest.mark.browser
def test_the_page_in_a_browser(trained, tmp_path):
    """Light, dark, on a phone: no console errors, no requests, nothing beside the screen, readable."""
    predictions(trained, [("a", "b"), ("a", "a"), ("b" * 200, "a")])
    run(trained)
    path, luminance = trained / "report.html", {}
    with browser() as driver:
        for name, width, scheme in (("light", 1280, "light"), ("dark", 1280, "dark"), ("phone", 400, "dark")):
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            driver.get(path.as_uri())
            wider = "const e = document.documentElement; return e.scrollWidth > e.clientWidth"
            assert not driver.execute_script(wider) and driver.execute_script("return innerWidth") == width
            assert driver.execute_script("return [...document.images].every(i => i.naturalWidth > 0)")
            cut = "return [...document.querySelectorAll('svg text')].filter(t => t.getBBox().x < 0).length"
            assert driver.execute_script("return document.querySelectorAll('svg text').length") > 10
            assert driver.execute_script(cut) == 0
            get = "const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]"
            found = [re.findall(r"\d+", colour)[:3] for colour in driver.execute_script(get)]
            paper, ink = (sum(map(int, numbers)) for numbers in found)
            assert abs(paper - ink) > 500 and (paper > ink) == (scheme == "light")
            luminance[name] = paper
            text = driver.execute_script("return document.body.innerText")
            assert "train: 0.2 (epoch 2)" in text and "Complete: 3 of 3 epochs." in text
            driver.save_screenshot(str(tmp_path / f"{name}.png"))
        assert driver.get_log("browser") == []
        messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
        asked = [
            m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"
        ]
        assert asked and {url for url in asked if not url.startswith("data:")} == {path.as_uri()}
        printed = base64.b64decode(driver.execute_cdp_cmd("Page.printToPDF", {})["data"])
        assert printed.startswith(b"%PDF")
    assert luminance["light"] > luminance["dark"] == luminance["phone"]
    print(f"screenshots: {tmp_path}")


@pytest.mark.parametrize("flags", [["--output_dir", ""], ["--report", "--eval"]])
def test_a_page_that_cannot_be_written_is_refused_at_once(flags):
    script = main_finetune if "--eval" in flags else main_pretrain
    parser = ArgumentParser(parents=[script.get_args_parser()])
    with pytest.raises(UserError, match="--report: is a page of a training"):
        script.main(parse_args(parser, ["--report", "--device", "cpu", "--resume", "x.pth", *flags]))
