"""Batches on the device, from frame numbers to resized crops. Without a GPU the same steps run on the CPU."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image
from torch import Tensor

from lipsync.config import BLENDS
from lipsync.engine import cuda_runtime
from lipsync.engine.compositor import composite_crop, face_in_crop
from lipsync.engine.cuda_runtime import CropComposer, CudaRuntime
from lipsync.engine.geometry import BORDER, GEOMETRIES
from lipsync.engine.model import return_free_memory
from lipsync.engine.plan import InferencePlan, TorchOps
from lipsync.engine.runtime import MIN_PSNR_DB, FaceSet, Reference, make_runtime, run_torch
from lipsync.engine.unet import UNet
from tests.engine.test_resample import IS_SIMD
from tests.golden.fill import audio, fill
from tests.packages import network_config, pictures

UInt8 = npt.NDArray[np.uint8]

CPU = torch.device("cpu")
N_FRAMES = 9
BATCH_SIZES = (1, 2, 4)
MIB = 2**20

needs_cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
on_cuda = [pytest.param("cuda", marks=needs_cuda)]


@pytest.fixture(scope="module")
def network() -> UNet:
    """Random, with batch norms that let its picture vary, and depend on what it hears."""
    net = UNet(network_config(168, "hubert", 0.25))
    state = fill(net.state_dict(), 3)
    for key, value in state.items():
        if key.startswith(("audio", "fuse", "up")) and key.endswith(".weight") and value.ndim == 1:
            value *= 1.4
    net.load_state_dict(state)
    return net.eval()


@pytest.fixture(scope="module")
def faces(network: UNet) -> FaceSet:
    """Frames whose rectangles shrink, enlarge and keep the crop, in both directions."""
    geometry = GEOMETRIES[160]
    size = geometry.crop_size
    crops = torch.from_numpy(np.stack(pictures(N_FRAMES, size, size, seed=1)))
    rng = np.random.default_rng(2)
    corners = rng.integers(0, 200, (N_FRAMES, 2))
    sizes = rng.integers(60, 260, (N_FRAMES, 2))
    sizes[:3] = (size, size), (size, 90), (250, size)
    shape = network.config.audio_shapes["hubert"]
    rows = audio(N_FRAMES, shape, 4)

    def windows(frame_ids: Sequence[int]) -> Tensor:
        return rows[list(frame_ids)]

    return FaceSet(crops, np.hstack((corners, corners + sizes)).astype(np.int32), geometry, shape, windows)


@pytest.fixture(scope="module")
def plain(network: UNet, faces: FaceSet) -> list[UInt8]:
    """What plain float32 torch and Pillow make of every frame."""
    plan, ops = InferencePlan[Tensor](network), TorchOps(CPU, torch.float32)
    out = []
    for frame_id, (x1, y1, x2, y2) in enumerate(faces.rectangles.tolist()):
        face = run_torch(plan, ops, faces.face(frame_id)[None], faces.windows([frame_id]))[0]
        out.append(np.array(composite_crop(faces.crops[frame_id].numpy(), face, x2 - x1, y2 - y1)))
    return out


def cuda_runtime_of(
    network: UNet, faces: FaceSet, device: str, precision: str, batch_sizes: Sequence[int] = BATCH_SIZES
) -> CudaRuntime:
    plan = InferencePlan[Tensor](network)
    return CudaRuntime(plan, faces, torch.device(device), precision, batch_sizes=batch_sizes)


def differences(made: list[UInt8], wanted: list[UInt8]) -> npt.NDArray[np.int64]:
    """Of all pixels, one after another."""
    assert [a.shape for a in made] == [b.shape for b in wanted]
    return np.concatenate([np.abs(a.astype(np.int64) - b).ravel() for a, b in zip(made, wanted, strict=True)])


def psnr_db(made: list[UInt8], wanted: list[UInt8]) -> float:
    return 10 * float(np.log10(255**2 / max(np.square(differences(made, wanted)).mean(), 1e-9)))


def assert_same_up_to_rounding(made: list[UInt8], wanted: list[UInt8]) -> None:
    difference = differences(made, wanted)
    assert difference.max() <= 1 and (difference == 0).mean() >= 0.999


@pytest.mark.parametrize("frame_ids", [[0], [5, 2], [8, 1, 1], list(range(N_FRAMES)), []])
def test_the_steps_on_a_cpu_give_what_the_plain_path_gives(
    network: UNet, faces: FaceSet, plain: list[UInt8], frame_ids: list[int]
) -> None:
    runtime = cuda_runtime_of(network, faces, "cpu", "float32")
    made = runtime.run(frame_ids, faces.windows(frame_ids))
    assert len(made) == len(frame_ids)
    if made:
        assert_same_up_to_rounding(made, [plain[i] for i in frame_ids])


@pytest.mark.parametrize("blend", BLENDS)
def test_faces_alone_are_blended_and_not_resized(network: UNet, faces: FaceSet, blend: str) -> None:
    blended = replace(faces, blend=blend)
    runtime = cuda_runtime_of(network, blended, "cpu", "float32")
    ids = [4, 1, 1, 8, 0, 2]
    alone = {0, 2, 4, 5}  # the last two in a piece of their own
    made = runtime.run(ids, faces.windows(ids), alone=alone)
    plan, ops = InferencePlan[Tensor](network), TorchOps(CPU, torch.float32)
    resized = runtime.run(ids, faces.windows(ids))
    for place, frame_id in enumerate(ids):
        if place not in alone:
            assert np.array_equal(made[place], resized[place])
            continue
        face = run_torch(plan, ops, faces.face(frame_id)[None], faces.windows([frame_id]))[0]
        wanted = face_in_crop(faces.crops[frame_id].numpy(), face, blend=blend)[BORDER:-BORDER, BORDER:-BORDER]
        assert_same_up_to_rounding([made[place]], [wanted])
    assert np.array_equal(runtime.own(3, alone=True), faces.face(3).numpy())


@pytest.mark.parametrize("blend", BLENDS)
def test_the_own_face_is_the_crop_resized(network: UNet, faces: FaceSet, blend: str) -> None:
    runtime = cuda_runtime_of(network, replace(faces, blend=blend), "cpu", "float32")
    for frame_id in (0, 3, 8):
        x1, y1, x2, y2 = faces.rectangles[frame_id].tolist()
        crop = Image.fromarray(faces.crops[frame_id].numpy())
        wanted = np.asarray(crop.resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR))
        assert np.array_equal(runtime.own(frame_id), wanted)


def test_a_mistaken_frame_or_window_is_further_off_than_rounding(
    plain: list[UInt8], network: UNet, faces: FaceSet
) -> None:
    runtime = cuda_runtime_of(network, faces, "cpu", "float32")
    assert psnr_db(runtime.run([4], faces.windows([5])), [plain[4]]) < MIN_PSNR_DB - 10
    assert psnr_db([plain[0][:60, :60]], [plain[4][:60, :60]]) < MIN_PSNR_DB - 10


def test_arrays_are_the_callers_own(network: UNet, faces: FaceSet) -> None:
    runtime = cuda_runtime_of(network, faces, "cpu", "float32")
    crops = faces.crops.clone()
    (first,) = runtime.run([0], faces.windows([0]))
    kept = first.copy()
    runtime.run([1, 2], faces.windows([1, 2]))
    assert np.array_equal(first, kept)
    first[:] = 0
    (again,) = runtime.run([0], faces.windows([0]))
    assert np.array_equal(again, kept) and again.flags.writeable and again.flags.c_contiguous
    assert torch.equal(faces.crops, crops)


def test_what_it_says_of_itself(network: UNet, faces: FaceSet) -> None:
    runtime = cuda_runtime_of(network, faces, "cpu", "float32")
    assert runtime.name == "cuda-float32" and runtime.device == "cpu"
    assert runtime.largest_useful_batch > 64 and runtime.resizes
    assert runtime.optimizations == (
        "folded_batch_norms",
        "composed_convolutions",
        "channels_last",
        "resident_faces",
        "device_composition",
    )
    runtime.run([0], faces.windows([0]))
    buffers = BATCH_SIZES[-1] * (8 + 4 * int(np.prod(faces.window_shape)) + 3 * 160 * 160)
    assert runtime.nbytes > faces.crops.nbytes + InferencePlan[Tensor](network).n_weights * 4 + buffers
    assert cuda_runtime_of(network, faces, "cpu", "float16").optimizations[0] == "float16"
    assert isinstance(make_runtime("cuda-float32", network, faces, CPU), CudaRuntime)


def test_an_unknown_frame_ends_before_the_device(network: UNet, faces: FaceSet) -> None:
    runtime = cuda_runtime_of(network, faces, "cpu", "float32")
    for frame_id in (N_FRAMES, -1):
        with pytest.raises(IndexError):
            runtime.run([0, frame_id], faces.windows([0, 0]))


class FakeGraph:
    """A graph that runs the steps again when it is replayed."""

    def __init__(self) -> None:
        self.n = 0
        self.runtime: CudaRuntime | None = None

    def replay(self) -> None:
        assert self.runtime is not None
        self.runtime._step(self.n)


class FakeCuda:
    """What captures ask of torch.cuda, on a CPU; `captures`: the batch size and the pool of each;
    `steps`: the batch sizes of what was run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, failing: Sequence[int] = ()) -> None:
        self.captures: list[tuple[int, tuple[int, int]]] = []
        self.steps: list[int] = []
        self._pools = 0
        self._capturing: tuple[FakeGraph, tuple[int, int]] | None = None
        step = CudaRuntime._step

        def watched_step(runtime: CudaRuntime, n: int) -> None:
            step(runtime, n)
            if self._capturing is None:
                self.steps.append(n)
                return
            graph, pool = self._capturing
            self.captures.append((n, pool))
            graph.n, graph.runtime = n, runtime
            if n in failing:
                raise RuntimeError(f"not in {n}s")

        monkeypatch.setattr(cuda_runtime, "N_WARM_UPS", 2)
        monkeypatch.setattr(CudaRuntime, "_step", watched_step)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", self._new_pool)
        monkeypatch.setattr(torch.cuda, "graph", self._capture)
        segments = [{"segment_pool_id": (0, pool), "total_size": 10**pool} for pool in range(1, 4)]
        monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)

    def _new_pool(self) -> tuple[int, int]:
        self._pools += 1
        return 0, self._pools

    @contextlib.contextmanager
    def _capture(
        self, graph: FakeGraph, *, pool: tuple[int, int], stream: object, capture_error_mode: str
    ) -> Iterator[None]:
        assert self._capturing is None and cuda_runtime.CAPTURING.locked()
        assert capture_error_mode == "thread_local"
        self._capturing = graph, pool
        try:
            yield
        finally:
            self._capturing = None


def test_graphs_share_a_pool_and_the_largest_comes_first(
    network: UNet, faces: FaceSet, plain: list[UInt8], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeCuda(monkeypatch)
    runtime = cuda_runtime_of(network, faces, "cpu", "float32", (2, 4, 1, 2))
    before = runtime.nbytes
    with runtime._on_device():
        runtime._make_graphs()
    assert fake.captures == [(4, (0, 1)), (2, (0, 1)), (1, (0, 1))]
    # All weights are placed and all kernels loaded before the first capture; then each graph is launched once.
    assert fake.steps == [4, 4, 2, 2, 1, 1, 4, 2, 1]
    assert runtime.nbytes >= before + 10 and runtime.optimizations[0] == "cuda_graphs"
    fake.steps.clear()
    for ids in ([8, 2, 4, 1, 6], [7, 3, 5]):  # whole pieces and a rest; the fourth of three is what was there before
        assert_same_up_to_rounding(runtime.run(ids, faces.windows(ids)), [plain[i] for i in ids])
    assert fake.steps == [4, 1, 4]


def test_sizes_that_cannot_be_captured_run_without(
    network: UNet, faces: FaceSet, plain: list[UInt8], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeCuda(monkeypatch, failing=(4,))
    runtime = cuda_runtime_of(network, faces, "cpu", "float32")
    with runtime._on_device():
        runtime._make_graphs()
    assert fake.captures == [(4, (0, 1)), (2, (0, 2)), (1, (0, 2))]  # a pool of a failed capture is not used again
    assert "batches of 4 on cpu" in caplog.text and "not in 4s" in caplog.text
    assert set(runtime._graphs) == {1, 2} and runtime.optimizations[0] == "cuda_graphs"
    fake.steps.clear()
    made = runtime.run([0, 1, 2], faces.windows([0, 1, 2]))
    assert_same_up_to_rounding(made, plain[:3])
    assert fake.steps == [3]
    assert not cuda_runtime.CAPTURING.locked()


def test_where_no_size_can_be_captured_it_says_so(
    network: UNet, faces: FaceSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeCuda(monkeypatch, failing=BATCH_SIZES)
    runtime = cuda_runtime_of(network, faces, "cpu", "float32")
    with runtime._on_device():
        runtime._make_graphs()
    assert "cuda_graphs" not in runtime.optimizations
    assert len(runtime.run([0, 1], faces.windows([0, 1]))) == 2


@pytest.mark.parametrize("device", on_cuda)
@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_cuda_is_close_to_float32(
    network: UNet, faces: FaceSet, plain: list[UInt8], device: str, precision: str
) -> None:
    runtime = cuda_runtime_of(network, faces, device, precision)
    made = runtime.run(range(N_FRAMES), faces.windows(range(N_FRAMES)))
    assert psnr_db(made, plain) >= MIN_PSNR_DB
    assert "cuda_graphs" in runtime.optimizations
    assert ("float16" in runtime.optimizations) == (precision == "float16")


@pytest.mark.parametrize("blend", BLENDS)
def test_composition_of_a_batch_is_the_compositors(faces: FaceSet, blend: str) -> None:
    size = faces.geometry.face_size
    moved = np.random.default_rng(6).integers(0, 256, (N_FRAMES, size, size, 3), dtype=np.uint8)
    moved[::2] = faces.crops[::2, BORDER:-BORDER, BORDER:-BORDER].numpy() // 2 + 70  # some nearer to their crops
    composer = CropComposer(faces.crops, faces.rectangles, CPU, blend=blend)
    ids = torch.tensor([4, 0, 0, 8, 3])
    made = composer.compose(composer.crops(ids), torch.from_numpy(moved)[ids], ids).numpy()
    for picture, i in zip(made, ids.tolist(), strict=True):
        height, width = composer.sizes[i]
        wanted = np.asarray(composite_crop(faces.crops[i].numpy(), moved[i], width, height, blend=blend))
        if IS_SIMD:
            assert np.array_equal(picture[:height, :width], wanted)
        else:
            assert np.abs(picture[:height, :width].astype(int) - wanted).max() <= 1


@pytest.mark.parametrize("blend", BLENDS)
def test_the_runtime_blends_as_its_faces_say(network: UNet, faces: FaceSet, blend: str) -> None:
    blended = replace(faces, blend=blend)
    plan = InferencePlan[Tensor](network)
    runtime = CudaRuntime(plan, blended, CPU, "float32", batch_sizes=BATCH_SIZES)
    face = run_torch(plan, TorchOps(CPU, torch.float32), faces.face(2)[None], faces.windows([2]))[0]
    height, width = runtime._composer.sizes[2]
    wanted = np.asarray(composite_crop(faces.crops[2].numpy(), face, width, height, blend=blend))
    assert psnr_db(runtime.run([2], faces.windows([2])), [wanted]) > 50
    # It is held against plain torch's faces, put into their crops in the same way.
    assert Reference(plan, blended).psnr_db(runtime) > 50


@pytest.mark.parametrize("device", on_cuda)
@pytest.mark.parametrize("blend", BLENDS)
def test_composition_on_cuda_is_exact(faces: FaceSet, device: str, blend: str) -> None:
    shape = N_FRAMES, faces.geometry.face_size, faces.geometry.face_size, 3
    moved = torch.from_numpy(np.random.default_rng(6).uniform(0, 255, shape).astype(np.float32))
    ids = torch.arange(N_FRAMES)
    made = []
    for place in (torch.device(device), CPU):
        composer = CropComposer(faces.crops, faces.rectangles, place, blend=blend)
        placed = ids.to(place)
        made.append(composer.compose(composer.crops(placed), moved.to(place), placed).cpu())
    assert torch.equal(*made)


@pytest.mark.parametrize("device", on_cuda)
@pytest.mark.parametrize("precision", ["float16", "float32"])
def test_graphs_give_what_the_steps_give(network: UNet, faces: FaceSet, device: str, precision: str) -> None:
    runtime = cuda_runtime_of(network, faces, device, precision)
    ids = [3, 7]
    with_graphs = runtime.run(ids, faces.windows(ids))
    assert set(runtime._graphs) == set(BATCH_SIZES)
    runtime._graphs.clear()
    assert "cuda_graphs" not in runtime.optimizations
    without = runtime.run(ids, faces.windows(ids))
    assert differences(with_graphs, without).max() <= 1


@pytest.mark.parametrize("device", on_cuda)
@pytest.mark.parametrize("n", [1, 3, 8])
def test_batches_give_what_single_frames_give(network: UNet, faces: FaceSet, device: str, n: int) -> None:
    # Kernels may differ by batch size: up to rounding in half precision.
    runtime = cuda_runtime_of(network, faces, device, "float16")
    ids = np.random.default_rng(n).permutation(N_FRAMES)[:n].tolist()
    together = runtime.run(ids, faces.windows(ids))
    alone = [runtime.run([i], faces.windows([i]))[0] for i in ids]
    for a, b in zip(together, alone, strict=True):
        assert psnr_db([a], [b]) >= MIN_PSNR_DB


@pytest.mark.parametrize("device", on_cuda)
def test_a_size_that_cannot_be_captured_runs_without(
    network: UNet, faces: FaceSet, plain: list[UInt8], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = CudaRuntime._step

    def not_in_fours(self: CudaRuntime, n: int) -> None:
        step(self, n)
        if n == 4 and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("not in fours")

    monkeypatch.setattr(CudaRuntime, "_step", not_in_fours)
    runtime = cuda_runtime_of(network, faces, device, "float32")
    assert set(runtime._graphs) == {1, 2} and "cuda_graphs" in runtime.optimizations
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    made = runtime.run(range(4), faces.windows(range(4)))
    assert psnr_db(made, plain[:4]) >= MIN_PSNR_DB


@pytest.mark.parametrize("device", on_cuda)
def test_memory_comes_back(network: UNet, faces: FaceSet, device: str) -> None:
    def load_and_drop() -> int:
        runtime = cuda_runtime_of(network, faces, device, "float16")
        runtime.run([0, 1], faces.windows([0, 1]))
        reserved = torch.cuda.memory_reserved()
        assert 0 < runtime._graph_bytes < runtime.nbytes <= reserved
        del runtime
        gc.collect()
        return_free_memory()
        return reserved

    load_and_drop()  # libraries keep what they allocated first
    before = torch.cuda.memory_reserved()
    assert load_and_drop() > before
    assert torch.cuda.memory_reserved() <= before + MIB


@pytest.mark.parametrize("device", on_cuda)
def test_two_models_run_while_others_load(network: UNet, faces: FaceSet, plain: list[UInt8], device: str) -> None:
    results: dict[str, float] = {}
    failures: list[BaseException] = []

    def use(name: str, runtime: CudaRuntime, ids: list[int], times: int) -> None:
        try:
            wanted = [plain[i] for i in ids]
            for _ in range(times):
                made = psnr_db(runtime.run(ids, faces.windows(ids)), wanted)
                results[name] = min(made, results.get(name, made))
        except BaseException as error:
            failures.append(error)

    def load(name: str) -> None:
        try:
            use(name, cuda_runtime_of(network, faces, device, "float16"), [6, 5, 4], 5)
        except BaseException as error:
            failures.append(error)

    first, second = (cuda_runtime_of(network, faces, device, "float16") for _ in range(2))
    threads = [
        threading.Thread(target=use, args=("first", first, [0, 1, 2], 60)),
        threading.Thread(target=use, args=("second", second, [8, 7], 60)),
        threading.Thread(target=load, args=("third",)),
        threading.Thread(target=load, args=("fourth",)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert set(results) == {"first", "second", "third", "fourth"} and min(results.values()) >= MIN_PSNR_DB
