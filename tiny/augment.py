"""Crops, flips and colours, for training, drawn from torch's global generator."""
import torch
from torch import Tensor

from videomae import resize


def multi_scale_crop(clip: Tensor, height: int, width: int) -> Tensor:
    """(T, C, H, W) uint8 -> (T, C, height, width): a random rectangle of the clip, resized.

    Its sides are 1, 0.875, 0.75 or 0.66 of those of the largest rectangle of the target's shape, at
    most one step apart. The authors' GroupMultiScaleCrop has 13 fixed places, here it is anywhere.
    """
    scales = (1, 0.875, 0.75, 0.66)
    pairs = [(a, b) for i, a in enumerate(scales) for j, b in enumerate(scales) if abs(i - j) <= 1]
    scale_h, scale_w = pairs[torch.randint(len(pairs), ())]
    largest = min(clip.shape[-2] / height, clip.shape[-1] / width)
    h, w = round(scale_h * largest * height), round(scale_w * largest * width)
    top = torch.randint(clip.shape[-2] - h + 1, ())
    left = torch.randint(clip.shape[-1] - w + 1, ())
    return resize(clip[..., top : top + h, left : left + w], height, width)


def flip(clip: Tensor) -> Tensor:
    """(T, C, H, W) -> the same, mirrored left to right in one of two calls."""
    return clip.flip(-1) if torch.rand(()) < 0.5 else clip


def colour_jitter(pixel_values: Tensor) -> Tensor:
    """(B, T, C, H, W) -> the same with its channels shuffled, and each negated or not, stretched
    and shifted, alike in all frames.

    It changes colours and not motion. Without it, a few labelled clips are told apart by colour.
    """
    one_per_channel = pixel_values[:, :1, :, :1, :1]  # (B, 1, C, 1, 1)
    order = torch.rand_like(one_per_channel).argsort(dim=2)
    sign = 2 * torch.rand_like(one_per_channel).round() - 1
    contrast = 0.5 + torch.rand_like(one_per_channel)
    shift = 0.5 * torch.randn_like(one_per_channel)
    return pixel_values.gather(2, order.expand_as(pixel_values)) * sign * contrast + shift
