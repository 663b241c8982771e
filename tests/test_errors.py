from __future__ import annotations

import inspect
import pickle

import cloudpickle
import pytest

from dtrain import errors
from dtrain.errors import DtrainError, did_you_mean

CLASSES = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, DtrainError)]
MISTAKES = [kind for kind in CLASSES if kind is not DtrainError]
# SPEC section 2; 0 is no error, 1 a bug, 130 Ctrl-C
CODES = {2, 3, 4, 5, 6, 7, 8, 75}

kinds = pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)


@kinds
@pytest.mark.parametrize("tool", [pickle, cloudpickle], ids=["pickle", "cloudpickle"])
@pytest.mark.parametrize("hint", ["", "Do something else."])
def test_an_error_survives_the_way_between_processes(kind, tool, hint):
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        back = pickle.loads(tool.dumps(kind("x = 3: allowed are 1, 2", hint), protocol=protocol))
        assert type(back) is kind
        assert (back.message, back.hint, back.code) == ("x = 3: allowed are 1, 2", hint, kind.code)
        assert str(back) == str(kind("x = 3: allowed are 1, 2", hint))


@kinds
def test_the_text_is_the_message_and_the_hint(kind):
    assert str(kind("said")) == "said"
    assert str(kind("said", "do")) == "said\ndo"


@pytest.mark.parametrize("kind", MISTAKES, ids=lambda kind: kind.__name__)
def test_every_error_has_an_exit_code_of_the_contract(kind):
    assert kind.code in CODES
    assert kind.__doc__


def test_every_exit_code_has_an_error():
    assert {kind.code for kind in MISTAKES} == CODES
    assert DtrainError.code == 1


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("ConfigFileNotFound", 2),
        ("RunNotFound", 2),
        ("RoundNotFound", 2),
        ("UsageError", 2),
        ("InvalidConfig", 3),
        ("NotSupportedYet", 3),
        ("UnknownVariable", 3),
        ("LengthsDiffer", 3),
        ("ShapesDiffer", 3),
        ("NotAModule", 3),
        ("UnsuitableModel", 3),
        ("UserCodeFailed", 3),
        ("ChunkTooLarge", 3),
        ("TooFewSamples", 3),
        ("FirstLossNotFinite", 3),
        ("RunConflict", 4),
        ("RunLocked", 4),
        ("OutputExists", 4),
        ("DataNotFound", 5),
        ("NotZarr", 5),
        ("ChunkMissing", 5),
        ("ChunkUndecodable", 5),
        ("NonFiniteData", 5),
        ("ClusterUnreachable", 6),
        ("ClusterUnsuitable", 6),
        ("Diverged", 7),
        ("OutOfMemory", 8),
        ("DiskFull", 8),
        ("ClusterLost", 75),
        ("Stopped", 75),
    ],
)
def test_the_exit_codes_are_those_of_the_contract(name, code):
    assert getattr(errors, name).code == code


def test_an_error_can_be_caught_as_what_python_calls_it():
    with pytest.raises(FileNotFoundError):
        raise errors.ConfigFileNotFound("no such file")
    with pytest.raises(ValueError, match="wrong"):
        raise errors.InvalidConfig("wrong")
    with pytest.raises(OSError, match="full"):
        raise errors.DiskFull("full")


def test_did_you_mean_names_the_closest_or_nothing():
    assert did_you_mean("roudns", ["rounds", "loss"]) == '; did you mean "rounds"?'
    assert did_you_mean("xyz", ["rounds", "loss"]) == ""
    assert did_you_mean("rounds", []) == ""
