"""Model card of weights that ship: from what their file says of itself, and a text about its limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_SHOWN = ("val_total", "val_regions", "val_self", "val_cross", "probe_unseen_map_dice", "probe_unseen_whole_map_dice")
_POINTS = 6  # of a curve's row


def receipt(about: Mapping[str, Any], size_bytes: int) -> list[str]:
    """One line each: what it is, what it has cost, where it comes from.

    Args:
        about: backbone_file.read_description.
        size_bytes: of the file.
    """
    origin, release = about["provenance"], about.get("release", {})
    cost = origin.get("receipt") or {}
    half = release.get("half_precision", {})
    lines = [
        f"{release.get('name', 'a backbone file')}: {about['backbone']['name']} with "
        f"{'a decoder' if about.get('decoder') else 'no decoder'} and the heads "
        f"{', '.join(about.get('heads') or {}) or 'none'}; {size_bytes / 1e6:.2f} MB",
        f"trained with {about['objective']['name']}: {origin['steps']:,} steps, {origin['samples']:,} samples, "
        f"{cost.get('cpu_hours', 0):.1f} core-hours, {cost.get('gpu_hours', 0):.1f} GPU-hours, {origin['hours']:.1f} h "
        f"on {origin['device']}, seed {origin['seed']}",
        f"code {origin['commit'] or 'unknown'} (brainfm {origin['version']}), data {origin['data']}, "
        f"fingerprint {about['fingerprint'][:16]}",
    ]
    before = origin["config"].get("before")
    if before:
        lines.insert(
            2,
            f"it went on from weights of {before['steps']:,} steps, {before['samples']:,} samples and "
            f"{before.get('cpu_hours', 0):.1f} core-hours: {before['steps'] + origin['steps']:,} steps in all",
        )
    if about.get("voxel_mm"):
        lines.append("voxels seen: {:g} to {:g} mm".format(*about["voxel_mm"]))
    if half:
        lines.append(
            f"half precision: cosine of features {min(half['cosine']):.5f} or more, mean Dice of {half['regions']} "
            f"regions {half['dice_mean']:.4f} with the whole file's, on {half['head']}"
        )
    return lines


def sources(release: Mapping[str, Any]) -> list[str]:
    """One line a source: what was learnt from, its licence, whom to name."""
    return [
        f"{one['title']} ({one['dataset']}): {', '.join(one['used_for'])}; {'; '.join(one['licences'])}; "
        f"{one['attribution']}, {one['address']}"
        for one in release.get("sources", ())
    ]


def licence(release: Mapping[str, Any]) -> list[str]:
    """What the weights may be used for."""
    given = release.get("licence")
    if not given:
        return ["no licence is told in the file"]
    lines = [f"licence {given['name']} ({given['because']}); the code's Apache-2.0 does not cover the weights"]
    lines += [f"{terms} travels with them, for {', '.join(of)}" for terms, of in given["terms"].items()]
    return [*lines, f"for {given['use']}"]


def card(about: Mapping[str, Any], size_bytes: int, text: str) -> str:
    """The card as Markdown.

    Args:
        about: backbone_file.read_description.
        size_bytes: of the file.
        text: Markdown about what the file cannot know: what it was never shown, where it fails.
    """
    release = about.get("release", {})
    parts = [f"# {release.get('name', about['backbone']['name'])}", _listed(receipt(about, size_bytes))]
    parts += ["## May be used for", _listed(licence(release))]
    parts += ["## Sources", _listed(sources(release) or ["not told"])]
    parts += ["## People", _people(release.get("people", ()))]
    parts += ["## Curves", "On held-out people, by steps.", _curves(release.get("curves", {}))]
    if release.get("ordinary"):
        parts += ["## What counts as ordinary", _ordinary(release["ordinary"])]
    return "\n\n".join([*parts, text.strip()]) + "\n"


def _listed(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _people(people: Iterable[Mapping[str, Any]]) -> str:
    rows = []
    for one in people:
        low, middle, high = one["ages"] or (0, 0, 0)
        ages = f"{low:.0f} to {high:.0f}, median {middle:.0f}" if one["ages"] else "not told"
        counted = (", ".join(f"{name} {n}" for name, n in one[key].items()) for key in ("contrasts", "sex"))
        rows.append([one["dataset"], str(one["people"]), *counted, ages])
    return _table(["data set", "people", "scans", "sex", "age in years"], rows)


def _curves(curves: Mapping[str, Sequence[Sequence[float]]]) -> str:
    """The first, the last and some points between of the curves that are shown."""
    rows = []
    for name in (name for name in _SHOWN if curves.get(name)):
        points = curves[name]
        places = sorted({round(k * (len(points) - 1) / (_POINTS - 1)) for k in range(_POINTS)})
        rows.append([name, ", ".join(f"{points[k][0]:g}: {points[k][1]:.3f}" for k in places)])
    return _table(["measure", "step: value"], rows) if rows else "None are kept in the file."


def _ordinary(ordinary: Mapping[str, Any]) -> str:
    rows = [[name, f"{low:.4g}", f"{high:.4g}"] for name, (low, high) in ordinary["ranges"].items()]
    said = f"Of {ordinary['heads']} heads of the training side; beyond these an answer is flagged as out of scope."
    return f"{said}\n\n{_table(['measure', 'low', 'high'], rows)}"
