"""Print the most likely classes of videos: python -m tiny.predict RUN VIDEO ...

RUN is the folder of a train_tiny.py run, or any fine-tuned checkpoint.
"""
import sys
from pathlib import Path

import torch

from checkpoints import convert_state_dict, read_checkpoint
from tiny.videos import read_views
from videomae import VideoMAEForVideoClassification


@torch.no_grad()
def main(run: str, *videos: str) -> int:
    """Print the top five classes per video; report unreadable ones -> 1 if any, else 0."""
    finetuned = Path(run, "finetuned")
    source = finetuned if finetuned.is_dir() else run
    if "classifier.weight" not in convert_state_dict(read_checkpoint(source)[0]):
        raise ValueError(f"{source}: got a model without a classifier, expected a fine-tuned one")
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    model, status = VideoMAEForVideoClassification.from_pretrained(source).to(device), 0
    names, extra = model.config.id2label, model.config.extra
    for video in videos:
        try:
            sampling = extra.get("fps", 6.25), extra.get("views", 5)
            clips = read_views(Path(video), model.config, *sampling)
            shares = model(clips.to(device)).logits.softmax(dim=1).mean(dim=0)
            print(video)
            for i in shares.argsort(descending=True)[:5].tolist():
                print(f"  {100 * shares[i]:5.1f} %  {names[i]}")
        except ValueError as error:
            print(error, file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal can show every name
    try:
        sys.exit(main(*sys.argv[1:]) if len(sys.argv) > 2 else __doc__)
    except ValueError as error:
        sys.exit(f"tiny.predict: {error}")
