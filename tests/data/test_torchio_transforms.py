"""TorchIO's transforms in the batch: by name, the same for a sample in any batch, labels with their scans; a stand-in
where torchio is not installed."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import pytest
import torch

from brainfm.batch import Batch
from brainfm.data.augment import apply, augment_spec, draw
from brainfm.data.torchio_transforms import check_still
from brainfm.errors import ConfigError

STILL = {"flip": 0, "affine": 0, "intensity": 0}


class _Transform:
    def __init__(self, p: float = 1.0, most: float = 1.0) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"Probability must be in [0, 1], not {p}")
        self.p, self.most = p, most

    def __call__(self, subject: dict[str, Any]) -> dict[str, Any]:
        return self.changed(subject) if torch.rand(1) < self.p else subject


class _RandomGain(_Transform):
    def changed(self, subject: dict[str, Any]) -> dict[str, Any]:
        for image in subject.values():
            if isinstance(image, _Scalar):
                image.data = image.data * (1 + self.most * torch.rand(1))
        return subject


class _RandomRoll(_Transform):
    def changed(self, subject: dict[str, Any]) -> dict[str, Any]:
        steps = 1 + int(3 * torch.rand(1))
        for image in subject.values():
            image.data = image.data.roll(steps, dims=1)
        return subject


class _Halved(_Transform):
    def changed(self, subject: dict[str, Any]) -> dict[str, Any]:
        for image in subject.values():
            image.data = image.data[:, ::2]
        return subject


class _Scalar:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.data = tensor


class _Label:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.data = tensor


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchio's shape: `Subject`, images with `data`, transforms that draw from torch's own stream."""
    made: Any = types.ModuleType("torchio")
    made.Transform, made.Subject = _Transform, dict
    made.ScalarImage = _Scalar
    made.LabelMap = _Label
    made.RandomGain, made.RandomRoll, made.Halved = _RandomGain, _RandomRoll, _Halved
    intensity: Any = types.ModuleType("torchio.transforms.intensity_transform")
    intensity.IntensityTransform = _RandomGain
    monkeypatch.setitem(sys.modules, "torchio", made)
    monkeypatch.setitem(sys.modules, "torchio.transforms", types.ModuleType("torchio.transforms"))
    monkeypatch.setitem(sys.modules, "torchio.transforms.intensity_transform", intensity)


def batch(numbers: tuple[int, ...] = (4, 9)) -> Batch:
    images = [torch.rand(2, 8, 6, 4, generator=torch.Generator().manual_seed(n)) for n in numbers]
    regions = [torch.randint(-1, 3, (8, 6, 4), generator=torch.Generator().manual_seed(n)) for n in numbers]
    present = torch.tensor([[True, n != 9] for n in numbers])
    return Batch(
        torch.stack(images) * present[:, :, None, None, None], torch.tensor(numbers), present=present,
        regions=torch.stack(regions),
    )  # fmt: skip


def changed(asked: dict[str, Any], numbers: tuple[int, ...] = (4, 9), seed: int = 3) -> Batch:
    spec = augment_spec({**STILL, "torchio": asked})
    assert spec is not None
    shown = batch(numbers)
    return apply(shown, draw(shown, spec, seed))


def test_a_sample_is_changed_alike_in_any_batch_and_otherwise_by_another_seed() -> None:
    before = torch.random.get_rng_state()
    both, alone = changed({"RandomGain": {"most": 2.0}}), changed({"RandomGain": None, "RandomRoll": {"p": 0}}, (9,))
    again = changed({"RandomGain": {"most": 2.0}}, (9, 4))
    assert torch.equal(torch.random.get_rng_state(), before)  # torch's own stream is left as it was
    assert torch.equal(both.image[1], again.image[0]) and torch.equal(both.image[0], again.image[1])
    assert not torch.equal(both.image, changed({"RandomGain": {"most": 2.0}}, seed=4).image)
    gains = both.image[0] / batch().image[0]
    assert gains[0].std() < 1e-5 and abs(gains[0].mean() - gains[1].mean()) > 1e-3  # every scan has its own
    assert (both.image[1, 1] == 0).all() and (alone.image[0, 1] == 0).all()  # absent contrasts stay 0


def test_labels_move_with_their_scans_and_unknown_stays_unknown() -> None:
    old, new = batch(), changed({"RandomRoll": {}})
    for place in range(2):
        steps = [n for n in range(1, 4) if torch.equal(old.image[place, 0].roll(n, 0), new.image[place, 0])]
        assert len(steps) == 1 and old.regions is not None and new.regions is not None
        assert torch.equal(old.regions[place].roll(steps[0], 0), new.regions[place])
    assert new.regions is not None and new.regions.dtype == torch.int64 and int(new.regions.min()) == -1


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"RandomMood": {}}, r"torchio\.RandomMood: torchio has no transform of this name"),
        ({"Subject": {}}, r"torchio\.Subject: torchio has no transform of this name"),
        ({"RandomGain": {"p": 3}}, r"torchio\.RandomGain: Probability must be in"),
        ({"RandomGain": {"loud": 3}}, r"torchio\.RandomGain: .*unexpected keyword argument 'loud'"),
        ({"RandomGain": 3}, "expected a mapping of its arguments, or null"),
        (["RandomGain"], "expected a mapping of transforms' names"),
    ],
)
def test_what_torchio_does_not_have_is_refused(asked: Any, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        augment_spec({"torchio": asked})


def test_another_grid_and_moved_windows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"found \(4, 6, 4\) voxels after the transforms, expected the \(8, 6, 4\)"):
        changed({"Halved": {}})
    spec = augment_spec({"torchio": {"RandomGain": {}, "RandomRoll": {}}})
    assert spec is not None
    check_still(spec.torchio[:1])
    with pytest.raises(ConfigError, match="RandomRoll may move voxels, but windows are moved before"):
        check_still(spec.torchio)


def test_without_torchio_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchio", None)
    with pytest.raises(ConfigError, match=r"data\.augment\.torchio needs torchio.*\[augment\]"):
        augment_spec({"torchio": {"RandomGain": {}}})
    assert augment_spec({"torchio": {}}) is not None  # nothing is asked of it


@pytest.mark.skipif(importlib.util.find_spec("torchio") is None, reason="torchio is not installed")
def test_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchio"]:
        monkeypatch.delitem(sys.modules, name)
    asked = {"RandomGhosting": {"p": 1.0}, "RandomAffine": {"degrees": 10}, "RandomNoise": None}
    one, other = changed(asked), changed(asked, (9, 4))
    assert torch.allclose(one.image[0], other.image[1]) and not torch.allclose(one.image, batch().image)
    assert one.regions is not None and int(one.regions.min()) == -1 and int(one.regions.max()) <= 2
