"""export.py --push: what would go, what goes, and one line for all that can be in the way."""

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

import export
from util.cli.parser import ArgumentParser
from util.errors import UserError
from util.export import push


@pytest.fixture
def finished(tmp_path):
    folder = tmp_path / "exported"
    folder.mkdir()
    (folder / "README.md").write_text("# A model")
    (folder / "model.safetensors").write_bytes(bytes(1234))
    return folder


class Hub:
    """Stands for huggingface_hub.HfApi; `fails`: the call that raises `error`."""

    def __init__(self, fails="", error=None):
        self.calls, self.fails, self.error = [], fails, error

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            if name == self.fails:
                raise self.error
            return "https://huggingface.co/me/mae"

        return call


def run(*flags):
    parser = ArgumentParser(parents=[export.get_args_parser()])
    export.main(parser.parse_args([str(flag) for flag in flags]))


def test_a_dry_run_says_what_would_go_and_sends_nothing(finished, monkeypatch, capsys):
    monkeypatch.setattr(push, "HfApi", lambda: pytest.fail("asked the hub"))
    run("--output", finished, "--push", "me/mae", "--private")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("to https://huggingface.co/me/mae (private):") and "would upload" in lines[0]
    assert lines[1:3] == ["  README.md: 9 bytes", "  model.safetensors: 1,234 bytes"]
    assert "nothing was sent" in lines[3]


@pytest.mark.parametrize("overwrite", [False, True])
def test_yes_makes_the_repository_and_uploads_the_folder(finished, monkeypatch, overwrite):
    hub = Hub()
    monkeypatch.setattr(push, "HfApi", lambda: hub)
    run("--output", finished, "--push", "me/mae", "--private", "--yes", *["--overwrite"] * overwrite)
    assert [name for name, *_ in hub.calls] == ["whoami", "create_repo", "upload_folder"]
    assert hub.calls[1][1:] == (("me/mae",), {"private": True, "exist_ok": overwrite})
    assert hub.calls[2][2]["folder_path"] == finished and hub.calls[2][2]["repo_id"] == "me/mae"


def refusal(status):
    """As huggingface_hub raises it, whichever library it talks through."""
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return HfHubHTTPError(f"{status} of the hub\nmore", response=response)


@pytest.mark.parametrize(
    ("fails", "error", "says"),
    [
        ("whoami", LocalTokenNotFoundError("none"), "no login; run `hf auth login`"),
        ("create_repo", refusal(409), "exists already; --overwrite"),
        ("create_repo", refusal(403), "the hub refuses: 403 of the hub"),
        ("upload_folder", ConnectionError("no route"), "the hub does not answer: no route"),
    ],
)
def test_what_the_hub_refuses_is_one_line(finished, monkeypatch, fails, error, says):
    monkeypatch.setattr(push, "HfApi", lambda: Hub(fails, error))
    with pytest.raises(UserError, match=says) as caught:
        run("--output", finished, "--push", "me/mae", "--yes")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--push", "mae"], "must be OWNER/NAME"),
        (["--push", "me/mae/base"], "--push me/mae/base: must be OWNER/NAME$"),
        (["--push", "me/../mae"], "--push me/../mae: "),
        (["--push", "me/mae", "--to", "timm"], "--to and --resume"),
        (["--push", "me/mae", "--resume", "x.pth"], "--to and --resume"),
        (["--yes"], "are of --push"),
        ([], "--resume: is needed"),
    ],
)
def test_flags_that_do_not_go_together(finished, flags, says):
    with pytest.raises(UserError, match=says):
        run("--output", finished, *flags)


def test_a_folder_that_is_no_export_stays_here(finished, tmp_path):
    (finished / "notes.txt").write_text("private")
    with pytest.raises(UserError, match=r"also holds notes\.txt"):
        run("--output", finished, "--push", "me/mae")
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match="is no finished export"):
            run("--output", folder, "--push", "me/mae")
