// Samples of a microphone, at whatever rate it has, to the rate that is sent: piece by piece, without a seam.

const TAPS_EACH_SIDE = 16; // at the lower of both rates
const PASS = 0.92; // of the lower rate's half is kept; what is above would come back as other tones

/** Resamples by a windowed sinc whose phases are computed once: the rates' ratio is a fraction of small numbers. */
export class Resampler {
  constructor(fromHz, toHz) {
    const common = divisor(fromHz, toHz);
    this.step = fromHz / common; // input positions are counted in parts of 1 / phases
    this.phases = toHz / common;
    const lower = Math.min(1, toHz / fromHz);
    this.reach = Math.ceil(TAPS_EACH_SIDE / lower);
    const ofPhase = (_, phase) => kernel(phase / this.phases, this.reach, lower * PASS);
    this.taps = Array.from({ length: this.phases }, ofPhase);
    this.held = new Float32Array(this.reach); // what is before the first sample is silence
    this.at = 0; // of the next output, in the input that is held, from its sample `reach` on
  }

  /** More samples; returns those that are there now. Both Float32Array. */
  push(samples) {
    const input = new Float32Array(this.held.length + samples.length);
    input.set(this.held);
    input.set(samples, this.held.length);
    const last = input.length - 2 * this.reach; // positions below it have all of their taps
    const count = Math.max(0, Math.ceil((last * this.phases - this.at) / this.step));
    const output = new Float32Array(count);
    for (let n = 0; n < count; n += 1) {
      const position = Math.floor(this.at / this.phases);
      const taps = this.taps[this.at % this.phases];
      let sum = 0;
      for (let k = 0; k < taps.length; k += 1) {
        sum += taps[k] * input[position + k];
      }
      output[n] = sum;
      this.at += this.step;
    }
    const done = Math.min(Math.floor(this.at / this.phases), input.length);
    this.held = input.slice(done);
    this.at -= done * this.phases;
    return output;
  }
}

/** Taps for an output that lies `fraction` after an input sample: of the inputs from `reach` before it on. */
function kernel(fraction, reach, cut) {
  const taps = new Float32Array(2 * reach + 1);
  let sum = 0;
  for (let k = 0; k < taps.length; k += 1) {
    const x = k - reach - fraction;
    const window = Math.abs(x) < reach ? 0.5 + 0.5 * Math.cos((Math.PI * x) / reach) : 0;
    taps[k] = window * (x === 0 ? 1 : Math.sin(Math.PI * cut * x) / (Math.PI * cut * x));
    sum += taps[k];
  }
  return taps.map((tap) => tap / sum);
}

function divisor(a, b) {
  return b === 0 ? a : divisor(b, a % b);
}
