"""A Pipecat bot with a face: python examples/pipecat_bot.py, then open http://localhost:7860

Takes pip install 'pipecat-ai[webrtc,runner]' too, and an OPENAI_API_KEY in the environment; services of other providers
take the places of OpenAI's. The face comes from LIPSYNC_ADDRESS (localhost:50051), of the model LIPSYNC_MODEL (demo).
"""

from __future__ import annotations

import os

from pipecat.audio.vad.silero import SileroVADAnalyzer
from pipecat.pipeline.pipeline import Pipeline
from pipecat.pipeline.worker import PipelineWorker
from pipecat.processors.aggregators.llm_context import LLMContext
from pipecat.processors.aggregators.llm_response_universal import LLMContextAggregatorPair, LLMUserAggregatorParams
from pipecat.runner.types import RunnerArguments
from pipecat.runner.utils import create_transport
from pipecat.services.openai.llm import OpenAILLMService
from pipecat.services.openai.stt import OpenAISTTService
from pipecat.services.openai.tts import OpenAITTSService
from pipecat.transports.base_transport import BaseTransport, TransportParams
from pipecat.workers.runner import WorkerRunner

from lipsync.integrations.pipecat import LipsyncVideoService

PROMPT = "You are a friendly presenter. Answer in one or two short sentences."


def transport_params() -> TransportParams:
    picture = {"video_out_width": 1280, "video_out_height": 720, "video_out_framerate": 25}  # the model's
    live = {"audio_in_enabled": True, "audio_out_enabled": True, "video_out_enabled": True, "video_out_is_live": True}
    return TransportParams(**live, **picture)


def make_worker(transport: BaseTransport) -> PipelineWorker:
    key = os.environ["OPENAI_API_KEY"]
    stt = OpenAISTTService(api_key=key)
    llm = OpenAILLMService(api_key=key, settings=OpenAILLMService.Settings(system_instruction=PROMPT))
    tts = OpenAITTSService(api_key=key)
    face = LipsyncVideoService(
        os.environ.get("LIPSYNC_ADDRESS", "localhost:50051"), model=os.environ.get("LIPSYNC_MODEL", "demo")
    )
    user, assistant = LLMContextAggregatorPair(
        LLMContext(), user_params=LLMUserAggregatorParams(vad_analyzer=SileroVADAnalyzer())
    )
    return PipelineWorker(Pipeline([transport.input(), stt, user, llm, tts, face, transport.output(), assistant]))


async def bot(arguments: RunnerArguments) -> None:
    worker = make_worker(await create_transport(arguments, {"webrtc": transport_params}))
    runner = WorkerRunner(handle_sigint=arguments.handle_sigint)
    await runner.add_workers(worker)
    await runner.run()


if __name__ == "__main__":
    from pipecat.runner.run import main  # finds `bot`

    main()
