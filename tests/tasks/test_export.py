"""A network whose cases have every contrast can be exported: no step of it depends on a value."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from brainfm.nets.backbone import build_backbone
from brainfm.nets.cpu import swap_out
from brainfm.specs import TaskSpec
from brainfm.tasks.registry import build_task
from brainfm.tasks.task import Task
from brainfm.tasks.whole_head.reads import Reads

SEGMENTATION = TaskSpec("segmentation", "lesion", ("t1", "t2"), (0, 1), (16, 16, 16), fusion="attention")
CLASSES = TaskSpec("classification", "sex", ("t1", "t2"), ("f", "m"), (16, 16, 16), mode="exclusive", view_mm=4.0)
REGIONS = {"part": "a", "channels": 3, "names": ["background", "csf", "grey"]}
READS = Reads(decoder={"parts": {"a": 3}}, regions=REGIONS, outside=("background",))
QUESTIONS: list[Any] = [
    pytest.param(SEGMENTATION, {}, (2, 2, 16, 16, 16), id="segmentation"),
    pytest.param(SEGMENTATION, {"dense_channels": 5}, (1, 2, 16, 16, 16), id="behind a decoder"),
    pytest.param(CLASSES, {}, (2, 1, 2, 16, 16, 16), id="whole head"),
    pytest.param(CLASSES, {"reads": READS}, (2, 1, 2, 16, 16, 16), id="whole head and regions"),
]


def network(spec: TaskSpec, settings: dict[str, Any]) -> Task:
    torch.manual_seed(0)
    task = build_task(spec, build_backbone("unet_tiny"), **settings).eval()
    for score in task.fusion.scores:  # type: ignore[union-attr]
        torch.nn.init.normal_(score.weight)
    return task


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


@pytest.mark.parametrize(("spec", "settings", "shape"), QUESTIONS)
def test_no_mask_is_a_mask_without_absent_contrasts(spec: TaskSpec, settings: Any, shape: tuple[int, ...]) -> None:
    task, image = network(spec, settings), torch.randn(*shape)
    with torch.no_grad():
        whole = logits(task(image))
        assert torch.equal(whole, logits(task(image, torch.ones(shape[0], 2, dtype=torch.bool))))
        one = torch.tensor([[True, False]]).expand(shape[0], 2)
        assert not torch.allclose(whole, logits(task(image, one)))


@pytest.mark.parametrize(("spec", "settings", "shape"), QUESTIONS)
def test_an_exported_network_answers_for_other_images(spec: TaskSpec, settings: Any, shape: tuple[int, ...]) -> None:
    task = swap_out(network(spec, settings))
    with torch.no_grad():
        exported = torch.export.export(task, (torch.randn(*shape),)).module()
        image = 2 * torch.randn(*shape) + 1
        want = logits(task(image))
        torch.testing.assert_close(logits(exported(image)), want, atol=1e-6, rtol=1e-5)
        assert not torch.allclose(want, logits(task(torch.randn(*shape))))


def test_a_mask_of_another_size_is_refused() -> None:
    task = network(SEGMENTATION, {})
    with pytest.raises(ValueError, match=r"found \(1, 2, 16, 16, 16\) and \(1, 3\)"):
        task(torch.randn(1, 2, 16, 16, 16), torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"found \(2, 16, 16, 16\) and None"):
        task(torch.randn(2, 16, 16, 16))
