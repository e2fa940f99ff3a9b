"""Clips from a camera that pans, tilts, rolls or zooms over a drawn scene. Its motion is the label.

The middle frame does not depend on the label. Near the ends, zooming makes frames finer or coarser
than most, which helps to recognize the two zooms but no other motion.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from videomae import VideoMAEConfig, normalize

# Opposites are adjacent: reversed in time, motion i becomes motion i ^ 1.
MOTIONS = (
    "pan right", "pan left", "tilt down", "tilt up",
    "roll left", "roll right", "zoom in", "zoom out",
)
TEST_SEED = 1_000_001  # for held-out clips, which have their own scenes


class SyntheticClips:
    """`count` clips of the length and size in `config`. The same arguments give the same clips."""

    classes = list(MOTIONS)

    def __init__(self, count: int, config: VideoMAEConfig, seed: int):
        frames, (size, width) = config.num_frames, config.image_hw
        if width != size or config.num_channels != 3:
            raise ValueError(f"synthetic clips: got a model of {config.num_channels} channels and "
                             f"{size} x {width} pixels, expected 3 channels and square frames")
        with torch.random.fork_rng(devices=[]):  # of the CPU only
            torch.manual_seed(seed)
            drawings = min(8, math.ceil(count / 64))
            scenes = torch.cat([draw_scenes(64, 2 * size) for _ in range(drawings)])
            self.labels = torch.randint(len(MOTIONS), (count,))
            films = [film(scenes, labels, frames, size) for labels in self.labels.split(250)]
        self.clips = torch.cat(films)  # (count, T, 3, H, W) uint8

    def train_clips(self, indices: Tensor) -> Tensor:
        """indices (B,) -> (B, T, 3, H, W) uint8."""
        return self.clips[indices]

    def prepare(self, frames: Tensor) -> Tensor:
        """(B, T, 3, H, W) uint8 -> pixel_values. A crop or a flip could change the label."""
        return normalize(frames)

    def test_views(self, index: int) -> Tensor:
        """-> (1, T, 3, H, W) pixel_values, the only view of a clip."""
        return normalize(self.clips[[index]])


def uniform(low: float, high: float, *shape: int) -> Tensor:
    """Random numbers between low and high."""
    return low + (high - low) * torch.rand(shape)


class Painter:
    """Paints the same things into `count` pictures, each with its own random numbers.

    x runs from 0 at the left to 1 at the right and wraps around, y from 0 at the top to 1. A
    distance, (count, size, size), is negative inside a shape.
    """

    def __init__(self, count: int, size: int):
        self.count, self.size = count, size
        self.x = torch.linspace(0, 1, size)
        self.y = self.x[:, None]
        self.pictures = torch.zeros(count, 3, size, size)

    def pick(self, low: float, high: float) -> Tensor:
        """(count, 1, 1), a random number for each picture."""
        return uniform(low, high, self.count, 1, 1)

    def colour(self, red: tuple, green: tuple, blue: tuple) -> Tensor:
        """(count, 3, 1, 1), a random colour for each picture from a range per channel."""
        return torch.stack([self.pick(*red), self.pick(*green), self.pick(*blue)], dim=1)

    def paint(self, distance: Tensor, colour: Tensor):
        """Fill a shape, with an edge one pixel wide."""
        share = (0.5 - distance * self.size).clamp(0, 1)[:, None]
        self.pictures += share * (colour - self.pictures)

    def across(self, x) -> Tensor:
        """The signed distance to the right of x, wrapped to -0.5 to 0.5."""
        return (self.x - x + 0.5) % 1 - 0.5

    def ellipse(self, x, y, width, height) -> Tensor:
        """The distance from an ellipse with these half-axes."""
        radius = torch.hypot(self.across(x) / width, (self.y - y) / height)
        return (radius - 1) * height

    def box(self, x, y, width, height) -> Tensor:
        """The distance from a box with these half-sides."""
        return torch.maximum(self.across(x).abs() - width, (self.y - y).abs() - height)


ANY, DARK, BRIGHT = (0.1, 1.0), (0.05, 0.3), (0.9, 1.0)


def draw_scenes(count: int, size: int) -> Tensor:
    """(count, 3, size, size) in [0, 1], painted from back to front."""
    p = Painter(count, size)
    p.pictures += p.colour((0.3, 0.7), (0.5, 0.85), (0.75, 1.0)) * (1 - 0.35 * p.y)
    radius = p.pick(0.03, 0.06)
    p.paint(p.ellipse(p.pick(0, 1), p.pick(0.08, 0.2), radius, radius),
            p.colour(BRIGHT, (0.8, 0.95), (0.3, 0.6)))
    for _ in range(5):
        draw_cloud(p, p.pick(0, 1), p.pick(0.04, 0.35), p.pick(0.02, 0.05))
    for level in (0.45, 0.55):
        hill = level + 0.04 * torch.sin(2 * math.pi * (p.pick(2, 5).floor() * p.x + p.pick(0, 1)))
        p.paint(hill - p.y, p.colour((0.1, 0.5), (0.35, 0.7), (0.1, 0.4)))
    for row in range(16):
        near = row / 16
        x, y, height = p.pick(0, 1), 0.57 + 0.4 * near + p.pick(-0.02, 0.02), 0.1 + 0.12 * near
        draw = (draw_tree, draw_house)[row % 2]
        draw(p, x, y, height)
        for _ in range(3):
            radius = p.pick(0.008, 0.018)
            flower = p.ellipse(p.pick(0, 1), y + p.pick(-0.02, 0.03), radius, radius)
            p.paint(flower, p.colour(ANY, ANY, ANY))
    draw_person(p, p.pick(0, 1), p.pick(0.8, 0.93), p.pick(0.2, 0.28))
    return p.pictures


def draw_cloud(p: Painter, x, y, radius):
    white = p.colour(BRIGHT, BRIGHT, BRIGHT)
    for side in (-1, 0, 1):
        height = radius * (1 - 0.3 * abs(side))
        p.paint(p.ellipse(x + 1.2 * side * radius, y, 1.2 * radius, height), white)


def draw_tree(p: Painter, x, y, height):
    """y is the foot of the trunk."""
    p.paint(p.box(x, y - 0.3 * height, 0.1 * height, 0.3 * height), p.colour(DARK, DARK, DARK))
    leaves = p.colour((0.0, 0.6), (0.3, 0.7), (0.0, 0.3))
    p.paint(p.ellipse(x, y - height, 0.38 * height, 0.5 * height), leaves)


def draw_house(p: Painter, x, y, height):
    wall = p.box(x, y - 0.35 * height, 0.45 * height, 0.35 * height)
    p.paint(wall, p.colour((0.5, 1.0), (0.3, 0.9), (0.2, 0.8)))
    slope = p.across(x).abs() - 1.2 * (p.y - y + 1.15 * height)
    p.paint(torch.maximum(slope, p.y - y + 0.68 * height), p.colour((0.4, 0.8), DARK, DARK))
    glass = p.colour(DARK, DARK, DARK)
    for side in (-0.22, 0.22):
        window = p.box(x + side * height, y - 0.42 * height, 0.09 * height, 0.11 * height)
        p.paint(window, glass)


def draw_person(p: Painter, x, y, height):
    skin, shirt, trousers = (p.colour(*ranges) for ranges in (
        ((0.5, 0.95), (0.35, 0.7), (0.25, 0.5)), (ANY, ANY, ANY), (DARK, DARK, (0.05, 0.6))))
    for side in (-1, 1):
        leg = p.box(x + 0.07 * side * height, y - 0.2 * height, 0.05 * height, 0.22 * height)
        arm = p.box(x + 0.19 * side * height, y - 0.58 * height, 0.04 * height, 0.18 * height)
        p.paint(leg, trousers)
        p.paint(arm, skin)
    p.paint(p.box(x, y - 0.58 * height, 0.15 * height, 0.2 * height), shirt)
    p.paint(p.ellipse(x, y - 0.89 * height, 0.11 * height, 0.12 * height), skin)


def camera_path(labels: Tensor, frames: int, size: int) -> Tensor:
    """labels (B,) of MOTIONS -> (B, T, H W, 2): the point each pixel shows, as (x, y) in pixels
    from the middle of a scene. Motion is relative to the middle frame, which thus does not depend
    on the label."""
    count = len(labels)
    time = torch.arange(frames) - frames // 2  # (T,)

    # The picture's motion per frame: shift in pixels, rotation in radians, zoom in log scale. All
    # but the labelled one are zero. y points down.
    direction = torch.tensor([math.pi, 0, -math.pi / 2, math.pi / 2] + [0] * 4)[labels]
    direction = direction + uniform(-0.35, 0.35, count)
    velocity = torch.stack([direction.cos(), direction.sin()], dim=1)  # (B, 2)
    velocity = velocity * (uniform(1.2, 3.0, count) * (labels < 4))[:, None]
    rotation = uniform(0.15, 0.33, count) * ((labels == 4).int() - (labels == 5).int())
    zoom = uniform(0.075, 0.15, count) * ((labels == 6).int() - (labels == 7).int())

    # Undo the motion about a random centre. A random base scale makes it harder to recognize a
    # zoom by how fine its first frame is.
    angle = -rotation[:, None] * time  # (B, T)
    scale = torch.exp(uniform(-0.3, 0.3, count, 1) - zoom[:, None] * time)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    matrix = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))  # (B, T, 2, 2)
    axis = torch.arange(size) - (size - 1) / 2
    pixels = torch.cartesian_prod(axis, axis).flip(-1)  # (H W, 2), each (x, y)
    centre = uniform(-size / 4, size / 4, count, 1, 1, 2)
    look = torch.einsum("btij,bpj->btpi", matrix, pixels - centre[:, 0]) + centre
    return look - velocity[:, None, None] * time[:, None, None]


def film(scenes: Tensor, labels: Tensor, frames: int, size: int) -> Tensor:
    """Film a random scene for each label with a camera that moves as labelled.

    scenes (count, 3, 2 size, 2 size) in [0, 1], labels (B,) of MOTIONS -> (B, T, 3, H, W) uint8.
    """
    count, look = len(labels), camera_path(labels, frames, size)
    anywhere = uniform(-1, 1, count, 1, 1, 2) * torch.tensor([size, size / 3])
    look = look + anywhere  # (B, T, H W, 2)

    chosen = scenes[torch.randint(len(scenes), (count,))]
    chosen = torch.cat([chosen.flip(2), chosen, chosen.flip(2)], dim=2)  # mirrored vertically,
    tiled = chosen.tile(1, 1, 1, 3)  # repeated sideways, wide enough for the fastest zoom out
    clips = F.grid_sample(tiled, look * 2 / tiled.shape[-1], align_corners=False)
    clips = clips.transpose(1, 2).unflatten(-1, (size, size))  # (B, T, 3, H, W)
    return (255 * clips).clamp(0, 255).to(torch.uint8)
