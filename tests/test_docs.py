"""What README, CONTRIBUTING, DECISIONS and docs/ say of the repository is so: links, verbs, keys, files, layers."""

from __future__ import annotations

import re
import shlex
import struct
from pathlib import Path

import pytest

from brainfm.cli import verbs
from brainfm.settings import keys_of
from brainfm.verbs import compose
from tests.test_layers import MAY_IMPORT, ROOT

REPOSITORY = Path(__file__).parents[1]
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "DECISIONS.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
MOST_WORDS = 700
# `imaging/nifti.py`: files of brainfm/ go without its name
_FILE = re.compile(r"`((?:[\w.]+/)+[\w.]+\.(?:py|yaml|json|csv|md|jinja|png))(?::[^`]*)?`")
_MADE = re.compile(r"NAME|FILE|RUN/|STORE|VERB|^demo/|^runs/|^anatomy/")  # any name, or what a command leaves
_SCRIPT = re.compile(r"\bscripts/[\w/]+\.py\b")


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(REPOSITORY)) for page in pages]


def commands(text: str) -> list[list[str]]:
    """The words of every `brainfm VERB ...` in blocks and between backticks, comments left out."""
    blocks = re.findall(r"```(?:bash)?\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [line.split(" #")[0].strip() for line in lines] + re.findall(r"`(brainfm [^`\n]+)`", text)
    return [shlex.split(line) for line in found if line.startswith("brainfm ")]


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_to_what_is_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        place, _, anchor = target.partition("#")
        file = (page.parent / place).resolve() if place else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            heads = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
            slugs = {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}
            assert anchor in slugs, f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    for name in {*_FILE.findall(text), *_SCRIPT.findall(text)}:
        if _MADE.search(name):
            continue
        places = (REPOSITORY / name, REPOSITORY / "brainfm" / name)
        assert any(place.is_file() for place in places), f"{page.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_commands_name_verbs_and_keys_that_there_are(page: Path) -> None:
    for _, verb, *words in commands(page.read_text()):
        if verb == "VERB" or verb.startswith("-"):
            continue
        assert verb in verbs(), f"{page.name}: brainfm {verb}"
        known = {key.split(".")[0] for key in keys_of(compose.settings_of(verb))} | {compose.RECIPES}
        for word in words:
            key = word.partition("=")[0].split(".")[0]
            assert "=" not in word or key in known, f"{page.name}: brainfm {verb} {word}"


def test_the_face_fits_on_a_page() -> None:
    assert len((REPOSITORY / "README.md").read_text().split()) <= MOST_WORDS


def test_the_tree_names_every_package_and_no_other() -> None:
    tree = (REPOSITORY / "README.md").read_text().split("## The tree")[1].split("```")[1]
    packages = {path.parent.name for path in (REPOSITORY / "brainfm").glob("*/__init__.py")}
    assert set(re.findall(r"^  (\w+)/", tree, re.M)) == packages
    beside = re.findall(r"^(\w+)/", tree, re.M)
    assert "brainfm" in beside and all((REPOSITORY / name).is_dir() for name in beside)


def test_the_picture_is_small_and_shown() -> None:
    picture = REPOSITORY / "docs" / "picture.png"
    data = picture.read_bytes()
    assert len(data) <= 200_000 and data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width >= 600 and height >= 200
    assert (REPOSITORY / "README.md").read_text().count("](docs/picture.png)") == 1


def test_benchmarks_that_are_named_exist() -> None:
    named = re.findall(r"`(\w+\.py)[ `]", (REPOSITORY / "docs" / "measurements.md").read_text())
    assert len(named) > 10
    assert not [name for name in named if not (REPOSITORY / "scripts" / "benchmark" / name).is_file()]


def test_the_layers_are_those_that_are_held() -> None:
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) ?\| [^|]+\|$", text, re.M)
    told = {package: set(re.findall(r"`([\w.]+)`", allowed)) for package, allowed in rows}
    expected = "\n".join(
        f"| `{package}` | {', '.join(f'`{name}`' for name in sorted(allowed, key=lambda n: (n != 'root', n)))} |"
        for package, allowed in MAY_IMPORT.items()
    )
    assert told == MAY_IMPORT, f"docs/architecture.md, Layers; expected\n{expected}"
    (beside,) = re.findall(r"^\| `root` \|  \| the files beside the folders: (.*) \|$", text, re.M)
    assert set(beside.split(", ")) == ROOT, "docs/architecture.md, Layers, the row of root"


def test_every_decision_has_one_place() -> None:
    listed = dict(re.findall(r"^\| (\d+) \| .* \| \[\w+\]\(docs/decisions/(\w+)\.md#\1\) \|$", _index(), re.M))
    written = [
        (number, file.stem)
        for file in (REPOSITORY / "docs" / "decisions").glob("*.md")
        for number in re.findall(r"^## (\d+)$", file.read_text(), re.M)
    ]
    assert len(written) == len(dict(written)) and dict(written) == listed
    assert sorted(map(int, listed)) == list(range(1, len(listed) + 1)) and len(listed) >= 92


def _index() -> str:
    return (REPOSITORY / "DECISIONS.md").read_text()


def test_every_decision_that_is_cited_exists() -> None:
    last = max(map(int, re.findall(r"^\| (\d+) \|", _index(), re.M)))
    files = [*PAGES, REPOSITORY / "CHANGELOG.md", *(REPOSITORY / "configs").rglob("*.yaml")]
    cited = [
        (file.name, int(number))
        for file in files
        for listed in re.findall(r"(?:DECISIONS|[Dd]ecisions?) (\d+(?:(?:, | and )\d+)*)", file.read_text())
        for number in re.findall(r"\d+", listed)
    ]
    assert len(cited) >= 5 and all(1 <= number <= last for _, number in cited), cited


def test_the_version_is_one() -> None:
    import tomllib

    from brainfm import __version__

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    citation = (REPOSITORY / "CITATION.cff").read_text()
    assert project["version"] == __version__ and f"\nversion: {__version__}\n" in citation
    code = project["license"].partition(" AND ")[0]  # the weights that ship have another
    assert f"\nlicense: {code}\n" in citation
