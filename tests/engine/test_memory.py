"""Available memory is read from Linux and from a container's limit."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lipsync.engine import memory
from lipsync.engine.video import VideoInfo, decode_videos
from lipsync.errors import DeviceError


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_machine_has_some() -> None:
    available = memory.available_bytes()
    assert available is not None and available > 2**20


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its page cache goes when memory is needed; without a limit, the machine's memory counts alone."""
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    4096 kB\n")
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 200000\nactive_file 300000\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.available_bytes() == 1_500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available_bytes() == 4096 * 1024
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "nowhere")
    assert memory.available_bytes() is None


def test_videos_that_do_not_fit_are_refused_before_anything_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lipsync.engine.video.available_bytes", lambda: 2**30)
    info = VideoInfo(Path("crops.mp4"), "h264", 328, 328, 10_000, 25.0, 1)
    with pytest.raises(DeviceError, match=r"need 3\.0 GiB, 1\.0 GiB are left"):
        decode_videos({"crops_328": info})
