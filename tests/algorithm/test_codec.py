"""Codecs: what they lose, and error feedback."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from dtrain.algorithm.average import combine, contribute
from dtrain.algorithm.codec import BLOCK, CODECS, Compressed, Encoded, compress, cut_compressed, decompress
from dtrain.algorithm.replica import fresh_replica
from dtrain.algorithm.slices import ALIGNMENT
from dtrain.config.average import AverageConfig, CodecConfig
from dtrain.types import Broadcast, Flat, Parameters
from tests.algorithm.helpers import locked, result, task, vector

INTEGERS = {"int8": 127, "int4": 7}
LARGEST = np.finfo(np.float32).max
DENORMAL = np.float32(1e-45)

values = st.floats(width=32, allow_nan=False, allow_infinity=False)
lengths = st.integers(1, 3 * BLOCK + 5)
updates = st.one_of(
    arrays.arrays(np.float32, lengths, elements=values),
    arrays.arrays(np.float32, lengths, elements=st.floats(-4.0, 4.0, width=32), fill=st.just(0.0)),
    arrays.arrays(np.float32, lengths, elements=st.floats(-(2.0**-135), 2.0**-135, width=32)),  # denormal numbers
)


def there_and_back(name: str, update: Flat) -> tuple[Encoded, Flat]:
    encoded = CODECS[name].encode(update)
    return encoded, CODECS[name].decode(encoded, len(update))


def decoded(name: str, update: Sequence[float]) -> list[float]:
    return there_and_back(name, np.array(update, np.float32))[1].tolist()  # type: ignore[no-any-return]


# One update -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INTEGERS)
@given(update=updates)
def test_integers_lose_at_most_half_a_step_of_the_scale(name: str, update: Flat) -> None:
    encoded, found = there_and_back(name, locked(update))
    assert found.dtype == np.float32
    assert found.shape == update.shape
    assert np.isfinite(found).all()
    most, steps = INTEGERS[name], np.repeat(encoded.scales.astype(np.float64), BLOCK)[: len(update)]
    # scale and product are rounded too; a denormal scale is off by up to half of the smallest float
    allowed = steps * (0.5 + 1e-4) + most * float(DENORMAL)
    assert (np.abs(found.astype(np.float64) - update) <= allowed).all()
    largest = [np.abs(update[start : start + BLOCK]).max() for start in range(0, len(update), BLOCK)]
    np.testing.assert_allclose(encoded.scales, np.array(largest) / most, rtol=1e-6, atol=float(DENORMAL))


@given(update=updates)
def test_bf16_is_that_of_torch(update: Flat) -> None:
    _, found = there_and_back("bf16", update)
    assert found.tobytes() == torch.from_numpy(update).bfloat16().float().numpy().tobytes()


def test_ties_go_to_the_even_number() -> None:
    assert decoded("int8", [127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]) == [127, 0, 2, 2, 0, -2, -2, 126]
    assert decoded("int4", [-7, 0.5, 1.5, 2.5, 3.5, -5.5, 6.5]) == [-7, 0, 2, 2, 4, -6, 6]
    step = 2.0**-7  # of bfloat16 at 1
    assert decoded("bf16", [1 + step / 2, 1 + 3 * step / 2, -1 - step / 2]) == [1, 1 + 2 * step, -1]


def test_an_update_by_hand() -> None:
    # the scale of a block is its largest magnitude / 127 = 2: multiples of 2, the nearest
    assert decoded("int8", [254, -3.1, 0.9, -254]) == [254, -4, 0, -254]
    encoded, _ = there_and_back("int8", np.float32([254, -3.1, 0.9, -254]))
    assert encoded.data.view(np.int8).tolist() == [127, -2, 0, -127]
    assert encoded.scales.tolist() == [2.0]
    # two nibbles a byte, the first one in the lower half
    encoded, back = there_and_back("int4", np.float32([14, -3.1, 0.9, -14, 5]))
    assert encoded.data.tolist() == [0xE7, 0x90, 0x02]  # 7, -2 | 0, -7 | 2
    assert back.tolist() == [14, -4, 0, -14, 4]


def test_blocks_have_scales_of_their_own() -> None:
    update = np.full(BLOCK + 1, 1e-3, np.float32)
    update[0] = 127.0
    _, found = there_and_back("int8", update)
    assert found[1:BLOCK].tolist() == [0.0] * (BLOCK - 1)
    assert found[BLOCK] == pytest.approx(1e-3)


@pytest.mark.parametrize("name", CODECS)
def test_zeros_stay_and_the_largest_of_a_block_too(name: str) -> None:
    assert decoded(name, [0.0] * 5) == [0.0] * 5
    assert decoded(name, [-0.0]) == [0.0]
    assert decoded(name, [3.0]) == [3.0]
    assert decoded(name, [-1.5, 0.0]) == [-1.5, 0.0]


@pytest.mark.parametrize("name", INTEGERS)
def test_denormal_and_huge_numbers(name: str) -> None:
    assert decoded(name, [DENORMAL]) == [0.0]  # its scale is no float: error feedback keeps it
    assert decoded(name, [1e-40]) == pytest.approx([1e-40], abs=INTEGERS[name] * float(DENORMAL))
    assert decoded(name, [LARGEST, -LARGEST, 0.0]) == pytest.approx([LARGEST, -LARGEST, 0.0], rel=1e-6)
    for seed in range(20):
        bits = np.random.default_rng(seed).integers(0x7F000000, 0x7F7FFFFF, 2 * BLOCK, endpoint=True).astype(np.uint32)
        assert np.isfinite(there_and_back(name, bits.view(np.float32))[1]).all()


@pytest.mark.parametrize(("name", "bits"), [("bf16", 16), ("int8", 8.25), ("int4", 4.25)])
def test_bits_a_parameter(name: str, bits: float) -> None:
    encoded, _ = there_and_back(name, np.ones(10 * BLOCK, np.float32))
    assert encoded.nbytes * 8 == bits * 10 * BLOCK
    assert there_and_back(name, np.ones(3, np.float32))[0].nbytes == {"bf16": 6, "int8": 3 + 4, "int4": 2 + 4}[name]


# Parameters -------------------------------------------------------------------------------------------------------


def coded(name: str, error_feedback: bool = True) -> CodecConfig:
    return CodecConfig.model_validate({"name": name, "error_feedback": error_feedback})


@pytest.mark.parametrize("name", CODECS)
@given(length=lengths, cuts=st.sets(st.integers(1, 3), max_size=3), seed=st.integers(0, 99))
def test_a_cut_of_what_is_sent_gives_the_bits_of_the_whole(name: str, length: int, cuts: set[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    theta, after = generator.normal(size=(2, length)).astype(np.float32)
    start, buffers = vector(theta.tolist(), [1.0, 2.0], [3.0]), [5.0, 6.0]
    sent, reached, _ = compress(start, vector(after.tolist(), buffers, [7.0]), None, coded(name))
    whole = decompress(start, sent, coded(name))
    assert whole.flat.tobytes() == reached.flat.tobytes()
    bounds = [0, *(cut * BLOCK for cut in sorted(cuts) if cut * BLOCK < length), length + 2]
    parts, nbytes = [], 0
    for begin, end in pairwise(bounds):
        is_last = end == bounds[-1]
        part = cut_compressed(sent, begin, end, is_last, coded(name))
        extra = start.extra if is_last else start.extra[:0]
        parts.append(decompress(Parameters(start.layout, start.flat[begin:end], extra, start=begin), part, coded(name)))
        nbytes += part.nbytes
    assert np.concatenate([part.flat for part in parts]).tobytes() == whole.flat.tobytes()
    assert parts[-1].extra.tobytes() == whole.extra.tobytes()
    assert [len(part.extra) for part in parts[:-1]] == [0] * (len(parts) - 1)
    assert nbytes == sent.nbytes


def test_slices_of_the_reducer_begin_where_blocks_do() -> None:
    assert ALIGNMENT % BLOCK == 0


@pytest.mark.parametrize("name", CODECS)
def test_buffers_are_sent_as_they_are(name: str) -> None:
    start, after = vector([0.0], [1.0], [2.0]), vector([1.0], [0.1], [0.3])
    sent, reached, _ = compress(start, after, None, coded(name))
    for found in (reached, decompress(start, sent, coded(name))):
        assert found.flat[1:].tolist() == after.flat[1:].tolist()
        assert found.extra.tobytes() == after.extra.tobytes()


@pytest.mark.parametrize("name", CODECS)
@given(data=st.data(), length=lengths)
def test_the_residual_is_what_was_lost(name: str, data: st.DataObject, length: int) -> None:
    small = arrays.arrays(np.float32, length, elements=st.floats(-100.0, 100.0, width=32))
    theta, after, before = (data.draw(small) for _ in range(3))
    start = vector(theta.tolist())
    sent, _, residual = compress(start, vector(after.tolist()), locked(before), coded(name))
    assert residual is not None
    update = (theta.astype(np.float64) - after + before).astype(np.float32)
    assert residual.dtype == np.float32
    np.testing.assert_array_equal(residual, update - CODECS[name].decode(sent.update, length))  # -0 is 0
    assert compress(start, vector(after.tolist()), None, coded(name, error_feedback=False))[2] is None


@pytest.mark.parametrize("name", CODECS)
def test_nothing_that_is_given_is_changed(name: str) -> None:
    generator = np.random.default_rng(0)
    theta, after = (vector(generator.normal(size=300).tolist()) for _ in range(2))
    residual = generator.normal(size=300).astype(np.float32)
    given = [theta.flat, after.flat, residual]
    before = [array.tobytes() for array in given]
    for array in given:
        array.flags.writeable = False
    sent, _, lost = compress(theta, after, residual, coded(name))
    decompress(theta, sent, coded(name))
    assert [array.tobytes() for array in given] == before
    assert lost is not None
    assert not any(np.shares_memory(lost, array) for array in given)


@pytest.mark.parametrize("name", CODECS)
def test_a_mask_of_minus_infinity_stays(name: str) -> None:
    start, after = vector([-np.inf, 1.0]), vector([-np.inf, 4.0])
    sent, reached, residual = compress(start, after, None, coded(name))
    assert reached.flat.tolist() == [-np.inf, 4.0]
    assert decompress(start, sent, coded(name)).flat.tolist() == [-np.inf, 4.0]
    assert residual is not None
    assert residual.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", CODECS)
def test_an_update_that_is_no_float32_leads_to_parameters_that_are_not_finite(name: str) -> None:
    _, reached, _ = compress(vector([LARGEST, 1.0]), vector([-LARGEST, 1.0]), None, coded(name))
    assert not np.isfinite(reached.flat).all()


# Many rounds ------------------------------------------------------------------------------------------------------


def rounds(config: CodecConfig, steps: Sequence[float], count: int) -> list[float]:
    """Parameters after rounds in which both replicas move by the same steps from wherever they start."""
    average = AverageConfig(codec=config)
    start, states = Broadcast(vector([0.0] * len(steps))), [fresh_replica()] * 2
    for number in range(1, count + 1):
        after = vector((start.params.flat + np.float32(steps)).tolist())
        each = [contribute(start, after, states[k], result(), task(k, number), average) for k in range(2)]
        updates, states = [sent for sent, _ in each], [state for _, state in each]
        assert all(isinstance(sent.payload, Compressed) for sent in updates)
        start = combine(start, [start] * 2, updates, (), average).broadcast
    return start.params.flat.tolist()  # type: ignore[no-any-return]


def test_int4_stalls_without_error_feedback_and_goes_on_with_it_by_hand() -> None:
    # the scale is 7 / 7 = 1, so that 0.375 becomes 0: the second parameter never moves
    assert rounds(coded("int4", error_feedback=False), [-7.0, -0.375], 8) == [-56.0, 0.0]
    # sums 0.375, 0.75, 0.125, 0.5, 0.875, 0.25, 0.625, 0 are sent as 0, 1, 0, 0, 1, 0, 1, 0
    reached = [rounds(coded("int4"), [-7.0, -0.375], count)[1] for count in range(1, 9)]
    assert reached == [0.0, -1.0, -1.0, -1.0, -2.0, -2.0, -3.0, -3.0]


@pytest.mark.parametrize("name", CODECS)
def test_with_error_feedback_all_rounds_together_lose_as_little_as_one(name: str) -> None:
    steps, count = [-7.0, -0.3, 0.01, -1e-3], 200
    step = {"bf16": 2.0**-8 * 7, "int8": 7 / 127, "int4": 1.0}[name]
    found = rounds(coded(name), steps, count)
    assert np.abs(np.array(found[1:]) - count * np.array(steps[1:])).max() <= 0.5 * step + 1e-3
