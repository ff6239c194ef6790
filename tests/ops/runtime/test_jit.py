"""The kernel compiler: what it reports, what it caches, what it says when something is wrong. Needs NVRTC, no GPU."""

import ctypes
import multiprocessing
import threading
import time
import warnings

import pytest
import torch

from lkda.ops.runtime import cubin_cache, jit

pytestmark = pytest.mark.skipif(jit._reason_no_compiler() is not None, reason=str(jit._reason_no_compiler()))

SOURCE = """
#include "scale.cuh"
struct Range { int n; long long offset; };
extern "C" __global__ void scale(float *x, Range range, float by) {
  const int n = range.n; const long long offset = range.offset;
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) x[i + offset] *= by * FACTOR * HEADER_FACTOR;
}
"""


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("LKDA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cubin_cache, "_warned", False)
    jit._source_closure.cache_clear()
    (tmp_path / "scale.cuh").write_text("#define HEADER_FACTOR 2\n")
    path = tmp_path / "scale.cu"
    path.write_text(SOURCE)
    return path


def entries():
    return sorted(cubin_cache.directory().iterdir())


def refuse_to_compile(*_):
    raise AssertionError("compiled although the cache has it")


def test_every_architecture_compiles_without_a_gpu(source):
    for arch in jit.ARCHITECTURES:
        binary = jit.Module(source, {"FACTOR": 3}).binary(arch)
        assert binary.cubin[:4] == b"\x7fELF"
        resources = binary.resources()["scale"]
        assert 0 < resources.registers < 64
        assert resources.spill_bytes == 0
    assert len(entries()) == len(jit.ARCHITECTURES)


def test_modules_to_precompile_are_compiled_beside_a_module(source):
    first, second, broken = (jit.Module(source, {"FACTOR": factor}) for factor in ("3", "5", "none"))
    first.precompile_with = lambda: [second, broken]
    first.binary("sm_90a")
    while len(threads := threading.enumerate()) > 1 and any("_compile_early" in thread.name for thread in threads):
        time.sleep(0.01)
    assert "sm_90a" in second._binaries
    with pytest.raises(jit.KernelCompileError, match="none"):
        broken.binary("sm_90a")


def test_spills_and_shared_memory_are_reported(source):
    source.write_text(
        'extern "C" __global__ void __launch_bounds__(1024, 2) greedy(float *x, int n) {\n'
        "  __shared__ float s[256]; float r[64];\n"
        "  for (int i = 0; i < 64; ++i) r[i] = x[i * n];\n"
        "  s[threadIdx.x % 256] = r[0]; __syncthreads();\n"
        "  for (int j = 0; j < n; ++j) for (int i = 0; i < 64; ++i) r[i] = r[i] * r[(i + 7) % 64] + s[j];\n"
        "  for (int i = 0; i < 64; ++i) x[i * n] = r[i];\n}\n"
    )
    resources = jit.Module(source, {}).binary("sm_90a").resources()["greedy"]
    assert resources.registers <= 32
    assert resources.spill_bytes > 0
    assert resources.static_shared_bytes == 1024


def test_a_second_module_reads_the_cache(source, monkeypatch):
    first = jit.Module(source, {"FACTOR": 3}).binary("sm_90a")
    monkeypatch.setattr(jit, "_compile", refuse_to_compile)
    assert jit.Module(source, {"FACTOR": 3}).binary("sm_90a") == first


def test_source_header_macro_and_architecture_each_change_the_entry(source):
    jit.Module(source, {"FACTOR": 3}).binary("sm_90a")
    jit.Module(source, {"FACTOR": 4}).binary("sm_90a")
    jit.Module(source, {"FACTOR": 4}).binary("sm_80")
    assert len(entries()) == 3
    source.with_name("scale.cuh").write_text("#define HEADER_FACTOR 5\n")
    jit._source_closure.cache_clear()
    jit.Module(source, {"FACTOR": 4}).binary("sm_80")
    assert len(entries()) == 4
    source.write_text(SOURCE + "// a remark\n")
    jit._source_closure.cache_clear()
    jit.Module(source, {"FACTOR": 4}).binary("sm_80")
    assert len(entries()) == 5


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-1] + b"?"])
def test_a_damaged_entry_is_compiled_again(source, damage):
    whole = jit.Module(source, {"FACTOR": 3}).binary("sm_90a")
    (path,) = entries()
    path.write_bytes(damage(path.read_bytes()))
    assert jit.Module(source, {"FACTOR": 3}).binary("sm_90a").cubin == whole.cubin
    assert cubin_cache.read(path.name)[0] == whole.cubin


def test_an_unusable_cache_costs_one_warning(source, tmp_path, monkeypatch):
    (tmp_path / "a_file").write_text("")
    monkeypatch.setenv("LKDA_CACHE", str(tmp_path / "a_file"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for factor in (3, 4):
            assert jit.Module(source, {"FACTOR": factor}).binary("sm_90a").cubin
    assert len(caught) == 1
    assert "LKDA_CACHE" in str(caught[0].message)


def test_a_compile_failure_names_the_file_and_quotes_the_compiler(source):
    with pytest.raises(jit.KernelCompileError) as caught:
        jit.Module(source, {"FACTR": 3}).binary("sm_90a")
    assert str(source) in str(caught.value)
    assert 'identifier "FACTOR" is undefined' in str(caught.value)
    assert "sm_90a" in str(caught.value)


def compile_in_a_process(source):
    return jit.Module(source, {"FACTOR": 3}).binary("sm_90a").cubin


@pytest.mark.long
def test_processes_share_the_cache(source):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        cubins = pool.map(compile_in_a_process, [source] * 4)
    assert len(set(cubins)) == 1
    assert len(entries()) == 1


def test_arguments_are_laid_out_as_c_would():
    arguments = jit._Arguments("PiqfP")
    start = ctypes.addressof(arguments.buffer)
    assert [address - start for address in arguments.array] == [0, 8, 16, 24, 32]
    arguments.pack_into(arguments.buffer, 0, 2**60, -3, 2**40, 0.5, 7)
    assert ctypes.c_int32.from_address(arguments.array[1]).value == -3
    assert ctypes.c_float.from_address(arguments.array[3]).value == 0.5


def test_a_struct_is_one_argument():
    arguments = jit._Arguments("i(Pqi)(if)Pi")
    start = ctypes.addressof(arguments.buffer)
    assert [address - start for address in arguments.array] == [0, 8, 32, 40, 48]
    arguments.pack_into(arguments.buffer, 0, 1, 2, 3, 4, 5, 0.5, 7, 8)
    assert ctypes.c_int32.from_address(arguments.array[1] + 16).value == 4
    assert ctypes.c_float.from_address(arguments.array[2] + 4).value == 0.5
    assert ctypes.c_int64.from_address(arguments.array[3]).value == 7


def test_a_cpu_is_refused_with_a_reason():
    assert "not on a CUDA device" in jit.reason_cannot_run(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
class TestLaunch:
    def test_on_every_device_and_on_a_second_stream(self, source):
        scale = jit.Module(source, {"FACTOR": 3}).kernel("scale", "P(iq)f")
        for index in range(torch.cuda.device_count()):
            device = torch.device("cuda", index)
            stream = torch.cuda.Stream(device)
            x = torch.ones(1000, device=device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                torch.cuda._sleep(10_000_000)  # the kernel must queue behind this, not run on the default stream
                x.fill_(5.0)
                scale((4, 1, 1), 256, x, 990, 10, 0.5, device=device)
            stream.synchronize()
            assert x[:10].eq(5).all()
            assert x[10:].eq(15).all()

    def test_inside_a_cuda_graph(self, source):
        scale = jit.Module(source, {"FACTOR": 3}).kernel("scale", "P(iq)f")
        x = torch.ones(256, device="cuda")
        scale((1, 1, 1), 256, x, 256, 0, 1.0, device=x.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            scale((1, 1, 1), 256, x, 256, 0, 1.0, device=x.device)
        graph.replay()
        assert x.eq(36).all()

    def test_from_a_fresh_thread(self, source):
        from concurrent.futures import ThreadPoolExecutor

        scale = jit.Module(source, {"FACTOR": 3}).kernel("scale", "P(iq)f")
        x = torch.ones(256, device="cuda")
        torch.cuda.synchronize()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(scale, (1, 1, 1), 256, x, 256, 0, 1.0, device=x.device).result()
        assert x.eq(6).all()

    def test_a_launch_that_cannot_be_is_an_error(self, source):
        scale = jit.Module(source, {"FACTOR": 3}).kernel("scale", "P(iq)f")
        x = torch.ones(256, device="cuda")
        with pytest.raises(RuntimeError, match=r"CUDA_ERROR_INVALID_VALUE.*scale"):
            scale((1, 1, 1), 4096, x, 256, 0, 1.0, device=x.device)
