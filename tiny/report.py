"""What a run shows: reconstructions, a confusion matrix, curves, and the table of its results."""
import textwrap
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from checkpoints import write_whole
from videomae import VideoMAEForPreTraining, normalize, random_mask

# Ways to train, as in a result's "finetune_top1" -> a row of the table, the stages that it took.
ROWS = {
    "scratch_full_time": ("from scratch, same total time", ["scratch_full_time"]),
    "linear_probe": ("pretrained, linear probe", ["pretrain"]),
    "finetune": ("pretrained, fine-tuned", ["pretrain", "finetune"]),
    "majority": ("always the largest class", []),
}


def reconstruct(model: VideoMAEForPreTraining, clips, recipe, count: int) -> tuple[Tensor, str]:
    """-> (3, B, T, C, H, W) in [0, 1]: original, masked, reconstruction; and what to say of them.

    They are `count` held-out clips, always the same ones, with the same mask, enlarged if small.
    """
    indices = torch.linspace(0, len(clips.labels) - 1, min(count, len(clips.labels))).long()
    generator = torch.Generator().manual_seed(0)
    mask = random_mask(recipe.mask, len(indices), model.config.grid, recipe.mask_ratio, generator)
    frames = clips.load(indices, view=clips.num_views // 2)
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    videos = model.reconstruct(normalize(frames).to(device), mask.to(device))
    model.train(was_training)
    text = f"Original, masked ({recipe.mask}, {recipe.mask_ratio}), reconstruction; held-out clips."
    if model.config.norm_pix_loss:
        text += " Reconstructed patches borrow mean and contrast from the original (norm_pix_loss)."
    zoom = max(1, 112 // frames.shape[-1])
    videos = torch.stack(videos).float().clamp(0, 1).cpu()
    return videos.repeat_interleave(zoom, dim=-1).repeat_interleave(zoom, dim=-2), text


def draw_reconstruction(model, clips, recipe, path: Path, count: int = 3):
    """A PNG with three rows of frames for each clip."""
    videos, text = reconstruct(model, clips, recipe, count)
    videos = videos[:, :, :: max(1, model.config.num_frames // 8)]
    videos = F.pad(videos, (1, 1, 1, 1), value=1.0)  # white lines between the frames
    pictures = rearrange(videos, "rows b t c h w -> 1 (b rows h) (t w) c")
    save_pictures(pictures, text, path, format="PNG")


def draw_gif(model, clips, recipe, path: Path, count: int = 4):
    """A moving picture with a column for each clip."""
    videos, text = reconstruct(model, clips, recipe, count)
    pictures = rearrange(videos, "rows b t c h w -> t (rows h) (b w) c")
    save_pictures(pictures, text, path, format="GIF", save_all=True, duration=120, loop=0)


def save_pictures(pictures: Tensor, text: str, path: Path, **options):
    """pictures (n, H, W, 3) in [0, 1] -> one file, with the text under each."""
    from PIL import Image, ImageDraw

    height, width = pictures.shape[1:3]
    lines = textwrap.wrap(text, width // 6)  # a letter is 6 pixels wide, and a line 14 high
    images = []
    for picture in (255 * pictures).byte().numpy():
        image = Image.new("RGB", (width, height + 14 * len(lines) + 4), "white")
        image.paste(Image.fromarray(picture))
        ImageDraw.Draw(image).text((2, height + 2), "\n".join(lines), fill="black")
        images.append(image)
    first, *options["append_images"] = images
    write_whole(path, lambda file: first.save(file, **options))


def new_figure(width: float, height: float, columns: int = 1):
    """-> a figure and its axes. Without pyplot it draws to files (Agg), whatever the screen."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="tight")
    return figure, figure.subplots(1, columns)


def draw_confusion(predictions: Tensor, labels: Tensor, classes: list[str], path: Path):
    """predictions, labels (n,) -> rows: the true class, columns: the predicted one."""
    n = len(classes)
    counts = torch.bincount(labels * n + predictions, minlength=n * n).view(n, n)
    shares = counts / counts.sum(dim=1, keepdim=True).clamp_min(1)
    figure, axis = new_figure(3 + 0.35 * n, 3 + 0.35 * n)
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, j in product(range(n), repeat=2) if n <= 20 else ():
        colour = "white" if shares[i, j] > 0.5 else "black"
        axis.text(j, i, int(counts[i, j]), ha="center", va="center", fontsize=7, color=colour)
    axis.set(xlabel="predicted", ylabel="true")
    axis.set_xticks(range(n), classes, rotation=90, fontsize=7)
    axis.set_yticks(range(n), classes, fontsize=7)
    write_whole(path, lambda file: figure.savefig(file, format="png"))


def results_of(summaries: list[dict]) -> list[list[dict]]:
    """-> the results of each run, one for each label budget, with those of the largest class."""
    runs = []
    for summary in summaries:
        majority = {"majority_top1": summary["majority_top1"],
                    "majority_balanced": 100 / len(summary["classes"])}
        runs.append([result | majority for result in summary["results"]])
    return runs


def draw_curves(metrics: list[dict], summaries: list[dict], path: Path):
    """Left: the losses, smoothed. Right: top-1 by label budget, mean and std over the runs."""
    figure, (left, right) = new_figure(11, 4, columns=2)
    for stage in dict.fromkeys(m["stage"] for m in metrics):
        points = np.array([(m["step"], m["loss"]) for m in metrics if m["stage"] == stage])
        parts = np.array_split(points, min(100, len(points)))
        left.plot(*np.transpose([part.mean(axis=0) for part in parts]), label=stage, linewidth=1)
    left.set(xlabel="step", ylabel="loss: pixels (pretrain) or classes", title="Training")

    runs = results_of(summaries)
    budgets = [str(result["labels_per_class"] or "all") for result in runs[0]]
    for key, (name, _) in ROWS.items():
        if f"{key}_top1" in runs[0][0]:
            top1 = np.array([[result[f"{key}_top1"] for result in run] for run in runs])
            std = top1.std(axis=0, ddof=min(1, len(runs) - 1))
            right.errorbar(budgets, top1.mean(axis=0), std, fmt="o-", label=name)
    right.set(xlabel="labels per class", ylabel="top-1, %", ylim=(0, 100), title="Held-out clips")
    for axis in (left, right):
        axis.legend(fontsize=7)
    write_whole(path, lambda file: figure.savefig(file, format="png"))


def table(summaries: list[dict]) -> str:
    """Markdown: a row for each way to train; mean +- std over the runs, if there are several. The
    seconds are those of one label budget, the whole pretraining included."""
    runs = results_of(summaries)
    kinds = ["top1"] if summaries[0]["data"] == "synthetic" else ["top1", "balanced"]
    columns = list(product(range(len(runs[0])), kinds))
    heads = [f"{runs[0][i]['labels_per_class'] or 'all'} labels per class"
             + ", balanced" * (kind == "balanced") for i, kind in columns]
    rows = [["top-1, %", *heads, "seconds"], ["---"] * (len(heads) + 2)]
    seconds = {}
    for stage, value in (item for summary in summaries for item in summary["seconds"].items()):
        seconds.setdefault(stage.split(",")[0], []).append(value)
    for key, (name, stages) in ROWS.items():
        if f"{key}_top1" in runs[0][0]:
            cells = [mean_and_std([run[i][f"{key}_{kind}"] for run in runs]) for i, kind in columns]
            took = " + ".join(f"{np.mean(seconds[x]):.0f}" for x in stages if x in seconds)
            rows.append([name, *cells, took])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def mean_and_std(values: list[float]) -> str:
    """12.3, or 12.3 +- 0.4 where there are several."""
    std = f" +- {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{std}"
