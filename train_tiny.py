"""Train VideoMAE: pretrain without labels, fine-tune on a few, compare with training from scratch.

    python train_tiny.py                   synthetic clips, no download; minutes on two CPU cores
    python train_tiny.py --data FOLDER     your videos, FOLDER/Class/*.mp4; half an hour, or on
                                           a GPU about 20 minutes (estimated)
    torchrun --nproc_per_node=2 train_tiny.py --data FOLDER     several GPUs

To start from published weights, with the authors' optimizer, add `--init MCG-NJU/videomae-base
--optimizer adamw --layer-decay 0.75`.

A run's results, pictures and models go to a folder in runs/ that is named after its options. The
same command resumes an interrupted run and shows a finished one; to train again, for instance after
a change to the code, pass another --name. For a data set of your own, see tiny/__init__.py.
"""
import json
import logging
import os
import re
import shutil
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from checkpoints import processor_file, write_atomic, write_new
from tiny import report
from tiny.augment import colour_jitter
from tiny.evaluate import (
    accuracies,
    choose_labelled,
    linear_probe,
    probabilities,
    start_from_probe,
)
from tiny.muon import Muon
from tiny.options import read_options
from tiny.synthetic import TEST_SEED, SyntheticClips
from videomae import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
    normalize,
    random_mask,
    split_mask,
)

BEFORE_FALL = "before_fall.state"  # the file from which --extend starts
DEVICE = torch.device("cpu")  # of a run; `fit` trains where the model is
if torch.accelerator.is_available():
    DEVICE = torch.accelerator.current_accelerator()


# ---- The training loop --------------------------------------------------------------------------

def fit(model, batches, loss_of, steps: int, lr: float, *, optimizer="muon", betas=(0.9, 0.95),
        layer_decay=1.0, fall=1.0, seed=0, workers=0, path=None, save_every=100) -> Tensor:
    """Train a model in place -> the loss of each step, (steps,).

    batches[step] is a tuple of CPU tensors, see Batches; loss_of(model, *batch) returns their mean
    loss. lr is the peak, which falls to 0 over the last `fall` of the steps. With a path, the state
    is saved there every `save_every` steps, and the same call resumes from it, on a CPU exactly.
    The state before the fall is kept beside it, from which a longer run can start.
    """
    device, (rank, world) = next(model.parameters()).device, processes()
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    optimizers = make_optimizers(model, optimizer, betas, layer_decay)
    parts = dict(model=model, **optimizers)
    first, losses, start = 0, torch.zeros(steps, device=device), time.perf_counter()
    if path and path.exists():
        state = torch.load(path, map_location=device, weights_only=True)
        if state["step"] > steps:
            raise ValueError(f"{path}: got {state['step']} steps, expected at most {steps}")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first, start = state["step"], start - state["seconds"]
        losses[:first] = state["losses"]
        print(f"{path.stem}: resumes after step {first:,}")

    loader = DataLoader(batches, batch_size=None, sampler=range(first, steps), num_workers=workers)
    bar = tqdm(loader, path and path.stem, leave=False, disable=True if rank else None)
    model.train()
    for step, batch in enumerate(bar, first):
        torch.manual_seed(hash((seed, step, rank)))  # for crops, masks, colours, dropout
        batch = [x.to(device, non_blocking=True) for x in batch]
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = loss_of(model, *batch)
        loss.backward()
        losses[step] = loss.detach()
        if world > 1:
            average([losses[step], *(x.grad for x in model.parameters() if x.grad is not None)])
        update(model, optimizers.values(), learning_rate(step, steps, lr, fall))

        done, before_fall = step + 1, round((1 - fall) * steps)
        if done % save_every == 0 or done in (before_fall, steps):
            bar.set_postfix_str(f"loss {loss:.3f}")
            check_finite(done, losses, *model.parameters())
            if path and rank == 0:
                state = {name: part.state_dict() for name, part in parts.items()}
                state |= dict(step=done, losses=losses[:done].clone(),
                              seconds=time.perf_counter() - start)
                write_atomic(path, partial(torch.save, state))
                if done == before_fall:
                    write_atomic(path.with_name(BEFORE_FALL), path.read_bytes())
    return losses.cpu()


def update(model, optimizers, rate: float):
    """One step of every optimizer, with the gradients clipped."""
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        optimizer.step()
    model.zero_grad()


def make_optimizers(model, kind: str, betas, layer_decay: float) -> dict:
    """-> {"adamw": optimizer} and, if kind is "muon", also {"muon": optimizer} for matrices.

    As in the authors' code, weights decay by 0.05, but not norms, biases and the mask token, and
    learning rates fall by a factor of `layer_decay` per layer, from the head down. A group's rate
    is the step's rate times its "scale".
    """
    pattern, names = r"encoder\.blocks\.(\d+)\.", [name for name, _ in model.named_parameters()]
    top = len(set(re.findall(pattern, " ".join(names)))) + 1
    groups = {"adamw": [], "muon": []}
    for name, x in model.named_parameters():
        block = re.search(pattern, name)
        depth = int(block[1]) + 1 if block else 0 if "patch_embed" in name else top
        decay = 0.05 if x.ndim > 1 and not name.endswith("mask_token") else 0.0
        # A small matrix, such as a head for few classes, has too few directions to orthogonalize.
        is_muon = kind == "muon" and x.ndim == 2 and min(x.shape) >= 64
        scale = layer_decay ** (top - depth) * (3.0 if is_muon else 1.0)
        group = dict(params=[x], weight_decay=decay, scale=scale)
        groups["muon" if is_muon else "adamw"].append(group)
    kinds = {"adamw": partial(torch.optim.AdamW, betas=betas, fused=True), "muon": Muon}
    return {name: kinds[name](group) for name, group in groups.items() if group}


def learning_rate(step: int, steps: int, peak: float, fall: float) -> float:
    """Rise over 5 % of the steps, at most 100; hold; fall over the last share `fall` of them."""
    rise = min(100, max(1, round(0.05 * steps)))
    return peak * min((step + 1) / rise, 1, (steps - step) / (fall * steps))


def check_finite(step: int, *tensors: Tensor):
    """Raise before a broken state is saved."""
    if not all(x.isfinite().all() for x in tensors):
        raise FloatingPointError(f"a loss or a weight is not finite after {step} steps; try a "
                                 "lower learning rate")


def processes() -> tuple[int, int]:
    """This process's rank, and the number of processes; torchrun starts several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average(tensors: list[Tensor]):
    """Replace each tensor by its mean over the processes."""
    for x in tensors:
        dist.all_reduce(x.div_(dist.get_world_size()))


# ---- Batches and losses -------------------------------------------------------------------------

class Batches(Dataset):
    """Item `step` is this process's part of the step's batch, (frames, labels). All of it follows
    from seed, step and process, so a resumed run repeats it."""

    def __init__(self, clips, subset: Tensor, batch: int, seed=0, rank=0, world=1):
        self.clips, self.subset, self.batch = clips, subset, batch
        self.seed, self.rank, self.world = seed, rank, world

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        indices = self.indices(step)
        torch.manual_seed(hash((self.seed, step, self.rank, 0)))  # not the seed that `fit` uses
        return self.clips.train_clips(indices), self.clips.labels[indices]

    def indices(self, step: int) -> Tensor:
        """(batch / world,) from an endless sequence of shuffles, each holding every clip once."""
        n, start, end = len(self.subset), step * self.batch, (step + 1) * self.batch
        shuffles = []
        for epoch in range(start // n, (end - 1) // n + 1):
            torch.manual_seed(hash((self.seed, epoch)))
            shuffles.append(torch.randperm(n))
        rows = torch.cat(shuffles)[start % n :][: self.batch]
        return self.subset[rows[self.rank :: self.world]]


def reconstruction_loss(model, frames: Tensor, labels: Tensor, *, grid, mask: str,
                        mask_ratio: float, predict_every=1, prepare=normalize) -> Tensor:
    """Stage 1: the error of the predicted patches. Labels are not used."""
    pixel_values = prepare(frames)
    bool_masked_pos = random_mask(mask, len(frames), grid, mask_ratio)
    visible, masked = split_mask(bool_masked_pos, pixel_values.device)
    return model(pixel_values, (visible, running_cell(masked, grid, predict_every))).loss


def running_cell(masked: Tensor, grid, every: int) -> Tensor:
    """masked (B, N_mask) -> (B, about N_mask / every): one of so many masked patches, the next one
    at each time step. Neighbours are alike, so predicting all of them teaches little more, and
    most of a small model's time goes into it (VideoMAE V2, "dual masking")."""
    per_step = masked.shape[1] // grid[0]  # exact for tubes
    i = torch.arange(masked.shape[1])
    chosen = i[(i % per_step + i // per_step) % every == 0]
    return masked[:, chosen.to(masked.device)]


def classification_loss(model, frames: Tensor, labels: Tensor, *, jitter=False,
                        label_smoothing=0.0, prepare=normalize) -> Tensor:
    """Stage 2: cross-entropy."""
    pixel_values = prepare(frames)
    if jitter:
        pixel_values = colour_jitter(pixel_values)
    logits = model(pixel_values).logits.float()
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)


# ---- Recipes ------------------------------------------------------------------------------------

@dataclass
class Recipe:
    """The settings of a run. The defaults, for synthetic clips, were chosen on test clips of other
    seeds. Muon reaches the same loss in far fewer steps than AdamW."""

    # Data
    data: str = ""  # a folder of videos, FOLDER/Class/*.mp4
    labels_per_class: int = 1  # labelled clips in each class; 0 = all clips
    init: str = ""  # skip pretraining and start from these weights: a directory or hub id
    seed: int = 0  # random seed for clips, weights, batches and the choice of labels
    name: str = ""  # name of the run's folder in runs/ (default: made from the options)

    # Synthetic clips, without --data
    unlabelled_clips: int = 10_000  # clips to train on, at least 1
    test_clips: int = 1024  # held-out clips to test on, at least 1
    test_seed: int = TEST_SEED  # seed of the test clips; use another to choose settings

    # Videos, with --data
    fps: float = 6.25  # frames per second of a clip, at least 0.01; UCF101's videos have 25
    views: int = 1  # clips per test video, at least 1, whose predictions are averaged
    flip: bool = False  # mirror half of the training clips; avoid if left and right matter
    split: int = 0  # which of UCF101's three official splits to follow; 0 = the first

    # Model, without --init
    model: str = "tiny"  # a preset of VideoMAEConfig
    image_size: int = 0  # pixels; 0 = the preset's

    # Pretraining, without --init
    mask: Literal["tube", "random", "frame"] = "tube"  # tube: the same at every step; frame: steps
    mask_ratio: float = 0.75  # share that is masked, rounded down to whole tubes or steps
    predict_every: int = 2  # predict one of so many masked patches, at least 1
    extend: str = ""  # go on from a finished run's folder, for --pretrain-steps steps in all
    pretrain_steps: int = 3200  # training steps, at least 1
    pretrain_batch: int = 32  # clips per step, across all processes, at least 1
    pretrain_lr: float = 7.5e-4  # peak learning rate; 1.5e-3 suits --mask frame

    # Fine-tuning, and training from scratch
    finetune_steps: int = 600  # training steps; 0 = skip
    finetune_lr: float = 5e-4  # peak learning rate
    scratch_steps: int = 1900  # training steps from scratch; 0 = skip
    scratch_lr: float = 2.5e-4  # peak learning rate from scratch
    finetune_batch: int = 16  # clips per step, across all processes, at least 1
    probe_first: bool = False  # start both from a linear probe instead of a new head
    layer_decay: float = 1.0  # a layer's learning rate / the next one's; fine-tuning only
    drop_path: float = 0.0  # share of clips that skip a branch of the last block, at most 0.99
    label_smoothing: float = 0.0  # share of each label spread over all classes, at most 1
    colour_jitter: bool = True  # randomize colours, so they do not give a clip's label away

    # Optimization
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: Muon for matrices, AdamW for the rest
    save_every: int = 100  # steps between saved states, at least 1, from which a run resumes


# For --data, on two CPU cores in half an hour. Chosen on held-out training clips of UCF101, but
# for predict_every, which was not compared there.
VIDEOS = Recipe(
    labels_per_class=0, views=5, flip=True, image_size=64, mask_ratio=0.9,
    pretrain_steps=3000, pretrain_lr=1e-3, finetune_steps=600, probe_first=True,
    scratch_steps=1000, scratch_lr=5e-4,
    drop_path=0.1, label_smoothing=0.1, colour_jitter=False,
)
# On a GPU with 8 GB; estimated to take 20 minutes, see docs/results.md.
VIDEOS_ON_GPU = replace(
    VIDEOS, model="laptop", image_size=112, pretrain_steps=8000, pretrain_batch=64,
    finetune_steps=2000, scratch_steps=6000, finetune_batch=32,
)


def read_command(argv: list[str]) -> tuple[Recipe, Path]:
    """The command line -> the settings of a run, and its folder."""
    defaults = Recipe()
    if any(text.startswith("--data") for text in argv):
        defaults = VIDEOS_ON_GPU if DEVICE.type == "cuda" else VIDEOS
    recipe, changed = read_options(defaults, argv, __doc__)
    if changed.pop("data", None):
        recipe.data = str(Path(recipe.data))  # without a slash at its end
    texts = [Path(recipe.data or "synthetic").resolve().name]
    texts += [f"{name}={value}" for name, value in changed.items()]
    name = recipe.name or re.sub(r"[^\w.,=+-]+", "-", ",".join(texts))[:200]
    return recipe, Path("runs", name)


# ---- A run --------------------------------------------------------------------------------------

def run(folder: Path, recipe: Recipe, state: dict, load):
    """Pretrain, test a linear probe, fine-tune, and train from scratch. After an interruption, the
    same call repeats all of it, with `fit` resuming where it stopped."""
    config = make_config(recipe)
    masked = random_mask(recipe.mask, 1, config.grid, recipe.mask_ratio)  # refuses a bad ratio
    clips, test_clips = load(recipe, config)
    labelled = choose_labelled(clips.labels, recipe.labels_per_class, recipe.seed)
    counts = dict(train=len(clips.labels), labelled=len(labelled), classes=len(clips.classes),
                  test=len(test_clips.labels))
    print("{train:,} training clips ({labelled:,} labelled, {classes} classes), {test:,} test clips"
          .format(**counts))
    if state.setdefault("clips", counts) != counts:
        raise ValueError(f"--name: {folder} was started with other clips; pass another name")
    write_results(folder, state)  # so that an interrupted run resumes with these settings only
    # With the run's own weights, a dropped decoder and a new head are expected.
    logging.getLogger("videomae").setLevel("WARNING" if recipe.init else "ERROR")
    results, pretrained = state["results"], recipe.init or folder / "pretrained"

    # Stage 1, without labels: reconstruct masked patches.
    if not recipe.init:
        print(f"pretraining masks {masked.float().mean():.0%} of a clip ({recipe.mask})")
        torch.manual_seed(recipe.seed)
        model = VideoMAEForPreTraining(config)
        loss_of = partial(reconstruction_loss, grid=config.grid, mask=recipe.mask,
                          mask_ratio=recipe.mask_ratio, predict_every=recipe.predict_every)
        path = folder / "pretraining.pt"
        if recipe.extend and not path.exists():
            shutil.copy(Path(recipe.extend, BEFORE_FALL), path)
        results["pretraining"] = train(
            model, clips, torch.arange(len(clips.labels)), recipe.pretrain_batch, loss_of,
            recipe.pretrain_steps, recipe.pretrain_lr, recipe, fall=0.2, path=path)
        save(model, pretrained)
        if processes()[0] == 0:
            report.draw_reconstruction(model, test_clips, recipe.mask, recipe.mask_ratio,
                                       folder / "reconstruction.gif")
    if len(clips.classes) < 2:
        print("These videos have no classes, so the run ends after pretraining. To fine-tune on "
              f"others: --data FOLDER --init {pretrained}")
        return

    encoder = VideoMAEModel.from_pretrained(pretrained).to(DEVICE)
    results["linear probe"] = linear_probe(encoder, clips, labelled, test_clips)
    results["majority class"] = accuracies(clips.labels.mode().values, test_clips.labels)

    # Stage 2: a classifier on the labelled clips, from those weights, and from scratch.
    changes = dict(use_mean_pooling=True, drop_path_rate=recipe.drop_path,
                   num_labels=len(clips.classes), id2label=dict(enumerate(clips.classes)),
                   extra=config.extra | dict(fps=recipe.fps, views=recipe.views))  # for predict
    loss_of = partial(classification_loss, jitter=recipe.colour_jitter,
                      label_smoothing=recipe.label_smoothing)
    for way, steps, lr, layer_decay in (
        ("fine-tuning", recipe.finetune_steps, recipe.finetune_lr, recipe.layer_decay),
        ("from scratch", recipe.scratch_steps, recipe.scratch_lr, 1.0),
    ):
        if steps == 0:
            continue
        torch.manual_seed(recipe.seed)
        if way == "fine-tuning":
            model = VideoMAEForVideoClassification.from_pretrained(pretrained, **changes)
        else:
            model = VideoMAEForVideoClassification(replace(config, **changes))
        if recipe.probe_first:
            start_from_probe(model.to(DEVICE), clips, labelled)
        result = train(model, clips, labelled, recipe.finetune_batch, loss_of, steps, lr, recipe,
                       betas=(0.9, 0.999), layer_decay=layer_decay, path=folder / f"{way}.pt")
        predictions = probabilities(model, test_clips).argmax(dim=1)
        results[way] = accuracies(predictions, test_clips.labels) | result
        print(f"{way}: top-1 {results[way]['top1']:.1f} %")
        if way == "fine-tuning":
            save(model, folder / "finetuned")


def train(model, clips, subset: Tensor, batch: int, loss_of, steps: int, lr: float, recipe: Recipe,
          path: Path, **options) -> dict:
    """`fit`, with the settings that both stages share -> its losses and seconds."""
    workers = max(1, (os.cpu_count() or 1) // 4) if recipe.data else 0
    batches = Batches(clips, subset, batch, recipe.seed, *processes())
    losses = fit(model.to(DEVICE), batches, partial(loss_of, prepare=clips.prepare), steps, lr,
                 optimizer=recipe.optimizer, seed=recipe.seed, save_every=recipe.save_every,
                 workers=workers, path=path, **options)
    wait()  # until the first process has saved
    seconds = torch.load(path, map_location="cpu", weights_only=True)["seconds"]
    print(f"{path.stem}: loss {losses[0]:.3f} -> {losses[-10:].mean():.3f} in {steps:,} steps, "
          f"{seconds:.0f} s")
    return dict(seconds=round(seconds, 1), losses=losses.tolist())


def save(model, folder: Path):
    """Save a model as a directory for transformers."""
    if processes()[0] == 0:
        shutil.rmtree(folder, ignore_errors=True)  # an interrupted run may have saved it
        model.save_pretrained(folder)
        write_new(folder, processor_file(model.config))
    wait()


def write_results(folder: Path, state: dict):
    """Write the state to results.json."""
    if processes()[0] == 0:
        text = re.sub(r",\s+(?=[\d.-])", ", ", json.dumps(state, indent=1))  # numbers side by side
        write_atomic(folder / "results.json", text.encode())


def make_config(recipe: Recipe) -> VideoMAEConfig:
    """The model's config. What cannot work is refused here, before videos are decoded."""
    size = {"image_size": recipe.image_size} if recipe.image_size else {}
    config = VideoMAEConfig.preset(recipe.model, **size)
    if recipe.init:
        config = VideoMAEModel.from_pretrained(recipe.init).config
    if recipe.extend:
        before = json.loads(Path(recipe.extend, "results.json").read_text())["recipe"]
        later = ("name", "extend", "pretrain_steps", "save_every")
        for name, value in asdict(recipe).items():
            if before.get(name) != value and name not in later:
                raise ValueError(f"--{name.replace('_', '-')}: got {value}, expected "
                                 f"{before.get(name)}, as in {recipe.extend}")
    for batch in (recipe.pretrain_batch, recipe.finetune_batch):
        if batch % processes()[1]:
            raise ValueError(f"--pretrain-batch, --finetune-batch: got {batch}, expected a "
                             f"multiple of {processes()[1]} processes")
    return config


def load_clips(recipe: Recipe, config: VideoMAEConfig) -> tuple:
    """Clips to train on, and clips to test on."""
    if not recipe.data:
        return (SyntheticClips(recipe.unlabelled_clips, config, recipe.seed),
                SyntheticClips(recipe.test_clips, config, recipe.test_seed))
    from tiny.videos import load_videos  # needs PyAV

    if processes()[0] > 0:
        wait()  # until the first process has decoded
    clips = load_videos(recipe.data, config, recipe.fps, recipe.split, recipe.views, recipe.flip)
    if processes()[0] == 0:
        wait()
    return clips


def wait():
    """Wait until every process gets here."""
    if dist.is_initialized():
        dist.barrier()


def main(argv=None, load=load_clips):
    """Train, or show what has been trained; see the top of the file. load(recipe, config) returns
    the clips to train on and those to test on."""
    recipe, folder = read_command(sys.argv[1:] if argv is None else argv)
    if recipe.data and not Path(recipe.data).is_dir():
        raise ValueError(f"{recipe.data}: no such folder")
    if "RANK" in os.environ:  # started by torchrun
        if DEVICE.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(timeout=timedelta(days=1))  # one decodes while the others wait

    path, table = folder / "results.json", folder / "table.md"
    state = dict(recipe=asdict(recipe), results={}, processes=processes()[1],
                 device=torch.cuda.get_device_name() if DEVICE.type == "cuda" else str(DEVICE),
                 threads=torch.get_num_threads(), torch=torch.__version__)
    if path.exists():
        state = json.loads(path.read_text())
    if state["recipe"] != asdict(recipe):
        raise ValueError(f"--name: {folder} holds a run with other settings; pass another name")
    print(f"{folder}/ on {state['device']}" + ", finished before" * table.exists())
    wait()  # until every process has read the state
    if not table.exists():  # else the run is finished
        run(folder, recipe, state, load)
        write_results(folder, state)
        if processes()[0] == 0:
            report.draw_curves(state["results"], folder / "curves.png")
            for file in folder.glob("*.pt"):
                file.unlink()  # what only an interrupted run needs
            table.write_text(report.table([state]) + "\n")
    print(f"\n{report.table([state])}\n\nEverything is in {folder}/")


if __name__ == "__main__":
    # Not every terminal can show every file's name.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w")  # only the first process speaks
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command resumes it.")
    except (ValueError, FloatingPointError, OSError, ImportError) as error:
        sys.exit(f"train_tiny.py: {error}")
