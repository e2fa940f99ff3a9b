"""The paper's claims tried on the clips of `make train`: the runs behind 02_findings.ipynb.

    python notebooks/findings.py                    every run that findings.json lacks: 3 seeds, 33
                                                    runs in all, 40 minutes on two cores
    python notebooks/findings.py "mask" --seeds 0   one experiment, one seed
    python notebooks/findings.py --list             the experiments, and how many runs each has

A run pretrains (0 steps: trains from scratch), fine-tunes on 2 labels per class and is tested on
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
from copy import copy
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_tiny  # noqa: E402
from checkpoints import write_whole  # noqa: E402
from tiny.evaluate import choose_labelled, linear_probe, percent, probabilities  # noqa: E402
from tiny.synthetic import HELD_OUT_SEEDS, SyntheticClips  # noqa: E402
from videomae import VideoMAEConfig  # noqa: E402

RESULTS = Path(__file__).with_name("findings.json")
BASE = dict(
    mask="tube", mask_ratio=0.75, norm_pix_loss=True, decoder_layers=1, pretrain_steps=500,
    unlabelled_clips=4000, pretrain_on="all motions",
)
# Short, to allow many runs. From scratch is trained as fine-tuning is.
SHORT = dict(
    pretrain_batch=24, pretrain_lr=2e-2, labels_per_class=2, finetune_steps=200,
    finetune_batch=16, finetune_lr=1e-2, scratch_steps=200, scratch_lr=1e-2,
)
EXPERIMENTS = {  # name: the settings compared, each as what differs from BASE
    # These ratios mask 8, 12 and 14 of 16 spatial positions.
    "mask ratio": [dict(mask_ratio=ratio) for ratio in (0.5, 0.75, 0.9)],
    "mask": [dict(mask=kind) for kind in ("tube", "random", "frame")],
    "target": [dict(norm_pix_loss=norm) for norm in (True, False)],
    "decoder depth": [dict(decoder_layers=depth) for depth in (1, 4)],
    "pretraining steps": [dict(pretrain_steps=steps) for steps in (0, 500, 1000)],
    "unlabelled clips": [dict(unlabelled_clips=count) for count in (100, 4000)],
    "pretrained on": [dict(pretrain_on=kind) for kind in ("all motions", "pan and tilt")],
}


def run_once(job: tuple[dict, int]) -> dict:
    """(settings, seed): pretrain, probe, fine-tune -> the settings and what came out of it, top-1
    in percent. With no pretraining steps: from scratch."""
    settings, seed = job
    start = time.perf_counter()
    torch.set_num_threads(1)
    train_tiny.DEVICE = torch.device("cpu")
    logging.getLogger("videomae").setLevel(logging.ERROR)  # dropped decoders, new heads
    recipe = replace(
        train_tiny.RECIPES["synthetic"], seed=seed, mask=settings["mask"],
        mask_ratio=settings["mask_ratio"], pretrain_steps=max(1, settings["pretrain_steps"]),
        **SHORT)
    config = VideoMAEConfig.preset("tiny", norm_pix_loss=settings["norm_pix_loss"],
                                   decoder_num_hidden_layers=settings["decoder_layers"])
    clips = SyntheticClips(4000, config, seed)
    test = SyntheticClips(1024, config, HELD_OUT_SEEDS["test"])
    few, many = (choose_labelled(clips.labels, count, seed)
                 for count in (recipe.labels_per_class, 100))
    result = dict(settings, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        folder, encoder = Path(folder), None
        if settings["pretrain_steps"]:
            unlabelled = copy(clips)
            chosen = torch.arange(len(clips.labels)) < settings["unlabelled_clips"]
            if settings["pretrain_on"] == "pan and tilt":  # the first four motions
                chosen &= clips.labels < 4
            unlabelled.clips, unlabelled.labels = clips.clips[chosen], clips.labels[chosen]
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
