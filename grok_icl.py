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
    python grok_icl.py --depth 2 --tasks 512     the paper's p = 29, 2.3 minutes on two CPU cores
    python grok_icl.py --preset paper            as published; wants a GPU
"""
import argparse
import contextlib
import io
import math
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass, field, fields, replace
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# -------------------------------------------------------------------------------------- 1. Settings

class BadInput(ValueError):
    """What the user can mend: main shows it as one line on stderr and returns 2."""

def option(default, paper, help, accepts=None):
    """A field with its default, the paper's value, and what it accepts: (low, high) or a list."""
    return field(default=default, metadata=dict(paper=paper, help=help, accepts=accepts))

@dataclass
class Config:
    """The settings of a run. Each field is a flag: its default, the paper's value, what it is."""
    # what is learned
    p: int = option(29, 29, "prime modulus; its residues are the vocabulary", (3, 997))
    tasks: int = option(512, 512, "pre-training tasks (a, b), out of p*p", (1, 10**6))
    alpha: float = option(0.8, 0.8, "fraction of the p*p inputs (x, y) that is trained on", (0, 1))
    examples: int = option(32, 32, "examples in a sequence, three tokens each", (2, 512))
    # the transformer
    depth: int = option(2, 2, "transformer blocks; the paper has 2, 4 and 6", (1, 100))
    heads: int = option(4, 4, "attention heads a block, best up to 32 wide", (1, 256))
    embd: int = option(128, 512, "width of the residual stream; the MLP is 4 times it", (2, 16384))
    init_std: float = option(0.05, 0.02, "standard deviation of the weights at first", (1e-6, 10))
    # how it is trained
    curriculum: int = option(2000, 0, "steps that the curriculum may take; 0: none", (0, 10**9))
    spread: bool = option(True, False, "on few lines, gaps between examples; spread_positions()")
    score_y: bool = option(True, False, "while the curriculum has one line, learn y as well")
    shared_inputs: bool = option(False, True, "all tasks of a batch see the same inputs")
    optimizer: str = option("muon", "adamw", "updates the blocks' matrices", ["muon", "adamw"])
    lr: float = option(0.012, 1.5e-4, "peak learning rate of the blocks' matrices", (1e-12, 1e3))
    embd_lr: float = option(0.001, 1.5e-4, "that of embedding and LayerNorm", (1e-12, 1e3))
    lr_end: float = option(0.02, 0.1, "share of the peak rates that is left at the end", (0, 1))
    wd: float = option(0.2, 2.0, "weight decay of matrices and embedding", (0, 1e3))
    batch: int = option(64, 1024, "sequences a step, more while they are short", (1, 10**6))
    steps: int = option(1200, 200_000, "steps with all lines; the rate falls over them", (1, 10**9))
    warmup: int = option(100, 10_000, "steps of linear warm-up", (0, 10**9))
    seed: int = option(0, 0, "of the split, the initial weights and the batches", (0, 2**32 - 1))
    # how it is run: what --resume may change
    eval_every: int = option(100, 1000, "steps between evaluations", (1, 10**9))
    patience: int = option(0, 0, "evaluations without a best to stop after; 0: never", (0, 10**9))
    snapshots: bool = option(False, False, "keep the weights of each evaluation, step100.pt, ...")
    device: str = option("auto", "auto", "cpu, cuda, mps, ...; auto: cuda if there is one")
    amp: str = option("auto", "auto", "autocast; auto: if fast", ["auto", "bf16", "fp16", "off"])
    compile: str = option("auto", "auto", "torch.compile; auto: if it pays", ["auto", "on", "off"])
    out: str = option("", "", "folder of the run; by default out/ and the flags")
    resume: bool = option(False, False, "continue the run in --out")

NAMES = [f.name for f in fields(Config)]
FIXED = NAMES[:NAMES.index("eval_every")]     # what --resume may not change
PRESETS = {                   # in place of the defaults; a flag on the command line outdoes both
    "quick": dict(p=13, tasks=84, examples=16, embd=64, batch=84, steps=800),
    "regression": dict(tasks=640, depth=4, heads=8, embd=256, init_std=.035, batch=128, steps=6000),
    "paper": {f.name: f.metadata["paper"] for f in fields(Config)}}

MLP_RATIO = 4                 # MLP width / residual width
ROPE_BASE = 10_000            # frequencies of the rotary embedding fall from 1 to about 1/ROPE_BASE
ADAM_BETAS = (0.9, 0.98)
MASTERED = 0.9                # share of what Ratio Matching can answer that brings more lines
PACE_EVERY = 10               # steps between looks at that share
EVAL_SEQUENCES = 512          # of each set, at every evaluation
REPORT_SEQUENCES = 2048       # of each set, in the closing report
CHUNK = 256                   # sequences evaluated at once
STATE = ("split", "step", "history", "lines", "end")         # of a run, beside weights and moments
COMPILE_PAYS = 20_000         # steps on a GPU, for compiling takes over a minute
LEFT_CHANCE = 0.2             # early stopping waits until the accuracy is this far above 1/p

def rank_and_world():
    """(This process's number, how many there are), from torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# ---------------------------------------------------------- 2. Data: tasks, rule, splits, sequences

def grid(p):
    """All p*p pairs of residues, (p*p, 2): the tasks (a, b), and also the inputs (x, y)."""
    return torch.cartesian_prod(torch.arange(p), torch.arange(p))

def features(inputs, p):
    """The residues (u, v) of inputs (x, y) in which z is linear, z = a u + b v: (..., 2). In the
    paper they are x and y. For z = a x^2 + b y return, in place of the inputs,
    torch.stack((inputs[..., 0] ** 2 % p, inputs[..., 1]), dim=-1); all else follows."""
    return inputs

def to_tokens(tasks, inputs, p):
    """Tasks (B, 2) and inputs (B, k, 2), both residues -> tokens x y z x y z ... (B, 3k)."""
    z = (tasks[:, None] * features(inputs, p)).sum(-1, keepdim=True) % p                # (B, k, 1)
    return torch.cat((inputs, z), dim=-1).flatten(1)                                 # (B, 3k)

def line_of(inputs, p):
    """The line through the origin of inputs (..., 2): their features' ratio v/u, or p if u = 0."""
    inverse = torch.tensor([0] + [pow(u, -1, p) for u in range(1, p)], device=inputs.device)
    u, v = features(inputs, p).unbind(-1)
    return torch.where(u > 0, v * inverse[u] % p, p)                                 # (...)

def choose_rectangles(p, n, generator, tries=100):
    """n pre-training tasks by the paper's rectangular rule, (n, 2).

    To a random task (a, b) add (a', b), (a, b') and (a', b'), all new. So each task shares either
    component with another one: the two can vary apart. Raises BadInput where none is left."""
    free, tasks = torch.ones(p, p, dtype=torch.bool), []
    for a, b in grid(p)[torch.randperm(p * p, generator=generator)].tolist():
        if not free[a, b] or len(tasks) == n:
            continue
        free[a, b] = False                                   # so c != a and d != b below, too
        fits = (free[:, b, None] & free[a] & free).nonzero()         # (a', b') with all three free
        if len(fits) > 0:
            c, d = fits[torch.randint(len(fits), (1,), generator=generator)].squeeze(0).tolist()
            tasks += [(a, b), (c, b), (a, d), (c, d)]
            free[[c, a, c], [b, d, d]] = False
    if len(tasks) < n and tries > 0:                         # an unlucky start has blocked itself
        return choose_rectangles(p, n, generator, tries - 1)
    if len(tasks) < n:
        raise BadInput(f"--tasks {n}: no {n // 4} disjoint rectangles in {p}*{p} tasks; take fewer")
    return torch.tensor(tasks)

def make_split(cfg):
    """Who is trained on, and who only tested: a dict of (n, 2) tensors of residues.

    "id" are the pre-training tasks. The others are out of distribution, in two halves (the paper
    has one): early stopping looks at "val_ood", the closing report alone at "test_ood". All tasks
    share the inputs. With more tasks the same seed has the same inputs, and the tasks it had."""
    generator, p = torch.Generator().manual_seed(cfg.seed), cfg.p
    inputs, others = (grid(p)[torch.randperm(p * p, generator=generator)] for _ in range(2))
    tasks = choose_rectangles(p, cfg.tasks, generator)
    is_id = torch.zeros(p, p, dtype=torch.bool)
    is_id[tasks[:, 0], tasks[:, 1]] = True
    ood = others[~is_id[others[:, 0], others[:, 1]]]
    n_train, n_val = round(cfg.alpha * p * p), len(ood) // 2
    return {"id": tasks, "val_ood": ood[:n_val], "test_ood": ood[n_val:],
            "train_inputs": inputs[:n_train], "test_inputs": inputs[n_train:]}

def eval_sequences(split, ood, n, k, p, seed):
    """The four sets of the paper as token sequences, {name: (n, 3k)}; ood: "val_ood" or "test_ood".

    Each sequence draws its own inputs; those of a test set, examples too, are test inputs."""
    sets, generator = {}, torch.Generator().manual_seed(seed)
    for kind in ("id", ood):
        for side in ("train", "test"):
            tasks, inputs = split[kind], split[f"{side}_inputs"]
            draw = torch.randint(len(inputs), (n, k), generator=generator)
            sets[f"{kind}_{side}"] = to_tokens(tasks[torch.arange(n) % len(tasks)], inputs[draw], p)
    return sets

# -------------------------------------------------------------------------- 3. Two exact algorithms

def novel_queries(tokens):
    """Which queries are no copy of an earlier example's input: (B, 3k) -> bool (B, k)."""
    xy = tokens.unflatten(1, (-1, 3))[..., :2]                                       # (B, k, 2)
    same = (xy[:, :, None] == xy[:, None, :]).all(-1)            # (B, query, example)
    return ~same.tril(-1).any(-1)                                # tril(-1): examples before it

def solvable(tokens, p):
    """What the examples before each query determine, exactly: two bool tensors (B, k).

    Ratio Matching answers (u, v) = c (u_i, v_i) with c z_i: it needs an earlier example other than
    (0, 0) on the query's line through the origin, or any at all for the query (0, 0). Modular
    Regression combines examples: it needs that, or two on different lines, or the query (0, 0)."""
    u, v = features(tokens.unflatten(1, (-1, 3))[..., :2], p).unbind(-1)             # (B, k)
    # A query and an example are on one line just if this determinant is 0: (B, query, example).
    cross = (u[:, :, None] * v[:, None, :] - v[:, :, None] * u[:, None, :]) % p
    origin = (u == 0) & (v == 0)                                                     # (B, k)
    helps = (cross == 0) & (~origin[:, None, :] | origin[:, :, None])
    ratio = helps.tril(-1).any(-1)                               # an example before the query does
    # Two lines among the examples before t: one of them is off the line of an earlier one. cummax
    # carries a True on to all later t, and the shift leaves t itself out.
    off_a_line = (cross != 0).tril(-1).any(-1).cummax(dim=1).values                  # (B, k)
    two_lines = F.pad(off_a_line[:, :-1], (1, 0))
    return ratio, ratio | two_lines | origin

def accuracy(hits, tokens):
    """Mean of hits (B, k), bools or scores, at each shot over all and novel queries: (2, k)."""
    novel = torch.cat([novel_queries(t) for t in tokens.split(CHUNK)])
    chosen = torch.stack((torch.ones_like(novel), novel))                            # (2, B, k)
    return (hits * chosen).sum(1).cpu().double() / chosen.sum(1).cpu()

def oracle_accuracy(tokens, p):
    """Expected accuracies (2, k) of Ratio Matching and Modular Regression, guessing included."""
    solved = torch.cat([torch.stack(solvable(t, p)) for t in tokens.split(CHUNK)], dim=1)
    return [accuracy(torch.where(s, 1.0, 1 / p), tokens) for s in solved]

# ------------------------------------------------------------- 4. Model: a decoder-only transformer

def rotary_tables(length, width):
    """cos and sin of position * frequency, (length, width / 2): one for each pair of numbers."""
    frequencies = ROPE_BASE ** (-torch.arange(0, width, 2) / width)
    angles = torch.outer(torch.arange(length), frequencies)
    return angles.cos(), angles.sin()

def rotate(x, cos, sin):
    """Turn pairs (u, v) of x (..., T, D) by their position's angle: scores depend on distances."""
    u, v = x.chunk(2, dim=-1)
    return torch.cat((u * cos - v * sin, u * sin + v * cos), dim=-1)

class Attention(nn.Module):
    """Causal multi-head self-attention. Queries are asked at the tokens `at`, all by default."""
    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(cfg.embd, cfg.embd, bias=False) for _ in range(4))
        self.softmax = nn.Softmax(dim=-1)      # a module, so that a hook can read the weights
        length = 3 * cfg.examples
        cos, sin = rotary_tables(length, cfg.embd // cfg.heads)
        future = torch.full((length, length), -math.inf).triu(1)
        for name, table in dict(cos=cos, sin=sin, future=future).items():
            self.register_buffer(name, table, persistent=False)

    def forward(self, x, positions=None, at=slice(None)):
        T = x.size(1)                                                                # x (B, T, C)
        positions = slice(T) if positions is None else positions[:T]
        cos, sin = self.cos[positions], self.sin[positions]                          # (T, D / 2)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2)     # (B, H, Q or T, D)
                   for t in (self.query(x[:, at]), self.key(x), self.value(x)))
        q, k = rotate(q, cos[at], sin[at]), rotate(k, cos, sin)    # (B, H, Q, D), (B, H, T, D)
        scores = (q / math.sqrt(q.size(-1))) @ k.mT                                  # (B, H, Q, T)
        scores = scores + self.future[:T, :T][at].to(scores.dtype)       # to keep autocast's type
        heads = self.softmax(scores) @ v                                             # (B, H, Q, D)
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

    def forward(self, x, positions=None, at=slice(None)):
        x = x[:, at] + self.attention(self.norm1(x), positions, at)                  # (B, Q, C)
        return x + self.mlp(self.norm2(x))

class GPT(nn.Module):
    """The paper's transformer, on sequences x y z x y z ... of at most cfg.examples examples."""
    def __init__(self, cfg):
        super().__init__()
        self.embedding = nn.Embedding(cfg.p, cfg.embd)       # its transpose reads out the logits
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.embd)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # the residual stream sums 2 * depth outputs; the paper scales down the MLPs' share
                shrink = math.sqrt(2 * cfg.depth) if name.endswith("mlp.down.weight") else 1
                nn.init.normal_(weight, std=cfg.init_std / shrink)

    def forward(self, tokens, everywhere=False, positions=None):
        """Logits of each z from the tokens before it: tokens (B, T) -> (B, k, p).

        A z is predicted at the y before it, so the last block asks there alone, at 1, 4, 7, ...
        With everywhere: logits at all tokens, (B, T, p). positions (T,): where the tokens stand."""
        x = self.embedding(tokens)                                                   # (B, T, C)
        *others, last = self.blocks
        for block in others:
            x = block(x, positions)
        x = last(x, positions, slice(None) if everywhere else slice(1, None, 3))     # (B, k, C)
        return self.norm(x) @ self.embedding.weight.T                                # (B, k, p)

# --------------------------------------------------------------------------- 5. Loss and curriculum

def training_loss(model, batch, score_y, positions=None):
    """Cross-entropy of the z in a batch (B, 3k), and their logits (B, k, p); score_y: of y, too.

    Scoring y is not in the paper. On one line an example's ratio y/x tells the y of each other x,
    and by this ratio the model later finds the example on the query's line."""
    logits = model(batch[:, :-1], everywhere=score_y, positions=positions)
    if not score_y:                                              # logits of z alone, (B, k, p)
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 2::3].flatten()), logits
    of_y, of_z = logits[:, 0::3], logits[:, 1::3]                # read at each x, at each y
    return (F.cross_entropy(of_y.flatten(0, 1), batch[:, 1::3].flatten())
            + F.cross_entropy(of_z.flatten(0, 1), batch[:, 2::3].flatten())), of_z

# The curriculum: at first each sequence keeps to one line. There any example answers any query, so
# the model learns to divide. On more lines it must also find out which example to use.

def pace(run, cfg, logits, batch):
    """Double the number of lines once the present ones are mastered, that is, if in this batch
    (B, 3k) the logits (B, k, p) get more than MASTERED of the z right that Ratio Matching can
    answer. With all p + 1 lines the curriculum is over, and the last cfg.steps begin."""
    can, _ = solvable(batch, cfg.p)
    right = can & (logits.argmax(-1) == batch[:, 2::3])
    counts = torch.stack((right.sum(), can.sum()))
    if dist.is_initialized():                                # each process has a share of the batch
        dist.all_reduce(counts)
    if counts[0] > MASTERED * counts[1]:
        run.lines = min(2 * run.lines, cfg.p + 1)
        if run.lines > cfg.p:
            run.end = run.step + cfg.steps

def lr_factor(step, cfg, end):
    """The learning rate as a share of its peak. It rises over cfg.warmup steps, while the moments
    of the optimizers are still guesses, stays at its peak until all lines are allowed, and falls
    like half a cosine over the cfg.steps that end the run."""
    if step < cfg.warmup:
        return 0.01 + 0.99 * step / cfg.warmup               # not 0, so that step 0 learns, too
    begin = max(cfg.warmup, end - cfg.steps)
    fallen = (1 - math.cos(math.pi * max(0, step - begin) / (end - begin))) / 2        # 0 to 1
    return 1 - (1 - cfg.lr_end) * fallen

def step_shape(cfg, lines):
    """(sequences, examples in each) of a training step. On few lines few examples tell all: 8 up to
    two lines, 16 until all are allowed. In return there are more sequences, because the curriculum
    is slow with less than twice the examples of a later step (assets/log.md)."""
    if lines > cfg.p:
        return cfg.batch, cfg.examples
    k = min(cfg.examples, 8 if lines <= 2 else 16)
    return 2 * cfg.batch * (cfg.examples // k), k

def training_batch(split, input_lines, cfg, lines, generator):
    """The sequences of a step, tokens (B, 3k), on at most `lines` lines each. In a batch no task
    comes twice before all came once, and inputs are drawn evenly from those to train on, with
    replacement. input_lines is line_of(split["train_inputs"]); lines > p means any."""
    tasks, inputs, random = split["id"], split["train_inputs"], dict(
        generator=generator, device=input_lines.device)
    batch, k = step_shape(cfg, lines)
    rounds = math.ceil(batch / len(tasks))
    order = torch.cat([torch.randperm(len(tasks), **random) for _ in range(rounds)])[:batch]
    n = rounds if cfg.shared_inputs else batch               # how many choices of inputs to make
    allowed = torch.ones(n, cfg.p + 1, device=input_lines.device)    # 1: that line may be used
    if lines <= cfg.p:                                       # the lines of so many random inputs
        drawn = torch.randint(len(inputs), (n, lines), **random)
        allowed = torch.zeros_like(allowed).scatter_(1, input_lines[drawn], 1)
    weights = allowed[:, input_lines]                        # 1 for an input on them: (n, inputs)
    chosen = torch.multinomial(weights, k, replacement=True, generator=generator)    # (n, k)
    if cfg.shared_inputs:
        chosen = chosen.repeat_interleave(len(tasks), 0)[:batch]
    return to_tokens(tasks[order], inputs[chosen], cfg.p)                            # (B, 3k)

def spread_positions(cfg, lines, generator):
    """Where the tokens of a step's sequences stand, (3k,): 0, 1, 2, ... from four lines on. On one
    line the preceding example answers every query. A model that finds it by its distance may never
    learn to look for an example by what it says. So up to two lines the k examples, in order, take
    random places out of 1.5 k, others at each step."""
    k = step_shape(cfg, lines)[1]
    place = torch.arange(k, device=generator.device)
    if cfg.spread and lines <= 2:
        places = min(cfg.examples, 3 * k // 2)
        place = torch.randperm(places, generator=generator, device=generator.device)[:k].sort()[0]
    return (3 * place[:, None] + torch.arange(3, device=generator.device)).flatten()       # (3k,)

# -------------------------------------------------------------------------------------- 6. Training

def make_optimizers(model, cfg):
    """Muon for the blocks' matrices (or AdamW, as in the paper), AdamW for the rest; a list.

    Adam scales each number of a gradient by itself; Muon looks at the gradient of a matrix as a
    whole. Averaged over steps, it is large along a few directions and small along the others. Muon
    replaces it by the nearest orthogonal matrix, in which all directions are equally large. So a
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

@torch.no_grad()
def evaluate(predict, tokens):
    """accuracy(), (2, k), of a function from tokens (B, 3k - 1) to logits (B, k, p)."""
    hits = [predict(t[:, :-1]).argmax(-1) == t[:, 2::3] for t in tokens.split(CHUNK)]
    return accuracy(torch.cat(hits), tokens)

def phase(model, ratio, p):
    """Phase (figure 1b) of four novel-query accuracies; good: halfway to Ratio Matching's."""
    good = tuple(bool(m >= (1 / p + r) / 2) for m, r in zip(model, ratio, strict=True))
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

def ended(run, cfg):
    """Whether training is over: by its steps, the curriculum's limit, or early stopping."""
    last = run.end if run.lines > cfg.p else cfg.curriculum
    waited = len(run.history) - 1 - best_evaluation(run.history, 1 / cfg.p) if run.history else 0
    return run.step >= last or 0 < cfg.patience <= waited

def train(run, cfg, signals=()):
    """Train, evaluate now and then, save to cfg.out. Returns whether the run is finished; it isn't
    if main's handler put a signal into the list signals. Under torchrun each process takes its
    share of the same batch: N of them do what one would. Rank 0 evaluates, writes and decides."""
    device, (rank, world) = run.device, rank_and_world()
    split = {name: pairs.to(device) for name, pairs in run.split.items()}
    input_lines = line_of(split["train_inputs"], cfg.p)
    sets = {name: tokens.to(device) for name, tokens in eval_sequences(
        run.split, "val_ood", EVAL_SEQUENCES, cfg.examples, cfg.p, cfg.seed + 1).items()}
    pays = device.type == "cuda" and cfg.steps >= COMPILE_PAYS
    compiled = cfg.compile == "on" or (cfg.compile == "auto" and pays)
    model = torch.compile(run.model) if compiled else run.model
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    finished, stopped = ended(run, cfg), False
    with tqdm(total=run.end, initial=run.step, dynamic_ncols=True, disable=rank > 0) as bar:
        while not (finished or stopped):
            factor = lr_factor(run.step, cfg, run.end)
            for optimizer in run.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * factor
            batch = training_batch(split, input_lines, cfg, run.lines, run.generator)[rank::world]
            positions = spread_positions(cfg, run.lines, run.generator)              # (3k,)
            with run.autocast:
                score_y = cfg.score_y and run.lines == 1
                loss, logits = training_loss(model, batch, score_y, positions)
            run.scaler.scale(loss).backward()
            for optimizer in run.optimizers:
                run.scaler.step(optimizer)
                optimizer.zero_grad()
            run.scaler.update()
            run.step += 1
            bar.update()
            lines = run.lines
            if run.step % PACE_EVERY == 0:            # a GPU waits here, so not at every step
                bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
                if lines <= cfg.p:
                    pace(run, cfg, logits, batch)
                    bar.total = run.end
            finished = ended(run, cfg)
            if finished or lines < run.lines or run.step % cfg.eval_every == 0:
                if world > 1:
                    dist.all_reduce(loss := loss.detach() / world)
                if rank == 0:
                    evaluate_and_save(run, cfg, sets, loss.item())
                    bar.write("step {step:6d}  loss {loss:.3f}  lines {lines:2d}  i.d. "
                              "{id_train:.2f}/{id_test:.2f}  o.o.d. {val_ood_train:.2f}/"
                              "{val_ood_test:.2f}".format(**run.history[-1]))
                    finished = ended(run, cfg)        # now by early stopping, too
            stopped = len(signals) > 0
            if world > 1:                             # all must leave after the same step
                decision = [finished, stopped]
                dist.broadcast_object_list(decision, device=torch.device("cpu"))
                finished, stopped = decision
    if not finished:
        save(run, cfg, "last.pt")
    return finished

# --------------------------------------------- 7. The lecture is over: what a running program needs

def pick_device(name):
    """The torch.device of that name; auto is CUDA or the CPU. BadInput where it isn't there."""
    try:
        name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except Exception as e:                                   # what is raised depends on the device
        raise BadInput(f"--device {name or repr(name)}: not usable here, try auto or cpu ({e})")

def mixed_precision(cfg, device):
    """(autocast context, GradScaler): float16 alone needs its loss scaled, against underflow."""
    amp = cfg.amp
    if amp == "auto" and device.type == "cuda":
        amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif amp == "auto":                                      # slower without the instructions
        amp = "bf16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "off"
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return (torch.autocast(device.type, dtype, enabled=amp != "off"),
            torch.amp.GradScaler(device.type, enabled=amp == "fp16"))

def start(cfg, checkpoint=None):
    """A run's state, new or from a checkpoint; BadInput if that doesn't fit cfg."""
    device = pick_device(cfg.device)
    torch.manual_seed(cfg.seed)
    run = SimpleNamespace(
        split=make_split(cfg), device=device, model=GPT(cfg).to(device),
        generator=torch.Generator(device).manual_seed(cfg.seed), step=0, history=[],
        lines=1 if cfg.curriculum else cfg.p + 1, end=cfg.curriculum + cfg.steps)    # at the latest
    run.optimizers = make_optimizers(run.model, cfg)
    run.autocast, run.scaler = mixed_precision(cfg, device)
    if not checkpoint:
        return run
    try:
        vars(run).update({name: checkpoint[name] for name in STATE})
        run.model.load_state_dict(checkpoint["model"])
        for optimizer, saved in zip(run.optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if checkpoint["scaler"]:
            run.scaler.load_state_dict(checkpoint["scaler"])
        if checkpoint["device"] == device.type:              # else the random numbers differ anyway
            run.generator.set_state(checkpoint["generator"])
    except Exception as e:                                   # a damaged file can raise anything
        raise BadInput(f"{cfg.out}/last.pt: doesn't fit its own config ({type(e).__name__})")
    return run

def evaluate_and_save(run, cfg, sets, loss):
    """Add a row to the run's history and metrics.csv, write last.pt and, if it is best, best.pt."""
    row = {"step": run.step, "loss": loss, "lines": run.lines}
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

def write_file(path, content):
    """Write bytes under another name, then rename: a reader finds the old file or the new one."""
    try:
        with open(path + ".tmp", "wb") as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())                      # on the disk before the old one goes
        os.replace(path + ".tmp", path)
    finally:                                          # a full disk, say: the old file stays
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")

@torch.no_grad()
def sample(model):
    """Logits of one fixed sequence: do rule, code of the model and weights still fit together?"""
    p, device = model.embedding.weight.size(0), model.embedding.weight.device
    tokens = to_tokens(torch.tensor([[1, 2]]), torch.tensor([[[2, 1], [2, 2]]]), p)[:, :-1]
    return model(tokens.to(device)).cpu()                                            # (1, 2, p)

def save(run, cfg, name):
    """Write all of the run and its config to cfg.out/name, unless a weight isn't finite."""
    if rank_and_world()[0] > 0:
        return
    if not all(w.isfinite().all() for w in run.model.parameters()):
        raise FloatingPointError(f"at step {run.step} weights not finite; lower --lr or --embd-lr")
    state = {key: getattr(run, key) for key in STATE}
    state |= dict(config=asdict(cfg), model=run.model.state_dict(), device=run.device.type,
                  optimizers=[o.state_dict() for o in run.optimizers],
                  scaler=run.scaler.state_dict(), generator=run.generator.get_state(),
                  sample=sample(run.model))
    torch.save(state, buffer := io.BytesIO())
    write_file(os.path.join(cfg.out, name), buffer.getbuffer())

def load_checkpoint(path, device="cpu"):
    """(dict, Config, GPT on device) of this program's checkpoint at path. Else BadInput."""
    if not os.path.isfile(path):
        raise BadInput(f"{path}: no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)  # runs no foreign code
        model = GPT(cfg := Config(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
        assert all(w.isfinite().all() for w in model.parameters())
        assert {*STATE} <= {*checkpoint} and {*NAMES} == {*checkpoint["config"]}
        assert torch.allclose(sample(model), checkpoint["sample"], rtol=0.01, atol=0.02)
    except Exception as e:                            # a damaged file can raise anything
        raise BadInput(f"{path}: damaged, or of another version of the code ({type(e).__name__})")
    return checkpoint, cfg, model.to(device)

def report(run, cfg):
    """Evaluate and print the best checkpoint. Only here are the *test* o.o.d. tasks looked at."""
    if run.lines <= cfg.p:
        print(f"\nThe curriculum is not over at step {run.step}: {run.lines} of {cfg.p + 1} lines. "
              "Try more --tasks, a longer --curriculum, or another --seed.")
    best, _, model = load_checkpoint(os.path.join(cfg.out, "best.pt"), run.device)
    print(f"\nBest step {best['step']} of {run.step}. Accuracy in % after {cfg.examples - 1} "
          f"shots, o.o.d. on test tasks; chance is {100 / cfg.p:.1f}\n{'':27}all queries{'':17}"
          f"novel queries\n{'':27}" + 2 * " model  ratio  regression   ")
    sets, novel = eval_sequences(run.split, "test_ood", REPORT_SEQUENCES, cfg.examples, cfg.p,
                                 cfg.seed + 2), []
    for name, tokens in sets.items():
        tokens = tokens.to(run.device)
        last = torch.stack([evaluate(model, tokens), *oracle_accuracy(tokens, cfg.p)])[:, :, -1]
        label = f"{'i.d.' if name[:2] == 'id' else 'o.o.d.'} tasks, {name.split('_')[-1]} inputs"
        print(f"{label:27}" + (2 * "{:6.1f} {:6.1f} {:10.1f}   ").format(*100 * last.T.flatten()))
        novel.append(last[:2, 1])                     # of the model and of Ratio Matching
    print(f"Phase: {phase(*zip(*novel), cfg.p)}")

def flag(name):
    return "--" + name.replace("_", "-")

def parse_config(argv=None):
    """(config, checkpoint to resume or None) of the command line; BadInput if it can't run."""
    def refuse(message):
        raise BadInput(message)
    parser = argparse.ArgumentParser(description="Train on modular arithmetic in context.",
                                     allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = refuse
    parser.add_argument("--preset", choices=PRESETS, help="; ".join(name + ": " + " ".join(
        f"{k} {v}" for k, v in PRESETS[name].items()) for name in ("quick", "regression"))
        + "; paper: all as published")
    for f in fields(Config):
        paper, accepts = f.metadata["paper"], f.metadata["accepts"]
        value = f.default if f.default == paper else f"{f.default}; paper: {paper}"
        kind = (dict(action=argparse.BooleanOptionalAction) if f.type is bool else
                dict(type=f.type, choices=accepts if isinstance(accepts, list) else None))
        parser.add_argument(flag(f.name), help=f"{f.metadata['help']} [{value}]", **kind)
    typed = vars(parser.parse_args(argv))
    preset = typed.pop("preset", "default")
    typed.setdefault("out", os.path.join("out", "-".join(
        [preset, *(f"{name}{typed[name]}" for name in FIXED if name in typed)])))
    wanted = PRESETS.get(preset, {}) | typed
    cfg, checkpoint = Config(**wanted), None
    if cfg.resume:
        checkpoint, saved, _ = load_checkpoint(os.path.join(cfg.out, "last.pt"))
        path = os.path.join(cfg.out, "best.pt")       # the closing report will want it
        best = load_checkpoint(path)[1] if checkpoint["history"] else saved
        for name in FIXED:
            new, old = wanted.get(name, getattr(saved, name)), getattr(best, name)
            if new != old or old != getattr(saved, name):
                raise BadInput(f"{flag(name)} {new}: the run in {cfg.out} has {old}, which "
                               "--resume can't change")
        cfg = replace(saved, **typed | {"resume": False})
    elif any(os.path.exists(os.path.join(cfg.out, name))
             for name in ("last.pt", "best.pt", "metrics.csv")):
        raise BadInput(f"--out {cfg.out}: holds a run. To go on with it: --resume --out "
                       f"'{cfg.out}'; to start afresh: another --out, or remove that folder")
    validate(cfg)
    return cfg, checkpoint

def validate(cfg):
    """Raise BadInput, naming flag, value and what is accepted, if the run can't be made."""
    def need(ok, name, accepted):
        if not ok:
            raise BadInput(f"{flag(name)} {getattr(cfg, name)}: must be {accepted}")
    for f in fields(Config):
        if isinstance(f.metadata["accepts"], tuple):
            low, high = f.metadata["accepts"]
            need(low <= getattr(cfg, f.name) <= high, f.name, f"from {low} to {high}")
    p = cfg.p
    need(all(p % d for d in range(2, math.isqrt(p) + 1)), "p", "a prime from 3 to 997")
    need(cfg.tasks <= p * p - 2 and cfg.tasks % 4 == 0, "tasks",
         f"a multiple of 4, for the rectangles, and at most {p * p - 2}, to leave two o.o.d.")
    need(2 <= round(cfg.alpha * p * p) <= p * p - 2, "alpha",
         f"between 0 and 1 and leave at least 2 of the {p * p} inputs on either side")
    need(cfg.embd % (2 * cfg.heads) == 0, "embd",
         f"a multiple of {2 * cfg.heads}: {cfg.heads} heads, each of even width for the rotation")
    need(cfg.batch % rank_and_world()[1] == 0, "batch", "a multiple of the number of processes")
    need(cfg.steps > cfg.warmup, "steps", f"above --warmup {cfg.warmup}; or lower that")
    gpus = torch.cuda.device_count() if pick_device(cfg.device).type == "cuda" else 0
    need(gpus > 0 or cfg.amp != "fp16", "amp", "auto, bf16 or off without a CUDA device")
    need(gpus == 0 or int(os.environ.get("LOCAL_RANK", 0)) < gpus, "device",
         f"cpu, or torchrun with at most {gpus} processes, one for each GPU")

@contextlib.contextmanager
def noted_signals():
    """A list that only notes Ctrl-C and SLURM's SIGTERM, so that train can save before it stops."""
    may_set = threading.current_thread() is threading.main_thread()
    numbers, noted = (signal.SIGINT, signal.SIGTERM) if may_set else (), []
    before = [signal.signal(number, lambda number, _: noted.append(number)) for number in numbers]
    try:
        yield noted
    finally:                                          # a notebook goes on with its own handlers
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)

def complain(error, remedy="make --batch, --examples or --embd smaller"):
    """One line on stderr, and the exit code, of an error that is no bug. A bug is raised again."""
    if isinstance(error, BrokenPipeError):            # piped into head, which has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13                               # as SIGPIPE would end it
    if isinstance(error, BadInput):
        message = " ".join(str(error).split())
    elif isinstance(error, (OSError, FloatingPointError)):
        message = f"{error}; the files saved before are whole"
    elif (isinstance(error, (MemoryError, torch.OutOfMemoryError))
          or "can't allocate memory" in str(error)):  # torch's error on a CPU
        message = f"out of memory; {remedy}"
    elif type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        message = "torch.compile fails on this machine; try --compile off"
    else:
        raise error
    if rank_and_world()[0] == 0 or not isinstance(error, BadInput):    # which all ranks have
        print("error: " + message, file=sys.stderr)
    return 2 if isinstance(error, BadInput) else 1

def main(argv=None):
    """Parse, train, report. Returns the exit code or None; what goes wrong is a line on stderr."""
    rank, world = rank_and_world()
    try:
        cfg, checkpoint = parse_config(argv)
        if world > 1:
            if pick_device(cfg.device).type == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group()
            dist.barrier()                            # none may write before all have looked
        run = start(cfg, checkpoint)
        sys.stdout = sys.stdout if rank == 0 else open(os.devnull, "w")     # only rank 0 prints
        with noted_signals() as signals:
            try:
                os.makedirs(cfg.out, exist_ok=True)
                save(run, cfg, "last.pt")             # so that whatever is found can be resumed
            except OSError as e:
                raise BadInput(f"--out {cfg.out}: {e}")
            print(f"p {cfg.p}, {cfg.tasks} tasks, depth {cfg.depth}, batch {cfg.batch}, seed "
                  f"{cfg.seed}; torch {torch.__version__} on {run.device}; {cfg.out}", flush=True)
            finished = train(run, cfg, signals)
        code = None if finished else 128 + signals[0] if signals else 0
        if not finished:
            print(f"Saved. To go on: {'python' if world == 1 else 'torchrun ...'} grok_icl.py "
                  f"--resume --out '{cfg.out}'")
        elif rank == 0:
            report(run, cfg)
        print(end="", flush=True)                     # so that a closed pipe is noticed here
    except Exception as e:
        code = complain(e)
    if dist.is_initialized():                         # else gloo's threads may crash the way out
        dist.destroy_process_group()
        os._exit(code or 0)
    return code

if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:                         # before or after the training
        sys.exit(130)
