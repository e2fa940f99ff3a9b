"""Draw docs/first.png and docs/results.png, from docs/results.json and the model in
tiny/pretrained:

    .venv/bin/python scripts/draw.py
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tiny.report import draw_panels, half_interval  # noqa: E402
from tiny.synthetic import TEST_SEED, SyntheticClips  # noqa: E402
from videomae import VideoMAEForPreTraining, random_mask  # noqa: E402

COLOURS = {"from scratch": "#888888", "linear probe": "#dd8452", "fine-tuned": "#4c72b0"}
EXAMPLE = 3  # the held-out clip in the first picture


def draw_bars(axis, results: dict, rows: dict, colour: str):
    """A bar for the mean of each row, with a dot for each seed. rows: {row of results: label}."""
    for y, row in enumerate(reversed(rows)):
        axis.barh(y, np.mean(results[row]), color=COLOURS.get(row, colour), height=0.6)
        axis.plot(results[row], [y] * len(results[row]), "k.", markersize=6)
    axis.set_yticks(range(len(rows)), list(rows.values())[::-1])
    axis.axvline(np.mean(results["chance"]), color="black", linestyle="--", linewidth=1)
    axis.set_xlim(0, 100)
    axis.spines[["top", "right"]].set_visible(False)


def draw_lines(axis, points: dict, chance: float):
    """points: {x: {way: top-1 of each seed}}; a line through the means, a dot for each seed."""
    for way, colour in COLOURS.items():
        values = [runs[way] for runs in points.values()]
        axis.plot([np.mean(seeds) for seeds in values], color=colour, label=way)
        for x, seeds in enumerate(values):
            axis.plot([x] * len(seeds), seeds, ".", color=colour)
    axis.set_xticks(range(len(points)), list(points))
    axis.axhline(chance, color="black", linestyle="--", linewidth=1)
    axis.set(ylim=(0, 80), ylabel="top-1, %")
    axis.spines[["top", "right"]].set_visible(False)


def draw_still(axes, model: VideoMAEForPreTraining, clip: torch.Tensor):
    """The panels of `draw_panels` for one clip (1, 1, T, 3, H, W), a frame in each row of axes."""
    torch.manual_seed(0)
    masked = random_mask("tube", 1, model.config.grid, mask_ratio=0.75)
    panels = draw_panels(model, clip, masked)[:, 0]  # (4, T, H, W, 3)
    titles = ("a clip it has not seen", "what the encoder sees\n(one quarter, in tubes)",
              "filled in without a model\n(the mean of each patch)", "filled in by the model")
    frames = torch.linspace(0, model.config.num_frames - 1, len(axes)).round().long()
    for frame, row in zip(frames, axes, strict=True):
        for panel, axis in zip(panels, row, strict=True):
            axis.imshow(panel[frame], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    for title, axis in zip(titles, axes[0], strict=True):
        axis.set_title(title, fontsize=12)


def draw_curve(axis, results: dict):
    """Accuracy against minutes of pretraining: the mean over seeds, and its 95 % interval."""
    minutes, scratch = results["minutes"], results["from scratch"]
    for way in ("fine-tuned", "linear probe"):
        runs = results[way].values()
        mean = [np.mean(values) for values in runs]
        halves = [half_interval(values) for values in runs]
        axis.errorbar(minutes, mean, halves, color=COLOURS[way], marker="o", capsize=4)
        axis.text(minutes[1], mean[1] - halves[1] - 7, f"pretrained, {way}", color=COLOURS[way])
    low, high = (np.mean(scratch) + sign * half_interval(scratch) for sign in (-1, 1))
    axis.axhspan(low, high, color="#dddddd")
    axis.axhline(np.mean(scratch), color=COLOURS["from scratch"])
    axis.text(minutes[0], high + 1.5, "from scratch", color="#555555")
    axis.axhline(results["chance"], color="black", linestyle="--", linewidth=1)
    axis.text(minutes[0], results["chance"] + 2, "chance")
    axis.set(xlabel="minutes of pretraining without labels", ylim=(0, 100), xscale="log")
    axis.set_xticks(minutes, [f"{x:g}" for x in minutes])
    axis.minorticks_off()
    axis.set_title(f"Accuracy with one label per class, %\n({len(scratch)} seeds, 95 % intervals)",
                   fontsize=12)
    axis.spines[["top", "right"]].set_visible(False)


def draw_first_picture(results: dict) -> Figure:
    """A reconstruction and the results of `make train`, for the top of README."""
    model = VideoMAEForPreTraining.from_pretrained(ROOT / "tiny/pretrained")
    clips = SyntheticClips(32, model.config, TEST_SEED)
    figure = Figure(figsize=(13, 4.6), dpi=100, layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.9, 1))
    draw_still(left.subplots(2, 4), model, clips.test_views(EXAMPLE))
    draw_curve(right.subplots(), results["drawn"])
    return figure


def draw_results(results: dict) -> Figure:
    """Four panels for docs/results.md."""
    figure = Figure(figsize=(11, 7), dpi=80, layout="constrained")
    (labels, masks), (few, everything) = figure.subplots(2, 2)
    chance, scratch, pretrained = (results[x] for x in ("chance", "from scratch", "pretrained"))

    def by_steps(count):
        return {steps: runs[count] | {"from scratch": scratch[count]}
                for steps, runs in pretrained.items()}

    draw_lines(labels, {count: by_steps(count)["3,000"] for count in scratch}, chance)
    labels.set(title="3,000 steps of pretraining", xlabel="labels per class")
    labels.legend(frameon=False)
    kinds = results["masks"]
    draw_bars(masks, kinds | dict(chance=chance), {name: name for name in kinds},
              COLOURS["linear probe"])
    masks.set(title="300 steps, linear probe, by mask", xlabel="top-1, %")
    draw_lines(few, by_steps("20"), chance)
    few.set(title="20 labels per class", xlabel="steps of pretraining")
    draw_lines(everything, by_steps("all"), chance)
    everything.set(title="All labels", xlabel="steps of pretraining")
    figure.suptitle("Nine classes of UCF101")
    return figure


if __name__ == "__main__":
    results = json.loads((ROOT / "docs" / "results.json").read_text())
    draw_first_picture(results).savefig(ROOT / "docs" / "first.png")
    draw_results(results["ucf101"]).savefig(ROOT / "docs" / "results.png")
