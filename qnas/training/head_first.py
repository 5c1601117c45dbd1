"""The training of a classifier alone, on features that are trained already, and the names of the classifier.

A classifier that starts at random sends large gradients of no use through the features, which a few thousand
images do not repair. It is therefore trained first, while the features stay as they are (linear probing, then
fine-tuning: arXiv 2202.10054).
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

CLASSIFIER = "head.classifier."  # of a network; a supernet has it within `parts.`


def is_classifier(name: str) -> bool:
    """Whether a parameter of a network or supernet belongs to its classifier."""
    return name.removeprefix("parts.").startswith(CLASSIFIER)


def backbone(network: nn.Module) -> list[nn.Parameter]:
    """Return the weights of a network that do not belong to its classifier."""
    return [weight for name, weight in network.named_parameters() if not is_classifier(name)]


@contextmanager
def head_alone(network: nn.Module) -> Iterator[None]:
    """Give gradients to the classifier only, and let batch norms use the statistics that they have.

    Nothing but the classifier can then change, and a backward pass ends there.
    """
    frozen = [weight for weight in backbone(network) if weight.requires_grad]
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm) and module.training]
    for weight in frozen:
        weight.requires_grad_(False)
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(True)
        for norm in norms:
            norm.train()
