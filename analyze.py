"""
Look inside a model that grok_icl.py trained: which algorithm did it learn, and where?

    python analyze.py assets/p29.pt              everything, for one checkpoint (votes: from three
                                                 blocks on)
    python analyze.py out/RUN skills pca         some parts, for a run's best checkpoint
    python analyze.py out/RUN/last.pt            its last checkpoint, not its best

A section for each of the paper's figures 1c to 1e, 5, 6 and 7, and some of our own. Each opens with
the question; the method; what it shows if the claim is true; and if it isn't (chance, or a rival
idea). Then one function measures and returns a dict, one prints it, one may draw it. Tasks are the
*test* o.o.d. ones. A *null* is what 95% of random orders of the residues stay below.
"""
import contextlib
import functools
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
from tqdm import tqdm

import grok_icl as g

SHOTS = (1, 2, 4, 8, 16)      # that a table shows, and the last one
SEED = 7                      # of the contexts and of the random orders
CONTEXTS = 2                  # over which pca and similarity are averaged
SEQUENCES = 64                # for attention; several times as many for others
EACH_PAIR = 30                # sequences for each pair of offsets and either order, in votes
FETCHED = 0.1                 # attention to an example that counts as fetching it
NULLS = 100                   # random orders of the residues
KEPT = (1, 4, 16)             # pairs of characters of each function
SKILLS = ("copy", "ratio", "regression", "undetermined")

# -------------------- Probes: contexts, all queries after one, what modules read, and changes of it

def contexts(lab, n, examples, seed=SEED):
    """n contexts: o.o.d. test tasks (n, 2) in turn, and inputs (n, examples, 2) of all p*p."""
    tasks, generator = lab.split["test_ood"], torch.Generator().manual_seed(seed)
    draw = torch.randint(lab.p ** 2, (n, examples), generator=generator)
    return tasks[torch.arange(n) % len(tasks)], g.grid(lab.p)[draw]

def sites(model):
    """{site: the module that reads it}; sites are heads' outputs (B, T, H*D) and MLP neurons."""
    return {f"{name} {i}": module for i, block in enumerate(model.blocks)
            for name, module in (("heads", block.attention.out), ("neurons", block.mlp.down))}

def run_with(changes, run):
    """run(), while the input x of each module in {module: f} is replaced by f(x)."""
    with contextlib.ExitStack() as hooks:                        # gone after it, errors or not
        for module, f in changes.items():
            hook = module.register_forward_pre_hook(lambda module, args, f=f: (f(args[0]),))
            hooks.enter_context(hook)
        return run()

def record(modules, run, at=slice(None)):
    """The inputs x[:, at] of {name: module} while run() calls the model once: {name: tensor}."""
    found = {}

    def keep(name, x):
        found[name] = x[:, at].clone()
        return x                                                 # as it was
    run_with({module: functools.partial(keep, name) for name, module in modules.items()}, run)
    return found

def put(values, at):
    """A change for run_with: x (B, T, C) with values in place of x[:, at]."""
    def f(x):
        x = x.clone()
        x[:, at] = values
        return x
    return f

@torch.no_grad()
def answers(lab, tokens):
    """The z predicted at each query of tokens (B, 3k): (B, k). All tokens pass the last block."""
    return lab.model(tokens, g.EVERY_TOKEN)[:, 1::3].argmax(-1)

def query_grid(task, inputs, p):
    """One context, task (2,) and inputs (n, 2), and after it each query: tokens (p*p, 3n + 3)."""
    inputs = torch.cat((inputs.expand(p * p, -1, -1), g.grid(p)[:, None]), dim=1)
    return g.to_tokens(task.expand(p * p, 2), inputs, p)

def observe(lab):
    """What sites and heads hold at each query (x, y), after CONTEXTS contexts; computed once.
    Returns {site: (contexts, functions, p, p)} at the query's y, and {(head, token): (contexts, p,
    p, C)}, what a head adds to the residual stream at the query's x, y or z, standardized over its
    C coordinates as the authors do it. In the last block only y matters, so it is alone there."""
    if lab.observed is None:
        at_y, added, runs = {}, {}, []
        for context in zip(*contexts(lab, CONTEXTS, lab.k - 1)):
            tokens = query_grid(*context, lab.p)
            runs.append(record(sites(lab.model), lambda: answers(lab, tokens), slice(-3, None)))
        for site, module in sites(lab.model).items():
            seen = torch.stack([run[site] for run in runs]).unflatten(1, (lab.p, lab.p))
            at_y[site] = seen[:, :, :, 1].movedim(-1, 1).contiguous()
            if site.startswith("neurons"):
                continue
            H, block = lab.cfg.heads, int(site.split()[1])
            weights = module.weight.detach().chunk(H, dim=1)                         # H of (C, D)
            for h, (part, weight) in enumerate(zip(seen.chunk(H, dim=-1), weights)):
                out = F.layer_norm(part @ weight.T, (lab.cfg.embd,))            # (n, p, p, 3, C)
                for token, values in zip("xyz", out.unbind(3)):
                    if token == "y" or block < lab.cfg.depth - 1:
                        added[f"{block}.{h}", token] = values
        lab.observed = at_y, added
    return lab.observed

def orders(p, n):
    """The residues by logarithm, for x and for y, then n times at random: (n + 1, 2, p - 1)."""
    true = g.powers(p)
    draw = torch.rand(n, 2, len(true), generator=torch.Generator().manual_seed(SEED))
    return torch.cat((true.expand(1, 2, -1), true[draw.argsort(-1)]))

def against_null(measure, p, names, columns):
    """{name: {column: value, column + " null": 95% of random orders}} of measure(order_x, order_y),
    (names, columns). A last row is the best of all; its null, too, is that of the best of all."""
    scores = torch.stack([measure(*o) for o in bar(orders(p, NULLS), "null")]).double()
    scores = torch.cat((scores, scores.amax(1, keepdim=True)), dim=1)   # (orders, names, columns)
    true, null = scores[0], scores[1:].quantile(0.95, dim=0)
    rows = torch.stack((true, null), -1).flatten(1).tolist()
    columns = [column + what for column in columns for what in ("", " null")]
    return {name: dict(zip(columns, row)) for name, row in zip([*names, "best of all"], rows)}

def bar(things, name):
    """A progress bar over things, on a terminal, gone at its end."""
    return tqdm(things, name, leave=False, disable=None)

def table(title, rows, note="", scale=100, digits=1):
    """Print {name: {column: number or text}}: numbers times scale, percent by default; nan: -."""
    def text(v):
        return v if isinstance(v, str) else f"{scale * v:.{digits}f}" if v == v else "-"
    cells = [["", *map(str, next(iter(rows.values())))]]
    cells += [[str(name), *map(text, row.values())] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*cells)]
    print("\n" + title + "\n" + "-" * len(title) + (note and "\n" + note))
    for row in cells:
        print("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]))

# --------------------------------------------------------------- Skills over shots (figures 1c, 5)
# Question: which queries does it answer?
# Method:   after some contexts ask all p*p queries; sort them by the least skill that answers them.
# If it matches ratios: "copy" and "ratio" near 100%, "regression" near chance, 1/p.
# If it combines examples: "regression" far above chance; if it matches no ratios, "ratio" is low.
def skill_of(tokens, p):
    """The least skill that answers each query, (B, k), as an index into SKILLS."""
    ratio, regression = g.solvable(tokens, p)
    skill = torch.where(ratio, 1, torch.where(regression, 2, 3))
    return torch.where(g.novel_queries(tokens), skill, 0)

def measure_skills(lab):
    """All p*p queries after contexts of o.o.d. tasks: "accuracy" (shots, 4), by skill; "right" and
    "skill" (shots, p, p), after the first context."""
    p, shots = lab.p, [s for s in SHOTS if s < lab.k - 1] + [lab.k - 1]
    tasks, inputs = contexts(lab, 2 * CONTEXTS, lab.k - 1)
    found = {"accuracy": [], "right": [], "skill": []}
    for s in bar(shots, "skills"):
        tokens = torch.stack([query_grid(*c, p) for c in zip(tasks, inputs[:, :s])])
        said = torch.cat([answers(lab, t)[:, -1]
                          for t in tokens.flatten(0, 1).split(g.CHUNK)]).view(tokens.shape[:2])
        skill = torch.stack([skill_of(t, p)[:, -1] for t in tokens])                 # (n, p*p)
        right = said == tokens[..., -1]
        found["accuracy"].append(torch.stack([right[skill == i].float().mean() for i in range(4)]))
        found["right"].append(right[0].view(p, p))
        found["skill"].append(skill[0].view(p, p))
    return {name: torch.stack(values) for name, values in found.items()} | {"shots": shots}

def show_skills(lab, found):
    table("Accuracy after some shots, in %, by the least skill that answers a query",
          {s: dict(zip(SKILLS, row)) for s, row in zip(found["shots"], found["accuracy"].tolist())},
          f"{2 * CONTEXTS} contexts, all {lab.p ** 2} queries; Ratio Matching alone: 100, 100, and "
          f"chance, {100 / lab.p:.1f}")

def draw_skills(subplots, lab, found):
    fig, ax = subplots(figsize=(4.5, 3.4))
    for s, colour in ((0, "C7"), (1, "C1"), (2, "C2")):
        ax.plot(found["shots"], 100 * found["accuracy"][:, s], f".-{colour}", label=SKILLS[s])
    ax.axhline(100 / lab.p, color="black", lw=0.8, ls=":", label="chance")
    ax.set(title="new tasks", xlabel="shots", ylabel="accuracy (%)", ylim=(0, 104))
    ax.legend(title="least skill that answers the query")
    chosen = [i for i, s in enumerate(found["shots"]) if s in (1, 2, 8, lab.k - 1)]
    grid, axes = subplots(3, len(chosen), figsize=(2.2 * len(chosen) + 1, 6.6), squeeze=False)
    for column, i in zip(axes.T, chosen):
        right, can = found["right"][i].int(), (found["skill"][i] < 2).int()
        for ax, image, name in zip(column, (right, can, right - can), (
                "answered right", "Ratio Matching can", "difference")):
            ax.imshow(image.T.numpy(), origin="lower", vmin=-1, vmax=1, cmap="RdBu_r")
            ax.set(xlabel="x", ylabel="y", title=f"shots: {found['shots'][i]}; {name}")
    grid.suptitle("One context, all queries (red: yes; blue: no, though Ratio Matching can)")
    return {"skills.png": fig, "skill_grid.png": grid}

# ----------------------------------------------------------------------------- Attention (figure 6)
# Question: which heads find an example on the query's line?
# Method:   of the attention from a query's y that goes to examples, how much goes to those on its
#           line, as a multiple of their share of the examples.
# If a head does: many times even, up to the number of examples for each one on the line.
# If it doesn't: 1.0, whatever else it looks at.
def attention_to_line(weights, tokens, p):
    """That multiple of each head, (H,), and what it is for a head that looks at no other examples.
    weights (B, H, k, 3k); over novel queries with some, not all, examples on their line."""
    inputs = tokens.unflatten(1, (-1, 3))[..., :2]                                   # (B, k, 2)
    # -1, no line, for (0, 0): it is on all of them, and as an example it is of no use.
    line = g.line_of(inputs, p).masked_fill((inputs == 0).all(-1), -1)               # (B, k)
    same = (line[:, :, None] == line[:, None]).tril(-1)          # (B, query, example)
    shots = torch.arange(line.size(1))
    counts = g.novel_queries(tokens) & (same.sum(-1) > 0) & (same.sum(-1) < shots)   # (B, k)
    weights = weights.unflatten(-1, (-1, 3)).sum(-1).tril(-1)    # to each example: (B, H, k, k)
    share = counts * same.sum(-1) / shots.clamp(min=1)           # of the examples, (B, k)
    even = (weights.sum(-1) * share[:, None]).sum((0, 2))                            # (H,)
    on_line = ((weights * same[:, None]).sum(-1) * counts[:, None]).sum((0, 2))
    return on_line / even, (counts.sum() / share.sum()).item()

def measure_attention(lab):
    """Of each head: "line", attention_to_line; "maps" (L, H, 15, 15) of the first 15 tokens."""
    tokens = g.to_tokens(*contexts(lab, SEQUENCES, lab.k), lab.p)
    scores = record({i: block.attention.softmax for i, block in enumerate(lab.model.blocks)},
                    lambda: answers(lab, tokens))                                    # (B, H, T, T)
    weights = [s.softmax(-1) for s in scores.values()]
    line, most = zip(*(attention_to_line(w[:, :, 1::3], tokens, lab.p) for w in weights))
    return {"line": dict(zip(lab.heads, torch.cat(line).tolist())), "all": most[0],
            "maps": torch.stack([w[:, :, :15, :15].mean(0) for w in weights])}

def show_attention(lab, found):
    table("Attention from a query's y to examples on its line, as a multiple of an even spread",
          {"head": found["line"]}, f"even: 1.0; all of it: {found['all']:.1f}", scale=1)

def draw_attention(subplots, lab, found):
    L, H, T = found["maps"].shape[:3]
    fig, axes = subplots(L, H, figsize=(2.3 * H, 2.5 * L), squeeze=False)
    for ax, weights, head in zip(axes.flat, found["maps"].flatten(0, 1), lab.heads):
        image = ax.imshow(weights.numpy(), vmin=0, vmax=1)
        ax.set(title=f"head {head}; line {found['line'][head]:.1f} times even", xticks=range(T),
               yticks=range(T), xticklabels=list("xyz" * 5)[:T], yticklabels=list("xyz" * 5)[:T])
    fig.colorbar(image, ax=axes, label="attention to column, mean over sequences", shrink=0.7)
    return {"attention.png": fig}

# -------------------------------------------------------- PCA of heads: circles (figures 1d, 1e, 6)
# Question: are the inputs laid out in circles of logarithms?
# Method:   PCA of each head's outputs at two tokens, over all inputs; which share of the plane's
#           variance is one circle.
# If so:    near 100%; for a circle of circles (one for x, on it one for y) "two circles" is.
# If not:   about the null, the best circle for a random order of the residues.
#
# How a circle is measured. Read a point of the plane as a complex number c(x, y). If it goes around
# as log x grows, c = exp(2 pi i k log x / m): one *character* of the group of the m = p - 1 nonzero
# residues. If it runs to and fro on a line instead, c is a cosine, half that character and half its
# conjugate, of frequency -k. So a circle's size is the power of its character less that of the
# conjugate. A small circle in y around each point of a large one in x is a sum of two characters.
def plane_of(points):
    """Points (..., n, d) -> their first two principal components as complex numbers (..., n)."""
    points = points.double() - points.double().mean(-2, keepdim=True)
    _, directions = torch.linalg.eigh(points.mT @ points)                  # ascending
    return torch.view_as_complex((points @ directions[..., -2:]).flip(-1))

def head_planes(lab):
    """The plane of each head's output at two tokens, as in figure 6, and in the last block at y:
    {name: (contexts, p, p)}."""
    added, found = observe(lab)[1], {}
    for head in lab.heads:
        is_last = int(head.split(".")[0]) == lab.cfg.depth - 1
        for tokens in ("y",) if is_last else ("xy", "xz", "yz"):
            points = torch.cat([added[head, token] for token in tokens], -1).flatten(1, 2)
            found[f"{head} at {' and '.join(tokens)}"] = plane_of(points).unflatten(
                1, (lab.p, lab.p))
    return found

def character_power(f, order_x, order_y):
    """Power of functions (..., p, p) in each character (k, l) of a group, the mean's 0.
    A character is exp(2 pi i (k u + l v) / m), u and v the places of x and y: (..., m, m)."""
    power = torch.fft.fft2(f[..., order_x[:, None], order_y], norm="forward").abs().square()
    power[..., 0, 0] = 0
    return power

def conjugate(power):
    """The power in the conjugate (-k, -l) of each character (k, l)."""
    return power.flip(-2, -1).roll((1, 1), (-2, -1))

def circles(planes, order_x, order_y):
    """Share of the variance of planes (..., p, p) that is one circle, and that is two: (..., 2).

    >>> order = torch.arange(12)                              # of twelve logarithms, from 0 to 11
    >>> x = torch.exp(2j * torch.pi * order[:, None].expand(12, 12) / 12)
    >>> [circles(c, order, order).mul(100).round().int().tolist() for c in (x, x.real, x + x.T / 2)]
    [[100, 100], [0, 0], [80, 100]]
    """
    power = character_power(planes, order_x, order_y)
    more_than_conjugate = (power - conjugate(power)).flatten(-2)
    best = more_than_conjugate.topk(2).values                                        # (..., 2)
    total = power.sum((-2, -1)).clamp(min=1e-30)
    return torch.stack((best[..., 0], best.sum(-1)), -1) / total[..., None]

def measure_pca(lab):
    """"heads": {head and tokens: {"circle", "two circles", nulls}}; "planes" (2, p, p) of the
    "clearest": that with the largest circle, and that with the largest circle on a circle."""
    heads = head_planes(lab)
    planes = torch.stack(list(heads.values()))                                       # (N, n, p, p)
    rows = against_null(lambda x, y: circles(planes, x, y).mean(1), lab.p, heads,
                        ("circle", "two circles"))
    clearest = [max(heads, key=lambda name: rows[name]["circle"]),
                max(heads, key=lambda name: rows[name]["two circles"] - rows[name]["circle"])]
    return {"heads": rows, "clearest": clearest,
            "planes": torch.stack([heads[h][0] for h in clearest])}

def show_pca(lab, found):
    table("PCA of heads' outputs: share of the plane, in %, that is a circle by logarithm",
          found["heads"], f"if there is one: far above its null, 95% of {NULLS} random orders")

def scatter(ax, plane, residue, p):
    """Points (n,), coloured by log residue times the frequency of the plane's circle; 0: black."""
    at, zero = torch.view_as_real(plane), residue == 0
    ax.scatter(*at[zero].T, c="black", s=8)
    logs, wave = g.powers(p).argsort()[residue[~zero] - 1], torch.zeros(p - 1, dtype=plane.dtype)
    # the circle's frequency k: that of the strongest wave in the points' sum by logarithm
    k = torch.fft.fft(wave.index_add(0, logs, plane[~zero]))[1:].abs().argmax() + 1
    return ax.scatter(*at[~zero].T, c=logs * k % (p - 1), cmap="hsv", s=8, vmin=0, vmax=p - 1)

def draw_pca(subplots, lab, found):
    (x, y), (one, two), (plane, double) = g.grid(lab.p).T, found["clearest"], found["planes"]
    few = torch.isin(x, g.powers(lab.p)[:3])                       # more would hide each other
    fig, axes = subplots(1, 2, figsize=(9, 4.2))
    for ax, title, points, residue in (
            (axes[0], f"head {one}; colour: x", plane.flatten(), x),
            (axes[1], f"head {two}, three x alone; colour: y", double.flatten()[few], y[few])):
        dots = scatter(ax, points, residue, lab.p)
        ax.set(title=title, aspect="equal", xlabel="first component", ylabel="second component")
    fig.colorbar(dots, ax=axes, label=f"log, base {g.powers(lab.p)[1]}, times frequency (black: 0)")
    return {"pca.png": fig}

# --------------------------------------------------------------- Fourier analysis of heads and MLPs
# Question: do heads and neurons compute in logarithms, and with how many frequencies?
# Method:   keep only the few strongest characters of each function of the query, and run on.
# If so:    few characters of the multiplicative group are enough to answer the ratio queries.
# If not:   it takes no fewer than by residue, the additive group, or in a random order.
#
# What the functions are: after one context, a neuron of an MLP or a coordinate of a head's output,
# at the query's y, is a real function f(x, y) of the query, and a sum of characters. To multiply x
# by a number turns each by a factor: with characters a model can multiply and divide. As f is real,
# a wave of frequency (k, l) is half that character, half its conjugate: they go in pairs.
def keep_characters(f, order, mask):
    """Functions f (n, p, p) with only those characters that mask (n, m, m) has, and the mean."""
    f, at = f.clone(), (..., order[:, None], order)
    mean = f[at].mean((-2, -1), keepdim=True)
    f[at] = mean + torch.fft.ifft2(torch.fft.fft2(f[at] - mean) * mask).real.to(f)
    return f

def strongest(f, order, n):
    """A mask of the n strongest pairs of characters, (N, m, m), by their mean power in functions f
    (contexts, N, p, p). A character that is its own conjugate is a pair by itself."""
    power, m = character_power(f, order, order).mean(0), len(order)
    index = torch.arange(m * m).view(m, m)
    partner = conjugate(index)                                   # where each one's conjugate is
    power = (power + conjugate(power)) * (index <= partner)      # one entry for a pair
    power[:, index == partner] /= 2
    best = power.flatten(1).topk(min(n, m * m), dim=1)
    mask = torch.zeros(len(power), m * m, dtype=torch.bool)
    mask = mask.scatter_(1, best.indices, best.values > 0).view_as(power)
    return mask | conjugate(mask)

def accuracy_with(lab, site, f, tokens, asked):
    """Accuracy on the queries asked (p*p,) if the site holds f (N, p, p) at the query's y."""
    tokens, at_y = tokens[asked], f.flatten(1).T[asked]                              # (n, N)
    said = run_with({sites(lab.model)[site]: put(at_y, -2)}, lambda: answers(lab, tokens))
    return (said[:, -1] == tokens[:, -1]).float().mean().item()

def measure_fourier(lab):
    """"kept": {"site, by order": {n: accuracy_with the n strongest pairs}}; "examples" (2, p, p):
    of heads' coordinates and of neurons that which is most nearly one wave of both x and y."""
    # Which characters are strong is seen in observe()'s contexts, and used in another one.
    tasks, inputs = contexts(lab, CONTEXTS + 1, lab.k // 2, SEED + 1)
    tokens, before, kept = query_grid(tasks[-1], inputs[-1], lab.p), observe(lab)[0], {}
    asked = (skill_of(tokens, lab.p)[:, -1] == 1) & (g.grid(lab.p) > 0).all(1)
    seen = record(sites(lab.model), lambda: answers(lab, tokens), slice(-2, -1))
    logarithm, random = orders(lab.p, 1)[:, 0]
    by = {"logarithm": logarithm, "residue": torch.arange(lab.p), "random order": random}
    for site, name in bar([*itertools.product(before, by)], "fourier"):
        f = seen[site][:, 0].T.unflatten(1, (lab.p, lab.p))                          # (N, p, p)
        kept[f"{site}, by {name}"] = {n: accuracy_with(lab, site, keep_characters(
            f, by[name], strongest(before[site], by[name], n)), tokens, asked) for n in KEPT}
        kept[f"{site}, by {name}"]["all"] = accuracy_with(lab, site, f, tokens, asked)
    order, examples = g.powers(lab.p), []
    for where in ("heads", "neurons"):
        f = torch.cat([f[0] for site, f in before.items() if site.startswith(where)])  # (N, p, p)
        power = character_power(f, order, order)
        for k in (0, len(order) // 2):             # constant, or merely alternating, in x or y
            power[:, k] = power[:, :, k] = 0
        examples.append(f[(power.amax((1, 2)) / f.var((1, 2)).clamp(min=1e-9)).argmax()])
    return {"kept": kept, "examples": torch.stack(examples), "queries": int(asked.sum())}

def show_fourier(lab, found):
    table("Accuracy on ratio queries, in %, with only so many pairs of characters of each function",
          found["kept"], f"at y, {found['queries']} queries; few are enough in the order that the "
          f"model uses; chance {100 / lab.p:.1f}")

def draw_fourier(subplots, lab, found):
    fig, axes = subplots(2, 4, figsize=(10, 5.2))
    for row, f, name in zip(axes, found["examples"], ("a head's coordinate", "an MLP neuron")):
        for i, (order, by) in enumerate(zip(orders(lab.p, 1),
                                            ("by logarithm", "in random order"))):
            image, spectrum = row[2 * i:2 * i + 2]
            power = torch.fft.fftshift(character_power(f, *order))       # frequency 0 in the middle
            share, half = 100 * power / power.sum(), len(power) // 2
            ordered = f[order[0][:, None], order[1]].T                           # (y, x)
            image.imshow(ordered.numpy(), origin="lower", cmap="RdBu_r")
            image.set(title=name, xlabel="x, " + by, ylabel="y, " + by, xticks=[], yticks=[])
            spectrum.imshow(share.T.numpy(), origin="lower", vmin=0, vmax=25, cmap="Greys",
                            extent=2 * (-half - 0.5, half - 0.5))
            spectrum.set(title=f"its spectrum; the largest: {share.max():.0f}%",
                         xlabel="frequency in x", ylabel="frequency in y")
    fig.suptitle("Functions of the query (x, y); by logarithm a diagonal is one ratio y/x")
    return {"fourier.png": fig}

# ------------------------------------------------------------------- Similarity by ratio (figure 7)
# Question: does a head write alike for inputs of one ratio y/x?
# Method:   cosine similarity of its outputs, pairs of equal ratio less pairs of unequal ratio.
# If so:    a gap near 1; 2 is the largest possible. Pairs that share x or y are left out.
# If not:   about the null, near 0.
def ratio_gap(similarity, apart, order_x, order_y):
    """Mean similarity (N, p*p, p*p) of inputs of equal ratio y/x less that of unequal ratio, (N,),
    over the pairs that are `apart`. Ratios are differences of places in the orders."""
    place_x, place_y = (F.pad(order.argsort(), (1, 0)) for order in (order_x, order_y))  # 0 unused
    x, y = g.grid(len(place_x)).T
    ratio = (place_y[y] - place_x[x]) % len(order_x)                                 # (p*p,)
    equal = ratio[:, None] == ratio
    means = [similarity[:, which & apart].mean(1) for which in (equal, ~equal)]
    return means[0] - means[1]

def measure_similarity(lab):
    """"gaps": {head and token: ratio_gap and its null}; "image": the clearest's similarity."""
    x, y = g.grid(lab.p).T
    apart = (x[:, None] != x) & (y[:, None] != y) & (x * y > 0) & (x * y > 0)[:, None]
    names, similarity = [], []
    for (head, token), outputs in observe(lab)[1].items():
        if token != "x":                                         # there y is not known yet
            v = F.normalize(outputs, dim=-1).flatten(1, 2)                           # (n, p*p, C)
            names.append(f"head {head} at {token}")
            similarity.append((v @ v.mT).mean(0))
    similarity = torch.stack(similarity)                                             # (N, p*p, p*p)
    gaps = against_null(lambda x, y: ratio_gap(similarity, apart, x, y)[:, None],
                        lab.p, names, ("gap",))
    clearest = max(names, key=lambda name: gaps[name]["gap"])
    return {"gaps": gaps, "clearest": clearest, "image": similarity[names.index(clearest)]}

def show_similarity(lab, found):
    table("Cosine similarity, inputs of equal ratio y/x less unequal", found["gaps"],
          "0: the ratio does not matter; 2 would be the most", scale=1, digits=2)

def draw_similarity(subplots, lab, found):
    x, ratio = g.powers(lab.p).repeat(lab.p - 1), g.powers(lab.p).repeat_interleave(lab.p - 1)
    inputs = x * lab.p + x * ratio % lab.p
    fig, ax = subplots(figsize=(5.6, 5))
    image = ax.imshow(found["image"][inputs][:, inputs].numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
    fig.colorbar(image, label="cosine similarity", shrink=0.8)
    ax.set(title=f"{found['clearest']}: inputs (x, y) sorted by log(y/x), then by log x")
    return {"similarity.png": fig}

# ------------------------------------- Circuit: two blocks, from end to end (not in the paper)
# Question: does a model with two blocks run this program? On each example and on the query divide x
#           by y, and on each example z by y. Fetch the z/y whose x/y is the query's. Times y. (Or
#           the same with x and y exchanged.)
# Method:   the last block reads the query's x/y by the inputs of its queries, the examples' x/y by
#           those of its keys, their z/y by those of its values. Put there what a *donor* has, a run
#           with another task and other multipliers. The fourth number, y at the end, is what is
#           left if all three are put into the donor.
# If so:    "follows": the answer is what the program says with the donor's number, near 100%.
#           "stays": it is as before with a donor that has the same number.
# If not:   one of the two is low, down to chance.
def circuit_contexts(lab, n):
    """What a context is made of: tasks (n, 2); of examples on different lines, and last of a query
    on the line of one of them, divisors (n, k) and ratios (n, k); which example that is (n,)."""
    generator, p = torch.Generator().manual_seed(SEED), lab.p
    k = min(lab.k, p - 1, 8)                                     # k - 1 examples and the query
    tasks = lab.split["test_ood"][(lab.split["test_ood"] > 0).all(1)]
    tasks = tasks[torch.randint(len(tasks), (n,), generator=generator)]
    divisor = torch.randint(1, p, (n, k), generator=generator)
    ratio = 1 + torch.rand(n, p - 1, generator=generator).argsort(1)[:, :k]
    example = torch.randint(k - 1, (n,), generator=generator)
    ratio[:, -1] = ratio[torch.arange(n), example]
    return (tasks, divisor, ratio), example

def quotient(tasks, ratio, p):
    """z over the divisor, of tasks (n, 2) at ratios (n, k): (n, k)."""
    return (tasks[:, :1] + tasks[:, 1:] * ratio) % p

def circuit_donors(context, example, p):
    """{number: (a donor in which it is another one, the program's answer with that one, a donor in
    which it is the same)}. A donor is a context with the tasks and divisors of another."""
    (tasks, divisor, ratio), each = context, torch.arange(len(example))
    other = other_tasks, other_divisors = tasks.roll(1, 0), divisor.roll(1, 0)
    examples, ours, neighbour = ratio[:, :-1], divisor[:, -1], (example + 1) % (ratio.size(1) - 1)
    z_over = quotient(tasks, ratio, p)                                               # (n, k)
    # Say that the query is on the line of example 2. Let it be on that of example 3:
    asks_neighbour = torch.cat((examples, examples[each, neighbour][:, None]), 1)
    there = z_over[each, neighbour] * ours % p
    # Or let each example have the line of the one before it: example 3 now has the query's.
    shifted = torch.cat((examples.roll(1, 1), ratio[:, -1:]), 1)
    # Lines on which the other task has our z over the divisor, and our divisor at the query.
    theirs = quotient(other_tasks, shifted, p)[each, example] * ours % p
    same_z = (z_over - other_tasks[:, :1]) * g.inverses(p)[other_tasks[:, 1:]] % p
    same_divisor = torch.cat((other_divisors[:, :-1], ours[:, None]), 1)
    their_divisor = other_divisors[:, -1]
    return {
        "ratio of the query": ((*other, asks_neighbour), there, (*other, ratio)),
        "ratios of the examples": ((*other, shifted), there, (*other, ratio)),
        "z over divisor": ((*other, shifted), theirs, (*other, same_z)),
        "divisor of the query": ((*other, asks_neighbour), z_over[:, -1] * their_divisor % p,
                                 (other_tasks, same_divisor, asks_neighbour))}

def circuit_tokens(context, divisor, p):
    """The sequences of a context, divisor being "x" or "y": tokens (n, 3k)."""
    tasks, scale, ratio = context
    inputs = torch.stack((scale, scale * ratio % p), dim=-1)                         # (n, k, 2)
    return g.to_tokens(*((tasks, inputs) if divisor == "x" else
                         (tasks.flip(-1), inputs.flip(-1))), p)

def with_numbers(lab, numbers, giver, taker):
    """The answers (n,) to the last queries of tokens `taker`, these numbers being from `giver`."""
    attention = lab.model.blocks[-1].attention
    places = {"ratio of the query": (attention.query, slice(-2, -1)),                # its y
              "ratios of the examples": (attention.key, slice(0, -3)),
              "z over divisor": (attention.value, slice(0, -3))}
    seen = record({n: places[n][0] for n in numbers}, lambda: answers(lab, giver))
    changes = {module: put(seen[n][:, at], at) for n in numbers for module, at in [places[n]]}
    return run_with(changes, lambda: answers(lab, taker))[:, -1]

def measure_circuit(lab):
    """For that "divisor", x or y, that fits better: "numbers" {number: {"follows", "stays"}}, and
    how many answers are right if "nothing" is exchanged."""
    (context, example), found = circuit_contexts(lab, 4 * SEQUENCES), []
    donors = circuit_donors(context, example, lab.p)
    *placed, last = donors                        # "divisor of the query" is the last
    for divisor in "xy":
        ours, rows = circuit_tokens(context, divisor, lab.p), {}
        for number, (differs, follows, shares) in donors.items():
            theirs = [circuit_tokens(donor, divisor, lab.p) for donor in (differs, shares)]
            # The last block reads the divisor nowhere: put our other numbers into the donor.
            said = [with_numbers(lab, placed, ours, tokens) if number == last else
                    with_numbers(lab, [number], tokens, ours) for tokens in theirs]
            rows[number] = {"follows": (said[0] == follows).float().mean().item(),
                            "stays": (said[1] == ours[:, -1]).float().mean().item()}
        right = answers(lab, ours)[:, -1] == ours[:, -1]
        found.append({"divisor": divisor, "numbers": rows, "nothing": right.float().mean().item()})
    return max(found, key=lambda f: sum(row["follows"] for row in f["numbers"].values()))

def show_circuit(lab, found):
    table(f"Answers, in %, with one number from another run; the divisor is {found['divisor']}",
          found["numbers"], "follows: as the program says with the donor's number; stays: if the "
          f"donor has the same one;\nunchanged, {100 * found['nothing']:.1f} are right; chance "
          f"{100 / lab.p:.1f}")

# ------------------------------- Votes: how deeper models combine examples (not in the paper)
# Question: how does a deeper model answer queries whose line no example is on? Does it know a sum
#           for some pairs of examples, by their *offsets*: their log(x/y) less the query's? Or
#           does it add up what all examples say of one *character* of a, its log mod d?
# Method:   ask after two examples alone; regress the logits on how far the examples agree; change
#           one example, or where heads look; exchange heads. Inputs are off the axes, except in
#           measure_zeros.
# If by pairs: the surest pair of the examples, alone, is right nearly as often as the model.
# If by all: no pair is right in over half, one character has over half of all weights, and
#           averaging each head's attention over the examples of one class changes nothing.
def at_offsets(lab, offsets, run=0):
    """Sequences of o.o.d. tasks, a query last: offsets (n, shots) -> tokens (n, 3 shots + 3). In
    another run each x/y is the same, but tasks are others, and so are the inputs' multipliers."""
    m, generator = lab.p - 1, torch.Generator().manual_seed(SEED)
    tasks = lab.split["test_ood"][(lab.split["test_ood"] > 0).all(1)]    # 0 has no logarithm
    offsets = F.pad(offsets, (0, 1))                                     # the query's own is 0
    log_ratio = torch.randint(m, (len(offsets), 1), generator=generator) - offsets
    if run:                                                  # run 0 goes on with the same numbers
        generator.manual_seed(SEED + run)
    log_x = torch.randint(m, offsets.shape, generator=generator)
    inputs = g.powers(lab.p)[torch.stack((log_x, log_x + log_ratio), dim=-1) % m]
    chosen = torch.randint(len(tasks), (len(offsets),), generator=generator)
    return g.to_tokens(tasks[chosen], inputs, lab.p)

def off_line(lab, shots, n, run=0):
    """at_offsets, n sequences of so many examples on different lines, none on the query's."""
    order = torch.rand(n, lab.p - 2, generator=torch.Generator().manual_seed(SEED)).argsort(1)
    return at_offsets(lab, 1 + order[:, :shots], run)

@torch.no_grad()
def centred_logits(lab, tokens):
    """Of each z at the last query of tokens (B, 3k + 3), less their mean: (B, p)."""
    logits = torch.cat([lab.model(t[:, :-1])[:, -1] for t in tokens.split(g.CHUNK)])
    return logits - logits.mean(1, keepdim=True)

# By pairs? Ask after two examples alone, at each pair of offsets; and see what heads fetch.

def accuracy_of_pairs(lab, pairs):
    """Of the model after two examples at these offsets, pairs (n, 2): (n,)."""
    tokens = at_offsets(lab, torch.cat((pairs, pairs.flip(1))).repeat(EACH_PAIR, 1))
    said = centred_logits(lab, tokens).argmax(1)
    return (said == tokens[:, -1]).float().view(2 * EACH_PAIR, len(pairs)).mean(0)

def attention_to_examples(lab, tokens):
    """Of each head, from the last query's y to each example's z: (B, heads, k)."""
    scores = record({i: block.attention.softmax for i, block in enumerate(lab.model.blocks)},
                    lambda: answers(lab, tokens))                                    # (B, H, T, T)
    return torch.cat([s.softmax(-1)[:, :, -2, 2:-1:3] for s in scores.values()], dim=1)

def attention_by_offset(lab):
    """The same by an example's offset, eight examples: (heads, p - 1)."""
    generator = torch.Generator().manual_seed(SEED)
    offsets = torch.randint(lab.p - 1, (16 * SEQUENCES, min(8, lab.k - 1)), generator=generator)
    is_at = F.one_hot(offsets, lab.p - 1).float()                          # (B, shots, p - 1)
    weights = attention_to_examples(lab, at_offsets(lab, offsets))
    return torch.einsum("bhs,bso->ho", weights, is_at) / is_at.sum((0, 1))

def by_two_heads(fetches, pairs):
    """Whether two different heads fetch pairs (n, 2): (n,). fetches (heads, p - 1) is 0 or 1."""
    one, other = fetches[:, pairs].movedim(-1, 0)                # who fetches either: (heads, n)
    different = ~torch.eye(len(fetches), dtype=torch.bool)[..., None]    # (heads, heads, 1)
    return (one[:, None] * other * different).sum((0, 1)) > 0

def measure_pairs(lab):
    """{"attention" (heads, p - 1), "pairs" (p - 1, p - 1): accuracy, "fetched": a table by whom,
    "heads": {head: offsets that it fetches}, "best": {pair: accuracy}, "solved": how many}."""
    m, attention = lab.p - 1, attention_by_offset(lab)
    even = attention[:, 1:].mean(1, keepdim=True)                # what a head has for any offset
    fetches = ((attention > FETCHED) & (attention > 2 * even)).float()
    pairs = torch.combinations(torch.arange(1, m))                                   # (n, 2)
    right, two = accuracy_of_pairs(lab, pairs), by_two_heads(fetches, pairs)
    solved = right > 0.5
    grid = torch.full((m, m), math.nan)
    grid[tuple(pairs.T)] = grid[tuple(pairs.flip(1).T)] = right
    fetched = {name: {"pairs": f"{which.sum()}", "solved": f"{solved[which].sum()}",
                      "expected": f"{(solved.float().mean() * which.sum()).item():.1f}"}
               for name, which in (("two heads", two), ("others", ~two))}
    heads = {head: " ".join(map(str, f.nonzero()[:, 0].tolist()))
             for head, f in zip(lab.heads, fetches) if f[1:].any()}
    best = right.argsort(descending=True)[:3]
    best = dict(zip(map(str, map(tuple, pairs[best].tolist())), right[best].tolist()))
    return {"attention": attention, "pairs": grid, "fetched": fetched, "heads": heads, "best": best,
            "solved": int(solved.sum())}

def measure_shots(lab):
    """{shots: accuracy of the "model", and of its "surest pair": it is asked after each pair of the
    examples alone, and the most probable answer counts; "same where wrong": the share of the
    model's mistakes that are this answer}."""
    rows = {}
    for shots in [n for n in (2, 3, 4, 6, 8, 12) if n < min(lab.k, lab.p - 1)]:
        tokens = off_line(lab, shots, 8 * SEQUENCES)
        xyz = tokens.unflatten(1, (-1, 3))                                   # (B, shots + 1, 3)
        after = torch.stack([centred_logits(lab, xyz[:, [i, j, -1]].flatten(1))
                             for i, j in itertools.combinations(range(shots), 2)])
        surest = after.softmax(-1).amax(0).argmax(1)             # (pairs, B, p) to (B,)
        said, right = centred_logits(lab, tokens).argmax(1), tokens[:, -1]
        rows[shots] = {name: hits.float().mean().item() for name, hits in (
            ("model", said == right), ("surest pair", surest == right),
            ("same where wrong", (said == surest)[said != right]))}
    return rows

# By one character? An example and an answer z imply a task (a, b), the one that gives both. A model
# that compares a character of a prefers answers for which the examples imply a of one class. So the
# logits follow how far they agree, and a changed example counts if its class changes.

def implied_tasks(tokens, p):
    """The task (a, b) that goes through an example and the last query of tokens (B, 3k + 3) if the
    query's answer is 0, 1, ..., p - 1: (B, k, p, 2). On the query's line there is no such task."""
    inverse = g.inverses(p)
    u, v, w = tokens[:, :-3].unflatten(1, (-1, 3)).unsqueeze(2).unbind(-1)           # (B, k, 1)
    x, y = tokens[:, None, None, -3], tokens[:, None, None, -2]                      # (B, 1, 1)
    z, scale = torch.arange(p), inverse[(u * y - v * x) % p]     # by Cramer's rule
    return torch.stack(((w * y - v * z) * scale, (u * z - w * x) * scale), dim=-1) % p

def characters(order):
    """chi_m(n) = exp(2 pi i m u / (p - 1)), u being the place of n in order (p - 1,), and 0 for
    n = 0: (p, (p - 1) / 2), for m = 1, 2, ...; the others are conjugates of these."""
    n = len(order)
    turns = order.argsort()[:, None] * torch.arange(1, n // 2 + 1) / n               # of 1, 2, ...
    return F.pad(torch.exp(2j * torch.pi * turns), (0, 0, 1, 0))

def agreement(values, chi):
    """How far the examples agree, |sum over them of chi|^2 / k, less the mean over the answers:
    values (B, k, p), chi (p, M) -> (B, p, M)."""
    squares = chi[values].sum(1).abs().square() / values.size(1)                     # (B, p, M)
    return squares - squares.mean(1, keepdim=True)

def regress(target, agreements):
    """Least squares of target (B, p) on agreements (B, p, M): (weights (M,), R^2)."""
    x, y = agreements.flatten(0, 1).double(), target.flatten().double()
    weights = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    return weights, 1 - ((y - x @ weights).square().sum() / y.square().sum()).item()

def measure_characters(lab):
    """After three examples, of that "component" of the task, a or b, that explains the answers
    better: the "weights" (M,) of the characters, "share" of the largest, "R^2" beside nulls."""
    tokens, order = off_line(lab, 3, 8 * SEQUENCES), g.powers(lab.p)
    target, chi = centred_logits(lab, tokens), characters(order)
    others = torch.cat((tokens[:, :-3].roll(1, 0), tokens[:, -3:]), dim=1)   # another's examples
    implied, foreign = (implied_tasks(t, lab.p) for t in (tokens, others))           # (B, k, p, 2)
    fits = [regress(target, agreement(implied[..., i], chi)) for i in (0, 1)]
    best = int(fits[1][1] > fits[0][1])
    random = [regress(target, agreement(implied[..., best], characters(o)))[1]
              for o in orders(lab.p, 20)[1:, 0]]
    weights = fits[best][0].clamp(min=0)
    return {"component": "ab"[best], "weights": fits[best][0],
            "share": (weights.max() / weights.sum()).item(), "R^2": {
                "a": fits[0][1], "b": fits[1][1], "random order": max(random),
                "other examples": regress(target, agreement(foreign[..., best], chi))[1]}}

# Do heads sort examples by it? Let x/y be s for the query and t for an example. The slope through
# them is the difference of their z/y over s - t. Attention can only average. But if a head looks at
# examples of one chi(s - t), it can add up what their z/y say about the class of the slope. At
# offset o t is s g^o, so that chi(s - t) = chi(s) chi(1 - g^o): it has to choose offsets.

def logs_of(lab, tokens):
    """The query's log(x/y), (B,), and the examples' offsets (B, k), of tokens (B, 3k + 3)."""
    log = F.pad(g.powers(lab.p).argsort(), (1, 0))
    x, y, _ = log[tokens].unflatten(1, (-1, 3)).unbind(-1)
    ratio = (x - y) % (lab.p - 1)                                                    # (B, k + 1)
    return ratio[:, -1], (ratio[:, :-1] - ratio[:, -1:]) % (lab.p - 1)

def excess_attention(lab):
    """From a query of each log(x/y) to an example at offset 1, 2, ..., by how much the mean
    attention exceeds its own mean over offsets: (heads, p - 1, p - 2), 0 where it is less."""
    m, tokens = lab.p - 1, off_line(lab, min(8, lab.k - 1, lab.p - 2), 64 * SEQUENCES)
    query, offsets = logs_of(lab, tokens)
    at = (query[:, None] * m + offsets).flatten()                # both as one index, (B k,)
    weights = attention_to_examples(lab, tokens).transpose(0, 1).flatten(1)          # (heads, B k)
    sums = torch.zeros(len(weights), m * m).index_add(1, at, weights)
    mean = sums / at.bincount(minlength=m * m).clamp(min=1)
    mean = mean.unflatten(1, (m, m))[:, :, 1:]                                  # (heads, m, m - 1)
    return (mean - mean.mean(-1, keepdim=True)).clamp(min=0)

def alike(excess, values):
    """How alike values (..., n) of n offsets, complex of length 1, are for two that a head looks at
    from one query: the mean cosine of their angle, a pair's weight being the product of its excess
    (heads, queries, n): (...). |sum of e v|^2 is the sum over all pairs, each with itself, too."""
    sums = torch.einsum("hqn,...n->...hq", excess + 0j, values).abs().square()
    itself = excess.square().sum(-1)
    return (sums - itself).sum((-2, -1)) / (excess.sum(-1).square() - itself).sum()

def averaged_in_classes(lab, tokens, classes):
    """The answers (B,) to the last queries if each head divides what it gives to the examples of
    one class, classes (B, k), evenly among them."""
    same = (classes[:, :, None] == classes[:, None]).float()
    mean = same / same.sum(-1, keepdim=True)                                         # (B, k, k)

    def average(scores):                                                             # (B, H, T, T)
        weights = scores.softmax(-1)
        of_examples = weights[:, :, -2, 2:-1:3]                                      # (B, H, k)
        weights[:, :, -2, 2:-1:3] = torch.einsum("bij,bhj->bhi", mean, of_examples)
        return weights.log()
    changes = {block.attention.softmax: average for block in lab.model.blocks}
    return run_with(changes, lambda: answers(lab, tokens))[:, -1]

def measure_sorting(lab):
    """"alike" (M,) of each character; "alike null": what the best one stays below in 95% of random
    orders of the offsets; "averaged": accuracy with attention "as it is", and averaged in the best
    one's "classes", if they are not of one offset each, and in those of ten "random orders"."""
    m, excess, powers = lab.p - 1, excess_attention(lab), g.powers(lab.p)
    of_offset = (1 - powers[1:]) % lab.p                         # 1 - g^o for o = 1, 2, ...
    chi = characters(powers)[of_offset].T                                            # (M, p - 2)
    draw = torch.rand(NULLS, m - 1, generator=torch.Generator().manual_seed(SEED)).argsort(-1)
    true, null = alike(excess, chi), alike(excess, chi[:, draw])                 # (M,), (M, NULLS)
    tokens, best = off_line(lab, min(12, lab.k - 1, m - 1), 8 * SEQUENCES), true.argmax() + 1
    right = {"as it is": answers(lab, tokens)[:, -1] == tokens[:, -1]}
    if math.gcd(best, m) > 1:
        # the angle of each chi(1 - g^o), as a whole number: offsets of one class have the same
        classes = F.pad(powers.argsort(), (1, 0))[of_offset] * best % m              # (p - 2,)
        at = logs_of(lab, tokens)[1] - 1
        said = [averaged_in_classes(lab, tokens, c[at]) for c in (classes, *classes[draw[:10]])]
        right["classes"] = said[0] == tokens[:, -1]
        right["random orders"] = torch.stack(said[1:]) == tokens[:, -1]
    return {"alike": true, "alike null": null.amax(0).quantile(0.95).item(),
            "averaged": {name: hits.float().mean().item() for name, hits in right.items()}}

def measure_labels(lab):
    """How often right answers stay if the z of one of four examples is changed, by whether the a,
    or b, that it implies keeps its class: {"log a mod d": {"kept", "changed"}, ...}."""
    p, tokens = lab.p, off_line(lab, 4, 32 * SEQUENCES)
    changed, generator = tokens.clone(), torch.Generator().manual_seed(SEED + 1)
    changed[:, 2] += torch.randint(1, p, (len(tokens),), generator=generator)
    changed[:, 2] %= p
    said, now = (centred_logits(lab, t).argmax(1) for t in (tokens, changed))
    rows, right, log = {}, said == tokens[:, -1], F.pad(g.powers(p).argsort(), (1, 0), value=-1)
    each = torch.arange(len(tokens))
    old, new = (implied_tasks(t, p)[each, 0, tokens[:, -1]] for t in (tokens, changed))  # (B, 2)
    for i, d in itertools.product((0, 1), (2, 3, 4)):
        if (p - 1) % d == 0:
            kept = (log[old[:, i]] % d == log[new[:, i]] % d) & (new[:, i] > 0)
            rows[f"log {'ab'[i]} mod {d}"] = {
                name: (now == said)[right & which].float().mean().item()
                for name, which in (("kept", kept), ("changed", ~kept))}
    return rows

# What do heads carry, and where does the model fail?

def measure_exchange(lab):
    """Replace a block's heads (then also its MLP's neurons) at the query's y by those of another
    run on the same x/y. How often is the answer the other's z/y times our y ("z/y"), the other's z
    ("z"), or unchanged ("stays")? Of what both runs answer right: {"heads 0": {...}, ...}."""
    ours, other = (off_line(lab, 4, 32 * SEQUENCES, run) for run in (0, 1))
    seen = record(sites(lab.model), lambda: answers(lab, other), slice(-2, -1))      # (B, 1, C)
    right = [answers(lab, tokens)[:, -1] == tokens[:, -1] for tokens in (ours, other)]
    wanted = {"z/y": other[:, -1] * g.inverses(lab.p)[other[:, -2]] * ours[:, -2] % lab.p,
              "z": other[:, -1], "stays": ours[:, -1]}
    rows = {}
    for block in range(lab.cfg.depth):
        for parts in (["heads"], ["heads", "neurons"]):
            changed = [f"{part} {block}" for part in parts]
            change = {sites(lab.model)[n]: put(seen[n], slice(-2, -1)) for n in changed}
            said = run_with(change, lambda: answers(lab, ours))[:, -1]
            rows[f"{' and '.join(parts)} {block}"] = {
                name: (said == answer)[right[0] & right[1]].float().mean().item()
                for name, answer in wanted.items()}
    return rows

def measure_zeros(lab):
    """{where the 0 is: accuracy on regression queries, second half of the sequence}."""
    n, k = 16 * SEQUENCES, lab.k
    tokens = g.eval_sequences(lab.split, "test_ood", n, k, lab.p, SEED)["test_ood_train"]
    right = torch.cat([answers(lab, t) for t in tokens.split(g.CHUNK)])
    asked = (skill_of(tokens, lab.p) == 2) & (torch.arange(k) >= k // 2)             # (n, k)
    tasks, xyz = lab.split["test_ood"], tokens.unflatten(1, (-1, 3))                 # (n, k, 3)
    a, b = (tasks[torch.arange(n) % len(tasks)] == 0).T[:, :, None]                  # (n, 1)
    x, y = (xyz[..., :2] == 0).unbind(-1)
    return {name: (right == xyz[..., 2])[asked & which].float().mean().item() for name, which in (
        ("nothing", ~(a | b | x | y)), ("a", a), ("b", b), ("x", x), ("y", y))}

def measure_votes(lab):
    """All of these together."""
    return measure_pairs(lab) | measure_characters(lab) | measure_sorting(lab) | {
        "shots": measure_shots(lab), "labels": measure_labels(lab),
        "exchange": measure_exchange(lab), "zeros": measure_zeros(lab)}

def show_votes(lab, found):
    n, pairs = lab.p - 1, [f"{pair} {100 * r:.0f}%" for pair, r in found["best"].items()]
    heads = [f"head {head}: {offsets}" for head, offsets in found["heads"].items()]
    table("Pairs of offsets that are solved, by who fetches the two", found["fetched"],
          "solved: right in over half after these two alone; expected: if it did not matter who\n"
          "fetches; fetch: over a tenth of a head's attention, twice its mean over offsets but 0"
          f"\n{found['solved']} pairs are solved; "
          f"{'; '.join(heads) or 'no head fetches'}; best: {', '.join(pairs)}")
    table("Accuracy by shots, in %: the model, and its answer to the surest pair of them alone",
          found["shots"], f"no example on the query's line; chance {100 / lab.p:.1f}; same where "
          "wrong: the share of the model's mistakes that are the surest pair's answer")
    table(f"Logits of the answers on the characters of {found['component']}: R^2, in %",
          {"three examples": found["R^2"]}, "random order: the best of 20; other examples: "
          "those of another context")
    columns = zip(found["weights"].tolist(), found["alike"].tolist())
    table("Characters: their weights in the logits, and whether heads sort examples by them",
          {f"m = {m}, order {n // math.gcd(m, n)}": dict(zip(("weight", "alike"), column))
           for m, column in enumerate(columns, 1)},
          f"the largest weight is {100 * found['share']:.0f}% of the positive ones; alike: 1 if "
          "all\nexamples that a head looks at from one query are of one class; null of the largest "
          f"{found['alike null']:.2f}", scale=1, digits=2)
    table("Accuracy with each head's attention averaged over the examples of one class, in %",
          {f"m = {found['alike'].argmax() + 1}": found["averaged"]}, "unharmed: of where an "
          "example is the model uses the class alone;\nrandom orders: ten other choices of classes")
    table("Right answers that stay if the z of one of four examples is changed, in %",
          found["labels"], "by whether the a, or b, that it implies keeps its class")
    table("A block's parts at the query's y from another run on the same x/y, in %",
          found["exchange"], "the answer is the other run's z/y times our y; the other run's z; or "
          "stays")
    table("Regression queries, by what is 0, in %", {"second half": found["zeros"]})

def draw_votes(subplots, lab, found):
    fig, (left, middle, right) = subplots(1, 3, figsize=(11, 3.3))
    image = left.imshow(100 * found["pairs"].numpy(), vmin=0, vmax=100, origin="lower")
    left.set(title="after two examples", xlabel="offset of one", ylabel="offset of the other")
    fig.colorbar(image, ax=left, label="accuracy (%)")
    image = middle.imshow(100 * found["attention"].numpy(), vmin=0, aspect="auto", cmap="Greys")
    middle.set(title="attention to an example", xlabel="its offset", ylabel="head",
               yticks=range(len(lab.heads)), yticklabels=lab.heads)
    fig.colorbar(image, ax=middle, label="mean over sequences (%)")
    for name, style in (("model", "o-"), ("surest pair", "s--")):
        right.plot([*found["shots"]], [100 * row[name] for row in found["shots"].values()], style,
                   label=name)
    right.set(title="after more examples", xlabel="shots", ylabel="accuracy (%)", ylim=(0, 104))
    right.legend()
    return {"votes.png": fig}

# ------------------------------------------------------------------------------------- Command line

SECTIONS = {                  # of each part, what measures, prints and draws it
    "skills": (measure_skills, show_skills, draw_skills),
    "attention": (measure_attention, show_attention, draw_attention),
    "pca": (measure_pca, show_pca, draw_pca),
    "fourier": (measure_fourier, show_fourier, draw_fourier),
    "similarity": (measure_similarity, show_similarity, draw_similarity),
    "circuit": (measure_circuit, show_circuit, None),
    "votes": (measure_votes, show_votes, draw_votes)}

def open_lab(path):
    """What every part needs: a model, its config, its split."""
    file = os.path.join(path, "best.pt") if os.path.isdir(path) else path
    checkpoint, cfg, model = g.load_checkpoint(file)
    with g.refusing(f"{file}: has no split, so that it isn't of grok_icl.py"):
        split = checkpoint["split"]
        nonzero = bool((split["test_ood"] > 0).all(1).any())
    possible = {"votes": cfg.p > 5 and cfg.examples > 4 and nonzero,
                "circuit": cfg.p > 3 and cfg.examples > 2 and nonzero and cfg.depth == 2}
    return SimpleNamespace(
        model=model, cfg=cfg, p=cfg.p, k=cfg.examples, observed=None,
        heads=[f"{i}.{h}" for i in range(cfg.depth) for h in range(cfg.heads)],
        parts=[part for part in SECTIONS if possible.get(part, True)], split=split)

def save(out, found):
    """{part: {name: value}} to out/analysis.json, the tensors among them to out/analysis.npz."""
    arrays = {f"{part}/{name}": value.numpy() for part, values in found.items()
              for name, value in values.items() if isinstance(value, torch.Tensor)}
    np.savez_compressed(buffer := io.BytesIO(), **arrays)
    g.write_file(os.path.join(out, "analysis.npz"), buffer.getbuffer())
    text = json.dumps(found, default=lambda tensor: "in analysis.npz")
    found = json.loads(text, parse_constant=lambda name: None)           # JSON has no NaN
    g.write_file(os.path.join(out, "analysis.json"), json.dumps(found, indent=1).encode())

def draw_pictures(draw, lab, found, out):
    """Write a part's PNGs to out; return their names. Their style is not the user's."""
    import matplotlib.style
    from matplotlib.figure import Figure                  # without pyplot, which needs a screen

    def subplots(*shape, figsize, **how):
        figure = Figure(figsize)
        return figure, figure.subplots(*shape, **how)
    style = ["default", {"font.size": 8, "figure.constrained_layout.use": True}]
    with matplotlib.style.context(style):
        figures = draw(subplots, lab, found)
        for name, figure in figures.items():
            figure.savefig(buffer := io.BytesIO(), format="png", dpi=100)
            g.write_file(os.path.join(out, name), buffer.getbuffer())
    return [*figures]

def analyze(lab, parts, out):
    """Measure, print, draw and save each part."""
    found, written, no_pictures = {}, ["analysis.json", "analysis.npz"], ""
    for part in parts:
        measure, show, draw = SECTIONS[part]
        found[part] = measure(lab)
        show(lab, found[part])
        save(out, found)                                 # after each: Ctrl-C loses only one
        try:
            written += draw_pictures(draw, lab, found[part], out) if draw else []
        except ImportError:
            no_pictures = "\nNo pictures: pip install matplotlib"
    print(f"{no_pictures}\nWrote {', '.join(written)} to {out}")

def main(argv=None):
    """Measure, print, draw. Returns the exit code; bad input is one line on stderr and code 2."""
    parser = g.Parser(allow_abbrev=False, usage="analyze.py RUN|FILE [part ...]")
    parser.add_argument("path", metavar="RUN|FILE", help="a run's folder or a checkpoint")
    parser.add_argument("parts", nargs="*", default=[], help=f"of {', '.join(SECTIONS)} [all]")
    parser.add_argument("--out", help="folder to write to [the run's; for FILE.pt FILE]")
    try:
        args = parser.parse_intermixed_args(argv)
        lab = open_lab(args.path)
        parts = args.parts or [part for part in lab.parts
                               if part != "votes" or lab.cfg.depth > 2]   # two don't combine
        for part in parts:
            if part not in lab.parts:
                raise g.BadInput(f"{part}: this model has {', '.join(lab.parts)} (votes: five "
                                 "examples, p above 5; circuit: two blocks)")
        out = args.out or (args.path if os.path.isdir(args.path) else
                           os.path.splitext(args.path)[0])
        with g.refusing(f"--out {out}: can't be written"):
            os.makedirs(out, exist_ok=True)
            tempfile.TemporaryFile(dir=out).close()
        analyze(lab, parts, out)
    except KeyboardInterrupt:
        return 130
    except g.BadInput as e:
        return g.complain(e)

if __name__ == "__main__":
    sys.exit(main())
