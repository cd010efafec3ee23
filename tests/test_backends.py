"""Vendor tables: well-formed data, resolution from facts alone, and rows for devices."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gemskit
from gemskit import backends
from gemskit.backends import _resolve, _table
from gemskit.backends.__main__ import markdown
from gemskit.errors import DeclarationError, DeviceError, VendorError

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "gemskit" / "backends"
ALL = list(backends.vendors.values())
ROWS = [(vendor, row) for vendor in ALL for row in vendor.archs]
NAMES = [f"{vendor.name}-{row.name}" for vendor, row in ROWS]


def facts(
    torch: str = "2.13.0+cpu",
    cuda: str | None = None,
    hip: str | None = None,
    requested: str | None = None,
    modules: tuple[str, ...] = (),
    files: tuple[str, ...] | None = (),
) -> _resolve.Facts:
    exists = None if files is None else files.__contains__
    return _resolve.Facts(torch, cuda, hip, requested, modules.__contains__, exists)


# --- resolution ------------------------------------------------------------------------------------------------------

CUDA: dict[str, Any] = {"torch": "2.13.0+cu130", "cuda": "13.0"}
HIP: dict[str, Any] = {"torch": "2.13.0+rocm7.0", "hip": "7.0"}


@pytest.mark.parametrize(
    ("expected", "given"),
    [
        ("reference", facts()),
        ("reference", facts(files=("/dev/nvidiactl", "/dev/kfd"))),  # a CPU build beside a GPU
        ("nvidia", facts(**CUDA, files=("/dev/nvidiactl",))),
        ("nvidia", facts(**CUDA, files=("/dev/nvidia0",))),
        ("nvidia", facts(**CUDA, files=("/dev/dxg",))),
        ("nvidia", facts(**CUDA, files=None)),  # not Linux: no file check
        ("reference", facts(**CUDA)),  # a laptop with the CUDA build
        ("reference", facts(**CUDA, files=("/dev/kfd",))),
        ("amd", facts(**HIP, files=("/dev/kfd",))),
        ("reference", facts(**HIP)),
        ("ascend", facts(modules=("torch_npu",), files=("/dev/davinci_manager",))),
        ("reference", facts(modules=("torch_npu",))),
        ("nvidia", facts(**CUDA, modules=("torch_npu",), files=("/dev/nvidiactl",))),
        ("cambricon", facts(modules=("torch_mlu",), files=("/dev/cambricon_ctl",))),
        ("mthreads", facts(modules=("torch_musa",), files=("/dev/mtgpu.0",))),
        ("tsingmicro", facts(modules=("torch_txda",))),
        ("aipu", facts(modules=("triton.backends.aipu",))),
        ("kunlunxin", facts(**CUDA, modules=("torch_xmlir",), files=("/dev/xpuctrl",))),
        ("hygon", facts("2.5.1+das.opt1.dtk2604", hip="6.3", files=("/dev/kfd", "/dev/mkfd"))),
        ("iluvatar", facts("2.7.1+corex.4.4.0", cuda="10.2", files=("/dev/iluvatar0",))),
        ("metax", facts("2.8.0+metax3.5.3.9", cuda="11.6", files=("/dev/mxcd",))),
        ("metax", facts("2.8.0+metax3.5.3.9", files=("/dev/mxcd",))),  # the tag alone proves the build
        ("reference", facts(modules=("triton.backends.cpu",))),  # arm only on request
        # requests: checked against the torch build, not against device files or tags
        ("arm", facts(requested="arm", modules=("triton.backends.cpu",))),
        ("nvidia", facts(**CUDA, requested="nvidia")),
        ("nvidia", facts(**CUDA, requested=" NVIDIA ")),
        ("hygon", facts(**HIP, requested="hygon", files=("/dev/kfd",))),
        ("reference", facts(**CUDA, requested="reference", files=("/dev/nvidiactl",))),
        ("nvidia", facts(**CUDA, requested="", files=("/dev/nvidiactl",))),
    ],
)
def test_resolution(expected: str, given: _resolve.Facts) -> None:
    assert _resolve.resolve(backends.vendors, given).name == expected


def test_an_unknown_vendor_is_refused_with_a_suggestion() -> None:
    with pytest.raises(VendorError, match="GEMSKIT_VENDOR='nvida' is no vendor; did you mean 'nvidia'") as caught:
        _resolve.resolve(backends.vendors, facts(requested="nvida"))
    assert all(name in str(caught.value) for name in backends.vendors)
    with pytest.raises(VendorError) as caught:
        _resolve.resolve(backends.vendors, facts(requested="xyzzy"))
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (facts(requested="nvidia"), r"torch\.version\.cuda is None"),
        (facts(**HIP, requested="nvidia"), r"torch\.version\.cuda is None.*accepted here: amd, hygon, reference$"),
        (
            facts(**CUDA, requested="amd"),
            r"torch\.version\.hip is None.*torch 2\.13\.0\+cu130 \(CUDA 13\.0, ROCm None\)",
        ),
        (facts(requested="ascend"), "torch_npu is not installed.*accepted here: reference$"),
    ],
)
def test_a_vendor_that_the_build_cannot_serve_is_refused(given: _resolve.Facts, reason: str) -> None:
    with pytest.raises(VendorError, match=reason):
        _resolve.resolve(backends.vendors, given)


def test_facts_come_from_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/nvidiactl")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("GEMSKIT_VENDOR", raising=False)
    assert _resolve.resolve(backends.vendors, _resolve.gather()).name == "nvidia"
    monkeypatch.setenv("GEMSKIT_VENDOR", "reference")
    assert _resolve.resolve(backends.vendors, _resolve.gather()).name == "reference"
    monkeypatch.delenv("GEMSKIT_VENDOR")
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    assert _resolve.resolve(backends.vendors, _resolve.gather()).name == "reference"
    monkeypatch.setattr(sys, "platform", "win32")
    assert _resolve.resolve(backends.vendors, _resolve.gather()).name == "nvidia"


def test_looking_for_a_module_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fakevendor" / "backends" / "one").mkdir(parents=True)
    (tmp_path / "fakevendor" / "__init__.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "fakevendor" / "two.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert _resolve.installed("fakevendor")
    assert _resolve.installed("fakevendor.backends.one")
    assert _resolve.installed("fakevendor.two")
    assert not _resolve.installed("fakevendor.three")
    assert not _resolve.installed("fakevendor_of_nobody.backends")
    monkeypatch.setitem(sys.modules, "stub_without_spec", SimpleNamespace(__spec__=None))
    assert _resolve.installed("stub_without_spec")


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "GEMSKIT_VENDOR"}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), env.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, check=False, env={**env, **environment}, capture_output=True, text=True, timeout=120)


def test_import_touches_no_driver_and_starts_no_process() -> None:
    done = run(
        """
        import os, sys, torch
        def hook(event, args):
            if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"):
                raise SystemExit(f"started a process: {event} {args}")
            path = str(args[0]) if event == "open" else ""
            if path.startswith("/dev/") and path not in ("/dev/null", "/dev/urandom"):
                raise SystemExit(f"opened a device: {args}")
        armed = True
        sys.addaudithook(lambda event, args: hook(event, args) if armed else None)
        import gemskit.backends as backends
        armed = False
        assert not torch.cuda.is_initialized()
        assert not any(name.startswith(("torch_npu", "torch_mlu", "torch_musa")) for name in sys.modules)
        pid = os.fork() if hasattr(os, "fork") else None
        if pid == 0:
            os._exit(0 if backends.arch(torch.device("cpu")).config("gemm")["m"] else 1)
        assert pid is None or os.waitpid(pid, 0)[1] == 0
        print(backends.vendor.name, backends.device)
        """
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [backends.vendor.name, backends.device] or "GEMSKIT_VENDOR" in os.environ


def test_the_environment_chooses_at_import() -> None:
    done = run("import gemskit.backends as b; print(b.vendor.name, b.device)", GEMSKIT_VENDOR="reference")
    assert done.stdout.split() == ["reference", "cpu"], done.stderr
    done = run("import gemskit.backends", GEMSKIT_VENDOR="amdd")
    assert done.returncode != 0
    assert "VendorError" in done.stderr and "did you mean 'amd'?" in done.stderr


# --- tables ----------------------------------------------------------------------------------------------------------


def test_every_file_is_listed() -> None:
    files = {path.stem for path in FOLDER.glob("*.py") if not path.stem.startswith("_")}
    assert files == set(backends.vendors)
    assert list(backends.vendors)[-1] == "reference"  # it fits everything, so it must come last


@pytest.mark.parametrize("name", list(backends.vendors))
def test_a_vendor_file_is_data_only(name: str) -> None:
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    allowed = (ast.Expr, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign)
    assert all(isinstance(node, allowed) for node in tree.body)
    assert not any(isinstance(node, (ast.Lambda, ast.comprehension)) for node in ast.walk(tree))
    assert ast.get_docstring(tree)
    names = {
        node.target.id for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    assert "OVERRIDES" in names


@pytest.mark.parametrize("vendor", ALL, ids=lambda vendor: vendor.name)
def test_a_vendor_is_well_formed(vendor: backends.Vendor) -> None:
    assert vendor.archs and vendor.title
    assert (vendor.device_type == "cpu") == (vendor.dispatch_key == "CPU")
    assert (vendor.device_type == "cuda") == (vendor.dispatch_key == "CUDA")
    assert vendor.extension or vendor.dispatch_key != "PrivateUse1"  # somebody must register the device
    assert torch.device(vendor.device_type) if vendor.device_type in ("cpu", "cuda") else vendor.device_type.isalnum()
    assert len(vendor.grid_limits) == 3 and all(0 < limit < 2**31 for limit in vendor.grid_limits)
    assert all(path.startswith("/dev/") for path in vendor.device_files)
    for override in vendor.overrides.values():
        assert ":" in override.kernel and override.why and override.bench


def negative(outs: tuple[torch.Tensor, ...], keep: Any, input: torch.Tensor) -> None:
    """Of nothing that torch computes."""
    gemskit.neg(input, out=outs[0])


def test_a_kernel_of_one_vendor(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in the place of the shared one, for this operator and this vendor, with the operator's gradient."""
    own = dataclasses.replace(
        backends.vendors["nvidia"], overrides={"silu": backends.Override("test_backends:negative", "why", "bench")}
    )
    monkeypatch.setattr(backends, "vendors", {**backends.vendors, "nvidia": own})
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    for row, want in (("sm_90", -x), ("gfx942", torch.nn.functional.silu(x))):
        with gemskit.interpret(), backends.use_arch(dataclasses.replace(backends.find_arch(row))):
            found = gemskit.silu(x)
            torch.testing.assert_close(found, want)
            torch.testing.assert_close(gemskit.relu(x), x)
            (grad,) = torch.autograd.grad(found.sum(), x)
        torch.testing.assert_close(grad, torch.autograd.grad(torch.nn.functional.silu(x).sum(), x)[0])


@pytest.mark.parametrize(("vendor", "row"), ROWS, ids=NAMES)
def test_a_row_is_well_formed(vendor: backends.Vendor, row: backends.Arch) -> None:
    backend, target, warp = row.target
    assert backend and target and warp in (0, 1, 4, 16, 32, 64, 128)
    if vendor.identify == "capability":
        assert isinstance(target, int)
    assert row.shared_memory >= 32768
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in row.unsupported_dtypes)
    assert set(row.launch) <= set(_table.DEFAULT)
    for driver, numbers in _table.DEFAULT.items():
        config = row.config(driver)
        assert set(config) == set(numbers)
        # Zero: what the row does without.
        assert all(isinstance(number, int) and number >= 0 for number in config.values())
        assert "warps" not in config or config["warps"] * max(warp, 1) <= 1024


@pytest.mark.parametrize(("vendor", "row"), ROWS, ids=NAMES)
def test_tiles_fit_into_shared_memory(vendor: backends.Vendor, row: backends.Arch) -> None:
    gemm, attention = row.config("gemm"), row.config("attention")
    assert gemm["stages"] * (gemm["m"] + gemm["n"]) * gemm["k"] * 2 <= row.shared_memory
    # bfloat16, head size 128: the query tile plus keys and values of all stages but the one in registers
    tiles = attention["m"] + 2 * attention["n"] * (attention["stages"] - 1)
    assert tiles * 128 * 2 <= row.shared_memory


@pytest.mark.parametrize(("vendor", "row"), ROWS, ids=NAMES)
def test_no_status_without_evidence(vendor: backends.Vendor, row: backends.Arch) -> None:
    if row.status == "verified":
        assert (ROOT / row.evidence).is_file()
    elif row.status == "compiles":
        assert row.evidence == _table.COMPILE_TEST
    else:
        assert row.status == "declared" and row.evidence == ""


def test_row_names_are_unique() -> None:
    names = [row.name for _, row in ROWS]
    assert len(names) == len(set(names))


def test_docs_show_the_current_status() -> None:
    text = (ROOT / "docs" / "backends.md").read_text()
    shown = text.split("<!-- status:begin -->")[1].split("<!-- status:end -->")[0].strip()
    assert shown == markdown(), "run: python -m gemskit.backends"
    assert len(backends.status_table()) == len(ROWS)


# --- launch numbers --------------------------------------------------------------------------------------------------


def test_layers_merge_key_by_key() -> None:
    merged = _table.merge({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}, "b": {"z": 4}}, {"a": {"x": 5}})
    assert merged == {"a": {"x": 5, "y": 3}, "b": {"z": 4}}


def test_default_then_vendor_then_row() -> None:
    plain = backends.Arch("plain", ("cuda", 1, 32))
    special = backends.Arch("special", ("cuda", 2, 32), launch={"gemm": {"m": 32}, "own": {"k": 7}})
    vendor = backends.Vendor("v", "V", "cuda", "CUDA", (plain, special), launch={"gemm": {"m": 64, "stages": 5}})
    default = dict(_table.DEFAULT["gemm"])
    assert plain.config("gemm") == default
    assert vendor.archs[0].config("gemm") == {**default, "m": 64, "stages": 5}
    assert vendor.archs[1].config("gemm") == {**default, "m": 32, "stages": 5}
    assert vendor.archs[1].config("own") == {"k": 7}
    assert vendor.archs[1].config("pointwise") == _table.DEFAULT["pointwise"]
    with pytest.raises(DeclarationError, match="plain has no launch numbers for the driver 'own'; accepted: attention"):
        plain.config("own")
    assert dataclasses.replace(vendor).archs == vendor.archs


def test_changing_a_config_changes_no_table() -> None:
    row = backends.find_arch("sm_90")
    row.config("gemm")["m"] = 1
    assert row.config("gemm")["m"] == 128
    assert hash(row) == hash(pickle.loads(pickle.dumps(row)))


def test_the_shipped_numbers_differ_where_hardware_does() -> None:
    assert backends.find_arch("sm_90").config("gemm")["stages"] == 3
    assert backends.find_arch("gfx942").config("gemm")["stages"] == 2
    assert backends.find_arch("sm_80").config("attention")["m"] == 128
    assert backends.find_arch("sm_86").config("attention")["m"] == 64


# --- rows for devices ------------------------------------------------------------------------------------------------


def device(**properties: Any) -> SimpleNamespace:
    return SimpleNamespace(**properties)


@pytest.mark.parametrize(
    ("capability", "numbers_of"),
    [
        ((9, 0), "sm_90"),
        ((8, 7), "sm_86"),
        ((10, 3), "sm_100"),
        ((12, 1), "sm_120"),
        ((13, 0), "sm_120"),
        ((7, 5), "sm_80"),
    ],
)
def test_capability_finds_the_row_or_the_nearest_older_one(capability: tuple[int, int], numbers_of: str) -> None:
    row = _resolve.match(backends.vendors["nvidia"], device(major=capability[0], minor=capability[1], warp_size=32))
    number = 10 * capability[0] + capability[1]
    assert row.name == f"sm_{number}" and row.target == ("cuda", number, 32)
    model = backends.find_arch(numbers_of)
    assert row.launch == model.launch and row.unsupported_dtypes == model.unsupported_dtypes
    if row.name != numbers_of:
        assert row.status == "declared" and row.evidence == ""
    else:
        assert row is model


@pytest.mark.parametrize(
    ("name", "warp", "numbers_of"),
    [
        ("gfx942:sramecc+:xnack-", 64, "gfx942"),
        ("gfx941", 64, "gfx90a"),
        ("gfx908", 64, "gfx90a"),  # older than every row
        ("gfx1030", 32, "gfx1100"),  # nothing older has warps of 32
        ("gfx1151", 32, "gfx1100"),
        ("gfx1250", 32, "gfx1201"),
    ],
)
def test_gcn_name_finds_the_row_of_its_warp_size(name: str, warp: int, numbers_of: str) -> None:
    row = _resolve.match(backends.vendors["amd"], device(gcnArchName=name, warp_size=warp))
    assert row.target == ("hip", name.split(":")[0], warp)
    assert row.shared_memory == backends.find_arch(numbers_of).shared_memory
    assert (row.status == "declared") == (row.name != numbers_of)


def test_an_unknown_device_gets_no_more_shared_memory_than_it_has() -> None:
    turing = device(major=7, minor=5, warp_size=32, shared_memory_per_block_optin=65536)
    assert _resolve.match(backends.vendors["nvidia"], turing).shared_memory == 65536
    roomy = device(major=12, minor=1, warp_size=32, shared_memory_per_block_optin=2**20)
    assert _resolve.match(backends.vendors["nvidia"], roomy).shared_memory == 101376


def test_a_vendor_without_warp_size_in_torch_still_finds_its_row() -> None:
    mthreads = backends.vendors["mthreads"]
    assert _resolve.match(mthreads, device(major=2, minor=2)).target == ("musa", 22, 128)
    assert _resolve.match(mthreads, device(major=3, minor=2)).target == ("musa", 32, 32)
    assert _resolve.match(backends.vendors["ascend"], device()).name == "Ascend910B"


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A process that resolved to NVIDIA, with an H100 and an A10; returns the indices that torch was asked for."""
    asked: list[int] = []
    gpus = [device(major=9, minor=0, warp_size=32), device(major=8, minor=6, warp_size=32)]

    def get(index: int) -> SimpleNamespace:
        asked.append(index)
        return gpus[index]

    monkeypatch.setattr(backends, "vendor", backends.vendors["nvidia"])
    monkeypatch.setattr(backends, "_bound", {})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", get)
    return asked


def test_rows_are_bound_per_device_and_asked_once(two_gpus: list[int]) -> None:
    assert backends.arch(torch.device("cuda:0")).name == "sm_90"
    assert backends.arch().name == backends.arch(torch.device("cuda")).name == "sm_86"
    assert backends.arch(torch.device("cuda", 1)) is backends.arch()
    assert two_gpus == [0, 1]


def test_cpu_tensors_have_a_row_everywhere_and_strangers_are_refused(two_gpus: list[int]) -> None:
    assert backends.arch(torch.device("cpu")).name == "reference"
    with pytest.raises(DeviceError, match="NVIDIA serves 'cuda' and 'cpu' devices, got 'xpu:0'"):
        backends.arch(torch.device("xpu", 0))
    assert two_gpus == []


def test_use_arch_forces_a_row_in_this_thread_only(two_gpus: list[int]) -> None:
    seen: list[str] = []
    with backends.use_arch("gfx942") as row:
        assert backends.arch() is backends.arch(torch.device("meta")) is row
        with backends.use_arch(backends.find_arch("sm_100")):
            assert backends.arch(torch.device("cpu")).name == "sm_100"
        assert backends.arch().name == "gfx942"
        thread = threading.Thread(target=lambda: seen.append(backends.arch().name))
        thread.start()
        thread.join()
    assert seen == ["sm_86"] and backends.arch().name == "sm_86"
    with pytest.raises(KeyError, match="inside"), backends.use_arch("sm_80"):
        raise KeyError("inside")
    assert backends.arch().name == "sm_86"


def test_an_unknown_row_is_refused() -> None:
    with pytest.raises(VendorError, match=r"'sm_13' is no architecture; accepted: .*sm_90"):
        backends.find_arch("sm_13")
