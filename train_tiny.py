"""Train VideoMAE: pretrain without labels, fine-tune on a few, compare with training from scratch.

    python train_tiny.py                                  synthetic clips, no download; minutes
    python train_tiny.py --data FOLDER                    your videos, FOLDER/Class/*.avi|mp4|...
    python train_tiny.py finetune --data FOLDER --init MCG-NJU/videomae-base   published weights
    python train_tiny.py predict --init runs/NAME VIDEO ...    the most likely classes of a video
    torchrun --nproc_per_node=2 train_tiny.py --data FOLDER    several GPUs

Everything goes to runs/NAME/: table, summary.json, metrics.jsonl, pictures, and the models, which
`from_pretrained` reads. An interrupted run resumes exactly: --resume runs/NAME.
Every field of a recipe, below, is also an option: --pretrain-steps 300.
"""
import argparse
import contextlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from checkpoints import optional_import, write_whole
from processor import VideoMAEImageProcessor
from tiny import report
from tiny.augment import colour_jitter, flip
from tiny.synthetic import HELD_OUT_SEEDS, SyntheticClips
from tiny.videos import VideoClips, decode, download_ucf101_subset, load_videos
from videomae import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
    check_choice,
    normalize,
    random_mask,
    split_mask,
)

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
if torch.cuda.is_available():
    DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
else:
    DEVICE = torch.device("mps" if torch.backends.mps.is_available() else "cpu")


# ---- Recipes ------------------------------------------------------------------------------------

@dataclass
class Recipe:
    """The settings of a run; the defaults are those of `laptop`, for videos of your own.

    Learning rates are for a batch of 256 and scaled by the batch, as the authors do; a batch is
    what all processes see in a step.
    """

    model: str = "laptop"  # a preset of VideoMAEConfig
    mask: str = "tube"
    mask_ratio: float = 0.75  # the authors' for UCF101, their smallest data set
    frame_stride: int = 4  # the authors' for UCF101: 16 frames, 4 apart
    views: int = 5  # at test time, the mean over 5 times ...
    crops: int = 3  # ... and 3 places; the authors' for UCF101
    flip: bool = True  # left to right; not where the direction is the label
    colour_jitter: bool = False
    label_smoothing: float = 0.1
    labels_per_class: list[int] = field(default_factory=lambda: [0])  # budgets; 0 = every label
    unlabelled_clips: int = 10_000  # synthetic clips to pretrain on
    test_clips: int = 1024  # synthetic clips held out

    pretrain_steps: int = 2000
    pretrain_batch: int = 16
    pretrain_lr: float = 8e-3
    finetune_steps: int = 300
    finetune_batch: int = 16
    finetune_lr: float = 4e-3
    scratch_steps: int = 900  # as long as pretraining and fine-tuning take; 0 = no comparison
    scratch_lr: float = 4e-3

    optimizer: str = "adamw"  # "muon": for the matrices, as Muon orthogonalizes their updates
    muon_scale: float = 3.0  # Muon's learning rate over AdamW's, which the other parameters have
    weight_decay: float = 0.05  # the authors', for both stages
    warmup: float = 0.05  # share of the steps
    gradient_clip: float = 1.0
    layer_decay: float = 0.75  # of the learning rate, layer by layer from the head down
    drop_path: float = 0.1
    accumulate: int = 1  # parts that a batch is computed in, to save memory
    activation_checkpointing: bool = False  # compute activations again, to save memory
    precision: str = "auto"  # bf16 on a GPU that has it, else fp16 on a GPU, else fp32
    compile: bool = False
    checkpoint_every: int = 100  # steps
    max_broken: float = 0.1  # share of the videos that may be unreadable
    seed: int = 0

    def __post_init__(self):
        """Every number has its range; an option that cannot be is named."""
        shares = ("mask_ratio", "drop_path", "label_smoothing", "warmup", "max_broken")
        may_be_zero = (*shares, "labels_per_class", "scratch_steps", "seed", "weight_decay")
        parts = max(1, WORLD * self.accumulate)
        for name, value in vars(self).items():
            numbers = value if isinstance(value, list) else [value]
            expected = None
            if isinstance(value, str | bool):
                continue
            elif name in shares and value >= 1:
                expected = "less than 1"
            elif any(x < 0 if name in may_be_zero else x <= 0 for x in numbers):
                expected = "0 or more" if name in may_be_zero else "more than 0"
            elif name.endswith("_batch") and value % parts:
                expected = f"a multiple of {parts} (processes x accumulate)"
            if expected:
                option = "--" + name.replace("_", "-")
                raise ValueError(f"{option}: got {value}, expected {expected}")
        check_choice("--precision", self.precision, ("auto", *DTYPES))
        check_choice("--optimizer", self.optimizer, ("adamw", "muon"))


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RECIPES = {
    # Chosen on validation clips (docs/results.md), the rate from scratch too. 600 steps with Muon
    # reach a lower pretraining loss than 2,400 with AdamW.
    "synthetic": Recipe(
        model="tiny", views=1, crops=1, flip=False, colour_jitter=True, label_smoothing=0.0,
        labels_per_class=[2], layer_decay=1.0, drop_path=0.0, optimizer="muon",
        pretrain_steps=1500, pretrain_batch=48, pretrain_lr=1.4e-2,
        finetune_steps=300, finetune_batch=32, finetune_lr=8e-3,
        scratch_steps=1450, scratch_lr=2e-2,
    ),
    "laptop": Recipe(),
    # The authors' main settings for UCF101 on 8 GPUs, from scripts/ucf101 and the defaults of
    # run_class_finetuning.py. Of theirs, mixup, cutmix, RandAugment, random erasing, two samples of
    # a clip in a batch and head dropout are not built here.
    "ucf101": Recipe(
        model="base",
        pretrain_steps=158_950, pretrain_batch=192, pretrain_lr=3e-4,  # 3,200 epochs, 9,537 clips
        warmup=0.0125,  # 40 epochs
        gradient_clip=math.inf,  # they do not clip
        finetune_steps=7_451, finetune_batch=128, finetune_lr=5e-4,  # 100 epochs
        scratch_steps=0, layer_decay=0.7, drop_path=0.2,
        activation_checkpointing=True, checkpoint_every=1000,
    ),
}
PRETRAIN_BETAS, FINETUNE_BETAS = (0.9, 0.95), (0.9, 0.999)  # the authors'


# ---- Batches -------------------------------------------------------------------------------------
# All random numbers of a step follow from the seed and the step's number, so that a resumed run
# repeats them. They are drawn for the whole batch, of which a process takes its rows, so that two
# processes see together what one would (but for dropout and drop path).

class Batches(Dataset):
    """Item `step` is this process's part of that training step's batch: frames, labels, the random
    numbers of the augmentations, and with `mask_of` the mask's two lists of indices."""

    def __init__(self, clips, subset: Tensor, batch: int, seed: int, mask_of=None):
        self.clips, self.subset, self.batch = clips, subset, batch
        self.seed, self.mask_of = seed, mask_of

    def __getitem__(self, step: int):
        generator = torch.Generator().manual_seed(self.seed * 1_000_000_007 + step)
        share = self.batch // WORLD
        rows = slice(RANK * share, (RANK + 1) * share)
        indices = self.clips_of(step)[rows]
        place = torch.rand(self.batch, 4, generator=generator)[rows]
        random = torch.rand(self.batch, 10, generator=generator)[rows]  # flip, colours
        shift = torch.randn(self.batch, 3, generator=generator)[rows]
        random = torch.cat([random, shift], dim=1)  # (rows, 13)
        mask = self.mask_of(self.batch, generator)[rows] if self.mask_of else None
        frames = self.clips.load(indices, place)  # (rows, T, 3, H, W) uint8
        parts = () if mask is None else split_mask(mask)
        return frames, self.clips.labels[indices], random, *parts

    def clips_of(self, step: int) -> Tensor:
        """(batch,) the step's part of an endless row of shuffles, every clip once in each."""
        n, start = len(self.subset), step * self.batch
        epochs = range(start // n, (start + self.batch - 1) // n + 1)
        seeds = [torch.Generator().manual_seed(self.seed * 1_000_003 + epoch) for epoch in epochs]
        shuffles = [torch.randperm(n, generator=seed) for seed in seeds]
        return self.subset[torch.cat(shuffles)[start - epochs[0] * n :][: self.batch]]


# ---- Training -----------------------------------------------------------------------------------

def say(*text):
    """Print, in the first process only."""
    if RANK == 0:
        print(*text, flush=True)


def wait():
    """Until every process is here."""
    if WORLD > 1:
        dist.barrier()


def parameter_groups(model, recipe: Recipe, layer_decay: float) -> list[dict]:
    """As the authors': no decay on norms, biases and the mask token; `layer_decay` from the top.

    Each group has "scale", its learning rate over the step's, and "is_muon".
    """
    top, groups = len(model.videomae.blocks) + 1, {}
    for name, parameter in model.named_parameters():
        block = re.match(r"videomae\.blocks\.(\d+)\.", name)
        is_embedding = name.startswith("videomae.patch_embed")
        depth = int(block[1]) + 1 if block else 0 if is_embedding else top
        decay = 0.0 if parameter.ndim < 2 or name.endswith("mask_token") else recipe.weight_decay
        # A small matrix, such as a head of few classes, has too few directions to orthogonalize.
        is_muon = recipe.optimizer == "muon" and parameter.ndim == 2 and min(parameter.shape) >= 64
        scale = layer_decay ** (top - depth) * (recipe.muon_scale if is_muon else 1.0)
        groups.setdefault((scale, decay, is_muon), []).append(parameter)
    return [dict(params=parameters, scale=scale, weight_decay=decay, is_muon=is_muon)
            for (scale, decay, is_muon), parameters in groups.items()]


def make_optimizers(model, recipe: Recipe, betas, layer_decay: float) -> dict:
    """-> {"adamw": optimizer}, and "muon" where the recipe says so; `train` sets learning rates."""
    groups = parameter_groups(model, recipe, layer_decay)
    adamw, muon = ([g for g in groups if g["is_muon"] == is_muon] for is_muon in (False, True))
    optimizers = {"adamw": torch.optim.AdamW(adamw, betas=betas, fused=True)}
    if muon:  # rates on AdamW's scale
        optimizers["muon"] = torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw")
    return optimizers


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up for a share of the steps, then half a cosine."""
    warmup_steps = max(1, round(warmup * steps))
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    share = (step - warmup_steps) / max(1, steps - warmup_steps)
    return peak * (0.5 + 0.5 * math.cos(math.pi * share))


def compute_dtype(precision: str) -> torch.dtype:
    """What matrices are multiplied in."""
    if precision != "auto":
        return DTYPES[precision]
    if DEVICE.type != "cuda":
        return torch.float32
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


def prepare(model, recipe: Recipe):
    """The model as it is called in training: on several GPUs, compiled, with less memory."""
    if recipe.activation_checkpointing:
        for block in model.videomae.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if WORLD > 1:
        devices = [DEVICE] if DEVICE.type == "cuda" else None
        model = DistributedDataParallel(model, device_ids=devices)
    return torch.compile(model) if recipe.compile else model


def accumulate(model, batch, loss_of, recipe: Recipe, scaler) -> Tensor:
    """The gradients of one batch, computed in parts -> its mean loss."""
    dtype, total = compute_dtype(recipe.precision), 0.0
    for i, part in enumerate(zip(*(x.chunk(recipe.accumulate) for x in batch), strict=True)):
        part = [x.to(DEVICE, non_blocking=True) for x in part]
        is_last = i + 1 == recipe.accumulate  # processes exchange gradients once, after it
        with contextlib.nullcontext() if WORLD == 1 or is_last else model.no_sync(), \
                torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(model, *part) / recipe.accumulate
        scaler.scale(loss).backward()
        total = total + loss.detach()
    return total


def save_state(path: Path, log: Path, stage: str, step: int, seconds: float, parts: dict):
    """Everything that a killed run needs to resume exactly, and how long its log was."""
    if not all(x.isfinite().all() for x in parts["model"].parameters()):
        raise FloatingPointError(f"{stage}: weights are not finite at step {step}; {path} is good")
    if RANK == 0:
        log.touch()
        state = dict(stage=stage, step=step, seconds=seconds, log_size=log.stat().st_size)
        state |= {name: part.state_dict() for name, part in parts.items()}
        write_whole(path, lambda file: torch.save(state, file))


def restore_state(path: Path, log: Path, stage: str, parts: dict) -> tuple[int, float]:
    """-> the step and the seconds to resume from; zeros where this stage was not begun."""
    state = torch.load(path, map_location=DEVICE, weights_only=True) if path.exists() else {}
    wait()  # every process has read it before the first one writes
    if state.get("stage") != stage:
        return 0, 0.0
    for name, part in parts.items():
        part.load_state_dict(state[name])
    if RANK == 0:
        os.truncate(log, state["log_size"])  # later steps are written again
    say(f"{stage}: resumes at step {state['step']}")
    return state["step"], state["seconds"]


def write_losses(log: Path, stage: str, recent: list) -> float:
    """recent [(step, learning rate, loss)] -> lines of metrics.jsonl; gives the last loss."""
    losses = torch.stack([loss.float() for _, _, loss in recent])
    if WORLD > 1:
        dist.all_reduce(losses)
    losses = (losses / WORLD).tolist()
    for (step, rate, _), loss in zip(recent, losses, strict=True):
        if not math.isfinite(loss):
            raise FloatingPointError(f"{stage}: the loss is {loss} at step {step}, learning rate "
                                     f"{rate:.1e}; {log.parent}/checkpoint.pt is still good")
    if RANK == 0:
        with open(log, "a") as file:
            for (step, rate, _), loss in zip(recent, losses, strict=True):
                print(json.dumps(dict(stage=stage, step=step, loss=loss, lr=rate)), file=file)
    return losses[-1]


def update(model, optimizers, scaler, rate: float, gradient_clip: float):
    """One step of every optimizer, with the gradients clipped."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
    nn.utils.clip_grad_norm_(model.parameters(), gradient_clip)
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    model.zero_grad()


def train(folder: Path, stage: str, model, batches: Batches, loss_of, recipe: Recipe, steps: int,
          base_lr: float, betas, layer_decay: float = 1.0, every_tenth=lambda: None) -> dict:
    """Train a model in place -> its first and last loss.

    loss_of(model, *batch) is the mean loss of a batch. The whole state is saved every
    `checkpoint_every` steps; losses go to metrics.jsonl. every_tenth is called ten times.
    """
    start, peak = time.perf_counter(), base_lr * batches.batch / 256
    optimizers = make_optimizers(model, recipe, betas, layer_decay)
    is_fp16 = compute_dtype(recipe.precision) == torch.float16
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=is_fp16)
    state = folder / "checkpoint.pt", folder / "metrics.jsonl", stage
    parts = dict(model=model, scaler=scaler, **optimizers)
    first, earlier = restore_state(*state, parts)
    trained, recent = prepare(model, recipe), []
    workers = 0 if isinstance(batches.clips, SyntheticClips) else max(1, (os.cpu_count() or 1) // 4)
    loader = DataLoader(batches, batch_size=None, sampler=range(first, steps), num_workers=workers)
    bar = tqdm(loader, stage, steps - first, leave=False, disable=True if RANK else None)
    model.train()
    for step, batch in enumerate(bar, first):
        if step % recipe.checkpoint_every == 0:
            save_state(*state, step, earlier + time.perf_counter() - start, parts)
        torch.manual_seed(recipe.seed * 1_000_000_007 + step * WORLD + RANK)  # dropout, drop path
        rate = learning_rate(step, steps, peak, recipe.warmup)
        loss = accumulate(trained, batch, loss_of, recipe, scaler)
        update(model, optimizers.values(), scaler, rate, recipe.gradient_clip)
        recent.append((step, rate, loss))
        # Losses are looked at, and a GPU waited for, every ten steps only.
        done = step + 1
        if done % 10 == 0 or done in (1, steps) or done % recipe.checkpoint_every == 0:
            bar.set_postfix_str(f"loss {write_losses(state[1], stage, recent):.3f}")
            recent = []
        if done % max(1, steps // 10) == 0 and RANK == 0:
            every_tenth()
            model.train()
    wait()
    losses = [m["loss"] for m in read_metrics(folder) if m["stage"] == stage]
    seconds, last = earlier + time.perf_counter() - start, np.mean(losses[-max(1, steps // 10) :])
    say(f"{stage}: loss {losses[0]:.3f} -> {last:.3f} in {steps} steps, {seconds:.0f} s")
    return dict(loss_first=losses[0], loss_last=float(last), seconds=round(seconds, 1))


def read_metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def pretrain(folder: Path, clips, config: VideoMAEConfig, recipe: Recipe, picture) -> tuple:
    """Stage 1, no labels: reconstruct masked patches -> the model and `train`'s result."""
    torch.manual_seed(recipe.seed)
    model = VideoMAEForPreTraining(config).to(DEVICE)

    def mask_of(batch, generator):
        return random_mask(recipe.mask, batch, config.grid, recipe.mask_ratio, generator)

    def loss_of(model, frames, labels, random, *mask):
        pixel_values = normalize(frames)
        if recipe.flip:
            pixel_values = flip(pixel_values, random[:, 0])
        return model(pixel_values, mask).loss

    everything = torch.arange(len(clips.labels))
    batches = Batches(clips, everything, recipe.pretrain_batch, recipe.seed, mask_of)
    return model, train(folder, "pretrain", model, batches, loss_of, recipe, recipe.pretrain_steps,
                        recipe.pretrain_lr, PRETRAIN_BETAS, every_tenth=lambda: picture(model))


def finetune(folder: Path, stage: str, clips, subset: Tensor, config: VideoMAEConfig,
             recipe: Recipe, init: Path | None) -> tuple:
    """Stage 2: a classifier on the labelled clips `subset`, from the encoder in `init` or, where
    that is None, from scratch -> the model and `train`'s result."""
    model = new_classifier(config, recipe, clips.classes, init).to(DEVICE)

    def loss_of(model, frames, labels, random):
        pixel_values = normalize(frames)
        if recipe.flip:
            pixel_values = flip(pixel_values, random[:, 0])
        if recipe.colour_jitter:
            pixel_values = colour_jitter(pixel_values, random[:, 1:])
        logits = model(pixel_values).logits.float()
        return F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)

    batches = Batches(clips, subset, recipe.finetune_batch, recipe.seed)
    settings = (recipe.scratch_steps, recipe.scratch_lr, FINETUNE_BETAS) if init is None else (
        recipe.finetune_steps, recipe.finetune_lr, FINETUNE_BETAS, recipe.layer_decay)
    return model, train(folder, stage, model, batches, loss_of, recipe, *settings)


def new_classifier(config: VideoMAEConfig, recipe: Recipe, classes, init: Path | None):
    """A classifier with a new head, on the encoder in `init` or on a new one."""
    torch.manual_seed(recipe.seed)
    changes = dict(num_labels=len(classes), id2label=dict(enumerate(classes)),
                   use_mean_pooling=True, drop_path_rate=recipe.drop_path)
    # What `predict` needs to know is kept in the config; transformers leaves such fields alone.
    changes["extra"] = config.extra | {key: getattr(recipe, key) for key in SAMPLING}
    new = VideoMAEForVideoClassification(replace(config, **changes))
    if init is None:
        return new
    model = VideoMAEForVideoClassification.from_pretrained(init, **changes)
    model.classifier.load_state_dict(new.classifier.state_dict())  # also where an old one would fit
    return model


SAMPLING = ("frame_stride", "views", "crops")


# ---- Evaluation ---------------------------------------------------------------------------------

@torch.no_grad()
def mean_over_views(function, clips, indices: Tensor) -> Tensor:
    """function of normalized clips (B, T, 3, H, W), averaged over a clip's views -> (n, ...)."""
    rows = []
    for part in indices.split(64 if clips.num_views == 1 else 8):
        views = [function(normalize(clips.load(part, view=view).to(DEVICE)))
                 for view in range(clips.num_views)]
        rows.append(torch.stack(views).mean(dim=0).cpu())
    return torch.cat(rows)


def probabilities(model, clips) -> Tensor:
    """(n, classes), the mean over a clip's views."""
    model.eval()
    everything = torch.arange(len(clips.labels))
    return mean_over_views(lambda x: model(x).logits.softmax(dim=1), clips, everything)


def percent(correct: Tensor) -> float:
    """Share of True, in percent."""
    return round(100 * correct.float().mean().item(), 2)


def scores(predictions: Tensor, labels: Tensor) -> dict:
    """top-1, and balanced accuracy, the mean over the classes, in percent."""
    by_class = [percent(predictions[labels == c] == c) for c in labels.unique()]
    return dict(top1=percent(predictions == labels), balanced=round(float(np.mean(by_class)), 2))


def linear_probe(encoder, clips, subset: Tensor, test_clips) -> Tensor:
    """Logistic regression on frozen features -> (n,) predictions for the test clips."""
    def features(pixel_values):
        return encoder(pixel_values).last_hidden_state.mean(dim=1)

    x, y = mean_over_views(features, clips, subset), clips.labels[subset]
    x_test = mean_over_views(features, test_clips, torch.arange(len(test_clips.labels)))
    mean, std = x.mean(dim=0), x.std(dim=0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    probe = nn.Linear(x.shape[1], len(clips.classes))
    for parameter in probe.parameters():  # nothing random: a resumed run gets the same probe
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(x), y) + 5e-3 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return probe(x_test).argmax(dim=1)


def choose_labelled(labels: Tensor, labels_per_class: int, seed: int) -> Tensor:
    """Indices of `labels_per_class` random clips of each class; 0 = every clip."""
    if labels_per_class == 0:
        return torch.arange(len(labels))
    generator, chosen = torch.Generator().manual_seed(seed), []
    for label in labels.unique():
        clips = (labels == label).nonzero()[:, 0]
        if len(clips) < labels_per_class:
            raise ValueError(f"--labels-per-class: got {labels_per_class}, but class {label} has "
                             f"{len(clips)} clips")
        chosen.append(clips[torch.randperm(len(clips), generator=generator)[:labels_per_class]])
    return torch.cat(chosen)


# ---- A run: pretrain; for each label budget fine-tune, probe, train from scratch -----------------
# What is finished is in results.json, so that a killed run goes on behind it.

def compare(folder: Path, recipe: Recipe, args, config: VideoMAEConfig, clips, test_clips) -> dict:
    """All stages of a run, those of results.json left out -> its summary."""
    path = folder / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}

    def finish(stage, result):
        results[stage] = result
        if RANK == 0:
            write_json(path, results)
        wait()

    pretrained = Path(args.init) if args.init else folder / "pretrained"
    if not args.init and "pretrain" not in results:
        def picture(model):
            report.draw_gif(model, test_clips, recipe, folder / "reconstruction.gif")

        model, result = pretrain(folder, clips, config, recipe, picture)
        if RANK == 0:
            report.draw_reconstruction(model, test_clips, recipe, folder / "reconstruction.png")
            save_model(model, pretrained)
        finish("pretrain", result)

    ways = ["finetune", "linear_probe", *["scratch_full_time"] * (recipe.scratch_steps > 0)]
    rows = []
    for budget in recipe.labels_per_class if args.stage != "pretrain" else ():
        subset = choose_labelled(clips.labels, budget, recipe.seed)
        row = {"labels_per_class": budget}
        for way in ways:
            stage = f"{way}, {budget or 'all'} labels per class"
            if stage not in results:
                finish(stage, run_stage(way, stage, budget, folder, recipe, config, clips, subset,
                                        test_clips, pretrained))
            row |= {f"{way}_{key}": x for key, x in results[stage].items()
                    if key in ("top1", "balanced")}
        rows.append(row)
    return summarize(folder, recipe, args, config, clips, test_clips, results, rows)


def run_stage(way, stage, budget, folder, recipe, config, clips, subset, test_clips, pretrained):
    """Train a classifier, or a linear probe, and test it -> its result."""
    start = time.perf_counter()
    if way == "linear_probe":
        encoder = VideoMAEModel.from_pretrained(pretrained).to(DEVICE)
        predictions, result = linear_probe(encoder, clips, subset, test_clips), {}
    else:
        init = pretrained if way == "finetune" else None
        model, result = finetune(folder, stage, clips, subset, config, recipe, init)
        predictions = probabilities(model, test_clips).argmax(dim=1) if RANK == 0 else None
        if RANK == 0 and way == "finetune":
            save_model(model, folder / f"finetuned-{budget or 'all'}")
            report.draw_confusion(predictions, test_clips.labels, clips.classes,
                                  folder / f"confusion-{budget or 'all'}.png")
    tested = scores(predictions, test_clips.labels) if predictions is not None else {}
    return {"seconds": round(time.perf_counter() - start, 1)} | result | tested


def summarize(folder, recipe, args, config, clips, test_clips, results: dict, rows: list) -> dict:
    """summary.json; its top1 fields are those of the last label budget."""
    first = results.get("pretrain", {})
    majority = percent(test_clips.labels == clips.labels.mode().values)
    seconds = {stage: result["seconds"] for stage, result in results.items()}
    summary = dict(
        data=args.data, evaluated_on=args.evaluate_on, init=args.init, seed=recipe.seed,
        device=device_name(), processes=WORLD, torch=torch.__version__,
        pretrain_loss_first=first.get("loss_first"), pretrain_loss_last=first.get("loss_last"),
        **(rows[-1] if rows else {}), majority_top1=majority, results=rows,
        classes=list(clips.classes), seconds=seconds,
        recipe=asdict(recipe), config=asdict(config),
    )
    if RANK == 0:
        write_json(folder / "summary.json", summary)
        (folder / "checkpoint.pt").unlink(missing_ok=True)
    return summary


def write_json(path: Path, content: dict):
    """A dict as JSON, whole or not at all."""
    write_whole(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def save_model(model, folder: Path):
    """A directory that `from_pretrained` reads, whole or absent, with the processor for it."""
    temporary, size = folder.with_name(f"{folder.name}.tmp"), model.config.image_hw[0]
    for old in (temporary, folder):  # of this run, when it was killed before
        shutil.rmtree(old, ignore_errors=True)
    model.save_pretrained(temporary)
    VideoMAEImageProcessor(size=size, crop_size=size, image_mean=IMAGENET_MEAN,
                           image_std=IMAGENET_STD).save_pretrained(temporary)
    os.replace(temporary, folder)


def predict(args):
    """Print the five most likely classes of each video, sampled as in training."""
    model = VideoMAEForVideoClassification.from_pretrained(args.init).to(DEVICE)
    config, labels = model.config, torch.zeros(1, dtype=torch.int64)
    names = config.id2label or {i: f"LABEL_{i}" for i in range(config.num_labels)}
    trained = {key: config.extra[key] for key in SAMPLING if key in config.extra}
    recipe = replace(RECIPES["laptop"], **trained | args.given)
    for video in map(Path, args.videos):
        frames = decode(video, config.image_hw[0], Path(args.cache))
        clips = VideoClips([""], [frames], labels, config, recipe)
        likely = probabilities(model, clips)[0].topk(min(5, len(names)))
        say(video)
        for share, label in zip(likely.values.tolist(), likely.indices.tolist(), strict=True):
            say(f"  {100 * share:5.1f} %  {names[label]}")


# ---- The command line ---------------------------------------------------------------------------

def parse_arguments(argv=None) -> tuple[argparse.Namespace, Recipe]:
    """The command line -> its options, and the recipe with the command line's changes."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--data", default="synthetic", metavar="X",
                       help="synthetic (the default), a folder, or ucf101-subset (downloaded)")
    first.add_argument("--recipe", choices=RECIPES)
    first.add_argument("--resume", metavar="RUN", help="go on with a run that was interrupted")
    known, _ = first.parse_known_args(argv)
    name = known.recipe or ("synthetic" if known.data == "synthetic" else "laptop")
    parser = argparse.ArgumentParser(
        parents=[first], description=__doc__, usage="train_tiny.py [stage] [options] [VIDEO ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", default="all",
                        choices=["all", "pretrain", "finetune", "predict"])
    parser.add_argument("videos", nargs="*", metavar="VIDEO", help="for predict")
    parser.add_argument("--init", metavar="X", help="weights: a run, a checkpoint or a hub id")
    parser.add_argument("--name", help="of the output folder in runs/, which must not exist")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="a run for each")
    parser.add_argument("--split", type=int, default=1, metavar="N", help="of UCF101's three (1)")
    parser.add_argument("--evaluate-on", choices=("test", "val"), default="test",
                        help="val: other synthetic clips, to choose settings on")
    parser.add_argument("--cache", default="runs/.cache", metavar="DIR", help="of decoded videos")
    group = parser.add_argument_group(f"recipe {name}")
    for f in fields(Recipe):
        value = getattr(RECIPES[name], f.name)
        kind = dict(type=type(value), metavar="X")
        if isinstance(value, bool):
            kind = dict(action=argparse.BooleanOptionalAction)
        elif isinstance(value, list):
            kind = dict(type=int, metavar="N", nargs="+")
        group.add_argument(f"--{f.name.replace('_', '-')}", default=argparse.SUPPRESS,
                           help=f"({value})", **kind)
    args = parser.parse_intermixed_args(argv)  # videos may come after the options
    changes = {f.name: vars(args).pop(f.name) for f in fields(Recipe) if f.name in args}
    args.given = changes
    if args.resume and len(sys.argv[1:] if argv is None else argv) > 2:
        raise ValueError("--resume: takes no other option, the run goes on with its own")
    if args.seeds and len(set(args.seeds)) < len(args.seeds):
        raise ValueError(f"--seeds: got {args.seeds}, expected different numbers")
    if args.stage in ("finetune", "predict") and not args.init:
        raise ValueError(f"--init: {args.stage} needs a model, for instance runs/synthetic-1")
    if args.init and ("model" in changes or args.stage == "pretrain"):
        raise ValueError("--init: its weights say the model, and nothing is pretrained")
    if (args.stage == "predict") != bool(args.videos):
        raise ValueError(f"VIDEO: got {len(args.videos)}; predict needs one or more, others none")
    return args, replace(RECIPES[name], **changes)


def find_model(init: str, stage: str) -> str:
    """A run of this script -> the model in it that a stage starts from; anything else as it is."""
    pattern = "finetuned-*" if stage == "predict" else "pretrained"
    found = sorted(Path(init).glob(pattern), key=lambda path: path.stat().st_mtime)
    return str(found[-1]) if found else init


def output_folder(args) -> Path:
    """runs/NAME, or runs/DATA-1, -2, ...: a folder that is not there yet."""
    if args.name:
        folder = Path("runs") / args.name
        if folder.exists():
            raise ValueError(f"--name: {folder} exists already, expected another name")
        return folder
    data = args.data if args.data == "synthetic" else Path(args.data).resolve().name
    return next(path for i in count(1) if not (path := Path("runs") / f"{data}-{i}").exists())


def load_data(args, config: VideoMAEConfig, recipe: Recipe) -> tuple:
    """-> training clips and held-out clips."""
    random_mask(recipe.mask, 1, config.grid, recipe.mask_ratio)  # a wrong one, before the work
    height, width = config.image_hw
    if height != width:
        raise ValueError(f"image_size: got {config.image_hw}, expected a square")
    if args.data == "synthetic":
        gigabytes = recipe.unlabelled_clips * config.num_frames * height * width * 3 / 1e9
        if gigabytes > 4:
            raise ValueError(f"--data: synthetic clips of this size would take {gigabytes:.0f} GB, "
                             "expected --data FOLDER for a large model")
        held_out = SyntheticClips(recipe.test_clips, config, HELD_OUT_SEEDS[args.evaluate_on])
        return SyntheticClips(recipe.unlabelled_clips, config, recipe.seed), held_out
    if args.evaluate_on == "val":
        raise ValueError("--evaluate-on: a folder has no validation split, expected test")
    cache = Path(args.cache)
    folder = download_ucf101_subset(cache) if args.data == "ucf101-subset" else Path(args.data)
    if RANK:
        wait()  # until the first process has decoded
    clips = load_videos(folder, config, recipe, args.split, cache, say)
    if not RANK:
        wait()
    return clips


def describe(folder, recipe: Recipe, args, config: VideoMAEConfig, clips, test_clips):
    """What a person wants to know before the work starts."""
    dtype = str(compute_dtype(recipe.precision)).removeprefix("torch.")
    say(f"device    {device_name()}, {WORLD} process, {dtype}")
    say(f"model     {args.init or recipe.model}, {config.num_patches} patches, {recipe.mask} mask "
        f"{recipe.mask_ratio}")
    for name, part in (("train", clips), ("held out", test_clips)):
        counts = torch.bincount(part.labels, minlength=len(part.classes)).tolist()
        per_class = [f"{c} {n}" for c, n in zip(part.classes, counts, strict=True)]
        say(f"{name:9} {len(part.labels)} clips: {', '.join(per_class)}")
    say(f"output    {folder}/")


def device_name() -> str:
    """For people."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{DEVICE.type}, {torch.get_num_threads()} threads"


def run(folder: Path, recipe: Recipe, args) -> dict:
    """One seed's run -> its summary."""
    if args.init:
        config = VideoMAEModel.from_pretrained(args.init).config
    else:
        config = VideoMAEConfig.preset(recipe.model)
    clips, test_clips = load_data(args, config, recipe)
    for budget in recipe.labels_per_class:
        choose_labelled(clips.labels, budget, recipe.seed)  # too few are an error before the work
    describe(folder, recipe, args, config, clips, test_clips)
    if RANK == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for half_written in folder.glob("*.tmp"):
            shutil.rmtree(half_written) if half_written.is_dir() else half_written.unlink()
        write_json(folder / "settings.json", dict(args=vars(args), recipe=asdict(recipe)))
    wait()
    return compare(folder, recipe, args, config, clips, test_clips)


def main(argv=None):
    """The command line; see the top of the file."""
    args, recipe = parse_arguments(argv)
    optional_import("safetensors.torch", "safetensors")  # models are saved with it
    folder = Path(args.resume) if args.resume else output_folder(args)
    if args.resume:
        try:
            settings = json.loads((folder / "settings.json").read_text())
        except OSError as error:
            raise ValueError(f"--resume: {folder} has no settings.json, expected a run") from error
        args, recipe = argparse.Namespace(**settings["args"]), Recipe(**settings["recipe"])
    if args.init:
        args.init = find_model(args.init, args.stage)
        args.stage = "finetune" if args.stage == "all" else args.stage
        if args.stage == "predict":
            return predict(args)
    else:  # between a run's stages it goes without saying that decoders are dropped, heads are new
        logging.getLogger("videomae").setLevel(logging.ERROR)
    if WORLD > 1:
        if DEVICE.type == "cuda":
            torch.cuda.set_device(DEVICE)
        # The others wait while the first one decodes and evaluates, for hours if need be.
        backend = "nccl" if DEVICE.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=1))
        wait()  # until every process has looked for a free name
    seeds = args.seeds or [recipe.seed]
    folders = [folder / f"seed-{seed}" for seed in seeds] if len(seeds) > 1 else [folder]
    if len(seeds) > 1 and RANK == 0:
        write_json(folder / "settings.json", dict(args=vars(args), recipe=asdict(recipe)))
    try:
        summaries = [run(path, replace(recipe, seed=seed), args)
                     for path, seed in zip(folders, seeds, strict=True)]
    except KeyboardInterrupt:
        say(f"\nInterrupted. To go on: python train_tiny.py --resume {folder}")
        raise SystemExit(130) from None
    if RANK == 0 and summaries[0]["results"]:
        report.draw_curves(read_metrics(folders[0]), summaries, folder / "curves.png")
        text = report.table(summaries)
        (folder / "table.md").write_text(text + "\n")
        say(f"\n{text}\n\nEverything is in {folder}/")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        sys.exit(f"train_tiny.py: {error}")
