"""Fine-tuning data as the organisers lay it out, with small heads in it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from brainfm.imaging import nifti
from brainfm.submission.challenge import ChallengeTask
from brainfm.volume import Volume

SHAPE, SPACING = (32, 36, 28), 4.0


def head(seed: int, shape=SHAPE, spacing=(SPACING,) * 3, lesion: float = 0.0) -> tuple[Volume, np.ndarray]:
    """An ellipsoid with smooth texture and noise, and a bright ball on its left; (volume, mask of the ball)."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    inside = x**2 + y**2 + z**2 < 0.75
    ball = (x + 0.4) ** 2 + y**2 + (z - rng.uniform(-0.2, 0.2)) ** 2 < 0.06
    voxels = inside * (100 + 20 * np.sin(4 * x + seed) + rng.normal(0, 3, shape)) + lesion * ball
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -np.array(shape) * spacing / 2
    return Volume(voxels.astype(np.float32), affine), ball.astype(np.uint8)


def write_task(task: ChallengeTask, root: Path, subjects: int) -> Path:
    """``preprocessed/`` and ``labels/`` of a task; subjects alternate between the alternatives. Returns root."""
    calls = task.calls()
    for number in range(subjects):
        place, labels = (root / kind / f"sub_{number + 1}" / "ses_1" for kind in ("preprocessed", "labels"))
        for folder in (place, labels):
            folder.mkdir(parents=True, exist_ok=True)
        positive = number % 2
        for order, one in enumerate(calls[number % len(calls)]):
            volume, ball = head(10 * number + order, lesion=60.0 * (1 + positive))
            nifti.write(place / f"{one.file}.nii.gz", volume)
        if task.mask:
            values = ball.copy()
            if task.high > 1:
                values[values.shape[0] // 2 :] = 0
                values[4:7, 16:19, 12:15] = 2
            nifti.write(labels / task.mask, Volume(values.astype(np.uint8), volume.affine_mm))
        if task.answers:
            answer = positive if task.kind == "classification" else 30 + 7.25 * number
            (labels / task.answers[0]).write_text(f"{answer}\n")
    return root
