"""Compare a changed model with the original over several seeds, for 05_change_it.ipynb.

`run` pretrains, probes, fine-tunes and tests with one seed. `show` and `table` report the results,
and the 95 % intervals of the differences.
"""
import inspect
import os
import time
from dataclasses import replace
from functools import cache, partial

import matplotlib.pyplot as plt
import torch

from tiny.evaluate import accuracies, choose_labelled, linear_probe, probabilities
from tiny.report import mean_and_std, paired
from tiny.synthetic import TEST_SEED, SyntheticClips
from train_tiny import Batches, classification_loss, fit
from videomae import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    normalize,
    patchify,
    random_mask,
    unpatchify,
)

FAST = "FAST" in os.environ  # CI runs the same code on few clips for few steps
SEEDS = (0, 1) if FAST else (0, 1, 2)
TRAIN_CLIPS, TEST_CLIPS, PROBE_LABELS = (500, 64, 10) if FAST else (4000, 1024, 100)
PRETRAIN_STEPS, FINETUNE_STEPS = (2, 2) if FAST else (350, 150)

CONFIG = VideoMAEConfig.preset("tiny")  # 8 frames of 32 x 32 pixels, 4 x 4 x 4 patches
MEASURES = {"probe": "linear probe", "finetuned": "fine-tuned"}


# ---- Training -----------------------------------------------------------------------------------

@cache
def training_clips(seed: int) -> SyntheticClips:
    return SyntheticClips(TRAIN_CLIPS, CONFIG, seed)


@cache
def held_out_clips() -> SyntheticClips:
    return SyntheticClips(TEST_CLIPS, CONFIG, TEST_SEED)


def tube_mask(pixel_values):
    """(B, N) bool, the default mask of a run."""
    return random_mask("tube", len(pixel_values), CONFIG.grid, mask_ratio=0.75)


def run(seed: int, pretraining=VideoMAEForPreTraining, encoder=None, decoder=None,
        mask_of=tube_mask, use_mean_pooling=True) -> dict:
    """-> both measures in percent, the CPU minutes they took, and the pretrained model.

    pretraining(config) makes the model; encoder(config) and decoder(config) replace its parts.
    mask_of(pixel_values) draws a mask (B, N). use_mean_pooling: False classifies from token 0.
    """
    clips, test_clips = training_clips(seed), held_out_clips()
    start = time.process_time()
    torch.manual_seed(seed)
    model = pretraining(CONFIG)
    classifier = VideoMAEForVideoClassification(replace(
        CONFIG, num_labels=len(clips.classes), use_mean_pooling=use_mean_pooling))
    if encoder:
        model.videomae.encoder = encoder(CONFIG)
        classifier.videomae.encoder = encoder(classifier.config)
    if decoder:
        model.decoder = decoder(CONFIG)

    pretrain(model, clips, mask_of, seed)
    many = choose_labelled(clips.labels, PROBE_LABELS, seed)
    probe = linear_probe(model.videomae, clips, many, test_clips)

    # A mean-pooled classifier has no use for the encoder's final norm, but needs all else.
    weights = model.videomae.state_dict()
    assert not classifier.videomae.load_state_dict(weights, strict=False).missing_keys
    finetune(classifier, clips, seed)
    predictions = probabilities(classifier, test_clips).argmax(dim=1)
    finetuned = accuracies(predictions, test_clips.labels)
    minutes = (time.process_time() - start) / 60
    return dict(probe=probe["top1"], finetuned=finetuned["top1"], minutes=minutes, model=model)


def pretrain(model, clips: SyntheticClips, mask_of, seed: int):
    """Pretrain in place on all clips, without labels."""
    def loss_of(model, frames, labels):
        pixel_values = normalize(frames)
        return model(pixel_values, mask_of(pixel_values)).loss

    batches = Batches(clips, torch.arange(len(clips.labels)), 24, seed)
    fit(model, batches, loss_of, PRETRAIN_STEPS, lr=1.9e-3, seed=seed)


def finetune(classifier, clips: SyntheticClips, seed: int):
    """Fine-tune in place on two labelled clips per class."""
    batches = Batches(clips, choose_labelled(clips.labels, 2, seed), 8, seed)
    loss_of = partial(classification_loss, jitter=True)
    fit(classifier, batches, loss_of, FINETUNE_STEPS, lr=1.5e-3, betas=(0.9, 0.999), seed=seed)


def step_seconds(model, batch: int = 1) -> float:
    """CPU seconds of a forward and backward pass at mask ratio 0.9, the fastest of several."""
    config, seconds = model.config, []
    clips = torch.randn(batch, config.num_frames, config.num_channels, *config.image_hw)
    mask = random_mask("tube", batch, config.grid, mask_ratio=0.9)
    for _ in range(1 if FAST else 5):
        start = time.process_time()
        model(clips, mask).loss.backward()
        seconds.append(time.process_time() - start)
    return min(seconds)


def draw_masks(clip, masks: dict):
    """Draw the frames of a clip (1, T, 3, H, W) uint8, in a row for each named mask (1, N)."""
    patches = patchify(clip / 255, CONFIG)
    figure, axes = plt.subplots(len(masks), CONFIG.num_frames, figsize=(9.2, 1.15 * len(masks)))
    for row, (name, mask) in zip(axes, masks.items(), strict=True):
        video = unpatchify(torch.where(mask[..., None, None], 0.5, patches), CONFIG)[0]
        for axis, frame in zip(row, video, strict=True):
            axis.imshow(frame.permute(1, 2, 0), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name.replace(" ", "\n", 1), fontsize=8)
    return figure


# ---- Differences --------------------------------------------------------------------------------

def values(runs: list[dict], key: str) -> list[float]:
    return [result[key] for result in runs]


def show(results: dict, name: str, other: str = "original"):
    """Print a change's measures and how they differ from those of another."""
    for measure, text in MEASURES.items():
        ours, theirs = (values(results[x], measure) for x in (name, other))
        compared = f"; against {other}: {paired(ours, theirs)}" if name != other else ""
        print(f"{text:13} {mean_and_std(ours)} %{compared}")


def table(results: dict, definitions: dict) -> str:
    """A Markdown table with a row per change, compared with the original. definitions: the
    functions and classes of each change."""
    texts = [f"{text}, % | against original" for text in MEASURES.values()]
    lines = [f"| change | lines | CPU minutes | {' | '.join(texts)} |", "|" + " --- |" * 7]
    for name, runs in results.items():
        minutes = f"{sum(values(runs, 'minutes')):.1f}"
        cells = [name, str(count_lines(*definitions.get(name, ())) or ""), minutes]
        for measure in MEASURES:
            ours, theirs = values(runs, measure), values(results["original"], measure)
            compared = paired(ours, theirs) if name != "original" else ""
            cells += [mean_and_std(ours), compared]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def count_lines(*definitions) -> int:
    """Count the non-empty lines of classes and functions defined in notebook cells."""
    count = 0
    for definition in definitions:
        is_class = inspect.isclass(definition)  # inspect finds a cell only by a function
        members = vars(definition).values() if is_class else [definition]
        source = "".join(inspect.getsource(x) for x in members if inspect.isfunction(x))
        count += is_class + sum(bool(line.strip()) for line in source.splitlines())
    return count
