"""Hands the cases of a bench file to its test function."""

from __future__ import annotations

import pytest
from harness import Options, prepare


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small batches and few rounds")
    parser.addoption("--compile", action="store_true", help="torch.compile'd peers too")
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"))


def _options(config: pytest.Config) -> Options:
    names = ("quick", "compile", "device")
    chosen = {name: config.getoption(f"--{name}") for name in names}
    return Options(**chosen, gpu_rows=chosen["device"] == "cuda")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = metafunc.module.cases(_options(metafunc.config))
        metafunc.parametrize("case", cases, ids=lambda case: f"{case.group} {case.name}")


@pytest.fixture
def options(request: pytest.FixtureRequest) -> Options:
    options = _options(request.config)
    prepare(options.device)
    return options
