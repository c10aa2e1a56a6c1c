"""
Look inside a model that grok_icl.py trained: which algorithm did it learn, where, and in what code?

    python analyze.py out/RUN                    everything, for the run's best checkpoint
    python analyze.py assets/laptop.pt           the same for a single file
    python analyze.py out/RUN skills causal      some parts only
    python analyze.py phases out/SWEEP           many runs: which phase has which (tasks, alpha)

The second half of He, Doshi, Das, Gromov (NeurIPS 2024), with a number under every picture, and beside
it what chance, random order or an oracle would give:

    1. Probes          a context, followed by every possible query
    2. shots           accuracy over shots, beside what memory alone could do      (figure 1c)
    3. skills          Ratio Matching or Modular Regression?                       (figure 5)
    4. attention       where heads look: does the query find the example it needs? (figure 6)
    5. pca             circles in the heads' outputs                               (figures 1d, 1e, 6)
    6. fourier         characters of which group: additive or multiplicative?
    7. similarity      does a layer hold the ratio y/x?                            (figure 7)
    8. causal          ablations: which parts carry which skill? (not in the paper)
    9. curves, phases  training, and many trainings                                (figure 1b)
   10. Pictures, command line, main

Tasks are the *test* o.o.d. tasks, but in section 9: a run's metrics are of its validation tasks. What an
intervention needs first (a head's mean, a neuron's dominant frequencies) comes from the validation o.o.d.
tasks too. A finding names the largest of all heads or layers: read it against its table.
"""
import argparse
import csv
import hashlib
import io
import json
import os
import sys
import tempfile
import textwrap
import zipfile
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import grok_icl as g

SEED = 7                      # of the contexts and of all random relabellings
CONTEXTS = 8                  # over which the measures of sections 5 to 7 are averaged
QUERIES = 4096                # a shot of the skill table: as many contexts as make this many queries
SEQUENCES = 512               # of each set, for attention and ablations
RELABELLINGS = 1000           # random orders of the residues behind a circle's null
ONE_FREQUENCY = 0.5           # share of its variance from which a neuron counts as one-frequency
KEEP = 3                      # dominant frequency pairs that the causal test keeps or removes
SKILLS = ("copy", "ratio", "regression", "undetermined")
POSITIONS = {"xy": [0, 1], "xz": [0, 2], "yz": [1, 2]}          # of which a head's outputs are looked at together

# -------------------------------------------------------------------------------------------------
# 1. Probes
# -------------------------------------------------------------------------------------------------

def contexts(split, kind, n, examples, seed):
    """n contexts: tasks (n, 2) of that kind, in turn, and inputs (n, examples, 2) of the train inputs."""
    tasks, inputs = split[kind], split["train_inputs"]
    draw = torch.randint(len(inputs), (n, examples), generator=torch.Generator().manual_seed(seed))
    return tasks[torch.arange(n) % len(tasks)], inputs[draw]


def query_grid(task, inputs, p):
    """One context (its task (2,), its inputs (n, 2)) and then each of p*p queries: (p*p, 3n + 3)."""
    queries = g.grid(p)[:, None]                                                     # (p*p, 1, 2)
    inputs = torch.cat((inputs.expand(p * p, -1, -1), queries), dim=1)
    return g.to_tokens(task.expand(p * p, 2), inputs, p)


class Record(dict):
    """A record for GPT.forward that keeps keep(name, value) of what it is offered, unless None."""
    def __init__(self, keep):
        super().__init__()
        self.keep = keep

    def __setitem__(self, name, value):
        value = self.keep(name, value)
        if value is not None:
            super().__setitem__(name, value.cpu())


@torch.no_grad()
def activations(model, task, inputs, p):
    """
    What the model computes at the query's x, y and z, for every query after one context.

    A dict of "i.heads" (p, p, H, 3, D), "i.neurons" (p, p, 3, 4C), "i.residual" and "embedding" (p, p,
    3, C), indexed by the query's x, its y, and the position 0, 1, 2 of x, y, z.
    """
    record = Record(lambda name, value: None if "attention" in name else value[..., -3:, :])
    model(query_grid(task, inputs, p).to(model.cos.device), record, everywhere=True)
    return {name: value.unflatten(0, (p, p)) for name, value in record.items()}


def powers(base, p):
    """The non-zero residues in the order of their discrete logarithm: base**0, base**1, ..., (p - 1,)."""
    return torch.tensor([pow(base, k, p) for k in range(p - 1)])


def generators(p):
    """The residues whose powers are all non-zero residues."""
    return [base for base in range(2, p) if len(powers(base, p).unique()) == p - 1]


def relabelled(order, n, seed):
    """n random orders of the same residues: (n, len(order)). What a null compares with."""
    draw = torch.rand(n, len(order), generator=torch.Generator().manual_seed(seed))
    return order[draw.argsort(dim=1)]


def p_value(score, null):
    """Share of a null's scores that reach the measured one, itself counted among them; nan for nan."""
    return float("nan") if np.isnan(score) else (1 + sum(s >= score - 1e-9 for s in null)) / (1 + len(null))


def observed(lab):
    """The contexts of sections 5 to 7 and the activations after each, computed once."""
    if not hasattr(lab, "observed"):
        tasks, inputs = contexts(lab.split, "test_ood", CONTEXTS, lab.k - 1, SEED)
        lab.observed = tasks, [activations(lab.model, task, xy, lab.p) for task, xy in zip(tasks, inputs)]
    return lab.observed


def say(title, text=""):
    print(f"\n{title}\n{'-' * len(title)}" + (f"\n{text}" if text else ""))


def percent(values, width=7):
    """Fractions as columns of percentages, a dash where there is none."""
    return "".join(f"{'-':>{width}}" if v is None or np.isnan(v) else f"{100 * v:{width}.1f}" for v in values)

# -------------------------------------------------------------------------------------------------
# 2. Accuracy over shots, and three references (figure 1c)
# -------------------------------------------------------------------------------------------------

def memory_scores(tokens, tasks, p):
    """
    Expected score (B, k) of the exact Bayes posterior over the given tasks (n, 2), all equally likely.

    At each query it answers what most of the tasks say that fit all examples so far, and guesses
    between equals; if no task fits, between all residues. On i.d. tasks nothing does better; on
    o.o.d. tasks it shows how far one gets by remembering the pre-training tasks.
    """
    xy, z = tokens.unflatten(1, (-1, 3)).split([2, 1], dim=-1)                       # (B, k, 2), (B, k, 1)
    predicted = (xy.float() @ tasks.T.float()).long() % p                            # (B, k, n)
    fits = (predicted == z).long().cumprod(dim=1)                                    # with the query's own z
    fits = torch.cat((torch.ones_like(fits[:, :1]), fits[:, :-1]), dim=1)            # with those before it
    votes = torch.zeros(*z.shape[:2], p, dtype=torch.long, device=z.device).scatter_add_(2, predicted, fits)
    top = votes == votes.amax(-1, keepdim=True)                                      # (B, k, p)
    return top.gather(2, z).squeeze(2).double() / top.sum(-1)


def part_shots(lab):
    """Accuracy (%) on the four sets at every shot: model, both oracles, memory; all and novel queries."""
    sets = g.eval_sequences(lab.split, "test_ood", g.REPORT_SEQUENCES, lab.k, lab.p, lab.cfg.seed + 2)
    arrays, numbers = {}, {}
    for name, tokens in sets.items():
        tokens = tokens.to(lab.device)
        memory = torch.cat([memory_scores(t, lab.split["id"].to(lab.device), lab.p)
                            for t in tokens.split(g.CHUNK)])
        arrays[name] = torch.stack([g.evaluate(lab.model, tokens), *g.oracle_accuracy(tokens, lab.p),
                                    g.accuracy(memory, tokens)]).numpy()             # (4, 2, k)
        numbers[name] = {who: dict(zip(("all", "novel"), curve[:, -1].tolist()))
                         for who, curve in zip(("model", "ratio", "regression", "memory"), arrays[name])}
    say(f"Accuracy after {lab.k - 1} shots, in %",
        f"{'':28}{'all queries':^32}    {'novel queries':^32}\n{'':28}" +
        2 * "   model   ratio  regr. memory    ")
    for name, curve in arrays.items():
        kind, side = name.rsplit("_", 1)
        label = f"{'i.d.' if kind == 'id' else 'o.o.d.'} tasks, {side} inputs"
        print(f"{label:28}{percent(curve[:, 0, -1], 8)}    {percent(curve[:, 1, -1], 8)}")
    model, ratio, _, memory = arrays["test_ood_test"][:, 1, -1]
    return numbers, arrays, (
        f"On new tasks and novel new inputs the model has {100 * model:.0f}%, Ratio Matching {100 * ratio:.0f}%, memory of "
        f"the {len(lab.split['id'])} pre-training tasks {100 * memory:.0f}%; chance is {100 / lab.p:.0f}%.")

# -------------------------------------------------------------------------------------------------
# 3. Skills: what kind of query does the model answer? (figure 5)
# -------------------------------------------------------------------------------------------------

def skill_of(tokens, p):
    """
    The least skill that answers each query, (B, k), as an index into SKILLS.

    copy: the input is among the examples; ratio: an example lies on its line through the origin;
    regression: only a combination of examples gives it; undetermined: nothing does.
    """
    ratio, regression = g.solvable(tokens, p)
    skill = torch.where(ratio, 1, torch.where(regression, 2, 3))
    return torch.where(g.novel_queries(tokens), skill, 0)


def by_skill(hits, skill):
    """Accuracy on the queries of each skill (4,), nan where there are none. hits bool, skill of its shape."""
    asked = torch.bincount(skill.flatten(), minlength=4)
    return torch.bincount(skill[hits], minlength=4) / asked


def skill_errors(hits, skill, group):
    """
    Standard error of by_skill's accuracies (4,): hits and skill (contexts, queries), group (contexts,).

    Queries of one context go wrong together, and so do contexts of one task: what varies independently
    is the task, so the error is that of a ratio clustered by group (nan where only one has queries).
    """
    is_skill = torch.nn.functional.one_hot(skill, 4)                                 # (contexts, queries, 4)
    asked, right = (torch.zeros(int(group.max()) + 1, 4).double().index_add_(0, group, t.sum(1).double())
                    for t in (is_skill, is_skill * hits[..., None]))                 # (groups, 4)
    n = (asked > 0).sum(0)
    off = right - asked * right.sum(0) / asked.sum(0)
    return (off.square().sum(0) * n / (n - 1)).sqrt() / asked.sum(0)


def part_skills(lab):
    """Accuracy by skill and shot over o.o.d. tasks, contexts and all p*p queries; and one grid of figure 5."""
    p, shots = lab.p, [s for s in g.some_shots(lab.k) if s > 0]
    tasks, inputs = contexts(lab.split, "test_ood", max(2, QUERIES // p ** 2), lab.k - 1, SEED)
    is_test = torch.zeros(p, p, dtype=torch.bool)
    is_test[tuple(lab.split["test_inputs"].T)] = True
    hits, skills = [], []
    for s in tqdm(shots, "skills", leave=False):
        tokens = torch.cat([query_grid(task, xy[:s], p) for task, xy in zip(tasks, inputs)]).to(lab.device)
        hits.append(g.correct(lab.model, tokens)[:, -1].cpu())
        skills.append(torch.cat([skill_of(t, p)[:, -1] for t in tokens.split(g.CHUNK)]).cpu())
    hits, skills = (torch.stack(t).view(len(shots), -1, p * p) for t in (hits, skills))  # (S, contexts, p*p)
    test, group = is_test.flatten(), torch.arange(len(tasks)) % len(lab.split["test_ood"])
    arrays, numbers = {"shots": np.array(shots), "task": tasks[0].numpy(), "context": inputs[0].numpy(),
                       "right": hits[:, 0].view(-1, p, p).numpy(), "skill": skills[:, 0].view(-1, p, p).numpy()}, {}
    for side, chosen in (("all", torch.ones_like(test)), ("test", test)):
        table = torch.stack([by_skill(h[:, chosen], s[:, chosen]) for h, s in zip(hits, skills)])
        errors = torch.stack([skill_errors(h[:, chosen], s[:, chosen], group) for h, s in zip(hits, skills)])
        arrays[f"{side}_accuracy"], arrays[f"{side}_error"] = table.numpy(), errors.numpy()
        share = torch.stack([torch.bincount(s[:, chosen].flatten(), minlength=4) for s in skills]).double()
        arrays[f"{side}_share"] = (share / share.sum(1, keepdim=True)).numpy()
        numbers[side] = {str(s): {skill: {"accuracy": None if a.isnan() else a.item(), "share": r.item()}
                                  for skill, a, r in zip(SKILLS, row, shares)}
                         for s, row, shares in zip(shots, table, torch.tensor(arrays[f"{side}_share"]))}
    say("Skills: accuracy in % (and share of the queries) by what it takes to answer",
        f"{len(tasks)} contexts of train inputs, {group.max() + 1} o.o.d. tasks, then all {p * p} queries; chance is "
        f"{100 / p:.1f}; ±: standard error over tasks")
    for side, title in (("all", "all inputs as queries"), ("test", "test inputs as queries")):
        print(f"{title:23}" + "".join(f"{skill:>19}" for skill in SKILLS))
        for s, row, error, share in zip(shots, *(arrays[f"{side}_{a}"] for a in ("accuracy", "error", "share"))):
            print(f"{s:7d} shot{'s' if s > 1 else ' '}          " + "".join(
                f"{'-':>19}" if np.isnan(a) else f"{100 * a:6.1f} ±{100 * e:4.1f} ({100 * w:3.0f}%)"
                for a, e, w in zip(row, error, share)))
    accuracy, error, share = (arrays[f"all_{a}"] for a in ("accuracy", "error", "share"))
    many = np.where(share[:, 2] > 0.01, accuracy[:, 2], -1).argmax()                 # of enough queries to tell
    finding = (f"Of what Ratio Matching can answer, {100 * accuracy[0, 1]:.0f}% are right after {shots[0]} shot and "
               f"{100 * accuracy[-1, 1]:.0f}% after {shots[-1]}; chance is {100 / p:.0f}%.")
    if share[many, 2] > 0.01:
        finding += (f" Of what only Modular Regression can, {100 * accuracy[many, 2]:.0f} ± {100 * error[many, 2]:.0f}% "
                    f"at best ({shots[many]} shots).")
    return numbers, arrays, finding

# -------------------------------------------------------------------------------------------------
# 4. Attention (figure 6)
# -------------------------------------------------------------------------------------------------

def attention_masses(weights, tokens, p):
    """
    Where each head looks when it asks at the y of a query: weights there (B, H, k, 3k) -> dict of (H,).

    "own x", "own y", "earlier x", "earlier y", "earlier z" are shares of the attention, averaged over
    the queries that count: novel ones of which some, not all, earlier examples lie on the query's line.
    "on the line" is the attention to those examples, as a multiple of what it would be if the head
    spread its attention on earlier examples evenly over them: 1 means that it takes no notice.
    """
    xy = tokens.unflatten(1, (-1, 3))[..., :2]                                       # (B, k, 2)
    B, k, _ = xy.shape
    line = g.line_of(xy.flatten(0, 1), p).view(B, k)
    line[(xy == 0).all(-1)] = -1                                                     # the origin is on none
    same = ((line[:, :, None] == line[:, None]) & (line[:, :, None] >= 0)).tril(-1)  # (B, query, example)
    earlier = torch.arange(k, device=tokens.device)
    counts = g.novel_queries(tokens) & (same.sum(-1) > 0) & (same.sum(-1) < earlier)  # (B, k)
    at_y = weights.unflatten(-1, (k, 3))                                             # (B, H, k, k, 3)
    own = at_y.diagonal(dim1=2, dim2=3).permute(0, 3, 1, 2)                          # (B, k, H, 3)
    before = at_y * torch.ones(k, k, device=tokens.device).tril(-1)[..., None]       # earlier examples only
    by_role = before.sum(3).permute(0, 2, 1, 3)                                      # (B, k, H, 3)
    on_line = (before.sum(-1) * same[:, None]).sum(-1).permute(0, 2, 1)              # (B, k, H)
    even = by_role.sum(-1) * (same.sum(-1) / earlier.clamp(min=1))[..., None]
    masses = {"own x": own[..., 0], "own y": own[..., 1], "earlier x": by_role[..., 0],
              "earlier y": by_role[..., 1], "earlier z": by_role[..., 2]}
    masses = {name: mass[counts].mean(0) for name, mass in masses.items()}
    masses["on the line"] = on_line[counts].sum(0) / even[counts].sum(0)
    return masses


@torch.no_grad()
def part_attention(lab):
    """Attention masses of every head on o.o.d. tasks, and mean maps and one sequence's, first five examples."""
    sets = g.eval_sequences(lab.split, "test_ood", SEQUENCES, lab.k, lab.p, SEED)
    tokens = torch.cat([sets["test_ood_train"], sets["test_ood_test"]]).to(lab.device)
    at_y, maps = [], []
    for t in tqdm(tokens.split(64), "attention", leave=False):
        record = Record(lambda name, value: value if "attention" in name else None)
        lab.model(t, record, everywhere=True)
        weights = torch.stack([record[f"{i}.attention"] for i in lab.blocks])        # (L, B, H, 3k, 3k)
        at_y.append(weights[..., 1::3, :])
        maps.append(weights[..., :15, :15])
    maps = torch.cat(maps, dim=1)
    masses = [attention_masses(w, tokens.cpu(), lab.p) for w in torch.cat(at_y, dim=1)]
    arrays = {"mean": maps.mean(1).numpy(), "one": maps[:, 0].numpy(), "tokens": tokens[0, :15].cpu().numpy()}
    numbers = {}
    say("Attention at a query's y: share of it, in %, and attention to the examples on the query's line",
        f"{'head':6}" + "".join(f"{name:>11}" for name in ("own x", "own y", "earlier x", "earlier y", "earlier z"))
        + "   on the line (1.0: even)")
    for i in lab.blocks:
        for h in range(lab.cfg.heads):
            row = {name: mass[h].item() for name, mass in masses[i].items()}
            numbers[f"{i}.{h}"] = row
            print(f"{i}.{h:<4}" + percent(list(row.values())[:5], 11) + f"{row['on the line']:14.2f}")
    best = max(numbers, key=lambda h: np.nan_to_num(numbers[h]["on the line"]))
    row = numbers[best]
    return numbers, arrays, "No query to tell: too few shots." if np.isnan(row["on the line"]) else (
        f"Head {best} gives the examples on the query's line {row['on the line']:.1f} times the attention of an even "
        f"spread over examples (to which goes {100 * sum(row[f'earlier {r}'] for r in 'xyz'):.0f}% of its attention).")

# -------------------------------------------------------------------------------------------------
# 5. PCA of heads, and whether a circle is one (figures 1d, 1e, 6)
# -------------------------------------------------------------------------------------------------

def pca(points):
    """Points (n, d) -> their coordinates (n, min(n, d)) on principal axes, and each axis's share of variance."""
    points = points.double() - points.double().mean(0)
    u, s, _ = torch.linalg.svd(points, full_matrices=False)
    return u * s, s.square() / s.square().sum()


def circularity(plane, order, order_y=None):
    """
    How much of the variance of points in a plane is one circle, run through in the given order.

    plane is complex (p, p), a point for each (x, y); order (..., m) lists residues, x's and (unless
    order_y is given) y's. A circle means the point c * exp(2 pi i (k u + l v) / m) for the u-th x and
    v-th y, so its share of the variance is a Fourier coefficient's: 1 for a circle (or several on top
    of each other), less for an ellipse or uneven steps, at most 1/2 for points on a line. The characters
    that are real, and so run to and fro on a line, don't count. Returns (share of the best circle (...,),
    its (k, l)).
    """
    m = order.size(-1)
    order_y = order if order_y is None else order_y
    ordered = plane[order[..., :, None], order_y[..., None, :]]                      # (..., m, m)
    power = torch.fft.fft2(ordered, norm="forward").abs().square().flatten(-2)
    power[..., 0] = 0                                                                # the mean
    k = torch.arange(m)
    real = ((2 * k % m == 0)[:, None] & (2 * k % m == 0)).flatten()
    share, best = (power * ~real / power.sum(-1, keepdim=True).clamp(min=1e-30)).max(-1)
    return share, torch.stack((best // m, best % m), dim=-1)


def part_pca(lab):
    """PCA of each head's output over all inputs, context fixed, and the circle's share with its null."""
    _, seen = observed(lab)
    nulls = {group: [relabelled(order, RELABELLINGS, SEED + i) for i in (0, 1)] for group, order in lab.orders.items()}
    numbers, arrays = {}, {}
    for i in lab.blocks:
        for h in tqdm(range(lab.cfg.heads), f"pca, block {i}", leave=False):
            for where, at in POSITIONS.items():
                planes, shares = [], []
                for record in seen:
                    scores, share = pca(record[f"{i}.heads"][:, :, h][:, :, at].flatten(0, 1).flatten(1))
                    planes.append(torch.complex(scores[:, 0], scores[:, 1]).view(lab.p, lab.p))
                    shares.append(share)
                row = {"variance 2": np.mean([s[:2].sum().item() for s in shares]),
                       "variance 4": np.mean([s[:4].sum().item() for s in shares])}
                for group, order in lab.orders.items():
                    score = np.mean([circularity(c, order)[0].item() for c in planes])
                    null = torch.stack([circularity(c, *nulls[group])[0] for c in planes]).mean(0)
                    row[group] = {"circle": score, "null 95%": null.quantile(0.95).item(),
                                  "p": p_value(score, null.tolist()), "frequency": circularity(planes[0], order)[1].tolist()}
                numbers[f"{i}.{h} {where}"] = row
                arrays[f"{i}.{h} {where}"] = torch.view_as_real(planes[0]).numpy()
    say("PCA of the heads' outputs over all inputs: variance explained (%), share of one circle (%)",
        f"positions x and y; null: 95% of {RELABELLINGS} random orders of the residues; mean of {CONTEXTS} contexts\n"
        f"{'':8}{'variance of':^16}{'circle by logarithm':^28}{'circle by residue':^28}\n"
        f"head      2 PCs  4 PCs  " + 2 * "   share    null       p    ")
    for name, row in numbers.items():
        if name.endswith("xy"):
            print(f"{name[:-3]:6}" + percent([row["variance 2"], row["variance 4"]], 8) + "  " + "".join(
                percent([row[group]["circle"], row[group]["null 95%"]], 8) + f"{row[group]['p']:8.3f}    "
                for group in ("multiplicative", "additive")))
    below = {group: sum(row[group]["p"] <= 0.05 for row in numbers.values()) for group in lab.orders}
    best = max((name for name in numbers if name.endswith("xy")),
               key=lambda name: numbers[name]["multiplicative"]["circle"] - numbers[name]["multiplicative"]["null 95%"])
    row = numbers[best]["multiplicative"]
    circle = (f"a circle in the order of the logarithm is {100 * row['circle']:.0f}% of the variance in the plane of head "
              f"{best[:-3]} (95% of the null: {100 * row['null 95%']:.0f}%)")
    finding = (f"{'Furthest above its null: ' if row['circle'] > row['null 95%'] else 'No circle above its null; nearest: '}"
               f"{circle}. Of {len(numbers)} (head, positions), p is at most 0.05 for {below['multiplicative']} by logarithm "
               f"and for {below['additive']} by residue; {0.05 * len(numbers):.1f} would be by chance.")
    numbers["best"] = best
    return numbers, arrays, finding

# -------------------------------------------------------------------------------------------------
# 6. Fourier: one character, of which group?
# -------------------------------------------------------------------------------------------------

def multiplicity(m):
    """How many characters of Z_m x Z_m each entry of a folded spectrum stands for, (m, m): 0, 1 or 2."""
    k = torch.arange(m)
    mine, partner = k[:, None] * m + k, (-k[:, None] % m) * m + -k % m
    count = torch.where(mine < partner, 2, torch.where(mine == partner, 1, 0))
    count[0, 0] = 0                                                                  # the mean
    return count


def spectrum(f, order, order_y=None):
    """
    Power of functions on Z_p x Z_p at every character, folded: f (p, p, n) -> (m, m, n).

    order (m,) lists the residues of the group in the order of the group: 0 ... p-1 for the additive
    group, base**0, base**1, ... for the multiplicative one (which leaves out 0). The characters are
    exp(2 pi i (k u + l v) / m), u and v the places of x and y in it. A real function has equal power
    at (k, l) and (-k, -l): their sum stands at one of the two, 0 at the other, and at the mean.
    By Parseval, the sum over (k, l) is the variance over the group.
    """
    f = f[order][:, order if order_y is None else order_y]
    power = torch.fft.fft2(f.double(), dim=(0, 1), norm="forward").abs().square()
    return power * multiplicity(len(order))[..., None]


def dominant(power):
    """The strongest frequency pair of each function: power (m, m, n) -> share (n,) and (k, l) (n, 2)."""
    m = len(power)
    share, best = (power.flatten(0, 1) / power.sum((0, 1)).clamp(min=1e-30)).max(0)
    return share, torch.stack((best // m, best % m), dim=-1)


def signed(frequency, m):
    """(k, l) mod m with values around zero, as text."""
    return "({}, {})".format(*((k + m // 2) % m - m // 2 if 2 * k != m else k for k in frequency))


def directions(power):
    """Shares of the power that depend on x alone, y alone, the ratio y/x (or difference) alone, and the rest."""
    m = len(power)
    k = torch.arange(m)
    total = power.sum().clamp(min=1e-30)
    ratio = power[k, -k % m].sum()
    x, y = power[:, 0].sum(), power[0, :].sum()
    return [(part / total).item() for part in (x, y, ratio, (total - x - y - ratio).clamp(min=0))]


def group_summary(fs, order, null_orders, parts=None):
    """
    Fourier summary of functions in one group: fs, a list over contexts of (p, p, n).

    Their powers are averaged over contexts. The null repeats it with x and y each in a random order
    (null_orders, two tensors (R, m)), which keeps what depends on x alone, y alone or both, and
    destroys all arithmetic. "as a whole": each of so many equal parts of the n as one object (a head).
    Returns (a dict of numbers, power (m, m, n), share of the strongest pair (n,), nan where dead).
    """
    def of(orders):
        power = sum(spectrum(f, *orders) for f in fs) / len(fs)
        return power, dominant(power), parts and dominant(power.unflatten(-1, (parts, -1)).sum(-1))
    power, (share, frequency), whole = of([order])
    alive = power.sum((0, 1)) > 1e-6 * power.sum((0, 1)).max()
    null, null_whole = zip(*(of(pair)[1:] for pair in zip(*null_orders)))
    null = [s for s, _ in null]
    counts = [(s[alive] >= ONE_FREQUENCY).sum().item() for s in null]
    count = (share[alive] >= ONE_FREQUENCY).sum().item()
    medians = [s[alive].median().item() for s in null]
    found, times = frequency[alive & (share >= ONE_FREQUENCY)].unique(dim=0, return_counts=True)
    return {"n": alive.numel(), "alive": alive.sum().item(), "one-frequency": count, "null one-frequency": counts,
            "p": p_value(count, counts), "median share": share[alive].median().item(),
            "null median share": medians, "p median": p_value(share[alive].median().item(), medians),
            "directions": directions(power.sum(-1)),
            "as a whole": [{"share": s.item(), "frequency": signed(f.tolist(), len(order)),
                            "null 95%": q.quantile(0.95).item(), "p": p_value(s.item(), q.tolist())}
                           for s, f, q in zip(*whole, torch.stack([s for s, _ in null_whole]).T)] if parts else [],
            "top": sorted(((signed(f, len(order)), n) for f, n in zip(found.tolist(), times.tolist())),
                          key=lambda pair: -pair[1])[:4]}, power, share.where(alive, torch.nan)


def part_fourier(lab):
    """Spectra of embedding, heads and neurons at the query's y, in both groups, with their nulls."""
    _, seen = observed(lab)
    embedding = lab.model.embedding.weight.detach().cpu()[:, None].expand(-1, lab.p, -1)
    parts = {"embedding": [embedding]}
    for i in lab.blocks:
        parts[f"{i}.heads"] = [record[f"{i}.heads"][..., 1, :].flatten(2) for record in seen]
        parts[f"{i}.neurons"] = [record[f"{i}.neurons"][..., 1, :] for record in seen]
    n = max(20, 100 * 49 // lab.p ** 2)                       # relabellings: fewer where each is dear
    numbers, arrays = {}, {}
    for name, fs in tqdm(parts.items(), "fourier", leave=False):
        numbers[name] = {}
        for group, order in lab.orders.items():
            nulls = [relabelled(order, n, SEED + i) for i in (0, 1)]
            wholes = {"heads": lab.cfg.heads, "embedding": 1}.get(name.split(".")[-1])
            row, power, share = group_summary(fs, order, nulls, wholes)
            numbers[name][group] = row
            arrays[f"{name} {group} power"], arrays[f"{name} {group} share"] = power.mean(-1).numpy(), share.numpy()
    say("Fourier: which group's characters are the activations at the query's y made of?",
        f"one: functions with {ONE_FREQUENCY:.0%} of their variance at one frequency pair; null: the same, mean (and highest)\n"
        f"of {n} random orders of the residues; then the layer's power (%) in x alone, y alone, y/x (y-x) alone, mixed\n"
        f"{'layer':12}{'group':16}{'alive':>9}{'one':>6}{'null':>12}{'p':>7}{'x':>7}{'y':>7}{'ratio':>7}{'mixed':>7}  frequencies")
    for name, groups in numbers.items():
        for group, row in groups.items():
            null = row["null one-frequency"]
            print(f"{name:12}{group:16}{row['alive']:5d}/{row['n']:<4d}{row['one-frequency']:5d}"
                  f"{np.mean(null):7.1f} ({max(null)})".ljust(50) + f"{row['p']:7.2f}" + percent(row["directions"])
                  + "  " + " ".join(f"{f}:{c}" for f, c in row["top"]))
    print(f"\nstrongest pair of each head as a whole, % of its variance (95% of the null)\n{'':12}{'multiplicative':34}additive")
    for name, groups in numbers.items():
        for h in range(len(groups["additive"]["as a whole"])):
            cells = [groups[group]["as a whole"][h] for group in ("multiplicative", "additive")]
            print(f"{name.replace('.heads', f'.{h}'):12}" + "".join(
                f"{c['frequency']:>9}{100 * c['share']:6.1f} ({100 * c['null 95%']:4.1f}), p {c['p']:.2f}    " for c in cells))
    there = {group: [name for name in numbers if name.endswith("neurons") and numbers[name][group]["p"] <= 0.05]
             for group in lab.orders}
    return numbers, arrays, "More one-frequency neurons than random orders of the residues give (p at most 0.05): " + "; ".join(
        f"{group}, {', '.join(names) if names else 'in no layer'}" for group, names in there.items()) + "."

# -------------------------------------------------------------------------------------------------
# 7. Cosine similarity (figure 7)
# -------------------------------------------------------------------------------------------------

def ratio_gap(similarity, p, z=None, rename=None):
    """
    Mean similarity of inputs with equal ratio y/x minus that of inputs with unequal ratio.

    similarity (p*p, p*p). Pairs that share x or y (or z (p*p,), if given) are left out, as are inputs
    with a zero: they are alike for other reasons. rename (p,) gives each x another name, for the null.
    """
    x, y = g.grid(p).T
    nonzero = (x > 0) & (y > 0)
    line = g.line_of(torch.stack((x if rename is None else rename[x], y), -1), p)
    apart = (x[:, None] != x) & (y[:, None] != y) & nonzero[:, None] & nonzero
    if z is not None:
        apart &= z[:, None] != z
    equal = line[:, None] == line
    return (similarity[apart & equal].mean() - similarity[apart & ~equal].mean()).item()


def part_similarity(lab):
    """Cosine similarity of each block's residual stream between all pairs of queries, at y and at z."""
    tasks, seen = observed(lab)
    nonzero = lab.orders["additive"][1:]
    n = 200 if lab.p < 13 else 20
    renames = torch.cat((torch.zeros(n, 1, dtype=torch.long), relabelled(nonzero, n, SEED)), 1)    # 0 keeps its name
    zs = (tasks[:, None] * g.grid(lab.p)).sum(-1) % lab.p                            # (contexts, p*p)
    numbers, arrays = {}, {}
    for i in lab.blocks:
        for position, name in ((1, "y"), (2, "z")):
            x = torch.stack([record[f"{i}.residual"][..., position, :].flatten(0, 1) for record in seen])
            x = x / x.norm(dim=-1, keepdim=True)
            similar = x @ x.mT                                                       # (contexts, p*p, p*p)
            gap, *null = [np.mean([ratio_gap(s, lab.p, z if name == "z" else None, r) for s, z in zip(similar, zs)])
                          for r in (None, *renames)]
            similar = similar.mean(0)
            numbers[f"{i} {name}"] = {"gap": gap, "null 95%": float(np.quantile(null, 0.95)), "p": p_value(gap, null)}
            arrays[f"{i} {name}"] = similar.numpy()
    say("Cosine similarity of the residual stream: inputs of equal ratio y/x minus unequal",
        f"null: 95% of {len(renames)} random renamings of the residues x\n{'after block':14}{'at y':>8}{'null':>8}{'p':>8}"
        f"{'at z':>12}{'null':>8}{'p':>8}")
    for i in lab.blocks:
        print(f"{i:<14d}" + "    ".join(f"{r['gap']:8.3f}{r['null 95%']:8.3f}{r['p']:8.3f}"
                                        for r in (numbers[f"{i} y"], numbers[f"{i} z"])))
    best = max(numbers, key=lambda name: np.nan_to_num(numbers[name]["gap"] - numbers[name]["null 95%"], nan=-9))
    row = numbers[best]
    return numbers, arrays, "Too few residues to tell." if np.isnan(row["gap"]) else (
        f"The ratio y/x shows {'most' if row['gap'] > row['null 95%'] else 'nowhere; nearest'} after block "
        f"{best.replace(' ', ', at ')}: inputs of equal ratio are more alike by {row['gap']:.2f} (95% of the null: "
        f"{row['null 95%']:.2f}).")

# -------------------------------------------------------------------------------------------------
# 8. Causal tests: take a part away, and see which skill goes with it (not in the paper)
# -------------------------------------------------------------------------------------------------

@contextmanager
def changed(module, change):
    """Within, the module reads change(x) where it would have read x."""
    handle = module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def sites(model, cfg):
    """What can be taken away: name -> (the matrix that reads it, which of its inputs)."""
    width, named = cfg.embd // cfg.heads, {}
    for i, block in enumerate(model.blocks):
        named |= {f"head {i}.{h}": (block.attention.out, slice(h * width, (h + 1) * width))
                  for h in range(cfg.heads)}
        named[f"MLP {i}"] = (block.mlp.down, slice(None))
    return named


@torch.no_grad()
def mean_inputs(model, modules, tokens):
    """The mean over sequences of what each module reads, position by position: {module: (Q, width)}."""
    means = {}
    for module in set(modules):
        total = []
        def add(x):
            total.append(x.sum(0))
            return x
        with changed(module, add):
            g.correct(model, tokens)
        means[module] = sum(total) / len(tokens)
    return means


def ablated(model, site, means, tokens):
    """correct() with one site's output held at its mean."""
    module, part = site

    def hold(x):
        x = x.clone()
        x[..., part] = means[module][:, part]
        return x
    with changed(module, hold):
        return g.correct(model, tokens)


def keep_frequencies(f, order, mask):
    """
    f (..., p, p, n) with only those characters of the group that mask (m, m, n) says, and the mean.

    mask is folded as in spectrum. Where the group has no 0, x = 0 and y = 0 stay as they are.
    """
    k = torch.arange(len(order))
    both = mask | mask[-k % len(order)][:, -k % len(order)]
    both[0, 0] = True
    rows, columns = order[:, None], order
    F = torch.fft.fft2(f[..., rows, columns, :], dim=(-3, -2)) * both.to(f.device)
    f = f.clone()
    f[..., rows, columns, :] = torch.fft.ifft2(F, dim=(-3, -2)).real
    return f


def strongest(power, n):
    """Mask (m, m, functions) of each function's n strongest entries of a folded spectrum."""
    flat = power.flatten(0, 1)
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(0, flat.topk(n, dim=0).indices, True).view(power.shape)


def part_causal(lab):
    """Accuracy by skill with each head and MLP held at its mean; and with frequencies kept or removed."""
    def sequences(kind):
        sets = g.eval_sequences(lab.split, kind, SEQUENCES, lab.k, lab.p, SEED)
        return {side: sets[f"{kind}_{side}"].to(lab.device) for side in ("train", "test")}
    tested, skills = sequences("test_ood"), {}
    for side, tokens in tested.items():
        skills[side] = skill_of(tokens, lab.p)
        skills[side][:, 0] = 3                                # nothing to take from at no shots
    named = sites(lab.model, lab.cfg)
    means = mean_inputs(lab.model, [module for module, _ in named.values()], torch.cat(list(sequences("val_ood").values())))
    columns = [("train", 0), ("train", 1), ("train", 2), ("test", 1), ("test", 2)]

    def row(hits):
        scores = {side: by_skill(hits(tokens), skills[side]) for side, tokens in tested.items()}
        return {f"{SKILLS[s]}, {side} inputs": scores[side][s].item() for side, s in columns}
    numbers = {"nothing": row(lambda tokens: g.correct(lab.model, tokens))}
    for name, site in tqdm(named.items(), "ablations", leave=False):
        numbers[name] = row(lambda tokens: ablated(lab.model, site, means, tokens))
    say("Ablation: accuracy in % by skill, over all shots, with one part held at its mean",
        f"{'':10}{'train inputs':^34}{'test inputs':^24}\nwithout   " +
        "".join(f"{SKILLS[s]:>11}" for _, s in columns))
    for name, r in numbers.items():
        print(f"{name:10}" + percent(r.values(), 11))
    print("queries   " + "".join(f"{(skills[side] == s).sum().item():11,d}" for side, s in columns))
    finding = []
    for column in ("ratio, train inputs", "ratio, test inputs", "regression, train inputs"):
        whole = numbers["nothing"][column]
        if np.isnan(whole):
            continue
        worst = sorted(named, key=lambda name: numbers[name][column])[:3]
        finding.append(f"{column}: {100 * whole:.0f}%" + (
            ", about chance: nothing to take away" if whole < 1 / lab.p + 0.05 else "; without " + ", ".join(
                f"{name} {100 * numbers[name][column]:.0f}%" for name in worst)))
    frequencies = frequency_tests(lab)
    for name, row in frequencies.items():
        if name != "unchanged" and abs(row["multiplicative"]["only"] - row["additive"]["only"]) > 0.2:
            finding.append(f"{name} with only {KEEP} frequency pairs each: " + ", ".join(
                f"{group} {100 * row[group]['only']:.0f}% (random ones {100 * np.mean(row[group]['only random']):.0f}%)"
                for group in lab.orders))
    return {"ablation": numbers, "frequencies": frequencies}, {}, ". ".join(finding) + "."


@torch.no_grad()
def frequency_tests(lab):
    """Accuracy on ratio queries (x, y not 0) with a layer's activations at the query's y filtered."""
    p, n = lab.p, max(2, min(CONTEXTS, 2048 // lab.p ** 2))
    tasks, inputs = contexts(lab.split, "val_ood", n, lab.k - 1, SEED)
    seen = [activations(lab.model, task, xy, p) for task, xy in zip(tasks, inputs)]
    tasks, inputs = contexts(lab.split, "test_ood", n, lab.k - 1, SEED + 1)
    tokens = torch.cat([query_grid(task, xy, p) for task, xy in zip(tasks, inputs)])
    asked = (tokens[:, -3] > 0) & (tokens[:, -2] > 0) & (
        torch.cat([skill_of(t, p)[:, -1] for t in tokens.split(g.CHUNK)]) == 1)
    tokens = tokens.to(lab.device)

    def score(change=None, module=None):
        def at_query(x):
            x = x.clone()
            x[:, -1] = change(x[:, -1].unflatten(0, (-1, p, p))).flatten(0, 2)
            return x
        with changed(module, at_query) if change else nullcontext():
            answers = torch.cat([lab.model(t[:, :-1])[:, -1].argmax(-1)
                                 for t in tokens.split(max(1, g.CHUNK // p ** 2) * p * p)])
        return (answers == tokens[:, -1])[asked.to(lab.device)].double().mean().item()

    numbers = {"unchanged": score()}
    generator = torch.Generator().manual_seed(SEED)
    layers = [pair for i, block in enumerate(lab.model.blocks)
              for pair in ((f"{i}.heads", block.attention.out), (f"{i}.neurons", block.mlp.down))]
    for name, module in tqdm(layers, "frequencies", leave=False):
        numbers[name], fs = {}, [record[name][..., 1, :].flatten(2) for record in seen]
        for group, order in lab.orders.items():
            power = sum(spectrum(f, order) for f in fs)
            there = multiplicity(len(order))[..., None].expand_as(power) > 0
            keep = min(KEEP, there[..., 0].sum().item() - 1)                         # at p = 3 there are few: leave one
            masks = [strongest(power, keep)] + [strongest(torch.rand(power.shape, generator=generator) * there, keep)
                                                for _ in range(3)]
            only, without = ([score(lambda f: keep_frequencies(f, order, m), module) for m in kept]
                             for kept in (masks, [there & ~m for m in masks]))
            numbers[name][group] = {"only": only[0], "only random": only[1:], "without": without[0],
                                    "without random": without[1:]}
    say(f"Fourier, causally: accuracy in % on ratio queries (unchanged: {100 * numbers['unchanged']:.1f}; {asked.sum()} queries)",
        f"activations at the query's y with each function's {KEEP} dominant frequency pairs only, of " + " and ".join(
            f"{(multiplicity(len(order)) > 0).sum()} {group}" for group, order in lab.orders.items()) + ", and without;\n"
        f"beside it the mean of 3 draws of random pairs; dominant ones from validation tasks\n"
        f"{'':12}{'multiplicative':^38}{'additive':^38}\n{'layer':12}" +
        2 * f"{'only':>7}{'random':>9}{'without':>10}{'random':>9}   ")
    for name, groups in numbers.items():
        if name != "unchanged":
            print(f"{name:12}" + "   ".join(
                percent([r["only"]], 7) + percent([np.mean(r["only random"])], 9) + percent([r["without"]], 10)
                + percent([np.mean(r["without random"])], 9) for r in groups.values()))
    return numbers

# -------------------------------------------------------------------------------------------------
# 9. Curves of one training, phases of many (figure 1b)
# -------------------------------------------------------------------------------------------------

def read_metrics(folder):
    """metrics.csv of a run as early_stopping's history: a list of dicts of floats."""
    path = os.path.join(folder, "metrics.csv")
    try:
        with open(path, newline="") as f:
            rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(f)]
        if rows and set(g.METRICS) <= rows[0].keys():
            return rows
        g.die(f"{path}: no evaluation of this program in it")
    except (OSError, ValueError, TypeError, csv.Error) as e:
        g.die(f"{path}: not readable as a run's metrics ({type(e).__name__})")


def part_curves(lab):
    """The four accuracies over training, with the step that early stopping kept."""
    if not lab.history:
        return {}, {}, f"No metrics.csv in {lab.path}: the curves of a training are in its run's folder."
    history = lab.history
    best = history[g.early_stopping(history, lab.cfg.patience, 1 / lab.p)[0]]
    return ({"best": best, "last": history[-1]},
            {name: np.array([row[name] for row in history]) for name in ("step",) + g.SETS},
            f"Best step {best['step']:.0f} of {history[-1]['step']:.0f}: validation o.o.d. tasks, test inputs "
            f"{100 * best['val_ood_test']:.0f}%, at the end {100 * history[-1]['val_ood_test']:.0f}%.")


def phases(folders):
    """
    The phase of each run in or under the folders, at its best step: {(alpha, tasks): name}.

    From metrics.csv, so on the validation tasks; a run's own closing report is on its test tasks.
    """
    runs = [d for folder in folders for d in (
        [folder] if os.path.exists(os.path.join(folder, "metrics.csv")) else
        sorted(e.path for e in os.scandir(folder) if os.path.exists(os.path.join(e.path, "metrics.csv"))))]
    if not runs:
        g.die(f"{' '.join(folders)}: no run (a folder with metrics.csv) there")
    found, seen = {}, {}
    for run in runs:
        history = read_metrics(run)
        try:
            with open(os.path.join(run, "config.json")) as f:
                config = json.load(f)
            at, chance = (float(config["alpha"]), config["tasks"]), 1 / config["p"]
            if not (0 < at[0] < 1 and isinstance(at[1], int)):
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError, ArithmeticError) as e:
            g.die(f"{run}/config.json: not readable as a run's config ({type(e).__name__})")
        if at in found:
            g.die(f"{run}: alpha {at[0]} and {at[1]} tasks, as {seen[at]} has; name one of the two")
        seen[at] = run
        best = history[g.early_stopping(history, 0, chance)[0]]
        found[at] = g.phase([best[f"{name}_novel"] >= g.PHASE_THRESHOLD for name in g.SETS])
        print(f"{run}: alpha {at[0]}, {at[1]} tasks, step {best['step']:.0f}: {found[at]}")
    return found

# -------------------------------------------------------------------------------------------------
# 10. Pictures, command line, main
# -------------------------------------------------------------------------------------------------

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#999999"     # Okabe and Ito


def pyplot():
    """matplotlib, with one look for all pictures; None, and a line that says so, where it isn't there."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        print("\nNo pictures: they need matplotlib (pip install matplotlib).")
        return None
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
                         "figure.dpi": 110, "savefig.bbox": "tight", "legend.frameon": False, "image.cmap": "viridis"})
    return plt


def draw_shots(plt, lab, numbers, arrays):
    fig, axes = plt.subplots(2, 4, figsize=(9.5, 4.8), sharex=True, sharey=True, layout="constrained")
    names = ["i.d. tasks, train inputs", "i.d. tasks, test inputs", "o.o.d. tasks, train inputs", "o.o.d. tasks, test inputs"]
    for column, (name, curve) in enumerate(arrays.items()):
        for row, which in enumerate(("all queries", "novel queries")):
            ax = axes[row, column]
            for values, label, colour, style in zip(curve[:, row], (
                    "model", "Ratio Matching", "Modular Regression", "memory of the pre-training tasks"),
                    ("black", ORANGE, GREEN, PINK), ("-", "--", ":", "-.")):
                ax.plot(100 * values, style, color=colour, label=label, lw=2 if label == "model" else 1.5)
            ax.axhline(100 / lab.p, color=GREY, lw=0.8, label="chance")
            ax.set_title(names[column] if row == 0 else "")
            ax.set_ylim(0, 104)
        axes[1, column].set_xlabel("shots")
    axes[0, 0].set_ylabel("all queries: accuracy (%)")
    axes[1, 0].set_ylabel("novel queries: accuracy (%)")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return {"shots": fig}


def draw_skills(plt, lab, numbers, arrays):
    shots, right, solved = arrays["shots"], arrays["right"], arrays["skill"] <= 1
    columns = sorted(set(np.linspace(0, len(shots) - 1, min(5, len(shots))).round().astype(int)))
    grid, axes = plt.subplots(3, len(columns), figsize=(1.9 * len(columns), 5.6), layout="constrained", squeeze=False)
    colours = plt.matplotlib.colors.ListedColormap(["#DDDDDD", BLUE])
    both = plt.matplotlib.colors.ListedColormap([ORANGE, "#F4F4F4", GREEN])
    for j, s in enumerate(columns):
        for i, (image, cmap, low) in enumerate(((right[s], colours, 0), (solved[s], colours, 0),
                                                (right[s].astype(int) - solved[s], both, -1))):
            ax = axes[i, j]
            ax.imshow(np.asarray(image, dtype=int).T, cmap=cmap, vmin=low, vmax=1, origin="lower")
            if i == 0:
                x, y = arrays["context"][:shots[s]].T
                ax.plot(x, y, "o", color="white", mec="black", mew=0.6, ms=20 / lab.p + 1)
                ax.set_title(f"{shots[s]} shot{'s' if shots[s] > 1 else ''}")
            ax.set_xticks([0, lab.p - 1])
            ax.set_yticks([0, lab.p - 1])
        axes[2, j].set_xlabel("query's x")
    for i, text in enumerate(("model right (blue);\nexamples (dots)", "Ratio Matching\ncould answer (blue)",
                              "model only (green),\nmatching only (orange)")):
        axes[i, 0].set_ylabel(f"{text}\n\nquery's y")
    grid.suptitle("o.o.d. task (a, b) = ({}, {}), one context of train inputs".format(*arrays["task"]), fontsize=10)
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.2), sharey=True, layout="constrained")
    for ax, side, title in zip(axes, ("all", "test"), ("all inputs as queries", "test inputs as queries")):
        for s, colour, style in zip(range(4), (GREY, ORANGE, GREEN, PINK), ("-", "--", ":", "-.")):
            accuracy = np.where(arrays[f"{side}_share"][:, s] > 0.01, arrays[f"{side}_accuracy"][:, s], np.nan)
            ax.errorbar(shots, 100 * accuracy, 200 * arrays[f"{side}_error"][:, s], color=colour, ls=style, marker="o",
                        ms=4, capsize=2, label={"copy": "copy: input seen in the context", "ratio": "Ratio Matching can",
                        "regression": "only Modular Regression can", "undetermined": "undetermined"}[SKILLS[s]])
        ax.axhline(100 / lab.p, color=GREY, lw=0.8, label="chance")
        ax.set(title=title, xlabel="shots", ylim=(0, 104))
    axes[0].set_ylabel("accuracy (%), bars: 2 standard errors")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return {"skill_grid": grid, "skills": fig}


def draw_attention(plt, lab, numbers, arrays):
    figures = {}
    T = arrays["mean"].shape[-1]
    roles = ["x", "y", "z"] * (T // 3)
    for name, labels, title in (("mean", roles, "Attention, mean over o.o.d. sequences"),
                                ("one", [str(t) for t in arrays["tokens"]],
                                 "Attention on one o.o.d. sequence (numbers are its tokens, x y z x y z ...)")):
        maps = arrays[name]
        fig, axes = plt.subplots(*maps.shape[:2], figsize=(2.6 * maps.shape[1], 2.6 * maps.shape[0]),
                                 layout="constrained", squeeze=False, sharex=True, sharey=True)
        for i, h in np.ndindex(maps.shape[:2]):
            image = axes[i, h].imshow(maps[i, h], vmin=0, vmax=1)
            axes[i, h].set_title(f"head {i}.{h}")
            axes[i, h].set_xticks(range(T), labels, fontsize=7)
            axes[i, h].set_yticks(range(T), roles, fontsize=7)
        fig.supxlabel("attends to", fontsize=9)
        fig.supylabel("position that asks", fontsize=9)
        fig.suptitle(title, fontsize=10)
        fig.colorbar(image, ax=axes, shrink=0.5, label="attention")
        figures[f"attention_{name}"] = fig
    return figures


def draw_pca(plt, lab, numbers, arrays):
    p, order = lab.p, lab.orders["multiplicative"].tolist()
    log = {x: k for k, x in enumerate(order)}
    x, y = (t.numpy() for t in g.grid(p).T)
    logs = np.array([log.get(v, -1) for v in range(p)])
    maps = plt.matplotlib.colormaps

    def scatter(ax, points, colour_by, labels, size):         # labels: one for each x, where its points are
        zero, n = colour_by < 0, colour_by.max() + 1          # a logarithm comes back to its beginning: so do its colours
        cycle = plt.matplotlib.colors.ListedColormap(maps["twilight" if n < p else "viridis"](np.arange(n) / n))
        ax.scatter(*points[zero].T, s=size, color="black", marker="x", lw=0.8)
        shown = ax.scatter(*points[~zero].T, s=size, c=colour_by[~zero], cmap=cycle, vmin=-0.5, vmax=n - 0.5)
        for value, text in enumerate(labels):
            ax.annotate(text, points[(x == value) & (y > 0)].mean(0), fontsize=9, xytext=(5, 5), textcoords="offset points")
        ax.set_xticks([])
        ax.set_yticks([])
        return shown
    fig, axes = plt.subplots(lab.cfg.depth, lab.cfg.heads, figsize=(2.4 * lab.cfg.heads, 2.4 * lab.cfg.depth),
                             layout="constrained", squeeze=False)
    for i, h in np.ndindex(axes.shape):
        row = numbers[f"{i}.{h} xy"]
        shown = scatter(axes[i, h], arrays[f"{i}.{h} xy"].reshape(-1, 2), logs[x], [], 9)
        axes[i, h].set_title(f"head {i}.{h}: circle {100 * row['multiplicative']['circle']:.0f}%, "
                             f"null {100 * row['multiplicative']['null 95%']:.0f}%", fontsize=8)
    fig.suptitle(f"First two principal components of each head's output at x and y, all {p * p} inputs after one context\n"
                 f"(share of one circle by logarithm, and 95% of its null: means over {CONTEXTS} contexts)", fontsize=10)
    fig.colorbar(shown, ax=axes, shrink=0.5, label=f"log of x to base {lab.base} (x = 0: crosses)")
    best = numbers["best"]
    pair, axes = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    points = arrays[best].reshape(-1, 2)
    for ax, (colour, text, label) in zip(axes, (
            (x, [f"x={v}" for v in range(p)], "x"),
            (logs[x], ["x=0"] + [f"log {v}" for v in logs[1:]], f"log of x to base {lab.base} (x = 0: crosses)"))):
        pair.colorbar(scatter(ax, points, colour, text, 22), ax=ax, label=label, shrink=0.8)
        ax.set(xlabel="first component", ylabel="second component")
    pair.suptitle(f"Head {best.split()[0]}, positions {' and '.join(best.split()[1])}: the circle furthest above its null; one context\n"
                  f"(mean of {CONTEXTS}: {100 * numbers[best]['multiplicative']['circle']:.0f}% of the variance where x, y are not 0; "
                  f"95% of the null: {100 * numbers[best]['multiplicative']['null 95%']:.0f}%; points off the circle: y = 0)", fontsize=10)
    return {"pca": fig, "pca_head": pair}


def draw_fourier(plt, lab, numbers, arrays):
    layers = [name for name in numbers if name.endswith("neurons")]
    fig, axes = plt.subplots(len(layers), 4, figsize=(10, 2.4 * len(layers)), layout="constrained", squeeze=False)
    for i, name in enumerate(layers):
        for j, group in enumerate(lab.orders):
            power = arrays[f"{name} {group} power"]
            m = len(power)
            k = np.arange(m)
            power = np.roll(power + power[-k % m][:, -k % m], (m // 2, m // 2), (0, 1))       # unfolded, centred
            ax = axes[i, j]
            low = -(m // 2) - 0.5
            image = ax.imshow(power.T / power.sum(), origin="lower", extent=(low, low + m, low, low + m))
            fig.colorbar(image, ax=ax, shrink=0.8)
            ax.set(title=f"block {i}, {group}", xlabel="frequency in x", ylabel="in y")
            ax = axes[i, 2 + j]
            row = numbers[name][group]
            share = arrays[f"{name} {group} share"]
            ax.hist(share[~np.isnan(share)], np.linspace(0, 1, 21), color=BLUE)
            ax.axvline(row["median share"], color="black", label=f"median {row['median share']:.2f}")
            ax.axvline(np.mean(row["null median share"]), color=ORANGE, ls="--",
                       label=f"null {np.mean(row['null median share']):.2f}")
            ax.set_ylim(0, 1.5 * ax.get_ylim()[1])            # room for the legend
            ax.legend(fontsize=7)
            ax.set(title=f"{group}, neurons", xlabel="share of strongest pair", ylabel="neurons alive")
    fig.suptitle("MLP neurons at the query's y: mean power spectrum, and the strongest frequency pair's share", fontsize=10)
    return {"fourier": fig}


def draw_similarity(plt, lab, numbers, arrays):
    x, y = g.grid(lab.p).T
    log = {v: k for k, v in enumerate(lab.orders["multiplicative"].tolist())}
    line = g.line_of(g.grid(lab.p), lab.p)
    inside = [n for n in range(len(x)) if x[n] > 0 and y[n] > 0]
    order = sorted(inside, key=lambda n: (log[line[n].item()], log[x[n].item()]))     # by log of y/x, then of x
    fig, axes = plt.subplots(2, lab.cfg.depth, figsize=(2.5 * lab.cfg.depth, 5.2), layout="constrained", squeeze=False)
    for i in lab.blocks:
        for row, position in enumerate("yz"):
            ax, r = axes[row, i], numbers[f"{i} {position}"]
            image = ax.imshow(arrays[f"{i} {position}"][order][:, order], vmin=-1, vmax=1, cmap="RdBu_r")
            ticks = np.arange(lab.p) * (lab.p - 1) - 0.5
            ax.set_xticks(ticks if lab.p < 12 else [], [])
            ax.set_yticks(ticks if lab.p < 12 else [], [])
            ax.set_title(f"block {i}, at {position}\ngap {r['gap']:+.2f}, null {r['null 95%']:.2f}")
    fig.suptitle("Cosine similarity of the residual stream between inputs, sorted by ratio y/x, then x\n"
                 "(ticks part the ratios; inputs with a zero left out)", fontsize=10)
    fig.supxlabel("input (x, y)", fontsize=9)
    fig.supylabel("input (x, y)", fontsize=9)
    fig.colorbar(image, ax=axes, shrink=0.5, label="cosine similarity")
    return {"similarity": fig}


def draw_causal(plt, lab, numbers, arrays):
    ablation = numbers["ablation"]
    names = [name for name in ablation if name != "nothing"]
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True, layout="constrained")
    for ax, side in zip(axes, ("train", "test")):
        for j, (skill, colour) in enumerate((("ratio", ORANGE), ("regression", GREEN))):
            column = f"{skill}, {side} inputs"
            ax.bar(np.arange(len(names)) + 0.4 * j - 0.2, [100 * ablation[name][column] for name in names], 0.4,
                   color=colour, label=f"queries that {'Ratio Matching' if j == 0 else 'only Modular Regression'} can answer")
            ax.axhline(100 * ablation["nothing"][column], color=colour, ls="--", lw=1)
        ax.axhline(100 / lab.p, color=GREY, lw=0.8, label="chance")
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        ax.set_title(f"o.o.d. tasks, {side} inputs (dashed: nothing taken away)")
    axes[0].set_ylabel("accuracy (%) with this part\nheld at its mean")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    frequencies = {name: row for name, row in numbers["frequencies"].items() if name != "unchanged"}
    spectral, axes = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True, layout="constrained")
    for ax, group in zip(axes, lab.orders):
        for j, (key, colour, label) in enumerate((
                ("only", BLUE, f"{KEEP} dominant pairs only"), ("only random", "#9ecae1", f"{KEEP} random pairs only"),
                ("without", ORANGE, f"without {KEEP} dominant pairs"), ("without random", "#f6d79a", f"without {KEEP} random pairs"))):
            ax.bar(np.arange(len(frequencies)) + 0.2 * j - 0.3,
                   [100 * np.mean(row[group][key]) for row in frequencies.values()], 0.2, color=colour, label=label)
        ax.axhline(100 * numbers["frequencies"]["unchanged"], color="black", ls="--", lw=1)
        ax.axhline(100 / lab.p, color=GREY, lw=0.8, label="chance")
        names = [("heads " if "heads" in name else "MLP ") + name.split(".")[0] for name in frequencies]
        ax.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        ax.set_title(f"{group} characters (dashed: unchanged)")
    axes[0].set_ylabel("accuracy (%) on ratio queries")
    spectral.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return {"ablation": fig, "frequencies": spectral}


def draw_curves(plt, lab, numbers, arrays):
    if not arrays:
        return {}
    fig, ax = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    for name, colour, style, label in zip(g.SETS, (BLUE, BLUE, ORANGE, ORANGE), ("-", "--", "-", "--"), (
            "i.d. tasks, train inputs", "i.d. tasks, test inputs", "o.o.d. tasks, train inputs", "o.o.d. tasks, test inputs")):
        ax.plot(arrays["step"], 100 * arrays[name], style, color=colour, label=label)
    ax.axvline(numbers["best"]["step"], color="black", lw=1, label="kept by early stopping")
    ax.axhline(100 / lab.p, color=GREY, lw=0.8, label="chance")
    ax.set(xlabel="training step", ylabel="last-shot accuracy (%), all queries\n(o.o.d.: validation tasks)", ylim=(0, 104))
    ax.legend(fontsize=8)
    return {"curves": fig}


def draw_phases(plt, found):
    names = {"in-distribution memorization": ("IM", "#999999"), "in-distribution generalization": ("IG", "#56B4E9"),
             "o.o.d. memorization": ("OM", ORANGE), "o.o.d. generalization": ("OG", GREEN)}
    alphas, tasks = (sorted({at[i] for at in found}) for i in (0, 1))
    fig, ax = plt.subplots(figsize=(1.8 + 0.8 * len(tasks), 1.4 + 0.6 * len(alphas)), layout="constrained")
    for (alpha, n), name in found.items():
        letters, colour = names.get(name, ("?", "white"))
        at = tasks.index(n), alphas.index(alpha)
        ax.add_patch(plt.Rectangle(np.subtract(at, 0.5), 1, 1, color=colour))
        ax.text(*at, letters, ha="center", va="center")
    ax.set(xlim=(-0.5, len(tasks) - 0.5), ylim=(-0.5, len(alphas) - 0.5), xlabel="pre-training tasks",
           ylabel="alpha", title="I/O: i.d./o.o.d.; M/G: memorization/generalization")
    ax.set_xticks(range(len(tasks)), tasks)
    ax.set_yticks(range(len(alphas)), alphas)
    return {"phases": fig}


PARTS = {"shots": (part_shots, draw_shots), "skills": (part_skills, draw_skills),
         "attention": (part_attention, draw_attention), "pca": (part_pca, draw_pca),
         "fourier": (part_fourier, draw_fourier), "similarity": (part_similarity, draw_similarity),
         "causal": (part_causal, draw_causal), "curves": (part_curves, draw_curves)}


def make_folder(folder):
    """The folder, made if need be; exits with one line where it can't be written to."""
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):              # if it can't be, not after the work
            return folder
    except OSError as e:
        g.die(f"--out {folder}: can't be written to ({e.strerror}); name a folder that can")


def earlier_parts(out, head):
    """What is in the folder from other parts of the same analysis, so that it isn't lost: (numbers, arrays)."""
    path = os.path.join(out, "analysis.json")
    try:
        with open(path) as f:
            numbers = json.load(f)
        if all(numbers[name] == value for name, value in head.items()):
            with np.load(os.path.join(out, "analysis.npz")) as arrays:
                return numbers, dict(arrays)
    except FileNotFoundError:
        return head, {}
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        pass
    print(f"{path} is of another checkpoint, another base or damaged; it is replaced.")
    return head, {}


@contextmanager
def written_to(out):
    """Within, a file that can't be written ends the program with one line."""
    try:
        yield
    except OSError as e:
        g.die(f"--out {out}: {e.filename or 'a file'} can't be written ({e.strerror})")


def save_pictures(plt, folder, figures):
    for name, figure in figures.items():
        figure.savefig(os.path.join(folder, f"{name}.png"), metadata={"Software": None})
        plt.close(figure)


def save_json(path, content):
    def clean(value):                                         # JSON has no nan
        if isinstance(value, dict):
            return {k: clean(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [clean(v) for v in value]
        return None if isinstance(value, float) and np.isnan(value) else value
    g.write_file(path, json.dumps(clean(content), indent=1, allow_nan=False).encode())


def open_lab(args):
    """What every part needs: model, config, split, device, and the residues in the order of each group."""
    file = os.path.join(args.path, "best.pt") if os.path.isdir(args.path) else args.path
    checkpoint, device = g.load_checkpoint(file), g.pick_device(args.device)
    model, cfg = g.load_model(checkpoint, device)
    bases = generators(cfg.p)
    base = (27 if cfg.p == 29 else bases[0]) if args.base is None else args.base
    if base not in bases:
        g.die(f"--base {base}: must generate the non-zero residues mod {cfg.p}: {', '.join(map(str, bases))}")
    return SimpleNamespace(path=args.path, file=file, history=[], model=model, cfg=cfg, split=checkpoint["split"], device=device, p=cfg.p,
                           k=cfg.examples, blocks=range(cfg.depth), base=base,
                           orders={"multiplicative": powers(base, cfg.p), "additive": torch.arange(cfg.p)})


def main(argv=None):
    sys.stdout.reconfigure(errors="backslashreplace")         # a terminal without ± loses no work
    parser = argparse.ArgumentParser(description="Look inside a trained model.", allow_abbrev=False,
                                     usage="analyze.py RUN [part ...] | analyze.py phases DIR ...")
    parser.error = g.die
    parser.add_argument("path", metavar="RUN", help="a run's folder, or a checkpoint; or the word phases")
    parser.add_argument("parts", nargs="*", default=[], help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... [cpu]")
    parser.add_argument("--base", type=int, help="of discrete logarithms [27 for p = 29, else the smallest generator]")
    parser.add_argument("--out", help="folder for what is written [the run's; for FILE.pt: FILE; for phases: this one]")
    args = parser.parse_intermixed_args(argv)
    if "" in (args.path, args.out, *args.parts):
        g.die("'': an empty name; name a run's folder or a checkpoint, a part, a folder for --out")

    if args.path == "phases":
        for folder in args.parts:
            if not os.path.isdir(folder):
                g.die(f"{folder}: no such folder")
        found = phases(args.parts or g.die("phases: name the folders of the runs"))
        out = make_folder(args.out or ".")
        with written_to(out):
            save_json(os.path.join(out, "phases.json"),
                      [{"alpha": a, "tasks": n, "phase": name} for (a, n), name in found.items()])
            if plt := pyplot():
                save_pictures(plt, out, draw_phases(plt, found))
        return
    for part in args.parts:
        if part not in PARTS:
            g.die(f"{part}: no such part; there are {', '.join(PARTS)}")
    lab = open_lab(args)
    parts = [part for part in PARTS if part in args.parts or not args.parts]
    if "curves" in parts and os.path.exists(os.path.join(args.path, "metrics.csv")):
        lab.history = read_metrics(args.path)                 # if it's damaged, not after the work
    out = make_folder(args.out or (args.path if os.path.isdir(args.path) else os.path.splitext(args.path)[0]))
    print(f"{lab.file}: p {lab.p}, {lab.cfg.tasks} tasks, alpha {lab.cfg.alpha}, depth {lab.cfg.depth}; logarithms to "
          f"base {lab.base}; torch {torch.__version__} on {lab.device}")
    with open(lab.file, "rb") as f:
        head = {"checkpoint": lab.file, "sha256": hashlib.sha256(f.read()).hexdigest(), "base": lab.base}
    numbers, arrays = earlier_parts(out, head)
    pictures, plt = [], pyplot()
    for part in parts:
        measure, draw = PARTS[part]
        numbers[part], found, finding = measure(lab)
        numbers[part]["finding"] = finding
        arrays = {name: array for name, array in arrays.items() if not name.startswith(f"{part}/")}
        arrays |= {f"{part}/{name}": array for name, array in found.items()}
        with written_to(out):                                 # after each part, so that Ctrl-C loses but one
            save_json(os.path.join(out, "analysis.json"), numbers)
            np.savez_compressed(buffer := io.BytesIO(), **arrays)
            g.write_file(os.path.join(out, "analysis.npz"), buffer.getbuffer())
            if plt:
                save_pictures(plt, out, figures := draw(plt, lab, numbers[part], found))
                pictures += figures
    say("In short", "\n".join(textwrap.fill(f"{part}: {numbers[part]['finding']}", 110, subsequent_indent="    ")
                              for part in parts))
    print("\nWrote analysis.json, analysis.npz" + "".join(f", {name}.png" for name in pictures) + f" to {out}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
