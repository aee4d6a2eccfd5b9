"""How exact float32 is for sure predictions: a row for each form of loss and head, for docs/reference/robustness.md.

`python benchmarks/confidence.py [--seeds N]`. Random networks with one image are measured in float32, with logits so
large that the prediction leaves a doubt of 1e-4, 1e-8 or 1e-12. The reference differentiates the loss twice in the
pooled features by finite differences with 60 digits, and shares no code with the package.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy
from itertools import combinations_with_replacement
from typing import Any, NamedTuple

import mpmath
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_flatness import ForwardRecorder, PooledMethod

K, C, WIDTH = 5, 4, 4
DOUBTS = (1e-4, 1e-8, 1e-12)
WEIGHTS = (0.5, 1.0, 2.0, 1.5)
_STEP = mpmath.mpf("1e-15")
mpmath.mp.dps = 60
Row = list[Any]  # of numbers with 60 digits


class Form(NamedTuple):
    """A head and a loss.

    Attributes:
        head: makes the head; its last part is a linear layer.
        loss: of the logits and the targets, in torch.
        value: the same of the logits of one sample and its label, with 60 digits.
        is_proved: whether its curvature has a form in which no digits are lost; the others are differentiated.
    """

    head: str
    loss: Callable[[Tensor, Tensor], Tensor]
    value: Callable[[Row, int], Any]
    is_proved: bool


HEADS: dict[str, Callable[[], list[nn.Module]]] = {
    "linear": lambda: [],
    "hidden ReLU": lambda: [nn.Linear(K, WIDTH), nn.ReLU()],
    "hidden SiLU": lambda: [nn.Linear(K, WIDTH), nn.SiLU()],
    "layer norm": lambda: [nn.LayerNorm(K)],
}


def cross_entropy(logits: Row, target: Row) -> Any:
    """Return cross-entropy with weighted soft targets."""
    total = mpmath.log(mpmath.fsum(mpmath.exp(each) for each in logits))
    return mpmath.fsum(weight * (total - each) for weight, each in zip(target, logits, strict=True))


def one_hot(label: int) -> Row:
    """Return the label as probabilities."""
    return [mpmath.mpf(int(c == label)) for c in range(C)]


def smoothed(logits: Row, label: int) -> Any:
    """Return cross-entropy with class weights and label smoothing of 0.1."""
    least, most = mpmath.mpf(1) / (10 * C), mpmath.mpf(9) / 10
    return cross_entropy(logits, [(most * q + least) * w for q, w in zip(one_hot(label), WEIGHTS, strict=True)])


def binary(logits: Row, label: int) -> Any:
    """Return the mean binary cross-entropy over the labels."""
    signs = (1 - 2 * q for q in one_hot(label))
    return mpmath.fsum(mpmath.log1p(mpmath.exp(s * each)) for s, each in zip(signs, logits, strict=True)) / C


def probabilities(logits: Row) -> Row:
    """Return the softmax."""
    total = mpmath.fsum(mpmath.exp(each) for each in logits)
    return [mpmath.exp(each) / total for each in logits]


def focal(logits: Row, label: int) -> Any:
    """Return the focal loss with an exponent of 2."""
    loss = cross_entropy(logits, one_hot(label))
    return (1 - mpmath.exp(-loss)) ** 2 * loss


def squared(logits: Row, label: int) -> Any:
    """Return the mean squared error of the softmax."""
    return mpmath.fsum((s - q) ** 2 for s, q in zip(probabilities(logits), one_hot(label), strict=True)) / C


def _focal(logits: Tensor, target: Tensor) -> Tensor:
    each = F.cross_entropy(logits, target, reduction="none")
    return ((1 - (-each).exp()).square() * each).mean()


def _smoothed(logits: Tensor, target: Tensor) -> Tensor:
    weights = torch.tensor(WEIGHTS).to(logits)
    return F.cross_entropy(logits, target, weights, label_smoothing=0.1, reduction="none").mean()


def _binary(logits: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, F.one_hot(target, C).to(logits))


def _squared(logits: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(logits.softmax(1), F.one_hot(target, C).to(logits))


def _plain(logits: Row, label: int) -> Any:
    return cross_entropy(logits, one_hot(label))


FORMS: dict[str, Form] = {
    "cross-entropy, linear head": Form("linear", F.cross_entropy, _plain, True),
    "cross-entropy with smoothing and class weights, linear head": Form("linear", _smoothed, smoothed, True),
    "cross-entropy, piecewise linear head (hidden ReLU)": Form("hidden ReLU", F.cross_entropy, _plain, True),
    "cross-entropy, curved head (hidden SiLU)": Form("hidden SiLU", F.cross_entropy, _plain, True),
    "cross-entropy, curved head (layer norm)": Form("layer norm", F.cross_entropy, _plain, True),
    "binary cross-entropy, linear head": Form("linear", _binary, binary, True),
    "binary cross-entropy, curved head (hidden SiLU)": Form("hidden SiLU", _binary, binary, True),
    "focal loss, linear head": Form("linear", _focal, focal, False),
    "focal loss, curved head (hidden SiLU)": Form("hidden SiLU", _focal, focal, False),
    "squared error of the softmax, linear head": Form("linear", _squared, squared, False),
}


def network(form: Form, doubt: float, seed: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Return a float32 network, an image and its label, so that all other classes together have this probability.

    For binary cross-entropy it is that of the label which is decided least clearly.
    """
    torch.manual_seed(seed)
    front = nn.Conv2d(2, K, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    width = WIDTH if form.head.startswith("hidden") else K
    model = nn.Sequential(*front, *HEADS[form.head](), nn.Linear(width, C))
    image = torch.randn(1, 2, 6, 6)
    with torch.no_grad():
        model.double()
        logits = model(image.double())[0]
        if form.loss is _binary:  # one label holds
            logits = (logits - logits.topk(2).values.mean()).abs()
            model[-1].bias -= model(image.double())[0].topk(2).values.mean()
        low, high = 1e-3, 1e9
        for _ in range(200):
            scale = (low * high) ** 0.5
            others = logits.sub(logits.max()).mul(scale).exp()
            rest = (-scale * logits).exp().max() if form.loss is _binary else others.sum() - 1
            low, high = (low, scale) if rest < doubt else (scale, high)
        for parameter in model[-1].parameters():
            parameter.mul_(scale)
        model.float()
        return model.eval(), image, model(image).argmax(1)


def reference(form: Form, model: nn.Sequential, image: Tensor, label: Tensor) -> tuple[float, float]:
    """Return trace and relative flatness of the convolution: the features in float64, what follows with 60 digits."""
    exact = deepcopy(model).double().requires_grad_(False)
    weight = exact[0].weight

    def features(free: Tensor) -> Tensor:
        return exact[1:4](F.conv2d(image.double(), free, exact[0].bias))[0]

    jacobian = torch.autograd.functional.jacobian(features, weight).flatten(2)  # k, k, d
    gradients = jacobian.diagonal(dim1=0, dim2=1).mT
    point = [mpmath.mpf(float(value)) for value in features(weight)]
    gram, kernel = gradients @ gradients.mT, weight.flatten(1) @ weight.flatten(1).mT
    trace, relative = mpmath.mpf(0), mpmath.mpf(0)
    for i, j in combinations_with_replacement(range(K), 2):
        corners = []
        for first, second in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            moved = list(point)
            moved[i] += first * _STEP
            moved[j] += second * _STEP
            corners.append(form.value(_head(exact[4:], moved), int(label)))
        curvature = (corners[0] - corners[1] - corners[2] + corners[3]) / (4 * _STEP**2)
        product = mpmath.mpf(float(gram[i, j]))
        trace += product * curvature if i == j else 0
        relative += (1 + (i != j)) * mpmath.mpf(float(kernel[i, j])) * product * curvature
    return float(trace), float(relative)


def _head(layers: nn.Sequential, values: Row) -> Row:
    """Return the logits with 60 digits."""
    for layer in layers:
        if isinstance(layer, nn.Linear):
            pairs = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
            values = [mpmath.fdot(row, values) + bias for row, bias in pairs]
        elif isinstance(layer, nn.LayerNorm):
            mean = mpmath.fsum(values) / len(values)
            centred = [value - mean for value in values]
            spread = mpmath.sqrt(mpmath.fsum(value**2 for value in centred) / len(values) + mpmath.mpf(layer.eps))
            values = [value / spread for value in centred]
        elif isinstance(layer, nn.ReLU):
            values = [max(value, mpmath.mpf(0)) for value in values]
        else:
            values = [value / (1 + mpmath.exp(-value)) for value in values]
    return values


def errors(form: Form, doubt: float, seed: int) -> tuple[float, float]:
    """Return the relative errors of trace and relative flatness in float32."""
    model, image, label = network(form, doubt, seed)
    with ForwardRecorder(model) as recorder, torch.no_grad():
        quantities = PooledMethod().quantities(recorder.take_pass(form.loss(model(image), label)))
    found = float(quantities.hessian_trace), float(quantities.relative_flatness)
    trace, relative = (
        0.0 if value == exact else abs(value - exact) / abs(exact)  # both zero where all hidden units are inactive
        for value, exact in zip(found, reference(form, model, image, label), strict=True)
    )
    return trace, relative


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    seeds = parser.parse_args().seeds
    print("| loss and head |", " | ".join(f"{doubt:.0e}" for doubt in DOUBTS), "|")
    print("| --- |", " | ".join("---" for _ in DOUBTS), "|")
    for name, form in FORMS.items():
        worst = [sorted(max(errors(form, doubt, seed)) for seed in range(seeds)) for doubt in DOUBTS]
        print(f"| {name} |", " | ".join(f"{each[seeds // 2]:.0e} ({each[-1]:.0e})" for each in worst), "|")


if __name__ == "__main__":
    main()
