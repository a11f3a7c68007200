"""Tests in a process of their own: they fail, crash and pass as tests do, and pytest itself neither compiles nor forks."""

import re
from pathlib import Path

import children
import pytest

CONFTEST = """
import os
pytest_plugins = ["children"]

def pytest_configure(config):
    if not config.getoption("--child"):
        os.environ["TESTS_ROOT_PROCESS"] = str(os.getpid())
"""
TESTS = """
import ctypes, os
import pytest, torch

child = pytest.mark.child
root = int(os.environ["TESTS_ROOT_PROCESS"])

@pytest.fixture(scope="module")
def process():
    return os.getpid()

def test_in_pytest(process):
    assert process == root

@child
@pytest.mark.parametrize("n", [1, 2])
def test_in_a_child(process, n):
    assert process != root
    assert os.getppid() == root
    print("one of these is wrong")
    assert n == 1

@child
def test_crash(process):
    print("so far so good")
    ctypes.string_at(0)

@child
def test_after_the_crash(process):
    if (forked := os.fork()) == 0:
        os._exit(0)
    assert os.waitpid(forked, 0)[1] == 0

def test_compile_by_name():
    os.environ["IN_CHILD"] = str(os.getpid())
    assert os.getpid() != root

@child
@pytest.mark.skipif(True, reason="never mind")
def test_skipped():
    raise AssertionError

def test_fork_in_pytest():
    os.fork()

def test_torch_in_pytest():
    torch.compile(abs)(torch.zeros(1))

def test_torch_decorates_in_pytest():
    @torch.compile(dynamic=True)
    def f(x):
        raise ValueError
    try:
        f(torch.zeros(1))
    except Exception:
        return
"""
THEN = """
import atexit, os
import pytest

def test_one(): pass

@pytest.mark.child
def test_last():
    assert os.environ["IN_CHILD"] == str(os.getpid())
    atexit.register(os._exit, 7)
"""


def test_a_child_that_dies_is_one_failing_test_with_its_log(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_them.py").write_text(TESTS)
    # a file whose last test is a child's leaves nothing behind that the next one's would stumble over
    (tmp_path / "test_then.py").write_text(THEN)
    (tmp_path / "test_to_end.py").write_text("def test_next(): pass\n")
    options = ["-m", "pytest", "-q", "-ra", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)]
    said = children.run(*options, code=1, PYTHONPATH=str(Path(__file__).parent)).out
    failed = re.findall(r"^FAILED \S*test_them.py::(\S+)", said, re.MULTILINE)
    in_pytest = ["test_fork_in_pytest", "test_torch_in_pytest", "test_torch_decorates_in_pytest"]
    assert failed == ["test_in_a_child[2]", "test_crash", *in_pytest], said
    assert "5 failed, 7 passed, 1 skipped, 1 error" in said
    assert re.findall(r"^ERROR \S*/(\S+)", said, re.MULTILINE) == ["test_then.py::test_last"]
    for words in (
        "exit code 7",
        "assert 2 == 1",
        "one of these is wrong",
        "exit code -11",
        "so far so good",
        "Segmentation fault",
    ):
        assert words in said, words
    assert said.count("in pytest's own process: mark the test with pytest.mark.child") >= len(in_pytest)


def test_a_program_that_fails_shows_its_streams_and_ends_the_others() -> None:
    endless = ("-c", "import time\nprint('I wait', flush=True)\nwhile True: time.sleep(1)")
    fails = ("-c", "import sys, time; print('out'); print('err', file=sys.stderr); time.sleep(2); sys.exit(3)")
    with pytest.raises(pytest.fail.Exception, match=r"exit code 3 of process 1, not 0(.|\n)*I wait(.|\n)*err(.|\n)*out"):
        children.together([endless, fails])
    one, two = children.together([("-c", "print(1)"), ("-c", "import os; print(os.environ['TWO'])")], TWO="2")
    assert (one, two.out) == (("1\n", ""), "2\n")
