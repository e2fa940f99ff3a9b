"""This project beside transformers, in one run, on whatever machine this is.

    python benchmarks/bench.py                        everything: a quarter of an hour on two CPU cores
    python benchmarks/bench.py --only "base pretrain fp32 eager" processor
    python benchmarks/bench.py --profile "laptop pretrain fp32 eager"       where one step's time goes, ours
    python benchmarks/bench.py --scaling              only the curves

Both sides of a row, and a matrix product, take turns in one process (A B C A B C ...), so that whatever else the
machine does falls on all of them. Medians are compared; "ratio" is transformers' over ours: above 1, ours is faster.
Peak memory and start-up are taken in fresh processes. The floor is the time of the arithmetic alone: the operations
PyTorch counts in our step, attention included, at the rate of a large square matrix product; smaller products
do not reach it. Dual masking is another task (half the cubes are predicted), not the same numbers faster. On a GPU a
step is timed from an idle device, launches included, and fp32 is without TF32.

It prints a table and writes results.json, row by row, and scaling.png to --output, a folder that is not there yet.
"""
import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import videomae  # noqa: E402
from videomae import VideoMAEConfig, random_mask, split_mask  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES = {  # name: (preset, batch, mask ratio); batches on a GPU are those that fill one
    "embedded": ("tiny", 48 if DEVICE.type == "cpu" else 1024, 0.75),  # the default of train_tiny.py
    "laptop": ("laptop", 8 if DEVICE.type == "cpu" else 128, 0.75),
    "base": ("base", 2 if DEVICE.type == "cpu" else 32, 0.9),
}


# ----------------------------------------------------------------------------------------------------------------------
# The two sides: the same model, the same inputs, AdamW with the same arguments


def published(config: VideoMAEConfig):
    """The same sizes as a config of transformers'."""
    import transformers

    known = transformers.VideoMAEConfig().to_dict()
    same = {name: value for name, value in config.to_dict().items() if name in known}
    return transformers.VideoMAEConfig(**same | dict(num_labels=config.num_labels, attn_implementation="sdpa"))


def make_model(side: str, task: str, config: VideoMAEConfig):
    """-> the side's model for "pretrain" or "classify"."""
    if side != "transformers":
        cls = {"pretrain": videomae.VideoMAEForPreTraining, "classify": videomae.VideoMAEForVideoClassification}[task]
        return cls(config).to(DEVICE)
    import transformers

    cls = {"pretrain": transformers.VideoMAEForPreTraining,
           "classify": transformers.VideoMAEForVideoClassification}[task]
    return cls(published(config)).to(DEVICE)


def make_step(side: str, task: str, config: VideoMAEConfig, batch: int, ratio: float, dtype: torch.dtype,
              compiled: bool = False):
    """-> a function that does one step: forward, backward and AdamW, or for "classify" the forward pass alone."""
    torch.manual_seed(0)
    config = replace(config, use_mean_pooling=task == "classify", num_labels=400)
    height, width = config.image_hw
    clip = torch.randn(batch, config.num_frames, config.num_channels, height, width).to(DEVICE)
    mask = random_mask("tube", batch, config.grid, ratio)
    cells = videomae.running_cells(batch, config.grid) if side == "ours, dual masking" else None
    model = make_model(side, task, config)
    called = torch.compile(model) if compiled else model

    def autocast():
        return torch.autocast(DEVICE.type, dtype, enabled=dtype != torch.float32)

    if task == "classify":
        model.eval()

        @torch.no_grad()
        def step():
            with autocast():
                called(clip)
        return step

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        hidden = mask.to(DEVICE) if side == "transformers" else split_mask(mask, cells)  # as each is meant to be used
        with autocast():
            loss = called(clip, hidden).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def count_flops(task: str, config: VideoMAEConfig, ratio: float) -> int:
    """Floating-point operations of our step on one clip: matrix products, attention included.

    Attention is written out for counting (PyTorch's counter does not know the CPU's fused kernel), on the meta device,
    where nothing is computed.
    """
    model = make_model("ours", task, replace(config, use_mean_pooling=task == "classify")).to("meta")
    clip = torch.empty(1, config.num_frames, config.num_channels, *config.image_hw, device="meta")
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if task == "pretrain":
            model(clip, random_mask("tube", 1, config.grid, ratio)).loss.backward()
        else:
            with torch.no_grad():
                model(clip)
    return counter.get_total_flops()


# ----------------------------------------------------------------------------------------------------------------------
# Timing


def timed(function) -> float:
    """Seconds of one call, the device's work included."""
    if DEVICE.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def take_turns(sides: dict, seconds: float = 10, most: int = 50) -> dict[str, float]:
    """Each side's median time: two calls to warm up, then turns for about so many seconds, seven at least."""
    for function in sides.values():
        timed(function)
    round_time = sum(timed(function) for function in sides.values())
    rounds = max(7, min(most, int(seconds / round_time)))
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, function in sides.items():
            times[name].append(timed(function))
    return {name: statistics.median(values) for name, values in times.items()}


def matrix_product(dtype: torch.dtype):
    """-> (a function that multiplies two square matrices, the operations in it)."""
    n = 2048 if DEVICE.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    return lambda: a @ b, 2 * n**3


def step_row(size: str, task: str, precision: str, mode: str) -> dict:
    """One row of the table."""
    preset, batch, ratio = SIZES[size]
    config, dtype = VideoMAEConfig.preset(preset), DTYPES[precision]
    sides = {side: make_step(side, task, config, batch, ratio, dtype, mode == "compiled")
             for side in ("ours", "transformers")}
    if task == "pretrain" and mode == "eager":
        sides["ours, dual masking"] = make_step("ours, dual masking", task, config, batch, ratio, dtype)
    product, operations = matrix_product(dtype)
    median = take_turns(sides | {"product": product})
    rate, flops = operations / median.pop("product"), batch * count_flops(task, config, ratio)
    row = dict(seconds=median, ratio=median["transformers"] / median["ours"], gflop=flops / 1e9,
               gflop_per_s=rate / 1e9, over_floor=median["ours"] / (flops / rate))
    if DEVICE.type == "cuda":
        row |= dict(clips_per_s=batch / median["ours"])
    torch.compiler.reset()
    return row


def processor_row() -> dict:
    """16 frames of 240 x 320, 8-bit, to a normalized (1, 16, 3, 224, 224), beside transformers' Pillow path (its other
    one needs torchvision)."""
    from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil

    video = list(np.random.default_rng(0).integers(0, 256, (16, 240, 320, 3), dtype=np.uint8))
    ours, theirs = videomae.VideoMAEImageProcessor(), VideoMAEImageProcessorPil()
    median = take_turns({"ours": lambda: ours(video, return_tensors="pt"),
                         "transformers": lambda: theirs(video, return_tensors="pt")})
    return dict(seconds=median, ratio=median["transformers"] / median["ours"])


# ----------------------------------------------------------------------------------------------------------------------
# Fresh processes

FIRST_PREDICTION = """
import numpy as np
{imports}
video = list(np.zeros((16, 240, 320, 3), np.uint8))
model = VideoMAEForVideoClassification.from_pretrained(r"{directory}").eval()
processor = {processor}.from_pretrained(r"{directory}")
print(model(**processor(video, return_tensors="pt")).logits.argmax().item())
"""
IMPORTS = {
    "ours": ("from videomae import VideoMAEForVideoClassification, VideoMAEImageProcessor", "VideoMAEImageProcessor"),
    "transformers": ("from transformers import VideoMAEForVideoClassification\n"
                     "from transformers.models.videomae.image_processing_pil_videomae import VideoMAEImageProcessorPil",
                     "VideoMAEImageProcessorPil"),
}


def fresh_process(*arguments: str) -> str:
    """What python prints, run with these arguments where videomae.py is found."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{arguments}: {done.stderr}")
    return done.stdout


def start_row() -> dict:
    """From starting Python to the class of a clip: import, load a ViT-S from disk, process, predict."""
    with tempfile.TemporaryDirectory() as directory:
        config = VideoMAEConfig.preset("small", num_labels=400)
        videomae.VideoMAEForVideoClassification(config).save_pretrained(directory)
        videomae.VideoMAEImageProcessor().save_pretrained(directory)
        scripts = {side: FIRST_PREDICTION.format(imports=imports, processor=processor, directory=directory)
                   for side, (imports, processor) in IMPORTS.items()}
        answers = {side: fresh_process("-c", script) for side, script in scripts.items()}
        if len(set(answers.values())) != 1:
            raise RuntimeError(f"the two sides disagree: {answers}")
        median = take_turns({side: lambda s=script: fresh_process("-c", s) for side, script in scripts.items()})
    return dict(seconds=median, ratio=median["transformers"] / median["ours"])


def memory_row() -> dict:
    """Most memory during two pretraining steps of ViT-B, batch 4, fp32; on a CPU the process's, libraries included."""
    peak = {side: float(fresh_process(__file__, "--memory-of", side))
            for side in ("ours", "transformers", "ours, dual masking")}
    return dict(gib=peak, ratio=peak["transformers"] / peak["ours"])


def memory_of(side: str) -> float:
    """See `memory_row`; in GiB."""
    step = make_step(side, "pretrain", VideoMAEConfig.preset("base"), 4, 0.9, torch.float32)
    step()
    step()
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    if sys.platform == "linux":  # getrusage would count the process this one was started from
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


# ----------------------------------------------------------------------------------------------------------------------
# How time grows


def scaling() -> dict:
    """A pretraining step, laptop size, over frames, mask ratio and batch: {axis: {value: {side: seconds}}}."""
    base = dict(num_frames=16, ratio=0.75, batch=4)
    axes = {"num_frames": (8, 16, 32, 64), "ratio": (0.5, 0.75, 0.9, 0.95), "batch": (1, 2, 4, 8, 16)}
    curves = {}
    for axis, values in axes.items():
        curves[axis] = {}
        for value in values:
            at = base | {axis: value}
            config = VideoMAEConfig.preset("laptop", num_frames=at["num_frames"])
            sides = {side: make_step(side, "pretrain", config, at["batch"], at["ratio"], torch.float32)
                     for side in ("ours", "transformers", "ours, dual masking")}
            curves[axis][value] = take_turns(sides, seconds=5)
    return curves


def draw_scaling(curves: dict, path: Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    titles = {"num_frames": "frames", "ratio": "mask ratio", "batch": "batch"}
    for axis, (name, points) in zip(axes, curves.items(), strict=True):
        for side in next(iter(points.values())):
            label = side.replace("dual masking", "dual masking (predicts half)")
            axis.plot([float(value) for value in points], [1000 * s[side] for s in points.values()], "o-", label=label)
        axis.set(xlabel=titles[name], ylabel="ms a step", ylim=(0, None), xticks=[float(value) for value in points])
        axis.set_xticklabels([f"{float(value):g}" for value in points], fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle("Whole pretraining step, decoder included: 112 px, width 192, depth 6, fp32, eager; 16 frames, "
                    "ratio 0.75, batch 4 where not said", fontsize=9)
    figure.savefig(path, dpi=110)


# ----------------------------------------------------------------------------------------------------------------------
# The table

ROWS = {f"{size} {task} {precision} {mode}": (step_row, size, task, precision, mode)
        for size in SIZES for task in ("pretrain", "classify")
        for precision in DTYPES for mode in ("eager", "compiled")}
ROWS |= {"processor": (processor_row,), "first prediction": (start_row,), "memory": (memory_row,)}


def machine() -> str:
    """What the numbers were taken on."""
    import transformers

    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or platform.machine()
    if DEVICE.type == "cpu" and Path("/proc/cpuinfo").exists():
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = f"{found[1] if found else name}, {torch.backends.cpu.get_cpu_capability()}"
    if DEVICE.type == "cpu":
        name += f", {torch.get_num_threads()} threads"
    return f"{name}; torch {torch.__version__}, transformers {transformers.__version__}"


def markdown(name: str, row: dict) -> str:
    """A line of the table."""
    def show(value):
        if "gib" in row:
            return f"{value:.2f} GiB"
        return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"

    values = row.get("seconds") or row["gib"]
    dual = values.get("ours, dual masking")
    cells = [name, show(values["ours"]), show(values["transformers"]), f"{row['ratio']:.2f}",
             f"{row['over_floor']:.2f}" if "over_floor" in row else "", show(dual) if dual else ""]
    return f"| {' | '.join(cells)} |"


def profile(name: str):
    """Where the time of our step goes, by kind of operation."""
    _, size, task, precision, mode = ROWS[name]
    preset, batch, ratio = SIZES[size]
    step = make_step("ours", task, VideoMAEConfig.preset(preset), batch, ratio, DTYPES[precision], mode == "compiled")
    step()
    step()
    with torch.profiler.profile() as profiler:
        for _ in range(5):
            step()
    by = "self_device_time_total" if DEVICE.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=50))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--only", nargs="+", choices=ROWS, metavar="ROW", help=f"one or more of: {', '.join(ROWS)}")
    what.add_argument("--scaling", action="store_true", help="only the curves")
    what.add_argument("--profile", choices=ROWS, metavar="ROW")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    if args.memory_of:
        return print(memory_of(args.memory_of))
    if args.profile:
        return profile(args.profile)

    if args.output.exists():
        parser.error(f"--output: {args.output} exists already; name another folder")
    args.output.mkdir(parents=True)
    results = dict(machine=machine(), rows={}, scaling={})

    def save():
        (args.output / "results.json").write_text(json.dumps(results, indent=1))

    print(results["machine"], flush=True)
    if not args.scaling:
        heads = ["", "ours", "transformers", "ratio", "ours over the floor", "ours, dual masking"]
        print(f"| {' | '.join(heads)} |\n{'| --- ' * len(heads)}|")
        for name in args.only or ROWS:
            function, *arguments = ROWS[name]
            results["rows"][name] = function(*arguments)
            print(markdown(name, results["rows"][name]), flush=True)
            save()
    if not args.only:
        results["scaling"] = scaling()
        save()
        draw_scaling(results["scaling"], args.output / "scaling.png")
    print(f"{args.output}/results.json")


if __name__ == "__main__":
    main()
