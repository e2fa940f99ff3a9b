"""What a run shows: reconstructions that move, curves, and the table of its results.

    python -m tiny.report runs/A runs/B ...     one table of several runs: mean +- std
"""
import json
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from checkpoints import write_whole
from videomae import VideoMAEForPreTraining, normalize, random_mask

ROWS = {  # the start of a result's name in summary.json -> a row of the table, what it took
    "scratch_full_time": ("from scratch", ["scratch_full_time"]),
    "linear_probe": ("pretrained, linear probe", ["pretrain"]),
    "finetune": ("pretrained, fine-tuned", ["pretrain", "finetune"]),
    "majority": ("always the largest class", []),
}


def draw_reconstruction(model: VideoMAEForPreTraining, clips, recipe, path: Path, count: int = 4):
    """A moving GIF with a column for each of `count` held-out clips, always the same ones with the
    same mask: original, masked, reconstruction."""
    indices = torch.linspace(0, len(clips.labels) - 1, min(count, len(clips.labels))).long()
    generator = torch.Generator().manual_seed(0)
    mask = random_mask(recipe.mask, len(indices), model.config.grid, recipe.mask_ratio, generator)
    frames = clips.load(indices, view=clips.num_views // 2)
    device = next(model.parameters()).device
    videos = model.eval().reconstruct(normalize(frames).to(device), mask.to(device))
    videos = torch.stack(videos).float().clamp(0, 1).cpu()
    zoom = max(1, 112 // frames.shape[-1])
    videos = videos.repeat_interleave(zoom, dim=-1).repeat_interleave(zoom, dim=-2)
    text = f"Original, masked ({recipe.mask}, {recipe.mask_ratio}), reconstruction; held-out clips."
    if model.config.norm_pix_loss:
        text += " Reconstructed patches borrow mean and contrast from the original (norm_pix_loss)."
    save_gif(rearrange(videos, "rows b t c h w -> t (rows h) (b w) c"), text, path)


def save_gif(pictures: Tensor, text: str, path: Path):
    """pictures (T, H, W, 3) in [0, 1], with the text under each."""
    from PIL import Image, ImageDraw

    height, width = pictures.shape[1:3]
    lines = textwrap.wrap(text, width // 6)  # a letter is 6 pixels wide, and a line 14 high
    images = []
    for picture in (255 * pictures).byte().numpy():
        image = Image.new("RGB", (width, height + 14 * len(lines) + 4), "white")
        image.paste(Image.fromarray(picture))
        ImageDraw.Draw(image).text((2, height + 2), "\n".join(lines), fill="black")
        images.append(image)
    options = dict(format="GIF", save_all=True, append_images=images[1:], duration=120, loop=0)
    write_whole(path, lambda file: images[0].save(file, **options))


def draw_curves(metrics: list[dict], path: Path):
    """The losses of each stage, smoothed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=110, layout="tight")
    axis = figure.subplots()
    for stage in dict.fromkeys(m["stage"] for m in metrics):
        points = np.array([(m["step"], m["loss"]) for m in metrics if m["stage"] == stage])
        parts = np.array_split(points, min(100, len(points)))
        axis.plot(*np.transpose([part.mean(axis=0) for part in parts]), label=stage, linewidth=1)
    axis.set(xlabel="step", ylabel="loss: pixels (pretrain) or classes")
    axis.legend(fontsize=7)
    write_whole(path, lambda file: figure.savefig(file, format="png"))


def table(summaries: list[dict]) -> str:
    """Markdown: a row for each way to train, mean +- std over the runs if there are several. The
    seconds are those of one run, the whole pretraining included."""
    first = summaries[0]
    columns = ["top1"] if first["recipe"]["data"] == "synthetic" else ["top1", "balanced"]
    names = [{"top1": "top-1, %", "balanced": "balanced, %"}[column] for column in columns]
    labels, *others = {s["recipe"]["labels_per_class"] or "all" for s in summaries}
    if others:
        raise ValueError(f"runs: got {labels} and {others[0]} labels per class, expected the same")
    lines = [[f"{labels} labels per class", *names, "seconds"], ["---"] * (len(names) + 2)]
    for way, (name, stages) in ROWS.items():
        if f"{way}_top1" in first:
            cells = [mean_and_std([s[f"{way}_{column}"] for s in summaries]) for column in columns]
            seconds = [np.mean([s["seconds"].get(stage, 0) for s in summaries]) for stage in stages]
            lines.append([name, *cells, " + ".join(f"{x:.0f}" for x in seconds if x)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_and_std(values: list[float]) -> str:
    """12.3, or 12.3 +- 0.4 where there are several."""
    std = f" +- {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{std}"


if __name__ == "__main__":
    print(table([json.loads(Path(run, "summary.json").read_text()) for run in sys.argv[1:]]))
