// A model's own video with its own recording.

import { CallError } from "./connection.js";
import { FRAMES_PER_S, SAMPLES_PER_FRAME } from "./pcm.js";
import { withResolvers } from "./promises.js";
import { restingFrame } from "./resting.js";
import { Timeline } from "./timeline.js";

const AHEAD_FRAMES = 13; // half a second
const MAX_IN_FLIGHT = 6; // who asks for more at once is not in real time, to the server
const MAX_PER_S = 26.5; // the same of who asks for more in a second; above 25, so that it gets ahead
const WINDOW = 32; // answers that were not drawn yet; more than are ever waited for here
const PUMP_MS = 40;
const SPARE_FRAMES = 2; // that are skipped on top where the server is slow, so that the next is not just too late
const FOR_GOOD = [1, 3, 6]; // FrameErrorCode: the model is not there, the request is wrong, the server leaves

/** `run` plays until the end, until `stop`, or until it fails. */
export class Playing {
  constructor(stage, model, { frameCount, repeat }) {
    this.stage = stage;
    this.model = model;
    this.frameCount = frameCount;
    this.repeat = repeat;
    this.next = 0; // to be asked for; numbers go on when the video begins anew
    this.asked = []; // [number, when], in order
    this.roundTripS = 0;
    this.allowance = MAX_IN_FLIGHT;
    this.allowedAt = performance.now();
    this.over = withResolvers();
  }

  async run() {
    const { connection, player, sound } = this.stage;
    const recording = await this.stage.recordings.of(this.model);
    if (this.isStopped) {
      return;
    }
    const buffer = recording === null ? null : sound.ofLength(recording, this.frameCount / FRAMES_PER_S);
    const text = `Playing ${this.model}${recording === null ? ", silently: it has no recording" : ""}.`;
    this.timeline = new Timeline(sound, player, {
      buffer,
      loop: this.repeat,
      waiting: (isWaiting) => this.stage.say(isWaiting ? "Waiting for frames…" : text),
    });
    this.stage.say(text);
    const answered = (answer, missed) => this.answered(answer, missed);
    this.call = connection.call("StreamInference", answered, { window: WINDOW });
    this.call.ended.then(this.over.resolve, this.over.reject);
    player.begin(this.timeline);
    const timer = setInterval(() => this.pump(), PUMP_MS);
    this.pump();
    try {
      await this.over.promise;
    } finally {
      clearInterval(timer);
      this.stop();
    }
  }

  /** Ends it; the picture stays. */
  stop() {
    this.isStopped = true;
    this.call?.cancel();
    this.over.resolve();
  }

  /** Ends it. Resolves to a resting frame to go on from, or null. */
  async interrupt() {
    this.stop();
    return restingFrame(this.stage.connection, this.model, this.stage.player.shown?.frame_id ?? 0);
  }

  get end() {
    return this.repeat ? Infinity : this.frameCount;
  }

  pump() {
    const { timeline } = this;
    timeline.look();
    const place = timeline.at * FRAMES_PER_S;
    if (place >= this.end) {
      this.over.resolve();
      return;
    }
    const now = performance.now();
    this.allowance = Math.min(MAX_IN_FLIGHT, this.allowance + ((now - this.allowedAt) / 1000) * MAX_PER_S);
    this.allowedAt = now;
    if (timeline.position !== null) {
      // what cannot come in time is not asked for
      const soonest = Math.ceil(place + this.roundTripS * FRAMES_PER_S);
      if (this.next < soonest) {
        this.stage.player.missed += soonest + SPARE_FRAMES - this.next;
        this.next = soonest + SPARE_FRAMES;
      }
    }
    while (
      this.allowance >= 1 &&
      this.asked.length < MAX_IN_FLIGHT &&
      this.next < Math.min(this.end, place + AHEAD_FRAMES)
    ) {
      this.call.send({ model_name: this.model, frame_id: this.next % this.frameCount });
      this.asked.push([this.next, now]);
      this.next += 1;
      this.allowance -= 1;
    }
    timeline.isComplete = this.next >= this.end && this.asked.length === 0;
  }

  answered(answer, missed) {
    const { player } = this.stage;
    player.missed += this.asked.splice(0, missed).length;
    const [number, askedAt] = this.asked.shift();
    this.roundTripS += 0.2 * ((performance.now() - askedAt) / 1000 - this.roundTripS);
    if (!answer.success) {
      this.call.taken();
      player.missed += 1;
      this.failed(answer);
      return;
    }
    player.measure(answer);
    const isInTime = player.push({
      frame_id: answer.frame_id,
      first_sample: number * SAMPLES_PER_FRAME,
      end_sample: (number + 1) * SAMPLES_PER_FRAME,
      speaking: true,
      jpeg: answer.prediction_data,
      taken: () => this.call.taken(),
    });
    this.timeline.arrived(isInTime);
    this.pump();
  }

  failed(answer) {
    if (FOR_GOOD.includes(answer.error_code)) {
      this.over.reject(new CallError({ status: 9, message: answer.error }));
    } else {
      this.stage.complain(answer.error);
    }
  }
}
