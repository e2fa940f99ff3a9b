"""Clips of notebook 5: a texture that moves as a whole, and the label is its motion.
(Those of `make train`, in tiny/synthetic.py, film drawn scenes with the same motions.)

The middle frame is the same whatever the label. Towards the ends, a zoom makes a frame finer or
coarser than most, which tells the two zooms apart and no more.
"""
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tiny import synthetic  # noqa: E402
from tiny.synthetic import HELD_OUT_SEEDS, camera_path, uniform  # noqa: E402, F401
from videomae import VideoMAEConfig  # noqa: E402

# How the texture moves, in the order of the camera's motions.
MOTIONS = (
    "left", "right", "up", "down",
    "clockwise", "counter-clockwise", "zoom in", "zoom out",
)


class SyntheticClips(synthetic.SyntheticClips):
    """`count` clips of a config's frames and size; the same arguments give the same clips."""

    classes = MOTIONS

    def __init__(self, count: int, config: VideoMAEConfig, seed: int):
        frames, size = config.num_frames, config.image_hw[0]
        generator = torch.Generator().manual_seed(seed)
        textures = make_textures(512, 2 * size, generator)
        self.labels = torch.randint(len(MOTIONS), (count,), generator=generator)  # (count,)
        self.clips = torch.cat([  # (count, T, 3, H, W) uint8
            move_textures(textures, chunk, frames, size, generator)
            for chunk in self.labels.split(250)
        ])


def make_textures(count: int, size: int, generator: torch.Generator) -> Tensor:
    """(count, 3, size, size) float32, mean 0, std 1: noise that tiles the plane.

    Its amplitude is 1 / frequency^alpha, with an alpha of each texture's own; larger is smoother.
    """
    alpha = uniform(2.5, 3.0, (count, 1, 1, 1), generator)
    frequency = torch.fft.fftfreq(size)
    radius = torch.hypot(frequency[:, None], frequency)
    radius[0, 0] = math.inf  # so that the mean is 0
    noise = torch.randn(count, 3, size, size, generator=generator)
    textures = torch.fft.ifft2(torch.fft.fft2(noise) * radius**-alpha).real
    return textures / textures.std(dim=(2, 3), keepdim=True)


def move_textures(textures: Tensor, labels: Tensor, frames: int, size: int,
                  generator: torch.Generator) -> Tensor:
    """One clip per label: a random texture, randomly coloured, that moves as labelled.

    textures (count, 3, 2 size, 2 size), labels (B,) of MOTIONS -> (B, T, 3, H, W) uint8.
    """
    count, look = len(labels), camera_path(labels, frames, size, generator)
    look = look + uniform(-size / 2, size / 2, (count, 1, 1, 2), generator)  # anywhere on it

    chosen = textures[torch.randint(len(textures), (count,), generator=generator)]
    tiled = chosen.tile(1, 1, 3, 3)  # wide enough for the fastest zoom out
    clips = F.grid_sample(tiled, look * 2 / tiled.shape[-1], align_corners=False)
    colours = F.normalize(torch.randn(count, 3, 3, generator=generator), dim=2)
    clips = torch.einsum("bij,bjtp->btip", colours, clips)  # (B, T, 3, H W)
    return (127.5 + 50 * clips.unflatten(-1, (size, size))).clamp(0, 255).to(torch.uint8)
