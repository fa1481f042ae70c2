"""A teacher that follows its student, and how its answers are kept from being all the same."""

from __future__ import annotations

import copy
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn


class Teacher(nn.Module):
    """Copies of networks that move towards them after every step; they share no storage and get no gradient.

    Source: Tarvainen & Valpola 2017 (arXiv 1703.01780); its momentum as in DINO (Caron et al. 2021, arXiv 2104.14294).
    """

    def __init__(self, **networks: nn.Module) -> None:
        super().__init__()
        self.networks = nn.ModuleDict({name: copy.deepcopy(network) for name, network in networks.items()})
        self.requires_grad_(False)
        super().train(False)

    def __getitem__(self, name: str) -> nn.Module:
        return self.networks[name]

    def train(self, mode: bool = True) -> Teacher:
        """A teacher drops nothing."""
        return super().train(False)

    @torch.no_grad()
    def follow(self, momentum: float, **networks: nn.Module) -> None:
        """Each parameter becomes ``momentum`` of itself and the rest of the student's."""
        for name, network in networks.items():
            own: list[Tensor] = list(self.networks[name].parameters())
            torch._foreach_lerp_(own, [p.to(o.dtype) for o, p in zip(own, network.parameters())], 1 - momentum)
            for buffer, value in zip(self.networks[name].buffers(), network.buffers()):
                buffer.copy_(value)


def cosine_ramp(start: float, end: float, progress: float) -> float:
    """From ``start`` at 0 to ``end`` at 1, slow at both ends."""
    return end + (start - end) * (1 + math.cos(math.pi * min(1.0, max(0.0, progress)))) / 2


class PrototypeHead(nn.Module):
    """Descriptors [..., E] to scores of prototypes [..., K]: three layers, unit length, then directions of unit length.

    Source: DINO (arXiv 2104.14294), without the learned lengths of its last layer.
    """

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, bottleneck)
        )
        self.directions = nn.Parameter(torch.randn(prototypes, bottleneck))
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, descriptors: Tensor) -> Tensor:
        codes = F.normalize(self.layers(descriptors).float(), dim=-1, eps=1e-6)
        return codes @ F.normalize(self.directions, dim=-1).T


@torch.no_grad()
def balanced(scores: Tensor, temperature: float, rounds: int = 3) -> Tensor:
    """Teacher's shares [N, K] of scores [N, K] such that all prototypes are used alike over all processes' rows.

    Source: Sinkhorn-Knopp as in SwAV (Caron et al. 2020, arXiv 2006.09882).
    """
    count = _over_processes(torch.tensor(float(len(scores)), device=scores.device))
    highest = scores.float().max() if len(scores) else torch.tensor(-torch.inf, device=scores.device)
    shares = torch.exp((scores.float() - _over_processes(highest, largest=True)) / temperature)
    for _ in range(rounds):
        shares = shares / (_over_processes(shares.sum(0)) * scores.shape[1]).clamp(min=1e-30)
        shares = shares / (shares.sum(1, keepdim=True) * count).clamp(min=1e-30)
    return shares * count


class Centre(nn.Module):
    """A running mean of the teacher's scores that is taken off before its softmax.

    Source: DINO (arXiv 2104.14294), section 3.1.
    """

    def __init__(self, prototypes: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(prototypes))

    mean: Tensor

    @torch.no_grad()
    def shares(self, scores: Tensor, temperature: float, learn: bool) -> Tensor:
        """Scores [N, K] -> softmax [N, K] around the mean, which then moves by these rows where ``learn``."""
        answer = F.softmax((scores.float() - self.mean) / temperature, dim=-1)
        if learn:
            rows = _over_processes(torch.tensor(float(len(scores)), device=scores.device))
            mean = _over_processes(scores.float().sum(0)) / rows.clamp(min=1)
            self.mean.lerp_(mean, 1 - self.momentum)
        return answer


def koleo(descriptors: Tensor) -> Tensor:
    """Mean of -log distance to the nearest other of the unit vectors of [B, E]: low where they are spread evenly.

    Source: Sablayrolles et al. 2018 (arXiv 1806.03198), as in DINOv2 (arXiv 2304.07193).
    """
    codes = F.normalize(descriptors.float(), dim=-1, eps=1e-8)
    nearest = codes[(codes @ codes.T).detach().fill_diagonal_(-2).argmax(dim=1)]
    return -torch.log((codes - nearest).norm(dim=1) + 1e-8).mean()


def entropy_share(shares: Tensor) -> Tensor:
    """How evenly prototypes are used: entropy of the mean of [N, K] over log K; 1: all alike, 0: one alone."""
    mean = shares.mean(0)
    return torch.special.entr(mean).sum() / math.log(max(2, shares.shape[1]))


def _over_processes(value: Tensor, largest: bool = False) -> Tensor:
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return value
    value = value.clone()
    dist.all_reduce(value, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
    return value
