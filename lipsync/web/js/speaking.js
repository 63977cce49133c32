// A recording that the face speaks: the sound is the master, and frames are asked for a little ahead of it.

import { RATE_HZ } from "./pcm.js";
import { withResolvers } from "./promises.js";
import { restOf } from "./resting.js";
import { Session } from "./session.js";
import { Timeline } from "./timeline.js";

const AHEAD_S = 1; // audio that is sent before it is heard
const MAX_PIECE_SAMPLES = RATE_HZ / 5;
const REST_S = 1; // of silence after the recording: the mouth goes to rest in it
const PUMP_MS = 40;

/** `run` speaks until the end, until `stop`, or until it fails. */
export class Speaking {
  /** `recording`: as readRecording gives it. */
  constructor(stage, model, { recording, name, startFrame }) {
    this.stage = stage;
    this.model = model;
    this.recording = recording;
    this.name = name;
    this.startFrame = startFrame;
    this.length = recording.pcm.length / 2; // samples
    this.maxAhead = 0; // no audio before the session is open
    this.isFlushed = this.isRested = false; // the recording was sent; so was the silence after it
    this.over = withResolvers();
  }

  async run() {
    const { player, sound } = this.stage;
    const text = `Speaking ${this.name}.`;
    this.timeline = new Timeline(sound, player, {
      buffer: this.recording.buffer,
      waiting: (isWaiting) => this.stage.say(isWaiting ? "Waiting for frames…" : text),
    });
    this.stage.say(text);
    player.begin(this.timeline);
    this.session = new Session(this.stage, this.model, {
      startFrame: this.startFrame,
      on: {
        started: ({ max_samples_ahead }) => {
          this.maxAhead = max_samples_ahead;
          this.pump();
        },
        frame: (_, isInTime) => {
          this.timeline.arrived(isInTime);
          this.pump();
        },
        ended: () => this.isRested && this.session.finish(),
      },
    });
    this.session.ended.then(() => (this.timeline.isComplete = true), this.over.reject);
    const timer = setInterval(() => this.pump(), PUMP_MS);
    try {
      await this.over.promise;
      this.stage.nextFrame = this.session.nextFrame;
    } finally {
      clearInterval(timer);
      this.stop();
    }
  }

  /** Ends it; the picture stays. */
  stop() {
    this.session?.cancel();
    this.over.resolve();
  }

  /** Ends it. Resolves to a resting frame to go on from, or null. */
  async interrupt() {
    if (this.session === undefined) {
      this.over.resolve();
      return null;
    }
    const { session } = this;
    const answer = session.interrupt(Math.max(0, this.length - session.sent));
    this.session = undefined; // it ends by itself
    this.over.resolve();
    const interrupted = await answer;
    return interrupted?.frame?.success ? restOf(interrupted) : null;
  }

  /** Send what may be sent, and end when all was shown. */
  pump() {
    const { session, timeline } = this;
    if (session === undefined) {
      return;
    }
    timeline.look();
    if (timeline.isComplete && this.stage.player.waiting.length === 0) {
      this.over.resolve();
      return;
    }
    const limit = Math.min((timeline.at + AHEAD_S) * RATE_HZ, session.shownEnd + this.maxAhead);
    while (session.sent < limit && !this.isRested) {
      const end = this.isFlushed ? this.length + REST_S * RATE_HZ : this.length;
      const count = Math.floor(Math.min(end, limit, session.sent + MAX_PIECE_SAMPLES)) - session.sent;
      if (count > 0) {
        session.send(this.piece(session.sent, count));
      }
      if (session.sent < end) {
        if (count <= 0) {
          return;
        }
        continue;
      }
      session.flush();
      this.isRested = this.isFlushed;
      this.isFlushed = true;
    }
  }

  piece(from, count) {
    return this.isFlushed ? new Uint8Array(count * 2) : this.recording.pcm.subarray(from * 2, (from + count) * 2);
  }
}
