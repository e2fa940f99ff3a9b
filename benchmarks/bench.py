"""This project beside transformers, in one run, on whatever machine this is.

    python benchmarks/bench.py               everything: 15 to 25 minutes on two CPU cores
    python benchmarks/bench.py --only "base pretrain fp32 eager" processor

Both sides of a row, and a matrix product, take turns in one process (A B C A B C ...), so that
whatever else the machine does falls on all of them. Medians are compared. "ratio" is transformers'
over ours: above 1, ours is better. Memory and the first prediction are taken in fresh processes.

The floor is the time of a step's arithmetic alone: the operations that PyTorch counts in our step,
attention included, at the rate of a large square matrix product. Smaller products do not reach it.
On a GPU a step is timed from an idle device, launches included, and fp32 is without TF32.

It prints a table and writes results.json (milliseconds; memory in GiB), row by row, to --output, a
folder that must not exist yet.
"""
import argparse
import importlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
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
torch.backends.cudnn.allow_tf32 = False  # PyTorch allows it for convolutions, unless told

SIDES = {  # side: (module of the models, module and class of the image processor)
    "ours": ("videomae", "processor", "VideoMAEImageProcessor"),
    "transformers": ("transformers", "transformers.models.videomae.image_processing_pil_videomae",
                     "VideoMAEImageProcessorPil"),  # the one that needs no torchvision
}
CLASSES = {"pretrain": "VideoMAEForPreTraining", "classify": "VideoMAEForVideoClassification"}
SIZES = {  # preset: (batch, mask ratio)
    "tiny": (1024 if GPU else 48, 0.75),  # 48: of `make train` when it was measured
    "laptop": (128 if GPU else 8, 0.75),
    "base": (32 if GPU else 2, 0.9),
}


# --------------------------------------------------------------------------------------------------
# The two sides: the same sizes, the same inputs, AdamW with the same arguments


def make_model(side: str, size: str, task: str) -> torch.nn.Module:
    config = VideoMAEConfig.preset(size, use_mean_pooling=task == "classify", num_labels=400)
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
    run = torch.compile(model) if mode == "compiled" else model
    autocast = partial(torch.autocast, DEVICE, torch.bfloat16, enabled=precision == "bf16")

    def pretrain():
        # We take the mask split, on the CPU; transformers takes it whole, on the device.
        masked = split_mask(mask) if side == "ours" else mask.to(device)
        with autocast():
            loss = run(clips, masked).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def classify():
        with autocast():
            run(clips)

    return pretrain if task == "pretrain" else classify


def count_operations(size: str, task: str, batch: int) -> int:
    """Floating-point operations of our step: those of matrix products, attention included."""
    step = make_step("ours", size, task, batch, device="meta")  # where nothing is computed
    # Attention as plain products, since the CPU's fused kernel is not counted.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return counter.get_total_flops()


# --------------------------------------------------------------------------------------------------
# The rows of the table


def timed(function) -> float:
    """Milliseconds that one call takes, the device's work included."""
    start = time.perf_counter()
    function()
    if GPU:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def take_turns(functions: dict) -> dict[str, float]:
    """Each one's median time: two calls to warm up, then 7 to 50 rounds, in about 10 seconds."""
    for function in functions.values():
        timed(function)
    one_round = sum(timed(function) for function in functions.values())
    times = {name: [] for name in functions}
    for _ in range(max(7, min(50, int(10_000 / one_round)))):
        for name, function in functions.items():
            times[name].append(timed(function))
    return {name: statistics.median(values) for name, values in times.items()}


def step_row(size: str, task: str, precision: str, mode: str) -> dict:
    batch, n = SIZES[size][0], 8192 if GPU else 2048
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))

    steps = {side: make_step(side, size, task, batch, precision, mode) for side in SIDES}
    times = take_turns(steps | {"product": lambda: a @ b})
    torch.compiler.reset()
    floor = count_operations(size, task, batch) / (2 * n**3) * times.pop("product")
    return times | {"over_floor": times["ours"] / floor}


def processor_row() -> dict:
    """16 frames of 240 x 320, 8-bit -> (1, 16, 3, 224, 224)."""
    video = list(np.random.default_rng(0).integers(0, 256, (16, 240, 320, 3), dtype=np.uint8))
    calls = {}
    for side, (_, module, name) in SIDES.items():
        processor = getattr(importlib.import_module(module), name)()
        calls[side] = partial(processor, video, return_tensors="pt")
    return take_turns(calls)


def fresh_process(code: str) -> str:
    """What a new Python prints."""
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


def first_prediction_row() -> dict:
    """From starting Python to a clip's class: import, load a ViT-S from disk, process, predict."""
    with tempfile.TemporaryDirectory() as folder:
        make_model("ours", "small", "classify").save_pretrained(folder)
        VideoMAEImageProcessor().save_pretrained(folder)
        calls = {side: partial(fresh_process, FIRST_PREDICTION.format(*modules, folder))
                 for side, modules in SIDES.items()}
        if calls["ours"]() != calls["transformers"]():
            raise RuntimeError("the two sides predict different classes")
        return take_turns(calls)


def memory_row() -> dict:
    """Peak memory of two pretraining steps of ViT-B, batch 4, fp32."""
    code = "import bench; print(bench.peak_memory({!r}))"
    return {side: float(fresh_process(code.format(side))) for side in SIDES}


def peak_memory(side: str) -> float:
    """In GiB; on a CPU (Linux only) all that this process has held, libraries included."""
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


def table_line(name: str, row: dict) -> str:
    unit = "GiB" if name == "memory" else "ms"
    cells = [f"{row[side]:,.2f} {unit}" for side in SIDES] + [f"{row['ratio']:.2f}"]
    floor = f"{row['over_floor']:.2f}" if "over_floor" in row else ""
    return f"| {name} | {' | '.join(cells)} | {floor} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=ROWS, default=ROWS, metavar="ROW",
                        help=f"one or more of: {', '.join(ROWS)}")
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"--output: {args.output} exists already, expected a new folder")
    args.output.mkdir(parents=True)

    cpu = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name() if GPU else cpu
    machine = f"{name}; torch {torch.__version__}, transformers {version('transformers')}"
    results = {"machine": machine, "rows": {}}
    print(machine)
    print("|  | ours | transformers | ratio | ours over the floor |")
    print("| --- | --- | --- | --- | --- |", flush=True)
    for name in args.only:
        row = ROWS[name]()
        row["ratio"] = row["transformers"] / row["ours"]
        results["rows"][name] = row
        print(table_line(name, row), flush=True)
        (args.output / "results.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
