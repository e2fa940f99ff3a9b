"""What only the network shows, in one command -> docs/hub.md. It downloads about 2 GB.

    make hub FOLDER=my/videos                     a small folder of videos, Class/*.mp4
    python benchmarks/hub.py --small --data FOLDER --output X    tiny weights from golden/ instead
"""
import argparse
from pathlib import Path

from gpu import ROOT, TRAIN, call, write_page

from tiny.videos import find_videos


def published_values(args, work: Path) -> tuple[bool, str]:
    """Published weights give the values that transformers' own tests check."""
    marked = ["-k", "equals_transformers_4"] if args.small else ["-m", "hub"]
    tests = ["test_videomae.py", "tests/test_checkpoints.py"]
    return call("-m", "pytest", "-q", *tests, *marked, cwd=ROOT)


def classified(args, work: Path) -> tuple[bool, str]:
    """A published classifier names what one of the videos shows."""
    model = ROOT / "golden/hf_classify_tiny" if args.small else (
        "MCG-NJU/videomae-base-finetuned-kinetics")
    (video, _), *_ = find_videos(args.data.resolve(), split=1)
    return call(TRAIN, "predict", "--init", model, video, cwd=work)


def finetuned(args, work: Path) -> tuple[bool, str]:
    """Fine-tuning from published weights on a folder, for as long as a GPU needs for little."""
    model = ROOT / "golden/hf_pretrain_tiny" if args.small else "MCG-NJU/videomae-base"
    steps = ["--finetune-steps", 10 if args.small else 300, "--scratch-steps", 0]
    return call(TRAIN, "finetune", "--data", args.data.resolve(), "--init", model, *steps,
                "--finetune-lr", 8e-3, cwd=work)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="without the network")
    parser.add_argument("--data", type=Path, required=True, help="a folder of videos, Class/*.mp4")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/hub.md")
    args = parser.parse_args()
    write_page("From the hub", [published_values, classified, finetuned], args, args.output)


if __name__ == "__main__":
    main()
