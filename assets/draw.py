"""
The pictures of README and pages that analyze.py doesn't draw: python assets/draw.py NAME

    data, circuit, pairs, characters   as SVG
    curves, grokking, authors   from curves.csv, claims.csv, authors.csv
    fade, lessons               from runs with --snapshots: out/late-16, out/late-32, out/late-64;
                                out/regression-small
"""
import csv
import glob
import os
import re
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#888888"
YELLOW, PINK = "#E69F00", "#CC79A7"

# --------------------------------------------------------------------------------------- drawings
class Drawing:
    """An SVG picture on white, so that it can be read on a dark page, too."""
    def __init__(self, width, height):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" font-family="Helvetica, Arial, sans-serif">',
            '<defs><marker id="tip" markerWidth="8" markerHeight="8" refX="7" refY="4" '
            'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="#444"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>']

    def text(self, x, y, words, size=14, colour="#222", anchor="middle", bold=False):
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" '
                          f'text-anchor="{anchor}"{weight}>{words}</text>')

    def box(self, x, y, width, words, fill="#f2f2f2", height=34):
        """A box around words, x and y being its middle."""
        self.parts.append(f'<rect x="{x - width / 2}" y="{y - height / 2}" width="{width}" '
                          f'height="{height}" rx="6" fill="{fill}" stroke="#666"/>')
        self.text(x, y + 5, words)

    def cell(self, x, y, size, fill, stroke="#ffffff", words=""):
        """A square with its lower left corner at x, y."""
        self.parts.append(f'<rect x="{x}" y="{y - size}" width="{size}" height="{size}" '
                          f'fill="{fill}" stroke="{stroke}" stroke-width="1.5"/>')
        self.text(x + size / 2, y - size / 2 + 6, words, 16)

    def arrow(self, x1, y1, x2, y2):
        self.parts.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#444" '
                          'stroke-width="1.6" marker-end="url(#tip)"/>')

    def dot(self, x, y, radius, fill, stroke="none"):
        self.parts.append(f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{fill}" '
                          f'stroke="{stroke}"/>')

    def save(self, name):
        with open(os.path.join(HERE, name), "w", encoding="utf-8") as f:
            f.write("\n".join([*self.parts, "</svg>"]) + "\n")

def data():
    """A split at p = 7, and the sequence of the README's example."""
    import grok_icl as g
    split = g.make_split(g.Config(p=7, tasks=28, seed=0))
    d = Drawing(790, 330)
    for left, title, axes, sets in (
            (60, "tasks (a, b)", "ab", {"id": (BLUE, "i.d.: trained on"),
                                        "val_ood": (YELLOW, "o.o.d., to validate"),
                                        "test_ood": (ORANGE, "o.o.d., to test")}),
            (430, "inputs (x, y)", "xy", {"train_inputs": (GREEN, "train inputs"),
                                          "test_inputs": (PINK, "test inputs")})):
        d.text(left + 77, 32, title, bold=True)
        for n in range(7):
            d.text(left + 11 + 22 * n, 214, n, 11, GREY)
            d.text(left - 10, 191 - 22 * n, n, 11, GREY)
        d.text(left + 77, 230, axes[0])
        d.text(left - 28, 126, axes[1])
        for row, (name, (colour, label)) in enumerate(sets.items()):
            for across, up in split[name].tolist():
                d.cell(left + 22 * across, 198 - 22 * up, 22, colour)
            d.cell(left + 180, 70 + 26 * row, 14, colour)
            d.text(left + 200, 68 + 26 * row, label, anchor="start")
    corners = [(71 + 22 * a, 187 - 22 * b) for a, b in split["id"][:4].tolist()]
    for corner in corners:                                   # the first rectangle that was drawn
        d.dot(*corner, 4, "#ffffff")
    d.text(240, 170, "dots: one rectangle", anchor="start")
    tokens = g.to_tokens(g.torch.tensor([[2, 3]]), g.torch.tensor([[[1, 4], [1, 2], [3, 6]]]), 7)
    for n, token in enumerate(tokens[0].tolist()):
        x = 60 + 36 * n + 22 * (n // 3)
        d.cell(x, 298, 36, "#dddddd" if n % 3 == 2 else "#ffffff", "#444444",
               "?" if n == 8 else token)
        d.text(x + 18, 256, "xyz"[n % 3], 13, GREY)
    d.text(470, 286, "two examples, then the query", anchor="start", colour="#444")
    d.text(60, 322, "One sequence, z = 2x + 3y mod 7. The model predicts each z from what is "
           "before it; it never sees (2, 3).", anchor="start")
    d.save("data.svg")

def circuit():
    """The program of a model with two blocks, with the shares of analyze.py p29.pt circuit."""
    d = Drawing(760, 330)
    for x, words in ((190, "an example on the query's line"), (530, "the query")):
        d.text(x, 24, words, bold=True)
    for x, words in ((110, "x"), (190, "y"), (270, "z"), (490, "x"), (570, "y")):
        d.box(x, 55, 44, words, "#ffffff")
    d.text(14, 130, "block 0", 13, GREY, "start")
    d.text(14, 225, "block 1", 13, GREY, "start")
    for x in (110, 190):
        d.arrow(x, 72, 150 if x == 110 else 158, 108)
    for x in (190, 270):
        d.arrow(x, 72, 262 if x == 190 else 268, 108)
    for x in (490, 570):
        d.arrow(x, 72, 522 if x == 490 else 534, 108)
    d.box(155, 126, 70, "x / y", "#dcebf5")
    d.box(265, 126, 70, "z / y", "#dff1ea")
    d.box(530, 126, 70, "x / y", "#dcebf5")
    d.box(345, 215, 190, "equal? then fetch z / y", "#f9e6dc")
    d.arrow(170, 143, 275, 196)
    d.arrow(270, 143, 325, 196)
    d.arrow(515, 143, 425, 196)
    for x, y, share in ((197, 180, "96%"), (315, 172, "97%"), (492, 180, "98%")):
        d.text(x, y, share, colour=ORANGE, bold=True)
    d.box(570, 285, 150, "(z / y) · y", "#f2f2f2")
    d.arrow(420, 233, 510, 267)
    d.arrow(590, 72, 590, 267)
    d.text(615, 215, "100%", colour=ORANGE, bold=True)
    d.arrow(646, 285, 690, 285)
    d.text(712, 290, "z", 16, bold=True)
    d.text(14, 312, "orange: answers that follow when this number is put in from another run", 13,
           ORANGE, "start")
    d.save("circuit.svg")

def pairs():
    """How a pair of examples is combined: mod 7, the task of regression.md."""
    d = Drawing(820, 345)
    for x, words, numbers in ((140, "an example", "1, 5, 3"), (400, "an example", "1, 1, 5"),
                              (670, "the query", "1, 3, ?")):
        d.text(x, 24, words, bold=True)
        d.box(x, 52, 120, "x, y, z = " + numbers, "#ffffff")
        d.arrow(x - 20, 69, x - 45, 107)
    for x, place, height in ((140, 3, 2), (400, 1, 5)):
        d.arrow(x + 20, 69, x + 45, 107)
        d.box(x - 52, 125, 96, f"x / y = {place}", "#dcebf5")
        d.box(x + 52, 125, 96, f"z / y = {height}", "#dff1ea")
    d.box(620, 125, 96, "x / y = 5", "#dcebf5")
    for x, offset, height in ((230, 2, 2), (480, 1, 5)):
        d.box(x, 225, 210, f"offset {offset}? fetch z / y = {height}", "#f9e6dc")
        d.arrow(x - 140, 143, x - 60, 206)
        d.arrow(x - 35, 143, x, 206)
    d.arrow(590, 143, 300, 206)
    d.arrow(610, 143, 540, 206)
    for x, y, words, anchor in ((118, 230, "one head", "end"), (592, 230, "another head", "start"),
                                (222, 315, "the MLP", "end")):
        d.text(x, y, words, 13, GREY, anchor)
    d.box(360, 310, 260, "offsets 2 and 1: 2 · 2 − 1 · 5 = 6")
    d.arrow(250, 243, 320, 291)
    d.arrow(470, 243, 400, 291)
    d.box(640, 310, 150, "6 · y = 4")
    d.arrow(491, 310, 563, 310)
    d.arrow(705, 69, 705, 291)
    d.arrow(716, 310, 750, 310)
    d.text(785, 315, "z = 4", 16, bold=True)
    d.save("pairs.svg")

def characters():
    """How one character compares examples: mod 7, the task of regression.md."""
    p, examples, query = 7, [(3, 2), (1, 5)], 5
    squares = {n * n % p for n in range(1, p)}
    d = Drawing(720, 350)
    d.text(200, 24, "two examples, divided by y", bold=True)

    def place(across, up):
        return 70 + 45 * across, 300 - 40 * up
    for across in range(p):
        d.text(place(across, 0)[0], 325, across, 12, GREY)
        d.text(50, place(0, across)[1] + 4, across, 12, GREY)
        for up in range(p):
            d.dot(*place(across, up), 2.5, "#cccccc")
    d.text(205, 344, "x / y", 13)
    d.text(20, 185, "z / y", 13)
    for point in examples:
        d.dot(*place(*point), 8, BLUE)
    d.text(410, 24, "slope from each example: a square?", anchor="start", bold=True)
    for height in range(p):
        slopes = [(height - up) * pow(query - across, -1, p) % p for across, up in examples]
        kinds = ["0" if s == 0 else "a square" if s in squares else "not" for s in slopes]
        fits = kinds[0] == kinds[1]
        x, y = place(query, height)
        d.dot(x, y, 8, "#ffffff", GREEN if fits else GREY)
        words = f"both {kinds[0]}" if fits else f"{kinds[0]}, {kinds[1]}"
        d.text(410, y + 5, f"slopes {slopes[0]} and {slopes[1]}: {words}", 14,
               GREEN if fits else GREY, "start", bold=fits)
    d.save("characters.svg")

# ----------------------------------------------------------------------------------------- curves
def read(name):
    """The rows of a CSV file in assets/, numbers where there are numbers."""
    def number(text):
        try:
            return float(text)
        except ValueError:
            return text
    with open(os.path.join(HERE, name)) as f:
        return [{k: number(v) for k, v in row.items()} for row in csv.DictReader(f)]

def panels(n, width=9, height=3.1):
    from matplotlib import pyplot as plt
    plt.rcParams.update({"font.size": 8})
    figure, axes = plt.subplots(1, n, figsize=(width, height), sharey=True, layout="constrained")
    return figure, axes

def curves():
    figure, axes = panels(2)
    for ax, command in zip(axes, ("quick", "default")):
        for seed in range(3):
            mine = [r for r in read("curves.csv") if (r["command"], r["seed"]) == (command, seed)]
            steps = [r["step"] for r in mine]
            for side, style in (("train", "-"), ("test", "--")):
                ax.plot(steps, [100 * r[f"val_ood_{side}"] for r in mine], f"C{seed}{style}",
                        lw=1.2, label=f"seed {seed}, {side} inputs")
            ax.axvline(next(r["step"] for r in mine if r["lines"] == mine[-1]["lines"]), ls=":",
                       color=f"C{seed}", lw=0.8)
        ax.set(title=command, xlabel="training step", ylim=(0, 100))
    axes[0].set_ylabel("accuracy, new tasks (%)")
    axes[0].legend()
    figure.savefig(os.path.join(HERE, "curves.png"), dpi=100)

def grokking():
    figure, ax = panels(1, 6, 3)
    rows = read("claims.csv")
    names = {"id_train_novel": ("own tasks, inputs trained on", "C0"),
             "id_test_novel": ("own tasks, inputs never seen", "C1"),
             "val_ood_train_novel": ("new tasks", "C7")}
    for seed in range(3):
        mine = [r for r in rows if r["run"] == f"late/8-{seed}"]
        for name, (label, colour) in names.items():
            ax.plot([r["step"] for r in mine], [100 * r[name] for r in mine], f"{colour}.-", lw=1.2,
                    label=None if seed else label)
    ax.axhline(100 / 13, color="black", lw=0.8, ls=":", label="chance")
    ax.set(xlabel="training step", ylabel="accuracy, novel queries (%)", ylim=(0, 104))
    ax.legend(loc="center right")
    figure.savefig(os.path.join(HERE, "grokking.png"), dpi=100)

def authors():
    figure, axes = panels(2)
    rows = read("authors.csv")
    for ax, (p, tasks) in zip(axes, ((13, 8), (7, 12))):
        for code, colour in (("ours", "C0"), ("theirs", "C1")):
            for seed in range(6):                            # as many as there are
                mine = [r for r in rows if (r["code"], r["p"], r["seed"]) == (code, p, seed)]
                for name, style, what in (("id_train", "-", "trained on"),
                                          ("id_test", ":", "never seen")):
                    ax.plot([r["step"] for r in mine], [100 * r[name] for r in mine],
                            colour + style, lw=1, label=None if seed else f"{code}, inputs {what}")
        ax.axhline(100 / p, color="black", lw=0.8, ls="--", label="chance")
        ax.set(title=f"p = {p}, {tasks} tasks", xlabel="training step", ylim=(0, 104))
    axes[0].set_ylabel("accuracy, own tasks (%)")
    axes[0].legend(loc="upper left", fontsize=7)
    figure.savefig(os.path.join(HERE, "authors.png"), dpi=100)

# ------------------------------------------------------------------------------------------- fade
def votes_of_memory(tokens, tasks, p):
    """How many of the tasks (n, 2) that fit the most examples before a query give each z there:
    tokens (B, 3k) -> (B, k, p)."""
    import torch
    inputs, z = tokens.unflatten(1, (-1, 3)).split([2, 1], dim=-1)                   # (B, k, 2 | 1)
    given = (inputs.float() @ tasks.T.float()).long() % p                            # (B, k, n)
    fits = (given == z).long()
    before = fits.cumsum(1) - fits                               # how many examples a task fits
    best = (before == before.amax(-1, keepdim=True)).float()
    return torch.zeros(*given.shape[:2], p).scatter_add(2, given, best)

def fade():
    import analyze as a
    import grok_icl as g
    figure, axes = panels(3)
    for ax, n in zip(axes, (16, 32, 64)):
        for step, colour in ((1000, "C2"), (2000, "C1"), (5000, "C3")):
            lab = a.open_lab(f"out/late-{n}/step{step}.pt")
            sets = g.eval_sequences(lab.split, "test_ood", 1024, lab.k, lab.p, a.SEED)
            tokens = sets["test_ood_train"]
            right = a.answers(lab, tokens) == tokens[:, 2::3]
            ratio = a.skill_of(tokens, lab.p) == 1
            shots = range(1, lab.k)
            ax.plot(shots, [100 * right[:, s][ratio[:, s]].float().mean() for s in shots],
                    f".-{colour}", label=f"the model at step {step:,}")
        votes = votes_of_memory(tokens, lab.split["id"], lab.p)
        winners = (votes == votes.amax(-1, keepdim=True)).float()    # one of them, at random
        memory = winners.gather(2, tokens[:, 2::3, None])[..., 0] / winners.sum(-1)
        ax.plot(shots, [100 * memory[:, s][ratio[:, s]].mean() for s in shots], "k--",
                label="a memory of its tasks")
        ax.axhline(100 / lab.p, color="k", lw=0.8, ls=":", label="chance")
        ax.set(title=f"{n} tasks", xlabel="examples before the query", ylim=(0, 104))
    axes[0].set_ylabel("right, of ratio queries (%)")
    axes[2].legend(fontsize=7)
    figure.savefig(os.path.join(HERE, "fade.png"), dpi=100)

# ---------------------------------------------------------------------------------------- lessons
def accuracy_by_skill(lab):
    """A model's accuracy on free sequences of new tasks, second half, novel queries that take Ratio
    Matching and those that take Modular Regression: on train inputs, then on test inputs, (4,)."""
    import analyze as a
    import grok_icl as g
    sets = g.eval_sequences(lab.split, "test_ood", 512, lab.k, lab.p, a.SEED)
    late, found = g.torch.arange(lab.k) >= lab.k // 2, []
    for tokens in (sets["test_ood_train"], sets["test_ood_test"]):
        right = a.answers(lab, tokens) == tokens[:, 2::3]          # (B, k)
        skill = a.skill_of(tokens, lab.p)
        found += [right[(skill == i) & late].float().mean().item() for i in (1, 2)]
    return found

def lessons(run="out/regression-small"):
    """Which skill comes in which lesson."""
    import analyze as a
    import grok_icl as g
    labs = [(int(re.sub(r"\D", "", os.path.basename(f))), a.open_lab(f))
            for f in glob.glob(os.path.join(run, "step*.pt"))]
    if not labs:
        raise g.BadInput(f"{run}: no snapshots; train with --preset regression-small --snapshots")
    labs.sort(key=lambda step_and_lab: step_and_lab[0])
    steps, curves = [step for step, _ in labs], zip(*(accuracy_by_skill(lab) for _, lab in labs))
    cfg, ended = labs[-1][1].cfg, g.load_checkpoint(os.path.join(run, "last.pt"))[0]["learned"]
    figure, ax = panels(1, 7.5, 3.6)
    for curve, style, label in zip(curves, ("C1-", "C2-", "C1--", "C2--"), (
            "ratio, train inputs", "regression, train inputs", "ratio, test inputs",
            "regression, test inputs")):
        ax.plot(steps, [100 * value for value in curve], style, label=label)
    place, apart = -1e9, 0.04 * steps[-1]
    for lesson, begin in zip(g.lessons(cfg), [0, *ended]):
        place = max(begin, place + apart)                        # of a name, clear of the last one
        ax.axvline(begin, color="C7", lw=0.6)
        ax.annotate(lesson.name, (begin, 104), (place, 111), rotation=50, fontsize=7,
                    annotation_clip=False, arrowprops=dict(arrowstyle="-", lw=0.4))
    ax.axhline(100 / cfg.p, color="black", lw=0.8, ls=":", label="chance")
    ax.set(xlabel="training step", ylabel="accuracy, new tasks (%)", ylim=(0, 104))
    ax.legend(loc="lower right")
    figure.savefig(os.path.join(HERE, "lessons.png"), dpi=100)

if __name__ == "__main__":
    import grok_icl
    drawings = {f.__name__: f for f in (data, circuit, pairs, characters, curves, grokking,
                                        authors, fade, lessons)}
    for name in sys.argv[1:]:
        try:
            if name not in drawings:
                raise grok_icl.BadInput(f"{name}: not of {', '.join(drawings)}")
            drawings[name]()
        except grok_icl.BadInput as e:
            print(f"error: {e}", file=sys.stderr)
            sys.exit(2)
