"""Compare speed and memory with transformers on the current machine.

    python benchmarks/bench.py                    the eight rows of benchmarks/README.md
    python benchmarks/bench.py --only "base pretrain bf16 compiled" processor

The candidates in a row take turns in one process (A B C A B C ...), so that other load on the
machine affects all of them, and medians are compared. The ratio is transformers' number divided by
ours, so above 1 ours is better. First prediction and memory are measured in fresh processes.

The share of peak compares a step with pure matrix products: at the speed of one large square
product, the operations of our step, as PyTorch counts them, would take this share of its time.
On a GPU each step starts on an idle device, and fp32 does not use TF32.
"""
import argparse
import importlib
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from checkpoints import config_to_json  # noqa: E402
from processor import VideoMAEImageProcessor  # noqa: E402
from videomae import VideoMAEConfig, random_mask, split_mask  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
torch.backends.cudnn.allow_tf32 = False  # transformers embeds patches with a convolution

SIDES = {  # side: (module of the models, module and class of the image processor)
    "ours": ("videomae", "processor", "VideoMAEImageProcessor"),
    "transformers": ("transformers", "transformers.models.videomae.image_processing_pil_videomae",
                     "VideoMAEImageProcessorPil"),  # works without torchvision
}
CLASSES = {"pretrain": "VideoMAEForPreTraining", "classify": "VideoMAEForVideoClassification"}
SIZES = {  # preset: (batch, mask ratio)
    "tiny": (1024 if GPU else 32, 0.75),  # 32 as in the default run
    "laptop": (128 if GPU else 8, 0.75),
    "base": (32 if GPU else 2, 0.9),
}


# ---- Steps, with the same sizes, inputs and optimizer on both sides -----------------------------

def make_model(side: str, size: str, task: str) -> torch.nn.Module:
    """A preset with random weights, for pretraining or classification."""
    config = VideoMAEConfig.preset(size, use_mean_pooling=task == "classify", num_labels=400,
                                   head_norm_eps=1e-5)  # fixed in transformers
    models = importlib.import_module(SIDES[side][0])
    if side == "transformers":
        config = models.VideoMAEConfig.from_dict(config_to_json(config), attn_implementation="sdpa")
    return getattr(models, CLASSES[task])(config)


def make_step(side: str, size: str, task: str, batch: int, precision="fp32", mode="eager",
              device=DEVICE):
    """-> a function that pretrains (forward, backward, AdamW) or classifies (forward) one batch."""
    torch.manual_seed(0)
    config = VideoMAEConfig.preset(size)
    clips = torch.randn(batch, config.num_frames, 3, *config.image_hw).to(device)
    mask = random_mask("tube", batch, config.grid, mask_ratio=SIZES[size][1])

    model = make_model(side, size, task).to(device).train(task == "pretrain")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device != "meta")
    is_autoencoder = side == "ours" and task == "pretrain"
    run = model.autoencode if is_autoencoder else model  # compiles to one graph
    run = torch.compile(run) if mode == "compiled" else run
    autocast = partial(torch.autocast, DEVICE, torch.bfloat16, enabled=precision == "bf16")

    def pretrain():
        # We split the mask on the CPU. transformers indexes with it on the device.
        masks = split_mask(mask) if side == "ours" else [mask]
        with autocast():
            loss = run(clips, *(x.to(device) for x in masks))[0]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def classify():
        with autocast():
            run(clips)

    return pretrain if task == "pretrain" else classify


def count_operations(size: str, task: str, batch: int) -> int:
    """Floating-point operations in the matrix products of our step, attention included."""
    step = make_step("ours", size, task, batch, device="meta")  # meta computes nothing
    # Use plain products, because the CPU's fused attention would not be counted.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return counter.get_total_flops()


# ---- Rows: row(sides, seconds) -> a number for each side ----------------------------------------

def timed(function) -> float:
    """Milliseconds that one call takes, including the device's work."""
    start = time.perf_counter()
    function()
    if GPU:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def take_turns(functions: dict, seconds: float) -> dict[str, float]:
    """The median time of each in 7 to 50 rounds, after two calls to warm up."""
    for function in functions.values():
        timed(function)
    one_round = sum(timed(function) for function in functions.values())
    times = {name: [] for name in functions}
    for _ in range(max(7, min(50, int(1000 * seconds / one_round)))):
        for name, function in functions.items():
            times[name].append(timed(function))
    return {name: statistics.median(values) for name, values in times.items()}


def step_row(size: str, task: str, precision: str, mode: str, sides, seconds: float) -> dict:
    """Time a training step or a forward pass, and a large matrix product."""
    batch, n = SIZES[size][0], 8192 if GPU else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))

    steps = {side: make_step(side, size, task, batch, precision, mode) for side in sides}
    times = take_turns(steps | {"product": lambda: a @ b}, seconds)
    torch.compiler.reset()
    if "ours" in times:
        at_peak = count_operations(size, task, batch) / (2 * n**3) * times["product"]
        times["share of peak"] = at_peak / times["ours"]
    return times


def processor_row(sides, seconds: float) -> dict:
    """16 frames of 240 x 320, 8-bit -> (1, 16, 3, 224, 224)."""
    video = list(np.random.default_rng(0).integers(0, 256, (16, 240, 320, 3), dtype=np.uint8))
    calls = {}
    for side in sides:
        _, module, name = SIDES[side]
        processor = getattr(importlib.import_module(module), name)()
        calls[side] = partial(processor, video, return_tensors="pt")
    return take_turns(calls, seconds)


def fresh_process(code: str) -> str:
    """Run code in a new Python process -> what it prints."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout


FIRST_PREDICTION = """
import numpy as np
from {} import VideoMAEForVideoClassification
from {} import {} as Processor

folder = {!r}
model = VideoMAEForVideoClassification.from_pretrained(folder).eval()
video = list(np.zeros((16, 240, 320, 3), np.uint8))
pixels = Processor.from_pretrained(folder)(video, return_tensors="pt")
print(model(**pixels).logits.argmax().item())
"""


def first_prediction_row(sides, seconds: float) -> dict:
    """Time from starting Python to a class: import, load a ViT-S from disk, process, predict."""
    with tempfile.TemporaryDirectory() as folder:
        make_model("ours", "small", "classify").save_pretrained(folder)
        VideoMAEImageProcessor().save_pretrained(folder)
        codes = {side: FIRST_PREDICTION.format(*SIDES[side], folder) for side in sides}
        if len({fresh_process(code) for code in codes.values()}) > 1:
            raise RuntimeError("the two sides predict different classes")
        calls = {side: partial(fresh_process, code) for side, code in codes.items()}
        return take_turns(calls, seconds)


def memory_row(sides, seconds: float) -> dict:
    """Peak memory of two pretraining steps of ViT-B, batch 4, fp32."""
    code = "import bench; print(bench.peak_memory({!r}))"
    return {side: float(fresh_process(code.format(side))) for side in sides}


def peak_memory(side: str) -> float:
    """Peak memory in GiB; on a CPU (Linux only), of the whole process with its libraries."""
    step = make_step(side, "base", "pretrain", batch=4)
    step()
    step()
    if GPU:
        return torch.cuda.max_memory_allocated() / 2**30
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20


STEPS = itertools.product(SIZES, CLASSES, ("fp32", "bf16"), ("eager", "compiled"))
ROWS = {" ".join(step): partial(step_row, *step) for step in STEPS}
ROWS |= {"processor": processor_row, "first prediction": first_prediction_row,
         "memory": memory_row}
IN_README = ["tiny pretrain fp32 eager", "laptop pretrain fp32 eager", "base pretrain fp32 eager",
             "base pretrain bf16 eager", "base classify fp32 eager",
             "processor", "first prediction", "memory"]


# ---- The table ----------------------------------------------------------------------------------

def table_line(name: str, row: dict) -> str:
    unit = "GiB" if name == "memory" else "ms"
    cells = [f"{row[side]:,.2f} {unit}" if side in row else "" for side in SIDES]
    cells.append(f"{row['transformers'] / row['ours']:.2f}" if SIDES.keys() <= row.keys() else "")
    cells.append(f"{row['share of peak']:.0%}" if "share of peak" in row else "")
    return f"| {' | '.join([name, *cells])} |"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=IN_README, metavar="ROW",
                        help=f"one or more of: {', '.join(ROWS)}")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--seconds", type=float, default=10.0, help="time for the rounds of a row")
    args = parser.parse_args(argv)

    cpu = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    print(f"{torch.cuda.get_device_name() if GPU else cpu}; torch {torch.__version__}\n")
    print("|  | ours | transformers | ratio | share of peak |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    for name in args.only:
        print(table_line(name, ROWS[name](args.sides, args.seconds)), flush=True)


if __name__ == "__main__":
    main()
