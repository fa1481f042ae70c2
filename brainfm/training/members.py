"""A fold's member of a whole-head bundle: its candidates are fitted, one is chosen, and its parts are put together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from brainfm.data.region_volumes import RegionVolumes
from brainfm.data.scan_cases import views_of
from brainfm.data.store import Store
from brainfm.files import write_whole
from brainfm.nets.transfer import fingerprint
from brainfm.tasks.reads import PARTS
from brainfm.tasks.scan_level import ScanTask
from brainfm.training.candidates import Chosen, Side, Tuned, choose, inner_folds
from brainfm.training.crossval import Split
from brainfm.training.questions import CHOICE, Engine, Row, identity


class Members:
    """Makes the members of a question's folds.

    Args:
        store: the prepared scans.
        volumes: of its sessions' regions, where there are any.
    """

    def __init__(self, store: Store, volumes: RegionVolumes | None) -> None:
        self.store, self.volumes = store, volumes
        self._features: tuple[str, dict[Any, np.ndarray]] = ("", {})  # of one frozen network, by session

    @torch.no_grad()
    def conclude(
        self,
        task: ScanTask,
        tuned: ScanTask | None,
        split: Split,
        names: Sequence[str],
        engine: Engine,
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
        task.eval().to(engine.device)
        cases = (*split.trained, *split.inner)
        self._remember(task)
        task.set_statistics(np.stack([case.answer for case in cases]))
        side = self._side(task, cases, engine, seed)
        found = None if tuned is None else self._tuned(tuned, task, len(split.trained), split.inner, engine)
        folds = inner_folds(side, sorted({case.session.subject_key for case in split.inner}))
        mapped = self.volumes is not None and self.volumes.of_labels
        chosen = choose(side, names, folds, mapped, found)
        self._install(task, chosen)
        rows = [self._row(case, split, task, tuned, chosen, engine) for case in split.held]
        write_whole(folder / CHOICE, (json.dumps(_told(chosen, side), indent=1) + "\n").encode())
        if tuned is None or "tuned" not in (chosen.name, chosen.fallback):
            return rows, dict(task.bundle_state())
        self._install(tuned, chosen, also_network=False)
        return rows, dict(tuned.bundle_state())

    def _side(self, task: ScanTask, cases: Sequence[Any], engine: Engine, seed: int) -> Side:
        features = np.stack([self._seen(task, case, engine) for case in cases])
        blocks, named = {"features": features}, {}
        if task.region_head is not None and task.reads is not None:
            blocks["regions"] = features[:, task.region_columns]
            named["regions"] = task.reads.region_names
        if self.volumes is not None:
            blocks["volumes"] = np.stack([self.volumes.values[case.session.key] for case in cases])
            named["volumes"] = self.volumes.names
        return Side(
            task.spec, np.stack([case.answer for case in cases]).astype(np.float64),
            tuple(case.session.subject_key for case in cases),
            {name: blocks[name] for name in ("volumes", "regions", "features") if name in blocks}, named,
            float(task.mean), float(task.std), task.balanced, seed,
        )  # fmt: skip

    def _remember(self, task: ScanTask) -> None:
        """Keeps the features of one frozen network: every fold and baseline asks for the same of a pre-trained one."""
        frozen = ("backbone.", "dense.", "regions.")
        mark = fingerprint({n: v for n, v in task.state_dict().items() if n.startswith(frozen)}) + repr(task.spec)
        if self._features[0] != mark:
            self._features = (mark, {})

    def _seen(self, task: ScanTask, case: Any, engine: Engine) -> np.ndarray:
        """[E] float64 of `ScanTask.pooled` of the frozen network that `_remember` was told of."""
        kept = self._features[1]
        if case.session.key not in kept:
            kept[case.session.key] = pooled(self.store, task, case, engine)[0].double().cpu().numpy()
        return kept[case.session.key]

    def _tuned(self, tuned: ScanTask, task: ScanTask, first: int, inner: Sequence[Any], engine: Engine) -> Tuned | None:
        """Its answers to the inner cases, which stand behind ``first`` others; its last layer henceforth counts from
        the whole training side's mean, in its deviations."""
        if task.spec.kind == "regression":
            tuned.out.weight.mul_(tuned.std / task.std)
            tuned.out.bias.copy_((tuned.out.bias * tuned.std + tuned.mean - task.mean) / task.std)
            tuned.mean.copy_(task.mean)
            tuned.std.copy_(task.std)
        logits = [tuned.parts(pooled(self.store, tuned, case, engine))[PARTS.index("network"), 0] for case in inner]
        if not logits:
            return None
        return Tuned(first + np.arange(len(inner)), torch.stack(logits).double().cpu().numpy())

    def _install(self, task: ScanTask, chosen: Chosen, also_network: bool = True) -> None:
        """The models that were fitted become the member's parts."""
        heads: dict[str, tuple[Any, Any]] = {}
        if task.volume_head is not None:
            heads["volumes"] = (task.volume_head.norm, task.volume_head.out)
        if task.region_head is not None:
            heads["regions"] = (task.region_head.norm, task.region_head.out)
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
        task.mix.copy_(torch.from_numpy(np.stack(mixes)))

    def _row(
        self, case: Any, split: Split, task: ScanTask, tuned: ScanTask | None, chosen: Chosen, engine: Engine
    ) -> Row:
        """A held-out case, answered by every candidate."""
        seen = torch.from_numpy(self._seen(task, case, engine)).float()[None].to(engine.device)
        volumes = self._volumes(case, engine.device)
        parts = task.parts(seen, volumes)
        if volumes is not None and task.volume_head is None:  # of a table: no bundle reads them
            given = chosen.models["volumes"].logits(volumes.double().cpu().numpy())
            parts[PARTS.index("volumes")] = torch.from_numpy(given).to(parts)
        answers = {}
        for name, mix in chosen.mixes.items():
            own = parts
            if name == "tuned":
                assert tuned is not None
                own = tuned.parts(pooled(self.store, tuned, case, engine), volumes)
            logits = torch.einsum("p,pbk->bk", torch.from_numpy(mix).to(own), own)
            answers[name] = _listed(np.atleast_1d(task.decode_logits(logits)[0].cpu().numpy()))
        row = identity(case.session, split) | {"truth": _listed(case.answer), "raw": answers[chosen.name]}
        return row | {"chosen": chosen.name, "fallback": chosen.fallback, "candidates": answers}

    def _volumes(self, case: Any, device: torch.device) -> torch.Tensor | None:
        """[1, F] float32."""
        if self.volumes is None:
            return None
        return torch.from_numpy(self.volumes.values[case.session.key]).float()[None].to(device)


def pooled(store: Store, task: ScanTask, case: Any, engine: Engine) -> torch.Tensor:
    """[1, E] as `ScanTask.pooled` gives it, in the precision that answers are given in."""
    image, present = (torch.from_numpy(array)[None].to(engine.device) for array in views_of(store, case, task.spec))
    with torch.autocast(engine.device.type, dtype=engine.autocast, enabled=engine.autocast is not None):
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
