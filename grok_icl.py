"""
Learning to grok modular arithmetic in context: a single-file reproduction of

    He, Doshi, Das, Gromov. Learning to grok: Emergence of in-context learning and skill
    composition in modular arithmetic tasks. NeurIPS 2024, https://arxiv.org/abs/2406.02550

A task is a vector (a, b) of residues mod a prime p. It maps an input (x, y) to z = a x + b y mod p.
The transformer reads worked examples of one task, three tokens each, and never sees (a, b):

    x1 y1 z1  x2 y2 z2  ...  xk yk zk          scored on the z tokens alone

With few pre-training tasks it memorizes them. With many it learns to infer a task it has never
trained on from the examples in front of it: in-context learning, out of distribution (o.o.d.).

    python grok_icl.py --preset laptop           minutes on two CPU cores
    python grok_icl.py --depth 2 --tasks 512     the paper's scale; wants a GPU

The file reads from top to bottom:

    1. Config        every hyperparameter, with the paper's value
    2. Data          tasks, splits, balanced batches
    3. Model         attention, rotary embedding, MLP, GPT
    4. Evaluation    four sets, every shot, two exact oracles
    5. Training      optimizer, schedule, early stopping, the loop
    6. Files         checkpoints, to resume from and to look into
    7. Report, command line, main
"""
import argparse
import io
import json
import math
import os
import shlex
import signal
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, partial
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# -------------------------------------------------------------------------------------------------
# 1. Config
# -------------------------------------------------------------------------------------------------

def option(default, group, help, accepts=None):
    """A dataclass field with its section of --help and what it accepts: (low, high), or a list."""
    return field(default=default, metadata={"group": group, "help": help, "accepts": accepts})


@dataclass
class Config:
    """One run; each field is a flag of that name. The defaults are the paper's, patience apart."""
    # what is learned
    p: int = option(29, "task", "prime modulus; its residues are the whole vocabulary")
    tasks: int = option(512, "task", "pre-training tasks (a, b), out of p*p", (1, 10**6))
    alpha: float = option(0.8, "task", "fraction of the p*p inputs (x, y) that is trained on", (0, 1))
    examples: int = option(32, "task", "examples in a sequence, three tokens each", (2, 512))
    task_choice: str = option("rectangular", "task", "how the pre-training tasks are drawn",
                              ["rectangular", "random"])
    # the transformer
    depth: int = option(2, "model", "transformer blocks; the paper has 2, 4 and 6", (1, 100))
    heads: int = option(4, "model", "attention heads a block", (1, 256))
    embd: int = option(512, "model", "width of the residual stream; the MLP is 4 times as wide", (2, 16384))
    init_std: float = option(0.02, "model", "standard deviation of the initial weights", (1e-6, 10))
    # how it is trained
    optimizer: str = option("adamw", "training", "what updates the weight matrices", ["adamw", "muon"])
    lr: float = option(1.5e-4, "training", "peak learning rate (paper: 1e-4 for random tasks); under "
                       "muon that of the blocks' matrices", (1e-12, 1e3))
    wd: float = option(2.0, "training", "weight decay of matrices and embedding", (0, 1e3))
    batch: int = option(1024, "training", "sequences a step, rounded up to a multiple of --tasks", (1, 10**6))
    steps: int = option(200_000, "training", "training steps; the cosine schedule ends here", (1, 10**9))
    warmup: int = option(10_000, "training", "steps of linear warm-up", (0, 10**9))
    curriculum: int = option(0, "training", "steps in which sequences keep to few lines through the "
                             "origin, at first one (paper: none)", (0, 10**9))
    seed: int = option(0, "training", "seed of the split, the initial weights and the batches", (0, 2**62))
    # how it is run
    eval_every: int = option(1000, "run", "steps between evaluations", (1, 10**9))
    patience: int = option(20, "run", "evaluations without a new best before stopping; 0: never", (0, 10**9))
    out: str = option("", "run", "folder of the run; by default out/ and the flags")
    resume: bool = option(False, "run", "continue the run in --out; its flags need no repeating")
    max_minutes: float = option(0.0, "run", "minutes after which to save and stop, and after each --resume "
                                "again: a long run in pieces; 0: never", (0, 1e6))
    device: str = option("auto", "run", "cpu, cuda, cuda:1, ...; auto: a GPU if there is one")
    amp: str = option("auto", "run", "autocast; auto: bf16 on a GPU that has it, else fp16; off on CPU",
                      ["auto", "bf16", "fp16", "off"])
    compile: str = option("auto", "run", "torch.compile; auto: on a GPU", ["auto", "on", "off"])

    @property
    def per_task(self):
        """Sequences of each task in a batch: every task comes equally often."""
        return math.ceil(self.batch / self.tasks)


# A preset replaces defaults; a flag on the command line replaces the preset's value.
PRESETS = {
    # small enough for ten minutes of two CPU cores; see the README for how it was found
    "laptop": dict(p=7, tasks=32, examples=16, depth=4, embd=64, init_std=0.125, optimizer="muon",
                   lr=0.02, wd=0.5, batch=128, steps=2800, warmup=100, curriculum=700,
                   eval_every=100, patience=10),
    # up to an hour: 97 training inputs are harder to memorize than 39, so test inputs are learned too
    "hour": dict(p=11, tasks=64, examples=24, depth=4, embd=64, init_std=0.125, optimizer="muon",
                 lr=0.004, wd=0.5, batch=192, steps=4000, warmup=100, curriculum=2500,
                 eval_every=100, patience=0),   # test inputs wait for the curriculum to end
}

MLP_RATIO = 4                 # MLP width / residual width
ROPE_BASE = 10_000            # frequencies of the rotary embedding fall from 1 to about 1/ROPE_BASE
ADAM_BETAS = (0.9, 0.98)
MUON_ADAMW_LR = 3e-3          # under --optimizer muon, AdamW's rate for embedding and LayerNorm
EVAL_SEQUENCES = 512          # of each set, at every evaluation
REPORT_SEQUENCES = 4096       # of each set, in the closing report
CHUNK = 256                   # sequences evaluated at once
PHASE_THRESHOLD = 0.5         # last-shot accuracy on novel queries from which a set counts as good
CPU_RATE = 1e11               # operations a second that a few cores do, to warn of endless runs
LEFT_CHANCE = 0.2             # early stopping waits until the accuracy is this far above 1/p
SETS = ("id_train", "id_test", "val_ood_train", "val_ood_test")
METRICS = ("step", "lr", "loss", *(name + novel for name in SETS for novel in ("", "_novel")))
RUN_FILES = ("config.json", "metrics.csv", "best.pt", "last.pt")


def rank_and_world():
    """(this process's number, how many there are): more than one under torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def die(message):
    """Refuse bad input: one line on stderr, exit code 2."""
    if rank_and_world()[0] == 0:
        print("error: " + " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)

# -------------------------------------------------------------------------------------------------
# 2. Data: tasks, splits, batches
# -------------------------------------------------------------------------------------------------

def grid(p):
    """All p*p pairs of residues, (p*p, 2): the set of tasks (a, b), and also that of inputs (x, y)."""
    return torch.cartesian_prod(torch.arange(p), torch.arange(p))


def choose_rectangles(p, n, generator):
    """
    n pre-training tasks by the paper's rectangular rule, (n, 2).

    Draw n/4 vectors (a, b); to each add (a', b), (a, b') and (a', b') with a' != a and b' != b, all
    new. So every pre-training task shares each of its components with another one, which shows the
    model that the two components can vary apart. Exits where no rectangle is left to draw.
    """
    for _ in range(100):                                     # an unlucky start may block itself
        corners = grid(p)[torch.randperm(p * p, generator=generator)[:n // 4]]
        free = torch.ones(p, p, dtype=torch.bool)
        free[corners[:, 0], corners[:, 1]] = False
        tasks = [corners]
        for a, b in corners.tolist():
            fits = (free[:, b, None] & free[a] & free).nonzero()     # (a', b') with all three free
            if len(fits) == 0:
                break
            c, d = fits[torch.randint(len(fits), (1,), generator=generator)].squeeze(0).tolist()
            tasks.append(torch.tensor([(c, b), (a, d), (c, d)]))
            free[[c, a, c], [b, d, d]] = False
        else:
            return torch.cat(tasks)
    die(f"--tasks {n}: no {n // 4} disjoint rectangles found among {p}*{p} tasks; "
        f"take fewer, or --task-choice random")


def make_split(cfg):
    """
    Who is trained on, and who only tested: a dict of (n, 2) tensors of residues.

    "id" are the pre-training tasks. The others are out of distribution, in two halves: early
    stopping looks at "val_ood", and "test_ood" is opened once, for the closing report. (The paper
    has one o.o.d. set.) "train_inputs" and "test_inputs" split the inputs; all tasks share them.
    """
    generator, p = torch.Generator().manual_seed(cfg.seed), cfg.p
    if cfg.task_choice == "rectangular":
        tasks = choose_rectangles(p, cfg.tasks, generator)
    else:
        tasks = grid(p)[torch.randperm(p * p, generator=generator)[:cfg.tasks]]
    is_id = torch.zeros(p, p, dtype=torch.bool)
    is_id[tasks[:, 0], tasks[:, 1]] = True
    ood = (~is_id).nonzero()
    ood = ood[torch.randperm(len(ood), generator=generator)]
    inputs = grid(p)[torch.randperm(p * p, generator=generator)]
    n_train, n_val = round(cfg.alpha * p * p), len(ood) // 2
    return {"id": tasks, "val_ood": ood[:n_val], "test_ood": ood[n_val:],
            "train_inputs": inputs[:n_train], "test_inputs": inputs[n_train:]}


def to_tokens(tasks, inputs, p):
    """Tasks (B, 2) and inputs (B, k, 2), both residues -> token sequences x y z x y z ... (B, 3k)."""
    z = (tasks[:, None] * inputs).sum(-1, keepdim=True) % p                          # (B, k, 1)
    return torch.cat((inputs, z), dim=-1).flatten(1)                                 # (B, 3k)


@cache
def inverses(p, device):
    """1/x mod p for each residue x, and 0 for 0: (p,). Cached, since a GPU waits for such a copy."""
    return torch.tensor([0] + [pow(x, -1, p) for x in range(1, p)], device=device)


def line_of(inputs, p):
    """
    The line through the origin on which each input (n, 2) lies: its ratio y/x, or p for x = 0.

    The origin itself lies on all of them; it counts to x = 0.
    """
    x, y = inputs.unbind(-1)
    return torch.where(x > 0, y * inverses(p, inputs.device)[x] % p, p)              # (n,)


def training_batch(tasks, inputs, per_task, k, p, generator, lines=None):
    """
    A balanced batch: per_task sequences of each of n tasks, (n * per_task, 3k) tokens.

    The paper shows all tasks the same inputs at the same shot: sequences differ in their task alone,
    so what tells them apart is the z tokens. Inputs are drawn evenly, with replacement.

    lines (not in the paper, see --curriculum): each sequence keeps to the inputs on at most that many
    lines through the origin. On one line any example but (0, 0) answers any query, by Ratio Matching;
    with more lines, the model must also find the example that does.
    """
    def draw(size):
        return torch.randint(len(inputs), (per_task, size), generator=generator, device=inputs.device)
    if lines is None:
        chosen = draw(k)                                                             # (per_task, k)
    else:
        line = line_of(inputs, p)
        allowed = (line[draw(lines)][:, :, None] == line).any(1)                # (per_task, inputs)
        chosen = torch.multinomial(allowed.float(), k, replacement=True, generator=generator)
    shared = inputs[chosen].repeat(len(tasks), 1, 1)                           # (n * per_task, k, 2)
    return to_tokens(tasks.repeat_interleave(per_task, 0), shared, p)


def curriculum_lines(step, cfg):
    """How many lines a training sequence may use: from 1 to p over the curriculum, then None (any)."""
    # (p + 1) ** (a third), say, comes out as 1.9999999 where it is 2
    return int((cfg.p + 1) ** (step / cfg.curriculum) + 1e-9) if step < cfg.curriculum else None


def eval_sequences(split, ood, n, k, p, seed):
    """
    The four sets of the paper as fixed token sequences: {name: (n, 3k)}.

    ood is "val_ood" or "test_ood". Each sequence has inputs of its own; a test sequence has test
    inputs alone, its examples included. Always the same for the same split and seed.
    """
    sets, generator = {}, torch.Generator().manual_seed(seed)
    for kind in ("id", ood):
        for side in ("train", "test"):
            tasks, inputs = split[kind], split[f"{side}_inputs"]
            draw = torch.randint(len(inputs), (n, k), generator=generator)
            sets[f"{kind}_{side}"] = to_tokens(tasks[torch.arange(n) % len(tasks)], inputs[draw], p)
    return sets

# -------------------------------------------------------------------------------------------------
# 3. Model: a decoder-only transformer, pre-LayerNorm, no biases in the matrices
# -------------------------------------------------------------------------------------------------

def rotary_tables(length, width):
    """cos and sin of position * frequency, (length, width / 2): a head's width is that many pairs."""
    frequencies = ROPE_BASE ** (-torch.arange(0, width, 2) / width)
    angles = torch.outer(torch.arange(length), frequencies)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """
    Rotary embedding: turn each pair (u, v) of x (..., T, D) by its position's angle.

    The score of a rotated query and key depends on their positions through the distance alone.
    """
    u, v = x.chunk(2, dim=-1)
    return torch.cat((u * cos - v * sin, u * sin + v * cos), dim=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention. `at` picks the positions that ask; all positions answer."""

    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(cfg.embd, cfg.embd, bias=False) for _ in range(4))

    def project(self, linear, rows, tokens, at=slice(None)):
        """
        linear of some positions, split into heads: (B, H, Q, D).

        rows is what the positions hold, (B, T, C). Before the first block that depends on their token
        alone: there rows is one row a residue, (p, C), and p rows are projected instead of B*T.
        """
        if rows.ndim == 2:
            y = F.embedding(tokens[:, at], linear(rows))                             # (B, Q, C)
        else:
            y = linear(rows[:, at])
        return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, rows, tokens, rotary, future, at, note):
        cos, sin = rotary
        q = rotate(self.project(self.query, rows, tokens, at), cos[at], sin[at])     # (B, H, Q, D)
        k = rotate(self.project(self.key, rows, tokens), cos, sin)                   # (B, H, T, D)
        v = self.project(self.value, rows, tokens)                                   # (B, H, T, D)
        # scaling q touches fewer numbers than scaling the scores, and adding -inf needs no backward pass
        scores = (q / math.sqrt(q.size(-1)) @ k.mT).add_(future[at])                 # (B, H, Q, T)
        weights = scores.softmax(dim=-1)
        heads = weights @ v                                                          # (B, H, Q, D)
        note("attention", weights)
        note("heads", heads)
        return self.out(heads.transpose(1, 2).flatten(2))                            # (B, Q, C)


class MLP(nn.Module):
    """Two matrices and a ReLU; its neurons are the numbers between them."""

    def __init__(self, cfg):
        super().__init__()
        self.up = nn.Linear(cfg.embd, MLP_RATIO * cfg.embd, bias=False)
        self.down = nn.Linear(MLP_RATIO * cfg.embd, cfg.embd, bias=False)

    def forward(self, x, note):
        neurons = self.up(x).relu_()                  # in place: the largest tensor    (B, Q, 4C)
        note("neurons", neurons)
        return self.down(neurons)


class Block(nn.Module):
    """Attention, then MLP; each reads the normalized residual stream and adds to it."""

    def __init__(self, cfg):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(cfg.embd), Attention(cfg)
        self.norm2, self.mlp = nn.LayerNorm(cfg.embd), MLP(cfg)

    def forward(self, x, rows, tokens, rotary, future, at, note):
        """rows: x, or what gives it for each residue, see Attention.project; note(name, value) records."""
        x = x[:, at] + self.attention(self.norm1(rows), tokens, rotary, future, at, note)    # (B, Q, C)
        x = x + self.mlp(self.norm2(x), note)
        note("residual", x)
        return x


class GPT(nn.Module):
    """The paper's transformer, on sequences x y z x y z ... of at most cfg.examples examples."""

    def __init__(self, cfg):
        super().__init__()
        self.embedding = nn.Embedding(cfg.p, cfg.embd)       # its transpose reads out the logits
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.depth))
        self.norm = nn.LayerNorm(cfg.embd)
        length = 3 * cfg.examples
        cos, sin = rotary_tables(length, cfg.embd // cfg.heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.register_buffer("future", torch.full((length, length), -math.inf).triu(1), persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # the residual stream sums 2 * depth outputs; the paper scales down those of the MLPs
                shrink = math.sqrt(2 * cfg.depth) if name.endswith("mlp.down.weight") else 1
                nn.init.normal_(weight, std=cfg.init_std / shrink)

    def forward(self, tokens, record=None, everywhere=False):
        """
        Logits of each z from the tokens before it: tokens (B, T) -> (B, k, p).

        A z is predicted at the y before it, positions 1, 4, 7, ... No other output is scored, so the
        last block asks at those alone (its keys and values come from everywhere): the same logits for
        28% fewer operations at depth 2; with one row a residue in the first block it is 40%.
        everywhere=True computes all positions, (B, T, p).

        A dict passed as record is filled, block by block, with "0.attention" (B, H, Q, T),
        "0.heads" (B, H, Q, D), "0.neurons" (B, Q, 4C) and "0.residual" (B, Q, C), and "embedding".
        """
        T = tokens.size(1)
        rotary, future = (self.cos[:T], self.sin[:T]), self.future[:T, :T]
        x = self.embedding(tokens)                                                   # (B, T, C)

        def note(i, name, value):
            if record is not None:
                record[f"{i}.{name}"] = value
        if record is not None:
            record["embedding"] = x
        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1
            at = slice(1, None, 3) if last and not everywhere else slice(None)
            rows = self.embedding.weight if i == 0 else x
            x = block(x, rows, tokens, rotary, future, at, partial(note, i))         # (B, Q, C)
        return self.norm(x) @ self.embedding.weight.T                                # (B, k, p)


# -------------------------------------------------------------------------------------------------
# 4. Evaluation: accuracy at every shot, novel queries apart, beside two exact oracles
# -------------------------------------------------------------------------------------------------

def novel_queries(tokens):
    """Which queries are no copy of an earlier example's input: (B, 3k) -> bool (B, k)."""
    xy = tokens.unflatten(1, (-1, 3))[..., :2]                                       # (B, k, 2)
    same = (xy[:, :, None] == xy[:, None, :]).all(-1)                                # (B, k, k)
    return ~same.tril(-1).any(-1)


def solvable(tokens, p):
    """
    What the examples before each query determine, exactly: two bool tensors (B, k).

    Ratio Matching answers (x, y) = c (x_i, y_i) with c z_i: it needs an earlier example other than
    (0, 0) on the query's line through the origin. (Any example at all will do for the query (0, 0).)
    Modular Regression combines examples: it needs the query in the span of the earlier inputs, that
    is such a line, or two earlier examples on different lines.
    """
    xy = tokens.unflatten(1, (-1, 3))[..., :2]                                       # (B, k, 2)
    x, y = xy.unbind(-1)
    cross = (x[:, :, None] * y[:, None, :] - y[:, :, None] * x[:, None, :]) % p      # (B, k, k)
    origin = (xy == 0).all(-1)
    parallel = (cross == 0) & (~origin[:, None, :] | origin[:, :, None])
    ratio = parallel.tril(-1).any(-1)
    plane = (cross != 0).tril(-1).any(-1).cummax(dim=1).values    # two lines by shot t, t included
    two_lines = torch.cat((torch.zeros_like(plane[:, :1]), plane[:, :-1]), dim=1)
    return ratio, ratio | two_lines | origin


def accuracy(hits, tokens):
    """
    Mean of hits (B, k) at each shot over all queries and over novel ones: (2, k), nan where none.

    hits are bools, counted in integers, or an oracle's expected scores.
    """
    novel = torch.cat([novel_queries(t) for t in tokens.split(CHUNK)])
    chosen = torch.stack((torch.ones_like(novel), novel))                            # (2, B, k)
    return (hits * chosen).sum(1).cpu().double() / chosen.sum(1).cpu()


@torch.no_grad()
def correct(predict, tokens):
    """Which z are answered right, (B, k), by a function from tokens (B, 3k - 1) to logits (B, k, p)."""
    return torch.cat([predict(t[:, :-1]).argmax(-1) == t[:, 2::3] for t in tokens.split(CHUNK)])


def evaluate(predict, tokens):
    """Accuracy (2, k), over all and over novel queries, of a function as in correct()."""
    return accuracy(correct(predict, tokens), tokens)


def oracle_accuracy(tokens, p):
    """Exact expected accuracies (2, k) of Ratio Matching and of Modular Regression, in that order."""
    solved = torch.cat([torch.stack(solvable(t, p)) for t in tokens.split(CHUNK)], dim=1)
    return [accuracy(torch.where(s, 1.0, 1 / p).double(), tokens) for s in solved]


def some_shots(examples):
    """The numbers of shots that a table shows, up to all that a sequence has."""
    return [s for s in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24) if s < examples - 1] + [examples - 1]


def phase(good):
    """
    The paper's phase (figure 1b), from whether each of the four sets is answered well.

    good: four bools in the order of eval_sequences: i.d. tasks with train and with test inputs, then o.o.d.
    """
    return {(True, False, False, False): "in-distribution memorization",
            (True, True, False, False): "in-distribution generalization",
            (True, False, True, False): "o.o.d. memorization",
            (True, True, True, True): "o.o.d. generalization",
            (False, False, False, False): "none yet: even i.d. train inputs are answered badly",
            }.get(tuple(good), "none of the paper's")

# -------------------------------------------------------------------------------------------------
# 5. Training
# -------------------------------------------------------------------------------------------------

def make_optimizers(model, cfg):
    """
    AdamW with the paper's groups: matrices and embedding decay, LayerNorm does not.

    With --optimizer muon the blocks' matrices go to Muon instead, which steps along the orthogonal
    matrix nearest to the momentum: all directions of a matrix learn at one rate. Returns a list.
    """
    embedding = model.embedding.weight
    matrices = [w for w in model.parameters() if w.ndim == 2 and w is not embedding]
    vectors = [w for w in model.parameters() if w.ndim == 1]
    muon = cfg.optimizer == "muon"
    optimizers = [torch.optim.AdamW(
        [{"params": [embedding] if muon else [embedding] + matrices, "weight_decay": cfg.wd},
         {"params": vectors, "weight_decay": 0.0}],
        lr=MUON_ADAMW_LR if muon else cfg.lr, betas=ADAM_BETAS, fused=True)]
    if muon:
        optimizers.append(torch.optim.Muon(matrices, lr=cfg.lr, weight_decay=cfg.wd))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor(step, warmup, steps):
    """Learning rate / peak: linear from 0.01 to 1 over the warm-up, then a cosine to 0.1 at steps."""
    if step < warmup:
        return 0.01 + 0.99 * step / warmup
    return 0.1 + 0.9 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2


def early_stopping(history, patience, chance):
    """
    From the evaluations so far: (index of the one to keep, whether to stop now).

    Watches last-shot accuracy on validation o.o.d. tasks and test inputs, all queries (the novel ones
    are few at small p, and noisy). Until its best is clearly above chance there is nothing to lose,
    since grokking comes after a long plateau: the newest evaluation is kept, and patience is not
    counted. patience 0 never stops.
    """
    curve = [row["val_ood_test"] for row in history]
    if not curve or max(curve) < chance + LEFT_CHANCE:
        return len(curve) - 1, False
    best = curve.index(max(curve))
    return best, 0 < patience <= len(curve) - 1 - best


def pick_device(name):
    """The torch.device of that name; auto is the first GPU, or the CPU. Exits where it isn't there."""
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda" and device.index is None:            # under torchrun: one each
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.empty(1, device=device)
        if device.type in ("cpu", "cuda"):
            return device
    except (RuntimeError, AssertionError, ImportError):
        pass
    there = ["auto", "cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    die(f"--device {name or repr(name)}: not usable here; there is {', '.join(there)}")


def mixed_precision(cfg, device):
    """(autocast context, GradScaler): float16 alone needs its loss scaled, against underflow."""
    amp = cfg.amp
    if amp == "auto":
        amp = ("off" if device.type != "cuda" else
               "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16")
    dtype = torch.float16 if amp == "fp16" else torch.bfloat16
    return (torch.autocast(device.type, dtype, enabled=amp != "off"),
            torch.amp.GradScaler(device.type, enabled=amp == "fp16"))


def start(cfg, checkpoint=None):
    """All that changes while a run goes on: fresh, or as the checkpoint (its last.pt) left it. Exits if damaged."""
    device = pick_device(cfg.device)
    torch.manual_seed(cfg.seed)
    run = SimpleNamespace(split=checkpoint["split"] if checkpoint else make_split(cfg), device=device,
                          model=GPT(cfg).to(device), step=0, history=[], loss_steps=0,
                          loss_sum=torch.zeros((), device=device),
                          generator=torch.Generator(device).manual_seed(cfg.seed))
    run.optimizers = make_optimizers(run.model, cfg)
    run.autocast, run.scaler = mixed_precision(cfg, device)
    if checkpoint:
        try:
            run.step, run.history, run.loss_steps = (checkpoint[k] for k in ("step", "history", "loss_steps"))
            run.loss_sum += checkpoint["loss_sum"].to(device) * (rank_and_world()[0] == 0)     # one rank holds it for all
            run.model.load_state_dict(checkpoint["model"])
            for optimizer, saved in zip(run.optimizers, checkpoint["optimizers"], strict=True):
                skipped = checkpoint["scaler"] and not saved["state"]        # float16: all steps so far
                load_moments(optimizer, saved["state"], run.step > 0 and not skipped)
            if checkpoint["scaler"]:
                run.scaler.load_state_dict(checkpoint["scaler"])
            if checkpoint["device"] == device.type:
                run.generator.set_state(checkpoint["generator"])
            else:                                     # CPU and GPU draw different random numbers
                run.generator.manual_seed(cfg.seed + run.step)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
            die(f"{cfg.out}/last.pt: damaged; it doesn't fit its own config ({type(e).__name__})")
    return run


def z_loss(model, tokens):
    """Mean cross-entropy of the z tokens, given all tokens before each: (B, 3k) -> scalar."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 2::3].flatten())


def compiled(run, cfg, batch):
    """The model under torch.compile, tried on a batch of that size; where that fails, as it is."""
    if cfg.compile == "off" or cfg.compile == "auto" and run.device.type != "cuda":
        return run.model
    model = torch.compile(run.model)
    try:
        with run.autocast:
            loss = z_loss(model, torch.zeros(batch, 3 * cfg.examples, dtype=torch.long, device=run.device))
        loss.backward()
    except Exception as e:
        print(f"Not compiled ({type(e).__name__}); the run is slower, not different.")
        model = run.model
    run.model.zero_grad()
    return model


@contextmanager
def stop_signals():
    """Within, Ctrl-C and SLURM's SIGTERM are only noted, in the list given out; a second one stops at once."""
    caught = []
    def note(number, frame):
        if not caught:
            tqdm.write("Finishing this step, then saving. Once more stops at once.")
        elif time.monotonic() > caught[0][1] + 1:     # sooner, it is the same one, passed on by torchrun too
            os._exit(128 + number)
        caught.append((number, time.monotonic()))
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finite_loss(run, cfg):
    """Mean loss since the last evaluation, over all processes; exits, unsaved, if the numbers went wrong."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(run.loss_sum)
    loss = run.loss_sum.item() / max(1, run.loss_steps)
    if not (math.isfinite(loss) and all(w.isfinite().all() for w in run.model.parameters())):
        sys.exit(f"error: by step {run.step} the loss was {loss}; it and all weights must be finite. Try a smaller "
                 f"--lr; {cfg.out} has what was saved before" if rank_and_world()[0] == 0 else 1)
    return loss


def train(run, cfg):
    """
    Train, evaluate every cfg.eval_every steps, and keep the run's files in cfg.out up to date.

    Under torchrun every process draws the same batch and takes its share of it, and the gradients are
    averaged: N processes do what one would. Only the first writes files.
    Returns None once the run is finished. One that ends early is saved, and its exit code returned: 130
    after Ctrl-C, 143 after SIGTERM, 0 after cfg.max_minutes.
    """
    deadline = time.monotonic() + (60 * cfg.max_minutes or math.inf)
    device, history, (rank, world) = run.device, run.history, rank_and_world()
    tasks, inputs = run.split["id"].to(device), run.split["train_inputs"].to(device)
    sets = {name: tokens.to(device) for name, tokens in eval_sequences(
        run.split, "val_ood", EVAL_SEQUENCES, cfg.examples, cfg.p, cfg.seed + 1).items()}
    model = compiled(run, cfg, cfg.per_task * cfg.tasks // world)
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    often = max(1, cfg.eval_every // 20)              # steps between looks at the loss: the GPU waits for each
    scores, stop = "", early_stopping(history, cfg.patience, 1 / cfg.p)[1]
    exit_code = -1                                    # go on
    with stop_signals() as signals, tqdm(total=cfg.steps, initial=run.step, unit="step", dynamic_ncols=True,
                                         mininterval=0.5, disable=rank > 0) as bar:
        while (unfinished := run.step < cfg.steps and not stop) and exit_code < 0:
            factor = lr_factor(run.step, cfg.warmup, cfg.steps)
            for optimizer in run.optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak_lr"] * factor
            batch = training_batch(tasks, inputs, cfg.per_task, cfg.examples, cfg.p, run.generator,
                                   curriculum_lines(run.step, cfg))
            with run.autocast:
                loss = z_loss(model, batch[rank::world])
            run.scaler.scale(loss).backward()
            for optimizer in run.optimizers:
                run.scaler.step(optimizer)
                optimizer.zero_grad()
            run.scaler.update()
            run.step += 1
            run.loss_sum += loss.detach() / world         # stays on the device: reading it would wait
            run.loss_steps += 1
            bar.update()

            if run.step == 1 or run.step % often == 0:
                bar.set_postfix_str(f"loss {loss.item():.3f} {scores}", refresh=False)
            if run.step % cfg.eval_every == 0 or run.step == cfg.steps:
                row = {"step": run.step, "lr": cfg.lr * factor, "loss": finite_loss(run, cfg)}
                with run.autocast:
                    for name, tokens in sets.items():
                        row[name], row[f"{name}_novel"] = evaluate(run.model, tokens)[:, -1].tolist()
                history.append(row)
                run.loss_sum, run.loss_steps = torch.zeros_like(run.loss_sum), 0
                best, stop = early_stopping(history, cfg.patience, 1 / cfg.p)
                if best == len(history) - 1:
                    save(run, cfg, "best.pt")
                table = [METRICS, *(row.values() for row in history)]
                write_file(os.path.join(cfg.out, "metrics.csv"),
                           "".join(",".join(map(str, line)) + "\n" for line in table).encode())
                save(run, cfg, "last.pt")
                scores = ("i.d. {id_train:.2f}/{id_test:.2f} o.o.d. {val_ood_train:.2f}/{val_ood_test:.2f}"
                          .format(**row))
                bar.write(f"step {run.step:6d}  loss {row['loss']:.3f}  {scores}")
            if signals or time.monotonic() > deadline:
                exit_code = max((128 + number for number, _ in signals), default=0)
            if world > 1:                             # all processes must leave after the same step
                dist.all_reduce(agreed := torch.tensor(exit_code), dist.ReduceOp.MAX)
                exit_code = agreed.item()
        if unfinished:
            finite_loss(run, cfg)
            save(run, cfg, "last.pt")
    return exit_code if unfinished else None

# -------------------------------------------------------------------------------------------------
# 6. Files: what a run writes and reads, so that it can be killed anywhere
# -------------------------------------------------------------------------------------------------

def load_moments(optimizer, state, started):
    """Set the running moments; ValueError where they don't fit (fused kernels would write out of bounds)."""
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})    # rates and decay are cfg's
    names = {"momentum_buffer"} if isinstance(optimizer, torch.optim.Muon) else {"step", "exp_avg", "exp_avg_sq"}
    for w in (w for group in optimizer.param_groups for w in group["params"] if started):
        moments = optimizer.state[w]
        if ({name: m.shape for name, m in moments.items()} != {name: () if name == "step" else w.shape for name in names}
                or not all(m.isfinite().all() for m in moments.values())):
            raise ValueError
        moments.update({name: m.contiguous() for name, m in moments.items()})


def write_file(path, content):
    """Write bytes under another name, then rename: whoever reads path finds the old file or the new one."""
    if rank_and_world()[0] == 0:
        try:
            with open(path + ".tmp", "wb") as f:
                f.write(content)
                f.flush()
                os.fsync(f.fileno())                  # on the disk before the old one goes
            os.replace(path + ".tmp", path)
        except OSError:                               # a full disk needs the room
            with suppress(OSError):
                os.remove(path + ".tmp")
            raise


def save(run, cfg, name):
    """Write all of the run, its split and config to cfg.out/name, for torch.load(weights_only=True)."""
    state = dict(config=asdict(cfg), split=run.split, model=run.model.state_dict(),
                 optimizers=[o.state_dict() for o in run.optimizers], scaler=run.scaler.state_dict(),
                 generator=run.generator.get_state(), device=run.device.type, step=run.step,
                 history=run.history, loss_sum=run.loss_sum, loss_steps=run.loss_steps)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(os.path.join(cfg.out, name), buffer.getbuffer())


def is_sound(checkpoint, cfg):
    """Whether split, weights and (where they are there) steps and history are what cfg makes them."""
    split, weights, history = checkpoint["split"], checkpoint["model"], checkpoint.get("history", [])
    counts, steps = [checkpoint.get(k, 0) for k in ("step", "loss_steps")], [row["step"] for row in history]

    def complete(*names):                             # each pair once: no test task or input was trained on
        pairs = torch.cat([split[name] for name in names])
        return (all(len(split[name]) for name in names) and pairs.dtype == torch.long
                and sorted(pairs.tolist()) == grid(cfg.p).tolist())
    with torch.device("meta"):                        # shapes without the memory
        expected = GPT(cfg).state_dict()
    return (complete("id", "val_ood", "test_ood") and complete("train_inputs", "test_inputs")
            and len(split["id"]) == cfg.tasks and len(split) == 5
            and {k: w.shape for k, w in weights.items()} == {k: w.shape for k, w in expected.items()}
            and all(w.is_floating_point() and w.isfinite().all() for w in weights.values())
            and all(type(n) is int and 0 <= n <= cfg.steps for n in [*counts, *steps]) and isinstance(history, list)
            and steps == sorted(set(steps)) and max(steps, default=0) <= counts[0]
            and all(tuple(row) == METRICS and {int, float} >= set(map(type, row.values())) for row in history))


def load_checkpoint(path):
    """A checkpoint of this program, as a dict on the CPU; exits with one line on anything else."""
    if not os.path.isfile(path):
        die(f"{path}: no such checkpoint")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)    # runs no foreign code
        cfg = Config(**checkpoint["config"])
        if {k: type(v) for k, v in checkpoint["config"].items()} != {f.name: f.type for f in fields(Config)}:
            raise TypeError
    except Exception as e:
        die(f"{path}: damaged, or not a checkpoint of this version of the program ({type(e).__name__})")
    validate(replace(cfg, device="cpu", amp="off"), f"{path}: ")
    with suppress(TypeError, AttributeError, RuntimeError, ValueError, LookupError):
        if is_sound(checkpoint, cfg):
            return checkpoint
    die(f"{path}: damaged; its weights, split or history don't fit its config")


def load_model(checkpoint, device="cpu"):
    """The trained GPT of a checkpoint, and its Config."""
    cfg = Config(**checkpoint["config"])
    model = GPT(cfg)
    model.load_state_dict(checkpoint["model"])
    return model.to(device), cfg

# -------------------------------------------------------------------------------------------------
# 7. Report, command line, main
# -------------------------------------------------------------------------------------------------

def report(run, cfg):
    """Evaluate and print the best checkpoint. Only here are the *test* o.o.d. tasks looked at."""
    best, last = run.history[early_stopping(run.history, 0, 1 / cfg.p)[0]], run.history[-1]
    model, _ = load_model(load_checkpoint(os.path.join(cfg.out, "best.pt")), run.device)
    curves = {}
    for name, tokens in eval_sequences(run.split, "test_ood", REPORT_SEQUENCES, cfg.examples, cfg.p,
                                       seed=cfg.seed + 2).items():
        tokens = tokens.to(run.device)                # (model, ratio, regression) x (all, novel) x shots
        curves[name] = 100 * torch.stack([evaluate(model, tokens), *oracle_accuracy(tokens, cfg.p)])

    def cells(triple):
        return "{:6.1f} {:6.1f} {:10.1f}   ".format(*triple)
    header = " model  ratio  regression"
    print(f"\nBest step {best['step']}: {best['val_ood_test']:.2f} on validation o.o.d. tasks, test inputs. "
          f"Last step {last['step']}: {last['val_ood_test']:.2f}.\n\n"
          f"Best step, accuracy in % after {cfg.examples - 1} shots; o.o.d. are the test tasks; chance is "
          f"{100 / cfg.p:.1f}\n{'':27}all queries{'':17}novel queries\n{'':27}{header}   {header}")
    for name, curve in curves.items():
        kind, side = name.rsplit("_", 1)
        label = f"{'i.d.' if kind == 'id' else 'o.o.d.'} tasks, {side} inputs"
        print(f"{label:27}{cells(curve[:, 0, -1])}{cells(curve[:, 1, -1])}".rstrip())
    good = [bool(curve[0, 1, -1] >= 100 * PHASE_THRESHOLD) for curve in curves.values()]
    print(f"Phase: {phase(good)} (a set is good from {PHASE_THRESHOLD:.0%} of its novel queries)\n\n"
          f"o.o.d. tasks, novel queries, over shots\n{'':10}train inputs{'':16}test inputs\n"
          f"shots     {header}   {header}")
    for s in some_shots(cfg.examples):
        print(f"{s:5d}     " + "".join(
            cells(curves[f"test_ood_{side}"][:, 1, s]) for side in ("train", "test")).rstrip())


def parse_config(argv=None):
    """
    The command line as a validated Config: returns (config, preset, checkpoint to resume or None).

    Precedence: an explicit flag, then the resumed run, then the preset, then the paper.
    Exits with code 2 and one line on anything that can't be run; writes nothing.
    """
    parser = argparse.ArgumentParser(
        description="Train a transformer on modular arithmetic in context. [defaults] are the paper's, "
                    "patience apart.",
        allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = die
    parser.add_argument("--preset", choices=PRESETS, help="another set of defaults; " + "; ".join(
        f"{name}: " + " ".join(f"{k} {v}" for k, v in p.items()) for name, p in PRESETS.items()))
    sections = {}
    for f in fields(Config):
        group, text, accepts = f.metadata["group"], f.metadata["help"], f.metadata["accepts"]
        section = sections.setdefault(group, parser.add_argument_group(group))
        section.add_argument("--" + f.name.replace("_", "-"), **(
            dict(action="store_true", help=text) if f.type is bool else
            dict(type=f.type, help=f"{text} [{f.default}]",
                 metavar="|".join(accepts) if isinstance(accepts, list) else f.type.__name__.upper())))
    given = vars(parser.parse_args(argv))
    preset = given.pop("preset", None)
    base = Config(**PRESETS.get(preset, {}))
    cfg = replace(base, **given)
    if "out" not in given:
        cfg.out = default_out(cfg, base, preset)
    elif not cfg.out:
        die("--out '': name a folder, or leave the flag out")
    if not cfg.resume:
        validate(cfg)
        if any(os.path.exists(os.path.join(cfg.out, name)) for name in RUN_FILES):
            die(f"--out {cfg.out}: holds a run already; --resume continues it, another --out starts anew")
        return cfg, preset, None

    checkpoint = load_checkpoint(os.path.join(cfg.out, "last.pt"))
    saved = Config(**checkpoint["config"])
    fixed = [f.name for f in fields(Config) if f.metadata["group"] != "run"]
    differ = [f"--{k.replace('_', '-')} {v} (saved: {getattr(saved, k)})"
              for k, v in (PRESETS.get(preset, {}) | given).items() if k in fixed and v != getattr(saved, k)]
    if differ:
        die(f"--resume: {cfg.out} is a run of other settings: {', '.join(differ)}; "
            f"only what --help lists under 'run' may change")
    if checkpoint.get("history"):                     # the closing report will want best.pt
        best = load_checkpoint(os.path.join(cfg.out, "best.pt"))
        if any(best["config"][k] != checkpoint["config"][k] for k in fixed):
            die(f"{cfg.out}/best.pt: belongs to another run than last.pt")
    cfg = replace(saved, **given | {"out": cfg.out, "resume": False})
    validate(cfg)
    return cfg, preset, checkpoint


def validate(cfg, where=""):
    """Exit with one line that names flag, value and what would do, unless the run can be made."""
    def need(ok, flag, accepted):
        if not ok:
            die(f"{where}--{flag.replace('_', '-')} {getattr(cfg, flag)}: {accepted}")

    for f in fields(Config):
        accepts, value = f.metadata["accepts"], getattr(cfg, f.name)
        if isinstance(accepts, list):
            need(value in accepts, f.name, f"must be one of {', '.join(accepts)}")
        elif accepts:
            need(accepts[0] <= value <= accepts[1], f.name, f"must be from {accepts[0]} to {accepts[1]}")
    p = cfg.p
    need(3 <= p < 1000 and all(p % d for d in range(2, math.isqrt(p) + 1)), "p",
         "must be a prime from 3 to 997")
    need(cfg.tasks <= p * p - 2, "tasks",
         f"must be at most {p * p - 2}: {p}*{p} tasks less one o.o.d. task each to validate and test")
    need(cfg.task_choice == "random" or cfg.tasks % 4 == 0, "tasks",
         "must be a multiple of 4 under --task-choice rectangular")
    need(2 <= round(cfg.alpha * p * p) <= p * p - 2, "alpha",
         f"must lie between 0 and 1 and leave at least 2 of the {p * p} inputs on either side")
    need(cfg.embd % (2 * cfg.heads) == 0, "embd", f"must be a multiple of {2 * cfg.heads}: "
         f"{cfg.heads} heads, each of even width for the rotation")
    need(cfg.batch >= cfg.tasks, "batch", f"must be at least --tasks ({cfg.tasks})")
    world = rank_and_world()[1]
    need(cfg.per_task * cfg.tasks % world == 0, "batch",
         f"must be, rounded up to a multiple of --tasks, a multiple of the {world} processes")
    need(cfg.steps > cfg.warmup, "steps", f"must be above --warmup ({cfg.warmup})")
    need(cfg.steps >= cfg.curriculum, "curriculum", f"must be at most --steps ({cfg.steps})")
    device = pick_device(cfg.device)
    need(cfg.amp != "fp16" or device.type == "cuda", "amp", "needs a CUDA device")


def default_out(cfg, base, preset):
    """out/<what makes this run different from others>, so that other weights or batches get another folder."""
    always = ["depth", "tasks", "seed"]
    names = always + [f.name for f in fields(Config) if f.metadata["group"] != "run"
                      and f.name not in always and getattr(cfg, f.name) != getattr(base, f.name)]
    return os.path.join("out", "-".join([preset or "paper"] + [f"{n}{getattr(cfg, n)}" for n in names]))


def claim_folder(run, cfg):
    """Make cfg.out and write config.json, or exit with one line if that can't be done."""
    try:
        os.makedirs(cfg.out, exist_ok=True)
        if run.step == 0:
            save(run, cfg, "last.pt")                 # first of all: whatever is found can be resumed
        write_file(os.path.join(cfg.out, "config.json"), json.dumps(asdict(cfg), indent=2).encode())
    except OSError as e:
        die(f"--out {cfg.out}: can't be written ({e.strerror}); name a folder that can")


def announce(run, cfg, preset):
    """Say what will run: the preset's deviations from the paper, batch, device, folder."""
    if preset:
        print(f"Preset {preset} (and the paper): " + ", ".join(
            f"{k} {getattr(cfg, k)} ({getattr(Config(), k)})" for k in PRESETS[preset]))
    if cfg.batch % cfg.tasks:
        print(f"--batch {cfg.batch} becomes {cfg.per_task * cfg.tasks}, the next multiple of {cfg.tasks} tasks")
    print(f"p {cfg.p}, {cfg.tasks} tasks, alpha {cfg.alpha}, depth {cfg.depth}, seed {cfg.seed}; "
          f"torch {torch.__version__} on {run.device}; {cfg.out}", flush=True)
    operations = 6 * sum(w.numel() for w in run.model.parameters()) * 3 * cfg.examples * cfg.per_task * cfg.tasks
    hours = operations * (cfg.steps - run.step) / CPU_RATE / 3600
    if run.device.type == "cpu" and hours > 2:
        print(f"This will take some {hours:,.0f} hours on a CPU; --preset laptop takes minutes. Going on all the "
              f"same: Ctrl-C saves and stops.", flush=True)


def main():
    sys.stdout.reconfigure(errors="backslashreplace")          # a terminal without é ends no run
    cfg, preset, checkpoint = parse_config()
    rank, world = rank_and_world()
    try:
        if world > 1:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            dist.barrier()                            # none may write before all have looked
        if rank > 0:
            sys.stdout = open(os.devnull, "w")        # one of them talks
        run = start(cfg, checkpoint)
        claim_folder(run, cfg)
        announce(run, cfg, preset)
        exit_code = train(run, cfg)
        if exit_code is None and rank == 0:
            report(run, cfg)
    except KeyboardInterrupt:                         # before the first step, or in the report
        exit_code = 130
    except OSError as e:                              # a full disk, a folder that is gone
        sys.exit(f"error: {e.filename or cfg.out}: {e.strerror}")
    except RuntimeError as e:
        if not isinstance(e, torch.OutOfMemoryError) and "can't allocate memory" not in str(e):
            raise
        sys.exit("error: the memory is full; a smaller --batch, --embd or --examples needs less")
    if exit_code:                                     # saved; the same signal may come again from a launcher
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
    if exit_code is not None and os.path.exists(os.path.join(cfg.out, "last.pt")):
        print(f"To go on: {'python' if world == 1 else 'torchrun ...'} grok_icl.py --resume --out "
              f"{shlex.quote(cfg.out)}", flush=True)
    if world > 1:                                     # else gloo's threads may crash the interpreter's winding down
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(exit_code or 0)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
