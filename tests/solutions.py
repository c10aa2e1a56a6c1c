"""
Solutions of the exercises whose checks need no training, each beside a plausible wrong one. Look
here last. test_pages.py runs the checks of assets/exercises.md with both.
"""
import functools

import torch

import analyze as a
import grok_icl as g


def ceiling(p, shots):
    """The query (0, 0) needs any example, another one p - 1 of the p*p inputs. Else: a guess."""
    origin, misses = 1 / p**2, (1 - (p - 1) / p**2) ** shots
    if shots == 0:
        return 1 / p
    return origin + (1 - origin) * (1 - misses + misses / p)


def ceiling_of_lines(p, shots):
    """As if each line were 1 of p + 1, and no guess were right."""
    return 1 - (p / (p + 1)) ** shots


def solve(examples, query, p):
    (u, v), basis = query, [e for e in examples if e[0] or e[1]]
    if (u, v) == (0, 0):
        return 0
    for i, (x, y, z) in enumerate(basis):
        if (x * v - y * u) % p == 0:
            return (u * pow(x, -1, p) if x else v * pow(y, -1, p)) * z % p
        for x2, y2, z2 in basis[:i]:
            if det := (x * y2 - y * x2) % p:                     # Cramer's rule
                inverse = pow(det, -1, p)
                c, d = (u * y2 - v * x2) * inverse, (x * v - y * u) * inverse
                return (c * z + d * z2) % p
    return None


def solve_on_one_line(examples, query, p):
    """Ratio Matching alone."""
    for x, y, z in examples:
        if (x or y) and (x * query[1] - y * query[0]) % p == 0:
            return (query[0] * pow(x, -1, p) if x else query[1] * pow(y, -1, p)) * z % p
    return 0 if query == [0, 0] else None


@functools.cache
def two_runs():
    lab = a.open_lab("assets/quick.pt")
    tasks, inputs = a.contexts(lab, 1000, lab.k)
    ours, theirs = (g.to_tokens(t, inputs, lab.p) for t in (tasks, tasks.roll(1, 0)))
    return lab, ours, theirs, a.record(a.sites(lab.model), lambda: a.answers(lab, theirs))


def patched(head, at=slice(1, None, 3)):
    lab, ours, theirs, seen = two_runs()
    block, number = map(int, head.split("."))
    width = lab.cfg.embd // lab.cfg.heads
    columns, site = slice(number * width, (number + 1) * width), f"heads {block}"
    other = seen[site]

    def put(values):
        values = values.clone()
        values[:, at, columns] = other[:, at, columns]
        return values
    said = a.run_with({a.sites(lab.model)[site]: put}, lambda: a.answers(lab, ours))
    counts = (a.skill_of(ours, lab.p) == 1) & (ours[:, 2::3] != theirs[:, 2::3])
    return (said == theirs[:, 2::3])[counts].float().mean().item()


def patched_at_z(head):
    return patched(head, slice(2, None, 3))


def moves(other, factor=None):
    lab = a.open_lab("assets/p29.pt")
    p = lab.p
    tokens = g.to_tokens(*a.contexts(lab, 1000, 32), p)
    inputs = tokens.unflatten(1, (-1, 3))[..., :2]
    line = g.line_of(inputs, p).masked_fill((inputs == 0).all(-1), -1)
    same = (line[:, :-1] == line[:, -1:]) & (line[:, :-1] >= 0)  # (B, 31)
    one = (same.sum(1) == 1) & g.novel_queries(tokens)[:, -1] & (line[:, -1] >= 0)
    tokens, inputs, same = tokens[one], inputs[one], same[one]
    each, on_line = torch.arange(len(tokens)), same.float().argmax(1)
    changed = tokens.clone()
    example = (on_line + 1) % 31 if other else on_line
    changed[each, 3 * example + 2] = (changed[each, 3 * example + 2] + 1) % p
    inverse = g.inverses(p)
    x, y = inputs[:, -1].T
    x1, y1 = inputs[each, on_line].T
    c = torch.where(x1 > 0, x * inverse[x1], y * inverse[y1]) % p
    expected = 0 if other else c if factor is None else factor
    before, after = (a.answers(lab, t)[:, -1] for t in (tokens, changed))
    right = before == tokens[:, -1]
    return ((after - before) % p == expected)[right].float().mean().item()


def moves_by_the_same(other):
    """As if the answer moved by as much as the label."""
    return moves(other, factor=1)


def idle(offsets, pairs=[]):
    if not pairs:
        pairs.append(a.measure_pairs(a.open_lab("assets/regression.pt"))["pairs"])
    right = [pairs[0][offsets[i - 2], offsets[i - 1]].item() for i in range(3)]      # without i
    best = max(range(3), key=right.__getitem__)
    others = [r for i, r in enumerate(right) if i != best]
    return best if right[best] > 0.8 and max(others) < 0.3 else None


def idle_by_distance(offsets):
    """The example that is farthest in offset."""
    return offsets.index(max(offsets))


SOLUTIONS = {"ceiling": (ceiling, ceiling_of_lines), "solve": (solve, solve_on_one_line),
             "patched": (patched, patched_at_z), "moves": (moves, moves_by_the_same),
             "idle": (idle, idle_by_distance)}
