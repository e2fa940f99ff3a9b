"""Test the paper's claims on synthetic clips, for 02_findings.ipynb.

    python scripts/findings.py                    every run missing from findings.json
    python scripts/findings.py "mask" --seeds 0   one experiment, one seed
    python scripts/findings.py --list             the experiments and their numbers of runs

A run pretrains (or, with 0 steps, trains from scratch), fine-tunes on 2 labels per class and tests
on 1,024 held-out clips, in two to three minutes on one core. EXPERIMENTS lists what varies, BASE
the other settings. Each run is saved to findings.json as it ends, so the script can be interrupted.

The learning rate of pretraining is that of `make train`, which was chosen for tubes.
"""
import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from checkpoints import write_atomic  # noqa: E402
from tiny.evaluate import accuracies, choose_labelled, linear_probe, probabilities  # noqa: E402
from tiny.synthetic import TEST_SEED, SyntheticClips  # noqa: E402
from train_tiny import Batches, classification_loss, fit, reconstruction_loss  # noqa: E402
from videomae import (  # noqa: E402
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
)

RESULTS = Path(__file__).with_name("findings.json")
BASE = dict(
    mask="tube", mask_ratio=0.75, norm_pix_loss=True, decoder_layers=1, pretrain_steps=500,
    unlabelled_clips=4000, pretrain_on="all motions",
)
EXPERIMENTS = {  # name: the settings compared, as differences from BASE
    # These ratios mask 8, 12 and 14 of 16 spatial positions.
    "mask ratio": [dict(mask_ratio=ratio) for ratio in (0.5, 0.75, 0.9)],
    "mask": [dict(mask=kind) for kind in ("tube", "random", "frame")],
    "target": [dict(norm_pix_loss=norm) for norm in (True, False)],
    "decoder depth": [dict(decoder_layers=depth) for depth in (1, 4)],
    "pretraining steps": [dict(pretrain_steps=steps) for steps in (0, 500, 1000)],
    "unlabelled clips": [dict(unlabelled_clips=count) for count in (100, 4000)],
    "pretrained on": [dict(pretrain_on=kind) for kind in ("all motions", "pan and tilt")],
}


def run_once(settings: dict, train_clips=4000, test_clips=1024, finetune_steps=200) -> dict:
    """Settings, with a seed -> the settings and their results: the mean of the last 50 losses, and
    top-1 in percent, fine-tuned and of a linear probe."""
    start, seed, result = time.perf_counter(), settings["seed"], dict(settings)
    config = VideoMAEConfig.preset("tiny", norm_pix_loss=settings["norm_pix_loss"],
                                   decoder_num_hidden_layers=settings["decoder_layers"])
    clips = SyntheticClips(train_clips, config, seed)
    test = SyntheticClips(test_clips, config, TEST_SEED)
    torch.manual_seed(seed)
    classifier = VideoMAEForVideoClassification(
        VideoMAEConfig.preset("tiny", use_mean_pooling=True, num_labels=len(clips.classes)))

    if settings["pretrain_steps"]:
        model = VideoMAEForPreTraining(config)
        losses = pretrain(model, clips, settings)
        many = choose_labelled(clips.labels, 100, seed)
        probe = linear_probe(model.videomae, clips, many, test)
        result |= dict(loss=losses[-50:].mean().item(), probe_800_top1=probe["top1"])
        # Not strict, because a mean-pooled classifier has no norm at the encoder's end.
        classifier.videomae.load_state_dict(model.videomae.state_dict(), strict=False)

    batches = Batches(clips, choose_labelled(clips.labels, 2, seed), 16, seed)
    loss_of = partial(classification_loss, jitter=True)
    fit(classifier, batches, loss_of, finetune_steps, lr=6e-4, betas=(0.9, 0.999), seed=seed)
    predictions = probabilities(classifier, test).argmax(dim=1)
    result |= dict(finetune_top1=accuracies(predictions, test.labels)["top1"])
    return result | dict(seconds=round(time.perf_counter() - start))


def pretrain(model, clips: SyntheticClips, settings: dict) -> torch.Tensor:
    """Train the model in place -> the loss of each step."""
    is_chosen = torch.arange(len(clips.labels)) < settings["unlabelled_clips"]
    if settings["pretrain_on"] == "pan and tilt":  # the first four motions
        is_chosen &= clips.labels < 4
    batches = Batches(clips, is_chosen.nonzero()[:, 0], 24, settings["seed"])
    loss_of = partial(reconstruction_loss, grid=model.config.grid, mask=settings["mask"],
                      mask_ratio=settings["mask_ratio"])
    return fit(model, batches, loss_of, settings["pretrain_steps"], lr=7.5e-4,
               seed=settings["seed"])


def load_results() -> list[dict]:
    """The runs in findings.json."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def results_of(experiment: str, results: list[dict]) -> list[list[dict]]:
    """The runs of each setting of an experiment, sorted by seed."""
    return [sorted((run for run in results if (BASE | setting).items() <= run.items()),
                   key=lambda run: run["seed"]) for setting in EXPERIMENTS[experiment]]


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT",
                        help=f"any of: {'; '.join(EXPERIMENTS)}")
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
                job = BASE | setting | dict(seed=seed)
                # Some settings are part of several experiments.
                if job not in jobs and not any(job.items() <= run.items() for run in results):
                    jobs.append(job)
    # One process per core with one thread each, as the models are too small for more.
    spawn = torch.multiprocessing.get_context("spawn")
    with spawn.Pool(os.cpu_count(), torch.set_num_threads, [1]) as pool:
        for number, result in enumerate(pool.imap_unordered(run_once, jobs), start=1):
            results.append(result)
            text = ",\n".join(map(json.dumps, results))
            write_atomic(RESULTS, f"[\n{text}\n]\n".encode())
            differs = {key: result[key] for key in BASE if result[key] != BASE[key]}
            print(f"{number}/{len(jobs)} seed {result['seed']} {differs}: "
                  f"{result['finetune_top1']} %, {result['seconds']} s", flush=True)
        pool.close()
        pool.join()


if __name__ == "__main__":
    main()
