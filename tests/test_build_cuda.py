"""Finding what the CUDA library is compiled with."""

import shlex

import pytest
import torch
from bound import needs_compiler
from small_build import key_of

from fused_rnn import build

pytest_plugins = "build_fixtures"
pytestmark = [
    pytest.mark.compiling,
    needs_compiler,
]


@pytest.fixture
def cuda(home, monkeypatch):
    """A torch for CUDA 13.0 and a toolkit whose nvcc says what version it is."""

    def toolkit(version):
        nvcc = home / "toolkit" / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True, exist_ok=True)
        nvcc.write_text(
            f"#!/bin/sh\necho Cuda compilation tools, release {version}, V{version}.88\n"
        )
        nvcc.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(home / "toolkit"))

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("FUSED_RNN_CUDA_ARCH", "80 90a")
    return toolkit


def test_finds_the_toolkit(libraries, cuda, home, monkeypatch):
    cuda("13.2")  # another minor version will do
    toolkit = build.find_toolkit()
    assert toolkit.nvcc == str(home / "toolkit" / "bin" / "nvcc")
    assert (toolkit.version, toolkit.architectures) == ("13.2", ("80", "90a"))
    tools = libraries.targets["cuda"].find_tools()
    assert tools.kinds == ("sm_80", "sm_90a")
    assert "-gencode=arch=compute_90a,code=sm_90a" in tools.commands["nvcc"]
    keys = {key_of(libraries), key_of(libraries, "cuda")}
    cuda("13.1")
    keys.add(key_of(libraries, "cuda"))
    monkeypatch.setenv("FUSED_RNN_CUDA_ARCH", "80")
    keys.add(key_of(libraries, "cuda"))
    assert len(keys) == 4


def test_nvcc_is_given_the_compiler_itself(cuda, home, monkeypatch):
    """Not what runs it, nor its options."""
    cuda("13.0")
    wrapper = home / "ccache"
    wrapper.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", f"{shlex.quote(str(wrapper))} c++ -m64")
    nvcc = build.CUDA.find_tools().commands["nvcc"]
    assert nvcc[nvcc.index("-ccbin") + 1] == "c++"


def test_a_toolkit_that_does_not_fit(libraries, cuda):
    cuda("12.8")
    with pytest.raises(
        build.BuildError, match="is CUDA 12.8, but torch was built for 13.0"
    ) as error:
        build.find_toolkit()
    assert "CUDA toolkit 13.0" in error.value.remedy and "CUDA_HOME" in error.value.remedy
    with pytest.warns(RuntimeWarning, match="no CUDA library: .*but torch was built for 13.0"):
        assert libraries.backend("cuda") == "reference"
    assert libraries.backend("cpu") == "native", "the CPU's library is another one"


def test_no_toolkit(libraries, cuda, home, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(home / "nowhere"))
    with pytest.raises(build.BuildError, match="nvcc was not found in .*nowhere"):
        build.find_toolkit()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(build.BuildError, match="this torch was built without CUDA"):
        build.find_toolkit()


def test_no_device(libraries, cuda, monkeypatch):
    cuda("13.0")
    monkeypatch.delenv("FUSED_RNN_CUDA_ARCH")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(build.BuildError, match="there is no CUDA device"):
        build.find_toolkit()
