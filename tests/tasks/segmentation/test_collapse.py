"""A segmenter that answers background everywhere: lifted once, stopped when it falls again, resumed exactly."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from brainfm.batch import Batch
from brainfm.errors import TrainingError
from brainfm.nets.backbone import build_backbone
from brainfm.specs import TaskSpec
from brainfm.tasks.segmentation.collapse import CollapseGuard, ForegroundWatch
from brainfm.tasks.segmentation.network import SegmentationTask

STEPS = 1000
LABEL = torch.zeros(1, 4, 4, 4, dtype=torch.int64)
LABEL[0, :2] = 1  # half of the patch


def logits(answers_foreground: bool) -> Tensor:
    found = torch.zeros(1, 2, 4, 4, 4)
    found[:, 1] = 1.0 if answers_foreground else -1.0
    return found


def segmenter(deep: bool = False) -> SegmentationTask:
    torch.manual_seed(0)
    spec = TaskSpec("segmentation", "lesion", ("t1",), (0, 1), (16, 16, 16))
    return SegmentationTask(spec, build_backbone("unet_tiny"), deep_supervision=deep)


class Training:
    """A training whose network answers what it is told to."""

    def __init__(self, deep: bool = False) -> None:
        self.task, self.watch = segmenter(deep), ForegroundWatch(STEPS)
        self.optimizer = torch.optim.AdamW(self.task.parameters(), lr=1e-3)
        for parameter in self.task.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.said: list[tuple[int, str]] = []

    def go(self, first: int, last: int, finds: Any, label: Tensor = LABEL) -> None:
        for step in range(first, last + 1):
            self.watch.add(logits(finds(step)), Batch(image=label[None], sample=LABEL, label=label))
            said = self.watch.look(self.task, self.optimizer, lambda shares: shares, step)
            if said is not None:
                self.said.append((step, said))


def never(step: int) -> bool:
    return False


def test_a_collapse_is_lifted_once_and_then_stops_the_run() -> None:
    run = Training()
    head = run.task.decoder.out
    assert head.weight.any() and head.weight in run.optimizer.state
    with pytest.raises(TrainingError, match="lifted once and fell again"):
        run.go(1, STEPS, never)
    ((step, said),) = run.said
    assert 350 <= step <= 400, "after the warm-up of 200 steps and the patience of 150"
    assert "answered background everywhere" in said and "50.00%" in said
    assert not head.weight.any() and head.weight not in run.optimizer.state, "a new start, without old moments"
    encoder = next(run.task.backbone.parameters())
    assert encoder in run.optimizer.state, "nothing else is forgotten"


def test_all_last_layers_are_lifted() -> None:
    run = Training(deep=True)
    assert len(run.task.heads()) > 1
    run.go(1, 400, never)
    assert len(run.said) == 1 and not any(head.weight.any() for head in run.task.heads())


def test_it_says_nothing_where_foreground_is_found_or_there_is_none() -> None:
    run = Training()
    run.go(1, STEPS, lambda step: True)
    assert not run.said
    run = Training()
    run.go(1, STEPS, lambda step: step % 50 == 0)  # now and then is enough
    assert not run.said
    run = Training()
    run.go(1, STEPS, never, torch.zeros_like(LABEL))
    assert not run.said


def test_a_short_training_is_left_alone() -> None:
    run = Training()
    run.watch = ForegroundWatch(80)
    run.go(1, 80, never)
    assert not run.said


@pytest.mark.parametrize("cut", [199, 210, 350, 380, 600])
def test_what_it_remembers_goes_through_a_checkpoint(cut: int) -> None:
    """A run that goes on after any step is lifted, and stopped, at the same steps as one that was never broken off."""

    def stops(break_at: int | None) -> tuple[list[int], str]:
        run = Training()
        with pytest.raises(TrainingError) as stopped:
            if break_at is not None:
                run.go(1, break_at, never)
                state = {name: value.clone() for name, value in run.watch.state_dict().items()}
                assert set(state) == {"shares", "memory"}
                run.watch = ForegroundWatch(STEPS)
                run.watch.load_state_dict(state)
            run.go((break_at or 0) + 1, STEPS, never)
        return [step for step, _ in run.said], str(stopped.value)

    assert stops(cut) == stops(None)


def test_the_shares_are_means_since_the_last_look() -> None:
    watch = ForegroundWatch(STEPS)
    watch.add(logits(True), Batch(image=LABEL[None], sample=LABEL, label=LABEL))
    watch.add(logits(False), Batch(image=LABEL[None], sample=LABEL, label=LABEL))
    assert watch.shares.tolist() == [1.0, 1.0, 2.0]  # predicted 1 + 0, true .5 + .5, two batches
    watch.look(segmenter(), torch.optim.SGD(segmenter().parameters(), lr=1), lambda shares: shares, 25)
    assert watch.shares.tolist() == [0.0, 0.0, 0.0]


# ---- the guard alone -------------------------------------------------------------------------------------------------


def first_said(shares, kept=None, first: int = 1, **settings) -> tuple[int, str] | None:
    """The first step at which the guard speaks, of (predicted, true) a step."""
    guard = CollapseGuard({} if kept is None else kept, **settings)
    for step, (predicted, true) in enumerate(shares, first):
        said = guard.see(step, predicted, true)
        if said is not None:
            return step, said
    return None


def test_background_everywhere_is_noticed_after_the_warm_up_and_the_patience() -> None:
    found = first_said([(0.0, 0.004)] * 100, warmup_steps=20, steps=30)
    assert found is not None and found[0] == 51
    assert "from step 21 to 51" in found[1] and "0.40% of the voxels" in found[1]
    assert first_said([(0.0, 0.004)] * 50, warmup_steps=20, steps=30) is None


def test_any_foreground_begins_the_patience_anew() -> None:
    shares = [(0.0, 0.004)] * 25 + [(1e-4, 0.004)] + [(0.0, 0.004)] * 30
    assert first_said(shares, warmup_steps=0, steps=30) is None
    assert first_said([*shares, (0.0, 0.004)], warmup_steps=0, steps=30) is not None


def test_specks_far_below_the_truth_count_as_none() -> None:
    assert first_said([(1e-7, 0.01)] * 40, warmup_steps=0, steps=30) is not None
    assert first_said([(1e-4, 0.01)] * 40, warmup_steps=0, steps=30) is None


def test_patches_without_foreground_say_nothing() -> None:
    assert first_said([(0.0, 0.0)] * 400, warmup_steps=0, steps=30) is None
    mixed = [(0.0, 0.0), (0.0, 0.002)] * 30
    assert first_said(mixed, warmup_steps=0, steps=30) is not None  # and they do not calm either


def test_an_interrupted_run_is_judged_like_an_uninterrupted_one() -> None:
    shares, kept = [(0.0, 0.004)] * 60, {}
    assert first_said(shares[:20], kept, warmup_steps=5, steps=30) is None
    kept = json.loads(json.dumps(kept))
    resumed = first_said(shares[20:], kept, first=21, warmup_steps=5, steps=30)
    assert resumed == first_said(shares, warmup_steps=5, steps=30)


def test_after_lifting_the_patience_begins_anew() -> None:
    guard = CollapseGuard({}, warmup_steps=0, steps=10)
    assert all(guard.see(step, 0.0, 0.01) is None for step in range(1, 11))
    guard.forget()
    assert guard.see(11, 0.0, 0.01) is None and guard.see(21, 0.0, 0.01) is not None
