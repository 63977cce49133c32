// When a performance's sound runs: `position` is what is heard now, in seconds from its begin, or null while it waits.

import { RATE_HZ } from "./pcm.js";

const START_FRAMES = 5; // that are there before the sound starts
const RESUME_FRAMES = 10; // the same before it goes on: who was late will be so again
const PATIENCE_S = 0.5; // without any more frames; then those that are there are enough
const DRY_S = 0.12; // without any frame that comes in time; then the sound waits for the picture

/** Of a recording: it starts when a few frames are there, and waits when none come. */
export class Timeline {
  /** `waiting(isWaiting)` is called when the sound stops to wait for frames, and when it goes on. */
  constructor(sound, player, { buffer = null, loop = false, waiting = () => {} }) {
    this.sound = sound;
    this.player = player;
    this.buffer = buffer;
    this.loop = loop;
    this.tellWaiting = waiting;
    this.zero = null; // the clock at the begin
    this.place = 0; // where it stopped
    this.wasStarted = false;
    this.isComplete = false; // no more frames will come
    this.arrivedAt = 0;
  }

  get position() {
    return this.zero === null ? null : this.sound.now - this.zero;
  }

  /** The position, or where it waits. */
  get at() {
    return Math.max(0, this.position ?? this.place);
  }

  /** A frame came, in time or not. */
  arrived(isInTime) {
    if (isInTime) {
      this.arrivedAt = this.sound.now;
    }
    this.look();
  }

  /** Whether to start, or to wait. To be called often. */
  look() {
    const { waiting } = this.player;
    if (this.zero === null) {
      const enough = this.wasStarted ? RESUME_FRAMES : START_FRAMES;
      const isAll = this.isComplete || this.sound.now - this.arrivedAt > PATIENCE_S; // that will come, for now
      if (waiting.length >= enough || (isAll && waiting.length > 0)) {
        this.arrivedAt = this.sound.now;
        this.zero = this.sound.start(this.buffer, this.place, { loop: this.loop });
        if (this.wasStarted) {
          this.tellWaiting(false);
        }
        this.wasStarted = true;
      }
      return;
    }
    const isDry = waiting.length === 0 && this.sound.now - this.arrivedAt > DRY_S;
    if (isDry && !this.isComplete) {
      this.place = this.at;
      this.zero = null;
      this.sound.stop();
      this.tellWaiting(true);
    }
  }
}

const MARGIN_S = 0.06; // of a frame that comes as expected, before it is due
const LATE_S = 0.02; // more than what it takes
const LOOK_BACK_S = 5;
const TOO_EARLY_S = 0.12; // if all frames of a while come as early, they may be shown sooner

/** Of a microphone: frames are due a little after they come, later if some come late, sooner if all come early. */
export class LiveTimeline {
  constructor(sound) {
    this.sound = sound;
    this.zero = null;
    this.least = Infinity; // margin of late
    this.since = 0;
  }

  get position() {
    return this.zero === null ? null : this.sound.now - this.zero;
  }

  get at() {
    return this.position ?? 0;
  }

  /** A frame came that shows the sound from this sample on. */
  arrived(firstSample) {
    const { now } = this.sound;
    const usual = now - firstSample / RATE_HZ;
    if (this.zero === null) {
      this.zero = usual + MARGIN_S;
      this.since = now;
    }
    const margin = this.zero - usual;
    this.least = Math.min(this.least, margin);
    if (margin < 0) {
      this.zero += LATE_S - margin;
      this.look(now);
    } else if (now - this.since > LOOK_BACK_S) {
      if (this.least > TOO_EARLY_S) {
        this.zero -= this.least - MARGIN_S;
      }
      this.look(now);
    }
  }

  look(now) {
    this.least = Infinity;
    this.since = now;
  }
}
