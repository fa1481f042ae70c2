"""The smallest transformer that is a backbone: one map, 16 voxels a token. For tests; no part of the package."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from brainfm.nets.backbone import Backbone


class ToyViT(Backbone):
    """Cubes of 16 voxels become tokens, a layer of attention looks at all of them: [B, 1, X, Y, Z] -> [B, E, x, y, z].

    A token that is hidden as a whole becomes a learned one; of others the hidden voxels are 0.
    """

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.widths, self.strides, self.config = (width,), (16,), {"name": "toy_vit", "width": width}
        self.patches = nn.Conv3d(1, width, 16, stride=16)
        self.mask = nn.Parameter(torch.zeros(width))
        self.attend = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True)

    def features(self, image: Tensor) -> list[Tensor]:
        return self.features_masked(image, torch.zeros_like(image, dtype=torch.bool))

    def features_masked(self, image: Tensor, hidden: Tensor) -> list[Tensor]:
        self.check_image(image)
        tokens = self.patches(image.masked_fill(hidden, 0))
        gone = -nn.functional.max_pool3d(-hidden.to(tokens.dtype), 16)
        tokens = torch.lerp(tokens, self.mask.to(tokens.dtype)[:, None, None, None].expand_as(tokens), gone)
        attended: Tensor = self.attend(tokens.flatten(2).transpose(1, 2))
        return [attended.transpose(1, 2).unflatten(2, tokens.shape[2:])]

    def blocks(self) -> list[nn.Module]:
        return [nn.ModuleList([self.patches, nn.ParameterList([self.mask])]), self.attend]


def toy_vit(width: int = 24) -> ToyViT:
    return ToyViT(width)
