"""Fusion and pooling: where the contrasts of a case meet, and where all that was seen of a head becomes one vector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from brainfm.errors import ConfigError
from brainfm.nets.backbone import Backbone
from brainfm.nets.decoders import Pointwise


class Fusion(nn.Module):
    """Feature maps of several contrasts -> feature maps of the case, for any set of contrasts in any order.

    ``mean`` averages the contrasts that are present. ``attention`` weighs them voxel by voxel with a softmax over the
    scores of one 1x1x1 convolution a level; it starts as the mean (weights zero) and has no bias, which a softmax would
    not see.

    Args:
        widths: channels of the maps that meet, fine to coarse: all of a backbone's, or only its last ones.
        how: ``mean`` or ``attention``.

    Source: Havaei et al. 2016, HeMIS (arXiv 1607.05194), for the mean of what is there.
    Raises: ConfigError for another ``how``.
    """

    def __init__(self, widths: Sequence[int], how: str) -> None:
        super().__init__()
        if how not in ("mean", "attention"):
            raise ConfigError(f"task.fusion={how!r}: expected 'mean' or 'attention'")
        self.how = how
        self.levels = len(widths)
        self.scores = nn.ModuleList()
        if how == "attention":
            for width in widths:
                score = Pointwise(width, 1, bias=False)
                nn.init.zeros_(score.weight)
                self.scores.append(score)

    def forward(self, maps: Sequence[Sequence[Tensor]], present: Tensor | None = None) -> list[Tensor]:
        """The maps of the case; zeros for a case without any contrast.

        What stands in an absent contrast's maps, be it NaN, changes neither the result nor any gradient of it here.
        (A NaN *image* must still be kept from the backbone: its weights' gradients would multiply 0 by NaN.)

        Args:
            maps: M contrasts, each a list of maps [B, E, X/s, Y/s, Z/s], fine to coarse.
            present: [B, M] bool; None: every case has every contrast.
        """
        fused = []
        whole = present is None
        if present is None:
            present = maps[0][0].new_ones((maps[0][0].shape[0], len(maps)), dtype=torch.bool)
        for level in range(len(maps[0])):
            features = [contrast[level] for contrast in maps]
            if not whole:
                features = [f.masked_fill(~present[:, m, None, None, None, None], 0) for m, f in enumerate(features)]
            weights = self._weights(level, features, present)
            total = features[0] * weights[:, 0]
            for m in range(1, len(features)):
                total = torch.addcmul(total, features[m], weights[:, m])
            fused.append(total)
        return fused

    def _weights(self, level: int, features: list[Tensor], present: Tensor) -> Tensor:
        """[B, M, 1, X|1, Y|1, Z|1], summing to 1 over the contrasts that are present and 0 elsewhere."""
        there = present[:, :, None, None, None, None]
        if self.how == "mean":
            weights = there / there.sum(dim=1, keepdim=True).clamp(min=1)
            return weights.to(features[0].dtype)
        scores = torch.stack([self.scores[level](f) for f in features], dim=1).float()
        # a finite floor instead of -inf: a case without contrasts gets zeros, not NaN
        shares = torch.softmax(scores.masked_fill(~there, torch.finfo(scores.dtype).min), dim=1) * there
        return shares.to(features[0].dtype)


class GatedAttention(nn.Module):
    """Tokens -> weighted mean and standard deviation of what they stand for; the weights are learned and start equal.

    The deviation stands beside the mean because backbones end in an instance norm, which makes the plain mean of a map
    nearly the same for every image: what is left of it is the shape of the distribution.

    Args:
        width: E, features of a token.
        hidden: features of the gate.

    Source: Ilse et al. 2018 (arXiv:1802.04712), eq. 9.
        Differs: tokens may have a prior weight; the deviation is pooled too; w starts at 0.
    """

    def __init__(self, width: int, hidden: int = 64) -> None:
        super().__init__()
        self.value = nn.Linear(width, hidden)
        self.gate = nn.Linear(width, hidden)
        self.score = nn.Linear(hidden, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(
        self, tokens: Tensor, squares: Tensor, prior: Tensor, place: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Computed in float32.

        Args:
            tokens: [B, N, E] means over the voxels of each token.
            squares: [B, N, E] means of their squares.
            prior: [N] positive weights of the tokens before anything is learned.
            place: [N, E] added to the tokens where they are weighed.

        Returns:
            (pooled [B, 2 E], weights [B, N] that sum to 1).
        """
        with torch.autocast(tokens.device.type, enabled=False):
            tokens, squares = tokens.float(), squares.float()
            asked = tokens if place is None else tokens + place
            scores = self.score(torch.tanh(self.value(asked)) * torch.sigmoid(self.gate(asked))).squeeze(-1)
            weights = torch.softmax(scores + prior.log(), dim=1)
            return moments(tokens, squares, weights), weights


def moments(tokens: Tensor, squares: Tensor, weights: Tensor) -> Tensor:
    """Mean and deviation [B, 2 E] of what tokens stand for, in float32.

    Args:
        tokens: [B, N, E] means over the voxels of each token.
        squares: [B, N, E] means of their squares.
        weights: [B, N] that sum to 1.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        tokens, squares = tokens.float(), squares.float()
        mean = torch.einsum("bn,bne->be", weights, tokens)
        variance = torch.einsum("bn,bne->be", weights, squares) - mean.square()
        # the root's slope is infinite at 0, below which rounding may lead
        return torch.cat([mean, variance.clamp(min=1e-6).sqrt()], dim=1)


def fused_features(backbone: Backbone, fusion: Fusion, image: Tensor, present: Tensor | None) -> list[Tensor]:
    """The contrasts of each case one by one through a backbone, then together.

    The weights know no contrast: any number of them passes, in any order. What stands in the channel of an absent
    contrast is never looked at, and a contrast that no case has costs neither time nor memory. Where nothing is absent
    no step depends on a value: ``present=None`` can be traced and exported (see nets/cpu.swap_out).

    Args:
        fusion: for all levels of the backbone or its last ones; the finer maps are dropped.
        image: [B, M, X, Y, Z] standardised voxels.
        present: [B, M] bool, at least one contrast a case; None: every case has every contrast.

    Returns:
        One map [B, E, X/s, Y/s, Z/s] a level of the fusion.

    Raises:
        ValueError: where the shapes do not fit or a case has no contrast.
    """
    if image.ndim != 5 or (present is not None and present.shape != image.shape[:2]):
        found = None if present is None else tuple(present.shape)
        raise ValueError(f"expected [B, M, X, Y, Z] and [B, M], found {tuple(image.shape)} and {found}")
    if present is None:
        return fusion([backbone.features(scan)[-fusion.levels :] for scan in image.split(1, dim=1)])
    cases = [[b for b, there in enumerate(column) if there] for column in present.t().tolist()]
    if len({b for column in cases for b in column}) < len(image):
        raise ValueError("every case needs at least one contrast")
    shown = [m for m, column in enumerate(cases) if column]
    maps = [_encode(backbone, image[:, m : m + 1], cases[m])[-fusion.levels :] for m in shown]
    whole = all(len(cases[m]) == len(image) for m in shown)  # nothing of an absent contrast is to be kept out
    return fusion(maps, None if whole else present[:, shown])


def _encode(backbone: Backbone, scans: Tensor, cases: list[int]) -> list[Tensor]:
    """Feature maps of one contrast, [B, E, X/s, Y/s, Z/s]; zeros where a case lacks it."""
    if len(cases) == len(scans):
        return backbone.features(scans)
    index = torch.tensor(cases, device=scans.device)
    maps = backbone.features(scans.index_select(0, index))
    return [m.new_zeros(len(scans), *m.shape[1:]).index_copy(0, index, m) for m in maps]


def mean_summary(backbone: Backbone, image: Tensor, present: Tensor | None) -> Tensor:
    """What the backbone says of each scan in one vector (Backbone.summarised), the mean over the contrasts of a case.

    Args:
        image: [B, M, X, Y, Z] standardised voxels.
        present: [B, M] bool, at least one contrast a case; None: every case has every contrast.

    Returns:
        [B, E] float32.
    """
    if present is None:
        return torch.stack([backbone.summarised(scan)[1].float() for scan in image.split(1, dim=1)]).mean(0)
    total: Tensor | None = None
    for m, column in enumerate(present.t().tolist()):
        cases = torch.tensor([b for b, there in enumerate(column) if there], device=image.device)
        if len(cases):
            said = backbone.summarised(image[:, m : m + 1].index_select(0, cases))[1].float()
            total = said.new_zeros(len(image), said.shape[1]) if total is None else total
            total = total.index_add(0, cases, said)
    if total is None or not bool(present.any(1).all()):
        raise ValueError("every case needs at least one contrast")
    return total / present.sum(1, keepdim=True)


class Standardise(nn.Module):
    """Each feature less its mean over the training cases, in units of its deviation there: [B, E] -> [B, E].

    Pooled features differ little between heads, against what they have in common; a layer after an ordinary norm has to
    learn that difference up first. Fresh, it changes nothing. Fitted, it bends what lies far off (five deviations
    become 4.4, fifty 15), so that a feature that hardly varied among few training cases throws nobody far away, and
    every feature keeps a gradient.

    Args:
        features: E.

    Attributes:
        bound: below 0: -bound * asinh(z / -bound). Above 0: cut off there, as bundles of before do it.
    """

    mean: Tensor
    scale: Tensor
    bound: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("bound", torch.tensor(float("inf")))

    @torch.no_grad()
    def fit(self, values: Tensor) -> None:
        """Takes mean and deviation from [N, E]; a deviation below a tenth of the median one counts as that, for few
        cases know little about it."""
        deviation = values.std(dim=0, correction=0)
        self.set(values.mean(dim=0), deviation.clamp(min=max(0.1 * float(deviation.median()), 1e-6)))

    @torch.no_grad()
    def set(self, mean: Tensor, scale: Tensor) -> None:
        """Takes them as they are, [E] each."""
        self.mean.copy_(mean)
        self.scale.copy_(scale)
        self.bound.fill_(-5.0)

    def forward(self, values: Tensor) -> Tensor:
        z = (values - self.mean) / self.scale
        size = self.bound.abs().clamp(max=1e6)  # a number, so that the branch not taken gives no NaN
        cut = torch.minimum(torch.maximum(z, -self.bound.abs()), self.bound.abs())
        return torch.where(self.bound > 0, cut, size * _asinh(z / size))


def _asinh(x: Tensor) -> Tensor:
    """In a trace by what every runtime knows; it then loses digits of values near 0, a ten-millionth at most."""
    if not torch.jit.is_tracing():
        return torch.asinh(x)
    return torch.sign(x) * torch.log(x.abs() + torch.sqrt(x.square() + 1))


class LinearHead(nn.Module):
    """A linear model of standardised numbers: [B, F] -> [B, K], always in float32: the logarithm of a volume differs
    between heads by less than bfloat16 can tell. Fresh, it answers 0.

    Args:
        features: F.
        outputs: K.
    """

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.norm = Standardise(features)
        self.out = nn.Linear(features, outputs)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, values: Tensor) -> Tensor:
        with torch.autocast(values.device.type, enabled=False):
            return self.out(self.norm(values.float()))
