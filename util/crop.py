"""The random crop of linear probing: TensorFlow style, one draw and no retry."""

import math

import torch
from torchvision import transforms
from torchvision.transforms import functional as F


class RandomResizedCrop(transforms.RandomResizedCrop):
    """torchvision's RandomResizedCrop with one draw: a crop that does not fit is clipped to the image.

    torchvision draws up to ten times and falls back to a centre crop; here area (uniform in `scale`) and log
    aspect ratio (uniform in `ratio`) are drawn once, the sides are rounded and clipped to the image, then the
    offset is uniform. The paper's probes are trained like this (arXiv 2111.06377, appendix A.1).
    """

    @staticmethod
    def get_params(img, scale, ratio):
        """(top, left, height, width) for a PIL image or (..., H, W) tensor, drawn from torch's generator."""
        width, height = F.get_image_size(img)
        area = height * width * torch.empty(1).uniform_(scale[0], scale[1]).item()
        log_ratio = torch.log(torch.tensor(ratio))
        aspect = torch.exp(torch.empty(1).uniform_(log_ratio[0], log_ratio[1])).item()
        w = min(max(round(math.sqrt(area * aspect)), 1), width)
        h = min(max(round(math.sqrt(area / aspect)), 1), height)
        top = torch.randint(0, height - h + 1, (1,)).item()
        left = torch.randint(0, width - w + 1, (1,)).item()
        return top, left, h, w
