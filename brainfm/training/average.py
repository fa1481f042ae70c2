"""The moving average of a network's weights: what a short training on few cases is validated and shipped with."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from brainfm.errors import ConfigError


class WeightAverage(nn.Module):
    """A second copy of a network, whose weights follow the first one's slowly.

    Put it beside the network inside the module that is trained: checkpoints then carry it, and resuming is exact. The
    copy shares no storage with the network, asks for no gradient, and is in float32 whatever the network is.

    Args:
        module: the network that learns; it is not a child of this module.
        decay: share of the average that stays at each update, once warmed up; 0 <= decay < 1.

    Attributes:
        network: the copy, ready to answer.

    Source: Polyak & Juditsky 1992 (SIAM J. Control Optim. 30:838); the warm-up min(decay, (1 + t) / (10 + t)) as in
        TensorFlow's ExponentialMovingAverage.
    Raises: ConfigError for another decay.
    """

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ConfigError(f"average={decay}: expected a decay from 0 to below 1")
        self.decay = decay
        self.network = copy.deepcopy(module).float().requires_grad_(False)
        self.network.eval()
        self._source = (module,)  # in a tuple, for a module would become a child, and its weights be saved twice

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After the optimiser's step number ``step`` (from 1): the average takes its share of the weights.

        Buffers (statistics of the training data, masks) are copied. A function of the step alone: nothing else is
        remembered.
        """
        (source,) = self._source
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        learned = [value.to(torch.float32) for value in source.parameters()]
        torch._foreach_lerp_(list(self.network.parameters()), learned, share)
        for own, other in zip(self.network.buffers(), source.buffers(), strict=True):
            own.copy_(other)

    def train(self, mode: bool = True) -> WeightAverage:
        """The copy only ever answers: it stays in evaluation mode."""
        return super().train(False)

    def weights(self) -> dict[str, Tensor]:
        """The averaged weights under the network's own names, detached and apart from the average itself."""
        return {name: value.detach().clone() for name, value in self.network.state_dict().items()}
