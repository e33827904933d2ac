"""Slow and obvious: one sample at a time, one class at a time, importing nothing of ours."""

import torch
import torch.nn.functional as F


def per_sample_gradients(module, loss, samples):
    """Gradients of `loss(sample)` for each sample, itself a batch of one: a list of dicts by parameter name."""
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    gradients = []
    for sample in samples:
        found = torch.autograd.grad(loss(sample), list(parameters.values()), allow_unused=True)
        gradients.append(
            {
                name: torch.zeros_like(p) if g is None else g
                for (name, p), g in zip(parameters.items(), found, strict=True)
            }
        )
    return gradients


def mean_square(gradients):
    return {name: sum(g[name] ** 2 for g in gradients) / len(gradients) for name in gradients[0]}


def deviation(gradients):
    return {name: torch.stack([g[name] for g in gradients]).std(0, correction=0) for name in gradients[0]}


def empirical_fisher(module, loss, samples):
    return mean_square(per_sample_gradients(module, loss, samples))


def exact_fisher(module, samples):
    total = {name: torch.zeros_like(p) for name, p in module.named_parameters() if p.requires_grad}
    for sample in samples:
        probabilities = F.softmax(module(sample)[0].detach(), dim=0)
        for label, probability in enumerate(probabilities):
            (gradient,) = per_sample_gradients(
                module, lambda x, c=label: -F.log_softmax(module(x)[0], dim=0)[c], [sample]
            )
            for name in total:
                total[name] += probability * gradient[name] ** 2
    return {name: value / len(samples) for name, value in total.items()}


def log_probability(module, label, sample):
    return F.log_softmax(module(sample)[0], dim=0)[label]


def batched_fisher(module, loss, batches):
    return mean_square(per_sample_gradients(module, loss, batches))
