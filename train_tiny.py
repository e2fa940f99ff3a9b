"""Train VideoMAE on a laptop: pretrain without labels, fine-tune on a few, compare with training from scratch.

    python train_tiny.py                      embedded clips, no download; a few minutes on two CPU cores
    python train_tiny.py --data FOLDER        your videos, FOLDER/Class/*.avi|mp4|...; UCF101's split lists are used

Everything goes to runs/<name>/: a table, summary.json, metrics.jsonl, curves.png, reconstruction.png and the models.
Any setting of a recipe below is also an option: --pretrain-steps 300.
"""
import argparse
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from videomae import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    center_crop,
    normalize,
    random_mask,
    resize_short_side,
)

matplotlib.use("Agg")  # pictures go to files; there may be no screen
import matplotlib.pyplot as plt  # noqa: E402

# ----------------------------------------------------------------------------------------------------------------------
# Recipes. "embedded" was chosen on validation clips, in a prototype, and is reported on test clips; "videos" is a
# start that runs on a laptop, chosen for its running time.

RECIPES = {
    "embedded": dict(
        model="tiny",
        unlabelled_clips=10_000,
        labels_per_class=[2, 10],  # label budgets; 0 = every label
        test_clips=1024,
        mask="tube",
        mask_ratio=0.75,  # 4 of 16 tubes stay visible; the authors' ratio for UCF101, their smallest data set
        pretrain_steps=1200,
        pretrain_batch=48,
        pretrain_lr=1e-3,  # 2e-3 reaches a lower loss, but its encoder fine-tunes worse
        finetune_steps=400,
        finetune_batch=32,  # with 16 the loss stays at chance for most of the steps, from scratch and pretrained
        finetune_lr=1e-3,
        scratch_lr=5e-4,  # chosen like the others: from scratch 1e-3 stays at chance for longer
        scratch_full_time_steps=1100,  # about a fine-tuning and half of the pretraining, or longer: see the table
        drop_path=0.0,
        position_embedding="separable",
        recolour=True,
    ),
    "videos": dict(
        model="laptop",
        labels_per_class=[0],
        frame_stride=4,  # 16 frames 4 apart, the authors' for UCF101
        mask="tube",
        mask_ratio=0.75,  # likewise
        pretrain_steps=200,
        pretrain_batch=8,
        pretrain_lr=1e-3,
        finetune_steps=40,
        finetune_batch=8,
        finetune_lr=5e-4,
        scratch_lr=5e-4,
        scratch_full_time_steps=120,
        drop_path=0.1,
        position_embedding="separable",
        recolour=False,
    ),
}
WEIGHT_DECAY = 0.05  # the authors', for both stages
PRETRAIN_BETAS, FINETUNE_BETAS = (0.9, 0.95), (0.9, 0.999)  # likewise
GRADIENT_CLIP = 1.0
WARMUP = 0.05  # share of the steps


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

    def load(self, indices: Tensor, generator: torch.Generator | None = None, view: int = 0) -> Tensor:
        """(B,) indices -> (B, T, 3, H, W) uint8."""
        return self.clips[indices]


def uniform(low: float, high: float, shape, generator: torch.Generator) -> Tensor:
    """Random numbers between low and high."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def make_textures(count: int, size: int, generator: torch.Generator) -> Tensor:
    """(count, 3, size, size) float32, mean 0, std 1: noise of amplitude 1 / frequency^alpha, which tiles the plane."""
    alpha = uniform(2.5, 3.0, (count, 1, 1, 1), generator)
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
# Videos from a folder: FOLDER/Class/*.avi, decoded once

VIDEO_SUFFIXES = (".avi", ".mp4", ".mkv", ".webm", ".mov")


def split_folder(folder: Path) -> tuple[list[str], dict[str, list[tuple[Path, int]]]]:
    """FOLDER/Class/* -> class names and {"train": [(file, label)], "test": [...]}.

    UCF101's lists (ucfTrainTestlist/, split 1) are followed where present. Without them every fifth scene of a class
    is for testing: a scene is a UCF101 group (`_g07_` in the name) where names carry one, else a single file, so that
    no scene is on both sides. Raises ValueError where a class cannot be split.
    """
    if not folder.is_dir():
        raise ValueError(f"--data: {folder} is not a folder")
    files = sorted(f for f in folder.glob("*/*") if f.suffix.lower() in VIDEO_SUFFIXES)
    if not files:
        raise ValueError(f"--data: no video ({', '.join(VIDEO_SUFFIXES)}) in {folder}/Class/")
    classes = sorted({file.parent.name for file in files})
    if len(classes) < 2:
        raise ValueError(f"--data: {folder} has one class, {classes[0]}; a classifier needs two or more")
    lists = folder / "ucfTrainTestlist"
    splits = {"train": [], "test": []}
    if lists.is_dir():
        by_name = {f"{file.parent.name}/{file.name}": file for file in files}
        for split in splits:
            lines = (lists / f"{split}list01.txt").read_text().splitlines()  # Class/file.avi, in train lists a number
            names = [line.split()[0] for line in lines if line.strip()]
            splits[split] = [(by_name[name], classes.index(name.split("/")[0])) for name in names if name in by_name]
    else:
        for label, name in enumerate(classes):
            scenes = {}
            for file in (file for file in files if file.parent.name == name):
                group = re.search(r"_g(\d+)_", file.name)
                scenes.setdefault(group[1] if group else file.name, []).append(file)
            for i, scene in enumerate(scenes.values()):
                splits["test" if i % 5 == 0 else "train"] += [(file, label) for file in scene]
    for split, entries in splits.items():
        missing = [name for i, name in enumerate(classes) if i not in {label for _, label in entries}]
        if missing:
            raise ValueError(f"--data: no {split} video of class {', '.join(missing)}; a class needs two scenes")
    return classes, splits


def decode(file: Path, short_side: int, cache: Path) -> Path:
    """A video -> the .npy file of its (frames, H, W, 3) uint8, short side as given; decoded once, then in the cache.

    The cache is keyed by the file's content and the size. Raises ValueError for a file that has no readable frames.
    """
    key = hashlib.sha256(file.read_bytes()).hexdigest()[:24]
    cached = cache / f"{key}-{short_side}.npy"
    if not cached.exists():
        import av

        frames = []
        try:
            with av.open(str(file)) as container:
                for frame in container.decode(video=0):
                    scale = short_side / min(frame.width, frame.height)
                    width, height = (max(short_side, round(x * scale)) for x in (frame.width, frame.height))
                    frames.append(frame.to_ndarray(format="rgb24", width=width, height=height))
        except (av.FFmpegError, IndexError) as error:
            raise ValueError(f"{file}: cannot be decoded ({error})") from error
        if not frames:
            raise ValueError(f"{file}: has no frames")
        write_whole(cached, lambda temporary: np.save(temporary, np.stack(frames)))
    return cached


def write_whole(path: Path, write):
    """Call write(a binary file) for a temporary file beside `path`, then rename: a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class VideoClips:
    """Clips of `num_frames` frames, `stride` apart, from decoded videos. Broken files are named and left out."""

    num_views = 5  # clips per video at test time, evenly spaced, as the authors test on UCF101

    def __init__(self, classes, entries: list[tuple[Path, int]], config: VideoMAEConfig, stride: int, cache: Path):
        self.classes, self.frames, self.size, self.stride = classes, config.num_frames, config.image_size, stride
        self.videos, labels = [], []
        for file, label in tqdm(entries, desc="decoding", leave=False, disable=None):
            try:
                self.videos.append(decode(file, config.image_size, cache))
                labels.append(label)
            except ValueError as error:
                print(f"left out: {error}", file=sys.stderr)
        self.labels = torch.tensor(labels)
        missing = [name for i, name in enumerate(classes) if i not in set(labels)]
        if missing:
            raise ValueError(f"--data: no readable video of class {', '.join(missing)}")

    def load(self, indices: Tensor, generator: torch.Generator | None = None, view: int = 0) -> Tensor:
        """(B,) indices -> (B, T, 3, H, W) uint8: with a generator a random time, crop and flip, else the view-th of
        `num_views` times and the centre."""
        clips = []
        for i in indices.tolist():
            video = np.load(self.videos[i], mmap_mode="r")  # (frames, h, w, 3); only what is used is read
            room = max(len(video) - 1 - (self.frames - 1) * self.stride, 0)
            share = torch.rand((), generator=generator).item() if generator else (view + 0.5) / self.num_views
            times = round(share * room) + self.stride * np.arange(self.frames)
            clip = torch.from_numpy(video[np.minimum(times, len(video) - 1)])  # a short video holds its last frame
            clip = rearrange(clip, "t h w c -> t c h w")
            if generator:
                clip = self.crop(clip, generator)
            clips.append(center_crop(resize_short_side(clip, self.size), self.size, self.size))
        return torch.stack(clips)

    def crop(self, clip: Tensor, generator: torch.Generator) -> Tensor:
        """A random square of 2/3 to all of the short side, flipped left to right half of the time."""
        side = round(self.size * uniform(2 / 3, 1, (), generator).item())
        top, left = (int(torch.randint(x - side + 1, (), generator=generator)) for x in clip.shape[-2:])
        clip = clip[..., top : top + side, left : left + side]
        return clip.flip(-1) if torch.rand((), generator=generator) < 0.5 else clip


# ----------------------------------------------------------------------------------------------------------------------
# Training


def recolour(pixel_values: Tensor, generator: torch.Generator) -> Tensor:
    """(B, T, C, H, W) -> the same: channels shuffled, negated, stretched and shifted, alike in all frames of a clip.

    It changes what is seen and not how it moves. Without it a few labelled clips are told apart by their colours.
    """
    shape = (len(pixel_values), 1, 3, 1, 1)
    order = torch.rand(shape, generator=generator).argsort(dim=2).expand_as(pixel_values)
    sign = torch.rand(shape, generator=generator).round() * 2 - 1
    contrast, shift = uniform(0.5, 1.5, shape, generator), 0.5 * torch.randn(shape, generator=generator)
    return pixel_values.gather(2, order) * sign * contrast + shift


def train(model, next_loss, stage: str, steps: int, lr: float, betas, log) -> list[float]:
    """AdamW on next_loss() for some steps, cosine schedule with warm-up -> the loss of every step.

    Raises RuntimeError when the loss is not finite.
    """
    decay = [p for p in model.parameters() if p.ndim >= 2]  # as published: no decay on norms and biases
    no_decay = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [dict(params=decay, weight_decay=WEIGHT_DECAY), dict(params=no_decay, weight_decay=0.0)], betas=betas)
    model.train()
    start, losses = time.perf_counter(), []
    bar = tqdm(range(steps), desc=stage, mininterval=1, leave=False, disable=None)  # None: no bar in a log file
    for step in bar:
        warmup_steps = max(1, round(WARMUP * steps))
        rate = lr * min((step + 1) / warmup_steps, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = next_loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        optimizer.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise RuntimeError(f"{stage}: the loss is {losses[-1]} at step {step}, lr {rate:.2g}; try a lower lr")
        if step % 10 == 0 or step == steps - 1:
            log(stage=stage, step=step, loss=losses[-1], lr=rate)
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    print(f"{stage}: loss {losses[0]:.3f} -> {np.mean(losses[-10:]):.3f} in {steps} steps, "
          f"{time.perf_counter() - start:.0f} s", flush=True)
    return losses


def pretrain(clips, config: VideoMAEConfig, recipe: dict, seed: int, device, log, stage: str):
    """Stage 1, no labels: reconstruct what the tubes hide -> the VideoMAEForPreTraining and its losses."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = VideoMAEForPreTraining(config).to(device)

    def next_loss():
        indices = torch.randint(len(clips.labels), (recipe["pretrain_batch"],), generator=generator)
        pixel_values = normalize(clips.load(indices, generator).to(device))
        mask = random_mask(recipe["mask"], len(indices), config.grid, recipe["mask_ratio"], generator)
        return model(pixel_values, mask).loss

    losses = train(model, next_loss, stage, recipe["pretrain_steps"], recipe["pretrain_lr"], PRETRAIN_BETAS, log)
    return model, losses


def finetune(clips, subset: Tensor, config: VideoMAEConfig, encoder, recipe: dict, steps: int, lr: float, seed: int,
             device, log, stage: str) -> VideoMAEForVideoClassification:
    """Stage 2: a classifier on the labelled clips `subset`, from `encoder` or, where that is None, from scratch."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = VideoMAEForVideoClassification(config).to(device)
    if encoder is not None:  # all but the last norm: the mean-pooled classifier has its own after the mean
        dropped = model.videomae.load_state_dict(encoder.state_dict(), strict=False)
        assert not dropped.missing_keys and all(key.startswith("norm.") for key in dropped.unexpected_keys)
    queue = torch.empty(0, dtype=torch.int64)

    def next_loss():
        nonlocal queue
        while len(queue) < recipe["finetune_batch"]:  # every clip once before any comes again
            queue = torch.cat([queue, subset[torch.randperm(len(subset), generator=generator)]])
        indices, queue = queue.split([recipe["finetune_batch"], len(queue) - recipe["finetune_batch"]])
        pixel_values = normalize(clips.load(indices, generator))
        if recipe["recolour"]:
            pixel_values = recolour(pixel_values, generator)
        return model(pixel_values.to(device), labels=clips.labels[indices].to(device)).loss

    train(model, next_loss, stage, steps, lr, FINETUNE_BETAS, log)
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


@torch.no_grad()
def predict(model, clips, device, change=lambda frames: frames) -> Tensor:
    """(n,) class of highest probability, the mean over a clip's views; `change` alters the (B, T, 3, H, W) frames."""
    model.eval()
    predictions = []
    for indices in torch.arange(len(clips.labels)).split(64):
        probabilities = 0
        for view in range(clips.num_views):
            pixel_values = normalize(change(clips.load(indices, view=view)).to(device))
            probabilities = probabilities + model(pixel_values).logits.softmax(dim=1).cpu()
        predictions.append(probabilities.argmax(dim=1))
    return torch.cat(predictions)


def percent(correct: Tensor) -> float:
    """Share of True, in percent."""
    return round(100 * correct.float().mean().item(), 2)


def balanced(predictions: Tensor, labels: Tensor) -> float:
    """Mean over the classes of the share of their clips that is right, in percent."""
    return round(sum(percent(predictions[labels == c] == c) for c in labels.unique()) / len(labels.unique()), 2)


@torch.no_grad()
def mean_features(encoder, clips, indices: Tensor, device) -> Tensor:
    """(n, D): the encoder's tokens of whole clips, averaged over tokens and views."""
    encoder.eval()

    def features(chunk, view):
        return encoder(normalize(clips.load(chunk, view=view).to(device))).last_hidden_state.mean(dim=1).cpu()

    return torch.cat([sum(features(chunk, view) for view in range(clips.num_views)) / clips.num_views
                      for chunk in indices.split(64)])


def linear_probe(encoder, train_clips, subset: Tensor, test_clips, device) -> Tensor:
    """Logistic regression on frozen features -> (n,) predictions for the test clips."""
    x = mean_features(encoder, train_clips, subset, device)
    x_test = mean_features(encoder, test_clips, torch.arange(len(test_clips.labels)), device)
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


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def draw_reconstruction(model: VideoMAEForPreTraining, clips, recipe: dict, device, path: Path, count: int = 3):
    """Original, masked and reconstructed frames of `count` held-out clips, one row each."""
    indices = torch.linspace(0, len(clips.labels) - 1, count).long()
    pixel_values = normalize(clips.load(indices)).to(device)
    generator = torch.Generator().manual_seed(0)
    mask = random_mask(recipe["mask"], count, model.config.grid, recipe["mask_ratio"], generator)
    model.eval()
    pictures = model.reconstruct(pixel_values, mask)
    frames = range(0, model.config.num_frames, max(1, model.config.num_frames // 8))
    names = ("original", "masked", "reconstruction")
    rows = [(name, getattr(pictures, name)[i]) for i in range(count) for name in names]
    figure, axes = plt.subplots(len(rows), len(frames), figsize=(len(frames) * 1.1, len(rows) * 1.13 + 0.6))
    for row, (name, video) in enumerate(rows):
        for axis, frame in zip(axes[row], frames, strict=True):
            axis.imshow(rearrange(video[frame].float().clamp(0, 1).cpu(), "c h w -> h w c"))
            axis.set(xticks=[], yticks=[])
        axes[row, 0].set_ylabel(name, fontsize=8)
    for axis, frame in zip(axes[0], frames, strict=True):
        axis.set_title(f"frame {frame}", fontsize=8)
    note = f"Held-out clips, {recipe['mask']} mask, ratio {recipe['mask_ratio']}."
    if pictures.borrows_truth:
        note += " Each reconstructed cube borrows its mean and contrast from the original (norm_pix_loss)."
    figure.supxlabel(note, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
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
        return np.mean([seconds for run in summaries for name, seconds in run["seconds"].items()
                        if name.split(",")[0] == stage])

    share = mean("pretrain") / len(summaries[0]["results"])
    return {"scratch_top1": f"{mean('scratch'):.0f}", "scratch_full_time_top1": f"{mean('scratch_full_time'):.0f}",
            "linear_probe_top1": f"{share:.0f}", "finetune_top1": f"{share:.0f} + {mean('finetune'):.0f}"}


def draw_curves(metrics: list[dict], summaries: list[dict], path: Path):
    """Left: the losses of the first run. Right: top-1 by label budget, mean over the runs, one dot per run."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for stage in dict.fromkeys(m["stage"] for m in metrics):
        points = [(m["step"], m["loss"]) for m in metrics if m["stage"] == stage]
        left.plot(*zip(*points, strict=True), label=stage, linewidth=1)
    left.set(xlabel="step", ylabel="training loss", title="Loss")
    left.legend(fontsize=7)
    budgets = [result["labels_per_class"] for result in summaries[0]["results"]]
    for i, (key, name) in enumerate(ROWS.items()):
        for b in range(len(budgets)):
            values = [summary["results"][b][key] for summary in summaries]
            x = b + 0.2 * (i - 1.5)
            right.bar(x, np.mean(values), width=0.19, color=f"C{i}", label=name if b == 0 else None)
            right.plot([x] * len(values), values, "k.", markersize=4)
    right.axhline(summaries[0]["majority_top1"], color="grey", linestyle="--", linewidth=1, label="largest class")
    right.set(ylabel="top-1 on held-out clips, %", ylim=(0, 100), title="Labels per class", xticks=range(len(budgets)))
    right.set_xticklabels([str(b) if b else "all" for b in budgets])
    right.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=3, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def table(summaries: list[dict]) -> str:
    """Markdown: a row per way of training, a column per label budget; top-1, mean +- std over the runs."""
    def cell(values):
        return f"{np.mean(values):.1f}" + (f" +- {np.std(values, ddof=1):.1f}" if len(values) > 1 else "")

    results = [summary["results"] for summary in summaries]
    budgets = [f"{b['labels_per_class'] or 'all'} labels per class" for b in results[0]]
    lines = ["| top-1, % | " + " | ".join(budgets) + " | seconds a column |", "| --- " * (len(budgets) + 2) + "|"]
    seconds = seconds_per_column(summaries)
    for key, name in ROWS.items():
        cells = [cell([run[b][key] for run in results]) for b in range(len(budgets))]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {seconds[key]} |")
    majority = cell([summary["majority_top1"] for summary in summaries])
    return "\n".join(lines + [f"| always the largest class | {' | '.join([majority] * len(budgets))} | |"])


# ----------------------------------------------------------------------------------------------------------------------
# The main job


def run(args: argparse.Namespace, recipe: dict, seed: int, folder: Path) -> dict:
    """Pretrain once; for each label budget fine-tune, train from scratch twice and probe -> summary.json's content."""
    device = pick_device()
    start = time.perf_counter()
    config, train_clips, test_clips = load_data(args, recipe, seed)
    classifier_config = replace(config, num_labels=len(train_clips.classes), use_mean_pooling=True,
                                drop_path_rate=recipe["drop_path"])
    subsets = [choose_labelled(train_clips.labels, budget, seed) for budget in recipe["labels_per_class"]]
    folder.mkdir(parents=True)
    describe(config, train_clips, test_clips, recipe, seed, device, folder)
    seconds = {"data": round(time.perf_counter() - start, 1)}

    def timed(stage, function, *arguments):
        stage_start = time.perf_counter()
        result = function(*arguments, stage)
        seconds[stage] = round(time.perf_counter() - stage_start, 1)
        return result

    def log(**entry):
        with open(folder / "metrics.jsonl", "a") as file:
            print(json.dumps(entry), file=file)

    model, losses = timed("pretrain", pretrain, train_clips, config, recipe, seed, device, log)
    save_model(model, folder / "pretrained.pt")
    draw_reconstruction(model, test_clips, recipe, device, folder / "reconstruction.png")

    results = []
    for budget, subset in zip(recipe["labels_per_class"], subsets, strict=True):
        result, labels = dict(labels_per_class=budget), test_clips.labels

        def score(name, predictions, result=result, labels=labels):
            result[f"{name}_top1"] = percent(predictions == labels)
            result[f"{name}_balanced"] = balanced(predictions, labels)

        for name, encoder in (("finetune", model.videomae), ("scratch", None), ("scratch_full_time", None)):
            steps = recipe["scratch_full_time_steps" if name == "scratch_full_time" else "finetune_steps"]
            lr = recipe["scratch_lr" if encoder is None else "finetune_lr"]
            classifier = timed(f"{name}, {budget or 'all'} labels per class", finetune, train_clips, subset,
                               classifier_config, encoder, recipe, steps, lr, seed, device, log)
            score(name, predict(classifier, test_clips, device))
            if name == "finetune":
                save_model(classifier, folder / f"finetuned-{budget or 'all'}.pt")
                if isinstance(test_clips, MotionClips):
                    result.update(motion_checks(classifier, test_clips, device))
        score("linear_probe", linear_probe(model.videomae, train_clips, subset, test_clips, device))
        results.append(result)

    tenth = max(1, len(losses) // 10)
    summary = dict(
        data=args.data, evaluated_on=args.evaluate_on, seed=seed, device=device_name(device), torch=torch.__version__,
        pretrain_loss_first=round(losses[0], 4), pretrain_loss_last=round(sum(losses[-tenth:]) / tenth, 4),
        **results[-1],  # the last label budget; all of them under "results"
        majority_top1=percent(test_clips.labels == train_clips.labels.mode().values), results=results,
        seconds=seconds, total_seconds=round(time.perf_counter() - start, 1), recipe=recipe, config=asdict(config),
    )
    write_whole(folder / "summary.json", lambda file: file.write(json.dumps(summary, indent=2).encode()))
    return summary


def motion_checks(model, clips: MotionClips, device) -> dict:
    """What the classifier says of clips whose motion was taken away or turned round, in percent."""
    middle = clips.clips.shape[1] // 2
    held_middle = predict(model, clips, device, lambda frames: frames[:, [middle]].expand_as(frames))
    held_first = predict(model, clips, device, lambda frames: frames[:, [0]].expand_as(frames))
    backwards = predict(model, clips, device, lambda frames: frames.flip(1))
    return dict(middle_frame_top1=percent(held_middle == clips.labels),
                first_frame_top1=percent(held_first == clips.labels),
                reversed_as_opposite=percent(backwards == clips.labels ^ 1))  # MOTIONS has opposites side by side


def load_data(args, recipe: dict, seed: int):
    """-> the model's config, training clips and held-out clips (test, or validation with --evaluate-on val)."""
    config = VideoMAEConfig.preset(recipe["model"], use_mean_pooling=False,  # a pretraining encoder ends in a norm
                                   position_embedding=recipe["position_embedding"])
    random_mask(recipe["mask"], 1, config.grid, recipe["mask_ratio"])  # a bad mask or ratio is an error before the work
    if args.data == "embedded":
        return (config, MotionClips(recipe["unlabelled_clips"], config, seed),
                MotionClips(recipe["test_clips"], config, HELD_OUT_SEEDS[args.evaluate_on]))
    if args.evaluate_on == "val":
        raise ValueError("--evaluate-on: a folder has no validation split, expected test")
    classes, splits = split_folder(Path(args.data))
    return (config, *(VideoClips(classes, splits[split], config, recipe["frame_stride"], Path(args.cache))
                      for split in ("train", "test")))


def pick_device() -> torch.device:
    """CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def device_name(device: torch.device) -> str:
    """For people: the GPU's name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def describe(config, train_clips, test_clips, recipe, seed, device, folder):
    """One screen before the work starts."""
    parameters = sum(p.numel() for p in VideoMAEForPreTraining(config).parameters())
    print(f"device    {device_name(device)}")
    print(f"model     {recipe['model']}: {parameters / 1e6:.2f} M parameters, {config.num_patches} cubes of "
          f"{config.tubelet_size} x {config.patch_size} x {config.patch_size} pixels, {recipe['mask']} mask "
          f"{recipe['mask_ratio']}")
    for name, clips in (("train", train_clips), ("held out", test_clips)):
        counts = torch.bincount(clips.labels, minlength=len(clips.classes)).tolist()
        per_class = ", ".join(f"{c} {n}" for c, n in zip(clips.classes, counts, strict=True))
        print(f"{name:9} {len(clips.labels)} clips: {per_class}")
    print(f"seed      {seed}\noutput    {folder}/", flush=True)


def save_model(model, path: Path):
    """Config and weights, for `torch.load(path, weights_only=True)`."""
    content = dict(config=asdict(model.config), state_dict={k: v.cpu() for k, v in model.state_dict().items()})
    write_whole(path, lambda file: torch.save(content, file))


def parse_arguments(argv=None) -> tuple[argparse.Namespace, dict]:
    """The command line -> its options, and the recipe with the command line's changes."""
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--data", default="embedded", help="embedded (the default), or a folder of Class/*.mp4")
    recipe = RECIPES["embedded" if data.parse_known_args(argv)[0].data == "embedded" else "videos"]
    parser = argparse.ArgumentParser(parents=[data], description=__doc__.split("\n\n")[0],
                                     usage="train_tiny.py [--data FOLDER] [options]")
    parser.add_argument("--name", help="output folder inside --out; must not exist (default: the next free number)")
    parser.add_argument("--out", default="runs", help="where output folders go (runs)")
    parser.add_argument("--cache", default="runs/.cache", help="where decoded videos are kept (runs/.cache)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="a whole run for each, and one table (0)")
    parser.add_argument("--evaluate-on", choices=["test", "val"], default="test", help="embedded clips only (test)")
    group = parser.add_argument_group("recipe", "of the embedded clips; --data FOLDER --help shows that of videos")
    for key, value in recipe.items():
        kind = dict(type=type(value), metavar="X")
        if isinstance(value, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(value, list):
            kind = dict(type=type(value[0]), metavar="X", nargs="+")
        shown = " ".join(map(str, value)) if isinstance(value, list) else value
        group.add_argument("--" + key.replace("_", "-"), default=value, help=f"({shown})", **kind)
    args = parser.parse_args(argv)
    if len(set(args.seeds)) < len(args.seeds) or not all(0 <= seed < HELD_OUT_SEEDS["test"] for seed in args.seeds):
        raise ValueError(f"--seeds: got {args.seeds}, expected different numbers from 0 to a million")
    recipe = {key: getattr(args, key) for key in recipe}
    for key, value in recipe.items():
        zero_is_fine = key in ("drop_path", "labels_per_class") or isinstance(value, bool)
        values = value if isinstance(value, list) else [value]
        if not isinstance(value, str) and not all(v >= 0 if zero_is_fine else v > 0 for v in values):
            expected = "0 or more" if zero_is_fine else "more than 0"
            raise ValueError(f"--{key.replace('_', '-')}: got {value}, expected {expected}")
    return args, recipe


def fresh_folder(out: Path, name: str | None, prefix: str) -> Path:
    """out/name, or out/prefix-1, -2, ... where no name is given. Raises ValueError where out/name exists."""
    if name is None:
        return next(out / f"{prefix}-{i}" for i in itertools.count(1) if not (out / f"{prefix}-{i}").exists())
    if (out / name).exists():
        raise ValueError(f"--name: {out / name} exists already; choose another name or remove it")
    return out / name


def main(argv=None):
    """The command line; see the top of the file."""
    args, recipe = parse_arguments(argv)
    prefix = "embedded" if args.data == "embedded" else Path(args.data).resolve().name
    folder = fresh_folder(Path(args.out), args.name, prefix)
    folders = [folder / f"seed-{seed}" if len(args.seeds) > 1 else folder for seed in args.seeds]
    summaries = [run(args, recipe, *job) for job in zip(args.seeds, folders, strict=True)]
    metrics = [json.loads(line) for line in open(folders[0] / "metrics.jsonl")]
    draw_curves(metrics, summaries, folder / "curves.png")
    text = table(summaries)
    write_whole(folder / "table.md", lambda file: file.write((text + "\n").encode()))
    print(f"\n{text}\n\n{sum(summary['total_seconds'] for summary in summaries):.0f} seconds. "
          f"Table, pictures, models and summary.json are in {folder}/")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"train_tiny.py: {error}")
