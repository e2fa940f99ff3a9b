"""Crops, flips and colours, for training, drawn from torch's global generator."""
import torch
import torch.nn.functional as F
from torch import Tensor


def cut(clip: Tensor, height: int, width: int) -> Tensor:
    """(..., h, w) -> (..., height, width), at a random place."""
    top = torch.randint(clip.shape[-2] - height + 1, ())
    left = torch.randint(clip.shape[-1] - width + 1, ())
    return clip[..., top : top + height, left : left + width]


def crop_and_flip(pixel_values: Tensor, height: int, width: int, flip: bool) -> Tensor:
    """(B, T, C, h, w) -> (B, T, C, height, width): a random rectangle of each clip, resized, and
    with `flip` mirrored left to right in half of the clips.

    Its sides are 1, 0.875, 0.75 or 0.66 times those of the largest rectangle of the target's shape,
    the two at most one step apart. The authors' GroupMultiScaleCrop chooses from 13 fixed places;
    ours may be anywhere.
    """
    (count, frames), (h, w) = pixel_values.shape[:2], pixel_values.shape[-2:]
    scales = (1, 0.875, 0.75, 0.66)
    pairs = [(a, b) for i, a in enumerate(scales) for j, b in enumerate(scales) if abs(i - j) <= 1]
    scale = torch.tensor(pairs)[torch.randint(len(pairs), (count,))]  # (B, 2): across, down

    # affine_grid's coordinates run from -1 to 1 along each side of a frame, so the crop's share of
    # a side is also half the crop's length there.
    share = scale * min(h / height, w / width) * torch.tensor([width / w, height / h])
    centre = (2 * torch.rand(count, 2) - 1) * (1 - share)
    mirror = torch.where(torch.rand(count) < 0.5, -1, 1) if flip else 1
    look = torch.zeros(count, 2, 3)  # rows: the frame's x and y, as sums of the crop's x, y and 1
    look[:, 0, 0], look[:, 1, 1], look[:, :, 2] = share[:, 0] * mirror, share[:, 1], centre

    size = count, frames * pixel_values.shape[2], height, width
    grid = F.affine_grid(look.to(pixel_values.device), size, align_corners=False)
    crops = F.grid_sample(pixel_values.flatten(1, 2), grid, padding_mode="border",
                          align_corners=False)
    return crops.unflatten(1, (frames, -1))  # all frames of a clip alike


def colour_jitter(pixel_values: Tensor) -> Tensor:
    """(B, T, C, H, W) -> the same with its channels shuffled, and each negated or not, stretched
    and shifted, alike in all frames.

    It changes colours, not motion. Without it, colour suffices to tell a few labelled clips apart.
    """
    one_per_channel = pixel_values[:, :1, :, :1, :1]  # (B, 1, C, 1, 1)
    order = torch.rand_like(one_per_channel).argsort(dim=2)
    sign = 2 * torch.rand_like(one_per_channel).round() - 1
    contrast = 0.5 + torch.rand_like(one_per_channel)
    shift = 0.5 * torch.randn_like(one_per_channel)
    return pixel_values.gather(2, order.expand_as(pixel_values)) * sign * contrast + shift
