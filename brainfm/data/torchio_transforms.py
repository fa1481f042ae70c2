"""TorchIO's transforms by name, in the batch: what happens to a sample is drawn from its number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from brainfm import seeds
from brainfm.batch import Batch
from brainfm.errors import ConfigError
from brainfm.extras import missing

KEY = "torchio"
SCANS = ("image", "partner")
LABELS: dict[str, int] = {"label": 0, "regions": -1, "lesion": -1}  # and what stands where there is nothing to copy


@dataclass(frozen=True)
class TorchIODraw:
    """What will happen to a batch: the transforms, and for each sample the seed of what they draw."""

    transforms: tuple[Any, ...]
    seeds: tuple[int, ...]


def transforms_of(asked: Mapping[str, Any]) -> tuple[Any, ...]:
    """TorchIO's transforms in the order of their names' appearance.

    Args:
        asked: name of a class of ``torchio`` -> its keyword arguments, or None for its defaults.

    Raises: ConfigError where torchio is missing, has no such transform, or does not take the arguments.
    """
    if not asked:
        return ()
    try:
        import torchio
    except ModuleNotFoundError:
        raise missing("torchio", f"data.augment.{KEY}") from None
    if not isinstance(asked, Mapping):
        raise ConfigError(f"data.augment.{KEY}={asked}: expected a mapping of transforms' names to their arguments")
    found = []
    for name, arguments in asked.items():
        kind = getattr(torchio, str(name), None)
        if not (isinstance(kind, type) and issubclass(kind, torchio.Transform)):
            raise ConfigError(f"data.augment.{KEY}.{name}: torchio has no transform of this name")
        if arguments is not None and not isinstance(arguments, Mapping):
            raise ConfigError(f"data.augment.{KEY}.{name}={arguments}: expected a mapping of its arguments, or null")
        given = {str(k): tuple(v) if isinstance(v, list) else v for k, v in (arguments or {}).items()}
        try:
            found.append(kind(**given))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"data.augment.{KEY}.{name}: {error}") from None
    return tuple(found)


def check_still(transforms: Sequence[Any]) -> None:
    """Raises: ConfigError for a transform that may move voxels, where two views must stay where they are."""
    from torchio.transforms.intensity_transform import IntensityTransform

    moving = [type(each).__name__ for each in transforms if not isinstance(each, IntensityTransform)]
    if moving:
        raise ConfigError(
            f"data.augment.{KEY}.{moving[0]} may move voxels, but windows are moved before; expected transforms of "
            "intensities alone"
        )


def torchio_draw(transforms: tuple[Any, ...], numbers: Sequence[int], seed: int) -> TorchIODraw | None:
    """A function of (seed, sample numbers, transforms); None without transforms."""
    if not transforms:
        return None
    return TorchIODraw(
        transforms, tuple(seeds.torch_stream(seed, "augment.torchio", number).initial_seed() for number in numbers)
    )


@torch.no_grad()
def transformed(batch: Batch, draw: TorchIODraw) -> Batch:
    """The batch after the transforms, each sample with its labels; on the host, and back to where it was.

    Voxels keep their dtype. Absent contrasts stay 0. torch's own stream is left as it was.

    Raises: ConfigError where a transform changes the grid of voxels.
    """
    import torchio

    values = {name: getattr(batch, name) for name in (*SCANS, *LABELS) if getattr(batch, name) is not None}
    new: dict[str, list[Tensor]] = {name: [] for name in values}
    with torch.random.fork_rng(devices=[]):
        for place, seed in enumerate(draw.seeds):
            torch.manual_seed(seed)
            subject = torchio.Subject(_images({name: value[place].cpu() for name, value in values.items()}))
            for transform in draw.transforms:
                subject = transform(subject)
            for name, value in values.items():
                new[name].append(_taken(subject, name, value[place], draw.transforms))
    changed = {name: torch.stack(each).to(values[name]) for name, each in new.items()}
    if batch.present is not None and "image" in changed:
        absent = ~batch.present.to(batch.image.device)
        changed["image"] = changed["image"].masked_fill(absent[:, :, None, None, None], 0)
    return replace(batch, **changed)


def _images(values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Every scan is an image of its own, so that each gets artefacts of its own and all move together."""
    import torchio

    images: dict[str, Any] = {}
    for name, value in values.items():
        if name in LABELS:  # counted from what stands for nothing, which is what comes in from outside
            images[name] = torchio.LabelMap(tensor=(value.to(torch.int32) - LABELS[name])[None])
            continue
        for number, scan in enumerate(value):
            images[f"{name}{number}"] = torchio.ScalarImage(tensor=scan.float()[None])
    return images


def _taken(subject: Any, name: str, old: Tensor, transforms: Sequence[Any]) -> Tensor:
    if name in LABELS:
        found: Tensor = subject[name].data[0].round().to(old.dtype) + LABELS[name]
    else:
        found = torch.cat([subject[f"{name}{number}"].data for number in range(len(old))])
    if found.shape != old.shape:
        names = ", ".join(type(each).__name__ for each in transforms)
        raise ConfigError(
            f"data.augment.{KEY} ({names}): found {tuple(found.shape[-3:])} voxels after the transforms, expected the "
            f"{tuple(old.shape[-3:])} of the patch"
        )
    return found
