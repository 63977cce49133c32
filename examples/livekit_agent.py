"""A LiveKit agent with a face, in one process: python examples/livekit_agent.py dev

Hears, thinks and speaks by LiveKit's inference, under the LIVEKIT_URL, LIVEKIT_API_KEY and LIVEKIT_API_SECRET of the
environment; plugins of other providers (livekit-plugins-openai and so on) go where the names stand. The face comes from
LIPSYNC_ADDRESS (localhost:50051), of the model LIPSYNC_MODEL (demo).
"""

from __future__ import annotations

import contextlib
import os

from livekit import rtc
from livekit.agents import Agent, AgentServer, AgentSession, JobContext, cli
from livekit.agents.voice.avatar import AvatarRunner, QueueAudioOutput
from livekit.agents.voice.room_io import RoomOptions

import lipsync
from lipsync.integrations.livekit import LipsyncVideoGenerator

PROMPT = "You are a friendly presenter. Answer in one or two short sentences."
server = AgentServer()


def make_session() -> AgentSession:
    return AgentSession(
        stt="deepgram/nova-3",
        llm="openai/gpt-4.1-mini",
        tts="cartesia/sonic-3",
        turn_handling={"interruption": {"resume_false_interruption": False}},  # an avatar cannot pause
    )


async def give_face(session: AgentSession, room: rtc.Room, generator: LipsyncVideoGenerator) -> AvatarRunner:
    """What the session says goes to the face, and the face with its sound to the room."""
    audio = QueueAudioOutput(sample_rate=generator.sample_rate_hz, wait_playback_start=True)
    runner = AvatarRunner(room, audio_recv=audio, video_gen=generator, options=await generator.avatar_options())
    session.output.audio = audio
    return runner


@server.rtc_session()
async def entrypoint(ctx: JobContext) -> None:
    closing = contextlib.AsyncExitStack()
    ctx.add_shutdown_callback(closing.aclose)
    client = await closing.enter_async_context(lipsync.Client(os.environ.get("LIPSYNC_ADDRESS", "localhost:50051")))
    model = os.environ.get("LIPSYNC_MODEL", "demo")
    generator = await closing.enter_async_context(LipsyncVideoGenerator(client, model))
    session = make_session()
    runner = await give_face(session, ctx.room, generator)
    closing.push_async_callback(runner.aclose)
    await ctx.connect()
    await runner.start()
    await session.start(Agent(instructions=PROMPT), room=ctx.room, room_options=RoomOptions(audio_output=False))
    await session.generate_reply(instructions="Greet the user.")


if __name__ == "__main__":
    cli.run_app(server)
