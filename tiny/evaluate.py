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


def linear_probe(encoder, clips, subset: Tensor, test_clips) -> dict:
    """Logistic regression on frozen features of clips[subset] -> accuracies on test_clips."""
    x, y = features(encoder, clips, subset), clips.labels[subset]
    probe = logistic_regression(x, y, len(clips.classes))
    x_test = features(encoder, test_clips, torch.arange(len(test_clips.labels)))
    return accuracies(probe(x_test).argmax(dim=1), test_clips.labels)


def start_from_probe(model, clips, subset: Tensor):
    """Replace a classifier's head with logistic regression on the features of clips[subset].

    A new head is useless at first, and its gradients distort a pretrained encoder's features before
    it has learned to read them (Kumar et al., ICLR 2022, "LP-FT").
    """
    def pooled(pixel_values):  # (B, D), the head's input
        return model.fc_norm(model.videomae(pixel_values).last_hidden_state.mean(dim=1))

    x, y = mean_over_views(model, pooled, clips, subset), clips.labels[subset]
    head = logistic_regression(x, y, len(clips.classes))
    model.classifier.load_state_dict(head.state_dict())


def logistic_regression(x: Tensor, y: Tensor, classes: int) -> nn.Linear:
    """Fit a linear layer that predicts labels y (n,) from features x (n, D)."""
    mean, std = x.mean(dim=0), x.std(dim=0) + 1e-6
    standardized, layer = (x - mean) / std, nn.Linear(x.shape[1], classes)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(standardized), y) + 5e-3 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():  # so that the layer takes x itself
        layer.weight /= std
        layer.bias -= layer.weight @ mean
    return layer


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
