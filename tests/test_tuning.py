"""Configurations that were measured once and are used from then on, without a GPU to measure."""

from __future__ import annotations

import importlib.util
import json
import warnings

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
from launches import recorded

from pyvit import __main__ as command
from pyvit.kernels import topk_attention, tune, tuning

GPU = "Imagined GPU"
SHIPPED = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
FASTER = SHIPPED | {"num_stages": 3}


class OnGpu:
    """As much of a CUDA tensor as the lookup reads."""

    is_cuda = True
    device = torch.device("cuda", 0)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("PYVIT_TUNING", str(tmp_path / "folder" / "tuning.json"))
    monkeypatch.setattr(tuning, "gpu_name", lambda device: GPU)
    tuning._measured.cache_clear()
    yield tuning.path()
    tuning._measured.cache_clear()


def chosen(name="op half"):
    return tuning.chosen(OnGpu(), name, SHIPPED)


def test_what_was_saved_is_chosen_for_that_class_alone(file):
    assert chosen() == SHIPPED
    tuning.save(file, OnGpu.device, {"op half": FASTER})
    assert chosen() == FASTER
    assert chosen("op ieee") == SHIPPED
    assert list(json.loads(file.read_text())) == [f"{GPU}, Triton {triton.__version__}"]
    tuning.save(file, OnGpu.device, {"op ieee": FASTER})
    assert chosen() == chosen("op ieee") == FASTER


def test_another_gpu_or_kernel_is_not_served(file, monkeypatch):
    tuning.save(file, OnGpu.device, {"op half": FASTER, "old": {"BLOCK": 64}})
    assert chosen("old") == SHIPPED  # of a kernel with other parameters
    monkeypatch.setattr(tuning, "gpu_name", lambda device: "Another GPU")
    assert chosen() == SHIPPED
    assert tuning.chosen(torch.empty(1), "op half", SHIPPED) == SHIPPED


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"a": 1}', '{"a": {"op half": {"BLOCK_M": "x"}}}', '{"a": {"b": 3}}']
)
def test_a_bad_file_is_named_once_and_not_used(file, content):
    file.parent.mkdir()
    file.write_text(content)
    with pytest.warns(UserWarning, match=str(file)):
        assert chosen() == SHIPPED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen() == SHIPPED
    tuning.save(file, OnGpu.device, {"op half": FASTER})
    assert chosen() == FASTER


def run(configurations):
    """A launcher that asks for two configurations."""
    for name in ("first", "second"):
        configurations[name] = tuning.chosen(torch.empty(1), name, SHIPPED)


def test_the_fastest_candidate_is_found():
    used = {}

    def measure(call):  # the second op gains by three stages, the first by nothing
        call()
        return 1.0 if used["second"]["num_stages"] == 3 else 2.0

    assert tune.best(lambda: run(used), measure) == {"second": FASTER}
    run(used)
    assert used == {"first": SHIPPED, "second": SHIPPED}  # nothing of it stays


def test_a_gain_within_noise_changes_nothing():
    used = {}

    def measure(call):
        call()
        return 0.99 if used["second"]["num_stages"] == 3 else 1.0

    assert tune.best(lambda: run(used), measure) == {}


def test_candidates_are_a_handful_with_the_parameters_of_the_shipped():
    for kind in ("half", "tf32", "ieee"):
        shipped = topk_attention.forward_configuration(4096, 64, kind, False, 90)
        listed = list(tune.candidates(shipped))
        assert listed[0] == shipped and 2 <= len(listed) <= 6
        assert all(candidate.keys() == shipped.keys() for candidate in listed)


def test_results_are_written_and_used(file, monkeypatch):
    used = {}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune, "works", lambda device: [("both", "half", lambda: run(used))])

    def measure(call):
        call()
        return 1.0 if used["first"]["num_stages"] == 3 else 2.0

    assert tune.main(measure) == 0
    assert chosen("first") == FASTER and chosen("second") == SHIPPED


def works():
    """On tensors without numbers."""
    found = []
    recorded(lambda: found.extend(tune.works(torch.device("meta"))))
    return found


def policies(call):
    """What ``call`` asks, with what is shipped."""
    with tuning.trying({}) as asked:
        recorded(call)
        return dict(asked)


def class_of(policy):
    """Without its sizes: "conv2d image gradient half 64 channels, few pixels" and the like."""
    words = policy.split()
    ends = [i + 1 for i, word in enumerate(words) if word in (*tune.DTYPES, "bytes")]
    return " ".join(words[: ends[0]])


def test_every_policy_that_the_gate_compiles_is_measured():
    import aot_cases

    shipped, measured = set(), set()
    for case in aot_cases.cases():
        kind = {"float32": "ieee", "tf32": "tf32"}.get(case.dtype, "half")
        with tuning.precision(kind == "tf32"):
            shipped |= {class_of(name) for name in policies(case.call)}
    for _, kind, call in works():
        with tuning.precision(kind == "tf32"):
            measured |= {class_of(name) for name in policies(call)}
    assert len(shipped) > 20
    assert shipped <= measured, sorted(shipped - measured)


def test_what_is_offered_reaches_the_launches():
    offered = 0
    for name, kind, call in works():
        with tuning.precision(kind == "tf32"):
            for policy, shipped in policies(call).items():
                *_, last = tune.candidates(shipped)
                assert last.keys() == shipped.keys() and last != shipped
                with tuning.trying({policy: last}):
                    launches = recorded(call)
                wanted = {k: v for k, v in last.items() if k != "TILE" or "unfold" not in policy}
                assert any(wanted.items() <= launch.arguments.items() for launch in launches), name
                offered += 1
    assert offered > 40


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_without_a_gpu_the_command_says_so(capsys):
    assert command.main(["tune"]) == 2
    assert capsys.readouterr().err.strip() == "pyvit tune: there is no GPU here to measure on."
