"""What every backbone promises, over every YAML of configs/backbone and every free form.

The large ones are built without memory (the meta device): shapes, blocks and gradients need no values.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from brainfm.errors import ConfigError
from brainfm.nets.backbone import BACKBONES, Backbone, build_backbone

YAMLS = sorted((Path(__file__).parents[2] / "configs" / "backbone").glob("*.yaml"))
FREE = {
    "adapted": {"network": "tests.nets.test_adapter:Own", "maps": ["fine", "coarse"], "probe_vox": [8, 8, 8]},
    "unet": {"widths": [3, 5]},
    "resenc": {"widths": [4, 6, 6], "depths": [1, 2, 1]},
    "vit": {"width": 24, "depth": 3, "heads": 2, "patch_vox": 8, "grid_vox": [16, 16, 16], "registers": 2, "taps": 2},
    "primus": {"width": 24, "depth": 2, "heads": 2, "grid_vox": [16, 8, 8]},
}
LARGE = 12_000_000  # parameters above which a test computes no values


@cache
def config(name: str) -> dict:
    named = {path.stem: yaml.safe_load(path.read_text()) for path in YAMLS}
    return named[name] if name in named else {"name": name, **FREE[name]}


def on_meta(name: str) -> Backbone:
    with torch.device("meta"):
        return build_backbone(**config(name))


def smallest_patch(backbone: Backbone) -> tuple[int, int, int]:
    edge = backbone.strides[-1]
    return (edge, 2 * edge, edge)


every = pytest.mark.parametrize("name", sorted(BACKBONES))


def test_every_backbone_has_a_yaml_or_is_free() -> None:
    assert {path.stem for path in YAMLS} | set(FREE) == set(BACKBONES)
    assert all(config(path.stem)["name"] == path.stem for path in YAMLS)


@every
def test_maps_have_the_promised_widths_and_strides(name: str) -> None:
    backbone = on_meta(name)
    patch = smallest_patch(backbone)
    backbone.check_patch(patch)
    maps = backbone(torch.empty(2, 1, *patch, device="meta"))
    for features, width, stride in zip(maps, backbone.widths, backbone.strides, strict=True):
        assert features.shape == (2, width, *(edge // stride for edge in patch))
    tokens = name.startswith(("vit", "primus"))
    assert set(backbone.strides) == {backbone.strides[-1]} if tokens else backbone.strides[0] == 1


@every
def test_blocks_hold_every_parameter_once_and_the_stem_first(name: str) -> None:
    backbone = on_meta(name)
    in_blocks = [id(p) for block in backbone.blocks() for p in block.parameters()]
    assert sorted(in_blocks) == sorted(id(p) for p in backbone.parameters())
    assert any(p.ndim == 5 and p.shape[1] == 1 for p in backbone.blocks()[0].parameters())


@every
def test_every_parameter_gets_a_gradient(name: str) -> None:
    backbone = on_meta(name)
    maps = backbone(torch.empty(1, 1, *smallest_patch(backbone), device="meta"))
    maps[-1].sum().backward()  # the deepest map alone needs every block
    assert all(p.grad is not None for p in backbone.parameters())


@every
def test_config_rebuilds_the_same_network(name: str) -> None:
    backbone = on_meta(name)
    with torch.device("meta"):
        again = build_backbone(**backbone.config)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in backbone.state_dict().items()}
    assert again.config == backbone.config


@every
def test_other_than_one_channel_is_refused(name: str) -> None:
    backbone = on_meta(name)
    with pytest.raises(ValueError, match="one by one"):
        backbone(torch.empty(1, 2, *smallest_patch(backbone), device="meta"))


@every
def test_hidden_voxels_are_not_seen(name: str) -> None:
    if sum(p.numel() for p in on_meta(name).parameters()) > LARGE:
        pytest.skip("a smaller network of the same class stands for it")
    torch.manual_seed(0)
    backbone = build_backbone(**config(name)).eval()
    shape = (1, 1, *smallest_patch(backbone))
    image, hidden = torch.randn(shape), torch.rand(shape) < 0.5
    other = torch.where(hidden, torch.full_like(image, 7.0), image)
    with torch.no_grad():
        masked = backbone.features_masked(image, hidden)
        for one, two in zip(masked, backbone.features_masked(other, hidden), strict=True):
            assert torch.equal(one, two)
        assert not torch.equal(backbone(image)[0], masked[0])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"name": "unet", "widths": 7}, "backbone.widths=7: expected a list of whole numbers"),
        ({"name": "unet", "widths": [16, "a"]}, "backbone.widths=.*: expected a list of whole numbers"),
        ({"name": "vit_s", "patch_vox": "x"}, "backbone.patch_vox=x: expected a whole number"),
        ({"name": "vit_s", "drop_path": "much"}, "backbone.drop_path=much: expected a number"),
        ({"name": "vit_s", "taps": 2.5}, "backbone.taps=2.5: expected a whole number"),
        ({"name": "primus_s", "grid_vox": 7}, "backbone.grid_vox=7: expected "),
    ],
)
def test_a_value_of_another_kind_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_backbone(**config)
