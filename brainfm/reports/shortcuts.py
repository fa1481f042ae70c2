"""Shortcuts in words: what side information tells of the label, and what the audit means for a score."""

from __future__ import annotations

from brainfm.reports.kind_page import KindPage
from brainfm.reports.page import Section
from brainfm.reports.wording import count, p_value, percent, short

_FOUND = {  # what study/shortcuts.py calls its findings
    "untestable": "cannot be tested",
    "harmless": "does not tell the label",
    "survives": "tells the label; the score holds up without it",
    "weakened": "tells the label; less than half of the effect is left without it",
    "lost": "tells the label; nothing above chance is left without it",
    "undecided": "tells the label; too few cases to say what is left without it",
    "inseparable": "tells the label; too few alike cases differ in it to compare",
    "nothing to lose": "tells the label; the model itself is no better than chance",
}


def shortcuts_section(page: KindPage) -> Section:
    """Whether the label can be told without looking at the brain, and what is left of the score then."""
    audit = page.run.found["audit"]
    what, how = page.audited
    auroc = audit["measure"] == "auroc"
    word = "AUROC" if auroc else "skill"
    head = ("from this alone", word, "p", "noticed from", "answers explained", f"model's {word} without it",
            "p without it", "effect left", "verdict")  # fmt: skip
    rows: list[tuple[str, ...]] = [head]
    untested = []
    for s in audit["shortcuts"]:
        name = (f"{s['name']} ({s['label']})" if s["label"] else s["name"]) + ("*" if s["anatomy"] else "")
        if s["code"] == "untestable":
            untested.append((name, s["verdict"].removeprefix("cannot be tested: ")))
            continue
        verdict = _FOUND.get(s["code"], s["code"])
        cells = (short(s["score"]), p_value(s["p_family"]), short(s["noticed_from"]), percent(s["explained"]))
        rows.append((name, *cells, short(s["equalised"]), p_value(s["equalised_p"]), percent(s["kept"]), verdict))
    own = "; ".join(
        (f"{label}: " if label else "") + f"{short(score)}, p {p_value(audit['model_p'][label])}"
        for label, score in audit["model"].items()
    )
    measure = (
        "AUROC: .5 is a guess" if auroc else
        "skill: the share of the error of always answering the mean that it takes away; 0 is a guess, 1 no error"
    )  # fmt: skip
    text = (
        f"{audit['verdict']}\n\nCan the {what} be guessed without looking at the brain? "
        f"{how}Each line lets a linear model tell the label from one kind of side information, cross-validated by "
        f"subject in folds of the audit's own (not those of the training), and measures it by {measure}. The model's "
        f"own, by the same measure: {own}, {count(audit['cases'], 'case')} of "
        f"{count(audit['subjects'], 'subject')}.\n\n"
        "p: by permutation, for all lines together (Holm). Noticed from: in so few cases a weaker shortcut stays below "
        "the line of chance, so no line is a proof of absence. Explains: share of the variance of the model's answers. "
        "Without it: the model's score among cases that are alike in it, p against chance there, and how much of the "
        "model's effect is left"
    )
    text += (
        " (of AUROC − .5)." if auroc else
        " (of the slope of the answers on the truth, which decides: skill falls already because alike cases differ "
        "less)."
    )  # fmt: skip
    if any(s["anatomy"] and s["code"] != "untestable" for s in audit["shortcuts"]):
        text += " * size and shape of a head are anatomy too: by themselves no proof of a shortcut."
    tables = (("Could not be tested", (("", ""), *untested)),) if untested else ()
    return Section("Shortcuts", text, table=tuple(rows) if len(rows) > 1 else None, tables=tables)
