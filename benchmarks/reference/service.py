"""The calls of the contract that the design had, with grpcio. Frames are made one after another, in one thread."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio

from .model import MadeFrame, Rectangle, ReferenceFault, ReferenceModel
from .stubs import Stubs

T = TypeVar("T")

MAX_MESSAGE_BYTES = 50 * 1024 * 1024
KEPT_TIMES = 10_000
"""Frame times a model that GetStats looks back on."""


class ReferenceService:
    """Fits the generated servicer: one coroutine for each RPC.

    Args:
        folder: of the packages, by name.
    """

    def __init__(self, stubs: Stubs, folder: Path) -> None:
        self._pb2 = stubs.pb2
        self._folder = folder
        self._models: dict[str, ReferenceModel] = {}
        self._times_ms: dict[str, list[float]] = {}
        self._worker = ThreadPoolExecutor(1, "reference")
        self._started = time.monotonic()

    async def _in_worker(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *args)

    async def load(self, name: str, path: str = "") -> ReferenceModel:
        """Load a package of the folder. Raises ReferenceFault."""
        if name not in self._models:
            self._models[name] = await self._in_worker(ReferenceModel, self._folder / (path or name))
            self._times_ms[name] = []
        return self._models[name]

    async def face(self, name: str, frame_id: int) -> tuple[bytes, Rectangle]:
        """The network's face, a JPEG, and where it belongs; the first model for names that are unknown, and frames
        that wrap round. Raises ReferenceFault without models."""
        model = self._models.get(name) or next(iter(self._models.values()), None)
        if model is None:
            raise ReferenceFault("no model is loaded")
        return await self._in_worker(model.make_face, frame_id % model.frame_count)

    async def _answer(self, name: str, frame_id: int) -> Any:
        arrived = time.perf_counter()
        if name not in self._models:
            return self._failed(name, frame_id, f"model {name!r} is not loaded", "MODEL_NOT_FOUND")
        try:
            made = await self._in_worker(self._models[name].make, frame_id)
        except ReferenceFault as fault:
            return self._failed(name, frame_id, str(fault), "FRAME_OUT_OF_RANGE")
        total_ms = (time.perf_counter() - arrived) * 1000
        times = self._times_ms[name]
        times.append(total_ms)
        del times[:-KEPT_TIMES]
        return self._made(name, frame_id, made, total_ms)

    def _made(self, name: str, frame_id: int, made: MadeFrame, total_ms: float) -> Any:
        x1, y1, x2, y2 = made.rectangle
        return self._pb2.OptimizedInferenceResponse(
            success=True,
            frame_id=frame_id,
            prediction_data=made.jpeg,
            prediction_shape=str(made.shape),
            bounds=[x1, y1, x2 - x1, y2 - y1],
            processing_time_ms=total_ms,
            prepare_time_ms=made.prepare_ms,
            inference_time_ms=made.inference_ms,
            composite_time_ms=made.composite_ms,
            encode_time_ms=made.encode_ms,
            queue_time_ms=max(0.0, total_ms - made.total_ms),
            model_name=name,
        )

    def _failed(self, name: str, frame_id: int, error: str, code: str) -> Any:
        return self._pb2.OptimizedInferenceResponse(
            success=False,
            frame_id=frame_id,
            error=error,
            error_code=getattr(self._pb2, f"FRAME_ERROR_CODE_{code}"),
            model_name=name,
        )

    # The calls, named as the contract names them

    async def GenerateInference(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return await self._answer(request.model_name, request.frame_id)

    async def GenerateBatchInference(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        arrived = time.perf_counter()
        answers = [await self._answer(request.model_name, frame_id) for frame_id in request.frame_ids]
        total_ms = (time.perf_counter() - arrived) * 1000
        return self._pb2.BatchInferenceResponse(
            responses=answers,
            total_processing_time_ms=total_ms,
            avg_frame_time_ms=total_ms / len(answers) if answers else 0.0,
        )

    async def StreamInference(
        self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[Any]:
        async for request in requests:
            yield await self._answer(request.model_name, request.frame_id)

    async def StreamAudio(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "the reference design has no live audio")

    async def GenerateBatchWithAudio(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "the reference design has no live audio")

    async def UnloadPackage(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "the reference design keeps what it has loaded")

    async def GetModelMetadata(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "the reference design tells no metadata")

    async def GetVideoFrame(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, "the reference design shows no frames of its videos")

    async def LoadPackage(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        try:
            model = await self.load(request.model_name, request.package_path)
        except (ReferenceFault, OSError) as fault:
            return self._pb2.LoadPackageResponse(success=False, model_name=request.model_name, error=str(fault))
        return self._pb2.LoadPackageResponse(
            success=True,
            model_name=request.model_name,
            frame_count=model.frame_count,
            message=f"{request.model_name}: {model.frame_count} frames",
            initialization_time_ms=model.load_ms,
            device="cpu",
            videos_loaded=list(model.videos),
            audio_features_shape=list(model.features.shape),
            memory_mapped_audio=True,
        )

    async def GetStats(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        name = request.model_name
        if name not in self._models:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"model {name!r} is not loaded")
        times = self._times_ms[name] or [0.0]
        cuts = statistics.quantiles(times, n=100, method="inclusive") if len(times) > 1 else times * 99
        return self._pb2.StatsResponse(
            model_name=name,
            total_requests=len(self._times_ms[name]),
            avg_inference_time_ms=statistics.fmean(times),
            min_inference_time_ms=min(times),
            max_inference_time_ms=max(times),
            frame_count=self._models[name].frame_count,
            device="cpu",
            p50_inference_time_ms=cuts[49],
            p95_inference_time_ms=cuts[94],
            p99_inference_time_ms=cuts[98],
        )

    async def ListModels(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return self._pb2.ListModelsResponse(loaded_models=sorted(self._models), count=len(self._models))

    async def HealthCheck(self, request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        return self._pb2.HealthResponse(
            healthy=True,
            status="SERVING",
            loaded_models=len(self._models),
            uptime_seconds=int(time.monotonic() - self._started),
        )
