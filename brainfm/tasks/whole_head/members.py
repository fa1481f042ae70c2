"""A fold's member of a whole-head bundle: its candidates are fitted, one is chosen, and its parts are put together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainfm.data.region_volumes import RegionVolumes
from brainfm.data.store import Store
from brainfm.errors import ScanError
from brainfm.files import write_whole
from brainfm.nets.transfer import fingerprint
from brainfm.study.descriptors import describe
from brainfm.tasks.study import CHOICE, Place, Row, Split, identity
from brainfm.tasks.whole_head.candidates import BLOCKS, Chosen, Side, TunedAnswers, choose, inner_folds
from brainfm.tasks.whole_head.cases import views_of
from brainfm.tasks.whole_head.network import WholeHeadTask
from brainfm.tasks.whole_head.reads import PARTS


class Members:
    """Makes the members of a study's folds.

    Args:
        store: the prepared scans.
        volumes: of its sessions' regions, where there are any.
    """

    def __init__(self, store: Store, volumes: RegionVolumes | None) -> None:
        self.store, self.volumes = store, volumes
        self._measurements: dict[Any, np.ndarray] = {}  # by session
        self._features: tuple[str, dict[Any, np.ndarray]] = ("", {})  # of one frozen network, by session

    @torch.no_grad()
    def conclude(
        self,
        task: WholeHeadTask,
        tuned: WholeHeadTask | None,
        split: Split,
        names: Sequence[str],
        place: Place,
        folder: Path,
        seed: int,
    ) -> tuple[list[Row], dict[str, torch.Tensor]]:
        """The held-out cases, answered by every candidate, and the weights of the one that is shipped. The choice is
        written into the folder.

        Args:
            task: with the encoder as it was before any training.
            tuned: as training left it, fitted to ``split.trained`` alone; None where nothing was trained.
            names: of the candidates.
            seed: of the inner folds.
        """
        task.eval().to(place.device)
        cases = (*split.trained, *split.inner)
        self._remember(task)
        task.set_statistics(np.stack([case.answer for case in cases]))
        side = self._side(task, cases, place, seed)
        found = None if tuned is None else self._tuned(tuned, task, len(split.trained), split.inner, place)
        folds = inner_folds(side, sorted({case.session.subject_key for case in split.inner}))
        mapped = self.volumes is not None and self.volumes.of_labels
        chosen = choose(side, names, folds, mapped, found)
        self._install(task, chosen)
        rows = [self._row(case, split, task, tuned, chosen, place) for case in split.held]
        write_whole(folder / CHOICE, (json.dumps(_told(chosen, side), indent=1) + "\n").encode())
        if tuned is None or "tuned" not in (chosen.name, chosen.fallback):
            return rows, dict(task.bundle_state())
        self._install(tuned, chosen, also_network=False)
        return rows, dict(tuned.bundle_state())

    def _side(self, task: WholeHeadTask, cases: Sequence[Any], place: Place, seed: int) -> Side:
        features = np.stack([self._seen(task, case, place) for case in cases])
        blocks, named = {"features": features}, {}
        if task.region_head is not None and task.reads is not None:
            blocks["regions"] = features[:, task.region_columns]
            named["regions"] = task.reads.region_names
        if task.reads is not None and task.reads.measurements:
            names = task.reads.measurements
            blocks["measurements"] = np.stack([self._measured(case, names, task.spec.contrasts) for case in cases])
        if self.volumes is not None:
            blocks["volumes"] = np.stack([self.volumes.values[case.session.key] for case in cases])
            named["volumes"] = self.volumes.names
        return Side(
            task.spec, np.stack([case.answer for case in cases]).astype(np.float64),
            tuple(case.session.subject_key for case in cases),
            {name: blocks[name] for name in BLOCKS if name in blocks}, named,
            float(task.mean), float(task.std), task.balanced, seed,
        )  # fmt: skip

    def _remember(self, task: WholeHeadTask) -> None:
        """Keeps the features of one frozen network: every fold and baseline asks for the same of a pre-trained one."""
        frozen = ("backbone.", "dense.", "regions.")
        mark = fingerprint({n: v for n, v in task.state_dict().items() if n.startswith(frozen)}) + repr(task.spec)
        if self._features[0] != mark:
            self._features = (mark, {})

    def _seen(self, task: WholeHeadTask, case: Any, place: Place) -> np.ndarray:
        """[E] float64 of `WholeHeadTask.pooled` of the frozen network that `_remember` was told of."""
        kept = self._features[1]
        if case.session.key not in kept:
            kept[case.session.key] = pooled(self.store, task, case, place)[0].double().cpu().numpy()
        return kept[case.session.key]

    def _tuned(
        self, tuned: WholeHeadTask, task: WholeHeadTask, first: int, inner: Sequence[Any], place: Place
    ) -> TunedAnswers | None:
        """Its answers to the inner cases, which stand behind ``first`` others; its last layer henceforth counts from
        the whole training side's mean, in its deviations."""
        task.sort.recentre(tuned, task)
        logits = [tuned.parts(pooled(self.store, tuned, case, place))[PARTS.index("network"), 0] for case in inner]
        if not logits:
            return None
        return TunedAnswers(first + np.arange(len(inner)), torch.stack(logits).double().cpu().numpy())

    def _install(self, task: WholeHeadTask, chosen: Chosen, also_network: bool = True) -> None:
        """The models that were fitted become the member's parts."""
        heads: dict[str, tuple[Any, Any]] = {}
        if task.volume_head is not None:
            heads["volumes"] = (task.volume_head.norm, task.volume_head.out)
        if task.region_head is not None:
            heads["regions"] = (task.region_head.norm, task.region_head.out)
        if task.measure_head is not None:
            heads["measurements"] = (task.measure_head.norm, task.measure_head.out)
        if also_network:
            heads["features"] = (task.norm, task.out)
        for block, (norm, out) in heads.items():
            if block in chosen.models:
                model = chosen.models[block]
                norm.set(torch.from_numpy(model.mean), torch.from_numpy(model.scale))
                out.weight.copy_(torch.from_numpy(model.weight))
                out.bias.copy_(torch.from_numpy(model.bias))
        task.prior.copy_(torch.from_numpy(chosen.prior))
        mixes = [chosen.mixes[name] for name in (chosen.name, chosen.fallback)]
        task.mix.copy_(torch.from_numpy(np.stack(mixes)[:, : task.mix.shape[1]]))

    def _row(
        self, case: Any, split: Split, task: WholeHeadTask, tuned: WholeHeadTask | None, chosen: Chosen, place: Place
    ) -> Row:
        """A held-out case, answered by every candidate."""
        seen = torch.from_numpy(self._seen(task, case, place)).float()[None].to(place.device)
        volumes = self._volumes(case, place.device)
        measured = self._given(case, task, place.device)
        parts = task.parts(seen, volumes, measured)
        if volumes is not None and task.volume_head is None:  # of a table: no bundle reads them
            given = chosen.models["volumes"].logits(volumes.double().cpu().numpy())
            parts[PARTS.index("volumes")] = torch.from_numpy(given).to(parts)
        answers = {}
        for name, mix in chosen.mixes.items():
            own = parts
            if name == "tuned":
                assert tuned is not None
                own = tuned.parts(pooled(self.store, tuned, case, place), volumes, measured)
            logits = torch.einsum("p,pbk->bk", torch.from_numpy(mix[: len(own)]).to(own), own)
            answers[name] = _listed(np.atleast_1d(task.decode_logits(logits)[0].cpu().numpy()))
        row = identity(case.session, split) | {"truth": _listed(case.answer), "raw": answers[chosen.name]}
        return row | {"chosen": chosen.name, "fallback": chosen.fallback, "candidates": answers}

    def _measured(self, case: Any, names: Sequence[str], contrasts: Sequence[str]) -> np.ndarray:
        """[F] float64, NaN where a session lacks what is measured."""
        key = case.session.key
        if key not in self._measurements:
            try:
                told = describe(self.store, case.session, contrasts, case.scans).numbers["content"]
            except ScanError:  # no head is seen
                told = {}
            self._measurements[key] = np.array([told.get(name, np.nan) for name in names], dtype=np.float64)
        return self._measurements[key]

    def _given(self, case: Any, task: WholeHeadTask, device: torch.device) -> torch.Tensor | None:
        """The same, [1, F] float32, for a network's ``parts``."""
        if task.reads is None or not task.reads.measurements:
            return None
        found = self._measured(case, task.reads.measurements, task.spec.contrasts)
        return torch.from_numpy(found).float()[None].to(device)

    def _volumes(self, case: Any, device: torch.device) -> torch.Tensor | None:
        """[1, F] float32."""
        if self.volumes is None:
            return None
        return torch.from_numpy(self.volumes.values[case.session.key]).float()[None].to(device)


def pooled(store: Store, task: WholeHeadTask, case: Any, place: Place) -> torch.Tensor:
    """[1, E] as `WholeHeadTask.pooled` gives it, in the precision that answers are given in."""
    image, present = (torch.from_numpy(array)[None].to(place.device) for array in views_of(store, case, task.spec))
    with torch.autocast(place.device.type, dtype=place.autocast, enabled=place.autocast is not None):
        return task.pooled(image, present)[0]


def _listed(values: np.ndarray) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in np.asarray(values, dtype=np.float64)]


def _told(chosen: Chosen, side: Side) -> dict[str, Any]:
    """A choice for people and for the report."""
    return {
        "chosen": chosen.name, "fallback": chosen.fallback, "subjects": len(set(side.groups)),
        "losses": dict(chosen.losses), "inner": dict(chosen.inner),
        "shares": {name: dict(zip(PARTS, mix.tolist())) for name, mix in chosen.mixes.items()},
        "said": list(chosen.said),
    }  # fmt: skip
