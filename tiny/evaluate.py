"""What a model is worth: top-1 on held-out clips, fine-tuned or by a linear probe.

A clip's prediction, and its features, are means over its views.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videomae import normalize


@torch.no_grad()
def mean_over_views(model, function, clips, indices: Tensor) -> Tensor:
    """function of normalized clips (B, T, 3, H, W), averaged over a clip's views -> (n, ...)."""
    device, rows = next(model.parameters()).device, []
    model.eval()
    for part in indices.split(64 if clips.num_views == 1 else 8):
        views = [function(normalize(clips.load(part, view=view).to(device)))
                 for view in range(clips.num_views)]
        rows.append(torch.stack(views).mean(dim=0).cpu())
    return torch.cat(rows)


def probabilities(model, clips) -> Tensor:
    """(n, classes) of all clips."""
    everything = torch.arange(len(clips.labels))
    return mean_over_views(model, lambda x: model(x).logits.softmax(dim=1), clips, everything)


def percent(correct: Tensor) -> float:
    """Share of True, in percent."""
    return round(100 * correct.float().mean().item(), 2)


def scores(way: str, predictions: Tensor, labels: Tensor) -> dict:
    """{way}_top1, and {way}_balanced, the mean over the classes, in percent."""
    correct = (predictions == labels).float()
    by_class = torch.stack([correct[labels == c].mean() for c in labels.unique()])
    return {f"{way}_top1": percent(correct), f"{way}_balanced": percent(by_class)}


def linear_probe(encoder, clips, subset: Tensor, test_clips) -> Tensor:
    """Logistic regression on frozen features -> (n,) predictions for the test clips."""
    def mean_token(pixel_values):
        return encoder(pixel_values).last_hidden_state.mean(dim=1)  # (B, D)

    everything = torch.arange(len(test_clips.labels))
    x, y = mean_over_views(encoder, mean_token, clips, subset), clips.labels[subset]
    x_test = mean_over_views(encoder, mean_token, test_clips, everything)
    mean, std = x.mean(dim=0), x.std(dim=0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    probe = nn.Linear(x.shape[1], len(clips.classes))
    nn.init.zeros_(probe.weight)  # nothing random: a resumed run gets the same probe
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(x), y) + 5e-3 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return probe(x_test).argmax(dim=1)


def choose_labelled(labels: Tensor, labels_per_class: int, seed: int) -> Tensor:
    """Indices of `labels_per_class` random clips of each class; 0 = every clip."""
    if labels_per_class == 0:
        return torch.arange(len(labels))
    generator, chosen = torch.Generator().manual_seed(seed), []
    for label in labels.unique():
        clips = (labels == label).nonzero()[:, 0]
        if len(clips) < labels_per_class:
            raise ValueError(f"--labels-per-class: got {labels_per_class}, but class {label} has "
                             f"{len(clips)} clips")
        chosen.append(clips[torch.randperm(len(clips), generator=generator)[:labels_per_class]])
    return torch.cat(chosen)
