"""What a run shows: an animated reconstruction, loss curves, and the table of its results.

    python -m tiny.report runs/A runs/B ...     one table of several runs, mean ± std
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from checkpoints import write_atomic
from videomae import VideoMAEForPreTraining, random_mask, reconstruct

ROWS = {  # name in results.json -> name in the table, and the stages it took
    "from scratch": ("from scratch", ["from scratch"]),
    "linear probe": ("pretrained, linear probe", ["pretraining"]),
    "fine-tuning": ("pretrained, fine-tuned", ["pretraining", "fine-tuning"]),
    "majority class": ("majority class (chance)", []),
}


def draw_reconstruction(model: VideoMAEForPreTraining, clips, mask: str, mask_ratio: float,
                        path: Path, count: int = 4):
    """An animated GIF with a column for each of `count` clips, always the same ones with the same
    mask: the clip, what the encoder sees, and the reconstruction."""
    config = model.config
    if model.decoder.head.out_features != config.patch_dim:
        return  # it predicts something other than pixels
    indices = torch.linspace(0, len(clips.labels) - 1, count).long().unique().tolist()
    views = [clips.test_views(i) for i in indices]
    pixel_values = torch.stack([view[len(view) // 2] for view in views])  # (B, T, 3, H, W)
    with torch.random.fork_rng(devices=[]):  # of the CPU only
        torch.manual_seed(0)
        masked = random_mask(mask, len(indices), config.grid, mask_ratio)  # (B, N)
    share = masked.float().mean()
    text = f"Held-out clips, {share:.0%} masked ({mask}). Orange: edge of the masked area"
    if config.norm_pix_loss:
        text += ",\nwhose patches take mean and contrast from the clip (norm_pix_loss)"
    pictures = draw_rows(model, pixel_values, masked)
    pictures = rearrange(pictures, "rows b t h w c -> t (rows h) (b w) c")
    save_gif(pictures, ["clip", "visible", "reconstruction"], f"{text}.", path)


def draw_rows(model: VideoMAEForPreTraining, pixel_values: Tensor, masked: Tensor) -> Tensor:
    """pixel_values (B, T, 3, H, W), masked (B, N) -> (3, B, T, h, w, 3) uint8, enlarged if small:
    the clips, what the encoder sees, and the reconstructions with predicted patches outlined."""
    config, device = model.config, next(model.parameters()).device
    videos = torch.stack(reconstruct(model.eval(), pixel_values.to(device), masked))
    zoom = max(1, round(128 / pixel_values.shape[-1]))
    videos = repeat(videos.float().clamp(0, 1).cpu(), "rows b t c h w -> rows b t (h zh) (w zw) c",
                    zh=zoom, zw=zoom)
    side = config.patch_size * zoom
    masked = repeat(masked.unflatten(1, config.grid), "b t h w -> b (t pt) (h ph) (w pw)",
                    pt=config.tubelet_size, ph=side, pw=side)
    others = F.pad((~masked).float(), (1, 1, 1, 1), value=1.0)
    is_edge = masked & (F.max_pool2d(others, kernel_size=3, stride=1) > 0)
    videos[2][is_edge] = torch.tensor([1.0, 0.6, 0.1])  # orange
    return (255 * videos).byte()


def save_gif(pictures: Tensor, rows: list[str], text: str, path: Path):
    """pictures (T, H, W, 3) uint8, with row names at the left and two lines of text below."""
    from PIL import Image, ImageDraw

    (_, height, width, _), margin, images = pictures.shape, 90, []
    for picture in pictures.numpy():
        image = Image.new("RGB", (margin + width, height + 36), "white")
        image.paste(Image.fromarray(picture), (margin, 0))
        draw = ImageDraw.Draw(image)
        for row, name in enumerate(rows):
            draw.text((4, (row + 0.5) * height / len(rows) - 6), name, fill="black")
        draw.text((margin, height + 2), text, fill="black")
        images.append(image)
    pause = [300] * (len(images) - 1) + [1500]  # milliseconds
    write_atomic(Path(path), lambda file: images[0].save(
        file, "GIF", save_all=True, append_images=images[1:], duration=pause, loop=0))


def draw_curves(results: dict, path: Path):
    """The losses in results.json, smoothed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), dpi=110, layout="tight")
    axis = figure.subplots()
    for way, result in results.items():
        if losses := result.get("losses"):
            steps, parts = np.arange(len(losses)), min(100, len(losses))
            x, y = ([part.mean() for part in np.array_split(z, parts)] for z in (steps, losses))
            axis.plot(x, y, label=way, linewidth=1)
    axis.set(xlabel="step", ylabel="loss")
    axis.legend(fontsize=7)
    write_atomic(path, lambda file: figure.savefig(file, format="png"))


def table(runs: list[dict]) -> str:
    """Contents of results.json files -> a Markdown table: for each way to train, mean ± std over
    the runs, and the mean seconds."""
    columns = {"top1": "top-1, %", "mean_class": "mean class accuracy, %"}
    if not runs[0]["recipe"]["data"]:
        del columns["mean_class"]  # synthetic classes are of about equal size
    labels, *others = {run["recipe"]["labels_per_class"] for run in runs}
    if others:
        raise ValueError(f"runs: got {labels} and {others[0]} labels per class, expected the same")
    title = f"{labels} label{'s' * (labels > 1)} per class" if labels else "all labels"

    def values(way, key):
        return [run["results"][way][key] for run in runs if key in run["results"].get(way, {})]

    lines = [[title, *columns.values(), "seconds"], ["---"] * (len(columns) + 2)]
    for way, (name, took) in ROWS.items():
        if way in runs[0]["results"]:
            seconds = [f"{np.mean(values(x, 'seconds')):.0f}" for x in took if values(x, "seconds")]
            cells = [mean_and_std(values(way, column)) for column in columns]
            lines.append([name, *cells, " + ".join(seconds)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_and_std(values: list[float]) -> str:
    """12.3, or 12.3 ± 0.4 for several."""
    std = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{std}"


if __name__ == "__main__":
    states = [json.loads(Path(run, "results.json").read_text()) for run in sys.argv[1:]]
    print(table(states) if states else __doc__)
