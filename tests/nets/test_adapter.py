"""Networks of others as backbones: MONAI's, and a module of one's own."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from brainfm.errors import ConfigError
from brainfm.nets.backbone import build_backbone
from brainfm.nets.backbone_file import load_backbone, save_backbone
from brainfm.nets.decoders import decoder_for
from tests.nets.test_backbone_file import PROVENANCE, SPEC

DYNUNET = {
    "network": "monai.networks.nets:DynUNet",
    "maps": ["input_block", "downsamples.0", "bottleneck"],
    "settings": {
        "spatial_dims": 3, "in_channels": 1, "out_channels": 2, "kernel_size": [3, 3, 3], "strides": [1, 2, 2],
        "upsample_kernel_size": [2, 2], "filters": [4, 6, 8],
    },
    "probe_vox": [16, 16, 16],
}  # fmt: skip


class Own(nn.Module):
    """Two maps, and an end that nothing needs."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.fine = nn.Conv3d(1, width, 3, padding=1)
        self.coarse = nn.Conv3d(width, 5, 2, stride=2)
        self.end = nn.Linear(5, 2)
        self.again = nn.ModuleList([self.fine])  # as networks do that hold a part in two places

    def forward(self, image: Tensor) -> Tensor:
        deep = self.coarse(torch.relu(self.again[0](image)))
        return self.end(deep.mean((2, 3, 4)))


class Tokens(nn.Module):
    """One token for the whole, then one for each cube of 4 voxels."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv3d(1, 6, 4, stride=4)
        self.whole = nn.Parameter(torch.randn(1, 1, 6))
        self.mix = nn.Linear(6, 6)

    def forward(self, image: Tensor) -> list[Tensor]:
        tokens = self.patches(image).flatten(2).transpose(1, 2)
        return [self.mix(torch.cat([self.whole.expand(len(tokens), -1, -1), tokens], 1))]


def own(**settings: Any) -> Any:
    return build_backbone(
        "adapted", network=f"{__name__}:Own", maps=["fine", "coarse"], probe_vox=[8, 8, 8], **settings
    )


def test_a_module_of_ones_own() -> None:
    backbone = own(settings={"width": 4})
    assert (backbone.widths, backbone.strides) == ((4, 5), (1, 2))
    image = torch.randn(2, 1, 8, 12, 4)
    fine, coarse = backbone(image)
    assert torch.equal(fine, backbone.network.fine(image))
    assert torch.equal(coarse, backbone.network.coarse(torch.relu(fine)))
    assert {name.split(".")[0] for name, _ in backbone.network.named_parameters()} == {"fine", "coarse"}
    assert [len(list(block.parameters())) for block in backbone.blocks()] == [2, 2]


def test_it_is_copied_and_comes_back_from_a_file(tmp_path) -> None:
    backbone = own()
    twin = copy.deepcopy(backbone)
    image = torch.randn(1, 1, 8, 8, 8)
    before = backbone(image)
    with torch.no_grad():
        for value in backbone.parameters():
            value.zero_()
    assert all(torch.equal(a, b) for a, b in zip(twin(image), before))  # the copy reads its own parts
    file = tmp_path / "b.safetensors"
    save_backbone(
        file, twin, objective={"name": "mae", "config": {}}, objective_state={}, preprocess=SPEC, patch_vox=(8, 8, 8),
        provenance=PROVENANCE,
    )  # fmt: skip
    loaded = load_backbone(file).backbone
    assert all(torch.equal(a, b) for a, b in zip(loaded(image), before))


def test_monais_dynunet_gives_its_encoders_maps_and_learns() -> None:
    pytest.importorskip("monai.networks.nets")
    backbone = build_backbone("adapted", **DYNUNET)
    assert (backbone.widths, backbone.strides) == ((4, 6, 8), (1, 2, 4))
    maps = backbone(torch.randn(1, 1, 16, 8, 24))
    net = backbone.network
    expected = net.bottleneck(net.downsamples[0](maps[0]))
    torch.testing.assert_close(maps[2], expected)
    decoder_for(backbone, 2)(maps).sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())
    assert not any("upsamples" in name or "output_block" in name for name in backbone.state_dict())


def test_tokens_are_laid_out_on_their_grid() -> None:
    backbone = build_backbone("adapted", network=f"{__name__}:Tokens", maps=["mix"], tokens_vox=4, probe_vox=[8, 8, 8])
    assert (backbone.widths, backbone.strides) == ((6,), (4,))
    image = torch.randn(1, 1, 8, 16, 12)
    (found,) = backbone(image)
    net = backbone.network
    assert torch.allclose(found[0, :, 1, 2, 0], net.mix(net.patches(image)[0, :, 1, 2, 0]), atol=1e-6)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"network": "no.such.place:Net"}, "package.module:Class that is installed"),
        ({"network": "subprocess:Popen", "settings": {"args": ["true"]}}, "expected a class of torch modules"),
        ({"maps": ["fine", "deep"]}, "such as .*coarse"),
        ({"settings": {"depth": 3}}, "backbone.settings of .*depth"),
        ({"maps": ["fine", "end"]}, "end is not run|end answers"),
        ({"maps": ["coarse", "fine"]}, "fine to coarse"),
        ({"probe_vox": [0, 8, 8]}, "three edges"),
        ({"tokens_vox": 0}, "one from 1"),
        ({"network": 7}, "backbone.network=7: expected text"),
        ({"maps": "model.0"}, "backbone.maps=model.0: expected a list of texts"),
        ({"maps": [1]}, "expected a list of texts"),
        ({"settings": "deep"}, "backbone.settings=deep: expected a mapping or null"),
        ({"probe_vox": "8"}, "backbone.probe_vox=8: expected a list of whole numbers"),
        ({"tokens_vox": "4"}, "backbone.tokens_vox=4: expected a whole number or null"),
        (
            {
                "network": "torch.nn:Conv2d",
                "maps": [""],
                "settings": {"in_channels": 1, "out_channels": 2, "kernel_size": 1},
            },
            "it does not read",
        ),
    ],
)
def test_refusals(config: dict[str, Any], words: str) -> None:
    given = {"network": f"{__name__}:Own", "maps": ["fine", "coarse"], "probe_vox": [8, 8, 8]} | config
    with pytest.raises(ConfigError, match=words):
        build_backbone("adapted", **given)
