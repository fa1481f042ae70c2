"""Augmentation: one spatial change for all that belongs together, drawn from the sample's number alone."""

from __future__ import annotations

import numpy as np
import torch

from brainfm.batch import Batch
from brainfm.data.augment import AugmentSpec, apply, draw

STRONG = AugmentSpec(flip=0.5, affine=1.0, rotate_deg=30, scale=0.2, intensity=1.0)
SPACE = AugmentSpec(flip=0.5, affine=1.0, rotate_deg=30, scale=0.2, intensity=0.0)


def blob_batch(numbers: list[int], shape: tuple[int, int, int] = (24, 20, 16)) -> Batch:
    axes = np.meshgrid(*[np.arange(n) for n in shape], indexing="ij")
    blob = sum((a - c) ** 2 for a, c in zip(axes, (8, 10, 9))) < 16
    image = torch.from_numpy(blob.astype(np.float32))[None, None].repeat(len(numbers), 1, 1, 1, 1)
    label = torch.from_numpy(blob.astype(np.int64))[None].repeat(len(numbers), 1, 1, 1)
    return Batch(image=image, sample=torch.tensor(numbers), partner=2 * image, label=label)


def test_a_draw_depends_on_the_number_alone() -> None:
    together = apply(blob_batch([5, 9]), draw(blob_batch([5, 9]), STRONG, seed=1))
    alone = apply(blob_batch([9]), draw(blob_batch([9]), STRONG, seed=1))
    assert torch.allclose(together.image[1:], alone.image, atol=1e-6)
    assert torch.equal(together.label[1:], alone.label)
    assert not torch.allclose(together.image[0], together.image[1])


def test_partner_and_label_move_with_the_image() -> None:
    batch = blob_batch(list(range(8)))
    moved = apply(batch, draw(batch, SPACE, seed=0))
    assert torch.allclose(moved.partner, 2 * moved.image, atol=1e-5)
    inside = (moved.image[:, 0] > 0.5) == (moved.label == 1)
    assert inside.float().mean() > 0.99
    assert (moved.label != batch.label).any()


def test_flip_is_left_right_and_exact() -> None:
    batch = blob_batch([0, 1, 2, 3])
    flipped = apply(batch, draw(batch, AugmentSpec(flip=1.0, affine=0.0, intensity=0.0), seed=0))
    assert torch.allclose(flipped.image, batch.image.flip(2), atol=1e-5)
    assert torch.equal(flipped.label, batch.label.flip(1))


def test_rotation_keeps_volume_and_scale_changes_it() -> None:
    batch = blob_batch(list(range(20)), (24, 24, 24))
    turned = apply(batch, draw(batch, AugmentSpec(flip=0, affine=1, rotate_deg=20, scale=0, intensity=0), seed=0))
    volumes = turned.label.flatten(1).sum(1) / batch.label.flatten(1).sum(1)
    assert ((volumes - 1).abs() < 0.12).all()


def test_intensity_is_independent_for_the_scans_of_a_pair() -> None:
    batch = blob_batch(list(range(4)))
    changed = apply(batch, draw(batch, AugmentSpec(flip=0, affine=0, intensity=1.0), seed=0))
    assert torch.equal(changed.label, batch.label)
    assert not torch.allclose(changed.partner, 2 * changed.image, atol=0.05)


def test_nothing_drawn_nothing_changed() -> None:
    batch = blob_batch([1, 2])
    same = apply(batch, draw(batch, AugmentSpec(flip=0, affine=0, intensity=0), seed=0))
    assert torch.equal(same.image, batch.image) and torch.equal(same.label, batch.label)
