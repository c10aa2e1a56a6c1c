"""
Look inside a model that grok_icl.py trained: which algorithm did it learn, and where?

    python analyze.py assets/p29.pt              everything, for one checkpoint
    python analyze.py out/RUN                    the same for a run's best checkpoint
    python analyze.py out/RUN skills pca         some parts only
    python analyze.py phases out/SWEEP           many runs: which phase has which (tasks, alpha)

One section for each figure of He, Doshi, Das, Gromov (NeurIPS 2024), and some tests of our own. In
each, one function measures and returns a dict, one prints it, one draws it (with matplotlib). Tasks
are the *test* o.o.d. tasks; what is chosen before a test (a mean, the heads to keep) comes from the
validation o.o.d. tasks. A number that could be large by accident has its *null* beside it: the same
measure with the residues put in random order, best of as many where it is the best of many.

Probes and nulls; shots (figure 1c); skills (5); attention (6); pca (1d, 1e, 6); fourier; similarity
(7); ablation; labels; patching; frequencies; progress over training; phases (1b); command line.
"""
import argparse
import glob
import io
import json
import os
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

import grok_icl as g

SEED = 7                      # of the contexts and of the random orders
CONTEXTS = 4                  # over which pca, fourier and similarity are averaged
SEQUENCES = 256               # for attention, ablation, labels and patching
NULLS = 200                   # random orders of the residues: a p-value can be as low as 1 / 201
ONE_FREQUENCY = 0.5           # share of its variance from which a neuron counts as one-frequency
GROUPS = ("multiplicative", "additive")
PAIRS = {"xy": [0, 1], "xz": [0, 2], "yz": [1, 2]}           # positions joined, as in figure 6
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#999999"

# -------------------------------------------------------------------------------------------------
# Probes: contexts, all queries after one, reading and changing what a module sees
# -------------------------------------------------------------------------------------------------

def contexts(lab, kind, n, examples):
    """n contexts: tasks (n, 2) of that kind, in turn, and train inputs (n, examples, 2)."""
    tasks, inputs = lab.split[kind], lab.split["train_inputs"]
    draw = torch.randint(len(inputs), (n, examples), generator=torch.Generator().manual_seed(SEED))
    return tasks[torch.arange(n) % len(tasks)], inputs[draw]


def query_grid(task, inputs, p):
    """One context, task (2,) and inputs (n, 2), and after it each query: tokens (p*p, 3n + 3)."""
    inputs = torch.cat((inputs.expand(p * p, -1, -1), g.grid(p)[:, None]), dim=1)
    return g.to_tokens(task.expand(p * p, 2), inputs, p)


@contextmanager
def intercept(changes):
    """Within, each module of {module: function} reads function(x), or x where that is None."""
    handles = [module.register_forward_pre_hook(lambda _, args, f=f: f(args[0]))
               for module, f in changes.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def sites(model):
    """Name -> the module that reads it: heads (B, T, H*D) and neurons, and the residual stream."""
    norms = [block.norm1 for block in model.blocks[1:]] + [model.norm]
    named = {}
    for i, (block, norm) in enumerate(zip(model.blocks, norms)):
        named |= {f"heads {i}": block.attention.out, f"neurons {i}": block.mlp.down,
                  f"residual {i}": norm}
    return named


@torch.no_grad()
def answers(lab, tokens):
    """The z that the model predicts at each query, (B, k), all positions computed."""
    return torch.cat([lab.model(t[:, :-1], everywhere=True)[:, 1::3].argmax(-1)
                      for t in tokens.split(g.CHUNK)])


@torch.no_grad()
def activations(lab, task, inputs):
    """Each site at the query's x, y and z, every query after a context: {name: (p, p, 3, n)}."""
    found = {name: [] for name in sites(lab.model)}
    changes = {module: lambda x, name=name: found[name].append(x[:, -3:].cpu())
               for name, module in sites(lab.model).items()}
    with intercept(changes):
        for tokens in query_grid(task, inputs, lab.p).to(lab.device).split(g.CHUNK):
            lab.model(tokens, everywhere=True)
    return {name: torch.cat(parts).unflatten(0, (lab.p, lab.p)) for name, parts in found.items()}


def observed(lab):
    """The activations after each of CONTEXTS contexts of o.o.d. tasks, computed once: a list."""
    if not hasattr(lab, "observed"):
        lab.observed = [activations(lab, *c) for c in zip(*contexts(lab, "test_ood", CONTEXTS,
                                                                    lab.k - 1))]
    return lab.observed


def head_outputs(lab, i, heads):
    """What each head of block i adds to the residual stream: (..., H*D) -> (..., H, C)."""
    shape = (lab.cfg.heads, -1)
    weight = lab.model.blocks[i].attention.out.weight.detach().cpu().unflatten(1, shape) # (C, H, D)
    return torch.einsum("...hd,chd->...hc", heads.unflatten(-1, shape), weight)


def generator_of(p):
    """A residue whose powers are all nonzero ones: the paper's 27 for p = 29, else the least."""
    return next(b for b in ([27] if p == 29 else range(2, p + 1))
                if len({pow(b, k, p) for k in range(p - 1)}) == p - 1)


def orders(group, p, n=NULLS, seed=SEED):
    """
    The residues in the order of a group, and n times in random order, the null: (n + 1, m).

    Multiplicative: base**0, base**1, ..., so that a residue's place is its discrete logarithm; 0
    has none, m = p - 1. Additive: 0 ... p-1.
    """
    true = (torch.tensor([pow(generator_of(p), k, p) for k in range(p - 1)])
            if group == "multiplicative" else torch.arange(p))
    draw = torch.rand(n, len(true), generator=torch.Generator().manual_seed(seed))
    return torch.cat((true[None], true[draw.argsort(dim=1)]))


def against_null(scores):
    """scores (n + 1,), the measured one first -> its value, 95% of the null, and p-value."""
    value, null = float(scores[0]), scores[1:]
    return {"value": value, "null": float(torch.as_tensor(null).float().quantile(0.95)),
            "p": float((1 + (null >= value - 1e-9).sum()) / (1 + len(null)))}


def table(title, header, rows, note=""):
    """Print rows, whose first entry is a name; floats as percentages, None and nan as a dash."""
    def text(v):
        if isinstance(v, float):
            return "-" if np.isnan(v) else f"{100 * v:.1f}"
        return "-" if v is None else str(v)
    cells = [list(map(text, row)) for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(f"\n{title}\n" + "-" * len(title) + (f"\n{note}" if note else ""))
    for row in cells:
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]))

# -------------------------------------------------------------------------------------------------
# Accuracy over shots, and what memory alone could do (figure 1c)
# -------------------------------------------------------------------------------------------------

def memory_scores(tokens, tasks, p, best_fit=False):
    """
    Expected score (B, k) of answering with the pre-training tasks (n, 2) alone.

    Exact: what most of the tasks say that fit all examples so far, a guess if none does. best_fit:
    the tasks that fit the most examples, which a soft memory could find, even if none fits all.
    """
    xy, z = tokens.unflatten(1, (-1, 3)).split([2, 1], dim=-1)                       # (B, k, 2 | 1)
    said = (xy.float() @ tasks.T.float()).long() % p                                 # (B, k, n)
    fits = torch.cat((torch.zeros_like(said[:, :1]), (said == z).long().cumsum(1)[:, :-1]), dim=1)
    shots = torch.arange(z.size(1), device=z.device)[:, None]
    votes = fits == (fits.amax(-1, keepdim=True) if best_fit else shots)             # (B, k, n)
    count = torch.zeros(*z.shape[:2], p, dtype=torch.long, device=z.device)
    count.scatter_add_(2, said, votes.long())                                        # (B, k, p)
    top = count == count.amax(-1, keepdim=True)
    return top.gather(2, z).squeeze(2).double() / top.sum(-1)


def measure_shots(lab):
    """Accuracy on the four sets, over all and novel queries: {set: {who: (2, k)}}."""
    sets = g.eval_sequences(lab.split, "test_ood", 4 * SEQUENCES, lab.k, lab.p, lab.cfg.seed + 2)
    found, tasks = {}, lab.split["id"].to(lab.device)
    for name, tokens in sets.items():
        tokens = tokens.to(lab.device)
        curves = {"model": g.evaluate(lab.model, tokens)}
        curves["ratio"], curves["regression"] = g.oracle_accuracy(tokens, lab.p)
        for who, soft in (("memory", False), ("best fit", True)):
            curves[who] = g.accuracy(torch.cat([memory_scores(t, tasks, lab.p, soft)
                                                for t in tokens.split(64)]), tokens)
        found[name] = {who: curve.numpy() for who, curve in curves.items()}
    return found


def show_shots(lab, found):
    whos = ["model", "ratio", "regression", "memory", "best fit"]
    table(f"Accuracy after {lab.k - 1} shots, in %: all queries, then novel ones",
          ["", *whos, *whos],
          [[name.replace("_", " "), *(float(curves[who][n, -1]) for n in (0, 1) for who in whos)]
           for name, curves in found.items()],
          f"chance {100 / lab.p:.1f}; memory: what an exact memory of the {len(lab.split['id'])} "
          f"pre-training tasks could do;\nbest fit: those of them that fit the most examples")


def draw_shots(plt, lab, found):
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for ax, side in zip(axes, ("train", "test")):
        for who, colour in (("regression", GREEN), ("ratio", ORANGE), ("best fit", GREY)):
            ax.plot(100 * found[f"test_ood_{side}"][who][1], "--", color=colour, label={
                "regression": "Modular Regression", "ratio": "Ratio Matching"}.get(who, "memory"))
        for kind, colour, label in (("id", GREY, "i.d."), ("test_ood", BLUE, "o.o.d.")):
            ax.plot(100 * found[f"{kind}_{side}"]["model"][1], color=colour,
                    label=f"model, {label} tasks")
        ax.set(title=f"{side} inputs", xlabel="shots")
    axes[0].set_ylabel("accuracy on novel queries (%)")
    axes[1].legend(fontsize=8, loc="center right")
    return {"shots": fig}

# -------------------------------------------------------------------------------------------------
# Skills: which queries are answered? (figure 5)
# -------------------------------------------------------------------------------------------------

SKILLS = ("copy", "ratio", "regression", "undetermined")


def skill_of(tokens, p):
    """The least skill that answers each query, (B, k), as an index into SKILLS."""
    ratio, regression = g.solvable(tokens, p)
    skill = torch.where(ratio, 1, torch.where(regression, 2, 3))
    return torch.where(g.novel_queries(tokens), skill, 0)


def measure_skills(lab):
    """
    Accuracy by skill and shots over contexts of o.o.d. tasks and all p*p queries.

    {"accuracy" and "error": (shots, 4)}; error is the standard error over tasks. "zeros": (3, 4) at
    the last shot for queries with x = 0, with y = 0 and with neither. "right", "skill": (shots, p,
    p) for one context, figure 5's rows.
    """
    p, shots = lab.p, [s for s in g.SHOTS if 0 < s < lab.k - 1] + [lab.k - 1]
    n = max(8, g.REPORT_SEQUENCES // p ** 2)
    tasks, inputs = contexts(lab, "test_ood", n, lab.k - 1)
    x, y = g.grid(p).T
    kinds = torch.stack((x == 0, (y == 0) & (x > 0), (x > 0) & (y > 0)))
    found = {name: [] for name in ("accuracy", "error", "right", "skill")}
    for s in shots:
        tokens = [query_grid(task, xy[:s], p).to(lab.device) for task, xy in zip(tasks, inputs)]
        skill = torch.stack([skill_of(t, p)[:, -1].cpu() for t in tokens])           # (n, p*p)
        right = torch.stack([(answers(lab, t)[:, -1] == t[:, -1]).cpu() for t in tokens])
        is_skill = F.one_hot(skill, 4)                                               # (n, p*p, 4)
        by_task = (is_skill * right[..., None]).sum(1) / is_skill.sum(1)             # (n, 4)
        found["accuracy"].append((is_skill * right[..., None]).sum((0, 1)) / is_skill.sum((0, 1)))
        counted = (~by_task.isnan()).sum(0)
        spread = (by_task - by_task.nanmean(0)).square().nansum(0) / (counted - 1)
        found["error"].append((spread / counted).sqrt())
        found["right"].append(right[0].view(p, p))
        found["skill"].append(skill[0].view(p, p))
    chosen = is_skill[:, None] * kinds[None, :, :, None]                         # (n, 3, p*p, 4)
    found["zeros"] = (chosen * right[:, None, :, None]).sum((0, 2)) / chosen.sum((0, 2))
    return {"shots": shots, "contexts": n} | {
        name: (torch.stack(v) if isinstance(v, list) else v).numpy() for name, v in found.items()}


def show_skills(lab, found):
    table("Accuracy in % by the least skill that answers a query (and standard error over tasks)",
          ["shots", *(word for skill in SKILLS for word in (skill, "±"))],
          [[str(s), *(float(v) for pair in zip(a, e) for v in pair)] for s, a, e in
           zip(found["shots"], found["accuracy"], found["error"])],
          f"{found['contexts']} contexts of o.o.d. tasks, then all {lab.p ** 2} queries; chance "
          f"{100 / lab.p:.1f}")
    table(f"The same after {lab.k - 1} shots, by zeros in the query (0 has no logarithm)",
          ["query", *SKILLS], [[name, *map(float, row)] for name, row in
                               zip(("x = 0", "y = 0", "neither"), found["zeros"])])


def draw_skills(plt, lab, found):
    fig, ax = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    for skill, colour in ((0, GREY), (1, ORANGE), (2, GREEN)):
        ax.errorbar(found["shots"], 100 * found["accuracy"][:, skill],
                    100 * found["error"][:, skill], color=colour, capsize=2,
                    label=("copies", "Ratio Matching", "only Modular Regression")[skill])
    ax.axhline(100 / lab.p, color="black", lw=0.8, ls=":", label="chance")
    ax.set(xlabel="shots", ylabel="accuracy (%)", ylim=(0, 104))
    ax.legend(fontsize=8, title="queries by what answers them", title_fontsize=8)
    chosen = [found["shots"].index(s) for s in (1, 2, 12, lab.k - 1) if s in found["shots"]]
    grid, axes = plt.subplots(3, len(chosen), figsize=(2.2 * len(chosen), 6.4),
                              layout="constrained")
    for column, i in zip(axes.T, chosen):
        right, can = found["right"][i].astype(float), (found["skill"][i] < 2).astype(float)
        for ax, image, name in zip(column, (right, can, right - can), (
                "answered right", "Ratio Matching can", "difference")):
            ax.imshow(image.T, origin="lower", vmin=-1, vmax=1, cmap="RdBu_r")
            ax.set(xlabel="x", ylabel="y")
            ax.set_title(f"shots: {found['shots'][i]}; {name}", fontsize=8)
    grid.suptitle("One context, all queries (red: yes; blue: no, though Ratio Matching can)",
                  fontsize=9)
    return {"skills": fig, "skill_grid": grid}

# -------------------------------------------------------------------------------------------------
# Attention (figure 6)
# -------------------------------------------------------------------------------------------------

def attention_to(weights, tokens, p):
    """
    Where heads look from the y of a query: weights there (B, H, k, 3k) -> dict of (H,).

    Shares of the attention on the query's own x and y and on earlier x, y, z; and "line": the share
    of it that the examples on the query's line get, as a multiple of an even spread over examples.
    Over novel queries of which some, not all, earlier examples lie on the line.
    """
    xy = tokens.unflatten(1, (-1, 3))[..., :2]                                       # (B, k, 2)
    k, line = xy.size(1), g.line_of(xy.flatten(0, 1), p).view(xy.shape[:2])
    line[(xy == 0).all(-1)] = -1                                                     # on all lines
    same = ((line[:, :, None] == line[:, None]) & (line[:, :, None] >= 0)).tril(-1)  # (B, k, k)
    earlier = torch.arange(k)
    counts = g.novel_queries(tokens) & (same.sum(-1) > 0) & (same.sum(-1) < earlier)
    weights = weights.unflatten(-1, (k, 3)).transpose(1, 2)[counts]                  # (n, H, k, 3)
    query = counts.nonzero()[:, 1]
    own = weights[torch.arange(len(query)), :, query]                                # (n, H, 3)
    before = weights * (earlier < query[:, None])[:, None, :, None]                  # (n, H, k, 3)
    even = before.sum((2, 3)) * (same.sum(-1) / earlier.clamp(min=1))[counts][:, None]
    on_line = (before.sum(3) * same[counts][:, None]).sum(2)                         # (n, H)
    shares = [own[..., 0], own[..., 1], *before.sum(2).unbind(-1)]
    names = ("own x", "own y", "earlier x", "earlier y", "earlier z")
    return dict(zip(names, (s.mean(0) for s in shares))) | {"line": on_line.sum(0) / even.sum(0)}


@torch.no_grad()
def measure_attention(lab):
    """attention_to of each head on o.o.d. tasks, and mean maps (L, H, 15, 15) of five examples."""
    tokens = lab.sequences("test_ood")
    at_y, maps = [[] for _ in lab.model.blocks], [[] for _ in lab.model.blocks]

    def keep(scores, i):
        weights = scores.softmax(-1).cpu()                                           # (B, H, T, T)
        at_y[i].append(weights[:, :, 1::3])
        maps[i].append(weights[:, :, :15, :15].sum(0))
    with intercept({block.attention.softmax: lambda x, i=i: keep(x, i)
                    for i, block in enumerate(lab.model.blocks)}):
        for t in tokens.split(64):
            lab.model(t, everywhere=True)
    found = {}
    for i, weights in enumerate(at_y):
        for name, shares in attention_to(torch.cat(weights), tokens.cpu(), lab.p).items():
            found |= {f"{i}.{h}": found.get(f"{i}.{h}", {}) | {name: shares[h].item()}
                      for h in range(lab.cfg.heads)}
    return {"heads": found, "maps": torch.stack([sum(m) for m in maps]).numpy() / len(tokens)}


def show_attention(lab, found):
    names = list(next(iter(found["heads"].values())))
    table("Attention from a query's y, in % (line: 100 is an even spread over earlier examples)",
          ["head", *names], [[head, *row.values()] for head, row in found["heads"].items()])


def draw_attention(plt, lab, found):
    L, H = found["maps"].shape[:2]
    fig, axes = plt.subplots(L, H, figsize=(2.3 * H, 2.5 * L), layout="constrained", squeeze=False)
    for (i, h), ax in np.ndenumerate(axes):
        image = ax.imshow(found["maps"][i, h], vmin=0, vmax=1)
        line = found["heads"][f"{i}.{h}"]["line"]
        ax.set_title(f"head {i}.{h}; line {line:.1f} times even", fontsize=8)
        ax.set_xticks(range(15), "xyz" * 5, fontsize=6)
        ax.set_yticks(range(15), "xyz" * 5, fontsize=6)
    fig.supxlabel("looks at", fontsize=9)
    fig.supylabel("position", fontsize=9)
    fig.colorbar(image, ax=axes, label="attention, mean over sequences", shrink=0.7)
    return {"attention": fig}

# -------------------------------------------------------------------------------------------------
# PCA of the heads' outputs: circles (figures 1d, 1e, 6)
# -------------------------------------------------------------------------------------------------

def plane_of(points):
    """Points (n, d) -> first two principal components as complex numbers (n,), and their share."""
    points = points.double() - points.double().mean(0)
    u, s, _ = torch.linalg.svd(points, full_matrices=False)
    scores, share = u * s, s.square() / s.square().sum().clamp(min=1e-30)
    return torch.complex(scores[:, 0], scores[:, 1]), share[:2].sum().item()


def circles(plane, order_x, order_y):
    """
    How much of the variance of a plane (p, p), a point for each (x, y), is a circle, or two.

    order_x, order_y (R, m): a group's order, and random ones. A circle is a point c exp(2 pi i (k u
    + l v) / m) for the u-th x and the v-th y: one Fourier coefficient. A circle of circles is the
    sum of one in x and one in y: two. Characters that are real run to and fro on a line and do not
    count. Returns the shares (R,) of the best one and of the best two, and the best one's (k, l).
    """
    m = order_x.size(-1)
    ordered = plane[order_x[:, :, None], order_y[:, None, :]]                        # (R, m, m)
    power = torch.fft.fft2(ordered, norm="forward").abs().square().flatten(1)
    k = torch.arange(m)
    real = ((2 * k % m == 0)[:, None] & (2 * k % m == 0)).flatten()
    total = power[:, 1:].sum(1).clamp(min=1e-30)
    best, at = (power * ~real).topk(2, dim=1)
    return best[:, 0] / total, best.sum(1) / total, (at[0, 0].item() // m, at[0, 0].item() % m)


def standardized(x):
    """Each vector (..., n) less its mean, over its standard deviation: the authors' preparation."""
    x = x - x.mean(-1, keepdim=True)
    return x / x.std(-1, keepdim=True).clamp(min=1e-9)


def measure_pca(lab):
    """
    Circles in the plane of each head's output after its output matrix, context fixed.

    {"head pair": {"variance", and for each group "one", "two" against their nulls, "frequency"}},
    "best of all": the largest share against the null of the largest, and a plane to draw.
    """
    rows, scores = {}, {group: {"one": [], "two": []} for group in GROUPS}
    order = {group: (orders(group, lab.p), orders(group, lab.p, seed=SEED + 1)) for group in GROUPS}
    for i in range(lab.cfg.depth):
        outputs = [standardized(head_outputs(lab, i, seen[f"heads {i}"])) for seen in observed(lab)]
        for h in range(lab.cfg.heads):
            for pair, at in PAIRS.items():
                planes = [plane_of(out[:, :, at, h].flatten(2).flatten(0, 1)) for out in outputs]
                row = {"variance": float(np.mean([share for _, share in planes])),
                       "plane": torch.view_as_real(planes[0][0]).view(lab.p, lab.p, 2).numpy()}
                for group in GROUPS:
                    one, two, frequency = zip(*(circles(plane.view(lab.p, lab.p), *order[group])
                                                for plane, _ in planes))
                    one, two = torch.stack(one).mean(0), torch.stack(two).mean(0)
                    scores[group]["one"].append(one)
                    scores[group]["two"].append(two)
                    row[group] = {"one": against_null(one), "two": against_null(two),
                                  "frequency": list(frequency[0])}
                rows[f"{i}.{h} {pair}"] = row
    best = {group: {n: against_null(torch.stack(s).amax(0)) for n, s in kinds.items()}
            for group, kinds in scores.items()}
    head = max(rows, key=lambda name: rows[name]["multiplicative"]["one"]["value"])
    return {"heads": rows, "best of all": best, "clearest": head}


def show_pca(lab, found):
    rows = [[name, row["variance"], *(row[group][n][v] for group in GROUPS for n in ("one", "two")
                                      for v in ("value", "null")),
             "({}, {})".format(*row["multiplicative"]["frequency"])]
            for name, row in found["heads"].items()]
    rows.append(["best of all", None, *(found["best of all"][group][n][v] for group in GROUPS
                                        for n in ("one", "two") for v in ("value", "null")), ""])
    table(f"PCA of heads' outputs: share of the plane that is one circle, or two, in %",
          ["head", "plane", "by log: 1", "null", "2", "null", "by residue: 1", "null", "2", "null",
           "frequency"], rows,
          f"plane: variance of two components; null: 95% of {NULLS} random orders, in the last row "
          f"of the best head's;\nmean of {CONTEXTS} contexts; p of the best circle by log "
          f"{found['best of all']['multiplicative']['one']['p']:.3f}, by residue "
          f"{found['best of all']['additive']['one']['p']:.3f}")


def draw_pca(plt, lab, found):
    head, m = found["clearest"], lab.p - 1
    logs = {v: k for k, v in enumerate(orders("multiplicative", lab.p, 0)[0].tolist())}
    x, y = g.grid(lab.p).T.numpy()
    plane = found["heads"][head]["plane"].reshape(-1, 2)
    fig, axes = plt.subplots(1, 3, figsize=(12.5, 4.2), layout="constrained")
    for ax, residue, name in ((axes[0], x, "x"), (axes[1], y, "y")):
        zero = residue == 0
        points = ax.scatter(*plane[~zero].T, c=[logs[v] for v in residue[~zero]], cmap="hsv", s=8)
        ax.scatter(*plane[zero].T, c="black", s=8, label=f"{name} = 0")
        ax.legend(fontsize=8)
        fig.colorbar(points, ax=ax, label=f"logarithm of {name} to base {generator_of(lab.p)}")
    for v in range(1, lab.p):
        at = plane[(x == v) & (y > 0)].mean(0)
        axes[2].text(*at, str(v), ha="center", va="center", fontsize=8,
                     color=plt.get_cmap("hsv")(logs[v] / m))
    lim = np.abs(plane).max() * 1.1
    for ax in axes:
        ax.set(xlim=(-lim, lim), ylim=(-lim, lim), aspect="equal")
    for ax, title in zip(axes, ("colour: x", "colour: y", "mean over y, for each x")):
        ax.set(title=title, xlabel="first component", ylabel="second component")
    row = found["heads"][head]["multiplicative"]["one"]
    fig.suptitle(f"Head {head.split()[0]} at {' and '.join(head.split()[1])}, one context: the "
                 f"clearest circle by logarithm ({100 * row['value']:.1f}% where x, y are not 0)",
                 fontsize=10)
    return {"pca": fig}

# -------------------------------------------------------------------------------------------------
# Fourier: are the activations made of characters, and of which group?
# -------------------------------------------------------------------------------------------------

def spectrum(f, order_x, order_y):
    """
    Shares of the variance of functions f (p, p, n) at each character (k, l): (m, m, n).

    A character of the group is exp(2 pi i (k u + l v) / m), u and v the places of x and y. A real
    function has its power at (k, l) and (-k, -l) alike; each entry is the sum of the two.
    """
    power = torch.fft.fft2(f[order_x][:, order_y], dim=(0, 1), norm="forward").abs().square()
    power[0, 0] = 0                                                                  # the mean
    power = power / power.sum((0, 1)).clamp(min=1e-30)
    mirrored = power.flip(0, 1).roll((1, 1), (0, 1))
    k = torch.arange(len(power))
    real = (2 * k % len(power) == 0)[:, None] & (2 * k % len(power) == 0)
    return torch.where(real[..., None], power, power + mirrored)


def one_frequency(fs, order_x, order_y):
    """
    How many functions, a list over contexts of (p, p, n), have one frequency; the ratio's share.

    Returns (number whose strongest entry of the mean spectrum has at least ONE_FREQUENCY, share of
    the power in characters (k, -k), which depend on x/y, or x - y, alone, the mean spectrum).
    """
    shares = sum(spectrum(f, order_x, order_y) for f in fs) / len(fs)                # (m, m, n)
    k = torch.arange(1, len(shares))
    once = torch.where(2 * k == len(shares), 1.0, 0.5)               # (k, -k) and (-k, k) are alike
    ratio = (shares[k, -k].mean(1) * once).sum().item()
    return (shares.amax((0, 1)) >= ONE_FREQUENCY).sum().item(), ratio, shares


def measure_fourier(lab):
    """one_frequency of embedding, heads' outputs and neurons at the query's y, against the null."""
    embedding = lab.model.embedding.weight.detach().cpu()[:, None].expand(-1, lab.p, -1)
    fs = {"embedding": [embedding]}
    for i in range(lab.cfg.depth):
        fs[f"heads {i}"] = [seen[f"heads {i}"][:, :, 1] for seen in observed(lab)[:2]]
        fs[f"neurons {i}"] = [seen[f"neurons {i}"][:, :, 1] for seen in observed(lab)[:2]]
    found = {}
    for name, functions in fs.items():
        alive = sum(f.flatten(0, 1).var(0) for f in functions)
        functions = [f[..., alive > 1e-6 * alive.max()] for f in functions]
        found[name] = {"n": functions[0].size(-1)}
        for group in GROUPS:
            pairs = zip(orders(group, lab.p, lab.nulls), orders(group, lab.p, lab.nulls, SEED + 1))
            counts, ratios, spectra = [], [], []
            for pair in pairs:
                count, ratio, shares = one_frequency(functions, *pair)
                counts.append(count)
                ratios.append(ratio)
                spectra = spectra or [shares]                # of the true order, the first
            found[name][group] = {
                "count": against_null(torch.tensor(counts)),
                "ratio": against_null(torch.tensor(ratios)),
                "spectrum": spectra[0].mean(-1).numpy(),
                "strongest": spectra[0].amax((0, 1)).numpy()}
    return found


def show_fourier(lab, found):
    rows = []
    for name, row in found.items():
        for group in GROUPS:
            c, r = row[group]["count"], row[group]["ratio"]
            rows.append([f"{name}, {group}", str(row["n"]), f"{c['value']:.0f}", f"{c['null']:.0f}",
                         f"{c['p']:.3f}", r["value"], r["null"], f"{r['p']:.3f}"])
    table(f"Functions of (x, y) at the query's y with {ONE_FREQUENCY:.0%} of their variance at one "
          f"frequency, and power in x/y (x - y) alone, in %",
          ["layer, group", "alive", "one", "null", "p", "ratio", "null", "p"], rows,
          f"null: 95% of {lab.nulls} random orders of the residues")


def draw_fourier(plt, lab, found):
    layers = [name for name in found if name.startswith("neurons")]
    fig, axes = plt.subplots(len(layers), 3, figsize=(11, 3.1 * len(layers)), layout="constrained",
                             squeeze=False)
    for name, row in zip(layers, axes):
        for ax, group in zip(row, GROUPS):
            power = found[name][group]["spectrum"]
            m = len(power)
            low = -(m // 2) - 0.5
            image = ax.imshow(100 * np.roll(power, (m // 2, m // 2), (0, 1)).T, origin="lower",
                              extent=(low, low + m, low, low + m))
            fig.colorbar(image, ax=ax, label="mean share (%)")
            ax.set(title=f"{name}, {group} group", xlabel="frequency in x", ylabel="frequency in y")
            row[2].hist(found[name][group]["strongest"], np.linspace(0, 1, 26), histtype="step",
                        label=group, color=BLUE if group == GROUPS[0] else ORANGE)
        row[2].set(xlabel="share of the strongest frequency", ylabel="neurons alive", title=name)
        row[2].legend(fontsize=8)
    return {"fourier": fig}

# -------------------------------------------------------------------------------------------------
# Similarity of inputs with the same ratio (figure 7)
# -------------------------------------------------------------------------------------------------

def ratio_gap(similarity, p, renamed=None):
    """
    Mean similarity (p*p, p*p) of inputs with equal ratio y/x less that of inputs with unequal ones.

    Without zeros, and without pairs that share x or y, which are alike for that reason. renamed
    (p,) gives each x another name, for the null.
    """
    x, y = g.grid(p).T
    inside = (x > 0) & (y > 0)
    line = g.line_of(torch.stack((x if renamed is None else renamed[x], y), -1), p)[inside]
    x, y, similarity = x[inside], y[inside], similarity[inside][:, inside]
    apart = (x[:, None] != x) & (y[:, None] != y)
    equal = (line[:, None] == line) & apart
    total, of_equal = similarity[apart].sum(), similarity[equal].sum()
    return (of_equal / equal.sum() - (total - of_equal) / (apart.sum() - equal.sum())).item()


def measure_similarity(lab):
    """ratio_gap of each layer's and head's output, standardized, at y and z, against its null."""
    renamings = F.pad(orders("additive", lab.p - 1, lab.nulls) + 1, (1, 0))          # 0 stays 0
    found, images = {}, {}
    for i in range(lab.cfg.depth):
        for position, at in (("y", 1), ("z", 2)):
            outputs = {f"block {i}": [seen[f"residual {i}"][:, :, at] for seen in observed(lab)]}
            heads = [head_outputs(lab, i, seen[f"heads {i}"][:, :, at]) for seen in observed(lab)]
            outputs |= {f"head {i}.{h}": [x[:, :, h] for x in heads] for h in range(lab.cfg.heads)}
            for name, xs in outputs.items():
                similarity = sum(F.normalize(standardized(x).flatten(0, 1), dim=-1) @ F.normalize(
                    standardized(x).flatten(0, 1), dim=-1).T for x in xs) / len(xs)
                found[f"{name} at {position}"] = against_null(torch.tensor(
                    [ratio_gap(similarity, lab.p, names) for names in renamings]))
                images[f"{name} at {position}"] = similarity.numpy()
    best = max(found, key=lambda name: found[name]["value"])
    return {"gaps": found, "clearest": best, "image": images[best]}


def show_similarity(lab, found):
    table("Cosine similarity of outputs, times 100: inputs of equal ratio y/x less unequal",
          ["output", "gap", "null", "p"],
          [[name, r["value"], r["null"], f"{r['p']:.3f}"] for name, r in found["gaps"].items()],
          f"null: 95% of {lab.nulls} random renamings of x")


def draw_similarity(plt, lab, found):
    logs = {v: k for k, v in enumerate(orders("multiplicative", lab.p, 0)[0].tolist())}
    inputs = [n for n, (x, y) in enumerate(g.grid(lab.p).tolist()) if x and y]
    line = g.line_of(g.grid(lab.p), lab.p).tolist()
    order = sorted(inputs, key=lambda n: (logs[line[n]], logs[n // lab.p]))
    fig, ax = plt.subplots(figsize=(5.6, 5), layout="constrained")
    image = ax.imshow(found["image"][np.ix_(order, order)], vmin=-1, vmax=1, cmap="RdBu_r")
    fig.colorbar(image, label="cosine similarity", shrink=0.8)
    ax.set(title=f"{found['clearest']}: inputs sorted by log(y/x), then log x", xlabel="input",
           ylabel="input")
    return {"similarity": fig}

# -------------------------------------------------------------------------------------------------
# Ablation: which heads and MLPs, at which positions, are needed, and are they enough?
# -------------------------------------------------------------------------------------------------

def parts_of(lab):
    """{"head 0.1" or "MLP 0": (its site, its slice of it)}."""
    width = lab.cfg.embd // lab.cfg.heads
    return {f"head {i}.{h}": (f"heads {i}", slice(h * width, (h + 1) * width))
            for i in range(lab.cfg.depth) for h in range(lab.cfg.heads)} | {
                f"MLP {i}": (f"neurons {i}", slice(None)) for i in range(lab.cfg.depth)}


@torch.no_grad()
def site_values(lab, tokens):
    """What every head and MLP site holds at every position: {site: (B, T, n)}."""
    found = {name: [] for name in sites(lab.model) if "residual" not in name}
    with intercept({sites(lab.model)[name]: found[name].append for name in found}):
        answers(lab, tokens)
    return {name: torch.cat(values) for name, values in found.items()}


def answers_with(lab, tokens, values, replaced):
    """
    answers() where each of replaced, a list of (part, positions), has the value given for it.

    values {site: (T, n) or (B, T, n)}; positions is a slice of the sequence, 0::3 all x, and so on.
    """
    named, modules = parts_of(lab), sites(lab.model)
    values = {site: v.expand(len(tokens), -1, -1) for site, v in values.items()}

    def change(site):
        start = [0]                                      # tokens come in chunks

        def put(x):
            x, rows = x.clone(), slice(start[0], start[0] + len(x))
            start[0] += len(x)
            for part, at in replaced:
                if named[part][0] == site:
                    x[:, at, named[part][1]] = values[site][rows, at, named[part][1]]
            return x
        return put
    changed = {named[part][0] for part, _ in replaced}
    with intercept({modules[site]: change(site) for site in changed}):
        return answers(lab, tokens)


POSITIONS = {"everywhere": slice(None), "at x": slice(0, None, 3), "at y": slice(1, None, 3),
             "at z": slice(2, None, 3)}


def measure_ablation(lab):
    """
    Accuracy on ratio queries with parts held at their mean, over all shots but none.

    {"whole", "held": {part: {positions: accuracy}}, "kept": heads, "only": with all others held}.
    A head is kept if on *validation* tasks its ablation costs a tenth of the ratio queries.
    """
    means = {site: v.mean(0) for site, v in site_values(lab, lab.sequences("val_ood")).items()}

    def score(kind, replaced):
        tokens = lab.sequences(kind)
        counts = skill_of(tokens, lab.p) == 1
        right = answers_with(lab, tokens, means, replaced) == tokens[:, 2::3]
        return right[counts].float().mean().item()
    heads = [part for part in parts_of(lab) if part.startswith("head")]
    before = score("val_ood", [])
    kept = [h for h in heads if score("val_ood", [(h, slice(None))]) < before - 0.1]
    return {"whole": score("test_ood", []), "kept": kept,
            "only": score("test_ood", [(h, slice(None)) for h in heads if h not in kept]),
            "held": {part: {name: score("test_ood", [(part, at)]) for name, at in POSITIONS.items()}
                     for part in parts_of(lab)}}


def show_ablation(lab, found):
    table("Ablation: accuracy on ratio queries, in %, with one part held at its mean",
          ["part", *POSITIONS], [["nothing", *[found["whole"]] * 4]] + [
              [part, *row.values()] for part, row in found["held"].items()],
          f"with no heads but {', '.join(h[5:] for h in found['kept']) or 'none'}: "
          f"{100 * found['only']:.1f} (chosen on validation tasks); chance {100 / lab.p:.1f}")


def draw_ablation(plt, lab, found):
    fig, ax = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
    for j, (name, colour) in enumerate(zip(POSITIONS, ("black", BLUE, ORANGE, GREEN))):
        ax.bar(np.arange(len(found["held"])) + 0.2 * j - 0.3,
               [100 * row[name] for row in found["held"].values()], 0.2, color=colour, label=name)
    ax.axhline(100 * found["whole"], color=GREY, ls="--", lw=1, label="nothing held")
    ax.set_xticks(range(len(found["held"])), found["held"], rotation=45, ha="right", fontsize=8)
    ax.set(ylabel="accuracy on ratio queries (%)", title="One part held at its mean")
    fig.legend(loc="outside right upper", fontsize=8)
    return {"ablation": fig}

# -------------------------------------------------------------------------------------------------
# Labels: change one example's z. Which algorithm says how the answer must move?
# -------------------------------------------------------------------------------------------------

def on_line(tokens, p):
    """Which earlier examples are nonzero multiples of the last query: (B, 3k) -> (B, k - 1)."""
    xy = tokens.unflatten(1, (-1, 3))[..., :2]
    (x, y), (u, v) = xy[:, -1:].unbind(-1), xy[:, :-1].unbind(-1)
    return ((x * v - y * u) % p == 0) & ((u > 0) | (v > 0)) & ((x > 0) | (y > 0))


def pick(lab, shots, lines, n=SEQUENCES):
    """Up to n sequences of o.o.d. tasks, the novel query with that many examples on its line."""
    tasks, inputs = contexts(lab, "test_ood", 40 * n, shots + 1)
    tokens = g.to_tokens(tasks, inputs, lab.p)
    good = (on_line(tokens, lab.p).sum(1) == lines) & g.novel_queries(tokens)[:, -1]
    return tokens[good & (tokens[:, -3:-1].sum(1) > 0)][:n]


def divide(a, b, p):
    """a / b mod p, elementwise, 0 where b is 0."""
    inverse = torch.tensor([0] + [pow(x, -1, p) for x in range(1, p)])
    return a * inverse[b] % p


def measure_labels(lab):
    """
    How often the answer moves as each algorithm says, when one example's z is changed by delta.

    By shots: "on", the only example on the query's line is changed, and the answer moves by c delta
    (Ratio Matching; c is query / example); "off", another example is, and the answer stays (Ratio
    Matching). "regression", two examples on other lines, the answer moves by c_i delta (Modular
    Regression). Chance is 1/p for the first and the last.
    """
    p, rng = lab.p, torch.Generator().manual_seed(SEED)

    def moved(tokens, which):
        """(how far the answer moves, delta) when the example which (B,) is changed."""
        delta = torch.randint(1, p, (len(tokens),), generator=rng)
        changed, rows = tokens.clone(), torch.arange(len(tokens))
        changed[rows, 3 * which + 2] = (changed[rows, 3 * which + 2] + delta) % p
        before, after = (answers(lab, t.to(lab.device))[:, -1].cpu() for t in (tokens, changed))
        return (after - before) % p, delta
    found = {"shots": [s for s in (1, 2, 4, 8, 16) if s < lab.k - 1] + [lab.k - 1]}
    found |= {"on": [], "off": []}
    for shots in found["shots"]:
        tokens = pick(lab, shots, 1)
        line = on_line(tokens, p).int()
        at, rows = line.argmax(1), torch.arange(len(tokens))
        x, y = tokens[rows, -3], tokens[rows, -2]
        u, v = tokens[rows, 3 * at], tokens[rows, 3 * at + 1]
        c = torch.where(u > 0, divide(x, u, p), divide(y, v, p))
        move, delta = moved(tokens, at)
        found["on"].append((move == c * delta % p).float().mean().item())
        found["off"].append((moved(tokens, line.argmin(1))[0] == 0).float().mean().item()
                            if shots > 1 else float("nan"))
    tokens = pick(lab, 2, 0)
    u1, v1, _, u2, v2, _, x, y, _ = tokens.T
    c = divide((x * v2 - y * u2) % p, (u1 * v2 - u2 * v1) % p, p)        # Cramer's rule
    independent = (u1 * v2 - u2 * v1) % p > 0
    move, delta = moved(tokens, torch.zeros(len(tokens), dtype=torch.long))
    return found | {"regression": (move == c * delta % p)[independent].float().mean().item()}


def show_labels(lab, found):
    table("One example's z changed: how often the answer moves as an algorithm says, in %",
          ["shots", "on the line: by c delta", "off the line: not at all"],
          [[str(s), on, off] for s, on, off in zip(found["shots"], found["on"], found["off"])],
          f"both as Ratio Matching says. As Modular Regression says, two examples off the line: "
          f"{100 * found['regression']:.1f}; chance {100 / lab.p:.1f}")

# -------------------------------------------------------------------------------------------------
# Patching: put one head's output from another task into a run. Does the answer become that task's?
# -------------------------------------------------------------------------------------------------

def measure_patching(lab):
    """
    {part: {positions: share of last queries answered as the other task would}}; "own": unpatched.

    Both runs have the same inputs and query, on tasks (a, b) and (a', b'); queries are those that
    Ratio Matching can answer, novel, and whose z differs between the two.
    """
    tasks, inputs = contexts(lab, "test_ood", SEQUENCES, lab.k)
    other = tasks.roll(1, 0)
    ours, theirs = (g.to_tokens(t, inputs, lab.p) for t in (tasks, other))
    good = (skill_of(ours, lab.p)[:, -1] == 1) & (ours[:, -1] != theirs[:, -1])
    ours, theirs = ours[good].to(lab.device), theirs[good].to(lab.device)
    values = site_values(lab, theirs)

    def share(replaced, z):
        return (answers_with(lab, ours, values, replaced)[:, -1] == z).float().mean().item()
    return {"own": share([], ours[:, -1]), "other": {part: {
        name: share([(part, at)], theirs[:, -1]) for name, at in POSITIONS.items()}
        for part in parts_of(lab)}}


def show_patching(lab, found):
    table("Patching: answers that become the other task's, in %, with one part's output from there",
          ["part", *POSITIONS], [[part, *row.values()] for part, row in found["other"].items()],
          f"{100 * found['own']:.1f} are the own task's without a patch; chance {100 / lab.p:.1f}")

# -------------------------------------------------------------------------------------------------
# Frequencies: how many characters of which group are enough?
# -------------------------------------------------------------------------------------------------

KEPT = (1, 2, 4, 8, 16, 32)


def keep_characters(f, order, mask):
    """f (p, p, n) with only those characters (m, m, n) that mask has, and the mean."""
    mask = mask.clone()
    mask[0, 0] = True
    kept = torch.fft.ifft2(torch.fft.fft2(f[order][:, order], dim=(0, 1)) * mask, dim=(0, 1)).real
    f = f.clone()
    f[order[:, None], order] = kept.to(f.dtype)
    return f


@torch.no_grad()
def measure_frequencies(lab):
    """
    Accuracy on ratio queries without zeros when a site keeps n characters of each of its functions.

    The site is filtered at the query's y, over all queries after a context. The strongest
    characters are chosen on contexts of validation tasks. {site: {group or "random": list}};
    random: as many characters of the multiplicative group, any of them.
    """
    p, rng = lab.p, torch.Generator().manual_seed(SEED)
    chosen_on = [activations(lab, *c) for c in zip(*contexts(lab, "val_ood", 2, lab.k - 1))]
    grids = [query_grid(*c, p) for c in zip(*contexts(lab, "test_ood", 2, lab.k - 1))]
    x, y = g.grid(p).T
    found = {}
    for site in [name for name in sites(lab.model) if "residual" not in name]:
        found[site] = {}
        for group in (*GROUPS, "random"):
            order = orders("additive" if group == "additive" else "multiplicative", p, 0)[0]
            shares = sum(spectrum(seen[site][:, :, 1], order, order) for seen in chosen_on)
            if group == "random":
                shares = torch.rand(shares.shape, generator=rng)
                shares = shares + shares.flip(0, 1).roll((1, 1), (0, 1))     # (k, l) with (-k, -l)
            shares[0, 0] = -1
            found[site][group] = []
            for n in KEPT:
                mask = shares >= shares.flatten(0, 1).topk(
                    min(2 * n, shares[..., 0].numel()), dim=0).values[-1]
                right = asked = 0
                for tokens in grids:
                    counts = (skill_of(tokens, p)[:, -1] == 1) & (x > 0) & (y > 0)

                    def change(values):
                        f = keep_characters(values[:, -1].cpu().view(p, p, -1), order, mask)
                        return torch.cat((values[:, :-1], f.flatten(0, 1)[:, None].to(values)), 1)
                    with intercept({sites(lab.model)[site]: change}):
                        logits = lab.model(tokens[:, :-1].to(lab.device), everywhere=True)[:, -1]
                    right += (logits.argmax(-1).cpu() == tokens[:, -1])[counts].sum().item()
                    asked += counts.sum().item()
                found[site][group].append(right / asked)
    return found


def show_frequencies(lab, found):
    table("Accuracy on ratio queries, in %, with only so many characters of each function kept",
          ["site, group", *map(str, KEPT)],
          [[f"{site}, {group}", *row] for site, groups in found.items()
           for group, row in groups.items()],
          "at the query's y; the strongest on validation tasks; random: multiplicative ones")

# -------------------------------------------------------------------------------------------------
# Progress over training, from the snapshots of grok_icl.py --snapshots
# -------------------------------------------------------------------------------------------------

def subgroup_orders(p):
    """The orders of the subgroups of the nonzero residues: the divisors of p - 1, from 1."""
    return [d for d in range(1, p) if (p - 1) % d == 0]


def measure_progress(lab):
    """
    Over the snapshots: accuracy by skill (S, 4), attention to the line and circle of the clearest
    head, and of one-line sequences z up to a subgroup: share of answers with answer / z in it.
    """
    files = sorted(glob.glob(os.path.join(lab.folder, "step*.pt")), key=lambda f: (len(f), f))
    if not files:
        return {}
    name = measure_pca(lab)["clearest"]
    (i, h), pair = map(int, name.split()[0].split(".")), PAIRS[name.split()[1]]
    order = orders("multiplicative", lab.p, 0)
    line = g.line_of(lab.split["train_inputs"], lab.p)
    cfg = g.replace(lab.cfg, batch=lab.cfg.tasks)
    one = g.training_batch(lab.split, line, cfg, 1, torch.Generator().manual_seed(SEED))
    tokens = lab.sequences("val_ood")
    skill = skill_of(tokens, lab.p).cpu()
    found = {name: [] for name in ("step", "accuracy", "line", "circle", "subgroup", "plane")}
    for file in files:
        checkpoint, _, model = g.load_checkpoint(file, lab.device)
        now = SimpleNamespace(**vars(lab) | {"model": model})
        found["step"].append(checkpoint["step"])
        right = (answers(now, tokens) == tokens[:, 2::3]).cpu()
        found["accuracy"].append([right[skill == s].float().mean().item() for s in range(4)])
        found["line"].append(max(row["line"] for row in measure_attention(now)["heads"].values()))
        seen = activations(now, *next(zip(*contexts(now, "val_ood", 1, lab.k - 1))))
        out = standardized(head_outputs(now, i, seen[f"heads {i}"]))[:, :, pair, h]
        plane = plane_of(out.flatten(2).flatten(0, 1))[0].view(lab.p, lab.p)
        found["circle"].append(circles(plane, order, order)[0].item())
        if found["plane"]:                               # turn, or mirror, as it was before
            before = found["plane"][-1]
            plane = max((c * (c.conj() * before).sum().sgn() for c in (plane, plane.conj())),
                        key=lambda c: (c.conj() * before).sum().real.item())
        found["plane"].append(plane)
        said, z = answers(now, one.to(lab.device))[:, 3:].cpu(), one[:, 2::3][:, 3:]
        ratio = divide(said, z, lab.p)[z > 0]
        found["subgroup"].append([torch.isin(ratio, torch.tensor([pow(r, (lab.p - 1) // d, lab.p)
                                  for r in range(1, lab.p)])).float().mean().item()
                                  for d in subgroup_orders(lab.p)])
    planes = torch.view_as_real(torch.stack(found.pop("plane"))).numpy()
    return {n: np.array(v) for n, v in found.items()} | {"plane": planes, "head": name}


def show_progress(lab, found):
    if not found:
        return print("\nprogress: no step*.pt beside the checkpoint; train with --snapshots")
    rows = zip(*(found[n] for n in ("step", "accuracy", "line", "circle", "subgroup")))
    table("Over training, in %", ["step", *SKILLS[:3], "line", "circle", *(
        f"order {d}" for d in subgroup_orders(lab.p)[:-1])],
        [[str(s), *map(float, a[:3]), float(line), float(c), *map(float, sub[:-1])]
         for s, a, line, c, sub in rows],
        f"accuracy by skill on validation tasks; line: attention to it, 100 is even; circle: head "
        f"{found['head']};\norder: one-line sequences, answer / z in the subgroup of that order, "
        f"by chance order / {lab.p - 1}")


def draw_progress(plt, lab, found):
    if not found:
        return {}
    fig, axes = plt.subplots(1, 3, figsize=(13, 3.6), layout="constrained")
    for s, colour in zip(range(3), (GREY, ORANGE, GREEN)):
        axes[0].plot(found["step"], 100 * found["accuracy"][:, s], color=colour, label=SKILLS[s])
    axes[0].set(title="accuracy by skill, o.o.d. validation tasks", ylabel="%")
    for d, values in zip(subgroup_orders(lab.p)[:-1], found["subgroup"].T):
        axes[1].plot(found["step"], 100 * values, label=f"order {d}")
    axes[1].set(title="one-line sequences: z up to a subgroup", ylabel="%")
    axes[2].plot(found["step"], 100 * found["circle"], color=BLUE,
                 label=f"circle, head {found['head']} (%)")
    axes[2].plot(found["step"], 10 * found["line"], color=ORANGE,
                 label="attention to the line (tenths of even)")
    axes[2].set(title="circle and attention")
    for ax in axes:
        ax.set_xlabel("training step")
        ax.legend(fontsize=7)
    return {"progress": fig}

# -------------------------------------------------------------------------------------------------
# Phases of many runs (figure 1b)
# -------------------------------------------------------------------------------------------------

PHASES = {"in-distribution memorization": ("IM", GREY), "o.o.d. memorization": ("OM", ORANGE),
          "in-distribution generalization": ("IG", "cyan"),
          "o.o.d. generalization": ("OG", GREEN)}


def measure_phases(folders):
    """{(alpha, tasks): phase} of every run under the folders, by its validation tasks."""
    found = {}
    for folder in folders:
        for file in sorted(glob.glob(os.path.join(folder, "**", "best.pt"), recursive=True)):
            checkpoint, cfg, _ = g.load_checkpoint(file)
            row, sets = checkpoint["history"][-1], g.eval_sequences(
                checkpoint["split"], "val_ood", g.EVAL_SEQUENCES, cfg.examples, cfg.p, cfg.seed + 1)
            ratio = [g.oracle_accuracy(tokens, cfg.p)[0][1, -1].item() for tokens in sets.values()]
            if (cfg.alpha, cfg.tasks) in found:
                raise ValueError(f"{file}: a second run of alpha {cfg.alpha} and {cfg.tasks} tasks")
            model = [row[f"{name}_novel"] for name in sets]
            found[cfg.alpha, cfg.tasks] = g.phase(model, ratio, cfg.p)
    if not found:
        raise ValueError(f"{' '.join(folders) or 'phases'}: no run (a folder with best.pt) there")
    return found


def show_phases(found):
    alphas, tasks = (sorted({key[i] for key in found}) for i in (0, 1))
    table("Phases", ["alpha", *map(str, tasks)], [
        [str(a), *(PHASES.get(found.get((a, n)), ("?",))[0] for n in tasks)] for a in alphas[::-1]],
        "I, O: i.d., o.o.d.; M, G: memorization, generalization; ?: none of these")


def draw_phases(plt, found):
    alphas, tasks = (sorted({key[i] for key in found}) for i in (0, 1))
    fig, ax = plt.subplots(figsize=(1.8 + 0.8 * len(tasks), 1.4 + 0.6 * len(alphas)),
                           layout="constrained")
    for (alpha, n), name in found.items():
        letters, colour = PHASES.get(name, ("?", "white"))
        x, y = tasks.index(n), alphas.index(alpha)
        ax.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, color=colour))
        ax.text(x, y, letters, ha="center", va="center")
    ax.set(xlim=(-0.5, len(tasks) - 0.5), ylim=(-0.5, len(alphas) - 0.5),
           xlabel="pre-training tasks", ylabel="alpha",
           title="I/O: i.d./o.o.d.; M/G: memorization/generalization")
    ax.set_xticks(range(len(tasks)), tasks)
    ax.set_yticks(range(len(alphas)), alphas)
    return {"phases": fig}

# -------------------------------------------------------------------------------------------------
# Command line
# -------------------------------------------------------------------------------------------------

def no_pictures(plt, lab, found):
    return {}


PARTS = {"shots": (measure_shots, show_shots, draw_shots),
         "skills": (measure_skills, show_skills, draw_skills),
         "attention": (measure_attention, show_attention, draw_attention),
         "pca": (measure_pca, show_pca, draw_pca),
         "fourier": (measure_fourier, show_fourier, draw_fourier),
         "similarity": (measure_similarity, show_similarity, draw_similarity),
         "ablation": (measure_ablation, show_ablation, draw_ablation),
         "labels": (measure_labels, show_labels, no_pictures),
         "patching": (measure_patching, show_patching, no_pictures),
         "frequencies": (measure_frequencies, show_frequencies, no_pictures),
         "progress": (measure_progress, show_progress, draw_progress)}


def open_lab(path, device="cpu"):
    """What every part needs: model, config, split, device, and sequences(kind), (n, 3k)."""
    file = os.path.join(path, "best.pt") if os.path.isdir(path) else path
    device = g.pick_device(device)
    checkpoint, cfg, model = g.load_checkpoint(file, device)
    lab = SimpleNamespace(folder=os.path.dirname(file), model=model, cfg=cfg, device=device,
                          p=cfg.p, k=cfg.examples, split=checkpoint["split"], nulls=NULLS)

    def sequences(kind):
        sets = g.eval_sequences(lab.split, kind, SEQUENCES // 2, lab.k, lab.p, SEED)
        return torch.cat([sets[f"{kind}_{side}"] for side in ("train", "test")]).to(device)
    lab.sequences = sequences
    return lab


def save(out, found, figures):
    """found to out/analysis.json, its arrays to analysis.npz, figures to NAME.png."""
    arrays = {}

    def scalars(value, path):
        if isinstance(value, np.ndarray):
            arrays[path] = value
            return f"in analysis.npz: {path}"
        if isinstance(value, dict):
            return {str(k): scalars(v, f"{path}/{k}" if path else str(k)) for k, v in value.items()}
        if isinstance(value, list):
            return [scalars(v, path) for v in value]
        return None if isinstance(value, float) and np.isnan(value) else value
    text = json.dumps(scalars(found, ""), indent=1)
    g.write_file(os.path.join(out, "analysis.json"), text.encode())
    np.savez_compressed(buffer := io.BytesIO(), **arrays)
    g.write_file(os.path.join(out, "analysis.npz"), buffer.getbuffer())
    for name, figure in figures.items():
        figure.savefig(os.path.join(out, f"{name}.png"), metadata={"Software": None})


def main(argv=None):
    """Measure, print, draw. Returns the exit code; bad input is one line on stderr and code 2."""
    def refuse(message):
        raise ValueError(message)
    parser = argparse.ArgumentParser(description="Look inside a trained model.", allow_abbrev=False,
                                     usage="analyze.py RUN|FILE [part ...] | phases DIR ...")
    parser.error = refuse
    parser.add_argument("path", metavar="RUN|FILE", help="a run's folder, a checkpoint, or: phases")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... [cpu]")
    parser.add_argument("--out", help="folder to write to [the run's; for FILE.pt FILE; else here]")
    try:
        args = parser.parse_intermixed_args(argv)
        phases = args.path == "phases"
        for part in [] if phases else args.parts:
            if part not in PARTS:
                raise ValueError(f"{part}: no such part; there are {', '.join(PARTS)}")
        found = measure_phases(args.parts) if phases else {}
        lab = None if phases else open_lab(args.path, args.device)
        out = args.out or ("." if phases else args.path if os.path.isdir(args.path) else
                           os.path.splitext(args.path)[0])
        os.makedirs(out, exist_ok=True)
    except (ValueError, OSError) as e:
        print("error: " + " ".join(str(e).split()), file=sys.stderr)
        return 2
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        plt = print("No pictures: pip install matplotlib")
    if phases:
        show_phases(found)
        return save(out, {f"alpha {a}, {n} tasks": name for (a, n), name in found.items()},
                    draw_phases(plt, found) if plt else {})
    figures = {}
    for part, (measure, show, draw) in PARTS.items():
        if part in args.parts or not args.parts:
            found[part] = measure(lab)
            show(lab, found[part])
            if plt:
                figures |= draw(plt, lab, found[part])
            save(out, found, figures)                    # after each, so that Ctrl-C loses but one
    print(f"\nWrote analysis.json, analysis.npz{''.join(f', {n}.png' for n in figures)} to {out}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
