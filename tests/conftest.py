"""Settings for every test: eight CPU devices, hypothesis profiles, one torch thread, no silent skip of torch tests."""

import gc
import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest
from hypothesis import settings

# Read when jax makes its first device, so before any test. What a caller has set stays.
FLAGS: dict[str, object] = {"--xla_force_host_platform_device_count": 8}
if not Path("/dev/nvidiactl").exists():
    # for most of the suite's time XLA compiles programs that run for milliseconds: unoptimised, all takes a third less
    FLAGS["--xla_backend_optimization_level"] = 0
    # fusions by the older of XLA's two ways compile in 40 % of the time (jaxlib up to 0.11 has both)
    FLAGS["--xla_backend_extra_options"] = "xla_cpu_disable_new_fusion_emitters"
    FLAGS["--xla_cpu_parallel_codegen_split_count"] = 1
for flag, value in FLAGS.items():
    if flag not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}={value}".strip()

os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")  # nobody reads where an operation of a test comes from
# For each Triton operation that is lowered, MLIR looks for a module of this name, which jaxlib does not have, and
# pytest's import hook makes that slow: half of the time of lowering a kernel.
sys.modules.setdefault("jaxlib.mlir.dialects.tt", types.ModuleType("jaxlib.mlir.dialects.tt"))

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# The test extra installs torch there, and CI runs there: a missing import is a failure, never a skip.
TORCH_REQUIRED = sys.version_info < (3, 12)


def pytest_sessionstart() -> None:
    missing = [name for name in ("torch", "transformers") if TORCH_REQUIRED and not importlib.util.find_spec(name)]
    if missing:
        raise pytest.UsageError(f"{' and '.join(missing)} missing on Python 3.11: install the test extra")


def pytest_collection_finish() -> None:
    """Imported modules stay: the garbage collector need not go through them, nor through each trace, over and over."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread():
    """torch's threads wait in busy loops: beside JAX's, or another worker's, they cost more than they bring."""
    torch = sys.modules.get("torch")  # whoever needs it has imported it while tests were collected
    if torch is not None:
        torch.set_num_threads(1)


@pytest.fixture
def interrupts():
    """For tests that send one to themselves: in a callback of the garbage collector, as hypothesis has, it is lost."""
    gc.disable()
    yield
    gc.enable()


def fail_missing_import(report: pytest.CollectReport | pytest.TestReport) -> None:
    """Turns the skip of `pytest.importorskip` into a failure, also when the package is there but broken."""
    if TORCH_REQUIRED and report.skipped and "could not import" in str(report.longrepr):
        report.outcome = "failed"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    report = yield
    fail_missing_import(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    fail_missing_import(report)
    return report
