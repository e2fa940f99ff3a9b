"""The paper's claims tried on the embedded clips: the runs behind 02_findings.ipynb.

    python notebooks/findings.py                      every run that findings.json does not hold yet: 3 seeds, 69 runs,
                                                      an hour and a half on two cores
    python notebooks/findings.py "mask" --seeds 0     one experiment, one seed
    python notebooks/findings.py --list               the experiments, and how many of their runs are there

Every run pretrains (0 steps: trains from scratch), fine-tunes on 10 labels per class and is tested on 1,024 held-out
clips; what an experiment varies is in EXPERIMENTS, all else is BASE, and what neither says is the embedded recipe of
train_tiny.py. Runs are added to findings.json one by one: stop it and go on when you like.
"""
import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_tiny  # noqa: E402
from train_tiny import HELD_OUT_SEEDS, RECIPES, MotionClips, make_textures, move_textures  # noqa: E402
from videomae import VideoMAEConfig  # noqa: E402

RESULTS = Path(__file__).with_name("findings.json")
BASE = dict(data="motion", pretrain_on="the same", mask="tube", mask_ratio=0.75, norm_pix_loss=True, decoder_layers=1,
            positions="separable", pretrain_steps=1000, unlabelled_clips=10_000, labels_per_class=10,
            finetune_steps=300)
EXPERIMENTS = {  # name: the settings compared, each as what differs from BASE
    "mask ratio": [dict(mask_ratio=ratio) for ratio in (0.5, 0.75, 0.9, 0.95)],  # 8, 12, 14, 15 of 16 places
    "mask": [dict(mask=kind) for kind in ("tube", "random", "frame")],
    "mask, label is what is seen": [dict(data="look", mask=kind) for kind in ("tube", "random", "frame")]
                                   + [dict(data="look", pretrain_steps=0)],
    "target": [dict(norm_pix_loss=norm) for norm in (True, False)],
    "decoder depth": [dict(decoder_layers=depth) for depth in (1, 2, 4)],
    "pretraining steps": [dict(pretrain_steps=steps) for steps in (0, 250, 500, 1000, 2000)],
    "unlabelled clips": [dict(unlabelled_clips=count) for count in (100, 1000, 10_000)],
    "pretrained on": [dict(pretrain_on=domain)
                      for domain in ("the same", "other clips of the kind", "rough textures", "translations")],
    "positions": [dict(positions=kind) for kind in ("separable", "sinusoid")],
}


@dataclass
class Clips:
    """Clips with labels of our own; what train_tiny.py asks of a data set."""

    clips: Tensor  # (count, T, 3, H, W) uint8
    labels: Tensor  # (count,) int64
    classes: tuple[str, ...]
    num_views: int = 1

    def load(self, indices: Tensor, draw=None, view: int = 0) -> Tensor:
        """(B,) indices -> (B, T, 3, H, W) uint8."""
        return self.clips[indices]


def look_clips(count: int, config: VideoMAEConfig, seed: int) -> Clips:
    """The label is what is seen: the direction in which the texture is stretched, one of eight. The motion, a
    translation or a zoom, says nothing about it."""
    generator = torch.Generator().manual_seed(seed)
    size, clips = 2 * config.image_size, []
    for k in range(8):
        angle = torch.tensor(torch.pi * k / 8)
        frequency = torch.fft.fftfreq(size)
        along = frequency * angle.cos() + frequency[:, None] * angle.sin()
        across = frequency[:, None] * angle.cos() - frequency * angle.sin()
        radius = torch.hypot(2 * along, across / 2)
        radius[0, 0] = torch.inf  # so that the mean is 0
        spectrum = torch.fft.fft2(torch.randn(64, 3, size, size, generator=generator)) * radius**-2.75
        textures = torch.fft.ifft2(spectrum).real
        textures = textures / textures.std(dim=(2, 3), keepdim=True)
        motions = torch.tensor([0, 1, 2, 3, 6, 7])[torch.randint(6, (count // 8,), generator=generator)]
        clips += [move_textures(textures, part, config.num_frames, config.image_size, generator)
                  for part in motions.split(250)]
    order = torch.randperm(count // 8 * 8, generator=generator)
    labels = torch.arange(8).repeat_interleave(count // 8)[order]
    return Clips(torch.cat(clips)[order], labels, tuple(f"{180 * k / 8:.0f} degrees" for k in range(8)))


def other_clips(domain: str, count: int, config: VideoMAEConfig, seed: int) -> Clips | MotionClips:
    """Clips to pretrain on that differ from those fine-tuned on."""
    if domain == "other clips of the kind":
        return MotionClips(count, config, seed)
    generator = torch.Generator().manual_seed(seed)
    motions = torch.randint(4 if domain == "translations" else 8, (count,), generator=generator)
    alphas = {"rough textures": (1.5, 2.0), "translations": (2.5, 3.0)}[domain]
    textures = make_textures(512, 2 * config.image_size, generator, alphas)
    clips = torch.cat([move_textures(textures, part, config.num_frames, config.image_size, generator)
                       for part in motions.split(250)])
    return Clips(clips, motions, train_tiny.MOTIONS)


def run_once(job: tuple[dict, int]) -> dict:
    """(settings, seed): pretrain, fine-tune, probe -> the settings and what came out, top-1 in percent. With no
    pretraining steps: from scratch."""
    settings, seed = job
    torch.set_num_threads(1)
    start = time.perf_counter()
    recipe = RECIPES["embedded"] | {
        name: settings[name] for name in ("mask", "mask_ratio", "pretrain_steps", "finetune_steps")}
    config = VideoMAEConfig.preset(
        "tiny", use_mean_pooling=False, position_embedding=settings["positions"],
        norm_pix_loss=settings["norm_pix_loss"], decoder_num_hidden_layers=settings["decoder_layers"])
    make_clips = {"motion": MotionClips, "look": look_clips}[settings["data"]]
    labelled, test = make_clips(10_000, config, seed), make_clips(1024, config, HELD_OUT_SEEDS["test"])
    few = train_tiny.choose_labelled(labelled.labels, settings["labels_per_class"], seed)
    many = train_tiny.choose_labelled(labelled.labels, 100, seed)
    result = dict(settings, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        run = train_tiny.Run(Path(folder), seed, recipe, torch.device("cpu"))
        encoder = None
        if settings["pretrain_steps"]:
            count = settings["unlabelled_clips"]
            clips = labelled if settings["pretrain_on"] == "the same" else other_clips(
                settings["pretrain_on"], count, config, seed + 100)
            clips = Clips(clips.clips[:count], clips.labels[:count], clips.classes)
            model, trained = train_tiny.pretrain(run, clips, config, "pretrain")
            encoder = run.folder / "pretrained"
            model.save_pretrained(encoder)
            guess = train_tiny.linear_probe(model.videomae, labelled, many, test, run.device)
            result |= dict(loss=trained["loss_last"], probe_800_top1=train_tiny.percent(guess == test.labels))
        classifier = train_tiny.new_classifier(run, encoder, config, labelled)
        rate = recipe["finetune_lr" if encoder else "scratch_lr"]
        train_tiny.finetune(run, labelled, few, classifier, "finetune", recipe["finetune_steps"], rate, 1.0)
        guess = train_tiny.probabilities(classifier, test, run.device).argmax(dim=1)
        result |= dict(finetune_top1=train_tiny.percent(guess == test.labels))
    return result | dict(seconds=round(time.perf_counter() - start))


def load_results() -> list[dict]:
    """findings.json, one run each."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def results_of(experiment: str, results: list[dict]) -> list[list[dict]]:
    """For each setting of an experiment, its runs."""
    return [[run for run in results if all(run.get(key) == value for key, value in (BASE | setting).items())]
            for setting in EXPERIMENTS[experiment]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help=f"of: {', '.join(EXPERIMENTS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    unknown = set(args.experiments) - set(EXPERIMENTS)
    if unknown:
        parser.error(f"EXPERIMENT: got {', '.join(unknown)}, expected some of {', '.join(EXPERIMENTS)}")
    if args.list:
        for name in EXPERIMENTS:
            print(f"{name}: {[len(runs) for runs in results_of(name, load_results())]} runs")
        return
    jobs = {}
    for seed in args.seeds:
        for name in args.experiments or EXPERIMENTS:
            for setting in EXPERIMENTS[name]:
                settings = BASE | setting
                if not any(run == run | settings | dict(seed=seed) for run in load_results()):
                    jobs[json.dumps([settings, seed])] = (settings, seed)  # once, though several experiments use it
    # A process for each core, one thread each: the models are too small for more.
    with torch.multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        for number, result in enumerate(pool.imap_unordered(run_once, jobs.values()), start=1):
            lines = ",\n".join(json.dumps(run) for run in load_results() + [result])
            train_tiny.write_whole(RESULTS, lambda file, lines=lines: file.write(f"[\n{lines}\n]\n".encode()))
            differs = {key: result[key] for key in BASE if result[key] != BASE[key]}
            print(f"{number}/{len(jobs)} seed {result['seed']} {differs}: {result['finetune_top1']} %, "
                  f"{result['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
