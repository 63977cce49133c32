// Frames on the canvas, each while its sound is heard.

import { RATE_HZ, SAMPLES_PER_FRAME } from "./pcm.js";

const DECODED_AHEAD = 5; // pictures that are kept ready; more would only take memory
const SECOND_MS = 1000;
const WEIGHT = 0.2; // of a new frame's times in those that are told
const SWEEP_MS = 250; // a hidden page draws nothing, but what has passed must go

const STEPS = ["queue", "prepare", "inference", "composite", "encode"];

/** Draws frames of `{frame_id, first_sample, end_sample, speaking, jpeg, taken()}`; samples are at 16 kHz.
 *
 * `taken` is called once for every frame: when it was drawn, came too late, or was dropped.
 *
 * Attributes:
 *   shown: the last drawn frame, `at` what performance.now(), or null.
 *   missed: frames of this performance that were not drawn.
 */
export class Player {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d", { alpha: false });
    this.shown = null;
    this.missed = 0;
    this.waiting = []; // in order
    // `position` is what is heard now, in seconds, null while the sound waits; `at` is where it waits, too
    this.timeline = null;
    this.generation = 0; // what was begun in an earlier one must not be drawn
    this.drawnAt = [];
    this.errors = []; // [when, ms]
    this.latency = Object.fromEntries([...STEPS, "network"].map((step) => [step, 0]));
    this.isCached = false;
    this.ticking = 0;
    this.sweeping = 0;
  }

  /** What can be said of the last second; `sync_error_ms` is the worst of it. `cached`: the server had the last frame
   * already, and no step of it took time.
   *
   * It is how far what is heard lies outside of the frame that is seen: positive if the picture is late. */
  get measured() {
    const since = performance.now() - SECOND_MS;
    this.drawnAt = this.drawnAt.filter((at) => at > since);
    this.errors = this.errors.filter(([at]) => at > since);
    const worst = this.errors.reduce((most, [, ms]) => (Math.abs(ms) > Math.abs(most) ? ms : most), 0);
    return {
      fps: this.drawnAt.length,
      missed: this.missed,
      sync_error_ms: worst,
      latency_ms: { ...this.latency },
      cached: this.isCached,
    };
  }

  /** Frames that wait for their time, and what is heard: from now on. */
  begin(timeline) {
    this.end();
    this.timeline = timeline;
    this.missed = 0;
    this.isCached = false;
    this.drawnAt = [];
    this.errors = [];
    this.ticking = requestAnimationFrame(() => this.tick());
    this.sweeping = setInterval(() => this.sweep(), SWEEP_MS);
  }

  /** Nothing more is drawn of what came so far: the picture stays. */
  end() {
    this.generation += 1;
    this.timeline = null;
    cancelAnimationFrame(this.ticking);
    clearInterval(this.sweeping);
    const dropped = this.waiting;
    this.waiting = [];
    for (const frame of dropped) {
      this.leave(frame);
    }
  }

  /** One more frame, after those before it. Returns false if it came too late. */
  push(frame) {
    if (frame.end_sample <= (this.timeline?.at ?? 0) * RATE_HZ) {
      this.missed += countOf(frame);
      frame.taken();
      return false;
    }
    this.waiting.push({ ...frame, bitmap: null, isDecoding: false });
    this.decodeAhead();
    return true;
  }

  /** Show a frame now, if nothing else happens before it is decoded. */
  async show(frame) {
    const { generation } = this;
    const bitmap = await decoded(frame.jpeg);
    if (generation === this.generation) {
      this.draw(frame, bitmap);
    }
    bitmap.close();
  }

  /** Keep the times of an answer. */
  measure(response) {
    this.isCached = response.cached;
    if (response.cached) {
      return;
    }
    for (const step of STEPS) {
      this.measureStep(step, response[`${step}_time_ms`]);
    }
  }

  measureStep(step, ms) {
    const before = this.latency[step];
    this.latency[step] = before === 0 ? ms : before + WEIGHT * (ms - before);
  }

  positionInSamples() {
    const position = this.timeline?.position ?? null;
    return position === null ? null : position * RATE_HZ;
  }

  tick() {
    this.ticking = requestAnimationFrame(() => this.tick());
    const position = this.positionInSamples();
    if (position === null) {
      return;
    }
    this.sweep(position);
    const next = this.waiting[0];
    if (next !== undefined && next.first_sample <= position && next.bitmap !== null) {
      this.waiting.shift();
      this.draw(next, next.bitmap);
      this.drawnAt.push(performance.now());
      this.leave(next);
      this.decodeAhead();
    }
    if (this.shown?.generation === this.generation) {
      this.errors.push([performance.now(), (outside(position, this.shown) / RATE_HZ) * 1000]);
    }
  }

  /** What has passed was missed. */
  sweep(position = this.positionInSamples()) {
    while (position !== null && this.waiting.length > 0 && this.waiting[0].end_sample <= position) {
      const frame = this.waiting.shift();
      this.missed += countOf(frame);
      this.leave(frame);
    }
    this.decodeAhead();
  }

  draw(frame, bitmap) {
    if (this.canvas.width !== bitmap.width || this.canvas.height !== bitmap.height) {
      this.canvas.width = bitmap.width;
      this.canvas.height = bitmap.height;
    }
    this.context.drawImage(bitmap, 0, 0);
    const { frame_id, first_sample, end_sample, speaking, jpeg } = frame;
    const { generation } = this;
    this.shown = { frame_id, first_sample, end_sample, speaking, jpeg, at: performance.now(), generation };
  }

  leave(frame) {
    frame.bitmap?.close();
    frame.hasLeft = true;
    frame.taken();
  }

  decodeAhead() {
    for (const frame of this.waiting.slice(0, DECODED_AHEAD)) {
      if (!frame.isDecoding) {
        frame.isDecoding = true;
        this.decode(frame);
      }
    }
  }

  async decode(frame) {
    try {
      const bitmap = await decoded(frame.jpeg);
      if (frame.hasLeft) {
        bitmap.close();
      } else {
        frame.bitmap = bitmap;
      }
    } catch (error) {
      console.warn(`frame ${frame.frame_id} cannot be decoded`, error); // it passes, and counts as missed
    }
  }
}

/** 1; 0 for the rest at a recording's end, which may be shorter than a screen's own frames. */
function countOf(frame) {
  return Number(frame.end_sample - frame.first_sample >= SAMPLES_PER_FRAME / 2);
}

/** How many samples a position lies before (negative) or after a frame's own. */
function outside(position, frame) {
  if (position < frame.first_sample) {
    return position - frame.first_sample;
  }
  return Math.max(0, position - frame.end_sample);
}

/** A JPEG as the pixels that it holds, off the page's own thread. */
function decoded(jpeg) {
  return createImageBitmap(new Blob([jpeg], { type: "image/jpeg" }), { colorSpaceConversion: "none" });
}
