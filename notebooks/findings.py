"""The paper's claims tried on moving textures (textures.py): the runs behind 02_findings.ipynb.

    python notebooks/findings.py                    every run that findings.json lacks: 3 seeds, 69
                                                    runs in all, an hour and a half on two cores
    python notebooks/findings.py "mask" --seeds 0   one experiment, one seed
    python notebooks/findings.py --list             the experiments, and how many runs each has

A run pretrains (0 steps: trains from scratch), fine-tunes on 10 labels per class and is tested on
1,024 held-out clips. EXPERIMENTS lists what varies, BASE has the other settings, and the synthetic
recipe of train_tiny.py all the rest. Runs are added to findings.json one by one, so it can be
interrupted.
"""
import argparse
import json
import logging
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from textures import (  # noqa: E402
    HELD_OUT_SEEDS,
    MOTIONS,
    SyntheticClips,
    make_textures,
    move_textures,
)

import train_tiny  # noqa: E402
from checkpoints import write_whole  # noqa: E402
from tiny.evaluate import choose_labelled, linear_probe, percent, probabilities  # noqa: E402
from videomae import VideoMAEConfig  # noqa: E402

RESULTS = Path(__file__).with_name("findings.json")
BASE = dict(
    data="motion", pretrain_on="the same", mask="tube", mask_ratio=0.75, norm_pix_loss=True,
    decoder_layers=1, positions="separable", pretrain_steps=1000, unlabelled_clips=10_000,
    labels_per_class=10, finetune_steps=300,
)
# The 69 runs were made before the recipe had Muon.
ADAMW = dict(optimizer="adamw", pretrain_lr=5.3e-3, finetune_lr=8e-3, scratch_lr=4e-3)
MASKS = ("tube", "random", "frame")
DOMAINS = ("the same", "other clips of the kind", "rough textures", "translations")
EXPERIMENTS = {  # name: the settings compared, each as what differs from BASE
    # These ratios mask 8, 12, 14 and 15 of 16 spatial positions.
    "mask ratio": [dict(mask_ratio=ratio) for ratio in (0.5, 0.75, 0.9, 0.95)],
    "mask": [dict(mask=kind) for kind in MASKS],
    "mask, label is what is seen": [*(dict(data="look", mask=kind) for kind in MASKS),
                                    dict(data="look", pretrain_steps=0)],
    "target": [dict(norm_pix_loss=norm) for norm in (True, False)],
    "decoder depth": [dict(decoder_layers=depth) for depth in (1, 2, 4)],
    "pretraining steps": [dict(pretrain_steps=steps) for steps in (0, 250, 500, 1000, 2000)],
    "unlabelled clips": [dict(unlabelled_clips=count) for count in (100, 1000, 10_000)],
    "pretrained on": [dict(pretrain_on=domain) for domain in DOMAINS],
    "positions": [dict(positions=kind) for kind in ("separable", "sinusoid")],
}


# --------------------------------------------------------------------------------------------------
# Clips


@dataclass
class Clips:
    """Clips with labels of our own: what train_tiny.py asks of a data set."""

    clips: Tensor  # (count, T, 3, H, W) uint8
    labels: Tensor  # (count,) int64
    classes: tuple[str, ...]
    num_views: int = 1

    def load(self, indices: Tensor, random=None, view: int = 0) -> Tensor:
        """indices (B,) -> (B, T, 3, H, W) uint8."""
        return self.clips[indices]


def noise(count: int, radius: Tensor, alpha, generator: torch.Generator) -> Tensor:
    """Textures (count, 3, size, size) of amplitude 1 / radius^alpha; radius (size, size) of each
    frequency."""
    radius[0, 0] = torch.inf  # so that the mean is 0
    noise = torch.randn(count, 3, *radius.shape, generator=generator)
    textures = torch.fft.ifft2(torch.fft.fft2(noise) * radius**-alpha).real
    return textures / textures.std(dim=(2, 3), keepdim=True)


def move(textures: Tensor, motions: Tensor, config: VideoMAEConfig, generator) -> Tensor:
    """A clip for each of the motions (count,) -> (count, T, 3, H, W) uint8."""
    return torch.cat([
        move_textures(textures, part, config.num_frames, config.image_size, generator)
        for part in motions.split(250)
    ])


def look_clips(count: int, config: VideoMAEConfig, seed: int) -> Clips:
    """The label is what is seen: in which of eight directions the texture is stretched. The motion,
    a translation or a zoom, does not depend on it."""
    generator, clips = torch.Generator().manual_seed(seed), []
    frequency = torch.fft.fftfreq(2 * config.image_size)
    for k in range(8):
        angle = torch.tensor(torch.pi * k / 8)
        along = frequency * angle.cos() + frequency[:, None] * angle.sin()
        across = frequency[:, None] * angle.cos() - frequency * angle.sin()
        textures = noise(64, torch.hypot(2 * along, across / 2), 2.75, generator)
        chosen = torch.randint(6, (count // 8,), generator=generator)
        clips.append(move(textures, torch.tensor([0, 1, 2, 3, 6, 7])[chosen], config, generator))
    order = torch.randperm(count // 8 * 8, generator=generator)
    labels = torch.arange(8).repeat_interleave(count // 8)
    classes = tuple(f"{180 * k / 8:.0f} degrees" for k in range(8))
    return Clips(torch.cat(clips)[order], labels[order], classes)


def other_clips(domain: str, count: int, config: VideoMAEConfig, seed: int):
    """Clips to pretrain on that differ from those fine-tuned on; see DOMAINS."""
    if domain == "other clips of the kind":
        return SyntheticClips(count, config, seed)
    generator, size = torch.Generator().manual_seed(seed), 2 * config.image_size
    motions = torch.randint(4 if domain == "translations" else 8, (count,), generator=generator)
    if domain == "translations":
        textures = make_textures(512, size, generator)
    else:
        alpha = 1.5 + 0.5 * torch.rand(512, 1, 1, 1, generator=generator)  # there: 2.5 to 3
        frequency = torch.fft.fftfreq(size)
        textures = noise(512, torch.hypot(frequency[:, None], frequency), alpha, generator)
    return Clips(move(textures, motions, config, generator), motions, MOTIONS)


# --------------------------------------------------------------------------------------------------
# Runs


def run_once(job: tuple[dict, int]) -> dict:
    """(settings, seed): pretrain, probe, fine-tune -> the settings and what came out of it, top-1
    in percent. With no pretraining steps: from scratch."""
    settings, seed = job
    start = time.perf_counter()
    torch.set_num_threads(1)
    train_tiny.DEVICE = torch.device("cpu")
    logging.getLogger("videomae").setLevel(logging.ERROR)  # dropped decoders, new heads
    same = {name: settings[name] for name in
            ("mask", "mask_ratio", "pretrain_steps", "finetune_steps", "unlabelled_clips")}
    recipe = replace(train_tiny.RECIPES["synthetic"], seed=seed, **same | ADAMW | dict(
        pretrain_steps=max(1, settings["pretrain_steps"]),
        scratch_steps=settings["finetune_steps"]))
    config = VideoMAEConfig.preset(
        "tiny", position_embedding=settings["positions"], norm_pix_loss=settings["norm_pix_loss"],
        decoder_num_hidden_layers=settings["decoder_layers"])
    make_clips = {"motion": SyntheticClips, "look": look_clips}[settings["data"]]
    clips, test = make_clips(10_000, config, seed), make_clips(1024, config, HELD_OUT_SEEDS["test"])
    few, many = (choose_labelled(clips.labels, count, seed)
                 for count in (settings["labels_per_class"], 100))
    result = dict(settings, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        folder, encoder = Path(folder), None
        if settings["pretrain_steps"]:
            count, domain = settings["unlabelled_clips"], settings["pretrain_on"]
            unlabelled = clips
            if domain != "the same":
                unlabelled = other_clips(domain, count, config, seed + 100)
            unlabelled = Clips(unlabelled.clips[:count], unlabelled.labels[:count], clips.classes)
            model, trained = train_tiny.pretrain(folder, unlabelled, config, recipe, lambda _: None)
            encoder = folder / "pretrained"
            model.save_pretrained(encoder)
            predictions = linear_probe(model.eval().videomae, clips, many, test)
            result |= dict(loss=trained["loss_last"],
                           probe_800_top1=percent(predictions == test.labels))
        classifier, _ = train_tiny.finetune(folder, "finetune", clips, few, config, recipe, encoder)
        predictions = probabilities(classifier, test).argmax(dim=1)
        result |= dict(finetune_top1=percent(predictions == test.labels))
    return result | dict(seconds=round(time.perf_counter() - start))


def load_results() -> list[dict]:
    """The runs of findings.json."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def results_of(experiment: str, results: list[dict]) -> list[list[dict]]:
    """For each setting of an experiment, its runs."""
    return [[run for run in results if (BASE | setting).items() <= run.items()]
            for setting in EXPERIMENTS[experiment]]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT",
                        help=f"one of: {'; '.join(EXPERIMENTS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if unknown := set(args.experiments) - set(EXPERIMENTS):
        parser.error(f"EXPERIMENT: got {', '.join(unknown)}, expected {'; '.join(EXPERIMENTS)}")
    results = load_results()
    if args.list:
        for name in EXPERIMENTS:
            print(f"{name}: {[len(runs) for runs in results_of(name, results)]} runs")
        return
    jobs = []
    for seed in args.seeds:
        for name in args.experiments or EXPERIMENTS:
            for setting in EXPERIMENTS[name]:
                job = BASE | setting, seed
                wanted = (job[0] | dict(seed=seed)).items()
                # Some settings are part of several experiments.
                if job not in jobs and not any(wanted <= run.items() for run in results):
                    jobs.append(job)
    # One process per core, one thread each: the models are too small for more.
    with torch.multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for number, result in enumerate(pool.imap_unordered(run_once, jobs), start=1):
            results = load_results() + [result]
            lines = ",\n".join(map(json.dumps, results))
            write_whole(RESULTS, lambda file, text=f"[\n{lines}\n]\n": file.write(text.encode()))
            differs = {key: result[key] for key in BASE if result[key] != BASE[key]}
            print(f"{number}/{len(jobs)} seed {result['seed']} {differs}: "
                  f"{result['finetune_top1']} %, {result['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
