"""Presets of averaging: published methods as tables to paste into a config file, each with its paper.

A preset sets what its method is about. Other keys, mostly the inner optimizer, are left to the user. Values are those
of the source, but for those marked as ours.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass

from dtrain.config.values import Tables
from dtrain.errors import UsageError, did_you_mean


@dataclass(frozen=True, slots=True)
class Preset:
    """A way of averaging, with values to start from."""

    name: str
    summary: str
    source: str
    about: str
    """What was published, and where it was measured."""
    adapt: str
    """The keys to look at first."""
    toml: str
    """The tables as TOML."""

    @property
    def tables(self) -> Tables:
        """The tables as nested mappings."""
        return tomllib.loads(self.toml)


DATA_PARALLEL = Preset(
    name="data_parallel",
    summary="synchronous large-batch AdamW: one local step, AdamW on the averaged gradient",
    source="Loshchilov and Hutter 2019, arXiv:1711.05101 (AdamW); Goyal et al. 2017, arXiv:1706.02677 (large batches)",
    about="""
        The local step is SGD with lr = 1 and no momentum, so that a replica moves by its gradient, and the averaged
        update is the gradient of all batches together. Optimizer, schedule and clipping act on it once, as in a
        training on one machine with batches of replicas x batch_size. lr and weight_decay are torch's defaults.
    """,
    adapt="""
        rounds is the number of steps. The learning rate is average.outer.args.lr. On a fast network
        DistributedDataParallel does the same at less cost.
    """,
    toml="""
[train]
rounds = 2000                     # ours
local_steps = 1
optimizer = "sgd"
optimizer_args = { lr = 1.0, momentum = 0.0 }
schedule = "constant"
clip_norm = 0.0

[average.outer]
optimizer = "adamw"
args = { lr = 0.001, weight_decay = 0.01 }
schedule = "cosine"               # ours
clip_norm = 1.0                   # ours
""",
)

LOCAL_SGD = Preset(
    name="local_sgd",
    summary="plain averaging of parameters after some local steps",
    source="Stich 2019, arXiv:1805.09767",
    about="""
        With M replicas and T steps the rate is that of mini-batch SGD, up to local_steps of the order of
        sqrt(T / M^3), in theory for convex losses.
    """,
    adapt="""
        local_steps: more cost less communication and learn less a step. With momentum or Adam,
        average.inner_state = "average" averages their states too, for two to three times the bytes.
    """,
    toml="""
[train]
local_steps = 10                  # ours
""",
)

POST_LOCAL_SGD = Preset(
    name="post_local_sgd",
    summary="one local step a round at first, local SGD after that",
    source="Lin et al. 2020, arXiv:1808.07217",
    about="""
        In the paper local SGD begins where the learning rate first decays. 100 steps before it and 4 local steps are
        the values of PyTorch's documentation of PostLocalSGDOptimizer.
    """,
    adapt="sync_rounds and rounds: sync_rounds is the number of first rounds with one step each.",
    toml="""
[train]
rounds = 600                      # ours: 100 + 500 x 4 steps
sync_rounds = 100
local_steps = 4
""",
)

FEDAVG = Preset(
    name="fedavg",
    summary="some passes of SGD over each partition, then the mean weighted by samples",
    source="McMahan et al. 2017, arXiv:1602.05629",
    about="""
        10 to 100 times fewer rounds than one step a round. 5 passes and batches of 10 are the paper's for its CNN on
        MNIST. It draws some of the participants for each round; here all replicas take part.
    """,
    adapt="optimizer_args.lr, then local_epochs: fewer where partitions differ much.",
    toml="""
[train]
local_epochs = 5
batch_size = 10
optimizer = "sgd"
optimizer_args = { lr = 0.1 }     # ours: the paper searches a grid

[average]
weights = "samples"
""",
)

FEDPROX = Preset(
    name="fedprox",
    summary="FedAvg with a pull of local steps towards the start of the round",
    source="Li et al. 2020, arXiv:1812.06127",
    about="""
        The paper chooses prox from 0.001, 0.01, 0.1 and 1 for each data set. 0.01 and 4 passes are NVFlare's: CIFAR-10
        over 8 partitions, classes drawn from Dirichlet 0.1, 50 rounds: accuracy 0.806, FedAvg 0.805.
    """,
    adapt="average.prox: larger where replicas drift apart; too large a value keeps them from learning.",
    toml="""
[train]
local_epochs = 4
optimizer = "sgd"
optimizer_args = { lr = 0.01 }    # ours

[average]
prox = 0.01
""",
)

FEDNOVA = Preset(
    name="fednova",
    summary="FedAvg for replicas that take different numbers of steps: updates are divided by their steps",
    source="Wang et al. 2020, arXiv:2007.07481",
    about="""
        The method has no value of its own. Where steps differ, FedAvg goes to the optimum of another objective, in
        which replicas with more steps count more; FedNova does not.
    """,
    adapt="""
        optimizer_args.lr and local_epochs. With momentum the norm of a replica's steps is the paper's;
        average.inner_state = "reset" then begins each round without momentum, as the paper does.
    """,
    toml="""
[train]
local_epochs = 2                  # ours
optimizer = "sgd"
optimizer_args = { lr = 0.01 }    # ours

[average]
weights = "fednova"
""",
)

FEDAVGM = Preset(
    name="fedavgm",
    summary="FedAvg with momentum on the averaged update",
    source="Hsu et al. 2019, arXiv:1909.06335",
    about="""
        CIFAR-10, the most unequal partitions: accuracy 76.9 % where FedAvg has 30.1 %. The paper tries momentum from
        0 to 0.997 in the form that torch has: v = momentum v + g, theta = theta - v.
    """,
    adapt="""
        average.outer.args.momentum and optimizer_args.lr together: momentum m makes steps up to 1 / (1 - m) times
        longer, so that a larger m needs a smaller lr.
    """,
    toml="""
[train]
local_epochs = 1
optimizer = "sgd"
optimizer_args = { lr = 0.01 }    # ours

[average.outer]
optimizer = "sgd"
args = { lr = 1.0, momentum = 0.9 }
""",
)

FEDADAM = Preset(
    name="fedadam",
    summary="SGD in the local steps, Adam on the averaged update",
    source="Reddi et al. 2021, arXiv:2003.00295",
    about="""
        betas and eps (tau in the paper) are those of the paper; lr = 0.1 is the default of FedAdam in Flower. torch's
        Adam corrects the bias of its first steps, the paper's does not.
    """,
    adapt="average.outer.args.lr and optimizer_args.lr, each over powers of ten.",
    toml="""
[train]
local_epochs = 1
optimizer = "sgd"
optimizer_args = { lr = 0.03 }    # ours

[average.outer]
optimizer = "adam"
args = { lr = 0.1, betas = [0.9, 0.99], eps = 0.001 }
""",
)

DILOCO = Preset(
    name="diloco",
    summary="AdamW for many local steps, Nesterov momentum on the averaged update",
    source="Douillard et al. 2023, arXiv:2311.08105",
    about="""
        Language models of 150M parameters, C4, 8 replicas: perplexity 15.02 with 1/500 of the communication of an
        8 times larger batch (15.30). Of 50 to 2,000 local steps, fewer than 500 gain little; 1,000 cost 2.9 % against
        50. Clipping acts on the local steps only.
    """,
    adapt="""
        local_steps: 30 or more for small models. Outer momentum takes 30 to 40 rounds to build up: with fewer leave
        [average.outer] out. optimizer_args.lr and warmup_steps are those of models of 150M parameters.
    """,
    toml="""
[train]
rounds = 176                      # 88,000 steps
local_steps = 500
optimizer = "adamw"
optimizer_args = { lr = 0.0004, weight_decay = 0.1 }
schedule = "cosine"
warmup_steps = 1000
clip_norm = 1.0

[average.outer]
optimizer = "sgd"
args = { lr = 0.7, momentum = 0.9, nesterov = true }
""",
)

SLOWMO = Preset(
    name="slowmo",
    summary="momentum on the averaged update of local SGD",
    source="Wang et al. 2020, arXiv:1910.00643",
    about="""
        The slow learning rate, lr, is 1 and not tuned. Best momentum for translation (WMT) in FairScale: 0 below 4
        machines, 0.2 for 4, 0.5 for 8, 0.6 for 16. 48 local steps are FairScale's default.
    """,
    adapt="""
        average.outer.args.momentum, by the number of replicas. The paper divides the averaged update by the inner
        learning rate and multiplies by the next one: the same as here while train.schedule is constant.
    """,
    toml="""
[train]
local_steps = 48

[average.outer]
optimizer = "sgd"
args = { lr = 1.0, momentum = 0.5 }
""",
)

HIERARCHICAL = Preset(
    name="hierarchical",
    summary="average in groups each round, over all replicas in every few rounds",
    source="Lin et al. 2020, arXiv:1808.07217 (hierarchical local SGD)",
    about="""
        For machines with fast links within a group and slow ones between. The paper and PyTorch's
        HierarchicalModelAverager average at two periods or more; neither has values that fit all.
    """,
    adapt="replicas and groups to your machines; period: rounds from one mean of all replicas to the next.",
    toml="""
[train]
local_steps = 10                  # ours

[average]
replicas = 4                      # ours

[average.mix]
topology = "hierarchical"
groups = 2                        # ours
period = 4                        # ours
""",
)

RING = Preset(
    name="ring",
    summary="average each replica with its two neighbours (D-PSGD)",
    source="Lian et al. 2017, arXiv:1705.09056",
    about="""
        The paper takes one local step a round, and steps from the mean along the gradient of the old parameters; here
        the step comes first. A round brings 8 replicas together by the factor 0.805, 16 by 0.949, 32 by 0.987.
    """,
    adapt="replicas: 4 or more, since a ring of 3 is full averaging. The model is the mean of all replicas.",
    toml="""
[train]
local_steps = 10                  # ours

[average]
replicas = 8                      # ours

[average.mix]
topology = "ring"
""",
)

EXPONENTIAL = Preset(
    name="exponential",
    summary="average each replica with one other, at distances 1, 2, 4 ... from round to round",
    source="Ying et al. 2021, arXiv:2110.13363",
    about="""
        Each replica receives the parameters of one other. A power of two of replicas is averaged exactly in
        log2(replicas) rounds: 8 replicas in 3.
    """,
    adapt="replicas: a power of two. The model is the mean of all replicas.",
    toml="""
[train]
local_steps = 10                  # ours

[average]
replicas = 8                      # ours

[average.mix]
topology = "exponential"
""",
)

SCAFFOLD = Preset(
    name="scaffold",
    summary="control variates take out of local steps what is peculiar to a partition",
    source="Karimireddy et al. 2020, arXiv:1910.06378",
    about="""
        NVFlare: CIFAR-10 over 8 partitions, classes drawn from Dirichlet 0.1, 50 rounds of 4 passes: accuracy 0.826,
        FedAvg 0.805. Control variates double the bytes of a round.
    """,
    adapt="optimizer_args.lr and local_epochs. The theory is for SGD without momentum.",
    toml="""
[train]
local_epochs = 4
optimizer = "sgd"
optimizer_args = { lr = 0.01 }    # ours

[average]
control = true
""",
)

PRESETS = {
    preset.name: preset
    for preset in (
        DATA_PARALLEL,
        LOCAL_SGD,
        POST_LOCAL_SGD,
        FEDAVG,
        FEDPROX,
        FEDNOVA,
        FEDAVGM,
        FEDADAM,
        DILOCO,
        SLOWMO,
        HIERARCHICAL,
        RING,
        EXPONENTIAL,
        SCAFFOLD,
    )
}
"""By name, in the order in which they are listed."""


def preset_named(name: str) -> Preset:
    """Return a preset.

    Raises
    ------
    UsageError
        There is none of that name.
    """
    if name not in PRESETS:
        raise UsageError(f"{name}: no such preset{did_you_mean(name, PRESETS)}", f"Presets are {', '.join(PRESETS)}.")
    return PRESETS[name]
