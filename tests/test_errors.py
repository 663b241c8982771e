from __future__ import annotations

import ast
import inspect
import pickle
from pathlib import Path

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


# Each has a test that shows its text ------------------------------------------------------------------------------

TESTS = sorted(Path(__file__).parent.rglob("test_*.py"))


def shown_in(tree):
    """The names of errors whose text a test shows: `raises(Error, match="...")`, or what was caught is looked at."""
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        looked_at = {
            node.value.value.id
            for node in ast.walk(function)
            if isinstance(node, ast.Attribute)
            and node.attr in ("message", "hint")
            and isinstance(node.value, ast.Attribute)
            and isinstance(node.value.value, ast.Name)
        }
        looked_at |= {
            node.args[0].value.id
            for node in ast.walk(function)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("str", "text_of")
            and node.args
            and isinstance(node.args[0], ast.Attribute)
            and isinstance(node.args[0].value, ast.Name)
        }
        for item in (item for node in ast.walk(function) if isinstance(node, ast.With) for item in node.items):
            call = item.context_expr
            if not (isinstance(call, ast.Call) and ast.unparse(call.func).endswith("raises") and call.args):
                continue
            name = ast.unparse(call.args[0]).rpartition(".")[2]
            matches = [word.value for word in call.keywords if word.arg == "match"]
            is_caught = isinstance(item.optional_vars, ast.Name) and item.optional_vars.id in looked_at
            if is_caught or any(not isinstance(text, ast.Constant) or " " in text.value for text in matches):
                yield name


@pytest.fixture(scope="module")
def shown():
    return {name for path in TESTS for name in shown_in(ast.parse(path.read_text(encoding="utf-8")))}


@pytest.mark.sampled(21)
@pytest.mark.parametrize("kind", [*MISTAKES, errors.Interrupted], ids=lambda kind: kind.__name__)
def test_every_error_has_a_test_that_shows_its_text(kind, shown):
    assert kind.__name__ in shown


def test_the_search_itself_can_fail():
    def found(text):
        return set(shown_in(ast.parse(f"def test():\n    {text}")))

    assert found("with pytest.raises(DiskFull, match='No space left'): pass") == {"DiskFull"}
    assert found("with pytest.raises(errors.DiskFull, match=text): pass") == {"DiskFull"}
    assert found("with raises(DiskFull) as e: pass\n    assert e.value.message == 'x'") == {"DiskFull"}
    assert found("with raises(DiskFull) as e: pass\n    assert 'x' in str(e.value)") == {"DiskFull"}
    assert found("with raises(DiskFull) as e: pass\n    assert e.value.code == 8") == set()
    assert found("with pytest.raises(DiskFull): pass") == set()
    assert found("with pytest.raises(DiskFull, match='full'): pass") == set()
