"""A checkout that is newer than the build of its kernels says so, and lets the reference serve."""

from types import SimpleNamespace

import pytest

from flowkern.ops._common import native, sources


def test_kernels_of_other_sources_do_not_serve(monkeypatch, tmp_path):
    made = tmp_path / "csrc"
    made.mkdir()
    monkeypatch.setattr(native, "_CSRC", made)
    (made / "verbs.h").write_text("int of_another_build;")
    module = SimpleNamespace(__name__="flowkern._cpu", __file__="_cpu.so", sources="")
    monkeypatch.setattr("flowkern._cpu", module, raising=False)
    with pytest.warns(UserWarning, match=r"_cpu.so was built from other sources.*setup.py build"):
        loaded, reason = native._load.__wrapped__()
    assert loaded is None and "other sources" in reason
    module.sources = sources.digest("_cpu", made)
    assert native._is_of_other_sources(module) is None
    (made / "sums_cuda.cuh").write_text("of the other module's;")
    assert native._is_of_other_sources(module) is None
    (made / "verbs.h").write_text("int of_this_build;")
    with pytest.warns(UserWarning):
        assert native._is_of_other_sources(module)


def test_an_installed_package_has_no_sources_to_compare(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "_CSRC", tmp_path / "csrc")
    assert native._is_of_other_sources(SimpleNamespace(__name__="flowkern._cpu")) is None
