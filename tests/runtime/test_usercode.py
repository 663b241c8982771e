from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import cloudpickle
import pytest

from dtrain.errors import InvalidConfig, OutOfMemory, UserCodeFailed
from dtrain.runtime import usercode
from dtrain.runtime.codebytes import pickle_functions, unpickle_functions
from dtrain.runtime.codetext import source_sha256
from dtrain.runtime.modules import directory_of
from dtrain.runtime.usercode import load_function, user_code


@pytest.fixture(autouse=True)
def _forget_modules(tmp_path):
    before = dict(sys.modules)
    yield
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]
    sys.modules.update(before)
    usercode._IMPORTED.clear()


@pytest.fixture
def write(tmp_path):
    """Write source files below a directory and return it: write("base", model="...", helper="...")."""

    def write(base="base", **texts):
        for name, text in texts.items():
            path = tmp_path / base / f"{name.replace('__in__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(text), encoding="utf-8")
        return tmp_path / base

    return write


def load(base, reference="model:build", key="model"):
    return load_function(key, reference, base)


def in_another_process(code, *arguments, cwd="/", **environment):
    """Run Python code elsewhere, without the files of this test on its path, and return what it prints."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=cwd,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Finding --------------------------------------------------------------------------------------------------------


def test_a_function_is_found_in_a_file_next_to_the_config(write):
    base = write(model="def build(): return 'local'", pkg__in____init__="", pkg__in__net="def build(): return 'deep'")
    assert load(base)() == "local"
    assert load(base, "pkg.net:build")() == "deep"


def test_a_function_is_found_in_a_package_and_in_a_class(write):
    base = write(
        pkg__in____init__="class Models:\n    class Small:\n        @staticmethod\n        def build(): return 3"
    )
    assert load(base, "pkg:Models.Small.build")() == 3


def test_a_function_is_found_in_an_installed_module(write):
    import statistics

    assert load(write(), "statistics:mean") is statistics.mean


def test_a_file_next_to_the_config_goes_before_an_installed_module(write):
    import colorsys

    base = write(colorsys="def hls_to_rgb(): return 'mine'")
    assert load(base, "colorsys:hls_to_rgb")() == "mine"
    assert load(write("other"), "colorsys:hls_to_rgb").__code__ == colorsys.hls_to_rgb.__code__


def test_a_missing_module_names_the_file_it_could_be(write):
    base = write()
    with pytest.raises(InvalidConfig) as caught:
        load(base, "modle:build", "train.loss")
    assert caught.value.message.startswith(
        f'train.loss = "modle:build": there is no {base / "modle.py"}, and no module'
    )
    assert caught.value.code == 3
    with pytest.raises(InvalidConfig, match=r"no module no\.such\.module is installed"):
        load(base, "no.such.module:build")


def test_a_misspelt_function_gets_a_guess_and_the_list(write):
    base = write(model="from os.path import join\ndef build_net(): ...\nclass Net: ...\nWIDTH = 3")
    with pytest.raises(InvalidConfig, match='model has no function build_nte; did you mean "build_net"') as caught:
        load(base, "model:build_nte")
    assert caught.value.hint == "It has build_net, Net."
    with pytest.raises(InvalidConfig, match="has no function WIDTH"):
        load(base, "model:WIDTH")
    with pytest.raises(InvalidConfig, match="It has no functions") as caught:
        load(write("empty", model=""), "model:build")


@pytest.mark.parametrize("reference", ["model", "model:", "", ":"])
def test_a_reference_without_function_is_refused(write, reference):
    with pytest.raises(InvalidConfig, match='write it as "module:function"'):
        load(write(model="def build(): ..."), reference)


def test_a_function_of_a_notebook_must_be_given_again(write):
    with pytest.raises(InvalidConfig, match="was defined in a notebook or script") as caught:
        load(write(), "__main__:build")
    assert "load_run(path, model=build)" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import math\n\nraise ValueError('no\\nway')", "ValueError: no way (model.py:3)"),
        ("import math\nimport no_such_package", "ModuleNotFoundError: No module named 'no_such_package' (model.py:2)"),
        ("import helper", "ZeroDivisionError: division by zero (helper.py:2)"),
        ("def build(:\n    pass", "SyntaxError: invalid syntax (model.py, line 1)"),
        ("class A: ...\nA().x", "AttributeError: 'A' object has no attribute 'x' (model.py:2)"),
    ],
)
def test_an_exception_while_importing_says_where(write, text, said):
    base = write(model=text, helper="one = 1\none / 0")
    with pytest.raises(UserCodeFailed) as caught:
        load(base)
    assert caught.value.message == f'Importing model for model = "model:build" raised {said}'
    assert caught.value.code == 3
    assert "model" not in sys.modules


def test_importing_leaves_no_trace_but_the_modules(write):
    base = write(model="import helper\ndef build(): ...", helper="")
    before = list(sys.path), sys.dont_write_bytecode
    load(base)
    assert (sys.path, sys.dont_write_bytecode) == before
    assert sorted(path.name for path in base.iterdir()) == ["helper.py", "model.py"]
    with pytest.raises(UserCodeFailed):
        load(write("bad", model="1 / 0"))
    assert (sys.path, sys.dont_write_bytecode) == before


# As the files are now -------------------------------------------------------------------------------------------


def test_two_directories_with_modules_of_the_same_name_do_not_mix(write):
    text = "import helper\nfrom helper import name\ndef build(): return (name(), helper.WIDTH)"
    one = write("one", model=text, helper="WIDTH = 1\ndef name(): return 'one'")
    two = write("two", model=text, helper="WIDTH = 2\ndef name(): return 'two'")
    nested = write("one/nested", model=text, helper="WIDTH = 3\ndef name(): return 'nested'")
    expected = {one: ("one", 1), two: ("two", 2), nested: ("nested", 3)}
    for base in (one, two, one, nested, one, nested, two):
        assert load(base)() == expected[base]
    first, second = load(one), load(two)
    assert (first(), second()) == (("one", 1), ("two", 2))
    assert unpickle_functions(pickle_functions({"model": first}, one))["model"]() == ("one", 1)
    assert unpickle_functions(pickle_functions({"model": second}, two))["model"]() == ("two", 2)
    assert source_sha256(first, one) != source_sha256(second, two)


def test_a_module_of_another_directory_is_not_taken_for_an_installed_one(write):
    load(write("one", model="def build(): ..."))
    with pytest.raises(InvalidConfig, match="no module model is installed"):
        load(write("two", other=""))


def test_a_module_that_the_program_has_imported_from_elsewhere_is_not_used(write, monkeypatch):
    other = write("other", helper="WHO = 'other'", model="def build(): return 'other'")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(other))
        import helper  # noqa: F401
        import model  # noqa: F401
    base = write(model="import helper\ndef build(): return helper.WHO", helper="WHO = 'base'")
    assert load(base)() == "base"


def test_a_changed_file_is_seen_even_within_a_second(write):
    for number in range(1, 6):
        base = write(model=f"def build(): return {number}")
        assert load(base)() == number


def test_a_changed_neighbour_is_seen(write):
    base = write(model="from pkg.deep import WIDTH\ndef build(): return WIDTH", pkg__in____init__="")
    for number in range(1, 4):
        write(pkg__in__deep=f"WIDTH = {number}")
        assert load(base)() == number
    (base / "pkg" / "deep.py").unlink()
    with pytest.raises(UserCodeFailed, match=r"No module named 'pkg\.deep'"):
        load(base)


def test_a_module_that_failed_can_be_mended(write):
    base = write(model="import helper\nraise ValueError", helper="")
    with pytest.raises(UserCodeFailed):
        load(base)
    write(model="import helper\ndef build(): return 'mended'")
    assert load(base)() == "mended"


def test_the_functions_of_one_config_share_their_classes(write):
    base = write(
        model="""
            from out import Output
            def build(): return Output()
            def loss(outputs): return isinstance(outputs, Output)
        """,
        metrics="from out import Output\ndef skill(outputs): return isinstance(outputs, Output)",
        out="class Output: ...",
    )
    functions = {
        "model": load(base),
        "train.loss": load(base, "model:loss"),
        "train.metrics.skill": load(base, "metrics:skill"),
    }
    made = functions["model"]()
    assert functions["train.loss"](made)
    assert functions["train.metrics.skill"](made)
    there = unpickle_functions(pickle_functions(functions, base))
    made = there["model"]()
    assert there["train.loss"](made)
    assert there["train.metrics.skill"](made)


# Travelling -----------------------------------------------------------------------------------------------------

CALL = """
    import sys
    from pathlib import Path
    from dtrain.runtime.codebytes import unpickle_functions
    functions = unpickle_functions(Path(sys.argv[1]).read_bytes())
    for name in ("model", "helper", "pkg"):
        assert name not in sys.modules
    print([(key, function()) for key, function in functions.items()])
"""


def test_functions_travel_without_their_files(write, tmp_path):
    base = write(
        model="""
            import helper
            from helper import Base, scaled
            from pkg.net import depth
            WIDTH = 3
            class Net(Base):
                def size(self): return super().size() + WIDTH
            def build(): return (Net().size(), scaled(2), helper.scaled(3), depth())
        """,
        helper="""
            FACTOR = 10
            def scaled(x): return FACTOR * x
            class Base:
                def size(self): return 100
        """,
        pkg__in____init__="",
        pkg__in__net="from pkg import inner\ndef depth(): return inner.DEPTH",
        pkg__in__inner="DEPTH = 7",
        losses="from helper import scaled\ndef loss(): return scaled(5)",
    )
    functions = {"model": load(base), "train.loss": load(base, "losses:loss")}
    code = tmp_path / "code"
    code.write_bytes(pickle_functions(functions, base))
    for path in base.rglob("*.py"):
        path.unlink()
    expected = "[('model', (103, 20, 30, 7)), ('train.loss', 50)]"
    assert in_another_process(CALL, code) == expected
    assert str([(key, function()) for key, function in unpickle_functions(code.read_bytes()).items()]) == expected


def test_a_torch_module_travels_and_gives_the_same_numbers(write, tmp_path):
    base = write(
        model="""
            import torch
            from layers import Block
            def build(): return torch.nn.Sequential(*[Block(2) for _ in range(2)])
        """,
        layers="""
            from torch import nn
            class Block(nn.Module):
                def __init__(self, width):
                    super().__init__()
                    self.inner = nn.Linear(width, width)
                def forward(self, x):
                    return self.inner(x).relu()
        """,
    )
    code = tmp_path / "code"
    code.write_bytes(pickle_functions({"model": load(base)}, base))
    said = in_another_process(
        """
        import sys, torch
        from pathlib import Path
        from dtrain.runtime.codebytes import unpickle_functions
        torch.manual_seed(0)
        print(unpickle_functions(Path(sys.argv[1]).read_bytes())["model"]()(torch.ones(1, 2)).tolist())
        """,
        code,
    )
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert said == str(load(base)()(torch.ones(1, 2)).tolist())


def test_a_name_that_torch_has_too_is_no_obstacle(write):
    base = write(
        model="""
            import torch
            class Net(torch.nn.Module):
                def __init__(self):
                    super().__init__()
                    self.classes = self.ops = 3
                def forward(self, x):
                    return torch.zeros(self.classes, self.ops)
            def build(): return Net()
        """
    )
    assert pickle_functions({"model": load(base)}, base)


def test_installed_functions_travel_by_name(write):
    import statistics

    code = pickle_functions({"model": load(write(), "statistics:mean")}, write())
    assert unpickle_functions(code)["model"] is statistics.mean
    assert len(code) < 200


def test_pickling_changes_nothing_for_others(write):
    import cloudpickle

    base = write(model="def build(): ...")
    before = set(cloudpickle.list_registry_pickle_by_value())
    pickle_functions({"model": load(base)}, base)
    assert cloudpickle.list_registry_pickle_by_value() == before
    assert "model" not in before


def test_what_cannot_travel_is_a_fault_of_the_user(write):
    base = write(model="import threading\nLOCK = threading.Lock()\ndef build(): return LOCK")
    with pytest.raises(UserCodeFailed, match=r"model cannot be sent to the workers: .*lock") as caught:
        pickle_functions({"model": load(base)}, base)
    assert caught.value.code == 3


# The identity of code -------------------------------------------------------------------------------------------

NEIGHBOURS = {
    "model": "import helper\nfrom sizes import WIDTH\nfrom pkg import net\n\ndef build():\n    import late\n",
    "helper": "def f(): return 1\n",
    "sizes": "WIDTH = 3\n",
    "late": "X = 1\n",
    "pkg__in____init__": "from pkg import wide as _\n",
    "pkg__in__net": "from . import inner\nfrom .inner import Z\n",
    "pkg__in__inner": "Z = 1\n",
    "pkg__in__wide": "W = 1\n",
    "unused": "U = 1\n",
}


def digest(base):
    return source_sha256(load(base), base)


def test_the_sha256_is_the_same_for_the_same_text_anywhere(write):
    one, two = write("one", **NEIGHBOURS), write("two/deep", **NEIGHBOURS)
    first = digest(one)
    assert len(first) == 64
    assert digest(one) == digest(two) == first


@pytest.mark.parametrize("name", [name for name in NEIGHBOURS if name != "unused"])
def test_the_sha256_changes_with_the_file_and_each_file_it_imports(write, name):
    base = write(**NEIGHBOURS)
    before = digest(base)
    write(**{name: NEIGHBOURS[name] + "# changed\n"})
    assert digest(base) != before
    write(**{name: NEIGHBOURS[name]})
    assert digest(base) == before


def test_the_sha256_of_a_function_in_a_package_covers_the_package(write):
    base = write(pkg__in____init__="", pkg__in__deep__in____init__="", pkg__in__deep__in__net="def build(): ...")

    def digest():
        return source_sha256(load(base, "pkg.deep.net:build"), base)

    seen = [digest()]
    for name in ("pkg__in____init__", "pkg__in__deep__in____init__"):
        write(**{name: "X = 1"})
        seen.append(digest())
    assert len(set(seen)) == 3


def test_the_sha256_does_not_change_with_anything_else(write):
    base = write(**NEIGHBOURS)
    before = digest(base)
    write(unused="U = 2\n")
    (base / "notes.txt").write_text("x")
    write("elsewhere", helper="def f(): return 2\n")
    assert digest(base) == before


def test_every_function_of_a_module_has_the_text_of_the_module(write):
    base = write(model="def build(): ...\ndef loss(): ...")
    assert source_sha256(load(base), base) == source_sha256(load(base, "model:loss"), base)


def test_the_sha256_of_an_installed_function_is_that_of_its_module(write):
    base = write(**NEIGHBOURS)
    one = source_sha256(load(base, "statistics:mean"), base)
    assert one == source_sha256(load(base, "statistics:median"), base)
    assert one != source_sha256(load(base, "textwrap:dedent"), base)
    assert len(source_sha256(load(base, "math:sqrt"), base)) == 64


def test_imports_go_round_in_a_circle(write):
    base = write(model="import helper\ndef build(): ...", helper="import model")
    before = digest(base)
    write(helper="import model  # changed")
    assert digest(base) != before


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_the_sha256_is_equal_in_every_process(write, hash_seed):
    base = write(**NEIGHBOURS)
    said = in_another_process(
        """
        import sys
        from pathlib import Path
        from dtrain.runtime.usercode import load_function
        from dtrain.runtime.codetext import source_sha256
        base = Path(sys.argv[1])
        print(source_sha256(load_function("model", "model:build", base), base))
        """,
        base,
        PYTHONHASHSEED=hash_seed,
    )
    assert said == digest(base)


SCRIPT = """
from pathlib import Path
from dtrain.runtime.codetext import source_sha256
import helper
from sizes import Sized

def unused():
    return 1

def inner():
    return 2

class Base:
    @property
    def depth(self):
        return inner()

class Block(Base):
    def size(self):
        return 3

def build():
    import late
    return [Block() for _ in range(4)], Sized, helper.f

print(source_sha256(build, Path(__file__).parent if "__file__" in globals() else Path.cwd()))
"""


@pytest.fixture
def script(write):
    """Run the script with some of its text or its neighbours' replaced, and return the digest it prints."""

    def script(old="", new="", **neighbours):
        texts = {"helper": "def f(): return 1\n", "sizes": "class Sized: ...\n", "late": "X = 1\n", **neighbours}
        base = write(script=SCRIPT.replace(old, new) if old else SCRIPT, **texts)
        done = subprocess.run(
            [sys.executable, "script.py"], cwd=base, capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout.strip()

    return script


@pytest.mark.slow
def test_the_sha256_of_a_script_covers_what_its_function_uses(script):
    before = script()
    assert len(before) == 64
    assert script() == before
    assert script("return 1", "return 10") == before  # unused
    assert script("import helper\n", "import helper\n\n# a remark\n") == before
    changed = [
        script("range(4)", "range(5)"),
        script("return 3", "return 30"),  # a class used in a comprehension
        script("return 2", "return 20"),  # a function used by a property of its base
        script("return inner()", "return inner() + 1"),
        script(helper="def f(): return 2\n"),
        script(sizes="class Sized: x = 1\n"),
        script(late="X = 2\n"),
    ]
    assert len({before, *changed}) == 8


@pytest.mark.slow
def test_the_sha256_of_what_was_typed_covers_its_constants():
    typed = "\n".join(
        [
            "from pathlib import Path",
            "from dtrain.runtime.codetext import source_sha256",
            "def build(): return [len(x) + 3 for x in ('a', 'b')]",
            "print(source_sha256(build, Path.cwd()))",
        ]
    )
    before = in_another_process(typed, PYTHONHASHSEED="1")
    assert in_another_process(typed, PYTHONHASHSEED="2") == before
    assert in_another_process(typed.replace("+ 3", "+ 4")) != before


def test_the_directory_of_a_function_is_that_of_its_file(write, monkeypatch, tmp_path):
    base = write(model="def build(): ...", sub__in____init__="", sub__in__net="def build(): ...")
    assert directory_of(load(base)) == base.resolve()
    assert directory_of(load(base, "sub.net:build")) == (base / "sub").resolve()
    monkeypatch.chdir(tmp_path)
    assert directory_of(len) == tmp_path
    namespace = {}
    exec("def typed(): ...", namespace)
    assert directory_of(namespace["typed"]) == tmp_path


# Exceptions of the user's -----------------------------------------------------------------------------------------


def test_an_exception_of_the_users_says_what_was_done_and_where(write):
    function = load(write(model="def build():\n    return {}['width']"))
    with (
        pytest.raises(UserCodeFailed, match=r"^Building raised KeyError: 'width' \(model.py:2\)"),
        user_code("Building"),
    ):
        function()


def test_the_place_is_the_users_and_not_the_librarys(write):
    function = load(write(model="import json\ndef build():\n    return json.loads('{')"))
    with pytest.raises(UserCodeFailed, match=r"raised JSONDecodeError: .* \(model\.py:3\)\n"), user_code("Building"):
        function()


def test_a_long_or_empty_text_is_cut_or_replaced():
    with pytest.raises(UserCodeFailed) as caught, user_code("Building"):
        raise ValueError("x" * 1000)
    assert len(caught.value.message) < 400
    with pytest.raises(UserCodeFailed, match="raised ValueError: ValueError"), user_code("Building"):
        raise ValueError


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")]
)
def test_out_of_memory_is_exit_code_8(error):
    with pytest.raises(OutOfMemory, match="Building: out of memory") as caught, user_code("Building"):
        raise error
    assert caught.value.code == 8


def test_errors_of_dtrain_and_interrupts_pass():
    with pytest.raises(InvalidConfig, match=r"^mine$"), user_code("Building"):
        raise InvalidConfig("mine")
    with pytest.raises(KeyboardInterrupt), user_code("Building"):
        raise KeyboardInterrupt


def test_a_module_under_two_names_is_sent(write, monkeypatch):
    """As the script of a spawned process is, ``__main__`` and ``__mp_main__``."""
    base = write(mine="def build(): return 1")
    function = load(base, "mine:build")
    monkeypatch.setitem(sys.modules, "mine_too", sys.modules["mine"])
    assert unpickle_functions(pickle_functions({"model": function}, base))["model"]() == 1
    assert "mine" not in cloudpickle.list_registry_pickle_by_value()


def test_a_module_that_the_user_registered_stays_registered(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def build():\n    return 1\n")
    function = load_function("model", "mine:build", tmp_path)
    module = sys.modules["mine"]
    cloudpickle.register_pickle_by_value(module)
    try:
        pickle_functions({"model": function}, tmp_path)
        assert "mine" in cloudpickle.list_registry_pickle_by_value()
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    pickle_functions({"model": function}, tmp_path)
    assert "mine" not in cloudpickle.list_registry_pickle_by_value()
