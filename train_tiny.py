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
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from checkpoints import write_whole
from processor import VideoMAEImageProcessor
from tiny import report
from tiny.augment import colour_jitter, flip
from tiny.evaluate import choose_labelled, linear_probe, probabilities, scores
from tiny.muon import Muon
from tiny.synthetic import HELD_OUT_SEEDS, SyntheticClips
from tiny.videos import LongVideo, load_videos
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
DEVICE = torch.device("cpu")
if torch.accelerator.is_available():
    DEVICE = torch.accelerator.current_accelerator()


# ---- Recipes ------------------------------------------------------------------------------------

@dataclass
class Recipe:
    """The settings of a run; the defaults are those of `laptop`, for videos of your own.

    Learning rates are for a batch of 256 and scaled by the batch, as the authors do; a batch is
    what all processes see in a step.
    """

    data: str = "synthetic"  # or a folder
    split: int = 1  # of UCF101's three official ones
    cache: str = "runs/.cache"  # of decoded videos
    init: str = ""  # weights to start from: a run, a checkpoint or a hub id
    name: str = ""  # of the output folder in runs/, which must not exist
    seed: int = 0
    validate: bool = False  # test on other synthetic clips, to choose settings

    model: str = "laptop"  # a preset of VideoMAEConfig
    image_size: int = 0  # pixels; 0 = the preset's
    mask: str = "tube"
    mask_ratio: float = 0.75  # the authors' for UCF101
    fps: float = 6.25  # frames a second: the authors' stride of 4 in UCF101's 25
    views: int = 5  # at test time, the mean over 5 times ...
    crops: int = 3  # ... and 3 places; the authors' for UCF101
    flip: bool = True  # left to right; not where the direction is the label
    colour_jitter: bool = False
    label_smoothing: float = 0.1
    labels_per_class: int = 0  # how many clips of a class have a label; 0 = all
    unlabelled_clips: int = 10_000  # synthetic clips to pretrain on
    test_clips: int = 1024  # synthetic clips held out
    max_minutes: float = 60.0  # of a video; the rest is not used
    cache_gb: float = 20.0  # refuse a folder whose decoded frames would take more

    pretrain_steps: int = 2000
    pretrain_batch: int = 16
    pretrain_lr: float = 8e-3
    finetune_steps: int = 300
    finetune_batch: int = 16
    finetune_lr: float = 4e-3
    scratch_steps: int = 900  # as long as pretraining and fine-tuning take; 0 = no comparison
    scratch_lr: float = 4e-3

    optimizer: str = "adamw"  # "muon": Muon for the matrices, AdamW for the rest
    muon_scale: float = 3.0  # Muon's learning rate over AdamW's, which the other parameters have
    weight_decay: float = 0.05  # the authors', for both stages
    warmup: float = 0.05  # share of the steps
    gradient_clip: float = 1.0
    layer_decay: float = 0.75  # of the learning rate, layer by layer from the head down
    drop_path: float = 0.1
    accumulate: int = 1  # parts that a batch is computed in, to save memory
    activation_checkpointing: bool = False  # recompute them going backward, to save memory
    precision: str = "auto"  # bf16 on a GPU that has it, else fp16 on a GPU, else fp32
    compile: bool = False
    checkpoint_every: int = 100  # steps

    def __post_init__(self):
        self.data, self.cache, self.init = str(self.data), str(self.cache), str(self.init)
        shares = ("mask_ratio", "drop_path", "label_smoothing", "warmup")
        may_be_zero = (*shares, "weight_decay", "labels_per_class", "scratch_steps", "seed",
                       "image_size")
        for name, value in vars(self).items():
            if isinstance(value, str | bool):
                continue
            option = f"--{name.replace('_', '-')}: got {value}, expected"
            if value < 0 or value == 0 and name not in may_be_zero:
                raise ValueError(f"{option} more than 0")
            if name in shares and value >= 1:
                raise ValueError(f"{option} less than 1")
        check_choice("--precision", self.precision, ("auto", *DTYPES))
        check_choice("--optimizer", self.optimizer, ("adamw", "muon"))


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RECIPES = {
    # Chosen on validation clips (docs/results.md), the rate from scratch too. Muon reaches the same
    # loss in far fewer steps than AdamW. Whole frames are masked because the label is how the
    # camera moves: to predict a frame, one has to follow it. Tubes teach that more slowly.
    "synthetic": Recipe(
        model="tiny", mask="frame", views=1, crops=1, flip=False, colour_jitter=True,
        label_smoothing=0.0, labels_per_class=1, layer_decay=1.0, drop_path=0.0, optimizer="muon",
        pretrain_steps=1600, pretrain_batch=32, pretrain_lr=1.2e-2,
        finetune_steps=300, finetune_batch=16, finetune_lr=8e-3,
        scratch_steps=1900, scratch_lr=4e-3,
    ),
    "laptop": Recipe(),
    # A hundred short videos of people on a CPU; chosen on one split of such (docs/results.md).
    "small-videos": Recipe(
        model="tiny", image_size=48, mask="random", fps=12.5, views=3, crops=1,
        label_smoothing=0.0, layer_decay=1.0, drop_path=0.0, optimizer="muon",
        pretrain_steps=1200, pretrain_lr=2e-2,
        finetune_steps=500, finetune_batch=8, finetune_lr=4e-2,
        scratch_steps=1600, scratch_lr=4e-2,
    ),
    # The authors' main settings for UCF101 on 8 GPUs, from scripts/ucf101 and the defaults of
    # run_class_finetuning.py. Of theirs, mixup, cutmix, RandAugment, random erasing, two samples of
    # a clip in a batch, head dropout, a least learning rate and fine-tuning's own warm-up and crops
    # are not built here; and they do not flip clips to pretrain.
    "ucf101": Recipe(
        model="base",
        pretrain_steps=158_950, pretrain_batch=192, pretrain_lr=3e-4,  # 3,200 epochs, 9,537 clips
        warmup=0.0125,  # 40 epochs
        gradient_clip=math.inf,  # they do not clip
        finetune_steps=7_451, finetune_batch=128, finetune_lr=5e-4,  # 100 epochs
        scratch_steps=0, layer_decay=0.7, drop_path=0.2,
        activation_checkpointing=True, checkpoint_every=1000,
        cache_gb=150.0,  # 27 hours of video
    ),
}


# ---- Batches -------------------------------------------------------------------------------------
# All random numbers of a step follow from the seed and the step's number, so that a resumed run
# repeats them. They are drawn for the whole batch, of which a process takes its rows, so that two
# processes see together what one would (but for dropout and drop path).

class Batches(Dataset):
    """Item `step` is this process's part of that training step's batch: frames, labels, the random
    numbers of the colours, and with a grid of patches the mask's two lists of indices."""

    def __init__(self, clips, subset: Tensor, batch: int, recipe: Recipe, grid=None):
        self.clips, self.subset, self.batch = clips, subset, batch
        self.recipe, self.grid = recipe, grid

    def __getitem__(self, step: int):
        recipe, batch, share = self.recipe, self.batch, self.batch // WORLD
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_000_007 + step)
        rows = slice(RANK * share, (RANK + 1) * share)
        indices = self.clips_of(step)[rows]
        place = torch.rand(batch, 4, generator=generator)[rows]
        random = torch.rand(batch, 10, generator=generator)[rows]
        shift = torch.randn(batch, 3, generator=generator)[rows]
        frames = self.clips.load(indices, place)  # (rows, T, 3, H, W) uint8
        if recipe.flip:
            frames = flip(frames, random[:, 0])
        colours = torch.cat([random[:, 1:], shift], dim=1)  # (rows, 12)
        mask = ()
        if self.grid:
            mask = random_mask(recipe.mask, batch, self.grid, recipe.mask_ratio, generator)
            mask = split_mask(mask[rows])
        return frames, self.clips.labels[indices], colours, *mask

    def clips_of(self, step: int) -> Tensor:
        """(batch,) the step's part of an endless row of shuffles, every clip once in each."""
        n, start, end = len(self.subset), step * self.batch, (step + 1) * self.batch
        shuffles = []
        for epoch in range(start // n, (end - 1) // n + 1):
            generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + epoch)
            shuffles.append(torch.randperm(n, generator=generator))
        return self.subset[torch.cat(shuffles)[start % n :][: self.batch]]


# ---- Training -----------------------------------------------------------------------------------

def wait():
    """A barrier: wait until every process is here."""
    if WORLD > 1:
        dist.barrier()


def make_optimizers(model, recipe: Recipe, betas, layer_decay: float) -> dict:
    """-> {"adamw": optimizer}, and "muon" where the recipe says so. As the authors': no decay on
    norms, biases and the mask token; learning rates fall by `layer_decay` from the head down. A
    group's "scale" multiplies the learning rate of the step."""
    top, groups = len(model.videomae.blocks) + 1, {"adamw": [], "muon": []}
    for name, parameter in model.named_parameters():
        block = re.match(r"videomae\.blocks\.(\d+)\.", name)
        is_embedding = name.startswith("videomae.patch_embed")
        depth = int(block[1]) + 1 if block else 0 if is_embedding else top
        decay = 0.0 if parameter.ndim < 2 or name.endswith("mask_token") else recipe.weight_decay
        # A small matrix, such as a head of few classes, has too few directions to orthogonalize.
        is_muon = recipe.optimizer == "muon" and parameter.ndim == 2 and min(parameter.shape) >= 64
        scale = layer_decay ** (top - depth) * (recipe.muon_scale if is_muon else 1.0)
        group = dict(params=[parameter], weight_decay=decay, scale=scale)
        groups["muon" if is_muon else "adamw"].append(group)
    optimizers = {"adamw": torch.optim.AdamW(groups["adamw"], betas=betas, fused=True)}
    if groups["muon"]:
        optimizers["muon"] = Muon(groups["muon"])
    return optimizers


def learning_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up for a share of the steps, then half a cosine."""
    rise = max(1, round(warmup * steps))
    fall = max(0, step - rise) / max(1, steps - rise)
    return peak * min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * fall))


def compute_dtype(precision: str) -> torch.dtype:
    """What matrices are multiplied in."""
    if precision == "auto":
        precision = "fp32"
        if DEVICE.type == "cuda":
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
            precision = "bf16" if has_bf16 else "fp16"
    return DTYPES[precision]


def prepare(model, recipe: Recipe):
    """The model as it is called in training: on several GPUs, compiled, with less memory."""
    if recipe.activation_checkpointing:
        for block in model.videomae.blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if WORLD > 1:
        model = DistributedDataParallel(model)
    return torch.compile(model) if recipe.compile else model


def loss_of(model, recipe: Recipe, frames: Tensor, labels: Tensor, colours: Tensor, *mask):
    """The mean loss of a batch: with a mask, of its reconstruction, else of its classes."""
    pixel_values = normalize(frames)
    if mask:
        return model(pixel_values, mask).loss
    if recipe.colour_jitter:
        pixel_values = colour_jitter(pixel_values, colours)
    logits = model(pixel_values).logits.float()
    return F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)


def backward(model, batch, recipe: Recipe, scaler) -> Tensor:
    """The gradients of one batch, computed in parts -> its mean loss, over all processes."""
    dtype, total = compute_dtype(recipe.precision), 0.0
    for i, part in enumerate(zip(*(x.chunk(recipe.accumulate) for x in batch), strict=True)):
        part = [x.to(DEVICE, non_blocking=True) for x in part]
        # Processes exchange gradients once, after the last part.
        model.require_backward_grad_sync = i + 1 == recipe.accumulate
        with torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32):
            loss = loss_of(model, recipe, *part) / recipe.accumulate
        scaler.scale(loss).backward()
        total = total + loss.detach().float()
    if WORLD > 1:
        dist.all_reduce(total)
    return total / WORLD


def update(model, optimizers, scaler, rate: float, gradient_clip: float):
    """One step of every optimizer, with the gradients clipped."""
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
    norm = nn.utils.clip_grad_norm_(model.parameters(), gradient_clip)
    if not scaler.is_enabled() or norm.isfinite():  # in fp16 they all skip a step, or none does
        for optimizer in optimizers:
            scaler.step(optimizer)
    scaler.update()
    model.zero_grad()


def save_state(path: Path, parts: dict, losses: Tensor, step: int, seconds: float):
    """Everything that a killed run needs to resume exactly; losses go to metrics.jsonl as well."""
    if not all(x.isfinite().all() for x in (losses[:step], *parts["model"].parameters())):
        raise FloatingPointError(f"{path.stem}: a loss or a weight before step {step} is not "
                                 f"finite; the last {path} is still good")
    if RANK == 0:
        state = dict(losses=losses, step=step, seconds=seconds)
        state |= {name: part.state_dict() for name, part in parts.items()}
        write_whole(path, lambda file: torch.save(state, file))
        metrics = [m for m in read_metrics(path.parent) if m["stage"] != path.stem]
        metrics += [dict(stage=path.stem, step=step, loss=loss)
                    for step, loss in enumerate(losses[:step].tolist())]
        text = "".join(f"{json.dumps(m)}\n" for m in metrics)
        write_whole(path.with_name("metrics.jsonl"), lambda file: file.write(text.encode()))


def read_metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def train(folder: Path, stage: str, model, batches: Batches, recipe: Recipe, steps: int,
          base_lr: float, betas, layer_decay: float = 1.0, every_tenth=lambda model: None) -> dict:
    """Train a model in place -> its first and last loss, and the seconds it took.

    The whole state is saved to FOLDER/STAGE.pt every `checkpoint_every` steps and at the end; a run
    that finds it there resumes from it, a finished stage too. every_tenth(model) is called after
    each tenth of the steps.
    """
    peak, path = base_lr * batches.batch / 256, folder / f"{stage}.pt"
    optimizers = make_optimizers(model, recipe, betas, layer_decay)
    is_fp16 = compute_dtype(recipe.precision) == torch.float16
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=is_fp16)
    parts = dict(model=model, scaler=scaler, **optimizers)
    state = dict(step=0, seconds=0.0, losses=torch.zeros(steps, device=DEVICE))
    if path.exists():
        state = torch.load(path, map_location=DEVICE, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        print(f"{stage}: resumes at step {state['step']}")
    first, losses = state["step"], state["losses"]
    start, trained = time.perf_counter() - state["seconds"], prepare(model, recipe)

    workers = 0 if isinstance(batches.clips, SyntheticClips) else max(1, (os.cpu_count() or 1) // 4)
    loader = DataLoader(batches, batch_size=None, sampler=range(first, steps), num_workers=workers)
    bar = tqdm(loader, stage, steps - first, leave=False, disable=True if RANK else None)
    model.train()
    for step, batch in enumerate(bar, first):
        if step % recipe.checkpoint_every == 0:
            save_state(path, parts, losses, step, time.perf_counter() - start)
        torch.manual_seed(recipe.seed * 1_000_000_007 + step * WORLD + RANK)  # dropout, drop path
        losses[step] = backward(trained, batch, recipe, scaler)
        rate = learning_rate(step, steps, peak, recipe.warmup)
        update(model, optimizers.values(), scaler, rate, recipe.gradient_clip)
        if step % 10 == 0:  # not every step: to read a loss is to wait for the GPU
            bar.set_postfix_str(f"loss {losses[step]:.3f}")
        if (step + 1) * 10 // steps > step * 10 // steps and RANK == 0:
            every_tenth(model)
            model.train()
    seconds = time.perf_counter() - start
    save_state(path, parts, losses, steps, seconds)
    last = losses[-max(1, steps // 10) :].mean().item()
    print(f"{stage}: loss {losses[0]:.3f} -> {last:.3f} in {steps} steps, {seconds:.0f} s")
    return dict(loss_first=losses[0].item(), loss_last=last, seconds=round(seconds, 1))


# ---- The two stages -----------------------------------------------------------------------------

def pretrain(folder: Path, clips, config: VideoMAEConfig, recipe: Recipe, picture) -> tuple:
    """Stage 1, no labels: reconstruct masked patches -> the model and `train`'s result.
    picture(model) is called after each tenth of the steps."""
    torch.manual_seed(recipe.seed)
    model = VideoMAEForPreTraining(config).to(DEVICE)

    everything = torch.arange(len(clips.labels))
    batches = Batches(clips, everything, recipe.pretrain_batch, recipe, config.grid)
    return model, train(folder, "pretrain", model, batches, recipe, recipe.pretrain_steps,
                        recipe.pretrain_lr, betas=(0.9, 0.95), every_tenth=picture)


def finetune(folder: Path, stage: str, clips, subset: Tensor, config: VideoMAEConfig,
             recipe: Recipe, init: Path | None) -> tuple:
    """Stage 2: a classifier on the labelled clips `subset`, from the encoder in `init` or, where
    that is None, from scratch -> the model and `train`'s result."""
    torch.manual_seed(recipe.seed)
    names = dict(enumerate(clips.classes))
    changes = dict(num_labels=len(names), id2label=names, use_mean_pooling=True,
                   drop_path_rate=recipe.drop_path,
                   # For `predict`; transformers leaves such fields of a config alone.
                   extra=config.extra | {key: getattr(recipe, key) for key in SAMPLING})
    model = VideoMAEForVideoClassification(replace(config, **changes))
    steps, rate, layer_decay = recipe.scratch_steps, recipe.scratch_lr, 1.0
    if init is not None:
        steps, rate, layer_decay = recipe.finetune_steps, recipe.finetune_lr, recipe.layer_decay
        new_head = model.classifier  # also where an old one would fit
        model = VideoMAEForVideoClassification.from_pretrained(init, **changes)
        model.classifier = new_head
    batches = Batches(clips, subset, recipe.finetune_batch, recipe)
    return model, train(folder, stage, model.to(DEVICE), batches, recipe, steps, rate,
                        betas=(0.9, 0.999), layer_decay=layer_decay)


SAMPLING = ("fps", "views", "crops")


# ---- A run --------------------------------------------------------------------------------------

def load_data(config: VideoMAEConfig, recipe: Recipe) -> tuple:
    """Clips to train on, and clips held out."""
    if recipe.data == "synthetic":
        seed = HELD_OUT_SEEDS["val" if recipe.validate else "test"]
        test_clips = SyntheticClips(recipe.test_clips, config, seed)
        return SyntheticClips(recipe.unlabelled_clips, config, recipe.seed), test_clips
    if recipe.validate:
        raise ValueError("--validate: a folder has no validation clips")
    if RANK:
        wait()  # until the first process has decoded
    clips = load_videos(config, recipe)
    if RANK == 0:
        wait()
    return clips


def run(folder: Path, stage: str, recipe: Recipe, is_new: bool) -> dict:
    """Pretrain, probe, fine-tune, train from scratch -> what summary.json holds."""
    size = {"image_size": recipe.image_size} if recipe.image_size else {}
    config = VideoMAEConfig.preset(recipe.model, **size)
    if recipe.init:
        config = VideoMAEModel.from_pretrained(recipe.init).config
    random_mask(recipe.mask, 1, config.grid, recipe.mask_ratio)  # a wrong one, before the work
    parts = WORLD * recipe.accumulate
    if recipe.pretrain_batch % parts or recipe.finetune_batch % parts:
        raise ValueError(f"--pretrain-batch, --finetune-batch: got {recipe.pretrain_batch}, "
                         f"{recipe.finetune_batch}, expected multiples of {parts} (processes x "
                         "accumulate)")
    clips, test_clips = load_data(config, recipe)
    labelled = choose_labelled(clips.labels, recipe.labels_per_class, recipe.seed)
    print(f"{device_name()}; {len(clips.labels)} clips to train on, {len(labelled)} with labels of "
          f"{len(clips.classes)} classes; {len(test_clips.labels)} held out")
    settings = dict(stage=stage, recipe=asdict(recipe),
                    clips=[len(clips.labels), len(test_clips.labels)])
    path = folder / "settings.json"
    if not is_new and json.loads(path.read_text()) != settings:
        raise ValueError(f"--resume: {recipe.data} had other videos when {folder} was started")
    if is_new and RANK == 0:
        folder.mkdir(parents=True)  # an error where another run took the name meanwhile
        write_json(path, settings)

    def draw(model):
        report.draw_reconstruction(model, test_clips, recipe, folder / "reconstruction.gif")

    results, predictions = {}, {"majority": clips.labels.mode().values}
    pretrained = Path(recipe.init or folder / "pretrained")
    if not recipe.init:
        model, results["pretrain"] = pretrain(folder, clips, config, recipe, draw)
        save_model(model, pretrained)
    if stage != "pretrain":
        model, results["finetune"] = finetune(
            folder, "finetune", clips, labelled, config, recipe, pretrained)
        save_model(model, folder / "finetuned")
        predictions["finetune"] = probabilities(model, test_clips).argmax(dim=1)
        encoder = VideoMAEModel.from_pretrained(pretrained).to(DEVICE)
        predictions["linear_probe"] = linear_probe(encoder, clips, labelled, test_clips)
    if stage != "pretrain" and recipe.scratch_steps:
        model, results["scratch_full_time"] = finetune(
            folder, "scratch_full_time", clips, labelled, config, recipe, init=None)
        predictions["scratch_full_time"] = probabilities(model, test_clips).argmax(dim=1)

    summary = dict(
        device=device_name(), processes=WORLD, torch=torch.__version__, recipe=asdict(recipe),
        config=asdict(config), classes=clips.classes,
        seconds={way: result.pop("seconds") for way, result in results.items()})
    for way, result in results.items():
        summary |= {f"{way}_{key}": value for key, value in result.items()}
    for way, predicted in predictions.items():
        summary |= scores(way, predicted, test_clips.labels)
    return summary


def write_json(path: Path, content: dict):
    """A dict as JSON, whole or not at all."""
    write_whole(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def save_model(model, folder: Path):
    """A directory that `from_pretrained` reads, with the processor for it."""
    if RANK == 0:
        size = model.config.image_hw[0]
        shutil.rmtree(folder, ignore_errors=True)  # of this run, when it was killed before
        model.save_pretrained(folder)
        VideoMAEImageProcessor(size=size, crop_size=size, image_mean=IMAGENET_MEAN,
                               image_std=IMAGENET_STD).save_pretrained(folder)
    wait()


def device_name() -> str:
    """For people."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{DEVICE.type}, {torch.get_num_threads()} threads"


# ---- The command line ---------------------------------------------------------------------------

def predict(videos: list[str], recipe: Recipe, changes: dict):
    """Print the five most likely classes of each video, sampled as in training."""
    model = VideoMAEForVideoClassification.from_pretrained(recipe.init).to(DEVICE)
    config = model.config
    names = config.id2label or {i: f"LABEL_{i}" for i in range(config.num_labels)}
    trained = {key: config.extra[key] for key in SAMPLING if key in config.extra}
    recipe = replace(recipe, **trained | changes)
    for video in videos:
        shares = probabilities(model, LongVideo(Path(video), config, recipe))[0]
        likely = shares.topk(min(5, len(names)))
        print(video)
        for share, i in zip(likely.values.tolist(), likely.indices.tolist(), strict=True):
            print(f"  {100 * share:5.1f} %  {names[i]}")


def parse_arguments(argv=None) -> tuple[argparse.Namespace, dict]:
    """The command line -> its arguments, and the fields of a recipe that it changes."""
    parser = argparse.ArgumentParser(
        description=__doc__, usage="train_tiny.py [stage] [options] [VIDEO ...]",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", default="all",
                        choices=["all", "pretrain", "finetune", "predict"])
    parser.add_argument("videos", nargs="*", metavar="VIDEO", help="for predict")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run that was interrupted")
    parser.add_argument("--recipe", choices=RECIPES,
                        help="synthetic for synthetic clips, else laptop")
    for f in fields(Recipe):
        defaults = dict.fromkeys(str(getattr(recipe, f.name)) for recipe in RECIPES.values())
        kind = dict(type=f.type, metavar="X")
        if f.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=argparse.SUPPRESS,
                            help=" / ".join(defaults), **kind)
    args = parser.parse_intermixed_args(argv)  # videos may come after the options
    changes = {f.name: getattr(args, f.name) for f in fields(Recipe) if f.name in args}
    if args.resume and (changes or args.recipe or args.stage != "all"):
        raise ValueError("--resume: takes no other options; the run keeps its own")
    if args.stage in ("finetune", "predict") and not changes.get("init"):
        raise ValueError(f"--init: {args.stage} needs a model, for instance runs/synthetic-1")
    if "init" in changes and (changes.keys() & {"model", "image_size"} or args.stage == "pretrain"):
        raise ValueError("--init: its weights say the model and its size; nothing is pretrained")
    if (args.stage == "predict") != bool(args.videos):
        raise ValueError(f"VIDEO: got {len(args.videos)}; predict needs one or more, others none")
    return args, changes


def output_folder(recipe: Recipe) -> Path:
    """runs/NAME, or runs/DATA-1, -2, ...: a folder that is not there yet."""
    if recipe.name:
        folder = Path("runs") / recipe.name
        if folder.exists():
            raise ValueError(f"--name: {folder} exists already, expected another name")
        return folder
    data = Path(recipe.data).resolve().name
    return next(path for i in count(1) if not (path := Path("runs") / f"{data}-{i}").exists())


def main(argv=None):
    """The command line; see the top of the file."""
    args, changes = parse_arguments(argv)
    is_synthetic = changes.get("data", "synthetic") == "synthetic" and args.stage != "predict"
    name = args.recipe or ("synthetic" if is_synthetic else "laptop")
    recipe = replace(RECIPES[name], **changes)
    if args.resume:
        settings = json.loads(Path(args.resume, "settings.json").read_text())
        args.stage, recipe = settings["stage"], Recipe(**settings["recipe"])
    if recipe.init:  # a run of this script: the model in it
        model = "finetuned" if args.stage == "predict" else "pretrained"
        found = Path(recipe.init, model)
        recipe = replace(recipe, init=str(found) if found.exists() else recipe.init)
    else:  # within a run, a dropped decoder and a new head are expected
        logging.getLogger("videomae").setLevel(logging.ERROR)
    if args.stage == "predict":
        return predict(args.videos, recipe, changes)
    folder = Path(args.resume) if args.resume else output_folder(recipe)
    if WORLD > 1:
        if DEVICE.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        # The others wait while the first one decodes, for hours if need be.
        dist.init_process_group(timeout=timedelta(days=1))
        wait()  # until every process has looked for a free name
    print(f"output: {folder}/")
    path = folder / "summary.json"
    try:  # a finished run is not run again
        if path.exists():
            summary = json.loads(path.read_text())
        else:
            summary = run(folder, args.stage, recipe, is_new=not args.resume)
    except KeyboardInterrupt:
        started = (folder / "settings.json").exists()  # else it was still decoding, into the cache
        how = f"python train_tiny.py --resume {folder}" if started else "the same command again"
        print(f"\nInterrupted. To go on: {how}")
        raise SystemExit(130) from None
    text = report.table([summary])
    if RANK == 0:
        report.draw_curves(read_metrics(folder), folder / "curves.png")
        (folder / "table.md").write_text(text + "\n")
        write_json(path, summary)
        for file in (*folder.glob("*.pt"), *folder.glob("*.tmp")):
            file.unlink()  # what only an interrupted run needs
    print(f"\n{text}\n\nEverything is in {folder}/")


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    if RANK:
        sys.stdout = open(os.devnull, "w")  # only the first process speaks
    try:
        main()
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        sys.exit(f"train_tiny.py: {error}")
