"""The thread pool under what Python programs do: fork, several threads at once, exit while helpers are parked."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from autocompress_fast import ops

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

SETUP = """
import os, sys
import numpy as np
from autocompress_fast import ops

weight = np.random.default_rng(0).standard_normal((512, 256, 3, 3), dtype=np.float32)  # large enough for several tasks
expected = ops.group_norms(weight, "column", threads=1)

def correct():
    return bool((ops.group_norms(weight, "column", threads=3) == expected).all())
"""


@needs_fork
def test_parent_and_child_go_on_after_fork(run_python):
    result = run_python(
        SETUP
        + """
assert correct()
child = os.fork()
if child == 0:
    os._exit(0 if all(correct() for _ in range(20)) else 1)
assert all(correct() for _ in range(20))
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    )
    assert result.returncode == 0, result.stderr


@needs_fork
def test_fork_while_another_thread_is_computing(run_python):
    result = run_python(
        SETUP
        + """
import threading
stop = False
def busy():
    while not stop:
        correct()
worker = threading.Thread(target=busy)
worker.start()
codes = []
for _ in range(10):
    child = os.fork()
    if child == 0:
        os._exit(0 if correct() else 1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
stop = True
worker.join()
assert codes == [0] * 10, codes
"""
    )
    assert result.returncode == 0, result.stderr


def test_python_threads_may_call_at_once():
    weight = np.random.default_rng(1).standard_normal((256, 128, 3, 3), dtype=np.float32)
    expected = ops.project(weight, "element", keep=1000, threads=1)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: ops.project(weight, "element", keep=1000, threads=2), range(40)))
    assert all(np.array_equal(result, expected) for result in results)


@pytest.mark.parametrize("threads", [0, -1])
def test_impossible_thread_counts_are_refused(threads):
    with pytest.raises(ValueError, match=rf"threads must be at least 1, got {threads}"):
        ops.group_norms(np.ones((4, 4), np.float32), "filter", threads=threads)


def test_exit_with_parked_helpers_is_clean(run_python):
    result = run_python(SETUP + "\nimport time; assert correct(); time.sleep(0.05)")
    assert (result.returncode, result.stderr) == (0, "")
