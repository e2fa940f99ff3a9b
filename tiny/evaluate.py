"""Accuracy of a classifier or a linear probe on held-out clips.

A clip's predictions and features are averaged over its views.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@torch.no_grad()
def mean_over_views(model, output, clips, indices: Tensor) -> Tensor:
    """Apply `output` to pixel_values (B, T, 3, H, W) -> (n, ...), averaged over views."""
    device, means = next(model.parameters()).device, []
    model.eval()
    for part in indices.split(8):
        views = torch.stack([clips.test_views(i) for i in part.tolist()])  # (B, V, T, 3, H, W)
        values = output(views.flatten(0, 1).to(device))  # (B V, ...)
        means.append(values.unflatten(0, views.shape[:2]).mean(dim=1).cpu())
    return torch.cat(means)


def probabilities(model, clips) -> Tensor:
    """Class probabilities (n, classes) of all clips."""
    everything = torch.arange(len(clips.labels))
    return mean_over_views(model, lambda x: model(x).logits.softmax(dim=1), clips, everything)


def features(encoder, clips, indices: Tensor) -> Tensor:
    """Features (n, D), each the mean of a clip's tokens."""
    def mean_token(pixel_values):
        return encoder(pixel_values).last_hidden_state.mean(dim=1)

    return mean_over_views(encoder, mean_token, clips, indices)


def linear_probe(encoder, clips, subset: Tensor, test_clips) -> Tensor:
    """Logistic regression on frozen features of clips[subset] -> predictions (n,) on test_clips."""
    x, y = features(encoder, clips, subset), clips.labels[subset]
    x_test = features(encoder, test_clips, torch.arange(len(test_clips.labels)))
    mean, std = x.mean(dim=0), x.std(dim=0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std

    probe = nn.Linear(x.shape[1], len(clips.classes))
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(probe(x), y) + 5e-3 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return probe(x_test).argmax(dim=1)


def accuracies(predictions: Tensor, labels: Tensor) -> dict:
    """Accuracies in percent: top1 over all clips, and mean_class averaged over classes."""
    correct = 100 * (predictions == labels).float()
    by_class = torch.stack([correct[labels == c].mean() for c in labels.unique()])
    return dict(top1=round(correct.mean().item(), 2), mean_class=round(by_class.mean().item(), 2))


def choose_labelled(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Indices of `per_class` random clips per class, or of all clips if 0."""
    if per_class == 0:
        return torch.arange(len(labels))
    counts = labels.bincount()
    if per_class > counts.min():
        raise ValueError(f"--labels-per-class: got {per_class}, but class {counts.argmin()} has "
                         f"only {counts.min()} clips")
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return torch.cat([order[labels[order] == c][:per_class] for c in labels.unique()])
