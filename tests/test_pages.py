"""
Tests of the README and of the pages in assets/: links lead somewhere, pictures are used, commands
parse, and the README's block of Python does what the text says.
"""
import contextlib
import io
import itertools
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "assets")]
import analyze as a  # noqa: E402
import draw  # noqa: E402
import grok_icl as g  # noqa: E402
import solutions  # noqa: E402
from test_analyze import config, exact, planted_lab  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "assets").glob("*.md"))]
OLD_FLAGS = {"--no-curriculum", "--axes"}         # of commit cfee113, which some commands name
EXAMPLE = dict(SEED="0", P="13", N="84")           # for the capital letters of a page


def anchors(page):
    """What GitHub calls the headings of a page: lower case, hyphens for spaces, no other signs."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    titles = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page):
    """The targets of a page's links and pictures that are not web addresses."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    return [target for target in found if not target.startswith("http")]


def commands(page):
    """Each call of grok_icl.py and analyze.py that a page shows: (script, arguments)."""
    for script, words in re.findall(r"(grok_icl|analyze)\.py((?: [^\s`#;)]+)*)",
                                    page.read_text(encoding="utf-8")):
        words = words.rstrip("'.,:").replace("$a", "0.8")     # a loop's alpha, other variables
        argv = [EXAMPLE.get(word, word) for word in shlex.split(re.sub(r"\$\w+", "8", words))]
        if "..." not in argv and not OLD_FLAGS & {*argv}:
            yield script, argv


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_link_leads_to_a_file_and_a_heading(page):
    assert links(page)
    for target in links(page):
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


def test_each_picture_and_page_is_used():
    used = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES
            for link in links(page)}
    for file in (ROOT / "assets").iterdir():
        if file.suffix in (".png", ".gif", ".svg", ".md", ".csv", ".txt"):
            assert file.resolve() in used, file.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_command_shown_parses(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                   # so that no run is found, and none is written
    for script, argv in commands(page):
        if script == "analyze":
            flags = [i for i, word in enumerate(argv) if word in ("--out", "--device")]
            parts = [word for i, word in enumerate(argv[1:], 1)
                     if i not in flags and i - 1 not in flags]
            assert {*parts} <= {*a.SECTIONS}, argv
        else:
            g.parse_config(argv)


def test_some_commands_are_found():
    found = list(commands(ROOT / "README.md"))
    assert ("grok_icl", ["--depth", "2", "--tasks", "512"]) in found
    assert ("analyze", ["out/quick", "skills", "pca"]) in found


def blocks(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)


def printed(block):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(block, {})
    return out.getvalue()


def test_the_readmes_python_prints_what_the_text_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    [block] = blocks(PAGES[0])

    def said(block):
        return [int(n) for n in re.findall(r"\d+", printed(block))]
    answer, right = said(block)
    assert answer == right == (24 * 2 + 20 * 8) % 29
    answer, right = said(block.replace("(2, 8) ", "(2, 9) "))
    assert answer != right == (24 * 2 + 20 * 9) % 29
    split = g.load_checkpoint("assets/p29.pt")[0]["split"]
    assert [24, 20] in split["test_ood"].tolist()                # "never trained on"


def test_even_and_odd_as_the_page_says(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "assets" / "inside.md").read_text(encoding="utf-8")
    [block] = blocks(ROOT / "assets" / "inside.md")
    for model in ("p29.pt", "quick.pt"):
        [row] = re.findall(rf"\| two blocks, `assets/{model}`.*? \| (.*) \|\n", page)
        said = re.findall(r": (\d+)% \(null (\d+)\)", printed(block.replace("p29.pt", model)))
        assert " | ".join(f"{n}%" for pair in said for n in pair) == row


def test_the_table_of_characters_is_what_was_printed():
    page, printed = ((ROOT / "assets" / name).read_text(encoding="utf-8")
                     for name in ("inside.md", "p29.txt"))
    for part, block in itertools.product(("heads", "neurons"), "01"):
        rows = [re.search(rf"^{part} {block}, by {order} +(\S+) +(\S+) +(\S+)", printed, re.M)
                for order in ("logarithm", "residue", "random order")]
        cells = zip(*([f"{float(n):.0f}" for n in row.groups()] for row in rows))
        row = " | ".join(f"{n}% ({residue}; {other})" for n, residue, other in cells)
        assert re.search(rf"^\| {part} of block {block}.*? \| {re.escape(row)} \|$", page, re.M)


@pytest.mark.parametrize("name", solutions.SOLUTIONS)
def test_checks_of_exercises_tell_right_from_wrong(name, monkeypatch):
    """What a check prints says so with the right solution, and not with a plausible wrong one."""
    monkeypatch.chdir(ROOT)
    [block] = [b for b in blocks(ROOT / "assets" / "exercises.md") if f"import {name}\n" in b]
    outputs = []
    for solution in solutions.SOLUTIONS[name]:
        monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(**{name: solution}))
        outputs.append(printed(block))
    good = {"idle": r"yours: .* 9\d%.*\nanother: .* [0-5]%", "patched": r"(.* ok\n){8}",
            "moves": r"(.* right\n){2}"}.get(name, "right\n")
    assert re.match(good, outputs[0]), outputs[0]
    assert not re.match(good, outputs[1]), outputs[1]


@pytest.mark.parametrize("name", ["data", "circuit", "pairs", "characters"])
def test_drawings_are_what_the_script_draws(name, tmp_path, monkeypatch):
    monkeypatch.setattr(draw, "HERE", str(tmp_path))
    getattr(draw, name)()
    kept = (ROOT / "assets" / f"{name}.svg").read_text(encoding="utf-8")
    assert (tmp_path / f"{name}.svg").read_text(encoding="utf-8") == kept
    if name == "circuit":                         # its shares are those that analyze.py printed
        shares = {f"{float(n):.0f}%" for n in re.findall(
            r"^(?:ratio|z over|divisor).*? (\d+\.\d) ", (ROOT / "assets" / "p29.txt").read_text(),
            flags=re.M)}
        assert {*re.findall(r"\d+%", kept)} == shares and len(shares) == 4


def test_a_memory_votes_for_the_tasks_that_fit_best():
    """By search: each task that is right on the most examples has a vote for its z."""
    p, random = 5, torch.Generator().manual_seed(0)
    tasks = g.grid(p)[torch.randperm(p * p, generator=random)[:6]]
    tokens = g.to_tokens(g.grid(p)[torch.randint(p * p, (20,), generator=random)],
                         g.grid(p)[torch.randint(p * p, (20, 4), generator=random)], p)
    votes = draw.votes_of_memory(tokens, tasks, p)                                   # (20, 4, p)
    for row, found in zip(tokens.unflatten(1, (-1, 3)).tolist(), votes.tolist()):
        for k, (x, y, _) in enumerate(row):
            fits = [sum((c * u + d * v - w) % p == 0 for u, v, w in row[:k])
                    for c, d in tasks.tolist()]
            expected = [0] * p
            for (c, d), n in zip(tasks.tolist(), fits):
                expected[(c * x + d * y) % p] += n == max(fits)
            assert found[k] == expected


@pytest.mark.parametrize("algorithm", ["ratio", "regression"])
def test_skills_of_a_snapshot_are_told_apart(algorithm):
    """Planted: an exact Ratio Matcher that else says 0, or a model that combines."""
    lab = planted_lab(exact(algorithm), examples=4)
    for matches, combines in zip(*[iter(draw.accuracy_by_skill(lab))] * 2):
        if algorithm == "ratio":
            assert matches == 1 and combines < 0.4
        else:                                     # with all examples on one line it says 0
            assert combines == 1 and matches > 0.9


def test_pictures_of_lessons_are_drawn_from_snapshots(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    cfg = config(out=str(tmp_path / "run"), snapshots=True, lessons="lines", batch=4)
    run = g.make_run(cfg)
    run.learned = [2, 3, 4]
    (tmp_path / "run").mkdir()
    for run.step in (2, 10):
        g.save(run, cfg, f"step{run.step}.pt")
    g.save(run, cfg, "last.pt")
    monkeypatch.setattr(draw, "HERE", str(tmp_path))
    draw.lessons(tmp_path / "run")
    assert (tmp_path / "lessons.png").read_bytes()[1:4] == b"PNG"
