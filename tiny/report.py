"""What a run shows: an animated reconstruction, loss curves, and the table of its results.

    python -m tiny.report runs/A runs/B ...     one table of several runs, mean ± std
"""
import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from checkpoints import write_atomic
from videomae import VideoMAEForPreTraining, random_mask, reconstruct

WAYS = {  # name in results.json -> name in the table, and the stages it took
    "from scratch": ("from scratch", ["from scratch"]),
    "linear probe": ("pretrained ({}), linear probe", ["pretraining"]),
    "fine-tuning": ("pretrained ({}), fine-tuned", ["pretraining", "fine-tuning"]),
    "majority class": ("majority class (chance)", []),
}
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t for 2 to 10 values


# ---- Pictures -----------------------------------------------------------------------------------

def draw_reconstruction(model: VideoMAEForPreTraining, clips, mask: str, mask_ratio: float,
                        path: Path, index: int = 0):
    """An animated GIF of a clip: as it is, what the encoder sees, and what is filled in, without
    a model and with it. The same index gives the same mask."""
    config = model.config
    if model.decoder.head.out_features != config.patch_dim:
        return  # it predicts something other than pixels
    views = clips.test_views(index)
    pixel_values = views[len(views) // 2][None]  # (1, T, 3, H, W)
    with torch.random.fork_rng(devices=[]):  # of the CPU only
        torch.manual_seed(index)
        masked = random_mask(mask, 1, config.grid, mask_ratio)  # (1, N)
    titles = ["clip", f"seen: {1 - masked.float().mean():.0%}", "mean colours, no model",
              "filled in by the model"]
    save_gif(draw_panels(model, pixel_values, masked)[:, 0], titles, Path(path))


def draw_panels(model: VideoMAEForPreTraining, pixel_values: Tensor, masked: Tensor) -> Tensor:
    """pixel_values (B, T, 3, H, W), masked (B, N) -> (4, B, T, H, W, 3) uint8: the clips, what the
    encoder sees, the means of the masked patches, and the reconstructions.

    With `norm_pix_loss`, a reconstruction takes the mean and the contrast of each patch from the
    clip itself. The third panel shows what that alone gives, as if the model predicted zeros."""
    pixel_values = pixel_values.to(next(model.parameters()).device)
    no_model = copy.deepcopy(model.eval())
    for x in no_model.decoder.head.parameters():
        nn.init.zeros_(x)
    clip, seen, reconstruction = reconstruct(model, pixel_values, masked)
    panels = torch.stack([clip, seen, reconstruct(no_model, pixel_values, masked)[2],
                          reconstruction])
    panels = rearrange(panels, "panels b t c h w -> panels b t h w c")
    return (255 * panels.float().clamp(0, 1).cpu()).byte()


def save_gif(panels: Tensor, titles: list[str], path: Path, width: int = 224):
    """panels (n, T, H, W, 3) uint8 -> an animation of them side by side, each below its title."""
    from PIL import Image, ImageDraw, ImageFont

    height, font = width * panels.shape[2] // panels.shape[3], ImageFont.load_default(16)
    pictures = []
    for frames in panels.unbind(dim=1):
        picture = Image.new("RGB", (len(titles) * (width + 6) - 6, height + 24), "white")
        for x, (frame, title) in enumerate(zip(frames, titles, strict=True)):
            frame = Image.fromarray(frame.numpy()).resize((width, height), Image.Resampling.NEAREST)
            picture.paste(frame, (x * (width + 6), 24))
            ImageDraw.Draw(picture).text((x * (width + 6), 2), title, "black", font)
        pictures.append(picture)
    pause = [200] * (len(pictures) - 1) + [1000]  # milliseconds
    write_atomic(path, lambda file: pictures[0].save(
        file, "GIF", save_all=True, append_images=pictures[1:], duration=pause, loop=0))


def draw_curves(results: dict, path: Path):
    """The losses in results.json, smoothed: of pretraining, and of training with labels."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), dpi=110, layout="tight")
    left, right = figure.subplots(1, 2)
    for axis, ways in ((left, ["pretraining"]), (right, ["fine-tuning", "from scratch"])):
        for way in ways:
            if losses := results.get(way, {}).get("losses"):
                steps, parts = np.arange(len(losses)), min(100, len(losses))
                x, y = ([x.mean() for x in np.array_split(z, parts)] for z in (steps, losses))
                axis.plot(x, y, label=way, linewidth=1)
                axis.legend(fontsize=7)
        axis.set(xlabel="step")
    left.set_ylabel("error of predicted patches")
    right.set_ylabel("cross-entropy")
    write_atomic(path, lambda file: figure.savefig(file, format="png"))


# ---- Tables -------------------------------------------------------------------------------------

def table(runs: list[dict]) -> str:
    """Contents of results.json files -> a Markdown table with a row for each way to train, and the
    mean ± std over seeds. Several seeds also show the gain over training from scratch."""
    columns = {"top1": "top-1, %", "mean_class": "mean class accuracy, %"}
    if not runs[0]["recipe"]["data"]:
        del columns["mean_class"]  # synthetic classes are of about equal size
    labels, *others = {run["recipe"]["labels_per_class"] for run in runs}
    if others:
        raise ValueError(f"runs: got {labels} and {others[0]} labels per class, expected the same")

    rows = {}  # name -> way, stages, {seed: results}
    for way, (name, stages) in WAYS.items():
        for run in runs:
            recipe = run["recipe"]
            row = name.format(recipe["init"] or f"{recipe['pretrain_steps']:,} steps")
            if way in run["results"]:
                rows.setdefault(row, (way, stages, {}))[2][recipe["seed"]] = run["results"]
    _, _, scratch = rows.get("from scratch", ("", [], {}))

    several = len({run["recipe"]["seed"] for run in runs}) > 1
    title = f"{labels} label{'s' * (labels > 1)} per class" if labels else "all labels"
    gain = ["gain over from scratch, 95 % interval"] * several
    lines = [[title, *columns.values(), *gain, "seconds"]]
    lines += [["---"] * len(lines[0])]
    for name, (way, stages, seeds) in rows.items():
        cells = [mean_and_std([x[way][column] for x in seeds.values()]) for column in columns]
        both = seeds.keys() & scratch.keys() if stages[:1] == ["pretraining"] else ()
        gain = paired([seeds[seed][way]["top1"] for seed in both],
                      [scratch[seed]["from scratch"]["top1"] for seed in both])
        times = [[x[stage]["seconds"] for x in seeds.values() if stage in x] for stage in stages]
        seconds = " + ".join(f"{np.mean(x):.0f}" for x in times if x)
        lines.append([name, *cells, *[gain] * several, seconds])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def paired(ours: list[float], theirs: list[float]) -> str:
    """The mean difference of runs that share a seed, with Student's 95 % interval."""
    differences = np.subtract(ours, theirs)
    if len(differences) < 2:
        return ""
    mean, half = differences.mean(), half_interval(differences)
    verdict = "" if abs(mean) > half else ", no clear difference"
    return f"{mean:+.1f} [{mean - half:.1f}, {mean + half:.1f}]{verdict}"


def half_interval(values) -> float:
    """Half of Student's 95 % interval of a mean; a little too wide for more than 10 values."""
    count = len(values)
    return T95[min(count, 10) - 2] * np.std(values, ddof=1) / count ** 0.5


def mean_and_std(values: list[float]) -> str:
    """12.3, or 12.3 ± 0.4 for several."""
    std = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{std}"


if __name__ == "__main__":
    states = [json.loads(Path(run, "results.json").read_text()) for run in sys.argv[1:]]
    print(table(states) if states else __doc__)
