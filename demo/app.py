"""A page to play with a masked autoencoder: drop a picture, hide patches, see what the model makes of it.

    pip install gradio
    python demo/app.py                                            # a small model; open http://127.0.0.1:7860
    python demo/app.py --resume mae_visualize_vit_large_ganloss.pth --samples photos/ --port 8000

Click a patch to hide or show it, or draw a random mask with the slider; the reconstruction follows at once.
The page is for this machine only unless --host says otherwise. It reads what is uploaded and nothing else.
"""

import argparse
import errno
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from util.cli.flags import Bounded, at_least, check_flags
from util.cli.parser import ArgumentParser, run_script
from util.compute.precision import resolve_device
from util.data.depth import depth_of, unit, view
from util.data.find import find_images
from util.data.inputs import find_inputs
from util.data.read import BadImage
from util.data.transforms import normalize_batch
from util.demo_set.files import SHIPPED, ensure_demo_data
from util.errors import UserError
from util.figures.canvas import panel_pixels
from util.figures.reconstruction import PANELS, column_headings, mask_noise, reconstruct
from util.files import printable
from util.processes.collectives import log, warn
from util.rng import fixed_noise, takes_noise
from util.weights.build import build
from util.weights.describe import WeightsFile
from util.weights.flags import add_decoder_args, add_weights_args
from util.weights.size import describe_file

SAMPLES = 8  # at most
SHOWN_WIDTH = 384  # pixels to which small pictures are enlarged, by a whole factor
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # of this machine


def get_args_parser() -> argparse.ArgumentParser:
    """All flags."""
    parser = argparse.ArgumentParser("MAE page", add_help=False)
    # fmt: off
    add_weights_args(parser, default=str(SHIPPED / "model.safetensors"))
    add_decoder_args(parser)
    flag = parser.add_argument_group("page").add_argument
    flag("--samples", nargs="+", default=[], metavar="IMAGE|FOLDER",
         help=f"pictures to choose from, the first {SAMPLES}, of files with pages the first page")
    flag("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 opens the page to the network")
    flag("--port", default=7860, type=Bounded(int, range(1, 65536).__contains__, "lie between 1 and 65535"))
    flag("--max_upload_mb", default=20, type=at_least(1), metavar="MB", help="largest upload")
    flag("--device", default="auto", help="auto (cuda, else mps, else cpu) or a torch device")
    return parser


def load_gradio():
    """The gradio package; UserError where it is missing or too old."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing leaves this machine
    try:
        import gradio
    except ImportError:
        raise UserError("the page needs the package gradio: pip install 'gradio>=6'") from None
    if int(gradio.__version__.split(".")[0]) < 6:
        raise UserError(f"the page needs gradio 6, this is {gradio.__version__}: pip install 'gradio>=6'")
    return gradio


@dataclass
class Player:
    """A model and what it needs to show a picture with any mask."""

    model: torch.nn.Module
    weights: WeightsFile
    device: torch.device

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return tuple(self.model.patch_embed.grid_size)

    @property
    def scale(self) -> int:
        """Screen pixels of an image pixel."""
        return max(1, round(SHOWN_WIDTH / self.weights.input_size[1]))

    def read(self, path: str) -> torch.Tensor:
        """A picture as the model sees it: uint8 (C, H, W), a deep one normalised float32; raises BadImage."""
        return view(path, self.weights.input_size, self.weights.sizes["in_chans"], depth_of(self.weights))

    def random_mask(self, ratio: float, seed: int) -> np.ndarray:
        """bool (L,): that share of the patches, at least one, not all; a larger ratio only adds some."""
        length = self.grid[0] * self.grid[1]
        hidden = min(max(round(length * ratio), 1), length - 1)
        return fixed_noise(1, length, seed)[0].argsort(descending=True).argsort().numpy() < hidden

    def patch_at(self, x: int, y: int) -> int:
        """Number of the patch below a point of a shown picture, in its pixels."""
        side = self.model.patch_size * self.scale
        row, column = (
            min(max(at // side, 0), count - 1) for at, count in zip((y, x), self.grid, strict=True)
        )
        return row * self.grid[1] + column

    def show(self, picture: torch.Tensor, removed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The panels "masked", "reconstruction" and "reconstruction + visible", uint8 (h, w, 3) each."""
        mean, std = self.weights.mean, self.weights.std
        images = normalize_batch(picture[None], self.device, mean, std)
        noise, ratio = mask_noise(torch.from_numpy(removed), 1)
        panels = reconstruct(self.model, images, noise, ratio, mean, std)
        return tuple(self.enlarge(panel_pixels(panels[name][0])) for name in PANELS[1:])

    def enlarge(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 (H, W, 3) enlarged without smoothing."""
        return pixels.repeat(self.scale, axis=0).repeat(self.scale, axis=1)


def refuse_addresses(gradio, field) -> None:
    """Lets an image field take uploads only; gradio would fetch any web address that is sent to it."""
    original = field.async_move_resource_to_block_cache

    async def only_uploads(url_or_file_path):
        if "://" in str(url_or_file_path):
            raise gradio.Error("only uploaded files are read", print_exception=False)
        return await original(url_or_file_path)

    field.async_move_resource_to_block_cache = only_uploads


def build_page(gradio, player: Player, samples: list[torch.Tensor]):
    """The page as `gradio.Blocks`; `samples`: of `Player.read`."""

    def draw(state):
        """State -> the three pictures and a line on the mask."""
        removed = state["removed"]
        text = f"{int(removed.sum())} of {len(removed)} patches hidden"
        return state, *player.show(state["picture"], removed), text

    def take(picture, ratio, seed):
        return draw({"picture": picture, "removed": player.random_mask(ratio, int(seed))})

    def uploaded(path, ratio, seed):
        if path is None:
            return [gradio.skip()] * 5
        try:
            return take(player.read(path), ratio, seed)
        except BadImage as error:
            text = f"this file cannot be shown: {error.reason}"
            raise gradio.Error(text, print_exception=False) from None  # the page says it

    def chosen(ratio, seed, event: gradio.SelectData):
        return take(samples[event.index], ratio, seed)

    def masked_anew(state, ratio, seed):
        return draw({**state, "removed": player.random_mask(ratio, int(seed))})

    def shuffled(state, ratio, seed):
        return seed + 1, *masked_anew(state, ratio, seed + 1)

    def clicked(state, event: gradio.SelectData):
        removed = state["removed"].copy()
        removed[player.patch_at(*event.index)] ^= True
        return draw({**state, "removed": removed})

    def inverted(state):
        return draw({**state, "removed": ~state["removed"]})

    _, *titles = column_headings(player.model.norm_pix_loss, player.weights.sizes["in_chans"])
    name = printable(os.path.basename(player.weights.path))
    first = take(samples[0], 0.75, 0)
    with gradio.Blocks(title="Masked autoencoder", analytics_enabled=False) as page:
        gradio.Markdown(f"## Masked autoencoder\n`{name}`. Click a patch of `masked` to hide or to show it.")
        state, seed = gradio.State(first[0]), gradio.State(0)
        options = {"interactive": False, "show_label": False, "format": "png", "buttons": []}
        panels = []
        with gradio.Row():
            for i, (value, title) in enumerate(zip(first[1:4], titles, strict=True)):
                with gradio.Column():  # the title above: a label would hide patches
                    gradio.Markdown(title)
                    panels.append(gradio.Image(value, elem_id=f"panel-{i}", **options))
        with gradio.Row():
            ratio = gradio.Slider(0, 1, 0.75, step=0.01, label="share hidden at random", elem_id="ratio")
            hidden = gradio.Textbox(first[4], label="mask", interactive=False, elem_id="hidden")
            shuffle = gradio.Button("other random mask", elem_id="shuffle")
            invert = gradio.Button("swap hidden and shown", elem_id="invert")
        with gradio.Row():
            with gradio.Column():
                gradio.Markdown("your picture")
                field = {"sources": ["upload"], "type": "filepath", "image_mode": None, "height": 320}
                upload = gradio.Image(elem_id="upload", show_label=False, **field)
                refuse_addresses(gradio, upload)
            with gradio.Column():
                gradio.Markdown("samples")
                small = [player.enlarge(panel_pixels(unit(s, depth_of(player.weights)))) for s in samples]
                options |= {"columns": 4, "height": 320, "allow_preview": False, "object_fit": "contain"}
                gallery = gradio.Gallery(small, elem_id="samples", **options)
        shown = [state, *panels, hidden]
        common = {"show_progress": "hidden", "api_visibility": "private"}
        upload.upload(uploaded, [upload, ratio, seed], shown, **common)
        gallery.select(chosen, [ratio, seed], shown, **common)
        ratio.input(masked_anew, [state, ratio, seed], shown, trigger_mode="always_last", **common)
        shuffle.click(shuffled, [state, ratio, seed], [seed, *shown], **common)
        invert.click(inverted, [state], shown, **common)
        panels[0].select(clicked, [state], shown, **common)
    return page


def read_samples(player: Player, names: list[str]) -> list[torch.Tensor]:
    """Pictures of --samples or of the demo set, as `Player.read` gives them; UserError if there are none."""
    if names:
        paths = list(find_inputs(names, "skip")[0].paths)[:SAMPLES]
    else:
        every = find_images(ensure_demo_data(log=log), "val").paths
        paths = [every[i] for i in np.linspace(0, len(every) - 1, SAMPLES).round().astype(int)]
    samples = []
    for path in paths:
        try:
            samples.append(player.read(path))
        except BadImage as error:
            warn(f"left out of the samples: {error}")
    if not samples:
        raise UserError("none of the samples can be read as the model's input; pass others with --samples")
    return samples


def main(args: argparse.Namespace) -> None:
    check_flags(args, get_args_parser())
    gradio = load_gradio()
    device = resolve_device(args.device)
    weights = describe_file(args, "full")
    model = build(weights).to(device)
    if not takes_noise(model):
        raise UserError(f"--resume {args.resume}: its model draws its own masks, so that none can be chosen")
    for note in weights.notes:
        log(f"note: {printable(note)}")
    player = Player(model, weights, device)
    shipped = [str(SHIPPED / "samples")] if args.resume.startswith(str(SHIPPED)) else []
    page = build_page(gradio, player, read_samples(player, args.samples or shipped))
    page.queue(default_concurrency_limit=1, max_size=32)
    try:
        family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
        with socket.create_server((args.host, args.port), family=family):
            pass  # the server itself does not say what is wrong with an address
        page.launch(
            server_name=args.host, server_port=args.port, max_file_size=f"{args.max_upload_mb}mb",
            theme=gradio.themes.Default(**FONTS), footer_links=[], share=False, ssr_mode=False,
            quiet=True, prevent_thread_lock=True,
        )  # fmt: skip
    except OSError as error:
        reason = "not free; pass another --port" if error.errno == errno.EADDRINUSE else error.strerror
        raise UserError(f"--host {args.host} --port {args.port}: {reason}") from None
    log(f"open http://{'127.0.0.1' if args.host == '0.0.0.0' else args.host}:{args.port} (Ctrl-C ends it)")
    page.block_thread()


if __name__ == "__main__":
    run_script(main, ArgumentParser(description=__doc__, parents=[get_args_parser()]))
