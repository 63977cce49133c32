// A model's face while nobody speaks.

import { AudioEvent } from "./messages.js";

/** A frame at rest near a place of the video, and where to go on from: `{frame_id, jpeg, nextFrame ...}`.
 *
 * A session that is interrupted before it began tells it. A model that cannot hear has no sessions: then it is the
 * video's own frame. Throws CallError. */
export async function restingFrame(connection, model, near) {
  try {
    return await interrupted(connection, model, near);
  } catch (error) {
    if (error.isLost) {
      throw error;
    }
  }
  const answer = await connection.ask("GetVideoFrame", { model_name: model, frame_id: near, video_type: "full_body" });
  if (!answer.success) {
    throw new Error(answer.error);
  }
  return { frame_id: near, first_sample: 0, end_sample: 0, speaking: false, jpeg: answer.frame_data, nextFrame: near };
}

async function interrupted(connection, model, near) {
  let rest = null;
  const call = connection.call("StreamAudio", (answer) => {
    if (answer.event === AudioEvent.INTERRUPTED && answer.frame?.success) {
      rest = answer;
    }
  });
  call.send({ session: { model_name: model, start_frame: near, sample_rate_hz: 16_000 } });
  call.send({ interrupt: {} });
  call.finish();
  await call.ended;
  if (rest === null) {
    throw new Error("the server sent no resting frame");
  }
  return restOf(rest);
}

/** An INTERRUPTED answer as a frame to show. */
export function restOf({ frame, first_sample, next_frame }) {
  const { frame_id, prediction_data: jpeg } = frame;
  return { frame_id, first_sample, end_sample: first_sample, speaking: false, jpeg, nextFrame: next_frame };
}
