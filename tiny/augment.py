"""Crops, flips and colours, for training. The random numbers are arguments, so that the same
numbers always give the same clips."""
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def multi_scale_crop(clip: Tensor, size: int, place: Sequence[float]) -> Tensor:
    """(T, C, H, W) uint8 -> (T, C, size, size): a rectangle; place: its scale, top and left, each
    from 0, the largest or first, to 1.

    Its height and width are 1, 0.875, 0.75 or 0.66 of the shorter side, at most one step apart.
    The authors' GroupMultiScaleCrop, but anywhere and not at 13 fixed places.
    """
    scales = (1, 0.875, 0.75, 0.66)
    pairs = [(a, b) for i, a in enumerate(scales) for j, b in enumerate(scales) if abs(i - j) <= 1]
    chosen = pairs[min(int(place[0] * len(pairs)), len(pairs) - 1)]
    height, width = (round(scale * min(clip.shape[-2:])) for scale in chosen)
    top = round(place[1] * (clip.shape[-2] - height))
    left = round(place[2] * (clip.shape[-1] - width))
    crop = clip[..., top : top + height, left : left + width]
    crop = crop.contiguous(memory_format=torch.channels_last)  # torch's fast 8-bit path
    return F.interpolate(crop, (size, size), mode="bilinear", antialias=True)


def flip(frames: Tensor, random: Tensor) -> Tensor:
    """(B, T, C, H, W) -> the same, mirrored left to right where random (B,) is below a half."""
    is_mirrored = (random < 0.5).view(-1, 1, 1, 1, 1)
    return torch.where(is_mirrored, frames.flip(-1), frames)


def colour_jitter(pixel_values: Tensor, random: Tensor) -> Tensor:
    """(B, T, C, H, W) -> the same with its channels shuffled, and each negated or not, stretched
    and shifted, alike in all frames. random (B, 12): in [0, 1], the last 3 normal.

    It changes colours and not motion. Without it, a few labelled clips are told apart by colour.
    """
    order = random[:, :3].argsort(dim=1).view(-1, 1, 3, 1, 1).expand_as(pixel_values)
    sign, contrast, shift = random[:, 3:].view(-1, 3, 1, 3, 1, 1).unbind(dim=1)  # (B, 1, C, 1, 1)
    shuffled = pixel_values.gather(2, order)
    return shuffled * (sign.round() * 2 - 1) * (0.5 + contrast) + 0.5 * shift
