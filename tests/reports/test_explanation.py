"""The picture of an explained answer lies beside its map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from brainfm.inference.explain import Explanation
from brainfm.reports.explanation import write_picture
from brainfm.specs import TaskSpec
from tests.reports.pages import EVIL

SPEC = TaskSpec("classification", "ill", ("t1",), ("no", EVIL), (16, 16, 16), mode="exclusive")


def explained() -> Explanation:
    scan = np.zeros((12, 14, 10), np.float32)
    scan[3:9, 3:11, 2:8] = np.random.default_rng(0).normal(10, 1, (6, 8, 6))
    heat = np.zeros_like(scan)
    heat[5, 6, 4] = 1
    return Explanation(heat, 2.0, EVIL, 0.75, "hirescam", "encoder", scan)


@pytest.mark.parametrize("name", ["why.nii", "why.nii.gz", "why.nii.v2.nii.gz"])
def test_the_picture_has_the_name_of_the_map(tmp_path: Path, name: str) -> None:
    picture = write_picture(tmp_path / name, explained(), SPEC, (2.0, 2.0, 2.0))
    assert picture == tmp_path / f"{name.removesuffix('.gz').removesuffix('.nii')}.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and [p.name for p in tmp_path.iterdir()] == [picture.name]
