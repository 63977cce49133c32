// A session of live audio: the call StreamAudio, and what its events mean for the player.

import { AudioEvent } from "./messages.js";
import { RATE_HZ } from "./pcm.js";

const WINDOW = 48; // answers that were not dealt with: more than are ever waited for here
const INTERRUPT_MS = 3000; // a server that does not answer by then is not waited for

/** Opens when it is made. `on` has functions that are called with an answer: `started`, `arriving` (a frame,
 * before the player has it), `frame` (and whether it came in time), `ended`. */
export class Session {
  constructor(stage, model, { startFrame = 0, on = {} } = {}) {
    this.stage = stage;
    this.on = on;
    this.sent = 0; // samples
    this.shownEnd = 0; // sample after the last whose frame came
    this.nextFrame = startFrame;
    this.isInterrupted = false;
    const answered = (answer, missed) => this.answered(answer, missed);
    this.call = stage.connection.call("StreamAudio", answered, { window: WINDOW });
    this.call.send({ session: { model_name: model, start_frame: startFrame, sample_rate_hz: RATE_HZ } });
    this.ended = this.call.ended;
  }

  send(pcm) {
    this.call.send({ pcm });
    this.sent += pcm.length / 2;
  }

  flush() {
    this.call.send({ flush: {} });
  }

  finish() {
    this.call.finish();
  }

  cancel() {
    this.call.cancel();
  }

  /** Drop all that was said; resolves to the INTERRUPTED answer, or null if there is none. The session ends with it. */
  async interrupt(droppedSamples = 0) {
    this.isInterrupted = true;
    let timer;
    const answer = new Promise((resolve) => {
      this.tellInterrupted = resolve;
      timer = setTimeout(() => resolve(null), INTERRUPT_MS);
    });
    this.call.send({ interrupt: { dropped_samples: droppedSamples } });
    const over = this.ended.then(() => null, () => null);
    const interrupted = await Promise.race([answer, over]);
    clearTimeout(timer);
    this.call.cancel();
    return interrupted;
  }

  answered(answer, missed) {
    const { player } = this.stage;
    const taken = () => this.call.taken();
    if (this.isInterrupted) {
      taken();
      if (answer.event === AudioEvent.INTERRUPTED) {
        this.tellInterrupted(answer);
      }
      return;
    }
    player.missed += missed;
    this.nextFrame = answer.next_frame;
    if (answer.event !== AudioEvent.FRAME) {
      taken();
      if (answer.event === AudioEvent.STARTED) {
        this.on.started?.(answer);
      } else if (answer.event === AudioEvent.END) {
        this.on.ended?.(answer);
      }
      return;
    }
    this.shownEnd = answer.end_sample;
    this.on.arriving?.(answer);
    let isInTime = false;
    if (!answer.frame.success) {
      taken();
      player.missed += 1;
      this.stage.complain(answer.frame.error);
    } else {
      player.measure(answer.frame);
      isInTime = player.push({ ...frameOf(answer), taken });
    }
    this.on.frame?.(answer, isInTime);
  }
}

/** An answer with a picture, as the player takes it. */
export function frameOf(answer) {
  return {
    frame_id: answer.frame.frame_id,
    first_sample: answer.first_sample,
    end_sample: answer.end_sample,
    speaking: answer.event === AudioEvent.FRAME && answer.rest < 1,
    jpeg: answer.frame.prediction_data,
  };
}
