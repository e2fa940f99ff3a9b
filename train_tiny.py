"""Train VideoMAE on a laptop: pretrain without labels, fine-tune on a few, compare with training from scratch.

    python train_tiny.py                                          embedded clips, no download; minutes on two CPU cores
    python train_tiny.py --data FOLDER                            your videos, FOLDER/Class/*.avi|mp4|...
    python train_tiny.py finetune --data FOLDER --init MCG-NJU/videomae-base      start from published weights
    python train_tiny.py predict --init runs/FOLDER-1 VIDEO ...   the five most likely classes of each video
    torchrun --nproc_per_node=2 train_tiny.py --data FOLDER       several GPUs or machines

Everything goes to runs/<name>/: table, summary.json, metrics.jsonl, pictures, and the models as directories that
`from_pretrained` reads. Interrupted? --resume runs/<name> goes on as if nothing had happened.
Any setting of a recipe below is also an option: --pretrain-steps 300.
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import videomae
from videomae import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessor,
    normalize,
    random_mask,
    resize_short_side,
    running_cells,
    split_mask,
    write_whole,
)

# ----------------------------------------------------------------------------------------------------------------------
# Recipes. Learning rates are for a batch of 256 and are scaled by the batch, as the authors do; a batch is what all
# processes see in a step.

COMMON = dict(
    mask="tube",
    mask_ratio=0.75,  # the authors' for UCF101, their smallest data set
    dual_masking=False,  # predict half of what is masked, as VideoMAE V2: a little over half of the decoder's work
    position_embedding="separable",  # learns faster in small models, see README
    frame_stride=4,  # the authors' for UCF101: 16 frames, 4 apart
    sampling="dense",  # "segments": one frame from each of 16 equal parts of the video, as the authors do for SSv2
    views=5, crops=3,  # at test time: 5 times x 3 places, their mean; the authors' for UCF101
    multi_scale_crop=True,  # the authors'; MotionClips are not cropped
    flip=True,  # left to right; not where the direction is the label
    recolour=False,
    mixup=0.0, cutmix=0.0, label_smoothing=0.0,  # the alphas of mixup and cutmix; 0 is off
    repeated_samples=1,  # how often a clip comes in a fine-tuning batch, each time seen otherwise
    weight_decay=0.05,  # the authors', for both stages
    gradient_clip=1.0,
    warmup=0.05,  # share of the steps
    layer_decay=1.0,  # each layer's learning rate over that of the layer above it, in fine-tuning
    drop_path=0.0,
    head_dropout=0.0,
    scratch=True,  # train from scratch too, to compare
    accumulate=1,  # parts a batch is computed in, to save memory
    activation_checkpointing=False,  # forget activations and compute them again, to save memory
    precision="auto",  # bf16 on a GPU that has it, else fp16 on a GPU, else fp32
    compile=False,
    checkpoint_every=100,  # steps
    max_broken=0.1,  # share of the videos that may be unreadable
)
RECIPES = {
    # Chosen on validation clips, in a prototype, and reported on test clips. 9e-4 to 1e-3 a step: 2e-3 reaches a lower
    # pretraining loss, but its encoder fine-tunes worse; from scratch 5e-4 is best.
    "embedded": COMMON | dict(
        model="tiny",
        unlabelled_clips=10_000,
        labels_per_class=[2, 10],  # label budgets; 0 = every label
        test_clips=1024,
        views=1, crops=1, flip=False, multi_scale_crop=False, recolour=True,
        pretrain_steps=2400,  # what the time allows: more are better, see README
        pretrain_batch=48, pretrain_lr=5.3e-3,
        finetune_steps=300, finetune_batch=32, finetune_lr=8e-3,  # with 16 the loss stays at chance for most steps
        scratch_lr=4e-3,
        scratch_full_time_steps=1150,  # as long as a column's share of the pretraining and its fine-tuning
    ),
    # A subset of UCF101 on a laptop: a start, chosen for its running time.
    "laptop": COMMON | dict(
        model="laptop",
        labels_per_class=[0],
        pretrain_steps=2000, pretrain_batch=16, pretrain_lr=8e-3,
        finetune_steps=300, finetune_batch=16, finetune_lr=4e-3,
        scratch_lr=4e-3,
        scratch_full_time_steps=900,
        layer_decay=0.75, drop_path=0.1, label_smoothing=0.1,
    ),
    # The authors' UCF101 recipe: scripts/ucf101/videomae_vit_base_patch16_224_tubemasking_ratio_0.75_epoch_3200, the
    # rest from the defaults of run_class_finetuning.py. Their RandAugment and random erasing are not built here.
    "ucf101": COMMON | dict(
        model="base",
        position_embedding="sinusoid",
        labels_per_class=[0],
        pretrain_steps=158_950, pretrain_batch=192, pretrain_lr=3e-4,  # 3,200 epochs of split 1's 9,537 clips, 8 x 24
        warmup=0.0125,  # 40 of 3,200 epochs
        gradient_clip=math.inf,  # they do not clip
        finetune_steps=14_901, finetune_batch=128, finetune_lr=5e-4,  # 100 epochs of 2 samples a clip, 8 x 16
        repeated_samples=2,
        scratch=False, scratch_lr=5e-4, scratch_full_time_steps=14_901,
        layer_decay=0.7, drop_path=0.2, head_dropout=0.5,
        mixup=0.8, cutmix=1.0, label_smoothing=0.1,
        activation_checkpointing=True,
        checkpoint_every=1000,
    ),
}
PRETRAIN_BETAS, FINETUNE_BETAS = (0.9, 0.95), (0.9, 0.999)  # the authors'


# ----------------------------------------------------------------------------------------------------------------------
# Random numbers. All of a step's follow from the seed and the step's number, so that a resumed run repeats them. They
# are drawn for the whole batch, of which a process takes its rows, so that two processes see together what one would
# (but for dropout, drop path and mixup, which each process and each part of a batch draws for itself).


class Draw:
    """The random numbers of one training step, for `rows` of its `batch` clips."""

    def __init__(self, seed: int, step: int, batch: int, rows: slice):
        self.generator = torch.Generator().manual_seed(seed * 1_000_000_007 + step)
        self.batch, self.rows = batch, rows

    def uniform(self, *shape: int) -> Tensor:
        """(rows, *shape), from 0 to 1."""
        return torch.rand(self.batch, *shape, generator=self.generator)[self.rows]

    def normal(self, *shape: int) -> Tensor:
        """(rows, *shape), mean 0, std 1."""
        return torch.randn(self.batch, *shape, generator=self.generator)[self.rows]


def clips_of_step(subset: Tensor, batch: int, step: int, seed: int) -> Tensor:
    """(batch,) members of subset (n,): the step's part of an endless row of shuffles, every clip once in each."""
    n, start = len(subset), step * batch
    epochs = range(start // n, (start + batch - 1) // n + 1)
    shuffles = [torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + e)) for e in epochs]
    return subset[torch.cat(shuffles)[start - epochs[0] * n :][:batch]]


# ----------------------------------------------------------------------------------------------------------------------
# Embedded clips: a texture that moves as a whole. The label is the motion. The middle frame is the same whatever the
# label; towards the ends a zoom makes a frame finer or coarser than most, which tells zoom in from zoom out, no more.

HELD_OUT_SEEDS = {"test": 1_000_001, "val": 1_000_002}  # textures of their own, the same for every --seeds
MOTIONS = ("left", "right", "up", "down", "clockwise", "counter-clockwise", "zoom in", "zoom out")  # opposites in pairs


class MotionClips:
    """`count` generated clips with their motion as label; the same arguments give the same clips."""

    classes, num_views = MOTIONS, 1

    def __init__(self, count: int, config: VideoMAEConfig, seed: int):
        generator = torch.Generator().manual_seed(seed)
        textures = make_textures(512, 2 * config.image_size, generator)
        self.labels = torch.randint(len(MOTIONS), (count,), generator=generator)  # (count,) int64
        self.clips = torch.cat([move_textures(textures, chunk, config.num_frames, config.image_size, generator)
                                for chunk in self.labels.split(250)])  # (count, T, 3, H, W) uint8

    def load(self, indices: Tensor, draw: Draw | None = None, view: int = 0) -> Tensor:
        """(B,) indices -> (B, T, 3, H, W) uint8."""
        return self.clips[indices]


def uniform(low: float, high: float, shape, generator: torch.Generator) -> Tensor:
    """Random numbers between low and high."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def make_textures(count: int, size: int, generator: torch.Generator, alphas=(2.5, 3.0)) -> Tensor:
    """(count, 3, size, size) float32, mean 0, std 1: noise of amplitude 1 / frequency^alpha, which tiles the plane.

    alphas: the range of alpha; larger is smoother.
    """
    alpha = uniform(*alphas, (count, 1, 1, 1), generator)
    frequency = torch.fft.fftfreq(size)
    radius = torch.hypot(frequency[:, None], frequency)
    radius[0, 0] = math.inf  # so that the mean is 0
    spectrum = torch.fft.fft2(torch.randn(count, 3, size, size, generator=generator)) * radius**-alpha
    textures = torch.fft.ifft2(spectrum).real
    return textures / textures.std(dim=(2, 3), keepdim=True)


def move_textures(textures: Tensor, labels: Tensor, frames: int, size: int, generator: torch.Generator) -> Tensor:
    """One clip per label: a random texture, randomly coloured, moved as labelled -> (B, T, 3, H, W) uint8.

    textures: (count, 3, 2 size, 2 size), see `make_textures`. labels: (B,) int64, indices into MOTIONS.
    Displacement is counted from the middle of the clip: what is seen there does not depend on the label.
    """
    count = len(labels)
    time_from_middle = torch.arange(frames) - frames // 2  # (T,)

    # Per frame: pixels of translation, radians of rotation, log-scale of zoom. Only the labelled one is not zero.
    direction = torch.tensor([math.pi, 0, -math.pi / 2, math.pi / 2] + [0] * 4)[labels]  # y points down
    direction = direction + uniform(-0.35, 0.35, count, generator)
    velocity = torch.stack([direction.cos(), direction.sin()], dim=1)  # (B, 2)
    velocity = velocity * (uniform(1.2, 3.0, count, generator) * (labels < 4))[:, None]
    rotation = uniform(0.15, 0.33, count, generator) * ((labels == 4).float() - (labels == 5).float())
    zoom = uniform(0.075, 0.15, count, generator) * ((labels == 6).float() - (labels == 7).float())

    # Where in the texture each pixel looks: the motion undone, about a random centre. The random base scale makes it
    # harder to tell a zoom by how fine its first frame is.
    angle = -rotation[:, None] * time_from_middle  # (B, T)
    scale = torch.exp(uniform(-0.3, 0.3, (count, 1), generator) - zoom[:, None] * time_from_middle)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    matrix = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))  # (B, T, 2, 2)
    axis = torch.arange(size) - (size - 1) / 2
    pixels = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).flatten(0, 1)  # (H W, 2), (x, y)
    centre = uniform(-size / 4, size / 4, (count, 1, 1, 2), generator)
    look = torch.einsum("btij,bpj->btpi", matrix, pixels - centre[:, 0]) + centre  # (B, T, H W, 2)
    look = look - velocity[:, None, None] * time_from_middle[:, None, None]
    look = look + uniform(-size / 2, size / 2, (count, 1, 1, 2), generator)  # anywhere on the texture

    chosen = textures[torch.randint(len(textures), (count,), generator=generator)]
    tiled = chosen.tile(1, 1, 3, 3)  # wide enough for the fastest zoom out
    clips = F.grid_sample(tiled, look * 2 / tiled.shape[-1], align_corners=False)  # (B, 3, T, H W)
    colours = F.normalize(torch.randn(count, 3, 3, generator=generator), dim=2)
    clips = torch.einsum("bij,bjtp->btip", colours, clips).unflatten(-1, (size, size))
    return (127.5 + 50 * clips).clamp(0, 255).to(torch.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# Videos: found and split, decoded once, sampled

VIDEO_SUFFIXES = (".avi", ".mp4", ".mkv", ".webm", ".mov")
Entries = list[tuple[Path, int]]  # (file, label)


def split_folder(folder: Path, split: int = 1) -> tuple[list[str], dict[str, Entries]]:
    """A folder -> its class names and {"train": [(file, label)], "test": [...]}. What it may hold, the first found:

    1. the authors' lists: train.csv and test.csv (or val.csv), a path and a label in each line
    2. train/Class/* and test/Class/* (or val/)
    3. UCF101: Class/*.avi and ucfTrainTestlist/ with the official lists, of which `split` (1 to 3) is followed
    4. Class/*: every fifth scene of a class is for testing; a scene is a UCF101 group (`_g07_` in the name) where names
       carry one, else a file, so that no scene is on both sides

    Raises ValueError where there is no video, or a class is missing on one side.
    """
    if not folder.is_dir():
        raise ValueError(f"--data: {folder} is not a folder")
    held_out = "test" if any((folder / name).exists() for name in ("test", "test.csv")) else "val"
    if (folder / "train.csv").is_file():
        splits = {name: read_list(folder / f"{file}.csv") for name, file in (("train", "train"), ("test", held_out))}
        parents = {}  # label -> the folders its videos are in
        for file, label in itertools.chain(*splits.values()):
            parents.setdefault(label, set()).add(file.parent.name)
        one_each = len(set().union(*parents.values())) == len(parents)
        classes = [parents[i].pop() if one_each and i in parents else str(i) for i in range(max(parents) + 1)]
    elif (folder / "train").is_dir() and (folder / held_out).is_dir():
        files = {"train": videos_in(folder / "train"), "test": videos_in(folder / held_out)}
        classes = sorted({file.parent.name for part in files.values() for file in part})
        splits = {name: [(file, classes.index(file.parent.name)) for file in part] for name, part in files.items()}
    else:
        files = videos_in(folder)
        classes = sorted({file.parent.name for file in files})
        official = (folder / "ucfTrainTestlist").is_dir()
        splits = official_split(folder, files, classes, split) if official else split_by_scene(files, classes)
    if len(classes) < 2:
        raise ValueError(f"--data: {folder} has one class, {classes[0]}; a classifier needs two or more")
    for name, entries in splits.items():
        missing = [c for i, c in enumerate(classes) if i not in {label for _, label in entries}]
        if missing:
            raise ValueError(f"--data: no {name} video of class {', '.join(missing)}; a class needs two scenes")
    return classes, splits


def videos_in(folder: Path) -> list[Path]:
    """FOLDER/Class/*, sorted. Raises ValueError where there is none."""
    files = sorted(file for file in folder.glob("*/*") if file.suffix.lower() in VIDEO_SUFFIXES and file.name[0] != ".")
    if not files:
        raise ValueError(f"--data: no video ({', '.join(VIDEO_SUFFIXES)}) in {folder}/Class/")
    return files


def read_list(path: Path) -> Entries:
    """The authors' list: a path (absolute or from the list's folder) and a label in each line."""
    if not path.is_file():
        raise ValueError(f"--data: {path} is missing")
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            name, _, label = line.strip().rpartition(" ")
            if not name or not label.isdecimal():
                raise ValueError(f"--data: line {number} of {path} is {line!r}, expected a path, a space and a label")
            entries.append((path.parent / name, int(label)))
    if not entries:
        raise ValueError(f"--data: {path} is empty")
    return entries


def official_split(folder: Path, files: list[Path], classes: list[str], split: int) -> dict[str, Entries]:
    """UCF101's lists: Class/file.avi in each line, in train lists a number after it."""
    by_name, splits = {f"{file.parent.name}/{file.name}": file for file in files}, {}
    for name in ("train", "test"):
        path = folder / f"ucfTrainTestlist/{name}list{split:02}.txt"
        if not path.is_file():
            raise ValueError(f"--split: {path} is missing")
        listed = [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
        splits[name] = [(by_name[n], classes.index(n.split("/")[0])) for n in listed if n in by_name]
    return splits


def split_by_scene(files: list[Path], classes: list[str]) -> dict[str, Entries]:
    """See 4. of `split_folder`."""
    splits = {"train": [], "test": []}
    for label, name in enumerate(classes):
        scenes = {}
        for file in (file for file in files if file.parent.name == name):
            group = re.search(r"_g(\d+)_", file.name)
            scenes.setdefault(group[1] if group else file.name, []).append(file)
        for i, scene in enumerate(scenes.values()):
            splits["test" if i % 5 == 0 else "train"] += [(file, label) for file in scene]
    return splits


def download_ucf101_subset(cache: Path) -> Path:
    """The 10 classes of the Hugging Face fine-tuning tutorial -> their folder, downloaded and unpacked once."""
    folder = cache / "ucf101-subset"
    if not folder.exists():
        hub = videomae.optional_import("huggingface_hub", "huggingface_hub")
        try:  # resumed where it was interrupted, and whole or absent
            archive = hub.hf_hub_download("sayakpaul/ucf101-subset", "UCF101_subset.tar.gz", repo_type="dataset")
        except Exception as error:
            raise ValueError(f"--data: ucf101-subset could not be downloaded ({type(error).__name__}: "
                             f"{str(error).splitlines()[0]})") from error
        temporary = cache / f"ucf101-subset.{os.getpid()}.tmp"
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(temporary, filter="data")  # nothing outside the folder
            (train,) = temporary.glob("*/train")
            os.replace(train.parent, folder)
        except (tarfile.TarError, OSError, ValueError, EOFError) as error:
            raise ValueError(f"--data: {archive} could not be unpacked ({error})") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def decode(file: Path, short_side: int, cache: Path) -> Path:
    """A video -> the .npy file of its (frames, H, W, 3) uint8, short side as given; decoded once, then in the cache.

    The cache is keyed by the file's content and the size. Raises ValueError for a file that has no readable frames.
    """
    try:
        key = hashlib.blake2b(file.read_bytes(), digest_size=12).hexdigest()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
    cached = cache / f"{key}-{short_side}.npy"
    if not cached.exists():
        import av
        from av.video.reformatter import VideoReformatter

        frames, reformatter = [], VideoReformatter()  # one for all frames: six times as fast as one for each
        try:
            with av.open(str(file)) as container:
                for frame in container.decode(video=0):
                    scale = short_side / min(frame.width, frame.height)
                    width, height = (max(short_side, round(x * scale)) for x in (frame.width, frame.height))
                    pixels = reformatter.reformat(frame, width, height, "rgb24").to_ndarray()
                    # A phone held upright stores lying frames and says by how many degrees to turn them.
                    frames.append(np.rot90(pixels, round(frame.rotation / 90)))
        except (av.FFmpegError, IndexError) as error:
            if not frames:  # what a truncated file still holds is used
                raise ValueError(f"{file}: cannot be decoded ({error})") from error
        if not frames:
            raise ValueError(f"{file}: has no frames")
        frames = [frame for frame in frames if frame.shape == frames[0].shape]
        write_whole(cached, lambda temporary: np.save(temporary, np.stack(frames)))
    return cached


def decode_all(files: list[Path], short_side: int, cache: Path, max_broken: float) -> dict[Path, Path]:
    """Every file -> its decoded frames, several at a time. Broken files are named and left out.

    Raises ValueError where more than `max_broken` of them are.
    """
    def attempt(file):
        try:
            return decode(file, short_side, cache)
        except ValueError as error:
            return str(error)

    if files:
        sample = [f for f in files[:: max(1, len(files) // 20)] if f.is_file()]
        megabytes = sum(map(estimate_size, sample)) * short_side**2 / max(1, len(sample)) * len(files) / 1e6
        say(f"cache     {cache}/: about {megabytes:.0f} MB for {len(files)} videos of {short_side} rows")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = dict(zip(files, tqdm(pool.map(attempt, files), desc="decoding", total=len(files), leave=False,
                                       disable=None), strict=True))
    broken = [error for error in results.values() if isinstance(error, str)]
    for error in broken:
        say(f"left out: {error}", file=sys.stderr)
    if len(broken) > max_broken * len(files):
        raise ValueError(f"--max-broken: {len(broken)} of {len(files)} videos cannot be read, more than the "
                         f"{max_broken:.0%} that are allowed")
    return {file: result for file, result in results.items() if isinstance(result, Path)}


def estimate_size(file: Path) -> float:
    """Bytes of a decoded video per squared short side, from what its header says."""
    import av

    try:
        with av.open(str(file)) as container:
            stream = container.streams.video[0]
            seconds = (container.duration or 0) / av.time_base
            frames = stream.frames or seconds * float(stream.average_rate or 25)
            return 3 * frames * max(stream.width, stream.height) / max(1, min(stream.width, stream.height))
    except (av.FFmpegError, IndexError):
        return 0.0


def write_json(path: Path, content: dict):
    """A dict as JSON, whole or not at all."""
    write_whole(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


class VideoClips:
    """Clips of `num_frames` frames from decoded videos."""

    def __init__(self, classes: list[str], entries: Entries, decoded: dict[Path, Path], config: VideoMAEConfig,
                 recipe: dict):
        self.classes, self.frames, self.size, self.recipe = classes, config.num_frames, config.image_hw[0], recipe
        self.videos = [decoded[file] for file, _ in entries if file in decoded]
        self.labels = torch.tensor([label for file, label in entries if file in decoded])
        missing = [name for i, name in enumerate(classes) if i not in self.labels]
        if missing:
            raise ValueError(f"--data: no readable video of class {', '.join(missing)}")
        self.num_views = recipe["views"] * recipe["crops"]

    def load(self, indices: Tensor, draw: Draw | None = None, view: int = 0) -> Tensor:
        """(B,) indices -> (B, T, 3, H, W) uint8: with `draw` a random time and crop, else the view-th of `num_views`:
        times evenly spaced, and at each as many places along the longer side."""
        views, crops = self.recipe["views"], self.recipe["crops"]
        numbers = draw.uniform(self.frames + 3) if draw else [None] * len(indices)
        clips = []
        for i, random in zip(indices.tolist(), numbers, strict=True):
            video = np.load(self.videos[i], mmap_mode="r")  # (frames, h, w, 3); only what is used is read
            time = random[3:].numpy() if draw else np.full(self.frames, (view // crops + 0.5) / views)
            clip = rearrange(torch.from_numpy(video[self.times(len(video), time)]), "t h w c -> t c h w")
            if draw and self.recipe["multi_scale_crop"]:
                clips.append(multi_scale_crop(clip, self.size, random[:3].tolist()))
            else:
                place = view % crops / (crops - 1) if crops > 1 else 0.5
                clips.append(square_crop(clip, self.size, float(random[1]) if draw else place))
        return torch.stack(clips)

    def times(self, length: int, random: np.ndarray) -> np.ndarray:
        """(T,) frame numbers; random (T,) from 0 to 1 says where. A short video holds its last frame."""
        if self.recipe["sampling"] == "segments":
            return np.minimum((np.arange(self.frames) + random) * length / self.frames, length - 1).astype(int)
        stride = self.recipe["frame_stride"]
        room = max(length - 1 - (self.frames - 1) * stride, 0)
        return np.minimum(round(float(random[0]) * room) + stride * np.arange(self.frames), length - 1)


# ----------------------------------------------------------------------------------------------------------------------
# Augmentation


def square_crop(clip: Tensor, size: int, place: float) -> Tensor:
    """(T, C, H, W) uint8 -> (T, C, size, size): the whole short side; of the long one from 0, its start, to 1."""
    clip = resize_short_side(clip, size)
    top, left = (round(place * (x - size)) for x in clip.shape[-2:])
    return clip[..., top : top + size, left : left + size]


def multi_scale_crop(clip: Tensor, size: int, random: list[float]) -> Tensor:
    """(T, C, H, W) uint8 -> (T, C, size, size): height and width 1, 0.875, 0.75 or 0.66 of the short side, at most one
    step apart, anywhere; random: 3 numbers from 0 to 1. The authors' GroupMultiScaleCrop, but for its fixed places."""
    scales = (1, 0.875, 0.75, 0.66)
    pairs = [(a, b) for i, a in enumerate(scales) for j, b in enumerate(scales) if abs(i - j) <= 1]
    short_side = min(clip.shape[-2:])
    height, width = (round(scale * short_side) for scale in pairs[min(int(random[0] * len(pairs)), len(pairs) - 1)])
    top, left = (int(r * (x - side + 1))
                 for r, x, side in zip(random[1:], clip.shape[-2:], (height, width), strict=True))
    crop = clip[..., top : top + height, left : left + width].contiguous(memory_format=torch.channels_last)
    return F.interpolate(crop, (size, size), mode="bilinear", antialias=True)


def flip(pixel_values: Tensor, random: Tensor) -> Tensor:
    """(B, T, C, H, W) -> the same, left to right where random (B,) is below a half."""
    return torch.where((random < 0.5).view(-1, 1, 1, 1, 1), pixel_values.flip(-1), pixel_values)


def recolour(pixel_values: Tensor, random: Tensor) -> Tensor:
    """(B, T, C, H, W) -> the same: channels shuffled, each negated or not, stretched and shifted, alike in all frames.

    random (B, 12), from 0 to 1, the last 3 normal. It changes what is seen and not how it moves. Without it a few
    labelled clips are told apart by their colours.
    """
    order = random[:, :3].argsort(dim=1).view(-1, 1, 3, 1, 1).expand_as(pixel_values)
    sign, contrast, shift = random[:, 3:].view(-1, 3, 1, 3, 1, 1).unbind(dim=1)  # (B, 1, C, 1, 1) each
    return pixel_values.gather(2, order) * (sign.round() * 2 - 1) * (0.5 + contrast) + 0.5 * shift


def mix(pixel_values: Tensor, targets: Tensor, random: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """mixup or cutmix of each clip with its mirror place among these; targets (B, classes) are mixed alike.

    random (B,); mixup, cutmix: the alpha of the Beta distribution the share comes from; with both, either is chosen.
    """
    rng = np.random.default_rng(int(random[0].item() * 2**31))
    use_cutmix = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    share = rng.beta(cutmix, cutmix) if use_cutmix else rng.beta(mixup, mixup)  # of the clip itself
    if use_cutmix:
        height, width = pixel_values.shape[-2:]
        h, w = (round(x * math.sqrt(1 - share)) for x in (height, width))
        top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        box = (..., slice(top, top + h), slice(left, left + w))
        pixel_values = pixel_values.clone()
        pixel_values[box] = pixel_values.flip(0)[box]
        share = 1 - h * w / (height * width)
    else:
        pixel_values = share * pixel_values + (1 - share) * pixel_values.flip(0)
    return pixel_values, share * targets + (1 - share) * targets.flip(0)


# ----------------------------------------------------------------------------------------------------------------------
# Training


@dataclass
class Run:
    """Where a run writes, what it runs on, and what it knows already."""

    folder: Path
    seed: int
    recipe: dict
    device: torch.device
    resumed: bool = False
    rank: int = 0  # of `world` processes
    world: int = 1
    results: dict = field(default_factory=dict)  # of the stages that are finished; results.json

    def once(self, stage: str, work) -> dict:
        """work()'s result, with its seconds; from results.json where a run that was interrupted had it already."""
        if stage not in self.results:
            start = time.perf_counter()
            result = work()
            self.results[stage] = {"seconds": round(time.perf_counter() - start, 1)} | result
            if self.rank == 0:
                write_json(self.folder / "results.json", self.results)
            self.wait()
        return self.results[stage]

    def wait(self):
        """Until every process is here."""
        if self.world > 1:
            dist.barrier()

    def rows(self, batch: int) -> slice:
        """This process's part of a batch."""
        share = batch // self.world
        return slice(self.rank * share, (self.rank + 1) * share)


STOP = threading.Event()  # set by Ctrl-C or SIGTERM: the step that runs is finished, and saved


def say(*text, file=None):
    """print, in the first process only."""
    if os.environ.get("RANK", "0") == "0":
        print(*text, file=file or sys.stdout, flush=True)


def ahead(make_batch, first: int, last: int):
    """Yield (step, make_batch(step), seconds waited for it): batches are made in threads while the model works."""
    workers = max(1, (os.cpu_count() or 1) // 4)
    # One core for each: on a CPU they would be in the model's way.
    with ThreadPoolExecutor(workers, initializer=partial(torch.set_num_threads, 1)) as pool:
        waiting = deque(pool.submit(make_batch, step) for step in range(first, min(first + workers + 1, last)))
        for step in range(first, last):
            start = time.perf_counter()
            batch = waiting.popleft().result()
            waited = time.perf_counter() - start
            if step + workers + 1 < last:
                waiting.append(pool.submit(make_batch, step + workers + 1))
            yield step, batch, waited


def parameter_groups(model, weight_decay: float, layer_decay: float) -> list[dict]:
    """As the authors': no decay on norms, biases and the mask token; `layer_decay` from the head down to the cubes."""
    top, groups = len(model.videomae.blocks) + 1, {}
    for name, parameter in model.named_parameters():
        block = re.match(r"videomae\.blocks\.(\d+)\.", name)
        depth = int(block[1]) + 1 if block else 0 if name.startswith("videomae.embed") else top
        decay = 0.0 if parameter.ndim < 2 or name.endswith("mask_token") else weight_decay
        scale = layer_decay ** (top - depth)
        fields = dict(params=[], weight_decay=decay, scale=scale)
        groups.setdefault((scale, decay), fields)["params"].append(parameter)
    return list(groups.values())


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up for a share of the steps, then half a cosine."""
    warmup_steps = max(1, round(warmup * steps))
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (0.5 + 0.5 * math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def number_type(recipe: dict, device: torch.device) -> torch.dtype:
    """What matrices are multiplied in."""
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if recipe["precision"] != "auto":
        return named[recipe["precision"]]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def memory() -> str:
    """The most this process has held, on the GPU where there is one."""
    if torch.cuda.is_available():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GB"
    if sys.platform == "win32":
        return ""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak / (2**30 if sys.platform == 'darwin' else 2**20):.1f} GB"  # bytes there, kilobytes elsewhere


def update(run: Run, model, tensors: list[Tensor], loss_of, optimizer, scaler, dtype: torch.dtype) -> Tensor:
    """One step on one batch, computed in `accumulate` parts -> the mean loss of this process's rows."""
    parts, step_loss = run.recipe["accumulate"], 0
    for i in range(parts):
        part = [tensor.chunk(parts)[i].to(run.device, non_blocking=True) for tensor in tensors]
        wait_to_sync = run.world > 1 and i + 1 < parts  # processes exchange gradients once, after the last part
        with model.no_sync() if wait_to_sync else contextlib.nullcontext(), \
                torch.autocast(run.device.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(model, *part) / parts
        scaler.scale(loss).backward()
        step_loss = step_loss + loss.detach()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_((p for group in optimizer.param_groups for p in group["params"]),
                             run.recipe["gradient_clip"])
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return step_loss


def train(run: Run, stage: str, model, make_batch, loss_of, batch: int, steps: int, base_lr: float, betas,
          epoch: int, layer_decay: float = 1.0, picture=None) -> dict:
    """AdamW on loss_of(model, *batch) for some steps; the model is trained in place -> losses and the wait for data,
    in percent of the time, in the first `epoch` steps and after them.

    make_batch(step) gives this process's tensors of a step, on the CPU; loss_of(model, *tensors) the mean loss of some
    of their rows. Every `checkpoint_every` steps the whole state is saved to run.folder/checkpoint.pt; a resumed run
    starts from it. Raises FloatingPointError where the loss is not finite, KeyboardInterrupt after Ctrl-C.
    """
    recipe, device, path = run.recipe, run.device, run.folder / "checkpoint.pt"
    peak = base_lr * batch / 256
    dtype = number_type(recipe, device)
    groups = parameter_groups(model, recipe["weight_decay"], layer_decay)
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=betas, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    first, losses, earlier = 0, [], 0.0
    if run.resumed and path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        if state["stage"] == stage:
            first, losses, earlier = state["step"], state["losses"], state["seconds"]
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            scaler.load_state_dict(state["scaler"])
            say(f"{stage}: goes on from step {first}")
    if run.rank == 0:
        keep_metrics(run.folder / "metrics.jsonl", lambda m: m["stage"] != stage or m["step"] < first)

    def save(step):
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise FloatingPointError(f"{stage}: weights are not finite at step {step}, lr {rate:.2g}; {good()}")
        if run.rank == 0:
            seconds = earlier + time.perf_counter() - start
            state = dict(stage=stage, step=step, seconds=seconds, losses=losses, model=model.state_dict(),
                         optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
            write_whole(path, lambda file: torch.save(state, file))

    def good():
        return f"the last good checkpoint is {path}, of step {saved}" if saved else "none was saved yet"

    saved, trained = first, model
    if recipe["activation_checkpointing"]:
        for block in model.videomae.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if run.world > 1:
        trained = DistributedDataParallel(trained, device_ids=[device] if device.type == "cuda" else None)
    if recipe["compile"]:
        trained = torch.compile(trained)

    model.train()
    recent, waits = [], []
    start = step_start = time.perf_counter()
    bar = tqdm(total=steps, initial=first, desc=stage, mininterval=1, leave=False, disable=True if run.rank else None)
    for step, tensors, waited in ahead(make_batch, first, steps):
        torch.manual_seed(run.seed * 1_000_000_007 + step * run.world + run.rank)  # dropout and drop path
        rate = learning_rate(step, steps, peak, recipe["warmup"])
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        step_loss = update(run, trained, tensors, loss_of, optimizer, scaler, dtype)
        recent.append((step, step_loss, rate))
        done = step + 1
        stop = STOP.is_set() and run.world == 1  # several processes stop together, below
        # Losses are looked at, and a GPU waited for, every ten steps only.
        if done % 10 == 0 or done in (1, steps) or done % recipe["checkpoint_every"] == 0 or stop:
            stopped = torch.tensor(float(STOP.is_set()), device=device)
            values = torch.stack([x.float() for _, x, _ in recent] + [stopped])
            if run.world > 1:
                dist.all_reduce(values)
            *values, stop = (values / run.world).tolist()
            for (at, _, lr), value in zip(recent, values, strict=True):
                if not math.isfinite(value):
                    raise FloatingPointError(f"{stage}: the loss is {value} at step {at}, lr {lr:.2g}; {good()}")
            losses += values
            if run.rank == 0:
                with open(run.folder / "metrics.jsonl", "a") as file:
                    file.writelines(json.dumps(dict(stage=stage, step=at, loss=value, lr=lr)) + "\n"
                                    for (at, _, lr), value in zip(recent, values, strict=True))
            recent = []
            bar.update(done - bar.n)
            speed = batch * (done - first) / (time.perf_counter() - start)
            bar.set_postfix_str(f"loss {values[-1]:.3f}, lr {rate:.1e}, {speed:.0f} clips/s, {memory()}")
        if done % recipe["checkpoint_every"] == 0 or stop:
            save(saved := done)
        if picture and run.rank == 0 and (done % max(1, steps // 10) == 0):
            picture(model)
            model.train()
        if stop:
            raise KeyboardInterrupt
        waits.append((waited, time.perf_counter() - step_start))
        step_start = time.perf_counter()
    bar.close()
    seconds = earlier + time.perf_counter() - start
    run.wait()
    data_wait = [round(100 * sum(w for w, _ in part) / max(1e-9, sum(s for _, s in part)), 2)
                 for part in (waits[:epoch], waits[epoch:])]
    say(f"{stage}: loss {losses[0]:.3f} -> {np.mean(losses[-10:]):.3f} in {steps} steps, {seconds:.0f} s; waiting for "
        f"data {data_wait[0]:.1f} % of the first epoch" + f", {data_wait[1]:.1f} % of the rest" * (steps > epoch))
    return dict(loss_first=losses[0], loss_last=float(np.mean(losses[-max(1, steps // 10):])), data_wait=data_wait,
                seconds=round(seconds, 1))


def keep_metrics(path: Path, wanted):
    """Drop the lines of metrics.jsonl that will be written again, and one that was cut off."""
    if path.exists():
        lines = path.read_text().splitlines()
        metrics = [json.loads(line) for line in lines if line.endswith("}")]
        write_whole(path, lambda f: f.write("".join(json.dumps(m) + "\n" for m in metrics if wanted(m)).encode()))


def pretrain(run: Run, clips, config: VideoMAEConfig, stage: str, picture=None):
    """Stage 1, no labels: reconstruct what the tubes hide -> the VideoMAEForPreTraining and `train`'s result."""
    recipe, batch = run.recipe, run.recipe["pretrain_batch"]
    torch.manual_seed(run.seed)
    model = VideoMAEForPreTraining(config).to(run.device)
    everything = torch.arange(len(clips.labels))
    epoch = math.ceil(len(everything) / batch)

    def make_batch(step):
        draw = Draw(run.seed, step, batch, run.rows(batch))
        indices = clips_of_step(everything, batch, step, run.seed)[draw.rows]
        mask = random_mask(recipe["mask"], batch, config.grid, recipe["mask_ratio"], draw.generator)[draw.rows]
        cells = running_cells(batch, config.grid, draw.generator)[draw.rows] if recipe["dual_masking"] else None
        return clips.load(indices, draw), draw.uniform(), *split_mask(mask, cells)

    def loss_of(model, frames, random, *mask):
        pixel_values = normalize(frames)
        if recipe["flip"]:
            pixel_values = flip(pixel_values, random)
        return model(pixel_values, mask).loss

    return model, train(run, stage, model, make_batch, loss_of, batch, recipe["pretrain_steps"], recipe["pretrain_lr"],
                        PRETRAIN_BETAS, epoch, picture=picture)


def finetune(run: Run, clips, subset: Tensor, model: VideoMAEForVideoClassification, stage: str, steps: int,
             base_lr: float, layer_decay: float) -> dict:
    """Stage 2: train a classifier on the labelled clips `subset`, in place -> `train`'s result."""
    recipe, batch, classes = run.recipe, run.recipe["finetune_batch"], model.config.num_labels
    repeats = recipe["repeated_samples"]
    model.to(run.device)
    dropout = model.classifier.register_forward_pre_hook(
        lambda layer, x: F.dropout(x[0], recipe["head_dropout"], layer.training))

    def make_batch(step):
        draw = Draw(run.seed, step, batch, run.rows(batch))
        indices = clips_of_step(subset, batch // repeats, step, run.seed).repeat_interleave(repeats)[draw.rows]
        random = torch.cat([draw.uniform(11), draw.normal(3)], dim=1)  # flip, mix, recolour (12)
        return clips.load(indices, draw), clips.labels[indices], random

    def loss_of(model, frames, labels, random):
        pixel_values, targets = normalize(frames), F.one_hot(labels, classes).float()
        if recipe["flip"]:
            pixel_values = flip(pixel_values, random[:, 0])
        if recipe["recolour"]:
            pixel_values = recolour(pixel_values, random[:, 2:])
        if recipe["mixup"] or recipe["cutmix"]:
            pixel_values, targets = mix(pixel_values, targets, random[:, 1], recipe["mixup"], recipe["cutmix"])
        return F.cross_entropy(model(pixel_values).logits.float(), targets, label_smoothing=recipe["label_smoothing"])

    result = train(run, stage, model, make_batch, loss_of, batch, steps, base_lr, FINETUNE_BETAS,
                   math.ceil(len(subset) * repeats / batch), layer_decay)
    dropout.remove()
    return result


def new_classifier(run: Run, source: str | Path | None, config: VideoMAEConfig, clips):
    """A classifier with a new head, on the encoder in `source` or, where that is None, on a new one."""
    torch.manual_seed(run.seed)
    recipe = run.recipe
    fields = dict(num_labels=len(clips.classes), id2label=dict(enumerate(clips.classes)), use_mean_pooling=True,
                  drop_path_rate=recipe["drop_path"])
    # What `predict` needs to know is kept in the config; transformers leaves such fields alone.
    extra = config.extra | {name: recipe[name] for name in ("frame_stride", "sampling", "views", "crops")}
    new = VideoMAEForVideoClassification(replace(config, **fields, extra=extra))
    if source is None:
        return new
    model = VideoMAEForVideoClassification.from_pretrained(source, **fields, extra=extra)
    model.classifier.load_state_dict(new.classifier.state_dict())  # also where an old one would fit
    return model


def choose_labelled(labels: Tensor, labels_per_class: int, seed: int) -> Tensor:
    """Indices of `labels_per_class` random clips of each class; 0 = every clip."""
    if labels_per_class == 0:
        return torch.arange(len(labels))
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique():
        clips = (labels == label).nonzero()[:, 0]
        if len(clips) < labels_per_class:
            raise ValueError(f"--labels-per-class: {labels_per_class} asked for, class {label} has {len(clips)} clips")
        chosen.append(clips[torch.randperm(len(clips), generator=generator)[:labels_per_class]])
    return torch.cat(chosen)


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def mean_over_views(function, clips, indices: Tensor, device, change=lambda frames: frames) -> Tensor:
    """function of (B, T, 3, H, W) normalized clips, averaged over a clip's views -> (n, ...), on the CPU.

    `change` alters the 8-bit frames before.
    """
    rows = []
    for chunk in indices.split(64 if clips.num_views == 1 else 8):
        loaded = (clips.load(chunk, view=view) for view in range(clips.num_views))
        views = [function(normalize(change(frames).to(device))) for frames in loaded]
        rows.append(torch.stack(views).mean(dim=0).cpu())
    return torch.cat(rows)


def probabilities(model, clips, device, change=lambda frames: frames) -> Tensor:
    """(n, classes), the mean over a clip's views."""
    model.eval()
    everything = torch.arange(len(clips.labels))
    return mean_over_views(lambda x: model(x).logits.softmax(dim=1), clips, everything, device, change)


def percent(correct: Tensor) -> float:
    """Share of True, in percent."""
    return round(100 * correct.float().mean().item(), 2)


def balanced(predictions: Tensor, labels: Tensor) -> float:
    """Mean over the classes of the share of their clips that is right, in percent."""
    return round(sum(percent(predictions[labels == c] == c) for c in labels.unique()) / len(labels.unique()), 2)


def scores(predictions: Tensor, labels: Tensor) -> dict:
    """top-1 and balanced accuracy, in percent."""
    return dict(top1=percent(predictions == labels), balanced=balanced(predictions, labels))


def linear_probe(encoder, train_clips, subset: Tensor, test_clips, device) -> Tensor:
    """Logistic regression on frozen features -> (n,) predictions for the test clips."""
    def mean_token(pixel_values):
        return encoder(pixel_values).last_hidden_state.mean(dim=1)

    encoder.eval()
    x = mean_over_views(mean_token, train_clips, subset, device)
    x_test = mean_over_views(mean_token, test_clips, torch.arange(len(test_clips.labels)), device)
    mean, std = x.mean(dim=0), x.std(dim=0) + 1e-6
    x, x_test, y = (x - mean) / std, (x_test - mean) / std, train_clips.labels[subset]
    weight = torch.zeros(len(train_clips.classes), x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight[:, :-1], weight[:, -1]), y) + 1e-2 * weight[:, :-1].square().sum() / 2
        loss.backward()
        return loss

    optimizer.step(closure)
    return F.linear(x_test, weight[:, :-1], weight[:, -1]).argmax(dim=1)


def motion_checks(model, clips: "MotionClips", device) -> dict:
    """What the classifier says of clips whose motion was taken away or turned round, in percent."""
    middle = clips.clips.shape[1] // 2

    def predict(change):
        return probabilities(model, clips, device, change).argmax(dim=1)

    return dict(middle_frame_top1=percent(predict(lambda x: x[:, [middle]].expand_as(x)) == clips.labels),
                first_frame_top1=percent(predict(lambda x: x[:, [0]].expand_as(x)) == clips.labels),
                # MOTIONS has opposites side by side
                reversed_as_opposite=percent(predict(lambda x: x.flip(1)) == clips.labels ^ 1))


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def pyplot():
    """matplotlib.pyplot, drawing to files: there may be no screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def held_out_pictures(model: VideoMAEForPreTraining, clips, recipe: dict, device, count: int):
    """The Reconstruction of `count` held-out clips, always the same ones and the same mask."""
    indices = torch.linspace(0, len(clips.labels) - 1, count).long()
    generator = torch.Generator().manual_seed(0)
    mask = random_mask(recipe["mask"], count, model.config.grid, recipe["mask_ratio"], generator)
    model.eval()
    return model.reconstruct(normalize(clips.load(indices, view=clips.num_views // 2)).to(device), mask)


def picture_note(recipe: dict, borrows_truth: bool) -> str:
    """What must stand under a reconstruction."""
    borrowing = " Each reconstructed cube borrows its mean and contrast from the original (norm_pix_loss)."
    return f"Held-out clips, {recipe['mask']} mask, ratio {recipe['mask_ratio']}." + borrows_truth * borrowing


def draw_reconstruction(model: VideoMAEForPreTraining, clips, recipe: dict, device, path: Path, count: int = 3):
    """Original, masked and reconstructed frames of held-out clips, a row each."""
    plt = pyplot()
    count = min(count, len(clips.labels))
    pictures = held_out_pictures(model, clips, recipe, device, count)
    frames = range(0, model.config.num_frames, max(1, model.config.num_frames // 8))
    rows = [(name, getattr(pictures, name)[i]) for i in range(count) for name in pictures._fields[:3]]
    figure, axes = plt.subplots(len(rows), len(frames), figsize=(len(frames) * 1.1, len(rows) * 1.13 + 0.6))
    for row, (name, video) in enumerate(rows):
        for axis, frame in zip(axes[row], frames, strict=True):
            axis.imshow(rearrange(video[frame].float().clamp(0, 1).cpu(), "c h w -> h w c"))
            axis.set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(name, fontsize=8)
    for axis, frame in zip(axes[0], frames, strict=True):
        axis.set_title(f"frame {frame}", fontsize=8)
    figure.supxlabel(picture_note(recipe, pictures.borrows_truth), fontsize=8)
    figure.tight_layout()
    write_whole(path, lambda file: figure.savefig(file, dpi=110, format="png"))
    plt.close(figure)


def draw_gif(model: VideoMAEForPreTraining, clips, recipe: dict, device, path: Path, count: int = 4):
    """The same as a moving picture: a row each for original, masked and reconstruction."""
    from PIL import Image, ImageDraw

    count = min(count, len(clips.labels))
    pictures = held_out_pictures(model, clips, recipe, device, count)
    video = torch.stack(pictures[:3]).float().clamp(0, 1).cpu()  # (3, B, T, C, H, W)
    frames = (rearrange(video, "rows b t c h w -> t (rows h) (b w) c") * 255).to(torch.uint8).numpy()
    zoom = max(1, 96 // model.config.image_hw[0])
    images = []
    for frame in frames.repeat(zoom, axis=1).repeat(zoom, axis=2):
        image = Image.new("RGB", (frame.shape[1], frame.shape[0] + 14), "white")
        image.paste(Image.fromarray(frame))
        text = "original, masked, reconstructed" + pictures.borrows_truth * " (borrows mean and contrast)"
        ImageDraw.Draw(image).text((2, frame.shape[0] + 1), text, fill="black")
        images.append(image)
    write_whole(path, lambda file: images[0].save(file, format="GIF", save_all=True, append_images=images[1:],
                                                  duration=120, loop=0))


def draw_confusion(predictions: Tensor, labels: Tensor, classes: list[str], path: Path):
    """Rows: the true class; columns: the predicted one; numbers of clips."""
    plt = pyplot()
    counts = torch.zeros(len(classes), len(classes), dtype=torch.int64)
    counts.index_put_((labels, predictions), torch.ones_like(labels), accumulate=True)
    side = 3 + 0.35 * len(classes)
    figure, axis = plt.subplots(figsize=(side, side))
    axis.imshow(counts / counts.sum(dim=1, keepdim=True).clamp_min(1), cmap="Blues", vmin=0, vmax=1)
    if len(classes) <= 20:
        for i, j in itertools.product(range(len(classes)), repeat=2):
            axis.text(j, i, int(counts[i, j]), ha="center", va="center", fontsize=7,
                      color="white" if counts[i, j] > counts[i].sum() / 2 else "black")
    axis.set(xticks=range(len(classes)), yticks=range(len(classes)), xlabel="predicted", ylabel="true")
    axis.set_xticklabels(classes, rotation=90, fontsize=7)
    axis.set_yticklabels(classes, fontsize=7)
    figure.tight_layout()
    write_whole(path, lambda file: figure.savefig(file, dpi=110, format="png"))
    plt.close(figure)


ROWS = {  # key in summary.json -> row of the table
    "scratch_top1": "from scratch, same fine-tuning budget",
    "scratch_full_time_top1": "from scratch, same total time",
    "linear_probe_top1": "pretrained, linear probe",
    "finetune_top1": "pretrained, fine-tuned",
}


def seconds_per_column(summaries: list[dict]) -> dict[str, str]:
    """What the training behind each row took for one column of the table; the columns share one pretraining equally."""
    def mean(stage):
        seconds = [s for run in summaries for name, s in run["seconds"].items() if name.split(",")[0] == stage]
        return np.mean(seconds) if seconds else 0.0

    share = mean("pretrain") / len(summaries[0]["results"])
    return {"scratch_top1": f"{mean('scratch'):.0f}", "scratch_full_time_top1": f"{mean('scratch_full_time'):.0f}",
            "linear_probe_top1": f"{share:.0f}", "finetune_top1": f"{share:.0f} + {mean('finetune'):.0f}"}


def draw_curves(metrics: list[dict], summaries: list[dict], path: Path):
    """Left: the losses of the first run. Right: top-1 by label budget, mean over the runs, one dot per run."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for stage in dict.fromkeys(m["stage"] for m in metrics):
        points = [(m["step"], m["loss"]) for m in metrics if m["stage"] == stage]
        width = max(1, len(points) // 100)
        means = [np.mean(points[i : i + width], axis=0) for i in range(0, len(points) - width + 1, width)]
        left.plot(*zip(*means, strict=True), label=stage, linewidth=1)
    left.set(xlabel="step", ylabel="loss: pixels (pretrain), classes (the others)", title="Training")
    left.legend(fontsize=7)
    budgets = [result["labels_per_class"] for result in summaries[0]["results"]]
    rows = {key: name for key, name in ROWS.items() if key in summaries[0]["results"][0]}
    for i, (key, name) in enumerate(rows.items()):
        for b in range(len(budgets)):
            values = [summary["results"][b][key] for summary in summaries]
            x = b + 0.2 * (i - (len(rows) - 1) / 2)
            right.bar(x, np.mean(values), width=0.19, color=f"C{i}", label=name if b == 0 else None)
            right.plot([x] * len(values), values, "k.", markersize=4)
    majority = np.mean([summary["majority_top1"] for summary in summaries])
    right.axhline(majority, color="grey", linestyle="--", linewidth=1, label="largest class")
    right.set(xlabel="labels per class", ylabel="top-1 on held-out clips, %", ylim=(0, 100), title="Testing",
              xticks=range(len(budgets)))
    right.set_xticklabels([str(b) if b else "all" for b in budgets])
    right.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False)
    figure.tight_layout()
    write_whole(path, lambda file: figure.savefig(file, dpi=110, format="png"))
    plt.close(figure)


def table(summaries: list[dict]) -> str:
    """Markdown: a row per way of training; top-1, for videos balanced too; mean +- std over the runs."""
    def cell(values):
        return f"{np.mean(values):.1f}" + (f" +- {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")

    results = [summary["results"] for summary in summaries]
    kinds = ["top1"] if summaries[0]["data"] == "embedded" else ["top1", "balanced"]
    columns = [(b, kind) for b in range(len(results[0])) for kind in kinds]
    heads = [f"{results[0][b]['labels_per_class'] or 'all'} labels per class" + ", balanced" * (kind == "balanced")
             for b, kind in columns]
    lines = ["| top-1, % | " + " | ".join(heads) + " | seconds a column |", "| --- " * (len(heads) + 2) + "|"]
    seconds = seconds_per_column(summaries)
    for key, name in ROWS.items():
        if key in results[0][0]:
            cells = [cell([run[b][key.replace("top1", kind)] for run in results]) for b, kind in columns]
            lines.append(f"| {name} | " + " | ".join(cells) + f" | {seconds[key]} |")
    largest = {"top1": [summary["majority_top1"] for summary in summaries],
               "balanced": [100 / len(summary["classes"]) for summary in summaries]}
    cells = [cell(largest[kind]) for _, kind in columns]
    return "\n".join(lines + [f"| always the largest class | {' | '.join(cells)} | |"])


# ----------------------------------------------------------------------------------------------------------------------
# Stages


def train_and_compare(run: Run, args: argparse.Namespace, stages: tuple[str, ...], top: Path) -> dict:
    """Pretrain once; for each label budget fine-tune and, to compare, train from scratch twice and probe."""
    recipe, device, folder = run.recipe, run.device, run.folder
    pretrained = folder / "pretrained" if "pretrain" in stages else args.init
    start = time.perf_counter()
    config = starting_config(recipe, args.init)
    train_clips, test_clips = load_data(run, args, config)
    subsets = [choose_labelled(train_clips.labels, budget, run.seed) for budget in recipe["labels_per_class"]]
    describe(run, args, config, train_clips, test_clips, stages)
    data_seconds = round(time.perf_counter() - start, 1)
    open_folder(run, args, top)

    if "pretrain" in stages:
        def pretraining():
            def picture(model):
                draw_gif(model, test_clips, recipe, device, folder / "reconstruction.gif")

            model, result = pretrain(run, train_clips, config, "pretrain", picture)
            if run.rank == 0:
                draw_reconstruction(model, test_clips, recipe, device, folder / "reconstruction.png")
                save_model(model, pretrained)
            return result

        run.once("pretrain", pretraining)

    def classifier(name, budget, subset):
        from_encoder = name == "finetune"
        steps = recipe["scratch_full_time_steps" if name == "scratch_full_time" else "finetune_steps"]
        lr = recipe["finetune_lr" if from_encoder else "scratch_lr"]
        model = new_classifier(run, pretrained if from_encoder else None, config, train_clips)
        result = finetune(run, train_clips, subset, model, stage_name(name, budget), steps, lr,
                          recipe["layer_decay"] if from_encoder else 1.0)
        if run.rank == 0:
            predictions = probabilities(model, test_clips, device).argmax(dim=1)
            result |= scores(predictions, test_clips.labels)
            if from_encoder:
                save_model(model, folder / f"finetuned-{budget or 'all'}")
                path = folder / f"confusion-{budget or 'all'}.png"
                draw_confusion(predictions, test_clips.labels, train_clips.classes, path)
                if isinstance(test_clips, MotionClips):
                    result |= motion_checks(model, test_clips, device)
        return result

    def probe(subset):
        encoder = videomae.VideoMAEModel.from_pretrained(pretrained).to(device)
        return scores(linear_probe(encoder, train_clips, subset, test_clips, device), test_clips.labels)

    def stage_name(name, budget):
        return f"{name}, {budget or 'all'} labels per class"

    results = []
    for budget, subset in zip(recipe["labels_per_class"], subsets, strict=True) if "finetune" in stages else ():
        names = ["finetune", *["scratch", "scratch_full_time"] * recipe["scratch"]]
        parts = {name: run.once(stage_name(name, budget), partial(classifier, name, budget, subset)) for name in names}
        parts["linear_probe"] = run.once(stage_name("linear_probe", budget), partial(probe, subset))
        result = dict(labels_per_class=budget)
        for name, part in parts.items() if run.rank == 0 else ():
            result |= {f"{name}_top1": part["top1"], f"{name}_balanced": part["balanced"]}
            result |= {key: part[key] for key in ("middle_frame_top1", "first_frame_top1", "reversed_as_opposite")
                       if key in part}
        results.append(result)

    seconds = {"data": data_seconds} | {stage: part["seconds"] for stage, part in run.results.items()}
    first = run.results.get("pretrain", {})
    summary = dict(
        data=args.data, evaluated_on=args.evaluate_on, init=args.init, seed=run.seed, device=device_name(device),
        processes=run.world, torch=torch.__version__, pretrain_loss_first=first.get("loss_first"),
        pretrain_loss_last=first.get("loss_last"), **(results[-1] if results else {}),  # of the last label budget
        majority_top1=percent(test_clips.labels == train_clips.labels.mode().values), results=results,
        data_wait={stage: part["data_wait"] for stage, part in run.results.items() if "data_wait" in part},
        classes=list(train_clips.classes), seconds=seconds, total_seconds=round(time.perf_counter() - start, 1),
        recipe=recipe, config=config.to_dict(),
    )
    if run.rank == 0:
        write_json(folder / "summary.json", summary)
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    return summary


def open_folder(run: Run, args: argparse.Namespace, top: Path):
    """Make the output folder, or read what an interrupted run left in it; `top` holds the settings of all seeds.

    Nothing was overwritten before: a mistake in the other options leaves an older run of that name alone.
    """
    if run.rank == 0:
        if args.overwrite and not run.resumed and run.seed == args.seeds[0]:
            shutil.rmtree(top, ignore_errors=True)
        run.folder.mkdir(parents=True, exist_ok=run.resumed)
        for half_written in run.folder.glob("*.tmp"):
            shutil.rmtree(half_written) if half_written.is_dir() else half_written.unlink()
        write_json(top / "settings.json", dict(args=vars(args), recipe=run.recipe))
    run.wait()
    if run.resumed and (run.folder / "results.json").exists():
        run.results = json.loads((run.folder / "results.json").read_text())


def as_trained(recipe: dict, args: argparse.Namespace, config: VideoMAEConfig) -> dict:
    """The recipe with the sampling the model was trained with, where the command line does not say otherwise."""
    return recipe | {key: x for key, x in config.extra.items() if key in recipe and key not in args.given}


def evaluate(run: Run, args: argparse.Namespace):
    """A fine-tuned model on the held-out clips: top-1, balanced, confusion matrix."""
    model = VideoMAEForVideoClassification.from_pretrained(args.init).to(run.device)
    run.recipe = as_trained(run.recipe, args, model.config)
    train_clips, clips = load_data(run, args, model.config)
    names = model.config.id2label or {}
    if [names.get(i) for i in range(model.config.num_labels)] != list(clips.classes):
        raise ValueError(f"--init: {args.init} tells {list(names.values())[:5]}... apart, the data has "
                         f"{list(clips.classes)[:5]}...; expected the same classes")
    predictions = probabilities(model, clips, run.device).argmax(dim=1)
    open_folder(run, args, run.folder)
    result = scores(predictions, clips.labels)
    majority = percent(clips.labels == train_clips.labels.mode().values)
    draw_confusion(predictions, clips.labels, clips.classes, run.folder / "confusion.png")
    summary = dict(data=args.data, init=args.init, majority_top1=majority, clips=len(clips.labels),
                   views=clips.num_views, **result)
    write_json(run.folder / "summary.json", summary)
    say(f"{len(clips.labels)} held-out clips, {clips.num_views} views each: top-1 {result['top1']:.1f} %, balanced "
        f"{result['balanced']:.1f} %, always the largest class {majority:.1f} %. {run.folder}/confusion.png")


def predict(run: Run, args: argparse.Namespace):
    """The five most likely classes of each video."""
    model = VideoMAEForVideoClassification.from_pretrained(args.init).to(run.device)
    names = model.config.id2label or {i: f"LABEL_{i}" for i in range(model.config.num_labels)}
    recipe = as_trained(RECIPES["laptop"] | {key: run.recipe[key] for key in args.given}, args, model.config)
    for video in map(Path, args.videos):
        decoded = {video: decode(video, square_side(model.config), Path(args.cache))}  # a broken file is an error
        clips = VideoClips([""], [(video, 0)], decoded, model.config, recipe)
        likely = probabilities(model, clips, run.device)[0].topk(min(5, len(names)))
        say(video)
        for share, label in zip(likely.values.tolist(), likely.indices.tolist(), strict=True):
            say(f"  {100 * share:5.1f} %  {names[label]}")


def reconstruct(run: Run, args: argparse.Namespace):
    """Pictures of a pretrained model on the held-out clips."""
    model = VideoMAEForPreTraining.from_pretrained(args.init).to(run.device)
    run.recipe = as_trained(run.recipe, args, model.config)
    _, clips = load_data(run, args, model.config)
    open_folder(run, args, run.folder)
    draw_reconstruction(model, clips, run.recipe, run.device, run.folder / "reconstruction.png")
    draw_gif(model, clips, run.recipe, run.device, run.folder / "reconstruction.gif")
    say(f"{run.folder}/reconstruction.png and .gif")


def starting_config(recipe: dict, source: str | None) -> VideoMAEConfig:
    """The recipe's model, or that of the weights to start from."""
    if source is not None:
        return videomae.VideoMAEModel.from_pretrained(source).config
    return VideoMAEConfig.preset(recipe["model"], use_mean_pooling=False,  # a pretraining encoder ends in a norm
                                 position_embedding=recipe["position_embedding"])


def load_data(run: Run, args: argparse.Namespace, config: VideoMAEConfig):
    """-> training clips and held-out clips (test, or validation with --evaluate-on val)."""
    recipe = run.recipe
    mask = random_mask(recipe["mask"], 8, config.grid, recipe["mask_ratio"])  # a bad one is an error before the work
    if recipe["dual_masking"]:
        split_mask(mask, running_cells(8, config.grid))
    if args.data == "embedded":
        gigabytes = recipe["unlabelled_clips"] * config.num_frames * math.prod(config.image_hw) * 3 / 1e9
        if gigabytes > 4:
            raise ValueError(f"--data: embedded clips of {config.num_frames} x {config.image_hw} would take "
                             f"{gigabytes:.0f} GB; expected --data FOLDER for a model of this size")
        return (MotionClips(recipe["unlabelled_clips"], config, run.seed),
                MotionClips(recipe["test_clips"], config, HELD_OUT_SEEDS[args.evaluate_on]))
    if args.evaluate_on == "val":
        raise ValueError("--evaluate-on: a folder has no validation split, expected test")
    cache = Path(args.cache)
    folder = download_ucf101_subset(cache) if args.data == "ucf101-subset" else Path(args.data)
    classes, splits = split_folder(folder, args.split)
    if run.rank:  # the first process decodes, the others find what it left
        run.wait()
    files = [file for entries in splits.values() for file, _ in entries]
    decoded = decode_all(files, square_side(config), cache, recipe["max_broken"])
    clips = [VideoClips(classes, splits[split], decoded, config, recipe) for split in ("train", "test")]
    if not run.rank:
        run.wait()
    return clips


def square_side(config: VideoMAEConfig) -> int:
    """The side of the model's frames. Raises ValueError where they are not square."""
    height, width = config.image_hw
    if height != width:
        raise ValueError(f"image_size: got {config.image_hw}, expected a square")
    return height


def pick_device() -> torch.device:
    """CUDA (the process's own GPU), else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """For people: the GPU's name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def describe(run: Run, args: argparse.Namespace, config, train_clips, test_clips, stages):
    """One screen before the work starts."""
    recipe = run.recipe
    with torch.device("meta"):
        parameters = sum(p.numel() for p in VideoMAEForPreTraining(config).parameters())
    say(f"device    {device_name(run.device)}" + f", {run.world} processes" * (run.world > 1)
        + f", {str(number_type(recipe, run.device)).removeprefix('torch.')}")
    say(f"model     {args.init or recipe['model']}: {parameters / 1e6:.2f} M parameters, {config.num_patches} cubes of "
        f"{config.tubelet_size} x {config.patch_size} x {config.patch_size} pixels, {recipe['mask']} mask "
        f"{recipe['mask_ratio']}")
    for name, clips in (("train", train_clips), ("held out", test_clips)):
        counts = torch.bincount(clips.labels, minlength=len(clips.classes)).tolist()
        per_class = ", ".join(f"{c} {n}" for c, n in list(zip(clips.classes, counts, strict=True))[:12])
        say(f"{name:9} {len(clips.labels)} clips: {per_class}" + ", ..." * (len(counts) > 12))
    for stage in stages:
        say(f"{stage:9} {recipe[f'{stage}_steps']} steps of {recipe[f'{stage}_batch']} clips, lr "
            f"{recipe[f'{stage}_lr'] * recipe[f'{stage}_batch'] / 256:.1e}")
    say(f"seed      {run.seed}\noutput    {run.folder}/")


def save_model(model, folder: Path):
    """A directory that `from_pretrained` reads, whole or absent, with the processor for it."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    size = square_side(model.config)
    VideoMAEImageProcessor(size=size, crop_size=size, image_mean=videomae.IMAGENET_MEAN,
                           image_std=videomae.IMAGENET_STD).save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


# ----------------------------------------------------------------------------------------------------------------------
# The command line

STAGES = {"all": ("pretrain", "finetune"), "pretrain": ("pretrain",), "finetune": ("finetune",)}


def parse_arguments(argv=None) -> tuple[argparse.Namespace, dict]:
    """The command line -> its options, and the recipe with the command line's changes."""
    first = argparse.ArgumentParser(add_help=False)
    data = first.add_argument_group("data")
    data.add_argument("--data", default="embedded", metavar="X",
                      help="embedded (the default); a folder, see split_folder; or ucf101-subset, which is downloaded")
    data.add_argument("--recipe", choices=RECIPES, help="embedded for embedded clips, laptop for others, or ucf101")
    data.add_argument("--split", type=int, default=1, metavar="N", help="which of UCF101's official splits (1)")
    data.add_argument("--evaluate-on", choices=["test", "val"], default="test", help="embedded clips only (test)")
    data.add_argument("--cache", default="runs/.cache", metavar="DIR", help="of decoded videos (runs/.cache)")
    known, _ = first.parse_known_args(argv)
    recipe = RECIPES[known.recipe or ("embedded" if known.data == "embedded" else "laptop")]

    parser = argparse.ArgumentParser(
        parents=[first], description=__doc__, usage="train_tiny.py [stage] [--data X] [options] [VIDEO ...]",
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=38, width=120))
    parser.add_argument("stage", nargs="?", default="all", metavar="stage",
                        choices=["all", "pretrain", "finetune", "eval", "predict", "reconstruct"],
                        help="all: pretrain, fine-tune, compare, evaluate (the default); or one of pretrain, finetune, "
                             "eval, predict, reconstruct")
    parser.add_argument("videos", nargs="*", metavar="VIDEO", help="for predict")
    group = parser.add_argument_group("start and output")
    group.add_argument("--init", metavar="X", help="weights to start from: a run of this script, a checkpoint file or "
                       "directory, or a hub id such as MCG-NJU/videomae-base; nothing is pretrained then")
    group.add_argument("--resume", metavar="RUN", help="go on with runs/<name>, which was interrupted")
    group.add_argument("--name", help="output folder inside --out; must not exist (default: the next free number)")
    group.add_argument("--out", default="runs", metavar="DIR", help="where output folders go (runs)")
    group.add_argument("--overwrite", action="store_true", help="remove the run of that --name first")
    group.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N",
                       help="a whole run for each, and one table (0)")
    group = parser.add_argument_group("recipe", "the values in brackets are those of the chosen recipe")
    for key, value in recipe.items():
        kind = dict(type=type(value), metavar="X")
        if isinstance(value, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(value, list):
            kind = dict(type=type(value[0]), metavar="X", nargs="+")
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        group.add_argument("--" + key.replace("_", "-"), default=argparse.SUPPRESS, help=f"({shown})", **kind)
    args = parser.parse_intermixed_args(argv)  # files may come after the options
    if len(set(args.seeds)) < len(args.seeds) or not all(0 <= seed < HELD_OUT_SEEDS["test"] for seed in args.seeds):
        raise ValueError(f"--seeds: got {args.seeds}, expected different numbers from 0 to a million")
    given = {key: vars(args).pop(key) for key in recipe if key in args}  # on the command line
    args.given, recipe = list(given), recipe | given
    check_recipe(recipe)
    if args.stage not in ("all", "pretrain") and not args.init and not args.resume:
        raise ValueError(f"--init: {args.stage} needs a model, for instance --init runs/embedded-1")
    if args.init and {"model", "position_embedding"} & set(args.given):
        raise ValueError("--model, --position-embedding: with --init they are those of its weights")
    if args.resume and len(sys.argv if argv is None else [None, *argv]) > 3:
        raise ValueError("--resume: takes no other option, the run goes on with its own")
    if args.stage in ("eval", "predict", "reconstruct") and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(f"{args.stage}: runs in one process, without torchrun")
    if (args.stage == "predict") != bool(args.videos):
        raise ValueError(f"VIDEO: got {len(args.videos)} for {args.stage}; predict needs one or more, the others none")
    return args, recipe


def check_recipe(recipe: dict):
    """Raise ValueError naming the option that cannot be."""
    shares = ("drop_path", "head_dropout", "label_smoothing", "warmup")
    zero = (*shares, "labels_per_class", "mixup", "cutmix", "weight_decay", "max_broken")
    for key in shares:
        if not 0 <= recipe[key] < 1:
            raise ValueError(f"--{key.replace('_', '-')}: got {recipe[key]}, expected 0 to below 1")
    for key, value in recipe.items():
        zero_is_fine = key in zero or isinstance(value, bool)
        values = value if isinstance(value, list) else [value]
        if not isinstance(value, str) and not all(v >= 0 if zero_is_fine else v > 0 for v in values):
            expected = "0 or more" if zero_is_fine else "more than 0"
            raise ValueError(f"--{key.replace('_', '-')}: got {value}, expected {expected}")
    for key, allowed in (("sampling", ("dense", "segments")), ("precision", ("auto", "fp32", "bf16", "fp16"))):
        if recipe[key] not in allowed:
            raise ValueError(f"--{key}: got {recipe[key]!r}, expected one of {', '.join(allowed)}")
    parts = int(os.environ.get("WORLD_SIZE", "1")) * recipe["accumulate"]
    for key, repeats in (("pretrain_batch", 1), ("finetune_batch", recipe["repeated_samples"])):
        if recipe[key] % (parts * repeats):
            raise ValueError(f"--{key.replace('_', '-')}: got {recipe[key]}, expected a multiple of {parts * repeats} "
                             "(processes x accumulate x repeated samples)")


def output_folder(args: argparse.Namespace) -> Path:
    """out/name, or out/<data>-1, -2, ... where no name is given. Raises ValueError where it exists."""
    out = Path(args.out)
    if args.name is None:
        prefix = args.data if args.data in ("embedded", "ucf101-subset") else Path(args.data).resolve().name
        return next(out / f"{prefix}-{i}" for i in itertools.count(1) if not (out / f"{prefix}-{i}").exists())
    folder = out / args.name
    if folder.exists() and not (args.overwrite and (folder / "settings.json").is_file()):
        raise ValueError(f"--name: {folder} exists already; choose another name, or --overwrite a run of this script")
    if args.init and folder.resolve() in Path(args.init).resolve().parents:
        raise ValueError(f"--overwrite: {args.init}, to start from, is in {folder}")
    return folder


def find_model(init: str, stage: str) -> str:
    """A run of this script -> the directory in it that a stage starts from; anything else stays as it is."""
    pattern = "finetuned-*" if stage in ("eval", "predict") else "pretrained"
    found = sorted(Path(init).glob(pattern), key=lambda path: path.stat().st_mtime)
    return str(found[-1]) if found else init


def stop_soon(number, _):
    """Let the step that runs be finished and saved; a second signal ends the program at once."""
    STOP.set()
    signal.signal(number, signal.SIG_DFL)


def main(argv=None):
    """The command line; see the top of the file."""
    args, recipe = parse_arguments(argv)
    videomae.optional_import("safetensors.torch", "safetensors")  # models are saved with it
    resumed = args.resume
    if resumed:
        try:
            settings = json.loads((Path(resumed) / "settings.json").read_text())
        except OSError as error:
            raise ValueError(f"--resume: {resumed} has no settings.json, expected a run of this script") from error
        args, recipe = argparse.Namespace(**settings["args"]), COMMON | settings["recipe"]
        check_recipe(recipe)
    if args.init:
        args.init = find_model(args.init, args.stage)
        if args.stage == "all":
            args.stage = "finetune"
        elif args.stage == "pretrain":
            raise ValueError("--init: pretraining starts from nothing here; expected another stage")
    else:  # between the stages of a run it goes without saying that decoders are dropped and heads are new
        logging.getLogger("videomae").setLevel(logging.ERROR)
    world, rank, device = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0")), pick_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        # The others wait while the first one decodes and evaluates, for hours if need be.
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    if args.stage == "predict":
        return predict(Run(Path(), args.seeds[0], recipe, device), args)

    folder = Path(resumed) if resumed else output_folder(args)
    runs = [Run(folder / f"seed-{seed}" if len(args.seeds) > 1 else folder, seed, recipe, device, bool(resumed), rank,
                world) for seed in args.seeds]
    runs[0].wait()  # until every process has looked for a free name
    if args.stage in ("eval", "reconstruct"):
        return {"eval": evaluate, "reconstruct": reconstruct}[args.stage](runs[0], args)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_soon)
    try:
        summaries = [train_and_compare(run, args, STAGES[args.stage], folder) for run in runs]
    except KeyboardInterrupt:
        say(f"\nInterrupted, and saved. To go on: python train_tiny.py --resume {folder}")
        raise SystemExit(130) from None
    if rank == 0 and summaries[0]["results"]:
        metrics = [json.loads(line) for line in open(runs[0].folder / "metrics.jsonl")]
        draw_curves(metrics, summaries, folder / "curves.png")
        text = table(summaries)
        write_whole(folder / "table.md", lambda file: file.write((text + "\n").encode()))
        say(f"\n{text}\n")
    say(f"{sum(summary['total_seconds'] for summary in summaries):.0f} seconds. Everything is in {folder}/")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        sys.exit(f"train_tiny.py: {error}")
