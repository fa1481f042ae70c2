"""ResNets: torchvision's names and outputs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from brainfm.errors import ConfigError, WeightsError
from brainfm.nets.resnet import ResNet, load_resnet
from tests.crossdomain.filled import filled

OUTPUTS = json.loads((Path(__file__).parent / "resnet_outputs.json").read_text())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_names_and_maps_are_those_of_torchvision(name: str) -> None:
    network = filled(ResNet(name)).eval()
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == OUTPUTS[name]["tensors"]
    image = torch.from_numpy(np.random.default_rng(5).standard_normal((2, 3, 64, 96)).astype(np.float32))
    with torch.no_grad():
        maps = network(image)
    assert [list(each.shape) for each in maps] == OUTPUTS[name]["maps"]
    assert [each.shape[1] for each in maps] == list(network.widths)
    for each, means, deviation in zip(maps, OUTPUTS[name]["means"], OUTPUTS[name]["stds"]):
        assert np.allclose(each.mean((0, 2, 3))[:6], means, atol=2e-5 + 1e-4 * deviation)
        assert abs(float(each.std()) - deviation) < 1e-4 * deviation


def test_weights_come_from_a_local_file_or_not_at_all(tmp_path: Path) -> None:
    source, target = filled(ResNet()), ResNet()
    torch.save(
        source.state_dict() | {"fc.weight": torch.zeros(1000, 512), "fc.bias": torch.zeros(1000)}, tmp_path / "r.pth"
    )
    report = load_resnet(target, tmp_path / "r.pth")
    assert len(report.loaded) == len(target.state_dict()) and report.unused == ("fc.weight", "fc.bias")
    assert torch.equal(target.layer3[0].downsample[0].weight, source.layer3[0].downsample[0].weight)
    with pytest.raises(WeightsError, match=r"r\.pth: does not fit ResNet: .*layer1"):
        load_resnet(ResNet("resnet50"), tmp_path / "r.pth")
    (tmp_path / "r.pth").write_bytes(b"no weights")
    with pytest.raises(WeightsError, match=r"r\.pth: cannot be read as a checkpoint, expected a file of tensors"):
        load_resnet(target, tmp_path / "r.pth")
    with pytest.raises(WeightsError, match="no such file"):
        load_resnet(target, tmp_path / "none.pth")
    with pytest.raises(ConfigError, match="expected one of resnet18, resnet50"):
        ResNet("resnet101")
