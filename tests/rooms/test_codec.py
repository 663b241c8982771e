"""A codec is one object in one dictionary: registered here, it runs with error feedback without a change in dtrain."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client

import dtrain
from dtrain.algorithm import codec as codecs
from dtrain.algorithm.codec import Codec, Encoded, compress, decompress
from dtrain.checkpoint import load_round
from dtrain.config.average import CodecConfig
from dtrain.data.samples import Samples
from dtrain.runfiles import round_directory
from dtrain.types import Entry, Flat, Layout, Parameters, TrainState
from tests.runtime import models
from tests.training import shas

NAME = "int8"  # the configuration knows it; the test's codec takes its place


class Identity:
    """Loses nothing."""

    bits = 32

    def encode(self, update: Flat) -> Encoded:
        return Encoded(update.view(np.uint8), np.zeros(0, np.float32))

    def decode(self, encoded: Encoded, size: int) -> Flat:
        return encoded.data.view(np.float32)


class Quarters:
    """Rounds towards zero to multiples of a scale: 127 of them reach the largest number."""

    bits = 8

    def encode(self, update: Flat) -> Encoded:
        scale = np.float32(np.abs(update).max() / 127 or 1)
        return Encoded(np.trunc(update / scale).astype(np.int8).view(np.uint8), np.array([scale]))

    def decode(self, encoded: Encoded, size: int) -> Flat:
        return encoded.data.view(np.int8) * encoded.scales[0]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[Codec], None]:
    return lambda codec: monkeypatch.setitem(codecs.CODECS, NAME, codec)


def set_codec(codec: Codec | None) -> None:
    codecs.CODECS[NAME] = codec or codecs.Integers(8)


@pytest.fixture
def on_workers(client: Client) -> Iterator[Callable[[Codec], None]]:
    yield lambda codec: client.run(set_codec, codec)
    client.run(set_codec, None)


def start(samples: Samples, tmp_path: Path, cluster: Any, rounds: int = 4, codec: Any = None) -> dtrain.Run:
    average = {"replicas": 3, **({} if codec is None else {"codec": codec})}
    return dtrain.train(
        models.small,
        samples,
        train={"loss": "cross_entropy", "metrics": ["accuracy"], "rounds": rounds, "local_steps": 3, "batch_size": 16},
        average=average,
        cluster=cluster,
        run="codec",
        run_dir=tmp_path,
        progress=False,
    )


def last_state(run: dtrain.Run) -> TrainState:
    return load_round(round_directory(run.directory, run.rows[-1]["round"]))[0]


def params(flat: list[float], buffers: list[float] | None = None) -> Parameters:
    entry = Entry("w", "param", "float32", (len(flat),), 0, len(flat))
    whole = np.array([*flat, *(buffers or [])], np.float32)
    return Parameters(Layout((entry,), len(flat), len(whole), 0), whole, np.zeros(0, np.uint8))


def test_error_feedback_by_hand(register: Callable[[Codec], None]) -> None:
    register(Quarters())
    config = CodecConfig(name=NAME)
    theta, after = params([0.0, 0.0, 0.0], [7.0]), params([-127.0, -1.5, 0.25], [8.0])
    sent, reached, residual = compress(theta, after, None, config)
    assert reached.flat.tolist() == [-127.0, -1.0, 0.0, 8.0]
    assert residual is not None
    assert sent.update.data.view(np.int8).tolist() == [127, 1, 0]
    assert residual.tolist() == [0.0, 0.5, -0.25]
    assert decompress(theta, sent, config).flat.tolist() == [-127.0, -1.0, 0.0, 8.0]
    again, _, residual = compress(theta, after, residual, config)
    assert residual is not None
    assert again.update.data.view(np.int8).tolist() == [127, 2, 0]  # 1.5 + 0.5
    assert residual.tolist() == [0.0, 0.0, -0.5]
    without = compress(theta, after, None, CodecConfig(name=NAME, error_feedback=False))
    assert without[2] is None


def test_a_codec_that_loses_nothing_trains_as_without(
    samples: Samples, tmp_path: Path, register: Callable[[Codec], None]
) -> None:
    register(Identity())
    plain = start(samples, tmp_path / "plain", "serial")
    coded = start(samples, tmp_path / "coded", "serial", codec={"name": NAME})
    state = last_state(coded)
    for own in state.replicas:
        assert own.residual is not None
        assert own.residual.shape == (state.model.layout.num_params,)
        assert not own.residual.any()
    np.testing.assert_allclose(state.model.flat, last_state(plain).model.flat, atol=1e-5)
    assert coded.rows[-1]["val_accuracy"] == plain.rows[-1]["val_accuracy"]


def test_a_lossy_codec_gives_the_same_bits_on_a_cluster_and_after_resume(
    samples: Samples,
    tmp_path: Path,
    client: Client,
    register: Callable[[Codec], None],
    on_workers: Callable[[Codec], None],
) -> None:
    register(Quarters())
    on_workers(Quarters())
    serial = start(samples, tmp_path / "serial", "serial", codec={"name": NAME})
    assert any(own.residual is not None and own.residual.any() for own in last_state(serial).replicas)
    cluster = start(samples, tmp_path / "cluster", client, codec={"name": NAME})
    start(samples, tmp_path / "cut", client, rounds=2, codec={"name": NAME})
    resumed = start(samples, tmp_path / "cut", "serial", codec={"name": NAME})
    assert shas(serial) == shas(cluster) == shas(resumed)
    assert shas(serial) != shas(start(samples, tmp_path / "plain", "serial"))
    sent, whole = serial.rows[0]["bytes_reduced"], 3 * last_state(serial).model.nbytes
    assert sent < 0.5 * whole
