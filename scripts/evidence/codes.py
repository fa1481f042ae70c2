"""Codes of cross_contrast: whether they hold what their names say; one objective, trained in several ways.

    python scripts/evidence/render_contrasts.py --data IXI2MM --out cohort --subjects 20
    brainfm manifest root=cohort out=cohort.csv labels.dseg='*dseg*'
    brainfm prepare manifest=cohort.csv store=store preprocess=iso2mm preprocess.labels=nearest
    python scripts/evidence/codes.py --store store --out evidence \\
        --way published objective.terms_on=samples objective.centred=false objective.logvar_start=null \\
        --way mended

Each way is a name and overrides of `brainfm pretrain`; all have the same steps, batches, seed and people. What is asked
of the means of the codes, on people held out (training is with the noise, every use is of the means):

    contrast S/N          variance of the contrast part's means over people, contrasts, places and cells, over the
                          variance of the noise that training adds to them: below 1 the decoder reads little but noise
    cos C, two contrasts  cosine of the contrast parts of one place in two contrasts; 1 tells them not apart
    cos A, one person     cosine of the anatomy parts of one place in two contrasts; and of two people in one contrast,
    cos A, two people     which should be lower. Each as it is, and about the mean over all there is
    A told by the cell    share of the anatomy part's variance that the cell of the patch alone explains, as padding
                          gives it away; and of the contrast part's that the contrast alone does: next to none, because
                          instance norm takes what a whole patch has in common out of every map
    contrast from C, ...  brainfm.probing.online: balanced accuracy of the contrast (chance 1/3), and how often the
                          nearest scan of another contrast is of the same person (chance 1/people), from each part
    r self, cross, ...    correlation of reconstructions, without mask and noise, with the scans: from the own codes,
                          with another contrast's anatomy, and with the contrast code of a stranger in the same
                          contrast: what that costs is anatomy in the contrast code
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from brainfm import seeds
from brainfm.cli import main as brainfm
from brainfm.data.store import SessionEntry, Store
from brainfm.nets.backbone import build_backbone
from brainfm.nets.backbone_file import LoadedBackbone, load_backbone
from brainfm.objectives.cross_contrast import CrossContrast
from brainfm.objectives.objective import build_objective
from brainfm.probing.online import probe
from brainfm.training.pretrain import split_sessions
from brainfm.training.run import commit_of_code

CONTRASTS = ("t1", "t2", "flair")
ROWS = (
    "contrast S/N", "cos C, two contrasts", "centred cos C, two contrasts", "cos A, one person", "cos A, two people",
    "centred cos A, one person", "centred cos A, two people", "A told by the cell", "C told by the contrast",
    "contrast from C", "subject from C", "contrast from A", "subject from A", "rank of A", "rank of C", "r self",
    "r cross", "r stranger",
)  # fmt: skip


def train(name: str, words: list[str], args: argparse.Namespace) -> Path:
    """The backbone file of a way; made, resumed or found."""
    run = args.out / re.sub(r"[^a-z0-9]+", "_", name.lower())
    file = run / "backbone.safetensors"
    if not file.exists():
        code = brainfm([
            "pretrain", f"store={args.store}", f"run={run}", f"backbone={args.backbone}", "objective=cross_contrast",
            f"objective.latent_channels={args.latent}", f"data.patch_vox=[{args.patch},{args.patch},{args.patch}]",
            f"data.validation={args.held}", f"data.split_seed={args.split_seed}", f"seed={args.seed}",
            f"trainer.max_steps={args.steps}", f"trainer.batch_size={args.batch}", "trainer=auto",
            "trainer.precision=32-true", "trainer.evaluate_every=100", "trainer.checkpoint_every=100",
            "trainer.threads=1", "trainer.workers=0", "probe=null", f"optim.lr={args.lr}", *words,
        ])  # fmt: skip
        if code or not file.exists():
            raise SystemExit(f"{name}: pre-training ended with {code}")
    return file


def built(loaded: LoadedBackbone, seed: int, trained: bool) -> CrossContrast:
    """The objective of a file with its weights, or as it was before the first step."""
    torch.manual_seed(seed)  # as pretrain does before it builds
    backbone = loaded.backbone if trained else build_backbone(**loaded.backbone.config)
    objective = build_objective(
        "cross_contrast", backbone, patch_vox=loaded.patch_vox, seed=seed, **loaded.objective["config"]
    )
    if trained:
        state = {f"backbone.{k}": v for k, v in loaded.backbone.state_dict().items()} | loaded.extra
        objective.load_state_dict(state)
    assert isinstance(objective, CrossContrast)
    return objective.eval()


class Codes:
    """Images and codes of S people in three contrasts at P places of the head, [S, 3, P, ...]."""

    def __init__(self, objective: CrossContrast, store: Store, sessions: list[SessionEntry], places: int) -> None:
        patch = objective.views.patch_vox
        rows = [
            store.block(session, scan.name, place, patch)
            for session in sessions
            for contrast in CONTRASTS
            for scan in [next(s for s in session.scans if s.contrast == contrast)]
            for place in spread(session, patch, places)
        ]
        flat = torch.from_numpy(np.stack(rows)).float()[:, None]
        found: dict[str, list[Tensor]] = {"anatomy": [], "contrast": [], "logvar": []}
        for some in flat.split(8):
            codes = objective.latents(objective.backbone.features(some))
            for part in ("anatomy", "contrast"):
                found[part].append(codes[part].mean)
            noise = codes["contrast"].logvar
            found["logvar"].append(torch.full_like(codes["contrast"].mean, -np.inf) if noise is None else noise)
        shape = (len(sessions), len(CONTRASTS), places)
        self.objective = objective
        self.image = flat.unflatten(0, shape)
        self.of = {part: torch.cat(values).unflatten(0, shape) for part, values in found.items()}

    def centred(self, part: str) -> Tensor:
        code = self.of[part]
        return code - code.mean(dim=(0, 1, 2, 4, 5, 6), keepdim=True)

    def signal_to_noise(self) -> float:
        noise = float(self.of["logvar"].exp().mean())
        return float(self.centred("contrast").square().mean()) / noise if noise else float("inf")

    def share(self, part: str, over: tuple[int, ...]) -> float:
        """Of the variance of a part, what is left of it in the mean over these axes."""
        code = self.centred(part)
        return float(code.mean(dim=over).square().mean() / code.square().mean())

    def likeness(self, anatomy: Tensor, contrast: Tensor) -> float:
        latents = torch.cat([anatomy, contrast], dim=3).flatten(0, 2)
        output = torch.cat([self.objective.decoder(some) for some in latents.split(8)])
        return float(torch.corrcoef(torch.stack([output.flatten(), self.image.flatten()]))[0, 1])


def spread(session: SessionEntry, patch_vox: tuple[int, int, int], places: int) -> list[tuple[int, int, int]]:
    """Corners all over the head, at the same share of it in every person."""
    found = []
    for number in range(places):
        share = seeds.stream(0, "evidence place", number).uniform(0.1, 0.9, 3)
        x, y, z = (round(u * max(0, edge - size)) for u, edge, size in zip(share, session.shape, patch_vox))
        found.append((x, y, z))
    return found


def cosines(code: Tensor, people: bool) -> float:
    """Mean cosine of codes at one place: of one person in two contrasts, or of two people in one contrast."""
    unit = torch.nn.functional.normalize(code.flatten(3), dim=3)  # [S, 3, P, F]
    if people:
        unit = unit.transpose(0, 1)
    pairs = itertools.combinations(range(unit.shape[1]), 2)
    return float(np.mean([float((unit[:, i] * unit[:, j]).sum(dim=-1).mean()) for i, j in pairs]))


@torch.no_grad()
def ask(objective: CrossContrast, store: Store, sessions: list[SessionEntry], places: int) -> dict[str, float]:
    if list(objective.latents.sizes) != ["anatomy", "contrast"]:
        raise SystemExit("expected the parts anatomy and contrast, in this order")
    codes = Codes(objective, store, sessions, places)
    a, c = codes.of["anatomy"], codes.of["contrast"]
    known = probe(objective.encode, store, sessions, objective.views.patch_vox, 0, patches=places)
    return dict(zip(ROWS, (
        codes.signal_to_noise(), cosines(c, False), cosines(codes.centred("contrast"), False),
        cosines(a, False), cosines(a, True), cosines(codes.centred("anatomy"), False),
        cosines(codes.centred("anatomy"), True), codes.share("anatomy", (0, 1, 2)),
        codes.share("contrast", (0, 2, 4, 5, 6)), known["contrast_contrast"], known["contrast_subject"],
        known["anatomy_contrast"], known["anatomy_subject"], known["anatomy_rank"], known["contrast_rank"],
        codes.likeness(a, c), codes.likeness(a.roll(1, dims=1), c), codes.likeness(a, c.roll(1, dims=0)),
    ), strict=True))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--way", nargs="+", action="append", required=True, metavar=("NAME", "OVERRIDE"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4, help="pairs a step")
    parser.add_argument("--patch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--backbone", default="unet")
    parser.add_argument("--latent", type=int, default=256)
    parser.add_argument("--held", type=float, default=0.34)
    parser.add_argument("--split-seed", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--places", type=int, default=8, help="in each head")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    store = Store.open(args.store)
    trained, held = split_sessions(store, args.held, args.split_seed)
    print(f"{len(trained)} sessions to train on, {len(held)} held out; commit {commit_of_code()[:9]}", flush=True)
    table: dict[str, dict[str, float]] = {}
    for name, *words in args.way:
        loaded = load_backbone(train(name, words, args))
        table[f"{name}, step 0"] = ask(built(loaded, args.seed, trained=False), store, held, args.places)
        table[f"{name}, step {args.steps}"] = ask(built(loaded, args.seed, trained=True), store, held, args.places)
    (args.out / "codes.json").write_text(json.dumps(table, indent=1) + "\n")
    print("| | " + " | ".join(table) + " |\n|" + "---|" * (len(table) + 1))
    for row in ROWS:
        print(f"| {row} | " + " | ".join(f"{found[row]:.3f}" for found in table.values()) + " |")


if __name__ == "__main__":
    main()
