"""The dspex kernel is a whole Python kernel: stock suites, stock clients and stock front ends run it."""

from __future__ import annotations

import os
import subprocess
import sys
import unittest
from typing import Any

import jupyter_kernel_test
import nbformat
import papermill
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient

from tests.waiting import wait_for

COMPLETIONS = [
    {"text": "zi", "matches": {"zip"}},
    {"text": "import itert", "matches": {"itertools"}},
    {"text": "import json; json.JSONDecodeE", "matches": {"JSONDecodeError"}},
]
KERNEL = "dspex"

SKIPPED = {
    "History range not supported": "IPython gives the running session's range under session 0, the suite wants 1",
}
"""What jupyter_kernel_test may skip: its message, and the reason."""


class KernelSuite(jupyter_kernel_test.KernelTests):
    """The suite by the Jupyter project, with all its attributes defined."""

    __test__ = False  # run by `run_suite`, which sees what is skipped
    kernel_name = KERNEL
    language_name = "python"
    file_extension = ".py"
    code_hello_world = "print('hello, world')"
    code_stderr = "import sys; print('test', file=sys.stderr)"
    completion_samples = COMPLETIONS
    complete_code_samples = ["1", "print('hello, world')", "def f(x):\n  return x*2\n\n\n"]  # noqa: RUF012  # the suite's own form
    incomplete_code_samples = ["print('''hello", "def f(x):\n  x*2"]  # noqa: RUF012  # the suite's own form
    invalid_code_samples = ["import = 7q", "1 1 1"]  # noqa: RUF012  # the suite's own form
    code_page_something = "zip?"
    code_generate_error = "raise ValueError('as asked')"
    code_execute_result = [  # noqa: RUF012  # the suite's own form
        {"code": "1+2+3", "result": "6"},
        {"code": "[n*n for n in range(1, 4)]", "result": "[1, 4, 9]"},
        {"code": "from IPython.display import HTML; HTML('<b>6</b>')", "mime": "text/html"},
    ]
    code_display_data = [  # noqa: RUF012  # the suite's own form
        {"code": "from IPython.display import HTML, display; display(HTML('<b>6</b>'))", "mime": "text/html"},
        {
            "code": "from IPython.display import Math, display; display(Math('\\\\frac{1}{2}'))",
            "mime": "text/latex",
        },
    ]
    code_history_pattern = "1?2*"
    supported_history_operations = ("tail", "search")
    code_inspect_sample = "zip"
    code_clear_output = "from IPython.display import clear_output; clear_output()"


class WelcomeSuite(jupyter_kernel_test.IopubWelcomeTests):
    """The same project's test of the protocol's welcome message."""

    __test__ = False
    kernel_name = KERNEL
    support_iopub_welcome = True


def run_suite(suite: type[unittest.TestCase]) -> unittest.TestResult:
    """Every test of a suite, its failures in this test's failure."""
    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(suite).run(result)
    assert result.wasSuccessful(), "\n".join(f"{test}\n{text}" for test, text in result.failures + result.errors)
    assert result.testsRun > 0
    return result


def test_the_jupyter_projects_own_suite_passes_and_skips_nothing_but_what_is_listed(birth):
    result = run_suite(KernelSuite)
    assert {reason for _, reason in result.skipped} == set(SKIPPED)


def test_the_welcome_of_the_iopub_channel_is_sent(birth):
    assert run_suite(WelcomeSuite).skipped == []


def kernel_info(kernel_name: str) -> dict[str, Any]:
    manager, client = start_new_kernel(kernel_name=kernel_name)
    try:
        return client.kernel_info(reply=True, timeout=20)["content"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel()


def without_tip(banner: str) -> str:
    """IPython's banner ends with a tip that it draws by lot."""
    return "\n".join(line for line in banner.splitlines() if not line.startswith("Tip: "))


def test_kernel_info_differs_from_a_python_kernels_only_where_it_must(birth):
    python, dspex = kernel_info("python3"), kernel_info("dspex")
    entry = dspex.pop("dspex")
    assert set(entry) >= {"session_id", "protocol_version"}
    assert set(dspex.pop("supported_features")) == {*python.pop("supported_features"), "dspex"}
    assert without_tip(dspex.pop("banner")).startswith(without_tip(python.pop("banner")))
    assert dspex == python


def test_nbclient_executes_a_notebook(tmp_path, birth):
    cells = [
        nbformat.v4.new_code_cell(
            "import dspy\nclass Double(dspy.Module):\n    def forward(self, n): return 2 * n"
        ),
        nbformat.v4.new_code_cell("print(Double()(n=21))"),
        nbformat.v4.new_code_cell("await __import__('asyncio').sleep(0, 'awaited')"),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    client = NotebookClient(notebook, kernel_name=KERNEL, timeout=60, resources={"metadata": {"path": tmp_path}})
    client.execute()
    assert notebook.cells[1].outputs[0].text == "42\n"
    assert notebook.cells[2].outputs[0].data["text/plain"] == "'awaited'"


def test_papermill_executes_a_notebook_with_parameters(tmp_path, birth):
    cells = [
        nbformat.v4.new_code_cell("owner = 'nobody'", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("print(f'{owner} asks')"),
    ]
    given, made = tmp_path / "given.ipynb", tmp_path / "made.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), given)
    papermill.execute_notebook(
        given, made, parameters={"owner": "alice"}, kernel_name=KERNEL, language="python", progress_bar=False
    )
    output = nbformat.read(made, as_version=4).cells[-1].outputs[0]
    assert output.text == "alice asks\n"


def test_jupyter_console_answers(tmp_path):
    words, output = tmp_path / "words", tmp_path / "output"
    os.mkfifo(words)
    with output.open("w") as stdout, os.fdopen(os.open(words, os.O_RDWR), "w", buffering=1) as pipe:
        console = subprocess.Popen(
            [sys.executable, "-m", "jupyter_console", "--kernel", KERNEL, "--simple-prompt"],
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            # A console whose iopub connects after a cell is done waits for its "idle" for ever, with python3 too:
            # so the first cell lasts until its output is seen.
            console.stdin.write(f"for word in open({str(words)!r}): print('heard', word)\n\n6 * 7\nexit\n")
            console.stdin.flush()
            wait_for(lambda: pipe.write("you\n") and "heard you" in output.read_text(), deadline=30, what="output")
            pipe.close()
            status = console.wait(timeout=30)
        finally:
            console.kill()
            console.communicate()
    assert "Out[2]: 42" in output.read_text()
    assert status == 0
