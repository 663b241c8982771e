"""The names that a configuration may use, and facts about them that need no torch.

A new loss, metric or schedule is one entry here and one function in `dtrain.algorithm`; a test compares the two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_PART = r"(?:[^\W\d]\w*|<lambda>)"
FUNCTION = re.compile(rf"^[^\W\d][\w.-]*:{_PART}(?:\.{_PART})*(?:\(\))?$")
"""A reference to a user's function, ``module:function``; Python gives others too (`dtrain.config.functions`)."""

_COSINE = re.compile(r"^cos\((\S+)\)$")

IGNORED_CLASS = -100
"""A target of this class counts neither in the loss nor in metrics, as in torch."""

VERSION_OPTIONS = ("branch", "tag", "snapshot")
HARMLESS_OPTIONS = frozenset(
    [
        "account_name",
        "addressing_style",
        "allow_http",
        "anon",
        "anonymous",
        "asynchronous",
        "block_size",
        "branch",
        "bucket",
        "cache_regions",
        "connect_timeout",
        "container",
        "default_block_size",
        "default_cache_type",
        "endpoint",
        "endpoint_url",
        "force_path_style",
        "from_env",
        "listings_expiry_time",
        "location",
        "max_attempts",
        "max_concurrency",
        "max_pool_connections",
        "mode",
        "prefix",
        "profile",
        "project",
        "proto",
        "protocol",
        "read_timeout",
        "region",
        "region_name",
        "remote_protocol",
        "requester_pays",
        "retries",
        "signature_version",
        "skip_instance_cache",
        "snapshot",
        "tag",
        "target_protocol",
        "tcp_keepalive",
        "timeout",
        "use_listings_cache",
        "use_ssl",
        "verify",
        "version_aware",
    ]
)
"""Keys of ``data.storage_options``, at any depth, whose values a run keeps: none of them is ever a secret."""
"""The keys of ``data.storage_options`` that choose a version of an icechunk repository."""

LOSSES = ("mse", "mae", "huber", "cross_entropy", "bce")
LABEL_LOSSES = ("cross_entropy", "bce")
"""The losses whose targets are labels: they leave out `IGNORED_CLASS`, which is a number like any other to the rest."""
SCHEDULES = ("constant", "cosine", "linear")


@dataclass(frozen=True, slots=True)
class MetricFacts:
    """How a metric is computed and compared."""

    higher_is_better: bool = False
    from_loss: bool = False
    """It is a function of the mean loss, and needs no pass over the outputs of its own."""
    of_labels: bool = False
    """It leaves out `IGNORED_CLASS`."""
    refused_losses: tuple[str, ...] = ()
    """Losses whose outputs it cannot be computed from."""
    needs_climate: bool = False
    """It compares anomalies, the differences from a climatology of the training rows."""
    floats: int = 2
    """Numbers of its state, 8 bytes each: a sum and a count, or what it needs; 0 if it has none of its own."""
    floats_by_class: int = 0
    """Numbers of its state for each class; a mask has one."""


_BY_CLASS = MetricFacts(
    higher_is_better=True, of_labels=True, refused_losses=("mse", "mae", "huber"), floats=0, floats_by_class=3
)
_OF_NUMBERS = MetricFacts(refused_losses=LABEL_LOSSES)
_OF_LOSS = MetricFacts(from_loss=True, of_labels=True, floats=0)
METRICS = {
    "accuracy": MetricFacts(higher_is_better=True, of_labels=True),
    "f1": _BY_CLASS,
    "iou": _BY_CLASS,
    "dice": _BY_CLASS,
    "auroc": replace(_BY_CLASS, floats_by_class=2 * 512),
    "mse": MetricFacts(),
    "mae": MetricFacts(),
    "rmse": _OF_NUMBERS,
    "r2": replace(_OF_NUMBERS, higher_is_better=True, floats=4),
    "anomaly_correlation": replace(_OF_NUMBERS, higher_is_better=True, needs_climate=True, floats=3),
    "perplexity": _OF_LOSS,
    "bits_per_byte": _OF_LOSS,
}


def cosine_of(weight: str) -> str:
    """Return the coordinate of which ``data.weight`` is the cosine; empty if it names a variable.

    >>> cosine_of("cos(lat)"), cosine_of("area")
    ('lat', '')
    """
    found = _COSINE.match(weight)
    return found[1] if found else ""


def metric_key(name: str) -> str:
    """Return the reported name of a metric; for ``module:function`` this is the name of the function.

    >>> metric_key("accuracy"), metric_key("model:Skills.rmse"), metric_key("__main__:quantile()")
    ('accuracy', 'rmse', 'quantile')
    """
    return name.rpartition(":")[2].removesuffix("()").rpartition(".")[2]
