"""What only a GPU shows, in one command and without a network -> docs/gpu.md.

    make gpu                                      everything: under 40 minutes on one GPU
    make gpu FOLDER=my/videos                     and a run on real videos
    python benchmarks/gpu.py --small --output X   the same path in few steps, also on a CPU

Each part is a command, written to the page with what came out of it. A part that fails is written
down as failed, and the command then exits with an error.
"""
import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tiny.videos import find_videos  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRAIN = ROOT / "train_tiny.py"


def call(*arguments, cwd: Path) -> tuple[bool, str]:
    """A Python command -> whether it went well, and what it printed."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, text=True,
                          env=os.environ | {"VIDEOMAE_DEVICE": DEVICE},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.returncode == 0, done.stdout


def equality(args, work: Path) -> tuple[bool, str]:
    """The equality tests with both models on the device, in fp32."""
    tests = ["-k", "equal and small" if args.small else "equal"]
    went_well, output = call("-m", "pytest", "-q", "-s", "test_videomae.py", *tests, cwd=ROOT)
    errors = re.findall(r"(.*: largest relative error .*)", output)
    return went_well and bool(errors), "\n".join([*errors, output.splitlines()[-1]])


def bench(args, work: Path) -> tuple[bool, str]:
    """Speed beside transformers, the share of the matrix-product peak, and peak memory."""
    rows = ["--only", "tiny pretrain fp32 eager"] * args.small
    went_well, output = call("benchmarks/bench.py", *rows, "--output", work / "bench", cwd=ROOT)
    if went_well:
        for name, row in json.loads((work / "bench/results.json").read_text())["rows"].items():
            if "over_floor" in row:
                output += f"{name}: {1 / row['over_floor']:.0%} of the matrix-product peak\n"
    return went_well, output


FEW = ["--unlabelled-clips", 200, "--test-clips", 64, "--pretrain-steps", 20,
       "--finetune-steps", 10, "--scratch-steps", 10]


def synthetic(args, work: Path) -> tuple[bool, str]:
    """The main job: pretrain, fine-tune, compare."""
    return call(TRAIN, *FEW * args.small, cwd=work)


def precisions(args, work: Path) -> tuple[bool, str]:
    """The same steps in each precision, compiled, and with activations computed again."""
    lines, all_well = [], True
    for options in (["--precision", "fp32"], ["--precision", "fp16"], ["--precision", "bf16"],
                    ["--compile"], ["--activation-checkpointing"], ["--accumulate", 2]):
        steps = ["--pretrain-steps", 20 if args.small else 300]
        went_well, output = call(TRAIN, "pretrain", *FEW[:4], *steps, *options, cwd=work)
        losses = re.findall(r"pretrain: loss .*", output)
        lines.append(f"{' '.join(map(str, options))}: {losses[0] if losses else output}")
        all_well = all_well and went_well
    return all_well, "\n".join(lines)


def kill_and_resume(args, work: Path) -> tuple[bool, str]:
    """kill -9 in the middle, then --resume: the losses are those of a run left alone."""
    options = [*map(str, FEW), "--pretrain-steps", "200", "--checkpoint-every", "10"]
    call(TRAIN, *options, "--name", "whole", cwd=work)
    killed = subprocess.Popen([sys.executable, TRAIN, *options, "--name", "killed"], cwd=work)
    log = work / "runs/killed/metrics.jsonl"
    while killed.poll() is None and not (log.exists() and len(log.read_text().splitlines()) > 60):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    went_well, output = call(TRAIN, "--resume", "runs/killed", cwd=work)
    losses = [[json.loads(line)["loss"] for line in path.read_text().splitlines()]
              for path in (work / "runs/whole/metrics.jsonl", log)]
    worst = max((abs(a / b - 1) for a, b in zip(*losses, strict=True)), default=1.0)
    text = "\n".join(re.findall(".*resumes at step.*", output))
    return went_well and worst < 0.05, f"{text}\nlargest relative difference of a loss: {worst:.1e}"


def real_videos(args, work: Path) -> tuple[bool, str]:
    """A folder of videos, with its recipe's defaults; then `predict` on one of them."""
    few = ["--model", "tiny", *FEW[4:]] * args.small
    folder = args.data.resolve()
    went_well, output = call(TRAIN, "--data", folder, *few, "--name", "real", cwd=work)
    (video, _), *_ = find_videos(folder, split=1)
    predicted, more = call(TRAIN, "predict", "--init", "runs/real", video, cwd=work)
    return went_well and predicted, output + more


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="few steps: that it runs, no more")
    parser.add_argument("--data", type=Path, help="a folder of videos, Class/*.mp4")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/gpu.md")
    args = parser.parse_args()
    if DEVICE == "cpu" and not args.small:
        parser.error("no GPU is here; --small runs the same path in few steps")
    parts = [equality, bench, synthetic, precisions, kill_and_resume]
    if args.data:
        parts.append(real_videos)
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "a CPU"
    write_page(f"On {name}", parts, args, args.output)


def write_page(title: str, parts, args, path: Path):
    """Run each part, part(args, a folder to work in), and write what came out of it."""
    work, all_well = Path(tempfile.mkdtemp()), True
    page = f"# {title}, torch {torch.__version__}\n\nWritten by `{' '.join(sys.argv)}`.\n"
    for part in parts:
        start = time.perf_counter()
        went_well, output = part(args, work)
        all_well = all_well and went_well
        state = f"{'Went well' if went_well else '**Failed**'}, "
        state += f"{time.perf_counter() - start:.0f} s."
        page += f"\n## {part.__doc__}\n\n{state}\n\n```\n{output.strip()[-6000:]}\n```\n"
        print(part.__doc__, state, flush=True)
        path.write_text(page)
    shutil.rmtree(work)
    print(f"{path} is written")
    sys.exit(not all_well)


if __name__ == "__main__":
    main()
