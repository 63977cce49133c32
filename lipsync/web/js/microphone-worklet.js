// Runs beside the sound: what a microphone hears, as pieces of 16 kHz, mono, s16le.

import { Resampler } from "./resample.js";
import { toS16 } from "./pcm.js";

const RATE_HZ = 16_000;
const PIECE_SAMPLES = RATE_HZ / 25; // 40 ms: a frame's

class Microphone extends AudioWorkletProcessor {
  constructor() {
    super();
    this.resampler = new Resampler(sampleRate, RATE_HZ);
    this.piece = new Float32Array(PIECE_SAMPLES);
    this.filled = 0;
    this.startedAt = null; // the clock when its first sample was heard
  }

  process([input]) {
    if (input.length === 0) {
      return true;
    }
    this.startedAt ??= currentTime;
    for (const sample of this.resampler.push(input[0])) {
      this.piece[this.filled] = sample;
      this.filled += 1;
      if (this.filled === PIECE_SAMPLES) {
        const pcm = toS16(this.piece);
        this.port.postMessage({ pcm, startedAt: this.startedAt }, [pcm.buffer]);
        this.filled = 0;
      }
    }
    return true;
  }
}

registerProcessor("microphone", Microphone);
