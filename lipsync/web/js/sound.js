// The sound, and the one clock: what is shown follows what is heard.

const SMOOTHING = 0.05; // of a new value of the latency, which browsers report unevenly
const MAX_STEP_S = 0.05; // by which the context's clock goes on: that of a block of sound
const DRIFT = 0.001; // seconds a second, more than two clocks of one machine are apart
const SOON_S = 0.03; // a sound starts so much later than asked, so that it starts on a sample that is known

/** One AudioContext. A sound is started at a place of it, stopped, and started elsewhere. */
export class Sound {
  constructor() {
    this.context = null;
    this.source = null;
    this.latencyS = 0;
    this.ahead = -Infinity; // of the context's clock, to performance.now()
    this.lookedAt = 0;
  }

  /** The browser lets a page sound only after a key or a click: `waiting` is called if that is still to come. */
  async open(waiting = () => {}) {
    this.context ??= new AudioContext({ latencyHint: "interactive" });
    if (this.context.state === "running") {
      return this.context;
    }
    const resume = () => this.context.resume().catch(() => {});
    const timer = setTimeout(waiting, 700);
    document.addEventListener("pointerdown", resume);
    document.addEventListener("keydown", resume);
    try {
      await this.context.resume();
    } finally {
      clearTimeout(timer);
      document.removeEventListener("pointerdown", resume);
      document.removeEventListener("keydown", resume);
    }
    return this.context;
  }

  /** The clock as it is heard, in seconds: behind the context's own by what lies between it and the loudspeaker. */
  get now() {
    if (this.context === null) {
      return 0;
    }
    const latency = this.context.outputLatency;
    if (latency > 0) {
      this.latencyS = this.latencyS === 0 ? latency : this.latencyS + SMOOTHING * (latency - this.latencyS);
    }
    return this.contextTime() - this.latencyS;
  }

  /** The context's clock without its steps: it stands still while a block of sound is made, 20 ms here and there. Where
   * it has just gone on is where it should be. */
  contextTime() {
    const { currentTime } = this.context;
    const at = performance.now() / 1000;
    this.ahead = Math.max(currentTime - at, this.ahead - DRIFT * (at - this.lookedAt));
    this.lookedAt = at;
    return Math.min(at + this.ahead, currentTime + MAX_STEP_S);
  }

  /** Play from a place on, in seconds; without a buffer, silence. Returns what `now` is when the sound's begin is
   * heard, or would have been. */
  start(buffer, from = 0, { loop = false } = {}) {
    this.stop();
    const at = this.context.currentTime + SOON_S;
    if (buffer !== null) {
      const source = new AudioBufferSourceNode(this.context, { buffer, loop });
      source.connect(this.context.destination);
      source.start(at, loop ? from % buffer.duration : from);
      this.source = source;
    }
    return at - from;
  }

  stop() {
    if (this.source !== null) {
      this.source.stop();
      this.source.disconnect();
      this.source = null;
    }
  }

  /** A copy that lasts exactly so long: cut, or with silence at its end. */
  ofLength(buffer, seconds) {
    const { numberOfChannels, sampleRate } = buffer;
    const length = Math.max(1, Math.round(seconds * sampleRate));
    const copy = new AudioBuffer({ numberOfChannels, sampleRate, length });
    for (let channel = 0; channel < numberOfChannels; channel += 1) {
      copy.copyToChannel(buffer.getChannelData(channel).subarray(0, length), channel);
    }
    return copy;
  }
}
