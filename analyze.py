"""
Look inside a model that grok_icl.py trained: which algorithm did it learn, and where?

    python analyze.py assets/p29.pt              everything, for one checkpoint
    python analyze.py out/RUN skills pca         some parts, for a run's best checkpoint
    python analyze.py phases out/SWEEP           many runs: how far each comes, and its phase

One section for each figure of the paper, and some tests of our own. In each, one function measures
and returns a dict, one prints it, one draws it. Tasks are the *test* o.o.d. ones; what is chosen
before comes from others. A *null* is the same measure with the residues in random order.
"""
import argparse
import contextlib
import glob
import io
import itertools
import json
import math
import os
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import grok_icl as g

SHOTS = (1, 2, 3, 4, 6, 8, 12, 16, 24)           # that a table shows, and the last one
SEED = 7                      # of the contexts and of the random orders
CONTEXTS = 4                  # over which pca, fourier and similarity are averaged
SEQUENCES = 128               # for attention, patching, progress; several times as many for votes
EACH_PAIR = 30                # sequences for each pair of offsets, in votes
FETCHED = 0.1                 # attention to an example that counts as fetching it
NULLS = 200                   # random orders of the residues: a p-value can be as low as 1 / 201
KEPT = (1, 2, 4, 8, 16)       # characters of each function
PARTS = "shots skills attention pca fourier similarity patching votes progress".split()
GROUPS = ("multiplicative", "additive")
SKILLS = ("copy", "ratio", "regression", "undetermined")
WHO = ("model", "ratio", "regression", "exact memory", "best fit")
POSITIONS = {"x": slice(0, None, 3), "y": slice(1, None, 3), "z": slice(2, None, 3)}
SETS = ("i.d. train", "i.d. test", "o.o.d. train", "o.o.d. test")    # tasks and inputs
COLOURS = {"IM": "C7", "IG": "C1", "OM": "C0", "OG": "C2", "?": "C9", "": "white"}      # of phases
PAPER = dict(zip([(2 ** n, alpha / 10) for alpha in range(8, 1, -1) for n in range(3, 10)], (
    "IM IM IG IG IG OG OG " * 2 + "IM IM IM IG IG OG OG " + "IM IM IM IM IG OG OG " * 2 +
    "IM IM IM IM IM OM OG " + "IM IM IM IM IM OM OM").split()))                  # its figure 1b

# -------------------------------------------------------------------------------------------------
# Probes: contexts, every query after one, what a module reads, and changes of it
# -------------------------------------------------------------------------------------------------

def contexts(lab, kind, n, examples):
    """n contexts: tasks (n, 2) of that kind, in turn, and inputs (n, examples, 2) of all p*p."""
    tasks, generator = lab.split[kind], torch.Generator().manual_seed(SEED)
    draw = torch.randint(lab.p ** 2, (n, examples), generator=generator)
    return tasks[torch.arange(n) % len(tasks)], g.grid(lab.p)[draw]

def sites(model):
    """{site: the module that reads it}; sites are heads' outputs (B, T, H*D) and MLP neurons."""
    return {f"{name} {i}": module for i, block in enumerate(model.blocks)
            for name, module in (("heads", block.attention.out), ("neurons", block.mlp.down))}

def run_with(changes, run):
    """run(), each module's input x replaced by f(x) of {module: f}, or kept if f returns None."""
    with contextlib.ExitStack() as hooks:                        # gone after it, errors or not
        for module, f in changes.items():
            hooks.enter_context(module.register_forward_pre_hook(lambda _, x, f=f: f(x[0])))
        return run()

def record(modules, run):
    """The input of each of {name: module} while run() calls the model once: {name: tensor}."""
    found = {}
    run_with({module: lambda x, name=name: found.update({name: x.cpu()})
              for name, module in modules.items()}, run)
    return found

@torch.no_grad()
def answers(lab, tokens, everywhere=True):
    """The z predicted at each query of tokens (B, 3k): (B, k). everywhere: hooks see all tokens."""
    logits = lab.model(tokens.to(lab.device), everywhere)
    return (logits[:, 1::3] if everywhere else logits).argmax(-1).cpu()

def query_grid(task, inputs, p):
    """One context, task (2,) and inputs (n, 2), and after it each query: tokens (p*p, 3n + 3)."""
    inputs = torch.cat((inputs.expand(p * p, -1, -1), g.grid(p)[:, None]), dim=1)
    return g.to_tokens(task.expand(p * p, 2), inputs, p)

def observed(lab):
    """After CONTEXTS contexts, kept: each site at the query's y, (n, N, p, p), and "outputs"."""
    # "outputs" (n, p, p, 3, L*H, C): what each head adds to the residual stream at x, y and z, with
    # its output matrix, and standardized as the authors do it.
    if not hasattr(lab, "observed"):
        lab.observed, outputs, runs, by_head = {}, [], [], (lab.cfg.heads, -1)
        for context in zip(*contexts(lab, "test_ood", CONTEXTS, lab.k - 1)):
            seen = record(sites(lab.model), lambda: answers(lab, query_grid(*context, lab.p)))
            runs.append({site: values[:, -3:].clone() for site, values in seen.items()})
        for site, module in sites(lab.model).items():
            seen = torch.stack([run[site] for run in runs]).unflatten(1, (lab.p, lab.p))
            lab.observed[site] = seen[:, :, :, 1].movedim(-1, 1).contiguous()
            if "heads" in site:
                weight = module.weight.detach().cpu().unflatten(1, by_head)
                heads = seen.unflatten(-1, by_head)                            # (n, p, p, 3, H, D)
                outputs.append(torch.einsum("...hd,chd->...hc", heads, weight))
        lab.observed["outputs"] = F.layer_norm(torch.cat(outputs, -2), (lab.cfg.embd,))
    return lab.observed

def powers(p):
    """The nonzero residues by their logarithm: base**0, base**1, ... The paper's base at p = 29."""
    rows = ([pow(base, k, p) for k in range(p - 1)] for base in ([27] if p == 29 else range(2, p)))
    return torch.tensor(next(row for row in rows if len(set(row)) == p - 1))

def orders(group, p, n):
    """The residues in a group's order, for x and for y, then n times at random: (n + 1, 2, m)."""
    true = powers(p) if group == "multiplicative" else torch.arange(p)     # by log, without 0
    draw = torch.rand(n, 2, len(true), generator=torch.Generator().manual_seed(SEED))
    return torch.cat((true.expand(1, 2, -1), true[draw.argsort(-1)]))

def against_null(measure, group, p, names, columns):
    """{name: {column: value, "null": 95% of random orders, "p"}} of measure(order_x, order_y)."""
    # It returns (names, columns). In a last row the highest value meets the null of the highest.
    scores = torch.stack([measure(*order) for order in orders(group, p, NULLS)]).double()
    scores = torch.cat((scores, scores.amax(1, keepdim=True)), dim=1)
    tail = (scores >= scores[0] - 1e-9).sum(0) / len(scores)         # the true order is the first
    rows = torch.stack((scores[0], scores[1:].quantile(0.95, dim=0), tail), -1).flatten(1).tolist()
    columns = [column + what for column in columns for what in ("", " null", " p")]
    return {name: dict(zip(columns, row)) for name, row in zip([*names, "best of all"], rows)}

def table(title, rows, note=""):
    """Print {name: {column: number or text}}, numbers in percent, None and nan as a dash."""
    def text(v):
        return v if isinstance(v, str) else f"{100 * v:.1f}" if v is not None and v == v else "-"
    cells = [["", *map(str, next(iter(rows.values())))]]
    cells += [[str(name), *map(text, row.values())] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print("\n" + title + "\n" + "-" * len(title) + (note and "\n" + note))
    for row in cells:
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]))

# -------------------------------------------------------------------------------------------------
# Accuracy over shots, and what memory alone could do (figure 1c)
# -------------------------------------------------------------------------------------------------

def memory_scores(tokens, tasks, p):
    """Expected scores (2, B, k) of answering with the pre-training tasks (n, 2) alone, two ways."""
    # Exact: what most of the tasks say that fit all examples so far, a guess if none does. Best
    # fit: those that fit the most examples, which a soft memory could find, even if none fits all.
    if len(tokens) > 16:                                     # in pieces: votes are large
        return torch.cat([memory_scores(t, tasks, p) for t in tokens.split(16)], dim=1)
    xy, z = tokens.unflatten(1, (-1, 3)).split([2, 1], dim=-1)                       # (B, k, 2 | 1)
    said = (xy.float() @ tasks.T.float()).long() % p                                 # (B, k, n)
    fits = F.pad((said == z).int().cumsum(1)[:, :-1], (0, 0, 1, 0))                  # (B, k, n)
    scores = []
    for wanted in (torch.arange(z.size(1))[:, None], fits.amax(-1, keepdim=True)):
        votes = torch.zeros(*z.shape[:2], p).scatter_add_(2, said, (fits == wanted).float())
        top = votes == votes.amax(-1, keepdim=True)                                  # (B, k, p)
        scores.append(top.gather(2, z).squeeze(2) / top.sum(-1))
    return torch.stack(scores)

def measure_shots(lab):
    """Accuracy on the four sets, over all and novel queries: {"set, who": (2, k)}."""
    sets, found = g.eval_sequences(lab.split, "test_ood", 8 * SEQUENCES, lab.k, lab.p, SEED), {}
    for name, tokens in sets.items():
        curves = [g.evaluate(lab.model, tokens.to(lab.device)), *g.oracle_accuracy(tokens, lab.p),
                  *(g.accuracy(s, tokens) for s in memory_scores(tokens, lab.split["id"], lab.p))]
        found |= {f"{name}, {who}": curve for who, curve in zip(WHO, curves)}
    return found

def show_shots(lab, found):
    sets = ("id_train", "id_test", "test_ood_train", "test_ood_test")
    table(f"Accuracy on novel queries after {lab.k - 1} shots, in %", {name: {
        who: found[f"{name}, {who}"][1, -1].item() for who in WHO} for name in sets},
        f"best fit: the pre-training tasks that fit most examples; chance {100 / lab.p:.1f}")

# -------------------------------------------------------------------------------------------------
# Skills: which queries are answered? (figure 5)
# -------------------------------------------------------------------------------------------------

def skill_of(tokens, p):
    """The least skill that answers each query, (B, k), as an index into SKILLS."""
    ratio, regression = g.solvable(tokens, p)
    skill = torch.where(ratio, 1, torch.where(regression, 2, 3))
    return torch.where(g.novel_queries(tokens), skill, 0)

def measure_skills(lab):
    """All p*p queries after contexts of o.o.d. tasks, by the least skill that answers them."""
    # "accuracy" (shots, 4, 4): of any query, x = 0, y = 0 alone, neither; by skill. "right" and
    # "skill" (shots, p, p): after one context.
    p, shots = lab.p, [s for s in SHOTS if s < lab.k - 1] + [lab.k - 1]
    tasks, inputs = contexts(lab, "test_ood", 3 * CONTEXTS, lab.k - 1)
    x, y = g.grid(p).T
    kinds = torch.stack((x >= 0, x == 0, (y == 0) & (x > 0), x * y > 0)).double()    # (4, p*p)
    found = {"accuracy": [], "right": [], "skill": []}
    for s in shots:
        tokens = torch.stack([query_grid(*c, p) for c in zip(tasks, inputs[:, :s])])
        said = torch.cat([answers(lab, t, everywhere=False)[:, -1]
                          for t in tokens.flatten(0, 1).split(g.CHUNK)]).view(tokens.shape[:2])
        skill = torch.stack([skill_of(t, p)[:, -1] for t in tokens])                 # (n, p*p)
        asked = torch.einsum("kq,nqs->nqks", kinds, F.one_hot(skill, 4).double())
        right = said == tokens[..., -1]
        found["accuracy"].append((asked * right[..., None, None]).sum((0, 1)) / asked.sum((0, 1)))
        found["right"].append(right[0].view(p, p))
        found["skill"].append(skill[0].view(p, p))
    return {name: torch.stack(values) for name, values in found.items()} | {"shots": shots}

def show_skills(lab, found):
    rows = dict(zip(found["shots"], found["accuracy"][:, 0].tolist())) | {
        f"{lab.k - 1}, {name}": row for name, row in
        zip(("x = 0", "y = 0", "neither"), found["accuracy"][-1, 1:].tolist())}
    table("Accuracy after some shots, in %, by the least skill that answers a query",
          {name: dict(zip(SKILLS, row)) for name, row in rows.items()},
          f"{3 * CONTEXTS} contexts, then all {lab.p ** 2} queries; chance {100 / lab.p:.1f}")

def draw_history(ax, history):
    names, styles = ("id_train", "id_test", "val_ood_train", "val_ood_test"), "--C7 C7 --C0 C0"
    for name, label, style in zip(names, SETS, styles.split()):
        ax.plot([row["step"] for row in history], [100 * row[name] for row in history], style,
                label=f"{label} inputs")
    ax.set(title="accuracy (%), o.o.d. on validation tasks", xlabel="training step", ylim=(0, 104))
    ax.legend()

def draw_skills(plt, lab, found):
    fig, (ax, training) = plt.subplots(1, 2, figsize=(9, 3.4))
    draw_history(training, lab.history)
    for s, colour in ((0, "C7"), (1, "C1"), (2, "C2")):
        ax.plot(found["shots"], 100 * found["accuracy"][:, 0, s], f".-{colour}", label=SKILLS[s])
    ax.axhline(100 / lab.p, color="black", lw=0.8, ls=":", label="chance")
    ax.set(xlabel="shots", ylabel="accuracy (%)", ylim=(0, 104))
    ax.legend(title="least skill that answers the query")
    chosen = [i for i, s in enumerate(found["shots"]) if s in (1, 2, 12, lab.k - 1)]
    grid, axes = plt.subplots(3, len(chosen), figsize=(2.2 * len(chosen) + 1, 6.6), squeeze=False)
    for column, i in zip(axes.T, chosen):
        right, can = found["right"][i].int(), (found["skill"][i] < 2).int()
        for ax, image, name in zip(column, (right, can, right - can), (
                "answered right", "Ratio Matching can", "difference")):
            ax.imshow(image.T, origin="lower", vmin=-1, vmax=1, cmap="RdBu_r")
            ax.set(xlabel="x", ylabel="y", title=f"shots: {found['shots'][i]}; {name}")
    grid.suptitle("One context, all queries (red: yes; blue: no, though Ratio Matching can)")
    return {"skills.png": fig, "skill_grid.png": grid}

# -------------------------------------------------------------------------------------------------
# Attention (figure 6)
# -------------------------------------------------------------------------------------------------

def lines(tokens, p):
    """The line through the origin that each input lies on, (B, k); -1 for (0, 0), on all."""
    xy = tokens.unflatten(1, (-1, 3))[..., :2]                                       # (B, k, 2)
    return g.line_of(xy.flatten(0, 1), p).view(xy.shape[:2]).masked_fill((xy == 0).all(-1), -1)

def attention_to_line(weights, tokens, p):
    """How much heads look from a query's y at examples on its line, of an even spread: (H,)."""
    # weights (B, H, k, 3k); of novel queries with some, not all, examples on their line.
    line = lines(tokens, p)
    same = ((line[:, :, None] == line[:, None]) & (line[:, :, None] >= 0)).tril(-1)  # (B, k, k)
    shots = torch.arange(line.size(1))
    counts = g.novel_queries(tokens) & (same.sum(-1) > 0) & (same.sum(-1) < shots)   # (B, k)
    weights = weights.unflatten(-1, (-1, 3)).sum(-1).tril(-1)                        # (B, H, k, k)
    even = weights.sum(-1) * (same.sum(-1) / shots.clamp(min=1))[:, None]            # (B, H, k)
    on_line = (weights * same[:, None]).sum(-1)
    return (on_line * counts[:, None]).sum((0, 2)) / (even * counts[:, None]).sum((0, 2))

def measure_attention(lab):
    """Of each head: "line", attention_to_line; "maps" (L, H, 15, 15) of the first 15 tokens."""
    tokens = g.to_tokens(*contexts(lab, "test_ood", SEQUENCES, lab.k), lab.p)
    scores = record({i: block.attention.softmax for i, block in enumerate(lab.model.blocks)},
                    lambda: answers(lab, tokens))                                    # (B, H, T, T)
    weights = [s.softmax(-1) for s in scores.values()]
    line = torch.cat([attention_to_line(w[:, :, 1::3], tokens, lab.p) for w in weights])
    return {"line": dict(zip(lab.heads, line.tolist())),
            "maps": torch.stack([w[:, :, :15, :15].mean(0) for w in weights])}

def show_attention(lab, found):
    table("Attention from a query's y to its line, in % of an even spread", {"head": found["line"]})

def draw_attention(plt, lab, found):
    L, H, T = found["maps"].shape[:3]
    fig, axes = plt.subplots(L, H, figsize=(2.3 * H, 2.5 * L), squeeze=False)
    for ax, weights, head in zip(axes.flat, found["maps"].flatten(0, 1), lab.heads):
        image = ax.imshow(weights, vmin=0, vmax=1)
        ax.set(title=f"head {head}; line {found['line'][head]:.1f} times even", xticks=range(T),
               yticks=range(T), xticklabels=list("xyz" * 5)[:T], yticklabels=list("xyz" * 5)[:T])
    fig.colorbar(image, ax=axes, label="attention to column, mean over sequences", shrink=0.7)
    return {"attention.png": fig}

# -------------------------------------------------------------------------------------------------
# PCA of the heads' outputs: circles (figures 1d, 1e, 6)
# -------------------------------------------------------------------------------------------------

def plane_of(points):
    """Points (..., n, d) -> their first two principal components as complex numbers (..., n)."""
    points = points.double() - points.double().mean(-2, keepdim=True)
    _, directions = torch.linalg.eigh(points.mT @ points)                  # ascending
    return torch.view_as_complex((points @ directions[..., -2:]).flip(-1))

def head_planes(lab, n=CONTEXTS):
    """The plane of each head's output at two positions, as in figure 6: {name: (n, p, p)}."""
    outputs, found = observed(lab)["outputs"][:n], {}                          # (n, p, p, 3, LH, C)
    for h, head in enumerate(lab.heads):
        for pair, at in (("x and y", [0, 1]), ("x and z", [0, 2]), ("y and z", [1, 2])):
            points = outputs[..., at, h, :].flatten(3).flatten(1, 2)                 # (n, p*p, 2C)
            found[f"{head} at {pair}"] = plane_of(points).unflatten(1, (lab.p, lab.p))
    return found

def character_power(f, order_x, order_y):
    """Power of functions (..., p, p) in each character (k, l) of a group, the mean's 0."""
    # A character is exp(2 pi i (k u + l v) / m), u and v the places of x and y: (..., m, m).
    power = torch.fft.fft2(f[..., order_x[:, None], order_y], norm="forward").abs().square()
    power[..., 0, 0] = 0
    return power

def conjugate(power):
    """The power in the conjugate (-k, -l) of each character (k, l)."""
    return power.flip(-2, -1).roll((1, 1), (-2, -1))

def circles(planes, order_x, order_y):
    """Share of the variance of planes (..., p, p) that is one circle, and that is two: (..., 2)."""
    # A circle is one character; with as much of its conjugate it would be a line. A circle of
    # circles is two: a large one in x, say, and on it a small one in y.
    power = character_power(planes, order_x, order_y)
    best = (power - conjugate(power)).flatten(-2).topk(2).values.cumsum(-1)
    return best / power.sum((-2, -1)).clamp(min=1e-30)[..., None]

def measure_pca(lab):
    """{group: {head: {"circle", "two circles", nulls}}}; "planes" (2, p, p) of "clearest" heads."""
    # The first has the largest circle, the second the largest circle on a circle.
    heads = head_planes(lab)
    planes = torch.stack(list(heads.values()))                                       # (N, n, p, p)
    found = {group: against_null(lambda x, y: circles(planes, x, y).mean(1), group, lab.p, heads,
                                 ("circle", "two circles")) for group in GROUPS}
    rows = found["multiplicative"]
    clearest = [max(heads, key=lambda name: rows[name]["circle"]),
                max(heads, key=lambda name: rows[name]["two circles"] - rows[name]["circle"])]
    return found | {"clearest": clearest, "planes": torch.stack([heads[h][0] for h in clearest])}

def show_pca(lab, found):
    table("PCA of heads' outputs: share of the plane, in %, that is a circle by logarithm",
          found["multiplicative"] | {"best by residue": found["additive"]["best of all"]},
          f"mean of {CONTEXTS} contexts; null: 95% of {NULLS} random orders")

def scatter(ax, plane, residue, p, like):
    """Points (n,), coloured by log residue * the frequency of the circle `like`; 0 is black."""
    at, zero = torch.view_as_real(plane), residue == 0
    ax.scatter(*at[zero].T, c="black", s=8)
    logs, wave = powers(p).argsort()[residue[~zero] - 1], torch.zeros(p - 1, dtype=plane.dtype)
    k = torch.fft.fft(wave.index_add(0, logs, like[~zero]))[1:].abs().argmax() + 1
    return ax.scatter(*at[~zero].T, c=logs * k % (p - 1), cmap="hsv", s=8, vmin=0, vmax=p - 1)

def draw_pca(plt, lab, found):
    (x, y), (one, two), (plane, double) = g.grid(lab.p).T, found["clearest"], found["planes"]
    few = torch.isin(x, powers(lab.p)[:3])                       # more would hide each other
    fig, axes = plt.subplots(1, 2, figsize=(9, 4.2))
    for ax, title, points, residue in (
            (axes[0], f"head {one}; colour: x", plane.flatten(), x),
            (axes[1], f"head {two}, three x alone; colour: y", double.flatten()[few], y[few])):
        dots = scatter(ax, points, residue, lab.p, points)
        ax.set(title=title, aspect="equal", xlabel="first component", ylabel="second component")
    fig.colorbar(dots, ax=axes, label=f"log, base {powers(lab.p)[1]}, times frequency (black: 0)")
    return {"pca.png": fig}

# -------------------------------------------------------------------------------------------------
# Fourier: are the sites at the query's y characters of x and y, of which group, and how many?
# -------------------------------------------------------------------------------------------------

def one_frequency(f, order_x, order_y):
    """Of f (contexts, n, p, p): share of functions with one frequency; of power in ratios: (2,)."""
    # One frequency: a quarter of the variance is in one character, so half with its conjugate's.
    # The characters (k, -k) depend on x/y, or x - y, alone.
    power, k = character_power(f, order_x, order_y), torch.arange(1, len(order_x))
    shares = (power / power.sum((-2, -1), keepdim=True).clamp(min=1e-30)).mean(0)    # (n, m, m)
    one = (shares.amax((-2, -1)) >= 0.25).float().mean()
    return torch.stack((one, shares[:, k, -k].sum(1).mean()))

def keep_characters(f, order, mask):
    """Functions f (n, p, p) with only those characters that mask (n, m, m) has, and the mean."""
    f, at, mask = f.clone(), (..., order[:, None], order), mask.clone()
    mask[..., 0, 0] = True
    f[at] = torch.fft.ifft2(torch.fft.fft2(f[at]) * mask).real.to(f)
    return f

def accuracy_with(lab, site, group, n):
    """Accuracy on ratio queries without zeros if a site keeps n characters of each function."""
    context = [c[-1] for c in contexts(lab, "test_ood", CONTEXTS + 1, lab.k - 1)]
    tokens, order = query_grid(*context, lab.p), orders(group, lab.p, 0)[0, 0]
    power = character_power(observed(lab)[site][:2], order, order).mean(0)           # (N, m, m)
    power, n = power + conjugate(power), min(2 * n, len(order) ** 2)                 # in pairs
    mask = power >= power.flatten(1).topk(n).values[:, -1, None, None]

    def change(values):
        values, f = values.clone(), values[:, -2].T.unflatten(1, (lab.p, lab.p))     # (N, p, p)
        values[:, -2] = keep_characters(f.cpu(), order, mask).flatten(1).T
        return values
    said = run_with({sites(lab.model)[site]: change}, lambda: answers(lab, tokens))
    counts = (skill_of(tokens, lab.p)[:, -1] == 1) & (g.grid(lab.p) > 0).all(1)
    return (said[:, -1] == tokens[:, -1])[counts].float().mean().item()

def measure_fourier(lab):
    """{group: {site: one_frequency and its null}}, "kept": {"site, group": {n: accuracy_with}}."""
    fs = {site: observed(lab)[site][:2] for site in sites(lab.model)}                # (2, n, p, p)
    fs = {site: f[:, (f.flatten(2).var(2) > 1e-9).all(0)] for site, f in fs.items()}
    found = {group: against_null(
        lambda x, y: torch.stack([one_frequency(f, x, y) for f in fs.values()]), group, lab.p,
        [f"{site}, {f.size(1)} vary" for site, f in fs.items()], ("one frequency", "ratio"))
        for group in GROUPS}
    return found | {"kept": {f"{site}, {group}": {
        n: accuracy_with(lab, site, group, n) for n in KEPT} for site in fs for group in GROUPS}}

def show_fourier(lab, found):
    for group in GROUPS:
        table(f"At the query's y, {group} group: functions of one frequency, power in ratios, in %",
              found[group], f"null: 95% of {NULLS} random orders of the residues")
    table("Accuracy on ratio queries, in %, with only so many characters of each function kept",
          found["kept"], "at the query's y; the strongest in other contexts")

# -------------------------------------------------------------------------------------------------
# Similarity of inputs with the same ratio (figure 7)
# -------------------------------------------------------------------------------------------------

def ratio_gap(similarity, order_x, order_y):
    """Mean similarity (N, p*p, p*p) of inputs of equal ratio y/x less that of unequal: (N,)."""
    # Ratios by the orders of the nonzero residues. Pairs that share x or y, or have a 0, are 0.
    m, place = len(order_x), torch.arange(len(order_x))
    ratio = torch.zeros(similarity.size(-1), m)                                      # (p*p, m)
    inputs = order_x[:, None] * (m + 1) + order_y
    ratio[inputs.flatten()] = F.one_hot((place - place[:, None]) % m, m).flatten(0, 1).float()
    equal = (similarity @ ratio * ratio).sum((1, 2))
    unequal = similarity.sum((1, 2)) - equal
    return equal / (m * m * (m - 1)) - unequal / (m * m * (m - 1) * (m - 2))

def measure_similarity(lab):
    """"gaps": {head and position: ratio_gap and its null}; "image": the clearest's similarity."""
    x, y = g.grid(lab.p).T
    apart = (x[:, None] != x) & (y[:, None] != y) & (x * y > 0) & (x * y > 0)[:, None]
    v = F.normalize(observed(lab)["outputs"][:, :, :, 1:], dim=-1).flatten(1, 2) # (n, pp, 2, LH, C)
    similarity = torch.einsum("nithc,njthc->thij", v, v).flatten(0, 1) / len(v)
    names = [f"head {head} at {at}" for at in "yz" for head in lab.heads]
    gaps = against_null(lambda x, y: ratio_gap(similarity * apart, x, y)[:, None],
                        "multiplicative", lab.p, names, ("gap",))
    clearest = max(names, key=lambda name: gaps[name]["gap"])
    return {"gaps": gaps, "clearest": clearest, "image": similarity[names.index(clearest)]}

def show_similarity(lab, found):
    table("Cosine similarity times 100: inputs of equal ratio y/x less unequal", found["gaps"],
          f"null: 95% of {NULLS} random orders of the residues")

def draw_similarity(plt, lab, found):
    x, ratio = powers(lab.p).repeat(lab.p - 1), powers(lab.p).repeat_interleave(lab.p - 1)
    inputs = x * lab.p + x * ratio % lab.p
    fig, ax = plt.subplots(figsize=(5.6, 5))
    image = ax.imshow(found["image"][inputs][:, inputs], vmin=-1, vmax=1, cmap="RdBu_r")
    fig.colorbar(image, label="cosine similarity", shrink=0.8)
    ax.set(title=f"{found['clearest']}: inputs (x, y) sorted by log(y/x), then by log x")
    return {"similarity.png": fig}

# -------------------------------------------------------------------------------------------------
# Patching: put another value into one part. Is it needed (its mean)? Does it carry the task?
# -------------------------------------------------------------------------------------------------

def parts_of(lab):
    """{"head 0.1" or "MLP 0": (its site, its slice of it)}."""
    width = lab.cfg.embd // lab.cfg.heads
    parts = {f"head {i}.{h}": (f"heads {i}", slice(h * width, (h + 1) * width))
             for i in range(lab.cfg.depth) for h in range(lab.cfg.heads)}
    return parts | {f"MLP {i}": (f"neurons {i}", slice(None)) for i in range(lab.cfg.depth)}

def answers_with(lab, tokens, values, changes):
    """answers() where each of changes, (part, positions), reads {site: (T, n) or (B, T, n)}."""
    parts = parts_of(lab)

    def put(x, site):
        x = x.clone()
        for part, at in changes:
            if parts[part][0] == site:
                x[:, at, parts[part][1]] = values[site][..., at, parts[part][1]].to(x)
        return x
    return run_with({module: lambda x, site=site: put(x, site)
                     for site, module in sites(lab.model).items()}, lambda: answers(lab, tokens))

def measure_patching(lab):
    """{"parts": {part: {"held x": accuracy on ratio queries, ..., "patched x": ..., ...}}}."""
    # Held at its mean; or patched from a run with the same inputs on another task: how often the
    # answer is the other task's. "kept": the heads without which, on validation tasks, a tenth is
    # lost; "only": accuracy with all other heads held; "nothing": with none held.
    known = g.to_tokens(*contexts(lab, "val_ood", SEQUENCES, lab.k), lab.p)
    tasks, inputs = contexts(lab, "test_ood", SEQUENCES, lab.k)
    ours, theirs = (g.to_tokens(t, inputs, lab.p) for t in (tasks, tasks.roll(1, 0)))
    seen, other = (record(sites(lab.model), lambda: answers(lab, t)) for t in (known, theirs))
    means = {site: values.mean(0) for site, values in seen.items()}

    def share(changes, tokens=ours, values=means, wanted=None):
        z = (tokens if wanted is None else wanted)[:, 2::3]
        counts = (skill_of(tokens, lab.p) == 1) & ((wanted is None) | (z != tokens[:, 2::3]))
        return (answers_with(lab, tokens, values, changes) == z)[counts].float().mean().item()
    heads = {part: (part, slice(None)) for part in parts_of(lab) if part.startswith("head")}
    enough = share([], known) - 0.1
    kept = [head for head, change in heads.items() if share([change], known) < enough]
    return {"nothing": share([]), "kept": kept,
            "only": share([change for head, change in heads.items() if head not in kept]),
            "parts": {part: {f"{how} {at}": share([(part, where)], ours, *values)
                             for how, values in (("held", (means,)), ("patched", (other, theirs)))
                             for at, where in POSITIONS.items()} for part in parts_of(lab)}}

def show_patching(lab, found):
    table("Ratio queries, in %: right with a part held; as the other task with it patched",
          found["parts"], f"nothing held: {100 * found['nothing']:.1f}; all heads held but "
          f"{', '.join(found['kept'])}: {100 * found['only']:.1f}; chance {100 / lab.p:.1f}")

# -------------------------------------------------------------------------------------------------
# Votes: how a deeper model answers a query whose line no example is on (not in the paper)
# -------------------------------------------------------------------------------------------------
# Any two examples on different lines determine the answer. Does the model combine two, and which?
# The *offset* of an example: how many steps of the discrete logarithm its ratio y/x is below the
# query's. Ratio Matching fetches offset 0. Which others do heads fetch, and is a pair of examples
# solved just if two different heads fetch them? No input is on an axis: 0 has no logarithm.

def at_offsets(lab, offsets):
    """Sequences of o.o.d. tasks, a query last: offsets (n, shots) -> tokens (n, 3 shots + 3)."""
    m, generator, tasks = lab.p - 1, torch.Generator().manual_seed(SEED), lab.split["test_ood"]
    offsets = F.pad(offsets, (0, 1))                                     # the query's own is 0
    log_ratio = torch.randint(m, (len(offsets), 1), generator=generator) - offsets
    log_x = torch.randint(m, offsets.shape, generator=generator)
    inputs = powers(lab.p)[torch.stack((log_x, log_x + log_ratio), dim=-1) % m]
    chosen = torch.randint(len(tasks), (len(offsets),), generator=generator)
    return g.to_tokens(tasks[chosen], inputs, lab.p)

@torch.no_grad()
def vote(lab, tokens, size):
    """The z (B,) with the most votes of every `size` examples: when these alone stand before the
    query, they vote with their log-probabilities. All examples together are the model itself."""
    *examples, query = tokens.to(lab.device).split(3, dim=1)
    return sum(lab.model(torch.cat((*few, query), dim=1)[:, :-1])[:, -1].log_softmax(-1)
               for few in itertools.combinations(examples, size)).argmax(-1).cpu()

def accuracy_of_pairs(lab, pairs, run=answers):
    """Of run(lab, tokens) after two examples at these offsets, pairs (n, 2): (n,)."""
    tokens = at_offsets(lab, torch.cat((pairs, pairs.flip(1))).repeat(EACH_PAIR, 1))
    said = torch.cat([run(lab, t)[:, -1] for t in tokens.split(g.CHUNK)])
    return (said == tokens[:, -1]).float().view(-1, len(pairs)).mean(0)

def attention_by_offset(lab):
    """Of each head, from the query's y to the z of one of eight examples: (heads, p - 1)."""
    generator = torch.Generator().manual_seed(SEED)
    offsets = torch.randint(lab.p - 1, (8 * SEQUENCES, min(8, lab.k - 1)), generator=generator)
    scores = record({i: block.attention.softmax for i, block in enumerate(lab.model.blocks)},
                    lambda: answers(lab, at_offsets(lab, offsets)))                  # (B, H, T, T)
    weights = torch.cat([s.softmax(-1)[:, :, -2, 2:-1:3] for s in scores.values()], dim=1)
    is_at = F.one_hot(offsets, lab.p - 1).float()                          # (B, shots, p - 1)
    return torch.einsum("bhs,bso->ho", weights, is_at) / is_at.sum((0, 1))

def by_two_heads(fetches, pairs):
    """Whether two different heads fetch a pair (n, 2): (n,). fetches (heads, p - 1): 0 or 1."""
    # Count (head for one, head for the other): all choices, against those of the same head twice.
    first, second = fetches[:, pairs].movedim(-1, 0)                                 # (heads, n)
    return first.sum(0) * second.sum(0) > (first * second).sum(0)

def votes_by_shots(lab, solved):
    """{shots: ...}: how model and votes do; solved (p - 1, p - 1): which pairs are, alone."""
    rows, generator = {}, torch.Generator().manual_seed(SEED)
    for n in [n for n in (2, 3, 4, 6, 8, 12) if n < lab.k]:
        offsets = torch.randint(1, lab.p - 1, (2 * SEQUENCES, 2 * n), generator=generator)
        tokens = at_offsets(lab, offsets)               # n examples, n more of the task, a query
        ours, z = torch.cat((tokens[:, :3 * n], tokens[:, -3:]), dim=1), tokens[:, -1]
        model, singles, pairs = (vote(lab, ours, size) for size in (n, 1, 2))
        right, others = model == z, vote(lab, tokens[:, 3 * n:], 2)
        good = solved[offsets[:, :n, None], offsets[:, None, :n]].any(2).any(1)
        values = {"model": right, "votes of singles": singles == z, "votes of pairs": pairs == z,
                  "same errors": (pairs == model)[~right], "by others": (others == model)[~right],
                  "no solved pair": right[~good], "a solved pair": right[good]}
        rows[n] = {name: value.float().mean().item() for name, value in values.items()}
    return rows

def measure_votes(lab):
    """Tables "shots", "kinds", "heads"; "attention" (heads, p - 1), "pairs" (p - 1, p - 1)."""
    m, attention = lab.p - 1, attention_by_offset(lab)
    even = attention[:, 1:].mean(1, keepdim=True)                # what a head has for any offset
    fetches = ((attention > FETCHED) & (attention > 2 * even)).float()
    pairs = torch.combinations(torch.arange(1, m))                                   # (n, 2)
    right, two = accuracy_of_pairs(lab, pairs), by_two_heads(fetches, pairs)
    both = (fetches.sum(0) > 0)[pairs].all(1)                    # by one head or by two
    by_offset = torch.full((m, m), math.nan)
    by_offset[tuple(pairs.T)] = by_offset[tuple(pairs.flip(1).T)] = right
    tokens = at_offsets(lab, pairs.repeat(math.ceil(g.CHUNK / len(pairs)), 1))
    seen = record(sites(lab.model), lambda: answers(lab, tokens))
    means, heads = {site: values.mean(0) for site, values in seen.items()}, {}
    for h in fetches[:, 1:].sum(1).nonzero()[:, 0].tolist():
        held = accuracy_of_pairs(lab, pairs[two], lambda lab, tokens: answers_with(
            lab, tokens, means, [(f"head {lab.heads[h]}", slice(7, 8))]))          # the query's y
        rest = by_two_heads(torch.cat((fetches[:h], fetches[h + 1:])), pairs[two])
        offsets = " ".join(str(o) for o in fetches[h].nonzero()[:, 0].tolist())
        heads[lab.heads[h]] = {"offsets": offsets} | {
            f"{name}{how}": values[which].mean().item()
            for name, which in (("need it", ~rest), ("others", rest))
            for how, values in (("", right[two]), (", held", held))}
    kinds = {"two heads": two, "one head": both & ~two, "not both fetched": ~both}
    kinds = {name: {"pairs": str(int(kind.sum())), "solved": str(int((right[kind] > 0.5).sum())),
                    "accuracy": right[kind].mean().item()} for name, kind in kinds.items()}
    return {"shots": votes_by_shots(lab, by_offset > 0.5), "kinds": kinds, "heads": heads,
            "attention": attention, "pairs": by_offset}

def show_votes(lab, found):
    table("Queries whose line no example is on: accuracy of model and of votes, in %",
          found["shots"], "by shots; same errors: of the model's wrong answers, how many votes of "
          "pairs give too, and\nthose of other examples of the task; a solved pair: alone it is "
          f"right in over half; chance {100 / lab.p:.1f}")
    table("Accuracy after two examples, in %, by who fetches them", found["kinds"],
          "fetch: over a tenth of a head's attention, and twice its mean over all offsets but 0;\n"
          "solved: right in over half")
    if found["heads"]:
        table("Pairs that two heads fetch: those that need a head, and others, also with it held",
              found["heads"], "accuracy in %; held: at its mean, at the query's y")

def draw_votes(plt, lab, found):
    fig, (curves, grid, circle) = plt.subplots(1, 3, figsize=(10.5, 3))
    styles = {"model": "o-C0", "votes of pairs": "x--C1", "votes of singles": "+:C7"}
    for name, style in styles.items():
        values = [100 * row[name] for row in found["shots"].values()]
        curves.plot([*found["shots"]], values, style, label=name)
    curves.set(title="accuracy (%), no example on the line", xlabel="shots", ylim=(0, 104))
    curves.legend()
    image = grid.imshow(100 * found["pairs"], vmin=0, vmax=100, origin="lower")
    grid.set(title=f"two examples, p = {lab.p}", xlabel="offset of one", ylabel="of the other")
    fig.colorbar(image, ax=grid, label="accuracy (%)", shrink=0.8)
    angle = np.exp(2j * np.pi * np.arange(lab.p - 1) / (lab.p - 1))
    for ring, head in enumerate(found["heads"]):
        at, size = (0.9 - 0.1 * ring) * angle, 80 * found["attention"][lab.heads.index(head)]
        circle.scatter(at.real, at.imag, size, label=f"head {head}")
    for offset, at in enumerate(1.2 * angle):
        circle.annotate(offset, (at.real, at.imag), ha="center", va="center")
    circle.set(title="attention (area) by offset", aspect="equal", xticks=[], yticks=[],
               xlim=(-1.4, 1.4), ylim=(-1.4, 1.4))
    if found["heads"]:
        circle.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return {"votes.png": fig}

# -------------------------------------------------------------------------------------------------
# Progress over training, from the snapshots of grok_icl.py --snapshots
# -------------------------------------------------------------------------------------------------

def divide(a, b, p):
    """a / b mod p, elementwise; p where b is 0."""
    return g.line_of(torch.stack((b, a), -1), p)

def measure_progress(lab):
    """Over the S snapshots; the head is the one whose circle is clearest in the checkpoint."""
    # "skill" (S, 3): accuracy on validation tasks; "circle" (S,), "plane" (S, p, p) of that head;
    # "line" (S,): how much the head that looks most at the query's line does, of an even spread;
    # "subgroup" (S, n): how often, on one line, answer / z is in the subgroup of each of "sizes".
    order, heads = orders("multiplicative", lab.p, 0)[0], head_planes(lab, 1)
    head = max(heads, key=lambda name: circles(heads[name], *order)[0, 0])
    one = g.training_batch(lab.split, g.line_of(lab.split["train_inputs"], lab.p), lab.cfg, 1,
                           torch.Generator().manual_seed(SEED))
    tokens = g.to_tokens(*contexts(lab, "val_ood", SEQUENCES, lab.k), lab.p)
    skill, z, found = skill_of(tokens, lab.p), one[:, 2::3], []
    sizes = [d for d in range(1, lab.p - 1) if (lab.p - 1) % d == 0]
    for now in (open_lab(file, lab.device) for file in lab.snapshots):
        right = answers(now, tokens) == tokens[:, 2::3]
        plane = head_planes(now, 1)[head][0]
        if found:                                        # turn, or mirror, as it was before
            before = found[-1]["plane"]
            plane = max((c * (c.conj() * before).sum().sgn() for c in (plane, plane.conj())),
                        key=lambda c: (c.conj() * before).sum().real)
        ratio = divide(answers(now, one), z, lab.p)[:, 1:][z[:, 1:] > 0]
        inside = [torch.isin(ratio, powers(lab.p)[::(lab.p - 1) // d]) for d in sizes]
        found.append({"step": torch.tensor(now.step), "plane": plane,
                      "line": torch.tensor(max(measure_attention(now)["line"].values())),
                      "circle": circles(plane, *order)[0],
                      "skill": torch.stack([right[skill == s].float().mean() for s in range(3)]),
                      "subgroup": torch.stack(inside).float().mean(1)})
    return {name: torch.stack([row[name] for row in found]) for name in found[0]} | {
        "head": head, "sizes": sizes, "history": now.history}

def show_progress(lab, found):
    columns = [*SKILLS[:3], "circle", "line", *(f"order {d}" for d in found["sizes"])]
    rows = torch.column_stack([found[n] for n in ("skill", "circle", "line", "subgroup")]).tolist()
    table("Over training, in %: accuracy by skill on validation tasks, and more",
          {step: dict(zip(columns, row)) for step, row in zip(found["step"].tolist(), rows)},
          f"circle: head {found['head']}; line: attention to it, of an even spread, most of all "
          "heads; order: on one line, answer / z is in that subgroup")

def draw_progress(plt, lab, found):
    steps, last = found["step"].tolist(), found["plane"][-1].flatten()
    film, (left, right) = plt.subplots(1, 2, figsize=(9, 4))

    def frame(i):
        left.clear()
        right.clear()
        scatter(left, found["plane"][i].flatten(), g.grid(lab.p)[:, 0], lab.p, last)
        left.set(title=f"step {steps[i]}, head {found['head']}; colour: log x", aspect="equal",
                 xticks=[], yticks=[])
        draw_history(right, [row for row in found["history"] if row["step"] <= steps[i]])
        right.set_xlim(0, steps[-1])
    frames = [*range(0, len(steps), math.ceil(len(steps) / 48)), *[len(steps) - 1] * 8]
    return {"progress.gif": plt.matplotlib.animation.FuncAnimation(film, frame, frames)}

# -------------------------------------------------------------------------------------------------
# Many runs: what share of the possible each reaches, and its phase (figure 1b)
# -------------------------------------------------------------------------------------------------

def held_out(runs):
    """{(p, seed): the set of test o.o.d. tasks that all runs of it share}; BadInput if none."""
    common = {}
    for checkpoint, cfg, _ in runs.values():
        tasks = set(map(tuple, checkpoint["split"]["test_ood"].tolist()))
        common[cfg.p, cfg.seed] = common.get((cfg.p, cfg.seed), tasks) & tasks
    for (p, seed), tasks in common.items():
        if not tasks:
            raise g.BadInput(f"phases: the runs with --p {p} --seed {seed} have no held-out task "
                             "in common to be compared on; give fewer of them")
    return common

def measure_phases(runs):
    """{run: its config, (accuracy - chance) / (Ratio Matching's - chance) on four sets, phase}."""
    # Novel queries of o.o.d. tasks that no run of the same p and seed learned from or stopped by.
    found, common = {}, held_out(runs)
    for name, (checkpoint, cfg, model) in runs.items():
        split = checkpoint["split"] | {"test_ood": torch.tensor(sorted(common[cfg.p, cfg.seed]))}
        sets = g.eval_sequences(split, "test_ood", 8 * SEQUENCES, cfg.examples, cfg.p, SEED)
        sets = {kind: tokens.to(model.norm.weight.device) for kind, tokens in sets.items()}
        right, ratio = torch.tensor([
            (g.evaluate(model, tokens)[1, -1], g.oracle_accuracy(tokens, cfg.p)[0][1, -1])
            for tokens in sets.values()]).T
        memory = memory_scores(sets["test_ood_train"].cpu(), split["id"], cfg.p)[1]
        memory = g.accuracy(memory, sets["test_ood_train"].cpu())[1, -1:]
        share = (torch.cat((right, memory)) - 1 / cfg.p) / (ratio[[0, 1, 2, 3, 2]] - 1 / cfg.p)
        found[name] = {k: str(getattr(cfg, k)) for k in "p tasks alpha depth embd seed".split()}
        found[name] |= dict(zip((*SETS, "best fit"), share.tolist()))
        words = g.phase(right, ratio, cfg.p).split()
        found[name]["phase"] = "".join(w[0].upper() for w in words) if len(words) == 2 else "?"
    return found

def show_phases(runs, found):
    table("Share of what Ratio Matching can, in % (0 is chance), on novel queries", found,
          "best fit: a memory of the pre-training tasks, on o.o.d. tasks and train inputs; phase: "
          "I, O: i.d., o.o.d.; M, G: memorization, generalization; ?: none of these")

def draw_phases(plt, runs, found):
    tasks = np.array([int(row["tasks"]) for row in found.values()])
    kinds = np.array(["p = {p}, depth {depth}".format(**row) for row in found.values()])
    grids = {kinds[0]: {(n, float(row["alpha"])): row["phase"]
                        for n, row in zip(tasks.tolist(), found.values())},
             "the paper: p = 29, depth 6": PAPER}
    if len({row["alpha"] for row in found.values()}) > 1:
        fig, axes = plt.subplots(1, 2, figsize=(8, 2.8))
        for ax, (title, cells) in zip(axes, grids.items()):
            columns, rows = (sorted(set(values)) for values in zip(*cells))
            for at in [(n, alpha) for alpha in rows for n in columns]:   # as text: evenly spaced
                ax.scatter(*map(str, at), 500, COLOURS[cells.get(at, "")], marker="s")
                ax.annotate(cells.get(at, ""), tuple(map(str, at)), ha="center", va="center")
            ax.set(title=title, xlabel="pre-training tasks", ylabel="alpha", xmargin=.1, ymargin=.1)
        return {"phase_grid.png": fig}
    fig, panels = plt.subplots(1, len(set(kinds)), sharey=True, squeeze=False, figsize=(10, 3))
    for ax, kind in zip(panels[0], sorted(set(kinds))):
        n, i = np.unique(tasks[kinds == kind], return_inverse=True)
        for name, style in zip((*SETS, "best fit"), "oC7-- vC7- oC0-- vC0- +k-".split()):
            share = np.array([100 * row[name] for row in found.values()])[kinds == kind]
            ax.semilogx(n[i], share, style.strip("-"), base=2, ms=3)
            ax.semilogx(n, np.bincount(i, share) / np.bincount(i), style, base=2, label=name)
        ax.set(title=kind, xlabel="pre-training tasks", xticks=n, xticklabels=n)
    panels[0, 0].set_ylabel("share of Ratio Matching's (%)")
    panels[0, -1].legend()
    return {"phases.png": fig}

# -------------------------------------------------------------------------------------------------
# Command line
# -------------------------------------------------------------------------------------------------

def open_lab(path, device):
    """What every part needs: a model, its config and split, and where it is from."""
    file = os.path.join(path, "best.pt") if os.path.isdir(path) else path
    device = g.pick_device(device)
    checkpoint, cfg, model = g.load_checkpoint(file, device)
    snapshots = sorted(glob.glob(os.path.join(glob.escape(os.path.dirname(file)), "step[0-9]*.pt")),
                       key=lambda name: (len(name), name))
    possible = {"progress": snapshots, "votes": cfg.p > 3 and cfg.examples > 2}
    return SimpleNamespace(
        model=model, cfg=cfg, p=cfg.p, k=cfg.examples, device=device, snapshots=snapshots,
        heads=[f"{i}.{h}" for i in range(cfg.depth) for h in range(cfg.heads)],
        parts=[part for part in PARTS if possible.get(part, True)],
        **{name: checkpoint[name] for name in ("split", "step", "history")})

def open_runs(folders, device):
    """{folder: (checkpoint, config, model)} of the runs under the folders, comparable by phases."""
    runs, device = {}, g.pick_device(device)
    for folder in folders or ["out"]:
        files = sorted(glob.glob(os.path.join(glob.escape(folder), "**/best.pt"), recursive=True))
        if not files:
            raise g.BadInput(f"{folder}: no run (a folder with best.pt) there")
        runs |= {os.path.dirname(file): g.load_checkpoint(file, device) for file in files}
    held_out(runs)
    return runs

def save(out, found):
    """{part: {name: value}} to out/analysis.json, the tensors among them to out/analysis.npz."""
    arrays = {f"{part}/{name}": value.numpy() for part, values in found.items()
              for name, value in values.items() if isinstance(value, torch.Tensor)}
    np.savez_compressed(buffer := io.BytesIO(), **arrays)
    g.write_file(os.path.join(out, "analysis.npz"), buffer.getbuffer())
    text = json.dumps(found, indent=1, default=lambda tensor: "in analysis.npz")
    g.write_file(os.path.join(out, "analysis.json"), text.encode())

def analyze(lab, parts, out):
    """Measure, print, draw and save each part."""
    try:
        from matplotlib import animation, pyplot as plt  # noqa: F401: draw_progress uses both
        plt.switch_backend("agg")
        plt.rcParams |= {"font.size": 8, "figure.constrained_layout.use": True,
                         "animation.writer": "pillow"}
    except ImportError:
        plt = None
        print("No pictures: pip install matplotlib")
    found, written, here = {}, ["analysis.json", "analysis.npz"], globals()
    for part in parts:
        found[part] = here[f"measure_{part}"](lab)
        here[f"show_{part}"](lab, found[part])
        save(out, found)                                 # after each: Ctrl-C loses only one
        draw = here.get(f"draw_{part}") if plt else None
        for name, figure in (draw(plt, lab, found[part]) if draw else {}).items():
            new = os.path.join(out, "new " + name)       # then rename: no picture is half a picture
            try:
                (figure.savefig if name.endswith("png") else figure.save)(new)
                os.replace(new, os.path.join(out, name))
            finally:
                with contextlib.suppress(OSError):
                    os.remove(new)
            written.append(name)
    print(f"\nWrote {', '.join(written)} to {out}")

def main(argv=None):
    """Measure, print, draw. Returns the exit code; bad input is one line on stderr and code 2."""
    def refuse(message):
        raise g.BadInput(message)
    parser = argparse.ArgumentParser(
        allow_abbrev=False, usage="analyze.py RUN|FILE [part ...] | phases [DIR ...]")
    parser.error = refuse
    parser.add_argument("path", metavar="RUN|FILE", help="a run's folder, a checkpoint, or: phases")
    parser.add_argument("parts", nargs="*", default=[], help=f"of {', '.join(PARTS)} [all]")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... [cpu]")
    parser.add_argument("--out", help="folder to write to [the run's; for FILE.pt FILE; else here]")
    try:
        args = parser.parse_intermixed_args(argv)
        phases = args.path == "phases"
        lab = open_runs(args.parts, args.device) if phases else open_lab(args.path, args.device)
        parts = ["phases"] if phases else args.parts or lab.parts
        for part in parts:
            if not phases and part not in lab.parts:
                raise g.BadInput(f"{part}: not of {', '.join(lab.parts)} (progress wants "
                                 "--snapshots; votes three examples and p above 3)")
        for file in lab.snapshots if "progress" in parts else []:
            other = g.load_checkpoint(file)[1]                   # a damaged one is named now
            if any(getattr(other, name) != getattr(lab.cfg, name) for name in g.FIXED):
                raise g.BadInput(f"{file}: a snapshot of another run; remove it")
        out = args.out or ("." if phases else args.path if os.path.isdir(args.path) else
                           os.path.splitext(args.path)[0])
        try:
            os.makedirs(out, exist_ok=True)
            tempfile.TemporaryFile(dir=out).close()              # can it be written?
        except OSError as e:
            raise g.BadInput(f"--out {out}: {e}")
        analyze(lab, parts, out)
        print(end="", flush=True)
    except Exception as e:
        return g.complain(e, "ask for one part at a time")

if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
