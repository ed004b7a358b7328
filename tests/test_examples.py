"""The examples that readers copy: README's python blocks and every docstring's."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch
import torchvision_shim

import pyvit

README = Path(__file__).resolve().parents[1] / "README.md"
TEXT = README.read_text()
FENCES = re.finditer(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
# Empty lines in front, so that a traceback names README's own line.
BLOCKS = ["\n" * TEXT.count("\n", 0, fence.start(1)) + fence.group(1) for fence in FENCES]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(pyvit.__path__, "pyvit.")
    if not module.name.rpartition(".")[2].startswith(("_C", "_cpu_", "__main__"))
)


def examples_of(module: str) -> list[doctest.DocTest]:
    found = doctest.DocTestFinder().find(importlib.import_module(module))
    return [test for test in found if test.examples]


def test_readme_has_an_example_for_each_reader():
    assert len(BLOCKS) == 3


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_readme(block):
    if "import timm" in block:
        torchvision_shim.importorskip("timm")
    torch.manual_seed(0)
    exec(compile(block, str(README), "exec"), {})


@pytest.mark.parametrize("name", pyvit.ops.__all__)
def test_every_op_has_an_example(name):
    assert doctest.DocTestFinder(recurse=False).find(getattr(pyvit, name))[0].examples


@pytest.mark.parametrize("module", MODULES)
def test_docstrings(module):
    runner = doctest.DocTestRunner(
        optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS, verbose=False
    )
    for test in examples_of(module):
        torch.manual_seed(0)
        result = runner.run(test)
        assert result.failed == 0, f"{test.name}: see the output above"
