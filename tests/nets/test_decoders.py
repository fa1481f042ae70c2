"""A decoder for any backbone: maps that start at the image's voxels, that do not, and that all have one stride."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brainfm.errors import ConfigError
from brainfm.nets.backbone import BACKBONES, Backbone, build_backbone
from brainfm.nets.decoders import DenseDecoder, LightDecoder, SkipDecoder, decoder_for

# widths, strides, and the widths of the decoder's own features, fine to coarse
SHAPES: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = [
    ((8, 16, 32), (1, 2, 4), (8, 16)),
    ((8, 16), (1, 4), (8,)),
    ((24, 48), (2, 4), (12, 24)),
    ((40,), (4,), (10, 20)),
    ((300,), (8,), (32, 64, 128)),  # never wider than a U-Net's level there
    ((20, 20, 20), (8, 8, 8), (10, 20, 20)),
    ((96,), (16,), (8, 12, 24, 48)),
    ((30,), (6,), (8, 15)),
    ((16,), (1,), (8,)),
]


class Pyramid(Backbone):
    """Maps of any strides: block means of the image, seen through one linear layer each."""

    def __init__(self, widths: tuple[int, ...], strides: tuple[int, ...]) -> None:
        super().__init__()
        self.widths, self.strides, self.config = widths, strides, {"name": "pyramid"}
        self.see = nn.ModuleList(nn.Conv3d(1, width, 1) for width in widths)

    def features(self, image: Tensor) -> list[Tensor]:
        return [see(nn.functional.avg_pool3d(image, s)) for see, s in zip(self.see, self.strides, strict=True)]

    def features_masked(self, image: Tensor, hidden: Tensor) -> list[Tensor]:
        return self.features(image.masked_fill(hidden, 0))

    def blocks(self) -> list[nn.Module]:
        return [self.see]


@pytest.fixture(params=SHAPES, ids=[str(strides) for _, strides, _ in SHAPES])
def shape(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_every_backbone_is_answered_voxel_by_voxel_and_every_parameter_learns(shape: Any) -> None:
    widths, strides, own = shape
    torch.manual_seed(0)
    backbone, edges = Pyramid(widths, strides), [2 * strides[-1], 2 * strides[-1], 3 * strides[-1]]
    maps = backbone(torch.randn(1, 1, *edges))
    skip, dense = decoder_for(backbone, 3), decoder_for(backbone, {"a": 2, "b": 5})
    light = decoder_for(backbone, 1, latent_channels=6)
    assert type(skip) is SkipDecoder and type(dense) is DenseDecoder and type(light) is LightDecoder
    climbed = skip.climb(maps)
    assert skip.widths == own and [f.shape[1] for f in climbed] == list(reversed(own))
    assert list(climbed[-1].shape[2:]) == edges
    answers = [skip(maps), dense(maps), light(torch.randn(1, 6, *maps[-1].shape[2:]))]
    assert [list(a.shape) for a in answers] == [[1, 3, *edges], [1, 7, *edges], [1, 1, *edges]]
    assert [part.shape[1] for part in dense.split(answers[1]).values()] == [2, 5]
    sum((a**2).mean() for a in answers).backward()
    for decoder in (skip, dense, light):
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in decoder.parameters())


def test_every_map_reaches_the_answer() -> None:
    """Also of several maps that all have one stride, as several depths of a transformer."""
    torch.manual_seed(0)
    backbone = Pyramid((6, 6, 6), (4, 4, 4))
    decoder = decoder_for(backbone, 2)
    maps = [m.detach().requires_grad_() for m in backbone(torch.randn(1, 1, 8, 8, 8))]
    (decoder(maps) ** 2).mean().backward()
    assert all(m.grad is not None and m.grad.abs().max() > 0 for m in maps)


@pytest.mark.parametrize("name", sorted(n for n in BACKBONES if n.startswith(("unet_", "resenc_"))))
def test_decoders_of_the_shipped_backbones_have_the_names_they_had(name: str) -> None:
    """A step for every map but the coarsest, as files of before hold them."""
    with torch.device("meta"):
        backbone = build_backbone(name)
        decoder, light = decoder_for(backbone, 2), decoder_for(backbone, 1, latent_channels=64)
    assert decoder.widths == backbone.widths[:-1]
    merges = [decoder.get_parameter(f"merges.{n}.0.weight").shape[:2] for n in range(len(backbone.widths) - 1)]
    assert merges == [(width, 2 * width) for width in backbone.widths[-2::-1]]
    assert len(decoder.merges) == len(decoder.ups) == len(light.levels) == len(backbone.widths) - 1


def test_a_narrower_decoder_of_latents() -> None:
    backbone = Pyramid((8, 20, 40), (1, 2, 4))
    decoder = decoder_for(backbone, 5, latent_channels=4, narrower=2)
    assert [level[1][0].out_channels for level in decoder.levels] == [10, 8]


@pytest.mark.parametrize("strides", [(2, 1), (2, 3), (4,), (0, 2), ()])
def test_maps_that_do_not_follow_one_another_are_refused(strides: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="each stride a multiple of the one before"):
        SkipDecoder((4, 8)[: max(2, len(strides))] if strides else (), strides, 1)
