"""
Learning to grok modular arithmetic in context: a single-file reproduction of

    He, Doshi, Das, Gromov. Learning to grok: Emergence of in-context learning and skill
    composition in modular arithmetic tasks. NeurIPS 2024, https://arxiv.org/abs/2406.02550

A task is a pair (a, b) of residues mod a prime p. It maps an input (x, y) to z = a x + b y mod p.
The transformer reads worked examples of one task, three tokens each, and never sees (a, b):

    x1 y1 z1  x2 y2 z2  ...  xk yk zk          scored on the z tokens

With few pre-training tasks it memorizes them. With many it learns to infer a task it has never
trained on from the examples in front of it: in-context learning, out of distribution (o.o.d.).

    python grok_icl.py --preset quick            p = 13, 46 seconds on two CPU cores
    python grok_icl.py --depth 2 --tasks 512     the paper's p = 29, 2.1 minutes on two CPU cores
    python grok_icl.py --preset regression-small combines examples at p = 17: 5 minutes on a Xeon
    python grok_icl.py --preset paper            as published; wants a GPU
"""
import argparse
import contextlib
import io
import math
import os
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# -------------------------------------------------------------------------------------- 1. Settings
class BadInput(ValueError):
    """What the user can mend: main shows it as one line on stderr and returns 2."""

def option(default, paper, help, between=None, choices=None):
    """A field of Config: its default, the paper's value, what it is, and its limits or values."""
    return field(default=default, metadata=dict(
        paper=paper, help=help, between=between, choices=choices))

@dataclass
class Config:
    """The settings of a run. Each field is a flag."""
    # what is learned
    p: int = option(29, 29, "prime modulus; its residues are the vocabulary", (3, 997))
    tasks: int = option(512, 512, "pre-training tasks (a, b), out of p*p", (1, 10**6))
    alpha: float = option(0.8, 0.8, "fraction of the p*p inputs (x, y) that is trained on", (0, 1))
    examples: int = option(32, 32, "examples in a sequence, three tokens each", (2, 512))
    # the transformer
    depth: int = option(2, 2, "transformer blocks; the paper has 2, 4 and 6", (1, 100))
    heads: int = option(4, 4, "attention heads a block, each best up to 32 wide", (1, 256))
    embd: int = option(128, 512, "width of the residual stream; the MLP is 4 times it", (2, 16384))
    rope_base: float = option(1e4, 1e4, "base of the rotary embedding; larger: room for content",
                              (1, 1e15))
    init_std: float = option(0.05, 0.02, "standard deviation of the weights at first", (1e-6, 10))
    # how it is trained
    lessons: str = option("auto", "none", choices=["auto", "pairs", "squares", "lines", "none"],
                          help="auto: lines; from three blocks on pairs, or squares if p > 20")
    shared_inputs: bool = option(False, True, "all tasks see the same inputs in a step")
    optimizer: str = option("muon", "adamw", "for the blocks' matrices", choices=["muon", "adamw"])
    lr: float = option(0.012, 1.5e-4, "peak learning rate of the blocks' matrices", (1e-12, 1e3))
    embd_lr: float = option(0.001, 1.5e-4, "that of embedding and LayerNorm", (1e-12, 1e3))
    lr_end: float = option(0.02, 0.1, "share of the peak rates that is left at the end", (0, 1))
    wd: float = option(0.2, 2.0, "weight decay of matrices and embedding", (0, 1e3))
    batch: int = option(64, 1024, "sequences a step, more while they are short", (1, 10**6))
    steps: int = option(1000, 200_000, "steps of the last lesson, free inputs", (1, 10**9))
    warmup: int = option(100, 10_000, "steps of linear warm-up", (0, 10**9))
    seed: int = option(0, 0, "of the split, the initial weights and the batches", (0, 2**32 - 1))
    # how it is run: what --resume may change
    eval_every: int = option(100, 1000, "steps between evaluations", (1, 10**9))
    patience: int = option(0, 0, "evaluations without a best to stop after; 0: never", (0, 10**9))
    snapshots: bool = option(False, False, "keep the weights of each evaluation, step100.pt, ...")
    device: str = option("auto", "auto", "cpu, cuda, mps, ...; auto: cuda if there is one")
    amp: str = option("auto", "auto", "autocast to bfloat16", choices=["auto", "bf16", "off"])
    compile: bool = option(False, False, "torch.compile: pays on a GPU, from 20,000 steps on")
    out: str = option("", "", "folder of the run; by default out/ and the flags")
    resume: bool = option(False, False, "continue the run in --out")

NAMES = [f.name for f in fields(Config)]
FIXED = NAMES[:NAMES.index("eval_every")]     # what --resume may not change
PRESETS = {                   # in place of the defaults; a flag on the command line outdoes both
    "quick": dict(p=13, tasks=84, examples=16, embd=64, batch=84, steps=800),
    "regression-small": dict(p=17, tasks=200, depth=4, heads=6, embd=96, batch=48, steps=1500,
                             rope_base=1e6, lr=0.02),
    "regression": dict(tasks=640, depth=4, steps=2600),
    "paper": {f.name: f.metadata["paper"] for f in fields(Config)}}

MLP_RATIO = 4                 # MLP width / residual width
ADAM_BETAS = (0.9, 0.98)
LOOK_EVERY = 10               # steps between looks at whether a lesson is learned
EVAL_SEQUENCES = 512          # of each set, at every evaluation
REPORT_SEQUENCES = 2048       # of each set, in the closing report
CHUNK = 256                   # sequences evaluated at once
LEFT_CHANCE = 0.2             # best.pt is the newest until the accuracy is this far above 1/p

# ---------------------------------------------------------------- 2. Data: tasks, inputs, the split
def grid(p):
    """All p*p pairs of residues, (p*p, 2): the tasks (a, b), and also the inputs (x, y)."""
    return torch.cartesian_prod(torch.arange(p), torch.arange(p))

def to_tokens(tasks, inputs, p):
    """Tasks (B, 2) and inputs (B, k, 2), both residues -> tokens x y z x y z ... (B, 3k)."""
    z = (tasks[:, None] * inputs).sum(-1, keepdim=True) % p                          # (B, k, 1)
    return torch.cat((inputs, z), dim=-1).flatten(1)                                 # (B, 3k)

def inverses(p):
    """1/n of each residue n, and 0 for 0: (p,)."""
    return torch.tensor([0] + [pow(n, -1, p) for n in range(1, p)])

def line_of(inputs, p):
    """The line through the origin of inputs (..., 2): their ratio y/x, or p if x = 0."""
    x, y = inputs.unbind(-1)
    return torch.where(x > 0, y * inverses(p).to(x.device)[x] % p, p)                # (...)

def powers(p):
    """The nonzero residues by discrete logarithm, base**0, base**1, ...: (p - 1,). The base is the
    least whose powers are all of them, and at p = 29 the paper's, 27."""
    for base in ([27] if p == 29 else range(2, p)):
        row = [pow(base, n, p) for n in range(p - 1)]
        if len(set(row)) == p - 1:
            return torch.tensor(row)

def is_square(n, p):
    """Which numbers n, of any shape, are squares mod p other than 0: the even powers."""
    return torch.isin(n % p, powers(p)[::2].to(n.device))

def choose_rectangles(p, n, generator, tries=100):
    """n pre-training tasks by the paper's rectangular rule, (n, 2).

    To a random task (a, b) add (a', b), (a, b') and (a', b'), all new. So each task shares either
    component with another one: the two can vary apart. Raises BadInput where none is left."""
    free, tasks = torch.ones(p, p, dtype=torch.bool), []
    for a, b in grid(p)[torch.randperm(p * p, generator=generator)].tolist():
        if len(tasks) == n or not free[a, b]:
            continue
        free[a, b] = False                            # so that a' is not a, and b' not b
        # all (a', b') with the corners (a', b), (a, b') and (a', b') free: (choices, 2)
        choices = (free[:, b].unsqueeze(1) & free[a].unsqueeze(0) & free).nonzero()
        if len(choices) > 0:
            a2, b2 = choices[torch.randint(len(choices), (), generator=generator)].tolist()
            tasks += [(a, b), (a2, b), (a, b2), (a2, b2)]
            free[a2, b] = free[a, b2] = free[a2, b2] = False
    if len(tasks) == n:
        return torch.tensor(tasks)
    if tries > 0:                                     # an unlucky start has blocked itself
        return choose_rectangles(p, n, generator, tries - 1)
    raise BadInput(f"--tasks {n}: no {n // 4} disjoint rectangles in {p}*{p} tasks; take fewer")

def make_split(cfg):
    """Who is trained on, and who only tested: a dict of (n, 2) tensors of residues.

    "id" are the pre-training tasks. The others are out of distribution, in two halves (the paper
    has one): best.pt is chosen on "val_ood", the closing report alone has "test_ood". All tasks
    share the inputs. With more tasks the same seed has the same inputs."""
    generator, p = torch.Generator().manual_seed(cfg.seed), cfg.p
    inputs, others = (grid(p)[torch.randperm(p * p, generator=generator)] for _ in range(2))
    tasks = choose_rectangles(p, cfg.tasks, generator)
    is_id = torch.zeros(p, p, dtype=torch.bool)
    is_id[tasks[:, 0], tasks[:, 1]] = True
    ood = others[~is_id[others[:, 0], others[:, 1]]]
    n_train, n_val = round(cfg.alpha * p * p), len(ood) // 2
    return {"id": tasks, "val_ood": ood[:n_val], "test_ood": ood[n_val:],
            "train_inputs": inputs[:n_train], "test_inputs": inputs[n_train:]}

# -------------------------------------------------------------------------- 3. Two exact algorithms
# A *query* is an input whose z is asked. So is each example's: do those before it determine its z?

def novel_queries(tokens):
    """Which queries are no copy of an earlier example's input: (B, 3k) -> bool (B, k)."""
    xy = tokens.unflatten(1, (-1, 3))[..., :2]                                       # (B, k, 2)
    same = (xy[:, :, None] == xy[:, None, :]).all(-1)            # (B, query, example)
    return ~same.tril(-1).any(-1)                                # tril(-1): examples before it

RATIO, REGRESSION = 0, 1      # the order in which the next function returns them

def solvable(tokens, p):
    """What the examples before each query determine, exactly: two bool tensors (B, k).

    Ratio Matching answers (x, y) = c (x_i, y_i) with c z_i: it needs an earlier example other than
    (0, 0) on the query's line through the origin, or any at all for the query (0, 0). Modular
    Regression combines examples: it needs that, or two on different lines, or the query (0, 0)."""
    x, y, _ = tokens.unflatten(1, (-1, 3)).unbind(-1)                                # (B, k)
    # A query and an example are on one line just if this determinant is 0: (B, query, example).
    cross = (x[:, :, None] * y[:, None, :] - y[:, :, None] * x[:, None, :]) % p
    origin = (x == 0) & (y == 0)                                                     # (B, k)
    helps = (cross == 0) & (~origin[:, None, :] | origin[:, :, None])
    ratio = helps.tril(-1).any(-1)                               # an example before the query does
    # Is an example off the line of one before it? Then these two are on different lines.
    second = (cross != 0).tril(-1).any(-1)                                           # (B, k)
    both = second[:, None].expand_as(cross).tril(-1).any(-1)     # they are before the query
    return ratio, ratio | both | origin

# ------------------------------------------------------------- 4. Model: a decoder-only transformer
# Only z is scored, and it is predicted at the y before it. So in the last block only these tokens
# ask others, which gives the same logits with less work.
EVERY_TOKEN, EACH_Y = slice(None), slice(1, None, 3)     # which tokens of x y z x y z ... ask

def rotary_tables(positions, width, base):
    """cos and sin of position * frequency, (T, width / 2): one for each pair of a head's numbers.

    The first pairs turn fast and tell positions apart. The last ones hardly turn at all, and are
    free to compare what tokens say. A larger base gives more of these."""
    pair = torch.arange(width // 2, dtype=torch.float32, device=positions.device)
    frequencies = base ** (-2 * pair / width)                    # (D / 2,), from 1 to 1 / base
    angles = torch.outer(positions, frequencies)
    return angles.cos(), angles.sin()

def rotate(x, cos, sin):
    """Turn pairs (u, v) of x (..., T, D) by their position's angle: scores depend on distances."""
    u, v = x.chunk(2, dim=-1)
    return torch.cat((u * cos - v * sin, u * sin + v * cos), dim=-1)

class Attention(nn.Module):
    """Causal multi-head self-attention: the tokens that ask look at themselves and all before."""
    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(cfg.embd, cfg.embd, bias=False) for _ in range(4))
        self.softmax = nn.Softmax(dim=-1)      # a module, so that a hook can read the scores

    def forward(self, x, cos, sin, asking):
        T = x.size(1)                                                                # x (B, T, C)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2)     # (B, H, Q or T, D)
                   for t in (self.query(x[:, asking]), self.key(x), self.value(x)))
        q, k = rotate(q, cos[asking], sin[asking]), rotate(k, cos, sin)
        scores = (q / math.sqrt(q.size(-1))) @ k.mT                                  # (B, H, Q, T)
        future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)[asking]       # (Q, T)
        heads = self.softmax(scores.masked_fill(future, -math.inf)) @ v              # (B, H, Q, D)
        return self.out(heads.transpose(1, 2).flatten(2))                            # (B, Q, C)

class MLP(nn.Module):
    """Two matrices and a ReLU; its neurons are the numbers between them."""
    def __init__(self, cfg):
        super().__init__()
        self.up = nn.Linear(cfg.embd, MLP_RATIO * cfg.embd, bias=False)
        self.down = nn.Linear(MLP_RATIO * cfg.embd, cfg.embd, bias=False)

    def forward(self, x):
        return self.down(F.relu(self.up(x)))

class Block(nn.Module):
    """Attention, then MLP; each reads the normalized residual stream and adds to it."""
    def __init__(self, cfg):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(cfg.embd), Attention(cfg)
        self.norm2, self.mlp = nn.LayerNorm(cfg.embd), MLP(cfg)

    def forward(self, x, cos, sin, asking):
        x = x[:, asking] + self.attention(self.norm1(x), cos, sin, asking)           # (B, Q, C)
        return x + self.mlp(self.norm2(x))

class GPT(nn.Module):
    """The paper's transformer, on sequences x y z x y z ..."""
    def __init__(self, cfg):
        super().__init__()
        self.head_width, self.rope_base = cfg.embd // cfg.heads, cfg.rope_base
        self.embedding = nn.Embedding(cfg.p, cfg.embd)       # its transpose reads out the logits
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.embd)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # the residual stream sums 2 * depth outputs; the paper scales down the MLPs' share
                shrink = math.sqrt(2 * cfg.depth) if name.endswith("mlp.down.weight") else 1
                nn.init.normal_(weight, std=cfg.init_std / shrink)

    def forward(self, tokens, asking=EACH_Y, positions=None):
        """Logits of the token after each that `asking` selects: tokens (B, T) -> (B, Q, p).

        By default at each y, so that Q = k. positions (T,) of the tokens: else 0, 1, 2, ..."""
        if positions is None:
            positions = torch.arange(tokens.size(1), device=tokens.device)
        cos, sin = rotary_tables(positions, self.head_width, self.rope_base)         # (T, D / 2)
        x = self.embedding(tokens)                                                   # (B, T, C)
        *others, last = self.blocks
        for block in others:
            x = block(x, cos, sin, EVERY_TOKEN)                                      # (B, T, C)
        x = last(x, cos, sin, asking)                                                # (B, Q, C)
        return self.norm(x) @ self.embedding.weight.T                                # (B, Q, p)

# --------------------------------------------------------------------------------------- 5. Lessons
# Ratio Matching takes two skills, to divide and to find the example on the query's line. Neither
# earns anything without the other. Where all examples are on one line any of them will do, so the
# lessons begin there, and then allow more lines.
#
# Modular Regression is the same trap again. Divide z = a x + b y by y: with t = z/y and s = x/y it
# is t = a s + b. So an example has a *height* t at its *place* s, and the height at the query's
# place is asked. One example elsewhere says nothing about it. Two determine it, with weights that
# depend on the three places. So to find one earns nothing before the other is found, and weighed.
# From three blocks on there follow lessons of one of two kinds: a row makes two examples easy to
# find and to weigh, squares make one of them worth something by itself.
#   Row (p < 20). From example to example y/x is multiplied by g, the same in all rows, so that s is
# divided by it. Then g t[n] = (1 + g) t[n-1] - t[n-2]: always these two, always with these weights.
#   Squares (p > 20). Let the slope a be a square mod p. As t - t[i] = a (s - s[i]), one of these
# differences is a square just if the other is. So each example i excludes half of the answers t,
# and a few leave only one. On a "side" each place minus every earlier one is a square, and so the
# right t minus every earlier height is, too.
#
# Rows leave out both axes, as 0 has no logarithm, and a model that divides by y fails where y = 0.
# So a lesson "axis" is reviewed, with others: without reviews earlier skills are forgotten.

@dataclass
class Lesson:
    """A kind of training sequence, and when it is learned."""
    name: str
    lines: int                   # how many a sequence has, at most
    examples: int                # how many it has, if cfg.examples allows
    order: str = "any"           # any: each example on any of the lines; row, side: see above;
    #                              once: no two on one line, in random order; axis: all on one axis
    squares: bool = False        # only tasks whose a is a square other than 0
    more: int = 1                # times the usual number of sequences
    gaps: bool = False           # between examples, random ones
    score_y: bool = False        # the loss is of y, too
    skill: int = RATIO           # the algorithm whose solvable queries count
    enough: float = 0.9          # the share of them that must be right; more than guessing gets
    reviews: tuple = ()          # other lessons, in turn at every other step
    rate: float = 1.0            # share of the peak learning rates
    steps: int = 2000            # it may take, else the run ends; the last lesson takes them all

def lessons(cfg):
    """The lessons of a run in order; the last has free inputs. To add one, list it here."""
    p, kind = cfg.p, cfg.lessons
    if kind == "auto":
        kind = ("lines" if cfg.depth < 3 or min(p - 1, cfg.examples) < 3 else
                "pairs" if p < 20 else "squares")
    free = Lesson("free", p + 1, cfg.examples, steps=cfg.steps)  # the paper's training
    if kind == "none":
        return [free]
    more = 2 if kind == "lines" else 1              # with lines alone small batches learn slowly
    lines = [
        Lesson("1 line", 1, 8, more=more, gaps=True, score_y=True),
        Lesson("2 lines", 2, 8, more=more, gaps=True),
        *(Lesson(f"{n} lines", n, 16, more=more)
          for n in (4, 8, 16, 32, 64, 128, 256, 512) if n <= p)]
    if kind == "lines":
        return [*lines, free]
    axis = Lesson("axis", 1, 8, order="axis")
    once = Lesson("each line once", p + 1, p + 1, order="once", skill=REGRESSION, enough=0.35)
    if kind == "pairs":
        few = min(8, p - 1)
        row = Lesson("row", few, few, order="row", skill=REGRESSION, rate=0.8, enough=0.8,
                     reviews=(free,))
        apart = replace(row, name="row with gaps", gaps=True)
        harder = [row, apart, replace(once, rate=0.4, reviews=(free, apart, axis))]
    else:
        side = Lesson("side", 4, 4, order="side", squares=True, skill=REGRESSION, rate=0.6,
                      enough=0.1, reviews=(free,))
        squares = replace(once, name="squares", squares=True, rate=0.5, enough=0.15,
                          reviews=(free, side))
        harder = [side, squares, replace(once, rate=0.5, reviews=(free, squares))]
    return [*lines, *harder, replace(free, rate=0.4, reviews=(once, axis))]

def todays_lesson(lesson, step):
    """The lesson that a step is of: this one, or at even steps one that it reviews. (So the last of
    ten steps, 9, 19, ..., at which train looks, is the lesson's own.)"""
    if not lesson.reviews or step % 2 == 1:
        return lesson
    return lesson.reviews[step // 2 % len(lesson.reviews)]

def batch_shape(lesson, cfg):
    """(sequences, examples in each) of a step; more sequences while they are short."""
    k = min(lesson.examples, cfg.examples)
    return lesson.more * cfg.batch * (cfg.examples // k), k

def allowed_lines(lesson, n, k, input_lines, p, rng):
    """Which lines each example of n sequences may lie on: weights (n, k, p + 1), 1 or (almost) 0;
    (n, 1, p + 1) if they are the same for all k examples of a sequence."""
    if lesson.order == "any":
        if lesson.lines > p:
            return torch.ones(n, 1, p + 1, device=input_lines.device)
        # the lines of inputs drawn at random
        drawn = torch.randint(len(input_lines), (n, lesson.lines), **rng)
        lines = torch.zeros(n, p + 1, device=input_lines.device)
        return lines.scatter(1, input_lines[drawn], 1).unsqueeze(1)          # (n, 1, p + 1)
    if lesson.order == "axis":                                   # line 0 or p
        line = p * torch.randint(2, (n, 1), **rng).expand(n, k)
    elif lesson.order == "once":
        line = torch.rand(n, p + 1, **rng).argsort(1)[:, :k]
    elif lesson.order == "side":
        place = draw_side(n, k, p, rng)
        line = line_of(torch.stack((place, torch.ones_like(place)), dim=-1), p)
    else:                                                        # a row, by logarithms
        first = torch.randint(p - 1, (n, 1), **rng)
        log = first + torch.arange(k, device=first.device)                           # (n, k)
        line = powers(p).to(first.device)[log % (p - 1)]
    # 1e-6, not 0: a line may have no input to train on. So one draw in 50,000 is off its line.
    return F.one_hot(line, p + 1).float().clamp(min=1e-6)

def draw_side(n, k, p, rng):
    """n times k places x/y, at random so that each minus every earlier one is a square: (n, k).
    There always are four such from p = 19 on (tried up to 101)."""
    place, drawn = torch.arange(p, device=rng["device"]), []
    weights = torch.ones(n, p, device=rng["device"])
    for _ in range(k):
        drawn.append(torch.multinomial(weights, 1, generator=rng["generator"]))      # (n, 1)
        weights = weights * is_square(place - drawn[-1], p)                          # (n, p)
    return torch.cat(drawn, dim=1)

def training_batch(split, input_lines, lesson, cfg, generator):
    """The sequences of a step, tokens (B, 3k). In a batch no task comes twice before all came once;
    inputs are drawn with replacement from those to train on, by the weights of their lines.
    input_lines (inputs,) is line_of(split["train_inputs"])."""
    tasks, inputs = split["id"], split["train_inputs"]
    if lesson.squares and (has := is_square(tasks[:, 0], cfg.p)).any():     # if none has, all tasks
        tasks = tasks[has]
    rng = dict(generator=generator, device=input_lines.device)
    B, k = batch_shape(lesson, cfg)
    rounds = math.ceil(B / len(tasks))                           # times through the tasks
    order = torch.cat([torch.randperm(len(tasks), **rng) for _ in range(rounds)])[:B]
    n = rounds if cfg.shared_inputs else B                       # sets of inputs to draw
    allowed = allowed_lines(lesson, n, k, input_lines, cfg.p, rng)
    # a row for each sequence, to draw k inputs from, or for each example, to draw one
    weights = allowed[:, :, input_lines].flatten(0, 1)
    draws = k // allowed.size(1)                                                     # k or 1
    chosen = torch.multinomial(weights, draws, replacement=True, generator=generator).view(n, k)
    if cfg.shared_inputs:                                        # one set each time through
        chosen = chosen.repeat_interleave(len(tasks), 0)[:B]
    return to_tokens(tasks[order], inputs[chosen], cfg.p)                            # (B, 3k)

def positions_of_tokens(lesson, k, cfg, generator):
    """Where a model sees the tokens of k examples, (3k - 1,): at 0, 1, 2, ..., or with gaps.

    Where the preceding example always helps, a model may find it by its distance, and never learn
    to look for an example by what it says. With gaps the k examples, in order, stand at random ones
    of 1.5 k positions (at most cfg.examples), others at each step. The last z is not shown."""
    position = torch.arange(k, device=generator.device)
    if lesson.gaps:
        n = min(cfg.examples, 3 * k // 2)
        position = torch.randperm(n, generator=generator, device=generator.device)[:k].sort().values
    return (3 * position[:, None] + torch.arange(3, device=position.device)).flatten()[:-1]

def training_loss(model, batch, positions=None, score_y=False):
    """Cross-entropy of the z in a batch (B, 3k), and their logits (B, k, p); score_y: of y, too.

    Scoring y is not in the paper. On one line an example's ratio y/x tells the y of each other x,
    and by this ratio the model later finds the example on the query's line."""
    logits = model(batch[:, :-1], EVERY_TOKEN if score_y else EACH_Y, positions)
    of_z = logits[:, 1::3] if score_y else logits                                    # (B, k, p)
    loss = F.cross_entropy(of_z.flatten(0, 1), batch[:, 2::3].flatten())
    if score_y:                                                  # it is predicted at each x
        loss = loss + F.cross_entropy(logits[:, 0::3].flatten(0, 1), batch[:, 1::3].flatten())
    return loss, of_z

def is_learned(lesson, batch, logits, p):
    """Whether the logits (B, k, p) get enough of the z in a batch (B, 3k) of this lesson right. The
    batch is new, and the logits are from before its update, so that this is a fair test."""
    solved = solvable(batch, p)[lesson.skill]
    right = solved & (logits.argmax(-1) == batch[:, 2::3])
    return bool(right.sum() > lesson.enough * solved.sum())

# ------------------------------------------------------------------------------------ 6. Evaluation
# `run` is a training's state, see make_run: split, model, optimizers, generator, device, lessons,
# the step, the evaluations so far (history), and the step at which each lesson was learned.

def eval_sequences(split, ood, n, k, p, seed):
    """The four sets of the paper as token sequences, {name: (n, 3k)}; ood: "val_ood" or "test_ood".

    Each sequence draws its own inputs; those of a test set, examples too, are test inputs."""
    sets, generator = {}, torch.Generator().manual_seed(seed)
    for whose in ("id", ood):
        for side in ("train", "test"):
            tasks, inputs = split[whose], split[f"{side}_inputs"]
            tasks = tasks[torch.arange(n) % len(tasks)]
            draw = torch.randint(len(inputs), (n, k), generator=generator)
            sets[f"{whose}_{side}"] = to_tokens(tasks, inputs[draw], p)
    return sets

def accuracy(hits, tokens):
    """Mean over sequences of hits (B, k): (2, k), of all queries in row 0, of novel ones in 1."""
    novel = torch.cat([novel_queries(t) for t in tokens.split(CHUNK)])
    chosen = torch.stack((torch.ones_like(novel), novel))                            # (2, B, k)
    return (hits * chosen).sum(1).cpu().double() / chosen.sum(1).cpu()

def oracle_accuracy(tokens, p):
    """accuracy() to be expected of Ratio Matching, and of Modular Regression, if both guess."""
    solved = torch.cat([torch.stack(solvable(t, p)) for t in tokens.split(CHUNK)], dim=1)
    return [accuracy(torch.where(s, 1.0, 1 / p), tokens) for s in solved]

@torch.no_grad()
def evaluate(predict, tokens):
    """accuracy(), (2, k), of a function from tokens (B, 3k - 1) to logits (B, k, p)."""
    hits = [predict(t[:, :-1]).argmax(-1) == t[:, 2::3] for t in tokens.split(CHUNK)]
    return accuracy(torch.cat(hits), tokens)

def phase(accuracies, ratio, p):
    """Phase (figure 1b) of four novel-query accuracies; good: halfway from chance to Ratio
    Matching's."""
    good = tuple(bool(m >= (1 / p + r) / 2) for m, r in zip(accuracies, ratio, strict=True))
    names = {  # good on i.d. tasks, train and test inputs, and on o.o.d. tasks, train and test
        (True, False, False, False): "in-distribution memorization",
        (True, True, False, False): "in-distribution generalization",
        (True, False, True, False): "o.o.d. memorization",
        (True, True, True, True): "o.o.d. generalization",
        (False,) * 4: "none yet: even i.d. train inputs are answered badly"}
    return names.get(good, "none of the paper's")

def best_evaluation(history, chance):
    """Index of the evaluation to keep: the best last-shot accuracy on validation o.o.d. tasks and
    test inputs. Until that is clearly above chance (grokking comes after a plateau) the newest."""
    curve = [row["val_ood_test"] for row in history]
    if max(curve) < chance + LEFT_CHANCE:
        return len(curve) - 1
    return curve.index(max(curve))

def evaluate_and_save(run, cfg, sets, loss, title):
    """Add a row to the run's history and metrics.csv, print it, save last.pt, if best best.pt. If
    a lesson was just learned, "lines" are the next one's, while loss and title are its own."""
    row = {"step": run.step, "loss": loss, "lines": current_lesson(run).lines}
    with run.autocast:                                       # the report will be in float32
        for name, tokens in sets.items():
            row[name], row[f"{name}_novel"] = evaluate(run.model, tokens)[:, -1].tolist()
    run.history.append(row)
    if best_evaluation(run.history, 1 / cfg.p) == len(run.history) - 1:
        save(run, cfg, "best.pt")
    if cfg.snapshots:
        save(run, cfg, f"step{run.step}.pt")
    table = [",".join(map(str, v)) for v in (row.keys(), *(r.values() for r in run.history))]
    write_file(os.path.join(cfg.out, "metrics.csv"), ("\n".join(table) + "\n").encode())
    save(run, cfg, "last.pt")
    tqdm.write("step {step:6d}  loss {loss:.3f}  i.d. {id_train:.2f}/{id_test:.2f}  o.o.d. "
               "{val_ood_train:.2f}/{val_ood_test:.2f}  ".format(**row) + title)
    print(end="", flush=True)                                # a file shows each line at once

def report(run, cfg):
    """Evaluate and print the best checkpoint: in this file the only look at the *test* tasks."""
    if not in_last_lesson(run):
        print(f"\nThe run ends at step {run.step} within the lesson "
              f'"{current_lesson(run).name}". Try more --tasks or another --seed.')
    best, _, model = load_checkpoint(os.path.join(cfg.out, "best.pt"), run.device)
    print(f"\nBest step {best['step']} of {run.step}. Accuracy on novel queries after "
          f"{cfg.examples - 1} shots, in %\n{'':27} model  ratio  regression")
    sets = eval_sequences(run.split, "test_ood", REPORT_SEQUENCES, cfg.examples, cfg.p,
                          cfg.seed + 2)
    found = []
    for name, tokens in sets.items():
        tokens = tokens.to(run.device)
        curves = evaluate(model, tokens), *oracle_accuracy(tokens, cfg.p)            # (2, k) each
        found.append([curve[1, -1].item() for curve in curves])
        label = f"{'i.d.' if name[:2] == 'id' else 'o.o.d.'} tasks, {name.split('_')[-1]} inputs"
        print(f"{label:27}" + "{:6.1f} {:6.1f} {:11.1f}".format(*(100 * a for a in found[-1])))
    accuracies, ratio, _ = zip(*found)
    print(f"Phase: {phase(accuracies, ratio, cfg.p)} "
          f"(o.o.d.: test tasks; chance {100 / cfg.p:.1f}%)")

# -------------------------------------------------------------------------------------- 7. Training
def make_optimizers(model, cfg):
    """Muon for the blocks' matrices (or AdamW, as in the paper), AdamW for the rest; a list.

    Adam rescales each number of a gradient by itself. Muon replaces a matrix's gradient, averaged
    over steps, by almost the nearest orthogonal matrix: all its singular values are about 1. So a
    direction that is rarely asked for is learned as fast. LayerNorm's weights do not decay."""
    embedding = model.embedding.weight
    matrices = [w for w in model.parameters() if w.ndim == 2 and w is not embedding]
    groups = [dict(params=[embedding], lr=cfg.embd_lr, weight_decay=cfg.wd),
              dict(params=[w for w in model.parameters() if w.ndim == 1], lr=cfg.embd_lr,
                   weight_decay=0.0)]
    if cfg.optimizer == "adamw":
        groups.append(dict(params=matrices, lr=cfg.lr, weight_decay=cfg.wd))
    optimizers = [torch.optim.AdamW(groups, betas=ADAM_BETAS, fused=True)]
    if cfg.optimizer == "muon":
        optimizers.append(torch.optim.Muon(matrices, lr=cfg.lr, weight_decay=cfg.wd))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers

def current_lesson(run):
    return run.lessons[len(run.learned)]

def in_last_lesson(run):
    return len(run.learned) == len(run.lessons) - 1

def last_step(run):
    """The step at which the current lesson's time is over, and, if it is the last, the training."""
    return (run.learned[-1] if run.learned else 0) + current_lesson(run).steps

def lr_factor(run, cfg):
    """The learning rate as a share of its peak: a linear rise over cfg.warmup steps, while the
    moments of the optimizers are still guesses; then the lesson's; in the last lesson half a cosine
    down to cfg.lr_end of it."""
    lesson, end = current_lesson(run), last_step(run)
    if run.step < cfg.warmup:
        return lesson.rate * (0.01 + 0.99 * run.step / cfg.warmup)   # not 0: step 0 learns, too
    if not in_last_lesson(run):
        return lesson.rate
    begin = max(cfg.warmup, end - lesson.steps)
    fallen = (1 - math.cos(math.pi * (run.step - begin) / (end - begin))) / 2        # 0 to 1
    return lesson.rate * (1 - (1 - cfg.lr_end) * fallen)

def is_over(run, cfg):
    """Whether training is over: by its steps, a lesson's limit, or early stopping."""
    waited = len(run.history) - 1 - best_evaluation(run.history, 1 / cfg.p) if run.history else 0
    return run.step >= last_step(run) or 0 < cfg.patience <= waited

def update_weights(run, loss, factor):
    """A step of the optimizers, at that share of their peak rates."""
    loss.backward()
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        optimizer.step()
        optimizer.zero_grad()

def train(run, cfg):
    """Train until the run is over; evaluate now and then, and save to cfg.out."""
    split = {name: pairs.to(run.device) for name, pairs in run.split.items()}
    input_lines = line_of(split["train_inputs"], cfg.p)
    sets = {name: tokens.to(run.device) for name, tokens in eval_sequences(
        run.split, "val_ood", EVAL_SEQUENCES, cfg.examples, cfg.p, cfg.seed + 1).items()}
    model = torch.compile(run.model) if cfg.compile else run.model
    with tqdm(initial=run.step, dynamic_ncols=True, disable=None) as bar:    # None: if no terminal
        while not is_over(run, cfg):
            lesson = current_lesson(run)
            today = todays_lesson(lesson, run.step)              # it may be a review
            batch = training_batch(split, input_lines, today, cfg, run.generator)    # (B, 3k)
            positions = positions_of_tokens(today, batch.size(1) // 3, cfg, run.generator)
            with run.autocast:
                loss, logits = training_loss(model, batch, positions, today.score_y)
            update_weights(run, loss, lr_factor(run, cfg))
            run.step += 1
            bar.update()
            learned = False
            if run.step % LOOK_EVERY == 0:            # a GPU waits here, so not at every step
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
                bar.total = last_step(run)
                learned = (today == lesson and not in_last_lesson(run)
                           and is_learned(lesson, batch, logits, cfg.p))
            if learned:
                run.learned.append(run.step)
            if learned or is_over(run, cfg) or run.step % cfg.eval_every == 0:
                evaluate_and_save(run, cfg, sets, loss.item(), lesson.name + ", learned" * learned)

# --------------------------------------------- 8. The lecture is over: what a running program needs
@contextlib.contextmanager
def refusing(what):
    """Whatever fails inside is a BadInput: a device, or a damaged file, can raise anything."""
    try:
        yield
    except Exception as e:
        raise BadInput(f"{what} ({type(e).__name__}: {str(e)[:80]})")

def pick_device(name):
    """The torch.device of that name; auto is CUDA or the CPU. BadInput where it isn't there."""
    with refusing(f"--device {name or repr(name)}: not usable here, try auto or cpu"):
        name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        torch.zeros(1, device=name).item()
        return torch.device(name)

def mixed_precision(cfg, device):
    """The autocast context of training: bfloat16 where the device has its instructions."""
    has = (torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else
           device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())
    return torch.autocast(device.type, torch.bfloat16, enabled=cfg.amp == "bf16" or (
        cfg.amp == "auto" and has))

STATE = ("split", "step", "learned", "history")       # of a run, beside weights and moments

def make_run(cfg, checkpoint=None):
    """A run's state, new or from a checkpoint; BadInput if that doesn't fit cfg."""
    device = pick_device(cfg.device)
    torch.manual_seed(cfg.seed)                                  # of the initial weights
    run = SimpleNamespace(
        split=make_split(cfg), lessons=lessons(cfg), device=device, model=GPT(cfg).to(device),
        generator=torch.Generator(device).manual_seed(cfg.seed), step=0, history=[], learned=[])
    run.optimizers = make_optimizers(run.model, cfg)
    run.autocast = mixed_precision(cfg, device)
    if checkpoint:
        with refusing(f"{cfg.out}/last.pt: doesn't fit its own config"):
            torch.testing.assert_close(checkpoint["split"], run.split)
            vars(run).update({name: checkpoint[name] for name in STATE})
            run.model.load_state_dict(checkpoint["model"])
            for optimizer, saved in zip(run.optimizers, checkpoint["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            if checkpoint["device"] == device.type:          # else the random numbers differ anyway
                run.generator.set_state(checkpoint["generator"])
    return run

def write_file(path, content):
    """Write bytes under another name, then rename: a reader finds the old file or the new one."""
    with open(path + ".tmp", "wb") as f:
        f.write(content)
    os.replace(path + ".tmp", path)

def save(run, cfg, name):
    """Write all of the run and its config to cfg.out/name, unless a weight isn't finite."""
    if not all(w.isfinite().all() for w in run.model.parameters()):
        raise BadInput(f"--lr {cfg.lr}: at step {run.step} weights not finite; lower rates")
    state = {key: getattr(run, key) for key in STATE}
    state |= dict(config=asdict(replace(cfg, resume=False)), device=run.device.type,
                  model=run.model.state_dict(),
                  optimizers=[o.state_dict() for o in run.optimizers],
                  generator=run.generator.get_state())
    torch.save(state, buffer := io.BytesIO())
    write_file(os.path.join(cfg.out, name), buffer.getbuffer())

def load_checkpoint(path, device="cpu"):
    """(dict, Config, GPT on device) of this program's checkpoint at path; else BadInput. Settings
    that are no more are dropped; new ones have their defaults, as older models were trained."""
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such file")
    with refusing(f"{path}: damaged, or of another version of the code"):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no foreign code
        known = {k: v for k, v in checkpoint["config"].items() if k in NAMES}
        model = GPT(cfg := Config(**known))
        model.load_state_dict(checkpoint["model"])
    return checkpoint, cfg, model.to(device)

def flag(name):
    return "--" + name.replace("_", "-")

class Parser(argparse.ArgumentParser):
    """Raises BadInput where argparse's own would print its usage and exit."""
    def error(self, message):
        raise BadInput(message)

def make_parser():
    """The parser of the settings; flags not typed are left out."""
    parser = Parser(description="Train on modular arithmetic in context.",
                    allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=PRESETS, help="settings that go together: PRESETS")
    for f in fields(Config):
        paper = f.metadata["paper"]
        value = f.default if f.default == paper else f"{f.default}; paper: {paper}"
        how = (dict(action=argparse.BooleanOptionalAction) if f.type is bool else
               dict(type=f.type, choices=f.metadata["choices"]))
        parser.add_argument(flag(f.name), help=f"{f.metadata['help']} [{value}]", **how)
    return parser

def parse_config(argv=None):
    """(Config, checkpoint) of a command line, the checkpoint None for a new run; BadInput if no run
    can have it. With --resume what isn't typed is as the run in the folder has it."""
    typed = vars(make_parser().parse_args(argv))
    preset = typed.pop("preset", "default")
    out = typed.setdefault("out", os.path.join("out", "-".join(
        [preset, *(f"{name}{typed[name]}" for name in FIXED if name in typed)])))
    asked, checkpoint = PRESETS.get(preset, {}) | typed, None
    if os.path.isdir(out) and os.listdir(out):
        if not typed.get("resume"):
            raise BadInput(f"--out {out}: holds a run, or other files. The same command with "
                           "--resume goes on with a run; to start afresh, take another --out")
        checkpoint, saved, _ = load_checkpoint(os.path.join(out, "last.pt"))
        for name in FIXED:
            if asked.get(name, getattr(saved, name)) != getattr(saved, name):
                raise BadInput(f"{flag(name)} {asked[name]}: the run in {out} has "
                               f"{getattr(saved, name)}, which --resume can't change")
        asked = asdict(saved) | typed
        if checkpoint.get("history"):                 # the closing report will want best.pt
            load_checkpoint(os.path.join(out, "best.pt"))
    check_settings(cfg := Config(**asked))
    return cfg, checkpoint

def check_settings(cfg):
    """Raise BadInput, naming flag, value and what is accepted, if no run can have them."""
    def need(ok, name, accepted):
        if not ok:
            raise BadInput(f"{flag(name)} {getattr(cfg, name)}: must be {accepted}")
    for f in fields(Config):
        if f.metadata["between"]:
            low, high = f.metadata["between"]
            need(low <= getattr(cfg, f.name) <= high, f.name, f"from {low} to {high}")
    p = cfg.p
    need(all(p % d for d in range(2, math.isqrt(p) + 1)), "p", "a prime from 3 to 997")
    need(cfg.tasks <= p * p - 2 and cfg.tasks % 4 == 0, "tasks",
         f"a multiple of 4, for the rectangles, and at most {p * p - 2}, to leave two o.o.d.")
    need(2 <= round(cfg.alpha * p * p) <= p * p - 2, "alpha",
         f"between 0 and 1 and leave at least 2 of the {p * p} inputs on either side")
    need(cfg.embd % (2 * cfg.heads) == 0, "heads",
         f"a divisor of half of --embd {cfg.embd}: each head's width is even, for the rotation")
    need(cfg.steps > cfg.warmup, "steps", f"above --warmup {cfg.warmup}; or lower that")
    need(cfg.lessons != "pairs" or min(p - 1, cfg.examples) > 2, "lessons",
         "auto, lines or none with --p 3 or --examples 2: a pair needs a third line")
    need(cfg.lessons != "squares" or p > 17 and cfg.examples > 2, "lessons",
         "auto, lines or none with --p below 19 or --examples 2: a side has four places")

def complain(error):
    """Print a BadInput as one line and return the exit code."""
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return 2

def main(argv=None):
    """Parse, train, report. Returns the exit code or None; what goes wrong is a line on stderr."""
    try:
        cfg, checkpoint = parse_config(argv)
        run = make_run(cfg, checkpoint)
        with refusing(f"--out {cfg.out}: can't be written"):
            os.makedirs(cfg.out, exist_ok=True)
            save(run, cfg, "last.pt")                 # so that whatever is found can be resumed
        print(f"p {cfg.p}, {cfg.tasks} tasks, depth {cfg.depth}, batch {cfg.batch}, seed "
              f"{cfg.seed}; torch {torch.__version__} on {run.device}; {cfg.out}", flush=True)
        train(run, cfg)
        report(run, cfg)
    except KeyboardInterrupt:
        print("\nStopped. The same command with --resume goes on from the last evaluation.")
        return 130
    except BadInput as e:
        return complain(e)

if __name__ == "__main__":
    sys.exit(main())
