"""Clips of the notebooks: a texture that moves as a whole, and the label is its motion. (Those of
`make train`, in tiny/synthetic.py, film drawn scenes with the same motions.)

The middle frame is the same whatever the label. Towards the ends, a zoom makes a frame finer or
coarser than most, which tells the two zooms apart and no more.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from videomae import VideoMAEConfig

# Opposites stand side by side: reversed in time, motion i becomes motion i ^ 1.
MOTIONS = (
    "left", "right", "up", "down",
    "clockwise", "counter-clockwise", "zoom in", "zoom out",
)
# Held-out clips have textures of their own, the same for every seed of a run.
HELD_OUT_SEEDS = {"test": 1_000_001, "val": 1_000_002}


class SyntheticClips:
    """`count` clips of a config's frames and size; the same arguments give the same clips."""

    classes, num_views = MOTIONS, 1

    def __init__(self, count: int, config: VideoMAEConfig, seed: int):
        frames, size = config.num_frames, config.image_hw[0]
        generator = torch.Generator().manual_seed(seed)
        textures = make_textures(512, 2 * size, generator)
        self.labels = torch.randint(len(MOTIONS), (count,), generator=generator)  # (count,)
        self.clips = torch.cat([  # (count, T, 3, H, W) uint8
            move_textures(textures, chunk, frames, size, generator)
            for chunk in self.labels.split(250)
        ])

    def load(self, indices: Tensor, random: Tensor | None = None, view: int = 0) -> Tensor:
        """indices (B,) -> (B, T, 3, H, W) uint8. They are always seen in the same way."""
        return self.clips[indices]


def uniform(low: float, high: float, shape, generator: torch.Generator) -> Tensor:
    """Random numbers between low and high."""
    return low + (high - low) * torch.rand(shape, generator=generator)


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
    Displacement counts from the middle frame, so what is seen there does not depend on the label.
    """
    count = len(labels)
    time = torch.arange(frames) - frames // 2  # (T,)

    # Per frame: pixels of shift, radians of rotation, log-scale of zoom. Only the labelled one is
    # not zero. y points down.
    direction = torch.tensor([math.pi, 0, -math.pi / 2, math.pi / 2] + [0] * 4)[labels]
    direction = direction + uniform(-0.35, 0.35, count, generator)
    velocity = torch.stack([direction.cos(), direction.sin()], dim=1)  # (B, 2)
    velocity = velocity * (uniform(1.2, 3.0, count, generator) * (labels < 4))[:, None]
    rotation = uniform(0.15, 0.33, count, generator) * ((labels == 4).int() - (labels == 5).int())
    zoom = uniform(0.075, 0.15, count, generator) * ((labels == 6).int() - (labels == 7).int())

    # Where in the texture each pixel looks: the motion undone, about a random centre. The random
    # base scale makes it harder to tell a zoom by how fine its first frame is.
    angle = -rotation[:, None] * time  # (B, T)
    scale = torch.exp(uniform(-0.3, 0.3, (count, 1), generator) - zoom[:, None] * time)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    matrix = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))  # (B, T, 2, 2)
    axis = torch.arange(size) - (size - 1) / 2
    pixels = torch.cartesian_prod(axis, axis).flip(-1)  # (H W, 2), each (x, y)
    centre = uniform(-size / 4, size / 4, (count, 1, 1, 2), generator)
    look = torch.einsum("btij,bpj->btpi", matrix, pixels - centre[:, 0]) + centre
    look = look - velocity[:, None, None] * time[:, None, None]  # (B, T, H W, 2)
    look = look + uniform(-size / 2, size / 2, (count, 1, 1, 2), generator)  # anywhere on it

    chosen = textures[torch.randint(len(textures), (count,), generator=generator)]
    tiled = chosen.tile(1, 1, 3, 3)  # wide enough for the fastest zoom out
    clips = F.grid_sample(tiled, look * 2 / tiled.shape[-1], align_corners=False)
    colours = F.normalize(torch.randn(count, 3, 3, generator=generator), dim=2)
    clips = torch.einsum("bij,bjtp->btip", colours, clips)  # (B, T, 3, H W)
    return (127.5 + 50 * clips.unflatten(-1, (size, size))).clamp(0, 255).to(torch.uint8)
