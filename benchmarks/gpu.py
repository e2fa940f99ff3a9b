"""Run the checks that need a GPU, in at most 8 minutes without a network, and write docs/gpu.md.

    make gpu                                      or, with a run on real videos: make gpu FOLDER=...
    python benchmarks/gpu.py --small --output X   the same parts with few steps, also on a CPU

Each part is a command with a time budget, and may use what earlier parts left over. The page is
written after each part, so an interrupted run keeps its results. A part that fails is marked, one
that runs out of time reports how far it got, and one whose packages are missing is skipped.
"""
import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from checkpoints import write_atomic  # noqa: E402
from tiny.synthetic import SyntheticClips  # noqa: E402
from train_tiny import VIDEOS_ON_GPU, Batches, fit, reconstruction_loss  # noqa: E402
from videomae import VideoMAEConfig, VideoMAEForPreTraining  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MISSING = re.compile("No module named '(av|matplotlib|PIL|tqdm|transformers)'")


def make_parts(folder: Path | None, small: bool) -> list[tuple]:
    """-> (title, minutes, Python's arguments) of each part, the most informative first."""
    bench, train = ROOT / "benchmarks/bench.py", ROOT / "train_tiny.py"
    rows = [f"{size} pretrain bf16 {mode}"
            for mode in ("eager", "compiled") for size in ("base", "laptop")]
    tests, few, clips = "equals", [], []
    if small:
        rows, tests = ["tiny pretrain bf16 eager"], "equals and not ViT"
        few = "--model tiny --pretrain-steps 20 --finetune-steps 10 --scratch-steps 10".split()
        clips = "--unlabelled-clips 200 --test-clips 64".split()
    parts = [
        ("Outputs equal the published ones, and gradients transformers', in fp32", 1,
         ["-m", "pytest", "-qs", "--disable-warnings", ROOT / "test_videomae.py", "-k", tests]),
        ("Step times, and how close they come to pure matrix products", 2,
         [bench, "--sides", "ours", "--only", *rows]),
        ("The default run", 1.5, [train, *few, *clips]),
        ("A killed run resumes", 0.5, ["-c", "import gpu; gpu.kill_and_resume()"]),
    ]
    if folder:
        code = f"import gpu; gpu.feed({str(folder.resolve())!r}, {20 if small else 200})"
        parts.append(("Speed of the data loader", 0.5, ["-c", code]))
        options = ["--data", folder.resolve(), "--save-every", 20]
        parts.append(("A run on real videos", 2.5, [train, *options, *few]))
    return parts


# ---- The page -----------------------------------------------------------------------------------

def write_page(title: str, parts: list[tuple], page: Path) -> bool:
    """Run the parts and write a page of what each prints -> whether none of them failed."""
    text, all_well, deadline = f"# {title}\n", True, time.monotonic()
    for title, minutes, arguments in parts:
        start, deadline = time.monotonic(), deadline + 60 * minutes
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            code, output = call(arguments, Path(folder), deadline - start)
        states = {0: "Passed", None: "Timed out"}
        state, missing = states.get(code, "**Failed**"), MISSING.search(output)
        if code and missing:
            state = f"Skipped, {missing[1]} is not installed"
        all_well = all_well and state != "**Failed**"
        state += f" ({time.monotonic() - start:.0f} s)."

        command = " ".join(map(str, arguments)).replace(f"{ROOT}/", "")
        lines = [line for line in output.splitlines() if line.strip(".s ")]  # skips pytest's dots
        body = "\n".join([f"$ python {command}", *lines])[-6000:]
        text += f"\n## {title}\n\n{state}\n\n```\n{body}\n```\n"
        write_atomic(page, text.encode())
        print(f"{title}: {state}", flush=True)
    return all_well


def call(arguments, folder: Path, seconds: float) -> tuple[int | None, str]:
    """Run Python in a folder -> its exit code, None if it timed out, and what it printed."""
    paths, log = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")]), folder / "output.txt"
    env = os.environ | {"VIDEOMAE_DEVICE": DEVICE, "PYTHONPATH": paths,
                        "NVIDIA_TF32_OVERRIDE": "0"}  # exact fp32, in convolutions too
    try:
        with open(log, "w") as out:
            code = subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, env=env,
                                  stdout=out, stderr=out, timeout=max(seconds, 1)).returncode
    except subprocess.TimeoutExpired:
        code = None
    output = log.read_text(errors="replace")
    for path in [] if code == 0 else folder.glob("runs/*/*.pt"):  # progress saved by `fit`
        state = torch.load(path, weights_only=True, map_location="cpu")
        step, losses = state["step"], state["losses"]
        output += (f"{path.stem}: loss {losses[0]:.3f} -> {losses[step - 1]:.3f} after {step} of "
                   f"{len(losses)} steps, {state['seconds']:.0f} s\n")
    return code, output


# ---- Parts in this file -------------------------------------------------------------------------

class Deadly(Batches):
    """Batches that kill the process at step 10."""

    def __getitem__(self, step):
        if step == 10:
            os.kill(os.getpid(), 9)
        return super().__getitem__(step)


def train(path: Path | None, batches=Batches) -> torch.Tensor:
    """-> the losses of 100 steps. With a path, the state is saved every 8 steps."""
    config = VideoMAEConfig.preset("tiny")
    torch.manual_seed(0)
    model = VideoMAEForPreTraining(config).to(DEVICE)
    batches = batches(SyntheticClips(64, config, seed=0), torch.arange(64), batch=8)
    loss_of = partial(reconstruction_loss, grid=config.grid, mask="tube", mask_ratio=0.75)
    return fit(model, batches, loss_of, steps=100, lr=1e-3, path=path, save_every=8)


def kill_and_resume():
    """Kill a process at step 10, resume it and compare its losses with an uninterrupted run's."""
    whole, path = train(None), Path("state.pt")
    code = "import gpu; gpu.train(gpu.Path('state.pt'), gpu.Deadly)"
    killed = subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode
    step = torch.load(path, weights_only=True, map_location="cpu")["step"]
    resumed = train(path)
    difference = (resumed / whole - 1).abs().max().item()
    print(f"exit code {killed}, resumed at step {step} of {len(whole)}\n"
          f"loss {whole[0]:.4f} -> {whole[-1]:.4f}, resumed {resumed[-1]:.4f}; "
          f"largest relative difference {difference:.1e}")
    # A GPU sums attention's gradients in varying order. A CPU is deterministic.
    limit = 0.0 if DEVICE == "cpu" else 0.05
    sys.exit(killed != -9 or difference > limit)


def feed(folder: str, steps: int):
    """Time the reading of training batches of the GPU recipe, without training."""
    from tiny.videos import load_videos  # needs PyAV

    config = VideoMAEConfig.preset(VIDEOS_ON_GPU.model)
    clips, _ = load_videos(folder, config, VIDEOS_ON_GPU.fps)
    batch = VIDEOS_ON_GPU.pretrain_batch
    batches = Batches(clips, torch.arange(len(clips.labels)), batch)
    for workers in (1, 2, 4):
        loader = DataLoader(batches, batch_size=None, sampler=range(steps + 1),
                            num_workers=workers)
        start = 0.0
        for step, _ in enumerate(loader):
            if step == 0:
                start = time.perf_counter()  # workers have started
        rate = steps * batch / (time.perf_counter() - start)
        print(f"workers: {workers}, clips a second: {rate:,.0f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="few steps, to check every part")
    parser.add_argument("--data", type=Path, help="a folder of videos, FOLDER/Class/*.mp4")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/gpu.md")
    args = parser.parse_args()
    if DEVICE == "cpu" and not args.small:
        parser.error("PyTorch finds no GPU; use --small for the same parts with few steps")
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "a CPU"
    all_well = write_page(f"On {device}, torch {torch.__version__}",
                          make_parts(args.data, args.small), args.output)
    print(f"wrote {args.output}")
    sys.exit(not all_well)


if __name__ == "__main__":
    main()
